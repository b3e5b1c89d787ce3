"The MIL baseline: which patches learn, their gradient, and resuming in either of two phases."

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainings import KeptStates

from streaming_pathology.core import InputError
from streaming_pathology.mil.bags import Bag, BagDataset, PatchGrid
from streaming_pathology.mil.mil import InstanceMIL, TwoPhases
from streaming_pathology.slides.augment import Augmentation
from streaming_pathology.slides.cohorts import Case
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.training.callbacks import EMA
from streaming_pathology.training.loop import TinyNet, fit, predict
from streaming_pathology.training.tasks import Binary

GRID = PatchGrid(32)
SIDE = 6  # patches


def close(a, b, eps):
    torch.testing.assert_close(a, b, rtol=0, atol=eps)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "Cases, of which each positive one has one dark patch; slide_id -> its place."
    folder, rng = tmp_path_factory.mktemp('cohort'), np.random.default_rng(0)
    cases, dark = [], {}
    for i in range(12):
        name, label, path = f's{i:02}', i % 2, folder / f's{i:02}.tiff'
        noise = rng.normal((200, 120, 180), 12, (32 * SIDE, 32 * SIDE, 3))
        rgb = np.clip(noise, 0, 255).astype(np.uint8)
        mask = np.zeros(rgb.shape[:2], np.uint8)
        if label:
            top, left = dark[name] = [int(cell) * 32 for cell in rng.integers(0, SIDE, 2)]
            rgb[top : top + 32, left : left + 32] //= 2
            mask[top : top + 32, left : left + 32] = 7
        write_tiff(rgb, path, 4.0)
        write_tiff(mask, folder / f's{i:02}_mask.tiff', 4.0, nearest=True)
        cases.append(Case(name, label, path, split='train' if i < 8 else 'tuning'))
    return cases, dark


@pytest.fixture(scope='module')
def data(cohort):
    return BagDataset(cohort[0], 4.0, grid=GRID, cache=10**8)


@pytest.fixture(scope='module')
def tuning(data):
    return data.part('tuning')


@pytest.fixture(scope='module')
def train(data):
    return data.part('train')


def fitted(train, tuning, callbacks, epochs, **options):
    torch.manual_seed(0)
    model = InstanceMIL(TinyNet(), batch=7)
    fit(
        model,
        train,
        tuning,
        epochs=epochs,
        lr=0.03,
        optimizer='adamw',
        batch=4,
        callbacks=callbacks,
        progress=False,
        **options,
    )
    return model


@pytest.fixture(scope='module')
def model(train, tuning):
    return fitted(train, tuning, [TwoPhases(train)], epochs=12)


def right(rows, dark):
    for row in rows:
        assert (row['probability'] > 0.5) == (row['label'] == 1)
        assert not row['label'] or row['top'][0][:2] == dark[row['slide_id']]


# ---- what is learnt


def test_it_finds_the_dark_patch(model, tuning, cohort):
    right(predict(model, tuning, progress=False), cohort[1])


@pytest.fixture
def outlined(cohort):
    "The cohort with annotations."
    cases = []
    for case in cohort[0]:
        mask = case.path.with_name(f'{case.slide_id}_mask.tiff')
        cases.append(replace(case, annotation=mask))
    return BagDataset(cases, 4.0, grid=GRID, cache=10**8, classes=(7,), draws=6)


def test_it_learns_from_patches_with_labels(outlined, tuning, cohort):
    model = fitted(outlined.part('train'), tuning, [], epochs=8)
    right(predict(model, tuning, progress=False), cohort[1])


def test_patches_with_labels_learn_their_own_and_not_the_slides(outlined):
    bag = outlined[1]['image']
    positions, labels = bag.learns
    torch.manual_seed(0)
    net = InstanceMIL(TinyNet(), batch=7).train()
    logits, details = net.forward_with_details(bag)
    assert (logits.shape, labels.tolist()) == ((6, 1), [1.0] + [0.0] * 5)
    found = net.loss(Binary(), logits, torch.ones(6), **details)
    close(found, Binary().loss(net.classify(bag.patches(positions)), labels), 1e-6)


def test_a_call_leaves_nothing_in_the_bag_or_in_the_network(model, outlined, train):
    for bag in (outlined[1]['image'], train[1]['image']):
        model.choose({bag.slide_id: bag.positions[:1]})
        before = dict(vars(bag)), dict(vars(model))
        for training in (False, True):
            model.train(training).forward_with_details(bag)
            now = dict(vars(bag)), dict(vars(model)) | dict(training=before[1]['training'])
            assert [part.keys() for part in now] == [part.keys() for part in before]
            assert all(now[0][name] is before[0][name] for name in before[0])
            assert all(now[1][name] is before[1][name] for name in before[1])


def test_an_average_of_weights_says_where_patches_are(train, tuning):
    seen = []

    class Watching:
        def at_rest(self, s):
            seen.extend(row['top'] for row in s.rows)

    fitted(train, tuning, [TwoPhases(train), EMA(0.9), Watching()], epochs=1)
    assert seen
    assert all(len(positions) == 1 for positions in seen)


# ---- the gradient


def gradient(model, bag, label, k=1):
    "The gradient of a bag's most suspicious patches, the logits of all, and which they are."
    net = InstanceMIL(copy.deepcopy(model.network).double(), k, batch=5)
    scores = net.eval().scores(bag)[:, 0]
    _, details = net.forward_with_details(bag)
    net.choose({bag.slide_id: details['top']})
    logits = net.train()(bag)
    Binary().loss(logits, torch.full((len(logits),), label).double()).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]), scores, details['top']


def test_the_gradient_is_that_of_the_most_suspicious_patch(model, train):
    bag = train[1]['image']
    found, scores, top = gradient(model, bag, 1.0)
    assert top[0] == bag.positions[scores.argmax()].tolist()
    plain = copy.deepcopy(model.network).double()
    plain.zero_grad()
    Binary().loss(plain(bag.patches(top)), torch.ones(1).double()).backward()
    close(found, torch.cat([p.grad.flatten() for p in plain.parameters()]), 1e-15)


def test_other_patches_do_not_change_it_while_they_are_less_suspicious(model, train):
    bag = train[1]['image']
    found, scores, top = gradient(model, bag, 1.0)
    tried = 0
    for i, (row, column, _) in enumerate(bag.positions.tolist()):
        other = Bag(bag.image.clone(), bag.positions, bag.size, bag.slide_id)
        patch = other.image[:, row : row + 32, column : column + 32]
        patch.copy_(patch.flip(1, 2) // 2 + 100)
        changed, after, new = gradient(model, other, 1.0)
        if [row, column, 1] != top[0] and after[i] < scores.max():
            tried += 1
            assert new == top
            assert torch.equal(changed, found)
    assert tried


def test_the_gradient_of_several_patches_is_the_mean_of_theirs(model, train):
    bag = train[1]['image']
    three, scores, top = gradient(model, bag, 1.0, k=3)
    order = scores.argsort(descending=True, stable=True)[:3]
    assert top == bag.positions[order].tolist()
    each = [
        gradient(model, Bag(bag.image, torch.tensor([place]), bag.size, 'x'), 1.0)[0]
        for place in top
    ]
    close(three, torch.stack(each).mean(0), 1e-12)


# ---- resuming


def through(train, tuning, callbacks=(), **options):
    "A training of two epochs: its network and its history."
    torch.manual_seed(1)
    net = InstanceMIL(TinyNet(), 2, batch=7)
    history = fit(
        net,
        train,
        tuning,
        epochs=2,
        lr=0.1,
        batch=3,
        callbacks=[TwoPhases(train), *callbacks],
        progress=False,
        **options,
    )
    for row in history:
        del row['seconds'], row['peak_mb']
    return net, history


@pytest.fixture(scope='module')
def augmented(data):
    return data.part('train', augment=Augmentation(elastic=2.0))


@pytest.fixture(scope='module')
def uninterrupted(augmented, tuning):
    "A network, its history, and all points that the training could have been interrupted at."
    points = KeptStates()
    net, history = through(augmented, tuning, [points])
    return net, history, points.all


def classified(point):
    "How many slides the first phase has done at a point."
    return len(point['callbacks'][0][1]['rows'])


def test_it_resumes_to_the_bit_in_either_phase(uninterrupted, augmented, tuning):
    whole, history, points = uninterrupted
    first_phase = [p for p in points if p['step'] == 0 and 0 < classified(p) < len(augmented)]
    assert first_phase
    for point in points[::4]:
        net, again = through(augmented, tuning, resume=point)
        assert again == history
        for a, b in zip(net.parameters(), whole.parameters()):
            assert torch.equal(a, b)


def test_where_changes_were_accepted_the_first_phase_begins_anew(uninterrupted, augmented, tuning):
    "What was accepted may concern what was chosen."
    _, _, points = uninterrupted
    half = next(p for p in points if p['step'] == 0 and 3 < classified(p) < len(augmented))
    cases = augmented.cases[::-1]
    reversed_ = BagDataset(cases, 4.0, grid=GRID, augment=augmented.augment)
    phases = TwoPhases(reversed_)
    torch.manual_seed(1)
    fit(
        InstanceMIL(TinyNet(), 2, batch=7),
        reversed_,
        tuning,
        epochs=2,
        lr=0.1,
        batch=3,
        callbacks=[phases],
        progress=False,
        resume=half,
        accept_changes=True,
    )
    assert [row['slide_id'] for row in phases.rows] == [case.slide_id for case in cases]


# ---- limits and refusals


def test_refusals(model, train):
    bag = train[1]['image']
    with pytest.raises(InputError, match='k is 0'):
        InstanceMIL(TinyNet(), 0)
    with pytest.raises(InputError, match='two classes'):
        InstanceMIL(TinyNet(2)).eval()(bag)
    with pytest.raises(InputError, match='TwoPhases'):
        InstanceMIL(TinyNet()).train()(bag)
    with pytest.raises(InputError, match='Bag'):
        model(bag.image[None])


def test_a_bag_of_one_patch(model, train):
    bag = train[1]['image']
    one = Bag(bag.image, bag.positions[:1], 32, 'one')
    assert model.eval()(one).shape == (1, 1)
    logits, details = InstanceMIL(TinyNet(), 5).eval().forward_with_details(one)
    assert logits.shape == (1, 1)
    assert len(details['top']) == 1


class DarkIsNan(TinyNet):
    def forward(self, x):
        factor = torch.where(x.float().mean((1, 2, 3)) > 120, 1, torch.nan)
        return super().forward(x) * factor[:, None]


def test_logits_that_are_no_numbers_are_refused(train):
    with pytest.raises(InputError, match="'s01'"):
        predict(InstanceMIL(DarkIsNan()), train, progress=False)


class Watching(TinyNet):
    "Remembers how many patches it was shown at a time."

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return super().forward(x)


def test_memory_does_not_grow_with_the_bag():
    steps = torch.arange(100) * 32
    positions = torch.cartesian_prod(steps, steps, torch.ones(1, dtype=torch.long))
    many = Bag(torch.zeros(3, 3200, 3200, dtype=torch.uint8), positions, 32)
    network = Watching()
    assert len(InstanceMIL(network, batch=50).scores(many)) == 10_000
    assert max(network.batches) == 50
