"Models with their cards, images in eight ways, journals of predictions, and tables."

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from refusals import refusal
from torch import nn

import streaming_pathology
from streaming_pathology.core import InputError
from streaming_pathology.engine.canvas import Canvas
from streaming_pathology.evaluation.predict import (
    TTA,
    Journal,
    Turned,
    checked_card,
    checkpoint_words,
    chosen_checkpoint,
    export_model,
    load_model,
    model_hash,
    predict_table,
    read_sealed,
    turned,
    validation_results,
    write_predictions,
    write_sealed,
)
from streaming_pathology.mil.bags import Bag
from streaming_pathology.mil.mil import InstanceMIL
from streaming_pathology.slides.cohorts import read_manifest, tiny_cohort
from streaming_pathology.slides.datasets import SlideDataset
from streaming_pathology.training.checkpoints import save_checkpoint
from streaming_pathology.training.loop import TinyNet, predict
from streaming_pathology.training.models import StreamingClassifier
from streaming_pathology.training.tasks import Multiclass, Survival

pytestmark = pytest.mark.usefixtures('small_resnet')

CARD = dict(model=dict(arch='resnet18', n_out=1, strip=64), spacing=4.0, size=None, amp=None)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    "The best checkpoint of a run, of its third epoch."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('models') / 'best.pt'
    return save_checkpoint(
        path,
        model=dict(StreamingClassifier(**CARD['model']).state_dict()),
        settings=CARD,
        epoch=3,
        seed=0,
        history=[dict(epoch=i, tuning_loss=1 / i) for i in (1, 2, 3, 4)],
    )


@pytest.fixture(scope='module')
def exported(checkpoint):
    "What sp_export makes of it."
    path = checkpoint.parent / 'model.safetensors'
    export_model(checkpoint, path, metrics=dict(auc=0.9))
    return path


@pytest.fixture(scope='module')
def loaded(exported):
    return load_model(exported)


# ---- models


def test_an_exported_model_is_its_checkpoint(checkpoint, loaded):
    model, card = loaded
    former, former_card = load_model(checkpoint)
    assert former_card['sha256'] == card['sha256']
    for before, now in zip(former.state_dict().values(), model.state_dict().values()):
        assert torch.equal(before, now)


def test_the_card_has_the_results_of_its_epoch(loaded):
    _, card = loaded
    assert card['tuning'] == dict(tuning_loss=1 / 3)
    assert card['metrics'] == dict(auc=0.9)


@pytest.mark.parametrize(
    'state',
    [
        dict(),
        dict(history=[dict(tuning_loss=1.0, stage=1)], epoch=1),  # an average of weights
        dict(history=[dict(tuning_loss=1.0)], epoch=1, optimizer={}),  # one to resume from
        dict(history=[dict(tuning_auc=math.nan, loss=1.0)], epoch=1),
    ],
)
def test_weights_that_were_not_evaluated_have_no_results(state):
    assert validation_results(state) == {}


def rows_of(*losses):
    "The history of a training with tuning losses."
    return [dict(epoch=i, tuning_loss=loss) for i, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    'state, chosen_by, value, why',
    [
        (dict(epoch=2, history=rows_of(0.7, 0.4)), 'tuning_loss', 0.4, 'the lowest tuning loss'),
        (dict(epoch=1, history=rows_of(0.4, 0.7)), 'tuning_loss', 0.4, 'the lowest tuning loss'),
        (dict(epoch=3, history=rows_of(0.4, 0.7, 0.5)), None, 0.5, 'since training was changed'),
        (dict(epoch=2, history=[dict(epoch=1), dict(epoch=2)]), None, None, 'the last epoch'),
        (dict(epoch=1, history=rows_of(float('nan'))), None, None, 'no tuning loss to choose by'),
        (dict(epoch=2, history=rows_of(0.7, 0.4), optimizer={}), None, None, 'to resume from'),
        (dict(epoch=9, history=[dict(stage=2)] * 9), 'tuning_loss', None, 'lowest mean tuning'),
        (dict(epoch=1), None, None, 'does not say'),
        ({}, None, None, 'does not say'),
    ],
)
def test_which_checkpoint_it_is_and_why(state, chosen_by, value, why):
    about = chosen_checkpoint(state, 'best.pt')
    assert (about['chosen_by'], about.get('value')) == (chosen_by, value)
    assert about['epoch'] == state.get('epoch')
    words = checkpoint_words(about)
    assert words.startswith('best.pt: ') and why in words
    assert ('epoch' in words.split(',')[0]) == ('epoch' in state)
    assert (value is not None) == (f'(tuning loss {value})' in words)


def test_the_name_of_a_model_depends_on_weights_and_card(loaded):
    model, card = loaded
    weights = model.state_dict()
    assert model_hash(weights, card) == card['sha256']
    assert model_hash(weights, card | dict(spacing=2.0)) != card['sha256']
    assert model_hash(weights, card | dict(stain='ihc')) != card['sha256']
    del card['stain']  # as in cards of former versions
    assert model_hash(weights, card) == card['sha256']
    weights['head.fc.bias'] = weights['head.fc.bias'] + 1
    assert model_hash(weights, card) != card['sha256']


def test_the_name_of_a_model_does_not_depend_on_its_strips(checkpoint, loaded):
    _, card = load_model(checkpoint, strip=128)
    assert card['sha256'] == loaded[1]['sha256']


def test_every_damaged_byte_is_noticed(tmp_path):
    "A bit of each byte changed, and the file cut at each byte."
    path = tmp_path / 'model.safetensors'
    write_sealed(path, dict(a=1), TinyNet().state_dict())
    data = path.read_bytes()
    assert read_sealed(path)[0] == dict(a=1)
    for i in range(len(data)):
        changed = bytes([data[i] ^ 1])
        for damaged in (data[:i] + changed + data[i + 1 :], data[:i]):
            path.write_bytes(damaged)
            with pytest.raises(InputError):
                read_sealed(path)


def test_what_is_no_model_is_refused(tmp_path):
    safetensors.torch.save_file(dict(x=torch.ones(1)), tmp_path / 'bare.safetensors')
    assert 'without a card' in refusal(load_model, tmp_path / 'bare.safetensors')
    assert 'no such model' in refusal(load_model, tmp_path / 'none.safetensors')
    save_checkpoint(tmp_path / 'bare.pt', model={})
    assert 'does not say' in refusal(load_model, tmp_path / 'bare.pt')
    out = tmp_path / 'x.safetensors'
    assert 'does not say' in refusal(export_model, tmp_path / 'bare.pt', out)


@pytest.mark.parametrize('name', ['model', 'spacing', 'size', 'amp'])
def test_an_incomplete_card_is_refused(name):
    card = {key: value for key, value in CARD.items() if key != name}
    assert 'does not say' in refusal(checked_card, card, 'best.pt')


# ---- eight ways to lay an image


@pytest.fixture
def image():
    "White with two rectangles that are not: uint8 (3, 90, 70)."
    image = torch.full((3, 90, 70), 255, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    image[:, 5:30, 11:40] = torch.randint(0, 255, (3, 25, 29), generator=generator).byte()
    image[:, 64:80, 50:70] = 7
    return image


def test_all_ways_are_different():
    x = torch.arange(12).view(1, 1, 3, 4)
    seen = {(*turned(x, way).shape, *turned(x, way).flatten().tolist()) for way in TTA['all']}
    assert len(seen) == 8


@pytest.mark.parametrize(('way', 'quarters'), [(5, -1), (3, 2), (6, 1)])
def test_ways_that_are_turns(way, quarters):
    x = torch.arange(12).view(1, 1, 3, 4)
    assert torch.equal(turned(x, way), x.rot90(quarters, (2, 3)))


@pytest.mark.parametrize('way', TTA['all'])
def test_a_canvas_is_turned_as_its_image(image, way):
    canvas = turned(Canvas.from_image(image, (255, 255, 255)), way)
    assert torch.equal(canvas.dense(), turned(image[None], way))


@pytest.fixture
def bag(image):
    return Bag(image, torch.tensor([[5, 11, 1], [40, 6, 1], [0, 0, 2]]), 32, 'a')


@pytest.mark.parametrize('way', TTA['all'])
def test_a_patch_of_a_turned_bag_is_the_patch_turned(bag, way):
    assert torch.equal(turned(bag, way).patches(), turned(bag.patches(), way))


def item(image):
    return dict(image=image, label=torch.tensor(1.0), slide_id='a')


def mean_over_ways(network, image):
    with torch.no_grad():
        return np.mean([network(turned(image, way)).sigmoid().item() for way in TTA['all']])


def test_a_prediction_is_the_mean_over_all_ways(image):
    network = TinyNet()
    (row,) = predict(Turned(network, TTA['all']), [item(image)], progress=False)
    assert row['probability'] == pytest.approx(mean_over_ways(network, image[None]), abs=1e-6)


def test_a_prediction_of_a_bag_is_the_mean_over_all_ways(bag):
    network = InstanceMIL(TinyNet())
    (row,) = predict(Turned(network, TTA['all']), [item(bag)], progress=False)
    network.eval()
    assert row['probability'] == pytest.approx(mean_over_ways(network, bag), abs=1e-6)
    highest = network.scores(bag).argmax()
    assert row['top'] == [bag.positions[highest].tolist()]


# ---- journals


@pytest.fixture
def journal(tmp_path):
    "A journal with two rows."
    with Journal(tmp_path / 'p.csv', dict(model='a')) as journal:
        journal.add('s1', dict(p=0.5))
        journal.add('s2', dict(p=1 / 3))
    return journal


def rows_of(path):
    with Journal(path.with_suffix(''), dict(model='a')) as again:
        return again.rows


def entering(path, model='a'):
    return refusal(Journal(path.with_suffix(''), dict(model=model)).__enter__)


def test_a_row_that_was_being_written_is_dropped(journal):
    with open(journal.path, 'ab') as file:
        file.write(b'["s3", {"p": .')
    assert rows_of(journal.path) == dict(s1=dict(p=0.5), s2=dict(p=1 / 3))
    with Journal(journal.path.with_suffix(''), dict(model='a')) as again:
        again.add('s3', {})
    assert list(rows_of(journal.path)) == ['s1', 's2', 's3']


def test_two_processes_cannot_write_one_journal(journal):
    with Journal(journal.path.with_suffix(''), dict(model='a')):
        assert 'another process' in entering(journal.path)


def test_rows_of_another_model_are_refused_and_stay(journal):
    before = journal.path.read_bytes()
    said = entering(journal.path, model='b')
    assert 'has 2 slides that were predicted otherwise: model was a and is b' in said
    assert journal.path.read_bytes() == before


@pytest.mark.parametrize(
    'text', ['notes of mine\n', 'notes', '[' * 10**5 + '\n', '{"a": 1}\n', '[1]\n', '\n']
)
def test_what_is_no_journal_is_refused_and_stays(journal, text):
    journal.path.write_text(text)
    assert 'move it away' in entering(journal.path)
    assert journal.path.read_text() == text


@pytest.mark.parametrize('text', ['{"model": "b"}\n["s1', '{"mod', ''])
def test_a_journal_without_rows_is_begun_again(journal, text):
    journal.path.write_text(text)
    assert rows_of(journal.path) == {}
    assert not journal.path.exists()


def test_a_folder_in_place_of_a_journal_is_refused(journal):
    journal.path.unlink()
    journal.path.mkdir()
    assert 'is a folder' in entering(journal.path)


# ---- tables


@pytest.fixture
def cases(tmp_path):
    return read_manifest(tiny_cohort(tmp_path / 'cohort', size=(64, 64)))


def probabilities(path):
    return [line.split(',')[3] for line in path.read_text().splitlines()]


def test_a_table_has_what_the_network_predicts(loaded, cases, tmp_path):
    rows, failed = predict_table(*loaded, cases, tmp_path / 'p.csv', progress=False)
    assert failed == {}
    direct = predict(loaded[0], SlideDataset(cases, 4.0), progress=False)
    assert [row['probability'] for row in rows] == [row['probability'] for row in direct]


class Counted(nn.Module):
    "A model that counts its slides, and is interrupted in the fifth."

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return self.model(x)


@pytest.fixture
def interrupted(loaded, cases, tmp_path):
    "A model that was interrupted in its fifth slide, and its card."
    model, card = loaded
    counted = Counted(model)
    with pytest.raises(KeyboardInterrupt):
        predict_table(counted, card, cases, tmp_path / 'q.csv', progress=False)
    assert [path.name for path in tmp_path.glob('q.csv*')] == ['q.csv.unfinished']
    return counted, card


def test_an_interrupted_table_is_resumed(interrupted, loaded, cases, tmp_path):
    rows, _ = predict_table(*interrupted, cases, tmp_path / 'q.csv', progress=False)
    assert (interrupted[0].calls, len(rows)) == (5 + 8, 12)
    assert not list(tmp_path.glob('q.csv.*'))
    predict_table(*loaded, cases, tmp_path / 'p.csv', progress=False)
    assert probabilities(tmp_path / 'q.csv') == probabilities(tmp_path / 'p.csv')


def test_a_slide_that_cannot_be_read_leaves_the_table(interrupted, cases, tmp_path):
    out, counted = tmp_path / 'q.csv', interrupted[0]
    predict_table(*interrupted, cases, out, progress=False)
    before = out.read_bytes()
    cases[3].path.write_bytes(b'no slide')
    rows, failed = predict_table(*interrupted, cases, out, progress=False)
    assert (len(rows), len(failed), counted.calls) == (11, 1, 24)
    assert "slide 's03'" in failed['s03']
    assert out.read_bytes() == before
    predict_table(*interrupted, cases, out, skip=True, progress=False)
    assert counted.calls == 24
    assert out.read_text().count('\n') == 12


def test_workers_change_nothing(loaded, cases, tmp_path):
    cases[3].path.write_bytes(b'no slide')
    options = dict(tta='flips', progress=False)
    found = [
        predict_table(*loaded, cases[2:5], tmp_path / 'w.csv', workers=workers, **options)
        for workers in (0, 1)
    ]
    here, there = ([row['probability'] for row in rows] for rows, _ in found)
    assert here == there
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 1


def test_options_that_there_are_not_are_refused(loaded, cases, tmp_path):
    said = refusal(predict_table, *loaded, cases, tmp_path / 'w.csv', tta='x')
    assert 'none, flips, all' in said
    (tmp_path / 'file').write_text('x')
    said = refusal(predict_table, *loaded, cases[:1], tmp_path / 'file/w.csv', progress=False)
    assert 'cannot be written' in said


def test_a_table_of_classes(tmp_path):
    row = dict(slide_id='a', label=2.0, split='', probability=[0.2, 0.3, 0.5], seconds=1.0)
    path = write_predictions(tmp_path / 'm.csv', [row], Multiclass(3), ['grade'], 'f' * 64)
    version = streaming_pathology.__version__
    assert path.read_text() == (
        'slide_id,grade,split,probability_0,probability_1,probability_2,seconds,model,version\n'
        f'a,2,,0.2,0.3,0.5,1.000,{"f" * 16},{version}\n'
    )


def test_labels_that_are_not_known_are_empty(tmp_path):
    usual = dict(split='', probability=0.1, seconds=1.0)
    rows = [
        dict(slide_id='a', label=(2.5, math.nan), **usual),
        dict(slide_id='b', label=None, **usual),
    ]
    path = write_predictions(tmp_path / 'm.csv', rows, Survival(), ['months', 'event'])
    assert [line.split(',')[:5] for line in path.read_text().splitlines()] == [
        ['slide_id', 'months', 'event', 'split', 'log_risk'],
        ['a', '2.5', '', '', '0.1'],
        ['b', '', '', '', '0.1'],
    ]
