"""Aggregators: each formula again in loops over numbers, gradients, limits and refusals.

A new aggregator is tested by being in `aggregators`; `SMALL` and `OPTIONS` make it small."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from streaming_pathology.core import InputError
from streaming_pathology.mil.aggregators import (
    CLAM,
    aggregators,
    make_aggregator,
    noisy_or,
)
from streaming_pathology.training.tasks import Binary, Regression

N, D = 5, 3  # patches of a slide, features of a patch
# options with which an aggregator is small
SMALL = dict(
    rnn=dict(k=3, hidden=4),
    abmil=dict(hidden=6),
    clam=dict(hidden=6),
    transmil=dict(hidden=16),
    topk=dict(k=2),
    dsmil=dict(hidden=4),
)


def close(a, b, eps):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=eps)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return np.array([each / sum(exponentials) for each in exponentials])


class Made:
    "Small aggregators in double precision, and a slide."

    def __init__(self):
        torch.manual_seed(2)
        self.x = torch.randn(N, D, dtype=torch.double)
        self.scores = torch.tensor([0.3, 2.0, -1.0, 2.0, 0.1], dtype=torch.double)
        self.nets = {}
        for name, kind in aggregators.items():
            self.nets[name] = kind(D, **SMALL.get(name, {})).double()

    @property
    def features(self):
        return self.x.numpy()

    def weights(self, name):
        return {key: value.detach().numpy() for key, value in self.nets[name].state_dict().items()}

    def logits(self, name, training=False):
        return self.nets[name].train(training)(self.x, self.scores).detach().numpy()

    def relevance(self, name):
        return self.nets[name].relevance(self.x, self.scores).numpy()

    def of_patches(self, name, layer='classifier'):
        "The logits of patches by a linear layer, in loops."
        weights = self.weights(name)
        weight, bias = weights[f'{layer}.weight'], weights[f'{layer}.bias']
        return [sum(weight[0, j] * row[j] for j in range(D)) + bias[0] for row in self.features]


@pytest.fixture
def made():
    return Made()


# ---- noisy-or


def test_noisy_or_of_three():
    z = torch.tensor([-1.2, 0.3, -4.0], dtype=torch.double, requires_grad=True)
    p = 1 - np.prod([1 - 1 / (1 + math.exp(-value)) for value in z.tolist()])
    close(noisy_or(z).item(), math.log(p / (1 - p)), 1e-14)
    assert torch.autograd.gradcheck(noisy_or, [z])


@pytest.mark.parametrize(
    'logit, count',
    [
        (-700, 1),
        (-30, 5),
        (-19, 2),
        (-18, 4),
        (-17, 3),
        (math.log(math.expm1(1e-4)), 1),
        (-9.5, 1),
        (-9, 3),
        (0, 1),
        (15, 2),
        (40, 3),
        (800, 10),
    ],
)
def test_noisy_or_of_equal_logits(logit, count):
    "Where formulas meet too."
    if logit < -20:
        expected = logit + math.log(count)
    elif logit > 30:
        expected = count * logit
    else:
        expected = math.log(math.expm1(count * math.log1p(math.exp(logit))))
    z = torch.full((count,), float(logit), dtype=torch.double, requires_grad=True)
    y = noisy_or(z)
    y.backward()
    close(y.item(), expected, 1e-13 * max(1, abs(expected)))
    at = z.detach()
    close(z.grad, at.sigmoid() / -torch.expm1(-F.softplus(at).sum()), 1e-7)


@pytest.mark.parametrize('logit', [-1e30, -1e4, -200.0, -18.0, -9.21, 0.0, 88.0, 1e4, 1e30])
def test_noisy_or_in_single_precision(logit):
    "It is finite, and the gradient does not vanish where all is surely negative."
    z = torch.full((3,), logit, requires_grad=True)
    y = noisy_or(z)
    y.backward()
    assert y.isfinite()
    assert z.grad.isfinite().all()
    assert (z.grad >= 0).all()
    if -1e6 < logit < -30:
        close(z.grad.sum().item(), 1, 2e-3)


# ---- by hand


def test_without_attention(made):
    close(made.logits('mean')[0, 0], np.mean(made.of_patches('mean')), 1e-13)
    close(made.logits('max')[0, 0], max(made.of_patches('max')), 1e-13)
    close(made.logits('topk')[0, 0], sum(sorted(made.of_patches('topk'))[-2:]) / 2, 1e-13)
    p = 1 - np.prod([1 - sigmoid(z) for z in made.of_patches('noisy-or')])
    close(made.logits('noisy-or')[0, 0], math.log(p / (1 - p)), 1e-13)


@pytest.mark.parametrize('name', ['mean', 'max', 'topk', 'noisy-or'])
def test_probabilities_of_patches(made, name):
    found = made.nets[name].relevance(made.x).numpy()
    close(found, sigmoid(np.array(made.of_patches(name))), 1e-13)


def test_rnn(made):
    weights = made.weights('rnn')
    state = np.zeros(4)
    for i in (1, 3, 0):  # scores 2, 2, .3: of equals the first is first
        embedded = weights['embed.weight'] @ made.features[i] + weights['embed.bias']
        carried = weights['carry.weight'] @ state + weights['carry.bias']
        state = np.array([max(0, value) for value in embedded + carried])
    expected = weights['classifier.weight'][0] @ state + weights['classifier.bias'][0]
    close(made.logits('rnn')[0, 0], expected, 1e-13)
    close(made.relevance('rnn'), sigmoid(made.scores.numpy()), 1e-13)


def gated_attention(made, name):
    "The logit, embedded patches and attention, in loops."
    weights = made.weights(name)

    def layer(part, embedded):
        weight = weights[f'attention.{part}.weight'][:, :, 0, 0]
        bias = weights[f'attention.{part}.bias']
        return [weight[unit] @ embedded + bias[unit] for unit in range(len(bias))]

    def score(embedded):
        last = weights['attention.weight.weight'][0, :, 0, 0]
        value, gate = layer('value', embedded), layer('gate', embedded)
        return sum(w * math.tanh(v) * sigmoid(g) for w, v, g in zip(last, value, gate))

    before = made.features @ weights['embed.weight'].T + weights['embed.bias']
    embedded = np.maximum(0, before)
    attention = softmax([score(row) for row in embedded])
    pooled = sum(a * row for a, row in zip(attention, embedded))
    logit = weights['classifier.weight'][0] @ pooled + weights['classifier.bias'][0]
    return logit, embedded, attention


@pytest.mark.parametrize('name, units', [('abmil', 128), ('clam', 256)])
def test_gated_attention(made, name, units):
    assert made.weights(name)['attention.value.bias'].shape == (units,)
    logit, _, attention = gated_attention(made, name)
    close(made.logits(name)[0, 0], logit, 1e-12)
    close(made.relevance(name), attention / attention.max(), 1e-12)


def svm(logits, true):
    return math.log(1 + math.exp(1 + logits[1 - true] - logits[true]))


def cross_entropy(logits, true):
    return -math.log(softmax(logits)[true])


@pytest.mark.parametrize('kind, each', [('svm', svm), ('ce', cross_entropy)])
@pytest.mark.parametrize('label', [0, 1])
def test_loss_of_clam(made, label, kind, each):
    "Five patches: two for, two against."
    net, weights = made.nets['clam'], made.weights('clam')
    net.instance_loss = kind
    logit, embedded, attention = gated_attention(made, 'clam')
    order = sorted(range(N), key=lambda i: -attention[i])
    weight, bias = weights[f'instances.{label}.weight'], weights[f'instances.{label}.bias']
    of_patches = [
        each(weight @ embedded[i] + bias, true)
        for i, true in zip(order[:2] + order[-2:], (1, 1, 0, 0))
    ]
    of_slide = -math.log(sigmoid(logit) if label else 1 - sigmoid(logit))
    labels = torch.tensor([float(label)])

    def loss():
        logits, details = net.forward_with_details(made.x)
        return net.loss(Binary(), logits, labels, **details).item()

    net.train()
    close(loss(), 0.7 * of_slide + 0.3 * np.mean(of_patches), 1e-12)
    net.eval()
    close(loss(), of_slide, 1e-12)


def test_dsmil(made):
    weights = made.weights('dsmil')
    z = made.of_patches('dsmil', 'instance')
    top = int(np.argmax(z))
    queries = [weights['query.weight'] @ row + weights['query.bias'] for row in made.features]
    attention = softmax([sum(query * queries[top]) / math.sqrt(4) for query in queries])
    values = [weights['value.weight'] @ row + weights['value.bias'] for row in made.features]
    weighed = sum(a * value for a, value in zip(attention, values))
    of_sum = weights['bag.weight'][0] @ weighed + weights['bag.bias'][0]
    close(made.logits('dsmil')[0, 0], (z[top] + of_sum) / 2, 1e-13)
    close(made.logits('dsmil', training=True), np.array([[z[top]], [of_sum]]), 1e-13)
    close(made.relevance('dsmil'), sigmoid(np.array(z)), 1e-13)


class TransMILByHand:
    """TransMIL of 16 units, 8 heads of 2 and 8 landmarks: five patches are nine tokens and the
    class token, behind six zeros."""

    dim, landmarks, heads, head_dim = 16, 8, 8, 2
    zeros, total = 6, 16

    def __init__(self, weights):
        self.weights = weights

    def norm(self, h, i):
        normed = np.array([(row - row.mean()) / math.sqrt(row.var() + 1e-5) for row in h])
        return normed * self.weights[f'norms.{i}.weight'] + self.weights[f'norms.{i}.bias']

    def softmaxed(self, queries, keys):
        scale = math.sqrt(self.head_dim)
        return np.array([softmax([query @ key / scale for key in keys]) for query in queries])

    def head(self, qkv, number):
        "The three factors of attention of a head, and its values."
        columns = [part * self.dim + number * self.head_dim for part in range(3)]
        query, key, value = [qkv[:, first : first + self.head_dim] for first in columns]

        def landmarks(rows):
            return np.array([(rows[2 * g] + rows[2 * g + 1]) / 2 for g in range(self.landmarks)])

        of_queries, of_keys = landmarks(query), landmarks(key)
        return (
            self.softmaxed(query, of_keys),
            self.softmaxed(of_queries, of_keys),
            self.softmaxed(of_queries, key),
            value,
        )

    def pseudo_inverse(self, p, scale):
        one, z = np.eye(self.landmarks), p.T / scale
        for _ in range(6):
            b = p @ z
            z = z @ (13 * one - b @ (15 * one - b @ (7 * one - b))) / 4
        return z

    def convolved(self, value, kernel, j):
        return sum(
            kernel[offset + 16] * value[j + offset]
            for offset in range(-16, 17)
            if 0 <= j + offset < self.total
        )

    def attention(self, h, i):
        "What it adds to the tokens, and what the first token takes from each."
        tokens = np.concatenate([np.zeros((self.zeros, self.dim)), h])
        qkv = tokens @ self.weights[f'attentions.{i}.qkv.weight'].T
        heads = [self.head(qkv, number) for number in range(self.heads)]
        columns = max(abs(middle).sum(0).max() for _, middle, _, _ in heads)
        rows = max(abs(middle).sum(1).max() for _, middle, _, _ in heads)
        added, taken = np.zeros((self.total, self.dim)), []
        for number, (first, middle, last, value) in enumerate(heads):
            full = first @ self.pseudo_inverse(middle, columns * rows) @ last
            taken.append(full[self.zeros, self.zeros :])
            kernel = self.weights[f'attentions.{i}.conv.weight'][number, 0, :, 0]
            start = number * self.head_dim
            for j in range(self.total):
                found = full[j] @ value + self.convolved(value, kernel, j)
                added[j, start : start + self.head_dim] = found
        weight = self.weights[f'attentions.{i}.out.weight']
        bias = self.weights[f'attentions.{i}.out.bias']
        return added[self.zeros :] @ weight.T + bias, np.mean(taken, 0)

    def positions(self, h):
        "PPEG: three depthwise convolutions of the square of 3 x 3 patches."
        out = h.copy()
        for row, column, layer in np.ndindex(3, 3, 3):
            weight = self.weights[f'places.{layer}.weight'][:, 0]
            size = weight.shape[1]
            total = self.weights[f'places.{layer}.bias'].copy()
            for i, j in np.ndindex(size, size):
                y, x = row + i - size // 2, column + j - size // 2
                if 0 <= y < 3 and 0 <= x < 3:
                    total += weight[:, i, j] * h[1 + 3 * y + x]
            out[1 + 3 * row + column] += total
        return out

    def __call__(self, features):
        "The logits, and what the class token takes from each patch."
        embedded = features @ self.weights['embed.weight'].T + self.weights['embed.bias']
        h = np.maximum(0, embedded)
        h = np.concatenate([self.weights['token'], h, h[:4]])
        h = h + self.attention(self.norm(h, 0), 0)[0]
        h = self.positions(h)
        added, row = self.attention(self.norm(h, 1), 1)
        token = self.norm(h + added, 2)[0]
        logits = self.weights['classifier.weight'] @ token + self.weights['classifier.bias']
        return logits, np.maximum(row[1:6], 0)


def test_transmil(made):
    logits, row = TransMILByHand(made.weights('transmil'))(made.features)
    close(made.logits('transmil')[0], logits, 1e-12)
    close(made.relevance('transmil'), row / row.max(), 1e-12)


# ---- what holds of all


@pytest.mark.parametrize('name', aggregators)
def test_a_slide_of_one_patch(made, name):
    net = made.nets[name].eval()
    assert net(made.x[:1], made.scores[:1]).shape == (1, 1)
    assert net.relevance(made.x[:1], made.scores[:1]).shape == (1,)


ORDER = torch.tensor([3, 0, 4, 2, 1])


ORDER_MATTERS = {'transmil'}


@pytest.mark.parametrize('name', [name for name in aggregators if name not in ORDER_MATTERS])
def test_the_order_of_patches_does_not_matter(made, name):
    net, x, scores = made.nets[name].eval(), made.x, torch.arange(5.0).double()
    close(net(x, scores).item(), net(x[ORDER], scores[ORDER]).item(), 1e-13)
    close(net.relevance(x, scores)[ORDER], net.relevance(x[ORDER], scores[ORDER]), 1e-13)


def test_the_order_of_patches_matters_to_transmil_and_that_of_scores_to_rnn(made):
    x, scores = made.x, made.scores
    transmil, rnn = made.nets['transmil'].eval(), made.nets['rnn'].eval()
    assert abs(transmil(x).item() - transmil(x[ORDER]).item()) > 1e-6
    assert abs(rnn(x, scores).item() - rnn(x[ORDER], scores).item()) > 1e-6


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', aggregators)
def test_gradients_are_those_of_differences(made, name, training):
    net = made.nets[name].train(training)
    names, values = zip(*net.named_parameters())

    def logits(x, *values):
        return torch.func.functional_call(net, dict(zip(names, values)), (x, made.scores))

    inputs = [made.x.clone().requires_grad_(), *values]
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


@pytest.mark.parametrize('name, chosen', [('max', 1), ('topk', 2)])
def test_of_equal_patches_the_first_gets_the_gradient(made, name, chosen):
    same = torch.ones(4, D, dtype=torch.double, requires_grad=True)
    made.nets[name](same).backward()
    assert (same.grad.abs().sum(1) > 0).tolist() == [i < chosen for i in range(4)]


def test_clam_trains_the_classifier_of_the_slides_class_alone(made):
    net, label = made.nets['clam'].train(), torch.ones(1)
    logits, details = net.forward_with_details(made.x)
    net.loss(Binary(), logits, label, **details).backward()
    assert net.instances[0].weight.grad is None
    assert net.instances[1].weight.grad.abs().sum() > 0
    assert copy.deepcopy(net).training


def test_of_one_patch_clam_has_no_second_loss(made):
    net, label = made.nets['clam'].train(), torch.ones(1)
    logits, details = net.forward_with_details(made.x[:1])
    found = net.loss(Binary(), logits, label, **details)
    close(found.item(), 0.7 * Binary().loss(logits, label).item(), 1e-14)


def test_the_loss_of_clam_refuses_other_tasks_and_in_training_no_evidence(made):
    net, label = made.nets['clam'].train(), torch.ones(1)
    logits, details = net.forward_with_details(made.x)
    with pytest.raises(InputError, match='two classes'):
        net.loss(Regression(), logits, label, **details)
    with pytest.raises(InputError, match='evidence'):
        net.loss(Binary(), logits, label)


def test_a_forward_pass_leaves_nothing_in_the_network(made):
    for net in made.nets.values():
        before = set(vars(net))
        net.train().forward_with_details(made.x, made.scores)
        assert set(vars(net)) == before


@pytest.mark.parametrize('training', [False, True])
def test_the_loss_of_clam_under_autocast(training):
    "The evidence is of low precision, the classifiers of patches are not."
    torch.manual_seed(0)
    net, x, label = CLAM(16).train(training), torch.randn(30, 16), torch.ones(1)
    logits, details = net.forward_with_details(x)
    exact = net.loss(Binary(), logits, label, **details)
    with torch.autocast('cpu', torch.bfloat16):
        logits, details = net.forward_with_details(x)
    found = net.loss(Binary(), logits.float(), label, **details)
    assert abs(found - exact) < 0.05


# of 16 features, with units enough that dropout changes something
OPTIONS = dict(abmil=dict(hidden=32), clam=dict(hidden=32), transmil=dict(hidden=32))


@pytest.mark.parametrize('name', aggregators)
def test_dropout_is_of_training_and_not_of_maps(name):
    "Fewer patches than k; other types of numbers."
    torch.manual_seed(0)
    net = aggregators[name](16, dropout=0.5, **OPTIONS.get(name, {}))
    x, scores = torch.randn(9, 16), torch.randn(9)
    assert not torch.equal(net(x, scores), net(x, scores))
    assert torch.equal(net.relevance(x, scores), net.relevance(x, scores))
    assert net.training
    assert torch.equal(net.eval()(x, scores), net(x, scores))
    assert net(x.double(), scores.double()).dtype == torch.float32
    logits = net(x, scores)
    with torch.autocast('cpu', torch.bfloat16):
        assert abs(net(x, scores).float() - logits) < 0.05


@pytest.mark.parametrize('name', aggregators)
def test_attributes(name):
    kind = aggregators[name]
    assert kind.name == name
    assert kind.relevance_is in ('probability', 'attention')
    assert kind.k is None or kind.k > 0


@pytest.mark.parametrize('name', [name for name, kind in aggregators.items() if kind.several])
def test_several_outputs(name):
    torch.manual_seed(0)
    net, x = make_aggregator(name, 16, 4).eval(), torch.randn(9, 16)
    assert net(x).shape == (1, 4)
    assert net.relevance_is == 'attention'
    assert net.relevance(x).max().item() == 1


def test_how_many_patches_count():
    assert make_aggregator('topk', 16).eval().k == 10
    assert make_aggregator('rnn', 16, k=4).k == 4
    assert make_aggregator('clam', 16).k == 8


@pytest.mark.parametrize(
    'name', [name for name, kind in aggregators.items() if hasattr(kind, 'loss')]
)
def test_a_loss_of_its_own(made, name):
    net, label = made.nets[name].train(), torch.ones(1)
    logits, details = net.forward_with_details(made.x, made.scores)
    loss = net.loss(Binary(), logits, label, **details)
    assert loss.ndim == 0
    loss.backward()
    gradients = [weight.grad for weight in net.parameters() if weight.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_clam_has_a_loss_of_its_own_and_most_have_none():
    assert hasattr(CLAM, 'loss')
    assert not hasattr(aggregators['abmil'], 'loss')


# ---- refusals


@pytest.mark.parametrize(
    'arguments, options, message',
    [
        (('median', 3), {}, 'mean, max'),
        (('max', 3, 2), {}, 'two classes'),
        (('clam', 3, 5), {}, 'not 5'),
        (('abmil', 3), dict(k=2), 'k=2'),
        (('topk', 3), dict(k=0), 'k is 0'),
        (('mean', 0), {}, 'd is 0'),
        (('mean', 3), dict(dropout=1.0), 'dropout is 1'),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(InputError, match=message):
        make_aggregator(*arguments, **options)


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match="'l2'"):
        CLAM(3, instance_loss='l2')


def test_rnn_needs_scores(made):
    for method in (made.nets['rnn'], made.nets['rnn'].relevance):
        with pytest.raises(InputError, match='sp_mil'):
            method(made.x)


def wrong_inputs(x, scores):
    nan, inf = x.clone(), x.clone()
    nan[3, 1] = torch.nan
    inf[2, 0] = torch.inf
    return [
        (nan, scores, 'features of patch 3 (of 0 to 4)'),
        (inf, scores, 'patch 2'),
        (x, scores.log(), 'scores of patch 2'),
        (x[:0], scores[:0], '(0, 3)'),
        (x[0], scores, '(3,)'),
        (x[:, :2], scores, '(5, 2)'),
        (x[None], scores, '(1, 5, 3)'),
        (x, scores[:, None], '(5, 1)'),
        (x, scores[:4], '(4,)'),
    ]


@pytest.mark.parametrize('name', aggregators)
def test_what_are_no_features_of_a_slide_is_refused(made, name):
    net = made.nets[name]
    for x, scores, message in wrong_inputs(made.x, made.scores):
        for method in (net, net.relevance):
            with pytest.raises(InputError) as found:
                method(x, scores)
            assert message in str(found.value)
