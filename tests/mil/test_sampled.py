"End-to-end MIL on sampled patches: which are drawn, the gradient, memory, resuming, and a run."

import copy
import weakref

import numpy as np
import pytest
import torch
from refusals import refusal
from torch import nn
from trainings import KeptStates

from streaming_pathology.core import InputError
from streaming_pathology.mil.aggregators import ABMIL, aggregators, make_aggregator
from streaming_pathology.mil.bags import Bag, BagDataset, PatchGrid
from streaming_pathology.mil.sampled import SampledMIL, make_sampled
from streaming_pathology.slides.augment import Augmentation
from streaming_pathology.slides.cohorts import Case
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.training.loop import TinyNet, fit, predict
from streaming_pathology.training.models import StreamingClassifier
from streaming_pathology.training.tasks import Binary, make_task

pytestmark = pytest.mark.usefixtures('small_resnet')

SIDE = 4  # patches
TRAINABLE = [name for name in aggregators if name != 'rnn']  # which needs scores


class TinyEncoder(TinyNet):
    "The features of `TinyNet`: (n, 3, h, w) uint8 -> (n, 4)."

    def __init__(self):
        super().__init__()
        self.head = nn.Identity()


def grid_of(side=SIDE, factor=1):
    "All positions of side x side patches of 32 pixels."
    starts = torch.arange(side) * 32
    return torch.cartesian_prod(starts, starts, torch.tensor([factor]))


def made_bag(seed=0, side=SIDE):
    "A bag of random pixels."
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 32 * side, 32 * side)
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Bag(image, grid_of(side), 32, f'bag{seed}')


def resnet(batch, aggregator='abmil', n_out=1, seed=0):
    "A ResNet and an aggregator in double precision."
    torch.manual_seed(seed)
    network = StreamingClassifier('resnet18', n_out=n_out)
    for norm in network.batch_norms():  # the last of a block begins as 0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    network.update_batchnorm(made_bag(9).patches())
    return make_sampled(network, dict(name=aggregator), batch).double()


def plain_logits(model, bag, positions):
    "The logits of a bag by the two networks themselves, all patches at once."
    network = model.network
    x = network.head(network.trunk.module(bag.patches(positions)))
    return model.aggregator(x)


def gradients(model, loss):
    "The gradients of all parameters of a loss."
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected, eps=1e-12):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max().clamp(min=1e-3))
        error = float((found[name] - gradient).abs().max())
        assert error <= eps * max(1.0, scale), (name, error, scale)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4


# ---- the gradient


@pytest.mark.parametrize('batch', [1, 5, 16, 64])
def test_the_gradient_of_all_parameters_is_the_plain_one(batch):
    bag, label = made_bag(), torch.ones(1).double()
    model = resnet(batch)
    expected = gradients(model, Binary().loss(plain_logits(model, bag, bag.positions), label))
    found = gradients(model, Binary().loss(model(bag), label))
    assert len(found) == len(dict(model.named_parameters()))
    assert all(gradient.abs().max() > 1e-9 for gradient in found.values())
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize('size', [1, 4, 7])
def test_the_gradient_of_a_sample_is_the_plain_one_of_its_patches(size):
    bag, label = made_bag(), torch.ones(1).double()
    bag.sample = bag.positions[torch.randperm(16, generator=torch.Generator().manual_seed(size))]
    bag.sample = bag.sample[:size]
    model = resnet(batch=3)
    expected = gradients(model, Binary().loss(plain_logits(model, bag, bag.sample), label))
    found = gradients(model, Binary().loss(model(bag), label))
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize('name', TRAINABLE)
def test_every_aggregator_gets_the_plain_gradient(name):
    bag, label = made_bag(), torch.ones(1).double()
    model = SampledMIL(TinyEncoder(), make_aggregator(name, 4), batch=3).double()
    whole = copy.deepcopy(model)
    whole.batch = 64
    results = []
    for each in (model, whole):
        torch.manual_seed(1)  # of aggregators that draw
        logits, details = each.forward_with_details(bag)
        loss = each.loss(Binary(), logits, label.expand(len(logits)), **details)
        results.append(gradients(each, loss))
    assert_equal_gradients(*results)


def test_several_outputs():
    bag = made_bag()
    model = resnet(batch=5, n_out=3)
    task = make_task('multiclass', [0, 1, 2])
    label = torch.tensor([2.0])
    expected = gradients(model, task.loss(plain_logits(model, bag, bag.positions), label))
    assert_equal_gradients(gradients(model, task.loss(model(bag), label)), expected)


def test_frozen_stages_have_no_gradient_and_the_others_the_plain_one():
    bag, label = made_bag(), torch.ones(1).double()
    model = resnet(batch=5).freeze_until('layer4')
    expected = gradients(model, Binary().loss(plain_logits(model, bag, bag.positions), label))
    found = gradients(model, Binary().loss(model(bag), label))
    assert not any(name.startswith('network.trunk.layer3') for name in found)
    assert any(name.startswith('network.trunk.layer4') for name in found)
    assert_equal_gradients(found, expected)
    head = gradients(model.freeze_until('head'), Binary().loss(model(bag), label))
    assert head and all(name.startswith('aggregator.') for name in head)


class DropoutEncoder(TinyEncoder):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_dropout_of_the_encoder_is_the_same_in_the_second_pass():
    "With other random numbers, what is dropped would get a gradient."
    bag = made_bag()
    torch.manual_seed(0)
    model = SampledMIL(DropoutEncoder(), make_aggregator('mean', 4), batch=2).double()
    x = model.embeddings(bag, bag.positions)
    dropped = (x == 0).all(0) | (x == 0)
    weights = torch.where(dropped, 1.0, 0.0).double()
    (x * weights).sum().backward()
    gradient = model.network.conv.weight.grad
    assert gradient is None or gradient.abs().max() == 0


def test_batchnorm_of_any_encoder_uses_its_running_statistics():
    torch.manual_seed(0)
    network = nn.Sequential(TinyEncoder(), nn.BatchNorm1d(4))
    model = SampledMIL(network, make_aggregator('mean', 4), batch=3)
    before = network[1].running_mean.clone()
    model.train()(made_bag()).sum().backward()
    assert not network[1].training
    assert torch.equal(network[1].running_mean, before)


# ---- memory


class Traced(TinyEncoder):
    "Remembers the activations of each call as long as something holds them."

    def __init__(self):
        super().__init__()
        self.activations, self.sizes = [], []
        self.most = 0

    def forward(self, x):
        self.sizes.append(len(x))
        maps = self.conv(x.to(self.conv.weight.dtype) / 255).relu()
        self.activations.append(weakref.ref(maps))
        self.most = max(self.most, self.alive())
        return maps.square().amax((2, 3))

    def alive(self):
        return sum(reference() is not None for reference in self.activations)


def test_activations_of_one_batch_are_in_memory_at_a_time():
    bag = made_bag(side=8)
    model = SampledMIL(Traced(), ABMIL(4, hidden=8), batch=4)
    logits = model(bag)
    assert model.network.alive() == 0
    logits.sum().backward()
    assert model.network.most <= 2  # of the batch at hand, and perhaps of the one before
    assert model.network.sizes == [4] * 32  # 16 batches, each twice


def test_what_fits_into_a_batch_is_computed_once():
    model = SampledMIL(Traced(), ABMIL(4, hidden=8), batch=16)
    model(made_bag()).sum().backward()
    assert model.network.sizes == [16]


def test_in_evaluation_all_patches_count_batch_by_batch():
    bag = made_bag()
    bag.sample = bag.positions[:2]
    model = SampledMIL(Traced(), ABMIL(4, hidden=8), batch=5).eval()
    with torch.no_grad():
        model(bag)
    assert model.network.sizes == [5, 5, 5, 1]


def test_relevance_is_the_attention_of_all_patches():
    bag = made_bag()
    bag.sample = bag.positions[:2]
    model = resnet(batch=5).eval()
    found = model.relevance(bag)
    x = model.network.head(model.network.trunk.module(bag.patches()))
    torch.testing.assert_close(found, model.aggregator.relevance(x).float())
    assert found.shape == (16,) and found.max() == 1


# ---- which patches


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Eight slides, of which each positive one has a dark half."
    folder, rng = tmp_path_factory.mktemp('cohort'), np.random.default_rng(0)
    cases = []
    for i in range(8):
        noise = rng.normal((200, 120, 180), 12, (32 * SIDE, 32 * SIDE, 3))
        rgb = np.clip(noise, 0, 255).astype(np.uint8)
        if i % 2:
            rgb[: 16 * SIDE] //= 2
        write_tiff(rgb, folder / f's{i}.tiff', 4.0)
        split = 'train' if i < 6 else 'tuning'
        cases.append(Case(f's{i}', i % 2, folder / f's{i}.tiff', split=split))
    return BagDataset(cases, 4.0, grid=PatchGrid(32), cache=10**8)


def sampled(data, k, seed=0):
    part = data.part('train', augment=Augmentation(elastic=0, rotate=0))
    part.sampled, part.seed = k, seed
    return part


def test_a_sample_is_a_function_of_seed_epoch_and_slide(data):
    train = sampled(data, 5)
    for i in range(len(train)):
        for epoch in (0, 3):
            one, two = (train[i, epoch]['image'] for _ in range(2))
            assert torch.equal(one.sample, two.sample)
            all_positions = one.positions.tolist()
            assert len({*map(tuple, one.sample.tolist())}) == 5
            assert all(position in all_positions for position in one.sample.tolist())
    drawn = {
        tuple(sampled(data, 5, seed)[i, epoch]['image'].sample.flatten().tolist())
        for seed in (0, 1)
        for i in (0, 1)
        for epoch in (0, 1)
    }
    assert len(drawn) == 8


def test_every_patch_is_drawn_as_often(data):
    train = sampled(data, 4)
    case, positions = train.cases[0], np.arange(16 * 3).reshape(16, 3)
    counts = np.zeros(16)
    for epoch in range(2000):
        drawn = train.sample(case, epoch, positions)
        counts[drawn[:, 0].numpy() // 3] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.05


@pytest.mark.parametrize('k', [None, 16, 100])
def test_as_many_as_there_are_is_all(data, k):
    assert sampled(data, k)[0, 0]['image'].sample is None


def test_refusals(data):
    assert 'sampled is 0' in refusal(BagDataset, data.cases, 4.0, sampled=0)
    assert 'batch is 0' in refusal(SampledMIL, TinyEncoder(), nn.Linear(4, 1), 0)
    model = SampledMIL(TinyEncoder(), make_aggregator('mean', 4))
    assert 'takes a Bag, as BagDataset gives it, not Tensor' in refusal(model, torch.zeros(3, 9, 9))
    with torch.no_grad():
        model.network.conv.bias.fill_(torch.inf)
    said = refusal(model, made_bag())
    assert "slide 'bag0'" in said and 'not finite' in said
    scores = SampledMIL(TinyEncoder(), make_aggregator('rnn', 4))
    with pytest.raises(InputError, match='scores'):
        scores(made_bag())


# ---- training


def trained(data, callbacks=(), **options):
    "A network trained for three epochs, and its history."
    torch.manual_seed(1)
    model = SampledMIL(TinyEncoder(), ABMIL(4, hidden=8), batch=3)
    tuning = data.part('tuning')
    options |= dict(optimizer='adamw', lr=0.02, batch=3, progress=False, callbacks=callbacks)
    history = fit(model, sampled(data, 5), tuning, epochs=3, **options)
    for row in history:
        del row['seconds'], row['peak_mb']
    return model, history


def test_it_resumes_to_the_bit_from_any_slide(data):
    points = KeptStates()
    whole, history = trained(data, [points])
    assert len(points.all) > 12
    for point in points.all[1::4]:
        model, again = trained(data, resume=point)
        assert again == history
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)


def test_it_learns(data):
    torch.manual_seed(0)
    model = SampledMIL(TinyEncoder(), ABMIL(4, hidden=8), batch=3)
    options = dict(optimizer='adamw', lr=0.02, batch=3, progress=False)
    fit(model, sampled(data, 5), data.part('tuning'), epochs=25, **options)
    for row in predict(model, data.part('tuning'), progress=False):
        assert (row['probability'] > 0.5) == (row['label'] == 1)
