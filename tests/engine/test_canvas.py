"""Random networks on random canvases in float64: the canvas gives what its dense image gives, values, every gradient and those of the patches."""

import copy
import pickle

import pytest
import torch
from canvases import canvases, pick
from hypothesis import Phase, given
from hypothesis import strategies as st
from networks import Apply, close, frozen_norm, networks, random_tests, small, waiting, waits
from torch import nn
from torchvision.ops import StochasticDepth

from streaming_pathology.core import InputError
from streaming_pathology.engine.canvas import Canvas, Profile, Rect, boxes_of
from streaming_pathology.engine.storage import source_of
from streaming_pathology.engine.stream import stream
from streaming_pathology.engine.windows import StreamingError
from streaming_pathology.training.models import StreamingClassifier


def agree(net, canvas, strip, **how):
    "Assert that a canvas is what its dense image is, values and gradients; 'refused' if the plain network or the canvas is refused."
    wanted = [t for t in (*net.parameters(), *(p for *_, p in canvas.patches)) if t.requires_grad]
    try:
        y = net(canvas.dense())
    except (RuntimeError, ValueError):
        with pytest.raises(StreamingError):
            stream(net, strip, **how)(canvas)
        return 'refused'
    g = torch.randn_like(y)
    try:
        want = torch.autograd.grad(y, wanted, g, allow_unused=True) if y.requires_grad else []
    except RuntimeError:
        return 'refused'  # the plain network cannot do it either
    try:
        ys = stream(net, strip, **how)(canvas)
    except StreamingError as e:
        assert 'canvas.dense()' in str(e) or how.get('direction') == 'columns', e
        return 'refused'
    assert (
        ys.shape == y.shape
        and ys.dtype == y.dtype
        and ys.requires_grad == y.requires_grad
        and close(ys, y)
    )
    with torch.no_grad():
        assert close(stream(net, strip, **how)(canvas), y)
    got = torch.autograd.grad(ys, wanted, g, allow_unused=True) if y.requires_grad else []
    floor = max([1e-14, *(1e-13 * w.abs().max().item() for w in want if w is not None)])
    for a, b in zip(got, want):
        assert close(
            torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, floor
        ), ((a - b).abs().max().item(), b.abs().max().item())


@random_tests(phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.data(),
    networks(),
    pick([1, 3, 8, 17, 64, 200]),
    st.integers(0, 6),
    pick([1, 1, 2, 3]),
    pick(['device', 'disk']),
    pick(['auto', 'rows', 'columns']),
    waits,
    st.integers(0, 2**31),
)
def test_canvas_is_its_dense_image(
    data, network, strip, keep, every, states, direction, worth, seed
):
    torch.manual_seed(seed)
    channels, net = network
    canvas = data.draw(canvases(channels))
    with waiting(worth):
        agree(net, canvas, strip, keep=keep, every=every, states=states, direction=direction)


# --- heads, masks and what wants a gradient


def painted(H=400, W=300, dtype=torch.double, wanted=False):
    g = torch.Generator().manual_seed(1)
    return Canvas(
        (H, W),
        (0.9, -0.3, 0.4),
        [
            (
                t,
                l,
                torch.randn(3, h, w, dtype=torch.double, generator=g)
                .to(dtype)
                .requires_grad_(wanted),
            )
            for t, l, h, w in (
                (0, 0, 31, 17),
                (150, 120, 40, 33),
                (170, 153, 60, 21),
                (399, 250, 1, 50),
            )
        ],
    )


def body(c=8):
    return nn.Sequential(
        nn.Conv2d(3, c, 7, 2, 3, bias=False),
        frozen_norm(c),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(c, c, 3, padding=1),
        frozen_norm(c),
        nn.ReLU(True),
        nn.Conv2d(c, c, 3, 2, 1),
    )


@pytest.mark.parametrize(
    'head',
    [
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveMaxPool2d(1),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveMaxPool2d((2, 5)),
        Apply(lambda m, x: x.sum((2, 3))),
        nn.Upsample(scale_factor=2, mode='bilinear'),
        nn.ConvTranspose2d(8, 3, 3, 2, 1, 1),
    ],
    ids=str,
)
def test_heads(head):
    torch.manual_seed(0)
    agree(nn.Sequential(body(), head).double(), painted(wanted=True), 32)


def test_what_wants_a_gradient():
    torch.manual_seed(0)
    net = body().double()
    canvas = painted()
    net[:4].requires_grad_(False)
    agree(net, canvas, 32)
    for p in net.parameters():
        p.requires_grad_(p.ndim == 1)
    agree(net, canvas, 32)
    net.requires_grad_(False)
    agree(net, canvas, 32)
    agree(net, painted(wanted=True), 32, keep=3)
    some = painted(wanted=True)
    some.patches[1][2].requires_grad_(False)
    agree(net, some, 32)


@pytest.mark.parametrize(
    'drop', [nn.Dropout2d(0.5), StochasticDepth(0.5, 'row'), StochasticDepth(0.5, 'batch')], ids=str
)
def test_masks_hold_for_the_whole_canvas(drop):
    "Dropped channels are dropped everywhere, the background included, forward and backward: as with the mask as a constant."
    net, canvas = (
        nn.Sequential(
            body(),
            Apply(lambda m, x: x + m.layers[0](x), drop.train()),
            nn.Conv2d(8, 4, 3, padding=1),
        ).double(),
        painted(wanted=True),
    )
    for seed in range(6):
        torch.manual_seed(seed)
        s = stream(net, 32)
        state = torch.get_rng_state()
        run, _, _ = s.strips(source_of(canvas, net))
        (mask,) = [
            t
            for v, t in zip(run.program.operands, run.operands)
            if t.ndim == 4 and not t.requires_grad
        ]
        torch.set_rng_state(state)
        y = s(canvas)
        got = torch.autograd.grad(
            y.square().sum(), [*net.parameters(), *(p for *_, p in canvas.patches)]
        )
        z = net[0](canvas.dense())
        w = net[2](z + z * mask)
        want = torch.autograd.grad(
            w.square().sum(), [*net.parameters(), *(p for *_, p in canvas.patches)]
        )
        assert close(y, w) and all(close(a, b, 1e-12) for a, b in zip(got, want))


@pytest.mark.usefixtures('small_resnet')
def test_classifier_with_attention():
    torch.manual_seed(0)
    model = StreamingClassifier('resnet18', pool='attention', strip=64).double()
    plain = nn.Sequential(model.trunk.module, model.head)
    canvas = Canvas(
        (700, 330),
        (240, 235, 245),
        [
            (100, 50, 255 * torch.rand(3, 90, 71, dtype=torch.double)),
            (500, 200, 255 * torch.rand(3, 33, 130, dtype=torch.double)),
        ],
    )
    y = plain(canvas.dense())
    ys = model(canvas)
    assert close(ys, y)
    want, got = (torch.autograd.grad(v.sum(), list(model.parameters())) for v in (y, ys))
    assert all(close(a, b, 1e-12) for a, b in zip(got, want)) and close(
        model.attention(canvas), model.attention(canvas.dense())
    )
    logits, seen = model(canvas, attention=True)
    there = (
        model.head.pool.scores(model.trunk.module(canvas.dense()))
        .flatten(2)
        .softmax(2)
        .view_as(seen)
    )
    want, got = (
        torch.autograd.grad(a.sum() + b.square().sum(), list(model.parameters()))
        for a, b in ((plain(canvas.dense()), there), (logits, seen))
    )
    assert (
        close(logits, y)
        and close(seen, there)
        and all(close(a, b, 1e-12) for a, b in zip(got, want))
    )
    low = Canvas(
        (700, 330), (240, 235, 245), [(t, l, p.to(torch.uint8)) for t, l, p in canvas.patches]
    )
    model.float()
    assert torch.allclose(model(low), plain(low.dense()), atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_as_near_to_the_truth_as_the_dense_image(dtype):
    errors = {'dense': [], 'canvas': []}
    for seed in range(8):
        torch.manual_seed(seed)
        net, canvas = body().float(), painted(dtype=torch.float32)
        s = stream(net, 32)
        exact = net(canvas.dense())
        want = torch.autograd.grad(exact.square().mean(), list(net.parameters()))
        for name, x in (('dense', canvas.dense()), ('canvas', canvas)):
            with torch.autocast('cpu', dtype):
                y = s(x)
            got = torch.autograd.grad(y.float().square().mean(), list(net.parameters()))
            errors[name].append(
                torch.stack(
                    [(a - b).norm() / b.norm() for a, b in zip([y.float(), *got], [exact, *want])]
                )
            )
    dense, canvas = (torch.stack(e).median(0).values for e in errors.values())
    assert (canvas <= 1.3 * dense + 1e-3).all(), f'{canvas} beside {dense}'


def test_weights_of_few_bits():
    "bf16 weights, under autocast and alone: as near to float64 as the plain network is, however many strips there are."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    ).bfloat16()
    canvas = painted(dtype=torch.bfloat16)
    canvas.color = tuple(torch.tensor(canvas.color).bfloat16().tolist())
    exact = copy.deepcopy(net).double()
    want = torch.autograd.grad(
        exact(canvas.dense().double()).square().mean(), list(exact.parameters())
    )

    def error(f, x, amp):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            y = f(x)
        return max(
            ((a - b).norm() / b.norm()).item()
            for a, b in zip(
                torch.autograd.grad(y.double().square().mean(), list(net.parameters())), want
            )
        )

    plain = error(net, canvas.dense(), False)
    for strip in (400, 16):
        for x, amp in ((canvas, False), (canvas, True), (canvas.dense(), False)):
            assert error(stream(net, strip), x, amp) < 1.5 * plain + 1e-3, (strip, amp)


def test_work_is_that_of_the_tissue():
    from torch.utils.flop_counter import FlopCounterMode

    net, found = body().double(), {}
    canvas = Canvas(
        (2000, 2000), (1, 1, 1), [(900, 900, torch.rand(3, 200, 200, dtype=torch.double))]
    )
    for name, x in (('canvas', canvas), ('dense', canvas.dense())):
        s = stream(net, 64)
        with torch.no_grad():
            s.strips(source_of(x, net))  # traces the network, which would be counted too
            with FlopCounterMode(display=False) as counted:
                s(x)
        found[name] = counted.get_total_flops()
    assert found['canvas'] < 0.03 * found['dense'], found  # 1% is tissue


# --- rectangles, boxes and profiles


def test_where_rectangles_overlap():
    a, b = Rect(2, 3, 10, 8), Rect(5, 0, 20, 4)
    part = a.intersection(b)
    assert part == b.intersection(a) == Rect(5, 3, 10, 4)
    assert a.intersection(Rect(10, 3, 12, 8)) is None  # they touch
    assert part.transposed() == a.transposed().intersection(b.transposed())
    pixels = torch.arange(400).view(20, 20)
    shown = pixels[a.top : a.bottom, a.left : a.right]
    assert torch.equal(shown[part.index_in(a)], pixels[5:10, 3:4])
    assert (a.height, a.width, a.area) == (8, 5, 40)
    assert a.scaled(3) == Rect(6, 9, 30, 24)


@pytest.mark.parametrize('price', [0, 1, 2, 5, 100])
def test_boxes_cover_the_tissue(price):
    torch.manual_seed(0)
    for density in (0.02, 0.2, 0.7):
        cells = torch.rand(30, 40) < density
        covered = torch.zeros(30, 40, dtype=torch.bool)
        boxes = boxes_of(cells, price)
        for box in boxes:
            covered[box.top : box.bottom, box.left : box.right] = True
        assert not (cells & ~covered).any()
        if price == 0:  # runs without a cell that is empty
            assert torch.equal(covered, cells)


@pytest.mark.parametrize(
    'head,tail,period', [(0, 0, 1), (3, 2, 1), (2, 0, 3), (4, 5, 4), (9, 9, 1)]
)
def test_profiles_give_any_rows(head, tail, period):
    size = 23 if head < 9 else 16
    profile = Profile(size, head, tail, period)
    whole = [i if i < head or i >= size - tail else head + (i - head) % period for i in range(size)]
    whole = torch.tensor(whole if head + period + tail < size else range(size))
    stored = torch.cat([whole[first:stop] for first, stop in profile.stored])
    for first in range(size):
        for stop in range(first, size + 1):
            rows = profile.rows(stored, 0, first, stop)
            assert torch.equal(rows, whole[first:stop])
            low, high = profile.canonical(first, stop)
            assert torch.equal(whole[low:high], whole[first:stop])


# --- what is not a canvas


def test_canvases_in_images():
    torch.manual_seed(0)
    x = torch.full((3, 300, 200), 7, dtype=torch.uint8)
    x[:, 100:130, 50:90] = 9
    x[1, 299, 199] = 0
    c = Canvas.from_image(x)
    assert (
        c.color == (7, 7, 7)
        and torch.equal(c.dense()[0], x)
        and len(c.patches) == 2
        and c.dtype == torch.uint8
    )
    assert Canvas.from_image(torch.ones(1, 1, 50, 1)).patches == [] and torch.equal(
        Canvas.from_image(torch.ones(1, 1, 50, 1), (0,)).dense(), torch.ones(1, 1, 50, 1)
    )
    noise = torch.rand(3, 77, 91, requires_grad=True)
    c = Canvas.from_image(noise, (2, 2, 2))
    assert len(c.patches) == 1
    y = stream(nn.Conv2d(3, 2, 3), 16)(c)
    y.sum().backward()
    assert noise.grad is not None and torch.equal(c.dense()[0], noise)
    torch.manual_seed(1)
    specks = torch.rand(1, 999, 1203)
    specks = torch.where(specks < 0.9999, torch.zeros(()), specks)
    assert torch.equal(Canvas.from_image(specks, (0,)).dense()[0], specks)
    for bad, says in (
        (torch.rand(2, 3, 9, 9), 'one image'),
        (torch.rand(9, 9), 'one image'),
        ('x', 'one image'),
        (torch.rand(3, 0, 9), 'one image'),
    ):
        with pytest.raises(InputError, match=says):
            Canvas.from_image(bad)
    with pytest.raises(InputError, match='channels'):
        Canvas.from_image(torch.rand(3, 9, 9), (1, 1))


@pytest.mark.parametrize(
    'shape, color, patches, says',
    [
        ((0, 5), (1,), [], 'size of a canvas'),
        (10, (1,), [], 'size of a canvas'),
        ((True, 5), (1,), [], 'size of a canvas'),
        ((5, 5), (float('nan'),), [], 'does not fit'),
        (
            (5, 5),
            (float('inf'),),
            [(0, 0, torch.zeros(1, 2, 2, dtype=torch.uint8))],
            'does not fit',
        ),
        ((5, 5), '1', [], 'no channels'),
        ((5, 5), (1,), [5], 'Patch 0'),
        ((5, 5), (1,), [(0, 0, torch.zeros(1, 2, 2, dtype=torch.bool))], 'torch.bool'),
        ((5,), (1,), [], 'size of a canvas'),
        ((5, 5.0), (1,), [], 'size of a canvas'),
        ((5, 5), (), [], 'no channels'),
        ((5, 5), 3, [], 'no color'),
        ((5, 5), (1,), [(0, 0)], 'Patch 0'),
        ((5, 5), (1,), [(0, 0, torch.zeros(1, 6, 5))], 'reaches beyond'),
        ((5, 5), (1,), [(-1, 0, torch.zeros(1, 2, 2))], 'reaches beyond'),
        ((5, 5), (1,), [(0.0, 0, torch.zeros(1, 2, 2))], 'whole pixels'),
        ((5, 5), (1,), [(0, 0, torch.zeros(2, 2))], 'tensor'),
        ((5, 5), (1,), [(0, 0, torch.zeros(2, 2, 2))], '2 channels'),
        ((5, 5), (1,), [(0, 0, torch.zeros(1, 2, 0))], 'pixels'),
        (
            (5, 5),
            (1,),
            [(0, 0, torch.zeros(1, 2, 2)), (0, 0, torch.zeros(1, 2, 2).double())],
            'float64',
        ),
        ((5, 5), (300,), [(0, 0, torch.zeros(1, 2, 2, dtype=torch.uint8))], 'does not fit'),
        ((5, 5), (0.5,), [(0, 0, torch.zeros(1, 2, 2, dtype=torch.uint8))], 'does not fit'),
    ],
)
def test_bad_canvases(shape, color, patches, says):
    with pytest.raises(InputError, match=says) as e:
        Canvas(shape, color, patches)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('pad', [(-10, -10), (-10, 3), (4, -2)])
def test_columns_cut_off(pad):
    "With tissue behind the cut, at it and far from it."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ZeroPad2d((*pad, 0, 0)),
        nn.Conv2d(3, 4, 7, padding=3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
    ).double()
    for left in (0, 8, 25, 41, 50):
        agree(
            net,
            Canvas(
                (40, 53),
                (0.2, 0.5, 0.9),
                [(7, left, torch.randn(3, 9, 3, dtype=torch.double, requires_grad=True))],
            ),
            16,
            direction='rows',
        )


def test_canvases_that_a_network_cannot_take():
    for net, says in (
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), 'canvas.dense()'),
        (nn.CircularPad2d((1, 1, 0, 0)), 'where a column lies'),
        (Apply(lambda m, x: x + m.p, p=torch.randn(1, 3, 1, 300)), 'where a column lies'),
    ):
        with pytest.raises(StreamingError, match=says.replace('(', '.').replace(')', '.')):
            stream(net, 32, direction='rows')(painted(dtype=torch.float32))
    with pytest.raises(StreamingError, match='too small'):
        stream(nn.Conv2d(3, 4, 9), 4)(Canvas((5, 5), (1, 1, 1)))
    net = small()
    s = stream(net, 16)
    canvas = painted(dtype=torch.float32)
    y = s(canvas).sum()
    y.backward()
    with pytest.raises(RuntimeError):
        y.backward()
    y = s(canvas).sum()
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match='inplace'):
        y.backward()


@pytest.mark.parametrize(
    'pad',
    [
        nn.ReflectionPad2d((0, -1, 0, 0)),
        nn.ReflectionPad2d((-2, 1, 1, 0)),
        nn.ReplicationPad2d((-1, 0, 0, 0)),
        nn.ReplicationPad2d((2, -1, 0, 3)),
        nn.ConstantPad2d((-2, 1, 0, 2), 0.3),
    ],
    ids=str,
)
def test_padding_that_cuts_off_and_mirrors(pad):
    for left in (0, 1, 2, 15, 16, 31, 37, 38, 39):
        agree(
            nn.Sequential(pad),
            Canvas(
                (20, 40),
                (0.3,),
                [(4, left, torch.ones(1, 3, 1, dtype=torch.double, requires_grad=True))],
            ),
            8,
        )


@pytest.mark.parametrize('wanted', [False, True])
def test_canvases_can_be_sent(wanted):
    "To other processes, the patches as one tensor, which is one open file for all of them; as they are where they have gradients."
    x = torch.zeros(3, 500, 700, dtype=torch.uint8 if not wanted else torch.double)
    x[:, 100:300, 50:90] = 1
    x[:, 400:430, 600:] = 2
    canvas = Canvas(
        x.shape[1:],
        (0, 0, 0),
        [
            (t, l, p.clone().requires_grad_(wanted))
            for t, l, p in Canvas.from_image(x, (0, 0, 0)).patches
        ],
        x.dtype,
    )
    state = canvas.__getstate__()
    assert len(canvas.patches) == 2 and wanted != isinstance(state['patches'], tuple)
    for again in (pickle.loads(pickle.dumps(canvas)), copy.deepcopy(canvas)):
        assert (
            torch.equal(again.dense(), canvas.dense())
            and [p.requires_grad for *_, p in again.patches] == [wanted] * 2
            and repr(again) == repr(canvas)
        )
    empty = pickle.loads(pickle.dumps(Canvas((5, 5), (1, 1, 1))))
    assert empty.patches == [] and empty.dtype == torch.float32


def test_columns_that_read_only_padding():
    "A convolution whose padding is as wide as its kernel: at the edge of its map it sees no column at all."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 2, 2, padding=3),
        nn.Conv2d(4, 4, 3, padding=4, dilation=3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2, padding=2),
    ).double()
    for left in (0, 30, 58):
        for width in (1, 2):
            agree(
                net,
                Canvas(
                    (40, 60),
                    (0.2, 0.5, 0.9),
                    [(9, left, torch.randn(3, 3, width, dtype=torch.double, requires_grad=True))],
                ),
                8,
                direction='rows',
            )
