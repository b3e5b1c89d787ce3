"""One image over several ranks in float64: every rank has the values and gradients of one process."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchvision
from canvases import canvases
from forks import ranks as in_ranks
from hypothesis import Phase, given
from hypothesis import strategies as st
from networks import UNet, close, frozen_norm, networks, random_tests, small
from small import Small
from torch import nn

from streaming_pathology.core import InputError
from streaming_pathology.engine.bands import shares, stream_bands
from streaming_pathology.engine.canvas import Canvas
from streaming_pathology.engine.program import run_calls
from streaming_pathology.engine.storage import source_of
from streaming_pathology.engine.windows import StreamingError
from streaming_pathology.training.models import StreamingClassifier

pick = st.sampled_from


class Played:
    "`ranks` ranks, one after the other in this process: nothing is sent, so each has its own rows of the outputs and its own share of the gradients."

    def __init__(self, rank, ranks):
        self.patches = [
            mock.patch.object(dist, k, v)
            for k, v in dict(
                is_initialized=lambda: True,
                get_rank=lambda g: rank,
                get_world_size=lambda g: ranks,
                broadcast=lambda *_: None,
                all_reduce=lambda *_, **__: None,
            ).items()
        ]

    def __enter__(self):
        for p in self.patches:
            p.start()

    def __exit__(self, *e):
        for p in self.patches:
            p.stop()


@random_tests(phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.data(),
    networks(),
    st.booleans(),
    st.integers(1, 90),
    st.integers(1, 90),
    pick([1, 5, 16, 64]),
    st.integers(0, 3),
    pick([1, 2]),
    pick(['auto', 'rows']),
    pick([2, 3, 4]),
    st.integers(0, 2**31),
)
def test_bands_of_random_networks(
    data, network, painted, height, width, strip, keep, every, direction, ranks, seed
):
    torch.manual_seed(seed)
    channels, net = network
    if painted:
        x = data.draw(canvases(channels))
        image, inputs = x.dense, [p for *_, p in x.patches if p.requires_grad]
    else:
        x = torch.randn(1, channels, height, width, dtype=torch.double, requires_grad=True)
        image, inputs = lambda: x * 1, [x]
    wanted = [*inputs, *net.parameters()]
    try:
        y = net(image())
    except (RuntimeError, ValueError):
        return
    if not y.requires_grad:
        return
    g = torch.randn_like(y)
    try:
        want = torch.autograd.grad(y, wanted, g, allow_unused=True)
    except RuntimeError:
        return
    played = []
    for rank in range(ranks):
        with Played(rank, ranks), torch.enable_grad():
            s = stream_bands(net, strip, keep=keep, every=every, direction=direction)
            try:
                run, known, _ = s.strips(source_of(x, net))
            except StreamingError as e:
                assert 'fewer ranks' in str(e) or 'canvas.dense()' in str(e)
                return
            graphs = list(run.operands)
            s.know_image(run.program, known, x)
            with torch.no_grad():
                outs = run.forward()
                again = run.forward(True, keep, 'device', every)
            if rank == 0:
                whole = [o.clone() for o in outs]
            for o, y_rank, y_again, w in zip(run.program.outputs, outs, again, whole):
                rows = slice(*shares(y_rank.shape[o.axis], ranks)[rank : rank + 2])
                w.movedim(o.axis, 0)[rows] = y_rank.movedim(o.axis, 0)[rows]
                assert close(y_again.movedim(o.axis, 0)[rows], y_rank.movedim(o.axis, 0)[rows])
            played.append((run, known, graphs))
    # behind the bands: the whole outputs, to the loss, and back
    run, known, _ = played[0]
    program = run.program
    leaves = [w.requires_grad_(o.number in run.needs_grad) for o, w in zip(program.outputs, whole)]
    known.update(
        {
            **dict(zip((o.value for o in program.outputs), leaves)),
            **({program.graph.image: image()} if program.graph.image in known else {}),
        }
    )
    run_calls(program.after, net, known)
    ys = s.tensor(program.graph.output, known)
    assert close(ys, y)
    params, tops = list(net.parameters()), [w for w in leaves if w.requires_grad]
    gs = [
        torch.zeros_like(t) if q is None else q
        for t, q in zip(
            [*tops, *inputs, *params],
            torch.autograd.grad(
                ys, [*tops, *inputs, *params], g, allow_unused=True, retain_graph=True
            ),
        )
    ]
    gouts, images, got = (
        iter(gs[: len(tops)]),
        [q.clone() for q in gs[len(tops) : len(tops) + len(inputs)]],
        gs[len(tops) + len(inputs) :],
    )
    gouts = [next(gouts) if w.requires_grad else None for w in leaves]
    for rank, (run, known, graphs) in enumerate(
        played if gouts else []
    ):  # nothing comes back through a network that only reduces the image
        with Played(rank, ranks):
            grads = run.backward(gouts)
        outs = [graphs[n] for n in grads if graphs[n].requires_grad]
        for i, q in enumerate(
            torch.autograd.grad(
                outs,
                params,
                [grads[n].to(graphs[n].dtype) for n in grads if graphs[n].requires_grad],
                allow_unused=True,
                retain_graph=True,
            )
            if outs
            else []
        ):
            if q is not None:
                got[i] = got[i] + q
        for i, q in enumerate(
            [q for q, t in zip(run.source.gradients, run.source.tensors) if t.requires_grad]
        ):
            images[i] += q
    floor = 1e-13 * (1 + max([t.abs().max().item() for t in want if t is not None]))
    for a, b in zip([*images, *got], want):
        assert close(a, torch.zeros(()) if b is None else b, floor), (
            (a - b).abs().max().item(),
            b.abs().max().item(),
        )


def _cases():
    torch.manual_seed(0)
    double = dict(dtype=torch.double)
    deep = nn.Sequential(
        nn.Conv2d(3, 6, 7, 2, 3),
        frozen_norm(6),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode='reflect'),
        nn.ReLU(),
    ).double()
    unet = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), UNet(4, 'bilinear'), nn.Conv2d(8, 2, 1)
    ).double()
    with mock.patch.object(torchvision.models, 'resnet18', Small):
        model = StreamingClassifier('resnet18', pool='attention', n_out=2).double()
    canvas = Canvas(
        (700, 90),
        (0.1, 0.5, 0.9),
        [
            (0, 3, torch.randn(3, 50, 30, **double).requires_grad_()),
            (330, 20, torch.randn(3, 40, 60, **double)),
        ],
    )
    return [
        (deep, torch.randn(1, 3, 131, 77, **double).requires_grad_(), dict(strip=16)),
        (
            deep,
            torch.randn(2, 3, 77, 181, **double).requires_grad_(),
            dict(strip=16, states='disk', every=2),
        ),
        (unet, torch.randn(1, 3, 96, 50, **double).requires_grad_(), dict(strip=8, keep=3)),
        (deep, canvas, dict(strip=32)),
        (
            nn.Sequential(model.trunk.module, model.head),
            255 * torch.rand(1, 3, 300, 64, **double),
            dict(strip='auto', memory='1GB'),
        ),
    ]


def _rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=ranks
    )
    found = []
    for net, x, how in _cases():
        y = stream_bands(net, **how)(x)
        y.square().sum().backward()
        found.append(
            [
                y.detach(),
                *(p.grad for p in net.parameters()),
                *(
                    t.grad
                    for t in ([p for *_, p in x.patches] if isinstance(x, Canvas) else [x])
                    if t.requires_grad
                ),
            ]
        )
        net.zero_grad()
    try:
        stream_bands(small().double(), 8)(torch.randn(1, 3, 4, 4, dtype=torch.double))
        found.append('no refusal')
    except StreamingError as e:
        found.append(str(e))
    for dropped in (True, False):
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5 if dropped else 0.0),
            nn.Linear(6, 2),
        ).double()
        try:
            (
                stream_bands(net, 8)(torch.ones(1, 3, 40, 30, dtype=torch.double)) * (rank == 0)
            ).sum().backward()
            found.append('no refusal')
        except StreamingError as e:
            found.append(str(e))
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_have_what_one_process_has(ranks, tmp_path):
    in_ranks('test_bands:_rank', ranks, tmp_path)
    found = [torch.load(tmp_path / f'{r}.pt') for r in range(ranks)]
    for i, (net, x, _) in enumerate(_cases()):
        net.zero_grad()
        dense = x.dense() if isinstance(x, Canvas) else x
        y = net(dense)
        y.square().sum().backward()
        want = [
            y.detach(),
            *(p.grad for p in net.parameters()),
            *(
                t.grad
                for t in ([p for *_, p in x.patches] if isinstance(x, Canvas) else [x])
                if t.requires_grad
            ),
        ]
        for r in range(ranks):
            assert len(found[r][i]) == len(want) and all(
                close(a, b, 1e-13) for a, b in zip(found[r][i], want)
            ), (i, r)
        assert all(
            torch.equal(a, b) for r in range(1, ranks) for a, b in zip(found[0][i], found[r][i])
        )
    assert all('use fewer ranks' in f[-3] for f in found), [f[-3] for f in found]
    assert all('random numbers' in f[-2] and 'the same loss' in f[-1] for f in found), [
        f[-2:] for f in found
    ]


def test_a_whole_output_of_one_strip():
    "It belongs to the graph of the strip, and nothing may be written into it."
    torch.manual_seed(0)
    net = small().double()
    x = torch.randn(1, 3, 40, 24, dtype=torch.double)
    want = torch.autograd.grad(net(x).square().sum(), [*net.parameters()])
    with Played(0, 1):
        got = torch.autograd.grad(stream_bands(net, 64)(x).square().sum(), [*net.parameters()])
    assert all(close(a, b) for a, b in zip(got, want))
    with Played(0, 2):
        torch.autograd.grad(
            stream_bands(net, 64)(x).square().sum(), [*net.parameters()]
        )  # half of it


def test_what_cannot_be_shared():
    with pytest.raises(InputError, match='torchrun'):
        stream_bands(small(), 8)

    class Rows:
        shape = 1, 3, 40, 24

        def read(self, top, bottom):
            return torch.zeros(1, 3, bottom - top, 24)

        def write(self, top, bottom, gradient):
            pass

    with Played(0, 2):
        with pytest.raises(StreamingError, match='leave write out'):
            stream_bands(small(), 8)(Rows())

        class Sums(nn.Module):
            def forward(self, x):
                return x.mean((2, 3))

        x = torch.randn(1, 3, 40, 24)
        assert torch.equal(stream_bands(Sums(), 8)(x), x.mean((2, 3)))  # of the image alone
        with pytest.raises(StreamingError, match='random'):
            stream_bands(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout()), 8)(
                torch.randn(1, 3, 40, 24)
            )


@pytest.mark.parametrize('height', [4, 5, 7, 9])
@pytest.mark.parametrize('pads', [(3, 0), (0, 3), (3, 2), (2, 3)])
def test_bands_that_lie_in_reflecting_padding(height, pads):
    "Few rows for each rank, some of which are made of padding alone."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReflectionPad2d((0, 0, *pads)), nn.Conv2d(2, 2, 3, padding=1)
    ).double()
    x = torch.randn(1, 1, height, 4, dtype=torch.double)
    for ranks in (2, 3, 4):
        for strip in (1, 3, 16):
            for rank in range(ranks):
                with Played(rank, ranks), torch.no_grad():
                    s = stream_bands(net, strip, direction='rows')
                    y = s(x)
                first, stop = shares(height + sum(pads), ranks)[rank : rank + 2]
                assert close(y[:, :, first:stop], net(x)[:, :, first:stop])
