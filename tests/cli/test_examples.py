"Small runs of every command: what they write, and what they refuse in one line."

import json
import shutil
import tomllib

import pytest
import torch
from told import told

from streaming_pathology.cli.commands import (
    sp_demo,
    sp_evaluate,
    sp_export,
    sp_heatmap,
    sp_mil,
    sp_predict,
    sp_report,
    sp_synth,
    sp_train,
    sp_trim,
)
from streaming_pathology.runs.inputs import find_slides
from streaming_pathology.slides.cohorts import open_slide, read_manifest, tiny_cohort
from streaming_pathology.training.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures('small_resnet')


def refused(command, *words):
    "What a command that refuses says in its last line."
    status, _, err = told(command, *words)
    last = err.splitlines()[-1]
    assert status == 2, err
    assert last.startswith('error: ')
    return last


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A cohort of twelve small slides, and a file and a folder of somebody else."
    folder = tmp_path_factory.mktemp('examples')
    tiny_cohort(folder / 'cohort')
    (folder / 'file').write_text('x')
    (folder / 'mine').mkdir()
    (folder / 'mine/thesis.tex').write_text('x')
    return folder


@pytest.fixture(scope='module')
def manifest(place):
    return place / 'cohort/manifest.csv'


@pytest.fixture(scope='module')
def first(place, manifest, small_resnet):
    "A run of two epochs."
    few = '--spacing 4 --size 64,64 --epochs 2 --lr 0.001 --batch-size 4 --strip 64 --heatmaps 1'
    status, _, err = told(sp_train, manifest, place / 'first', *few.split(), '--n-samples', 2)
    assert status == 0, err
    return place / 'first'


@pytest.fixture(scope='module')
def best(first):
    return first / 'checkpoints/best.pt'


def probabilities(table):
    return [float(line.split(',')[3]) for line in table.read_text().splitlines()[1:]]


# ---- training


def test_a_run_writes_its_settings(first):
    settings = tomllib.loads((first / 'settings.toml').read_text())
    found = settings['momentum'], settings['size'], settings['weights'], settings['seed']
    assert found == (0.9, [64, 64], '', 0)
    assert (first / 'log.csv').read_text().count('\n') == 3


@pytest.mark.parametrize(
    'words, says',
    [
        (['{place}/none.csv', '{place}/x'], 'none.csv'),
        (['{manifest}', '{first}'], '--overwrite'),
        (['{manifest}', '{place}/file/x'], 'cannot be written'),
        (['{manifest}', '{place}/x', '--epochs', 0], '--epochs'),
        (['{manifest}', '{place}/x', '--arch', 'resnet19'], 'resnet19'),
        (['{manifest}', '{place}/x', '--device', 'tpu9'], '--device tpu9'),
        (['{manifest}', '{place}/x', '--spacing', 0.5], '12 of 12 slides'),
        (['{manifest}', '{place}/x', '--spacing', 100], 'are too small at --spacing 100'),
        (['{manifest}', '{place}/x', '--augment', 'much'], 'much'),
        (['{manifest}', '{place}/x', '--normalize', 'tissue'], 'tissue'),
        (['{manifest}', '{place}/x', '--recipe', 'papers'], '--recipe'),
        (['{manifest}', '{place}/x', '--recipe', 'paper', '--epochs', 1], ''),
        (
            ['{manifest}', '{place}/x', '--recipe', 'paper', '--freeze-until', 'layer4'],
            '--freeze-until',
        ),
        (['{manifest}', '{place}/x', '--clip', 0], '--clip'),
    ],
)
def test_what_training_refuses(place, manifest, first, words, says):
    before = (first / 'predictions.csv').read_bytes()
    words = [str(w).format(place=place, manifest=manifest, first=first) for w in words]
    assert says in refused(sp_train, *words)
    assert not (place / 'x').exists()
    assert (first / 'predictions.csv').read_bytes() == before


def test_predictions_see_slides_as_training_did(place, manifest):
    "The paper's augmentation, on canvases, normalised by the training set."
    few = (
        '--spacing 4 --size 96,96 --epochs 1 --strip 32 --heatmaps 1 --n-samples 1 --augment paper'
    )
    more = '--skip-background', '--normalize', 'training'
    assert told(sp_train, manifest, place / 'paper', *few.split(), *more)[0] == 0
    settings = tomllib.loads((place / 'paper/settings.toml').read_text())
    assert settings['skip_background']
    assert settings['augment'] == 'paper'
    assert 0.2 < settings['mean'][1] < settings['mean'][0] < 0.9
    checkpoint, table = place / 'paper/checkpoints/best.pt', place / 'c.csv'
    assert told(sp_predict, checkpoint, place / 'cohort/slides', table)[0] == 0
    assert probabilities(place / 'paper/predictions.csv') == probabilities(table)


def test_stages_of_the_paper(place, manifest):
    "The last block first, and at the end the average of the window."
    few = '--spacing 4 --size 64,64 --heatmaps 0'.split()
    stages = place / 'stages'
    more = '--recipe paper --epochs 3 --strip 64'.split()
    assert told(sp_train, manifest, stages, *few, *more)[0] == 0
    log = [line.split(',')[1] for line in (stages / 'log.csv').read_text().splitlines()]
    assert log == ['stage', '1', '2', '2']
    best = load_checkpoint(stages / 'checkpoints/best.pt')['model']['head.fc.weight']
    kept = [
        load_checkpoint(path)['model']['head.fc.weight'].double()
        for path in sorted((stages / 'checkpoints/stage_2').iterdir())
    ]
    assert len(kept) == 2
    assert torch.equal(best, ((kept[0] + kept[1]) / 2).float())
    assert told(sp_train, manifest, stages, *few, '--epochs', 1, '--overwrite')[0] == 0
    assert not (stages / 'checkpoints/stage_2').exists()


def test_multiple_instance_learning(place, manifest):
    few = '--spacing 4 --patch-size 32 --epochs 1 --lr 0.001 --heatmaps 2'
    assert told(sp_mil, manifest, place / 'mil', *few.split())[0] == 0
    names = {path.name for path in (place / 'mil').iterdir()}
    assert names >= {'report', 'predictions.csv', 'log.csv', 'checkpoints', 'heatmaps'}


# ---- predictions


def test_the_same_probabilities_as_the_run_wrote(place, first, best):
    slides, table = place / 'cohort/slides', place / 'p.csv'
    counts = f'12 slides found: 12 done; see {place / "p.slides.csv"}'
    assert told(sp_predict, best, slides, table)[:2] == (0, f'wrote {table}: 12 slides\n{counts}')
    assert probabilities(table) == probabilities(first / 'predictions.csv')
    assert told(sp_export, first, place / 'model.safetensors')[0] == 0
    assert told(sp_predict, place / 'model.safetensors', slides, place / 'e.csv')[0] == 0

    def rows(path):
        lines = [line.split(',') for line in path.read_text().splitlines()]
        return [line[:1] + line[3::2] for line in lines]

    assert rows(place / 'e.csv') == rows(table)  # and the same model, by its hash


@pytest.mark.parametrize(
    'words, says',
    [
        (['{place}/none.pt', '{slides}', '{place}/q.csv'], 'none.pt'),
        (['{place}/file', '{slides}', '{place}/q.csv'], 'no checkpoint'),
        (['{best}', '{place}/nowhere', '{place}/q.csv'], 'nowhere'),
        (['{best}', '{first}', '{place}/q.csv'], 'no slides'),
        (['{best}', '{place}/file', '{place}/q.csv'], "'file'"),
        (['{best}', '{slides}', '{first}'], 'what sp_train wrote 1'),
        (['{best}', '{slides}', '--out', '{first}'], 'is a folder'),
    ],
)
def test_what_prediction_refuses(place, first, best, words, says):
    slides = place / 'cohort/slides'
    words = [w.format(place=place, best=best, first=first, slides=slides) for w in words]
    assert says in refused(sp_predict, *words)
    assert not (place / 'q.csv').exists()


def test_one_slide(place, best):
    assert told(sp_predict, best, place / 'cohort/slides/s01.tiff', place / 'one.csv')[0] == 0


def test_names_and_spacings_of_a_folder(place, best):
    "Names that cannot be ids; a spacing for slides that do not say theirs, or in place of it."
    (place / 'names').mkdir()
    too_long = place / f'names/{"n" * 190}.tiff'
    shutil.copy(place / 'cohort/slides/s01.tiff', too_long)
    assert '190 bytes' in refused(sp_predict, best, place / 'names', place / 'd.csv')
    too_long.rename(place / 'names/a.tiff')
    (case,) = find_slides(place / 'names', 2.0).cases
    found = [open_slide(case, override).spacing for override in (False, True)]
    assert found == pytest.approx([4.0, 2.0])


# ---- all others


def test_heatmaps(place, best):
    few = '--n-samples 3 --cell 4 --region-class tumour'.split()
    assert told(sp_heatmap, best, place / 'cohort/slides/s00.tiff', place / 'maps', *few)[0] == 0
    found = sorted(
        path.relative_to(place / 'maps').as_posix() for path in place.glob('maps/**/*.*')
    )
    assert found == [
        'geojson/s00.geojson',
        'heatmaps.json',
        'maps/s00.json',
        'maps/s00.npy',
        'overlay/s00.png',
        'regions.csv',
        'slides.csv',
        'tiff/s00.tiff',
    ]


def test_evaluation_and_report(place, first, best):
    table, out = first / 'predictions.csv', place / 'm.json'
    few = '--split', 'train', '--n-bootstrap', 200
    assert told(sp_evaluate, table, *few, '--out', out)[0] == 0
    assert json.loads(out.read_text())['n'] == 8
    told(sp_predict, best, place / 'cohort/slides', place / 'unlabelled.csv')
    refused(sp_evaluate, place / 'unlabelled.csv')
    assert told(sp_report, first, '--out', place / 'handed', '--anonymous')[0] == 0


def test_trimming(place):
    few = '--spacing', 8, '--min-area-mm2', 0.001, '--workers', 0
    slides, out = place / 'cohort/slides', place / 'trimmed'
    assert told(sp_trim, slides, out, *few)[0] == 0
    assert len(read_manifest(out / 'manifest.csv', need_label=False)) == 12
    assert '12 slides as before' in told(sp_trim, slides, out, *few)[1]
    for words, says in (
        (['--spacing', 4, '--min-area-mm2', 0.001], 'other settings'),
        (['--background', 'green'], 'no colour'),
        (['--quality', 0], 'quality'),
        (['--margin', -1], 'margin'),
        (['--slide-spacing', 0], '--slide-spacing is 0'),
    ):
        assert says in refused(sp_trim, slides, out, '--workers', 0, *words)


def test_painting(place):
    out = place / 'painted'
    few = '--n', 4, '--size', '96,160', '--spacing', 4
    assert told(sp_synth, out, *few)[:2] == (0, f'wrote {out}/manifest.csv: 4 slides')
    assert len(read_manifest(out / 'manifest.csv')) == 4
    refused(sp_synth, out)


def test_the_demo_replaces_demos_only(place, first):
    for out in (place / 'mine', first, place / 'file/demo'):
        status, printed, err = told(sp_demo, '--out', out)
        assert (status, printed) == (2, '')
        assert str(out) in err
        assert '\n' not in err
