"""Aggregators beside independent implementations with the same weights, torchmil's and the package
nystrom-attention, in double precision; the formulas in loops are in test_aggregators_by_hand.py."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streaming_pathology.mil.aggregators import (
    ABMIL,
    CLAM,
    DSMIL,
    RNN,
    NystromAttention,
    TransMIL,
    aggregators,
    make_aggregator,
    pseudo_inverse,
    smooth_svm,
)
from streaming_pathology.training.tasks import Binary

D = 24


@pytest.fixture(autouse=True)
def doubles():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def same(a, b, eps=1e-10):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=eps)


def copied(theirs, ours):  # two lists of modules
    for a, b in zip(theirs, ours):
        a = getattr(a, 'module', a)  # of its LazyLinear
        with torch.no_grad():
            a.weight.copy_(b.weight.reshape(a.weight.shape))
            a.bias is None or a.bias.copy_(b.bias)


def embedding(ours):
    return nn.Sequential(ours.embed, nn.ReLU())


def pool_of(theirs, ours):
    copied(
        [theirs.pool.fc1, theirs.pool.fc_gated, theirs.pool.fc2, theirs.classifier],
        [ours.attention.value, ours.attention.gate, ours.attention.weight, ours.classifier],
    )


@pytest.mark.parametrize('n', [1, 7, 300])
def test_abmil(n):
    models = pytest.importorskip('torchmil.models')
    ours, x = ABMIL(D).eval(), torch.randn(n, D)
    theirs = models.ABMIL((D,), att_dim=128, gated=True, feat_ext=embedding(ours))
    pool_of(theirs, ours)
    logit, attention = theirs(x[None], return_att=True)
    same(ours(x)[0], logit)
    same(ours.relevance(x), (attention[0] - attention.max()).exp().detach())


@pytest.mark.parametrize('label', [0, 1])
def test_clam(label):
    """Which patches are evidence, for what, and by which classifier.

    torchmil's own instance losses cannot be compared: both are given targets of shape (2k, 1), from
    which its SVM makes a table (2k, 2k, 2) of each logit with each target, and its cross-entropy
    raises. It also always adds the loss of subtyping, which we have not: that of the slide's class
    alone is asked for."""
    models, utils = pytest.importorskip('torchmil.models'), pytest.importorskip('torchmil.nn.utils')
    ours, x = CLAM(D).train(), torch.randn(40, D)
    theirs = models.CLAM_SB((D,), att_dim=256, gated=True, k_sample=8, feat_ext=embedding(ours))
    pool_of(theirs, ours)
    copied(theirs.inst_classifiers, ours.instances)
    logit, attention, h = theirs(x[None], return_att=True, return_emb=True)
    same(ours(x)[0], logit)
    y = torch.tensor([float(label)])

    def their_svm(logits, classes):
        return utils.log_sum_exp(
            logits + utils.delta(classes, torch.arange(2)) - logits.gather(1, classes[:, None])
        ).mean()  # its parts, each target with its own logits

    del theirs.inst_loss_fn
    for kind, each in dict(ce=F.cross_entropy, svm=their_svm).items():
        ours.instance_loss = kind

        def their_loss(logits, targets, each=each):
            return each(logits.double(), targets[:, 0].long())

        theirs.inst_loss_fn = their_loss
        inst, _, targets = theirs.inst_eval(attention[0], h[0], theirs.inst_classifiers[label])
        assert targets.tolist() == [1] * 8 + [0] * 8
        mine, details = ours.forward_with_details(x)
        expected = 0.7 * theirs.criterion(logit, y) + 0.3 * inst
        # it rounds the logits of patches to single precision
        same(ours.loss(Binary(), mine, y, **details), expected, 1e-6)


def test_smooth_svm():
    """Our loss has no step to a hard one where logits are far apart, as torchmil and the paper's
    code have for the sake of larger k: it is below a thousandth."""
    utils = pytest.importorskip('torchmil.nn.utils')
    for spread in (1, 5, 50):
        s, y = spread * torch.randn(200, 2), torch.randint(2, (200,))
        theirs = utils.SmoothTop1SVM(2)
        margin = s + utils.delta(y, theirs.labels).double() - s.gather(1, y[:, None])
        same(smooth_svm(s, y), utils.log_sum_exp(margin).mean())
        same(smooth_svm(s, y), margin.logsumexp(1).mean())
        _, hard = utils.detect_large(s, 1, 1.0, 1e3)
        same(utils.log_sum_exp(margin)[hard], margin.amax(1)[hard], 3e-3)


@pytest.mark.parametrize('n', [1, 2, 5, 300])
def test_dsmil(n):
    models = pytest.importorskip('torchmil.models')
    ours, x = DSMIL(D).eval(), torch.randn(n, D)
    theirs = models.DSMIL((D,), att_dim=128)
    # torchmil's values are the features, or of a layer with ReLU; the paper's are linear
    theirs.v_nn = ours.value
    copied(
        [theirs.q_nn, theirs.inst_classifier, theirs.bag_classifier],
        [ours.query, ours.instance, ours.bag],
    )
    bag, attention, instances = theirs(x[None], return_att=True, return_inst_pred=True)
    streams, z, a = ours.streams(x)
    same(streams[:, 0], torch.stack([instances.max(), bag[0]]))
    same(z, instances[0])
    same(a, attention[0, :, 0])
    same(ours(x)[0], theirs.predict(x[None]))
    y = torch.ones(1)
    loss = theirs.compute_loss(y, x[None])[1]
    same(
        2 * Binary().loss(ours.train()(x), torch.ones(2)), sum(loss.values()), 1e-6
    )  # in single precision; it sums where the paper's code averages


@pytest.mark.parametrize('n', [1, 2, 5, 17, 300])
def test_transmil(n):
    """torchmil's attention has no convolution of the values and no layer after it: ours are made to
    do nothing."""
    models = pytest.importorskip('torchmil.models')
    ours, x = TransMIL(D).eval(), torch.randn(n, D)
    theirs = models.TransMIL((D,), att_dim=512, n_heads=8, feat_ext=embedding(ours)).eval()
    with torch.no_grad():
        theirs.cls_token.copy_(ours.token[None])
        for layer, a, norm in zip(theirs.layers, ours.attentions, ours.norms):
            a.conv.weight.zero_()
            a.out.weight.copy_(torch.eye(512))
            a.out.bias.zero_()
            layer.att_module.qkv_nn.weight.copy_(a.qkv.weight)
            norm.weight.normal_()
            norm.bias.normal_()
            copied([layer.norm1], [norm])
    p = theirs.pos_layer
    copied(
        [p.proj, p.proj1, p.proj2, theirs.norm, theirs.classifier],
        [*ours.places, ours.norms[2], ours.classifier],
    )
    logit, attention = theirs(x[None], return_att=True)
    assert logit.dtype == torch.double
    row = attention[0].clamp(min=0).detach()
    same(ours(x)[0], logit, 1e-9)
    same(ours.relevance(x), row / row.max(), 1e-9)


@pytest.mark.parametrize('n', [1, 8, 41, 200])
def test_nystrom(n):
    "With the convolution and the layer after it, and the gradient."
    package = pytest.importorskip('nystrom_attention.nystrom_attention')
    ours, x = NystromAttention(32, landmarks=16), torch.randn(n, 32, requires_grad=True)
    theirs = package.NystromAttention(dim=32, dim_head=4, heads=8, num_landmarks=16)
    copied([theirs.to_qkv, theirs.to_out[0], theirs.res_conv], [ours.qkv, ours.out, ours.conv])
    y, attention = theirs(x[None], return_attn=True)
    mine = ours(x)
    same(mine, y[0])
    same(ours.row(x), attention[0, :, -n, -n:].mean(0))
    for a, b in zip(
        *(
            torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum(), [x])
            for o in (mine, y[0])
        )
    ):
        same(a, b)
    p = torch.randn(8, 16, 16).softmax(-1)
    same(pseudo_inverse(p), package.moore_penrose_iter_pinv(p))


def test_pseudo_inverse():
    p = (torch.randn(4, 9, 9) + 4 * torch.eye(9)).softmax(-1)
    same(pseudo_inverse(p, 30), torch.linalg.pinv(p))


def test_rnn():
    "PyTorch's own Elman network."
    ours, x, s = RNN(D).eval(), torch.randn(30, D), torch.randn(30)
    theirs = nn.RNN(D, 128, nonlinearity='relu')
    with torch.no_grad():
        for a, b in zip(
            theirs.parameters(),
            (ours.embed.weight, ours.carry.weight, ours.embed.bias, ours.carry.bias),
        ):
            a.copy_(b)
    for n in (30, 10, 4, 1):
        same(
            ours(x[:n], s[:n]),
            ours.classifier(theirs(x[:n][s[:n].argsort(descending=True)[:10]])[1]),
        )


@pytest.mark.parametrize('name', aggregators)
def test_large(name):
    "10,000 patches, forwards, backwards and as a map."
    net = make_aggregator(name, 64).float()
    x, s = torch.randn(10_000, 64).float(), torch.randn(10_000).float()
    net(x, s).mean().backward()
    r = net.relevance(x, s)
    assert (
        all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        and r.shape == (10_000,)
        and r.isfinite().all()
        and 0 <= r.min()
        and r.max() <= 1
    )
