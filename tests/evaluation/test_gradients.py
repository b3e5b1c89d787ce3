"SmoothGrad and integrated gradients: of plain and streamed networks, of all that is an image."

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streaming_pathology.core import InputError
from streaming_pathology.engine.canvas import Canvas
from streaming_pathology.engine.stream import stream
from streaming_pathology.evaluation.gradients import (
    AVERAGES,
    ChangedRows,
    Noise,
    integrated_gradients,
    output_of,
    reads_rows,
    smoothgrad,
)
from streaming_pathology.training.models import StreamingClassifier

pytestmark = pytest.mark.usefixtures('small_resnet')


def small_net(seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2),
        activation(),
        nn.Conv2d(8, 8, 3, 1, 1),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 2),
    )


def pooled_net(seed, width=4):
    "With normalisation and a maximum, in float64."
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 2),
    )
    return net.double().eval()


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 20, 30), generator=generator, dtype=torch.uint8)


@pytest.fixture
def x(image):
    return image.double()[None]


@pytest.fixture
def net():
    return small_net().double().eval()


class OnDisk:
    "An image that is read by rows; like a file, by one thread at a time."

    def __init__(self, x, pause=0.0):
        self.x, self.pause, self.busy = x, pause, False
        self.shape = x.shape

    def read(self, top, bottom):
        assert not self.busy
        self.busy = True
        time.sleep(self.pause)
        self.busy = False
        return self.x[:, :, top:bottom]


def assert_close(a, b, share):
    "Equal but for a share of the largest value."
    assert np.abs(a - b).max() <= share * np.abs(b).max()


# ---- noise


def test_noise_of_another_seed_or_copy_differs():
    def noise(seed, copy):
        return Noise(9, 1.0, seed, copy).add(torch.zeros(1, 3, 300, 9), 0)

    assert torch.equal(noise(5, 0), noise(5, 0))
    assert not torch.equal(noise(5, 0), noise(5, 1))
    assert not torch.equal(noise(5, 0), noise(6, 0))


@pytest.fixture
def eager_threads():
    "Threads take turns as often as they can."
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_noise_may_be_asked_for_by_several_threads(eager_threads):
    noise = Noise(9, 1.0, 5, 0)
    everything = noise.add(torch.zeros(1, 3, 2000, 9), 0)
    shared = Noise(9, 1.0, 5, 0)

    def rows(top):
        return top, shared.add(torch.zeros(1, 3, 90, 9), top)

    tops = np.random.default_rng(0).integers(0, 1900, 2000).tolist()
    with ThreadPoolExecutor(8) as threads:
        for top, found in threads.map(rows, tops):
            assert torch.equal(found, everything[:, :, top : top + 90])


# ---- SmoothGrad


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    h=st.integers(9, 40),
    w=st.integers(9, 40),
    n=st.integers(1, 4),
    average=st.sampled_from(AVERAGES),
)
def test_equals_a_loop(seed, h, w, n, average):
    model = pooled_net(seed)
    x = torch.rand(1, 3, h, w, dtype=torch.float64) * 255
    std = 0.05 * x.std(correction=0).item()
    gradients = []
    for copy in range(n):
        noisy = Noise(w, std, seed, copy, x.dtype).add(x.clone(), 0).requires_grad_()
        (gradient,) = torch.autograd.grad(model(noisy)[0, 0], noisy)
        gradients.append(gradient[0].numpy())
    expected = {
        'absolute': np.abs(gradients).mean(0).sum(0),
        'squared': np.square(gradients).mean(0).sum(0),
        'signed': np.abs(np.mean(gradients, 0)).sum(0),
    }
    heat = smoothgrad(model, x[0], n=n, seed=seed, average=average)
    assert heat.dtype == np.float32
    assert np.allclose(heat, expected[average], rtol=1e-5, atol=1e-12)


def test_leaves_modes_and_frozen_parameters_as_they_were(x):
    net = small_net().double().train()
    net[0].weight.requires_grad_(False)
    smoothgrad(net, x, n=1)
    assert all(module.training for module in net.modules())
    assert [parameter.requires_grad for parameter in net.parameters()] == [False] + [True] * 5
    assert all(parameter.grad is None for parameter in net.parameters())


def test_works_where_gradients_are_switched_off_around_it(image):
    net = small_net()
    expected = smoothgrad(net, image, n=2)
    with torch.inference_mode(False), torch.no_grad():
        assert np.array_equal(smoothgrad(net, image, n=2), expected)


@pytest.mark.parametrize(
    'changed, message',
    [
        (dict(image=torch.zeros(20, 30)), 'shape (20, 30)'),
        (dict(image=torch.zeros(2, 3, 4, 4)), 'one image (3, H, W)'),
        (dict(image='x'), 'str is no image'),
        (dict(n=0), 'n is 0'),
        (dict(noise=-1), 'negative'),
        (dict(noise=np.nan), 'noise=nan'),
        (dict(average='mean'), 'choose'),
        (dict(target=2), 'target=2'),
        (dict(target=-3), 'target=-3'),
    ],
)
def test_refuses_what_is_out_of_range(image, changed, message):
    with pytest.raises(InputError) as refused:
        smoothgrad(small_net(), **dict(image=image) | changed)
    assert message in str(refused.value)


def test_refuses_an_output_that_does_not_depend_on_the_image(image):
    class Blind(nn.Module):
        def forward(self, x):
            return torch.ones(1, 1)

    with pytest.raises(InputError, match='does not depend'):
        smoothgrad(Blind(), image)


def test_half_precision_is_near_float(image):
    half = smoothgrad(small_net().to(torch.bfloat16), image, n=1)
    single = smoothgrad(small_net(), image, n=1)
    assert_close(half, single, 0.2)


def test_takes_arrays_and_images_in_half_precision(image):
    net = small_net()
    assert smoothgrad(net, image.numpy().astype(float), n=1).dtype == np.float32
    halved = smoothgrad(net, image.half(), n=2, average='squared')
    assert np.allclose(halved, smoothgrad(net, image, n=2, average='squared'), rtol=0, atol=1e-9)


@pytest.mark.parametrize('average', AVERAGES)
def test_cells_have_the_mean_of_their_pixels(net, x, average):
    pixels = smoothgrad(net, x, n=2, average=average)
    cells = smoothgrad(stream(net, strip=7), x, n=2, average=average, cell=8)
    assert cells.shape == (3, 4)
    for row in range(3):
        for column in range(4):  # those at the lower and right edge are smaller
            inside = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert abs(cells[row, column] - inside.mean()) < 1e-9


# ---- streamed


@pytest.mark.parametrize('strip', [1, 16, 1000])
def test_streamed_equals_the_plain_network(strip):
    model = pooled_net(0)
    x = torch.rand(3, 61, 47, dtype=torch.float64) * 255
    streamed = stream(model, strip=strip)
    assert_close(smoothgrad(streamed, x, n=3), smoothgrad(model, x, n=3), 1e-7)
    assert_close(
        integrated_gradients(streamed, x, steps=3, signed=True),
        integrated_gradients(model, x, steps=3, signed=True),
        1e-7,
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_streamed_by_columns_equals_the_plain_network(net, x):
    wide = x.transpose(2, 3).contiguous()
    streamed = smoothgrad(stream(net, strip=7, direction='columns'), wide, n=2)
    assert np.allclose(streamed, smoothgrad(net, wide, n=2), rtol=0, atol=1e-9)


@pytest.mark.parametrize('average', AVERAGES)
def test_only_the_first_layers_are_streamed(net, x, average):
    partly = nn.Sequential(stream(net[:5], strip=7), *net[5:])
    streamed = smoothgrad(partly, x, n=2, average=average)
    assert np.allclose(streamed, smoothgrad(net, x, n=2, average=average), rtol=0, atol=1e-9)


def test_streaming_classifier_equals_its_layers():
    resnet = StreamingClassifier('resnet18', strip=32).double()
    y = torch.rand(1, 3, 96, 130, dtype=torch.double) * 255
    layers = nn.Sequential(resnet.trunk.module, resnet.head)
    assert_close(smoothgrad(resnet, y, n=2), smoothgrad(layers, y, n=2), 1e-6)
    assert all(p.requires_grad for p in resnet.trunk.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in resnet.parameters())


@pytest.mark.parametrize(
    'direction, shape, by_rows',
    [
        ('auto', (20, 30), False),
        ('auto', (30, 20), True),
        ('auto', (20, 20), True),
        ('rows', (20, 30), True),
        ('columns', (30, 20), False),
    ],
)
def test_images_in_memory_are_read_by_rows_unless_columns_are_better(
    net, direction, shape, by_rows
):
    image = torch.zeros(1, 3, *shape)
    streamed = stream(net, strip=7, direction=direction)
    assert reads_rows(streamed, image) == by_rows
    assert reads_rows(streamed, OnDisk(image))
    assert not reads_rows(net, OnDisk(image))


# ---- integrated gradients


def test_integrated_gradients_streamed_equal_the_plain_network(x):
    net = small_net(activation=nn.Tanh).double().eval()
    streamed = integrated_gradients(stream(net, strip=7), x, steps=3)
    assert np.allclose(streamed, integrated_gradients(net, x, steps=3), rtol=0, atol=1e-9)


def test_integrated_gradients_add_up_to_the_difference_of_the_logits(x):
    net = small_net(activation=nn.Tanh).double().eval()
    for glass in (255.0, (9, 99, 199)):
        start = torch.empty_like(x)
        start[:] = torch.tensor(glass).view(1, -1, 1, 1)
        difference = output_of(net, ChangedRows(x), 1) - output_of(net, ChangedRows(start), 1)
        signed = integrated_gradients(net, x, glass, steps=256, target=1, signed=True)
        assert signed.shape == (20, 30)
        assert abs(signed.sum(dtype=float) - difference) < 1e-2 * abs(difference)


def test_integrated_gradients_refuse_what_is_out_of_range(net, x):
    with pytest.raises(InputError, match='red, green and blue'):
        integrated_gradients(net, x, glass=(1, 2))
    with pytest.raises(InputError, match='steps is 0'):
        integrated_gradients(net, x, steps=0)


def test_one_thread_reads_the_image_at_a_time(net, x):
    streamed = stream(net, strip=4, direction='rows')
    assert np.array_equal(
        integrated_gradients(streamed, OnDisk(x, pause=0.002), steps=3),
        integrated_gradients(streamed, OnDisk(x), steps=3),
    )


# ---- a canvas


def painted_canvas(seed=0):
    "Two patches on glass, of which the second lies partly on the first."
    generator = torch.Generator().manual_seed(seed)
    patches = [
        (top, left, torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator))
        for top, left, size in ((3, 5, (30, 21)), (20, 19, (17, 33)))
    ]
    return Canvas((50, 61), (240, 230, 235), patches)


def tissue_of(canvas):
    "Where patches lie, bool (H, W)."
    covered = torch.zeros(canvas.shape[2:], dtype=torch.bool)
    for top, left, pixels in canvas.patches:
        height, width = pixels.shape[1:]
        covered[top : top + height, left : left + width] = True
    return covered.numpy()


@pytest.mark.parametrize('average', AVERAGES)
@pytest.mark.parametrize('strip', [None, 8])
def test_a_canvas_is_explained_as_its_dense_image(average, strip):
    net, canvas = pooled_net(0), painted_canvas()
    model = net if strip is None else stream(net, strip=strip)
    of_dense = smoothgrad(net, canvas.dense(), n=1, noise=0, average=average)
    of_canvas = smoothgrad(model, canvas, n=1, noise=0, average=average)
    covered = tissue_of(canvas)
    np.testing.assert_allclose(of_canvas[covered], of_dense[covered], atol=1e-6 * of_dense.max())
    assert not of_canvas[~covered].any() and of_dense[~covered].any()
    assert canvas.dtype == torch.uint8  # as it was given


@pytest.mark.parametrize('cell', [1, 4, 7])
def test_cells_of_a_canvas_are_those_of_its_pixels(cell):
    model, canvas = stream(pooled_net(1), strip=16), painted_canvas(1)
    pixels = smoothgrad(model, canvas, n=2, seed=3)
    cells = smoothgrad(model, canvas, n=2, seed=3, cell=cell)
    padded = np.pad(pixels, [(0, -side % cell) for side in pixels.shape], constant_values=np.nan)
    height, width = cells.shape
    wanted = np.nanmean(padded.reshape(height, cell, width, cell), axis=(1, 3))
    np.testing.assert_allclose(cells, wanted, rtol=1e-5, atol=1e-9)


def test_tissue_on_a_canvas_has_the_noise_of_its_place():
    canvas = painted_canvas()
    seen = []

    class Seeing(nn.Module):
        def forward(self, x):
            seen.append(x.detach())
            return x.mean((2, 3))

    smoothgrad(Seeing(), canvas, n=1, seed=5)
    smoothgrad(Seeing(), canvas.dense(), n=1, seed=5)
    covered = torch.from_numpy(tissue_of(canvas))
    on_canvas, on_dense = seen
    assert torch.equal(on_canvas[..., ~covered], canvas.dense().float()[..., ~covered])
    torch.testing.assert_close(on_canvas[..., covered], on_dense[..., covered])
    assert not torch.equal(on_canvas, canvas.dense().float())


def test_a_classifier_explains_a_canvas():
    torch.manual_seed(0)
    model = StreamingClassifier('resnet18', strip=32)
    canvas = Canvas((96, 96), (255,) * 3, [(32, 16, painted_canvas().patches[0][2])])
    heatmap = smoothgrad(model, canvas, n=2, cell=16)
    assert heatmap.shape == (6, 6) and heatmap[2:4, 1:3].all()
    assert not heatmap[:2].any() and not heatmap[:, 4:].any()


def test_a_canvas_without_tissue_is_refused():
    with pytest.raises(InputError, match='no tissue to explain'):
        smoothgrad(pooled_net(0), Canvas((40, 40), (255,) * 3))
