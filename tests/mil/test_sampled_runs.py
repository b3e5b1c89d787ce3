"Encoder and aggregator on sampled patches, from the command line."

import shutil
import signal

import numpy as np
import pytest
import torch
from refusals import refusal
from resumed import as_if_never_stopped, rows
from runs import refused

from streaming_pathology.cli import commands as cli
from streaming_pathology.evaluation.cards import network_of
from streaming_pathology.evaluation.predict import encoder_of, load_model
from streaming_pathology.mil.sampled import SampledMIL
from streaming_pathology.runs.methods import method_of
from streaming_pathology.runs.settings import MILSettings
from streaming_pathology.slides.cohorts import tiny_cohort
from streaming_pathology.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures('small_resnet')

SHOWN = ['--spacing', 4, '--patch-size', 32, '--patch-batch-size', 4]
TRAINED = ['--epochs', 2, '--batch-size', 3, '--augment', 'paper', '--checkpoint-minutes', 0]
TRAIN = [*SHOWN, *TRAINED, '--heatmaps', 2, '--sampled', 6]


@pytest.fixture(scope='module')
def whole(once):
    "A cohort, and a run on it that was never stopped."

    def make(folder):
        manifest = tiny_cohort(folder / 'cohort', size=(150, 200))
        assert cli.main(['mil', manifest, folder / 'run', *TRAIN]) == 0

    return once('sampled', make)


def table(path):
    return rows(path, 'seconds')


def test_it_resumes_after_each_slide(whole, tmp_path, monkeypatch):
    command = ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *TRAIN, '--resume']
    save, saved = Checkpoints.save, []

    def stopped(self, s):
        save(self, s)
        saved.append(1)
        if len(saved) % 7 == 0:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, 'save', stopped)
    stops = 0
    while (status := cli.main(command)) == 75:
        stops += 1
    assert status == 0 and stops >= 3
    as_if_never_stopped(tmp_path / 'run', whole / 'run')


def test_what_it_writes_is_what_is_predicted(whole, tmp_path):
    run, manifest = whole / 'run', whole / 'cohort/manifest.csv'
    written = table(run / 'predictions.csv')
    assert len(written) == 12
    heatmaps = [np.load(path) for path in run.glob('heatmaps/*.npy')]
    assert len(heatmaps) == 2
    assert all(0 <= heat.min() and heat.max() == 1 for heat in heatmaps)  # attention
    assert cli.main(['predict', run, manifest, tmp_path / 'p.csv']) == 0
    assert table(tmp_path / 'p.csv') == written
    assert cli.main(['export', run, tmp_path / 'm.safetensors']) == 0
    assert cli.main(['predict', tmp_path / 'm.safetensors', manifest, tmp_path / 'q.csv']) == 0
    assert table(tmp_path / 'q.csv') == written
    report = (run / 'report/index.html').read_text()
    assert 'Campanella et al. 2024' in report


def test_predictions_do_not_depend_on_patches_at_a_time_nor_on_the_sample(whole):
    model, card = load_model(whole / 'run')
    assert isinstance(model, SampledMIL)
    assert 'trained together with abmil' in network_of(card)
    assert card['aggregator'] == dict(name='abmil', k=None, dropout=0.0)
    assert card['bags']['batch'] == 4
    assert not [name for name in model.state_dict() if '.fc.' in name]


def test_the_heatmap_of_a_trained_network_is_its_attention(whole, tmp_path, capsys):
    run, slide = whole / 'run', whole / 'cohort/slides/s00.tiff'
    assert cli.main(['heatmap', run, slide, tmp_path / 'maps']) == 0
    heat = np.load(tmp_path / 'maps/maps/s00.npy')
    assert 0 <= heat.min() and heat.max() == 1
    words = ['heatmap', run, slide, tmp_path / 'x', '--method', 'gradient']
    refused(capsys, words, 'network of patches')


def test_a_run_again_is_the_same(whole, tmp_path):
    assert cli.main(['mil', whole / 'run/settings.toml', tmp_path / 'run']) == 0
    as_if_never_stopped(tmp_path / 'run', whole / 'run')


def test_another_sample_is_another_run(whole, tmp_path, capsys):
    shutil.copytree(whole / 'run', tmp_path / 'run')
    command = ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *TRAIN]
    again = ['--resume', '--accept-changes']
    for changed in (['--sampled', 4], ['--sampled', 'all'], ['--aggregator', 'mean']):
        refused(capsys, [*command, *changed, *again], 'cannot be changed on resume', changed[0])


@pytest.mark.parametrize(
    'more',
    [
        ['--sampled', 'all', '--aggregator', 'transmil', '--amp', 'bf16'],
        ['--sampled', 3, '--aggregator', 'clam', '--ema', 0.9, '--dropout', 0.2, '--workers', 1],
        ['--sampled', 3, '--aggregator', 'topk', '--top-k', 2, '--freeze-until', 'layer4'],
        ['--sampled', 3, '--downsample', '1,2', '--pool', 'max', '--stride', 16],
    ],
    ids=str,
)
def test_with_other_settings(whole, tmp_path, more):
    command = ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *SHOWN]
    assert cli.main([*command, '--epochs', 1, '--heatmaps', 0, *more]) == 0
    slides = whole / 'cohort/slides'
    assert cli.main(['predict', tmp_path / 'run', slides, tmp_path / 'p.csv']) == 0


def test_its_encoder_is_a_backbone_for_patch_embeddings(whole, tmp_path):
    one, two = (encoder_of(whole / 'run') for _ in range(2))
    assert one.sealed() == two.sealed()  # nothing random in it
    patches = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    x, scores = one(patches)
    model, _ = load_model(whole / 'run')
    assert scores is None
    torch.testing.assert_close(x, model.embed(patches).detach())
    command = ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *SHOWN, '--epochs', 1]
    backbone = ['--aggregator', 'abmil', '--backbone', whole / 'run', '--heatmaps', 0]
    assert cli.main([*command, *backbone]) == 0
    assert cli.main([*command, *backbone, '--resume']) == 0


@pytest.mark.parametrize(
    'options, says',
    [
        (['--sampled', 0], '--sampled is 0'),
        (['--sampled', 'half'], 'give one, or all'),
        (['--sampled', 4, '--annotation', 'mask'], '--annotation does not apply with --sampled'),
        (['--sampled', 4, '--patches-per-slide', 3], '--patches-per-slide does not apply'),
        (['--sampled', 4, '--backbone', 'x.pt'], '--backbone does not apply with --sampled'),
        (['--sampled', 4, '--features', 'cache'], '--features does not apply with --sampled'),
        (['--sampled', 4, '--views', 2], '--views does not apply with --sampled'),
        (['--sampled', 4, '--recipe', 'paper'], '--recipe does not apply with --sampled'),
        (['--sampled', 4, '--aggregator', 'rnn'], '--aggregator rnn does not apply'),
        (['--sampled', 4, '--top-k', 3], '--top-k only applies with --aggregator topk'),
        (['--sampled', 4, '--aggregator', 'max', '--task', 'ordinal'], 'two classes'),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(whole, tmp_path, capsys, options, says):
    command = ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *SHOWN]
    refused(capsys, [*command, *options], says)
    assert not [*tmp_path.iterdir()]


def test_what_is_decided():
    settings = MILSettings(manifest='slides.csv', sampled=8)
    method_of(settings).settle()
    decided = settings.aggregator, settings.optimizer, settings.lr, settings.augment, settings.top_k
    assert decided == ('abmil', 'adamw', 1e-4, 'flips', None)
    settings = MILSettings(manifest='slides.csv', sampled=8, task='survival', aggregator='mean')
    method_of(settings).settle()
    settings = MILSettings(manifest='slides.csv', sampled=8, task='survival', aggregator='topk')
    assert 'two classes' in refusal(method_of(settings).settle)
