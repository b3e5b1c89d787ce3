"""Random networks on random canvases in float64: the canvas gives what its dense image gives, values, every gradient and those of the patches."""
import os
import pytest, torch, torchvision
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth
from streaming_pathology.background import Canvas
from streaming_pathology.geometry import InputError, StreamingError
from streaming_pathology.models import StreamingClassifier
from streaming_pathology.streaming import stream
from test_streaming import Apply, close, frozen_norm, networks, small

examples = int(os.environ.get('STREAMING_EXAMPLES', 100))
pick = st.sampled_from

@st.composite
def canvases(draw, channels):
    "Patches anywhere: at the edge, over each other, touching, a pixel wide, or none."
    H, W = draw(st.integers(1, 160)), draw(st.integers(1, 160))
    g, patches = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), []
    for _ in range(draw(pick([0, 1, 1, 2, 2, 3, 6]))):
        h, w = draw(st.integers(1, max(1, min(H, 40)))), draw(st.integers(1, max(1, min(W, 40))))
        patches.append((draw(st.integers(0, H-h)), draw(st.integers(0, W-w)), torch.randn(channels, h, w, dtype=torch.double, generator=g, requires_grad=draw(pick([True, True, False])))))
    return Canvas((H, W), torch.randn(channels, generator=g).tolist(), patches, torch.double)

def agree(net, canvas, strip, **how):
    "Assert that a canvas is what its dense image is, values and gradients; 'refused' if the plain network or the canvas is refused."
    wanted = [t for t in (*net.parameters(), *(p for *_, p in canvas.patches)) if t.requires_grad]
    try: y = net(canvas.dense())
    except (RuntimeError, ValueError):
        with pytest.raises(StreamingError): stream(net, strip, **how)(canvas)
        return 'refused'
    g = torch.randn_like(y)
    try: want = torch.autograd.grad(y, wanted, g, allow_unused=True) if y.requires_grad else []
    except RuntimeError: return 'refused'       # the plain network cannot do it either
    try: ys = stream(net, strip, **how)(canvas)
    except StreamingError as e:
        assert 'canvas.dense()' in str(e) or how.get('direction') == 'columns', e
        return 'refused'
    assert ys.shape == y.shape and ys.dtype == y.dtype and ys.requires_grad == y.requires_grad and close(ys, y)
    with torch.no_grad(): assert close(stream(net, strip, **how)(canvas), y)
    got = torch.autograd.grad(ys, wanted, g, allow_unused=True) if y.requires_grad else []
    floor = max([1e-14, *(1e-13*w.abs().max().item() for w in want if w is not None)])
    for a, b in zip(got, want): assert close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, floor), ((a-b).abs().max().item(), b.abs().max().item())

@settings(max_examples=examples, deadline=None, derandomize='STREAMING_EXAMPLES' not in os.environ, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.data(), networks(), pick([1, 3, 8, 17, 64, 200]), st.integers(0, 6), pick([1, 1, 2, 3]), pick(['device', 'disk']), pick(['auto', 'rows', 'columns']), st.integers(0, 2**31))
def test_canvas_is_its_dense_image(data, network, strip, keep, every, states, direction, seed):
    torch.manual_seed(seed); channels, net = network
    canvas = data.draw(canvases(channels))
    agree(net, canvas, strip, keep=keep, every=every, states=states, direction=direction)
