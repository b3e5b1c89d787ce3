"""Plans: what is planned is what happens, for random networks and budgets, and whatever the plan the result is the plain network's."""
import gc, os, pickle, weakref
from unittest import mock
import pytest, torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import nn
from torchvision.models import resnet18
from streaming_pathology.background import Canvas
from streaming_pathology.errors import InputError
from streaming_pathology.geometry import Program, StreamingError, _lacks
from streaming_pathology.models import StreamingClassifier
from streaming_pathology.plan import Costs, Ledger, budget, plan
from streaming_pathology.streaming import _source, stream
from test_streaming import close, compare, frozen_norm, networks, small

examples = int(os.environ.get('STREAMING_EXAMPLES', 100))

class Scaled(nn.Module):
    def forward(self, x): return x/255

def taken(net, x):
    "Bytes alive at the peak of a real training step, by the ledger; gradients of an image before are there."
    image = [p for *_, p in x.patches] if isinstance(x, Canvas) else [x]
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    net.strips(x)       # finds the shapes of whole maps, on the meta device, whose tensors are none
    with Ledger() as ledger:
        for t in (*image, *net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())): ledger.note(t)
        y = net(x); torch.autograd.backward([y], [torch.ones_like(y)])
    return ledger.peak

@settings(max_examples=max(10, examples//10), deadline=None, derandomize='STREAMING_EXAMPLES' not in os.environ, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate))      # shrinking takes minutes
@given(networks(), st.integers(1, 150), st.integers(1, 150), st.floats(0, 1), st.integers(0, 2**31))
def test_plans_are_kept(network, height, width, generosity, seed):
    torch.manual_seed(seed); channels, net = network
    x = torch.randn(1, channels, height, width, dtype=torch.double)
    if not any(p.requires_grad for p in net.parameters()): return
    try: most = plan(net, x.shape, 1e12, dtype=torch.double)
    except StreamingError: return       # too small, or the plain network cannot be trained either
    try: plan(net, x.shape, 1, dtype=torch.double); raise AssertionError('one byte is enough')
    except InputError as e: assert 'the least is' in str(e)
    memory = int((.3+.7*generosity)*most.peak_bytes)
    try: p = plan(net, x.shape, memory, dtype=torch.double)
    except InputError: return
    assert p.peak_bytes <= memory and p.time >= .99*most.time
    found = taken(stream(net, **p.options), x)
    assert .85*found-20_000 < p.peak_bytes < 1.15*found+20_000, f'{p.peak_bytes} planned, {found} taken\n{p}'
    compare(net, x.requires_grad_(), **p.options)

def planned_for(s): return [c for _, program in s._traced.values() for c in program.costs.values()]

def test_auto_plans_for_each_kind_of_image():
    torch.manual_seed(0); net = small().double(); s = stream(net, 'auto', memory='2MB'); x = torch.randn(1, 3, 400, 90, dtype=torch.double)
    y = net(x); ys = s(x); assert close(ys, y)
    want = torch.autograd.grad(y.square().sum(), list(net.parameters())); got = torch.autograd.grad(ys.square().sum(), list(net.parameters()))
    assert all(close(a, b) for a, b in zip(got, want))
    s(x); s(x[:, :, :390]); assert len(planned_for(s)) == 1      # nearly the same size
    with torch.no_grad(): s(x)
    s(x[:, :, :200]); assert len(planned_for(s)) == 3
    net[0].requires_grad_(False); s(x); assert len(planned_for(s)) == 4       # less to keep
    s.memory = '3MB'; s(x); assert len(planned_for(s)) == 4
    net[1].eps = 2e-5; s(x); assert len(planned_for(s)) == 2       # another network; that without gradients stays until it is asked
    s.memory = '2MB'; net[1].eps = 1e-5
    again = pickle.loads(pickle.dumps(s)); assert close(again(x), y) and again.memory == '2MB' and 'planned for 2MB' in repr(s)
    s.memory = '10 kB'
    with pytest.raises(InputError, match='the least is'): s(x)

def test_auto_with_rows_from_elsewhere():
    class Rows:
        def __init__(self, x): self.x, self.shape = x, x.shape
        def read(self, top, bottom): return self.x[:, :, top:bottom].clone()
    net, x = small().double(), torch.randn(1, 3, 90, 400, dtype=torch.double)
    assert close(stream(net, 'auto', memory='3MB')(Rows(x)), net(x))

def test_plans_under_autocast_and_of_uint8():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), frozen_norm(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)); shape = (1, 3, 512, 256)
    wide, low = (plan(net, shape, 1e9, strip=64, autocast=a).peak_bytes for a in (None, torch.bfloat16))
    assert .45*wide < low < .75*wide
    p = plan(nn.Sequential(Scaled(), *net), shape, 1e9, strip=64, dtype=torch.uint8)
    assert p.parts['image'] == 3*512*256 and sum(p.parts.values()) == p.peak_bytes

@pytest.mark.skipif(not _lacks(torch.bfloat16), reason='this CPU convolves in bf16, and the ledger does not see what its library takes')
@pytest.mark.parametrize('keep', [1, 6])
def test_plan_knows_how_bf16_is_computed_here(keep):
    torch.manual_seed(0); net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), frozen_norm(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).float(); x = torch.randn(1, 3, 256, 128)
    at = plan(net, x.shape, 1e12, strip=32, autocast=torch.bfloat16).at(32)
    with torch.autocast('cpu', torch.bfloat16): found = taken(stream(net, 32, keep), x)
    assert .85*found < at.peak(keep) < 1.15*found, (at.peak(keep), found)

@pytest.mark.parametrize('budget', ['least', 60e6, 80e6, 150e6, 1e9])
def test_plans_of_canvases(budget):
    "A canvas may keep more strips than its dense image; what is planned is what happens."
    torch.manual_seed(0); net = nn.Sequential(*list(resnet18().eval().children())[:6]); canvas = Canvas((1500, 640), (1., 1., 1.), [(100+60*i, 40+24*i, torch.rand(3, 80, 60)) for i in range(20)])
    p = plan(net, canvas, budget); found = taken(s := stream(net, **p.options), canvas)
    assert .85*found < p.peak_bytes < 1.15*found and p.parts['image'] == 20*3*80*60*4, f'{p.peak_bytes} planned, {found} taken\n{p}'
    try: dense = plan(net, canvas.shape, budget)
    except InputError: dense = None
    if dense: assert p.time < .75*dense.time and p.flops < .75*dense.flops
    want, got = (torch.autograd.grad(f(x).square().mean(), list(net.parameters())) for f, x in ((net, canvas.dense()), (stream(net, 'auto', memory=budget), canvas)))
    assert all((a-b).norm() < 1e-3*b.norm() for a, b in zip(got, want))     # float32, as the streamed dense image

def test_patches_may_be_views_of_a_large_image():
    "Which is in memory once, not again with each graph."
    torch.manual_seed(0); net = nn.Sequential(*list(resnet18().eval().children())[:5]); image = torch.full((1, 3, 1024, 1024), .5); image[:, :, 200:700, 300:420] = torch.rand(500, 120)
    canvas = Canvas.from_image(image); source = _source(canvas, net); costs = Costs(net, canvas.shape, 'rows', torch.float32, None, True, False); views = costs.painted(source)(64)
    canvas.patches = [(t, l, p.clone()) for t, l, p in canvas.patches]; copies = costs.painted(_source(canvas, net))(64)
    assert views.graphs == copies.graphs and views.held-copies.held == image.nbytes-sum(p.nbytes for *_, p in canvas.patches)

def test_what_is_free_is_beside_what_is_there():
    net = small(); x = torch.rand(1, 3, 3000, 1000)
    with mock.patch('streaming_pathology.plan._free', lambda: 30_000_000):
        with pytest.raises(InputError, match='too little'): plan(net, x.shape)
        assert 30e6 < plan(net, x).budget < 27e6+x.nbytes+1e5 and stream(net, 'auto')(x).shape[2] == 750

def test_a_planned_network_is_traced_once():
    net = small(); s = stream(net, 'auto', memory='1GB'); s(torch.rand(1, 3, 64, 40))
    with mock.patch('streaming_pathology.streaming.Program', side_effect=Program) as made: [s(torch.rand(1, 3, 64, w)).sum().backward() for w in (40, 40, 33)]
    assert not made.called

def test_states_grow_with_the_square_root():
    net = small()
    def extra(n, every): x = torch.rand(1, 3, 16*n, 64); return taken(stream(net, 16, every=every), x)-taken(stream(net, 16, states='disk'), x)
    state = extra(256, 1)/256
    assert extra(64, 1) > 60*state and extra(64, 8) < 2*8*state and extra(256, 16) < 2*16*state

def test_rows_and_patches_are_not_the_whole_image():
    class Rows:
        shape = 1, 3, 4096, 256
        def read(self, top, bottom): return torch.zeros(1, 3, bottom-top, 256, dtype=torch.uint8)
    net = nn.Sequential(Scaled(), *small()); p = plan(net, Rows(), '20MB')
    assert p.parts['image'] == 2*p.strip*3*256 and p.direction == 'rows' and plan(net, Rows.shape, '20MB', dtype=torch.uint8).parts['image'] == 3*4096*256
    s = stream(net, 'auto', memory='20MB'); s(Rows()); s(Rows()); (costs,) = planned_for(s); assert len(costs.made) == 1
    s(torch.zeros(Rows.shape, dtype=torch.uint8)); assert sum(len(c.made) for c in planned_for(s)) == 2      # in memory

def test_plans_for_gradients_of_the_image():
    "Saliency: the network is frozen, the image is not."
    torch.manual_seed(0); net = nn.Sequential(*list(resnet18().eval().children())[:6]).requires_grad_(False); s = stream(net, 'auto', memory='60MB')
    for shape in ((1, 3, 900, 400), (1, 3, 400, 900)):
        x = torch.rand(shape, requires_grad=True); p = plan(net, x, '60MB'); assert p.peak_bytes <= 60e6 and p.parts['image'] == 2*x.nbytes
        found = taken(stream(net, **p.options), x); assert .85*found < p.peak_bytes < 1.15*found, f'{p.peak_bytes} planned, {found} taken\n{p}'
        x.grad = None; s(x).sum().backward(); want = x.grad; x.grad = None; net(x).sum().backward(); assert (want-x.grad).norm() < 3e-3*want.norm()     # float32: maxima that tie

def test_images_are_not_held_by_their_plans():
    net = small(); s = stream(net, 'auto', memory='1GB'); x = torch.rand(1, 3, 200, 90); r = weakref.ref(x); s(x); del x
    canvas = Canvas((200, 90), (0, 0, 0), [(5, 6, torch.rand(3, 40, 30))]); c = weakref.ref(canvas.patches[0][2]); s(canvas); s(Canvas((200, 90), (0, 0, 0))); del canvas
    gc.collect(); assert r() is None and c() is None

@pytest.mark.parametrize('how', ['bf16 weights', 'autocast', 'no_grad', 'masks'])
def test_canvases_of_all_kinds_are_planned(how):
    torch.manual_seed(0); net = nn.Sequential(*small(), *[nn.Dropout2d().train()]*(how == 'masks')); dtype = torch.float32
    if how == 'bf16 weights': net, dtype = net.bfloat16(), torch.bfloat16
    canvas = Canvas((400, 300), (0, 1, 0), [(30, 40, torch.rand(3, 90, 50).to(dtype))])
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'), torch.set_grad_enabled(how != 'no_grad'):
        y = stream(net, 'auto', memory='20MB')(canvas)
        if how != 'masks': assert torch.allclose(y.float(), stream(net, 64)(canvas.dense()).float(), atol=.05)
        p = plan(net, canvas, '20MB', autocast=torch.bfloat16 if how == 'autocast' else None)      # whether or not gradients are on now
    if how == 'no_grad': assert p.peak_bytes == plan(net, canvas, '20MB').peak_bytes

def test_classifier_plans_itself():
    torch.manual_seed(0); model = StreamingClassifier('resnet18', strip='auto', memory='250MB', pool='attention'); x = torch.randint(0, 256, (1, 3, 256, 200), dtype=torch.uint8)
    plain = nn.Sequential(model.trunk.module, model.head)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    a = model.attention(x); assert a.shape == (1, 1, 8, 7) and abs(a.sum().item()-1) < 1e-5

def test_nothing_is_left_to_guess():
    for bad in ('8', 'GB', '', None, True, -1, 0, float('inf'), float('nan'), [1]):
        with pytest.raises(InputError, match='amount of memory'): budget(bad)
    assert budget('0.5 MiB') == 2**19 and budget(7.9) == 7 and budget('auto') > 1e6
    with pytest.raises(StreamingError): plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), (1, 3, 64, 64))
    with pytest.raises(StreamingError, match='too small'): plan(nn.Conv2d(3, 4, 5), (1, 3, 4, 64), '1GB')
    with pytest.raises(StreamingError, match="'auto'"): stream(small(), 'all')
    with pytest.raises(StreamingError, match="use one of 'device', 'host', 'disk'."): stream(small(), 8, states='nowhere')

ends = {'pooled': [nn.AdaptiveAvgPool2d(1)], 'upsampled': [nn.Upsample(scale_factor=2, mode='bilinear'), nn.AdaptiveAvgPool2d(1)], 'upsampled twice': [nn.Upsample(scale_factor=2, mode='bilinear'), nn.ReLU(), nn.Upsample(scale_factor=2, mode='bilinear')],
        'averaged': [nn.AvgPool2d(2)], 'mixed': [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1)]}

@pytest.mark.parametrize('strip', [64, 700])
@pytest.mark.parametrize('end', ends)
def test_plans_of_canvases_of_any_network(end, strip):
    "Also of those whose dense strips have hardly a graph, or that join whole rows at their end."
    torch.manual_seed(0); net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *ends[end]); canvas = Canvas((700, 600), (.1, .2, .3), [(100, 70, torch.rand(3, 250, 100)), (300, 200, torch.rand(3, 115, 64))])
    p = plan(net, canvas, 1e9, strip); found = taken(stream(net, **p.options), canvas)
    assert .85*found < p.peak_bytes < 1.15*found, f'{p.peak_bytes} planned, {found} taken\n{p}'

def test_plans_follow_the_type_of_the_parameters():
    class Scale(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('scale', torch.full((1, 1, 1), 1/255))
        def forward(self, x): return x*self.scale
    net = nn.Sequential(Scale(), *small()); s = stream(net, 'auto', memory='8MB'); x = torch.randint(0, 256, (1, 3, 300, 200), dtype=torch.uint8); s(x)
    with mock.patch('streaming_pathology.plan.Costs', side_effect=Costs) as made: s(x); assert not made.called; net.double(); s(x); assert made.called

@pytest.mark.parametrize('wrong', [dict(strip='8'), dict(strip=0), dict(autocast='bf16'), dict(shape='1,3,4,4'), dict(shape=(1, 3, 50., 50)), dict(module='x')], ids=str)
def test_what_cannot_be_planned_is_said(wrong):
    with pytest.raises(InputError): plan(**{'module': small(), 'shape': (1, 3, 90, 60), 'memory': '1GB', **wrong})
    assert plan(small().double(), (1, 3, 90, 60), '1GB').peak_bytes > plan(small(), (1, 3, 90, 60), '1GB').peak_bytes
