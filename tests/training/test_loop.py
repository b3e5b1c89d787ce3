"The training loop: accumulation, what is refused, and resuming from any checkpoint, bit by bit"

import copy
import math

import pytest
import torch
from torch import nn
from trainings import (
    DropoutNet,
    KeptStates,
    NanNet,
    complaint,
    in_slide_loaders,
    resumed_from_each,
    shuffled_by_torch,
    timed_slides,
    with_survival,
    without_times,
)

from streaming_pathology.core import Halted, InputError
from streaming_pathology.training.callbacks import EMA, DryRun, EarlyStopping
from streaming_pathology.training.loop import (
    Alone,
    Callback,
    TinyNet,
    fit,
    has_state,
    make_optimizer,
    predict,
    predicted_rows,
    slide_seed,
    synth_learner,
    synth_slides,
)
from streaming_pathology.training.tasks import Binary, Multiclass, Ordinal, Regression, Survival

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


@pytest.fixture
def slides():
    return synth_slides()


@pytest.fixture
def tuning():
    return synth_slides(12, 1)


def three_classes(slides):
    return [item | dict(label=torch.tensor(float(i % 3))) for i, item in enumerate(slides)]


@pytest.mark.parametrize(
    'first, last, positions', [(0, 9, [1, 4, 7]), (2, 9, [4, 7]), (5, 6, []), (8, 8, [])]
)
def test_positions_of_a_rank(first, last, positions):
    class SecondOfThree(Alone):
        rank, size = 1, 3

    assert [*SecondOfThree().positions(first, last)] == positions


def test_rows_that_are_there_are_not_computed_again(tuning):
    torch.manual_seed(0)
    model = TinyNet()
    rows = predict(model, tuning, progress=False)
    again = rows[:5]
    for new_rows in predicted_rows(model, tuning, progress=False, n_done=5):
        again += new_rows
    assert [row['logits'] for row in again] == [row['logits'] for row in rows]


def test_a_caller_who_stops_early_has_the_model_as_before(tuning):
    model = TinyNet().train()
    for _ in predicted_rows(model, tuning, progress=False):
        assert not model.training
        break
    assert model.training


def test_a_slide_without_label_is_predicted(slides):
    unlabelled = slides[0] | dict(label=torch.tensor(math.nan))
    assert predict(TinyNet(), [unlabelled], progress=False)[0]['label'] is None


def test_joint_loss_equals_the_large_batch():
    slides = timed_slides()
    torch.manual_seed(0)
    accumulated = DropoutNet().double()
    batched = copy.deepcopy(accumulated)
    fit(accumulated, slides, epochs=1, lr=0.1, batch=4, task=Survival(), progress=False)
    sgd = torch.optim.SGD(batched.parameters(), 0.1, 0.9)
    for first in (0, 4):
        part = slides[first : first + 4]
        risks = []
        for position, item in enumerate(part, first):
            torch.manual_seed(slide_seed(0, 0, position))
            risks.append(batched(item['image'][None]))
        sgd.zero_grad()
        Survival().loss(torch.cat(risks), torch.stack([i['label'] for i in part])).backward()
        sgd.step()
    for a, b in zip(accumulated.parameters(), batched.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-14
        assert a.grad is None


@pytest.mark.parametrize('batch', [2, 3])
def test_a_mini_batch_without_an_event_is_no_step(batch):
    "Nor is one of a single slide, the last of seven: neither momentum nor weight decay moves weights."
    slides = timed_slides()
    for position, item in enumerate(slides):
        item['label'][1] = float(position < batch or position == 6)
    torch.manual_seed(0)
    whole = TinyNet()
    first = copy.deepcopy(whole)
    options = dict(epochs=1, lr=0.1, batch=batch, task=Survival(), progress=False)
    fit(first, slides[:batch], **options)
    with pytest.warns(UserWarning, match='no two slides to compare'):
        fit(whole, slides, **options)
    for a, b in zip(whole.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)


class InfiniteGradient(torch.autograd.Function):
    "A finite loss with an infinite gradient."

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


class HugeGradient(InfiniteGradient):
    "A finite gradient, of which two have a sum that is not."

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, 3e38)


def test_an_infinite_gradient_is_refused():
    class Net(TinyNet):
        def forward(self, x):
            return InfiniteGradient.apply(super().forward(x))

    said = complaint(fit, Net(), synth_slides(2), epochs=1, progress=False)
    assert "slide 's000': its gradient is not finite" in said


def test_an_infinite_sum_of_gradients_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, 1))

        def forward(self, x):
            return HugeGradient.apply(self.bias)

    class OneMoreRank(Alone):
        "As if another rank had the same gradient."

        def add(self, params):
            params[0].grad *= 2

    said = complaint(
        fit, Net(), synth_slides(2), epochs=1, batch=1, ranks=OneMoreRank(), progress=False
    )
    assert 'sum of the gradients of slides s000 is not finite' in said


def test_a_loss_that_is_nan_leaves_the_weights():
    model, slides = NanNet(), synth_slides(4)
    slides[3] |= dict(image=torch.zeros(3, 99, 30, dtype=torch.uint8), slide_id='B7')
    before = copy.deepcopy(model.state_dict())
    assert "'B7'" in complaint(fit, model, slides, epochs=1, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_refused(slides):
    frozen = TinyNet().requires_grad_(False)
    one = slides[:1]
    assert 'frozen' in complaint(fit, frozen, slides, epochs=1, progress=False)
    assert 'no slide' in complaint(fit, TinyNet(), [], epochs=1, progress=False)
    said = complaint(fit, TinyNet(), one, epochs=1, optimizer='adm', progress=False)
    assert "'adamw'" in said
    assert 'clip is 0' in complaint(fit, TinyNet(), one, epochs=1, clip=0, progress=False)
    assert '3 outputs' in complaint(fit, TinyNet(n_out=3), slides, epochs=1, progress=False)
    unlabelled = [slides[0] | dict(label=torch.tensor(math.nan))]
    assert 'has no label' in complaint(fit, TinyNet(), unlabelled, epochs=1, progress=False)


def test_what_is_frozen_stays(slides):
    model = TinyNet()
    model.conv.requires_grad_(False)
    before = model.conv.weight.clone()
    fit(model, slides[:4], epochs=1, lr=0.1, progress=False)
    assert torch.equal(model.conv.weight, before)


def test_adamw():
    params = list(TinyNet().parameters())
    assert isinstance(make_optimizer('adamw', params, 0.1, 0.9), torch.optim.AdamW)


def test_three_classes(slides, tuning):
    model, task = TinyNet(n_out=3), Multiclass(3)
    train = three_classes(slides[:6])
    history = fit(model, train, tuning[:4], epochs=1, task=task, progress=False)
    assert math.isnan(history[-1]['tuning_auc'])
    assert math.isfinite(history[-1]['tuning_loss'])
    rows = predict(model, tuning[:1], progress=False, task=task)
    assert len(rows[0]['probability']) == 3


@pytest.mark.parametrize('task', [Ordinal(3), Regression(1.0, 2.0)], ids=lambda task: task.name)
def test_other_tasks(task, slides):
    model, train = TinyNet(n_out=task.n_out), three_classes(slides[:6])
    history = fit(model, train, slides[:2], epochs=1, task=task, progress=False)
    assert math.isfinite(history[-1]['tuning_loss'])


def test_a_clipped_gradient_has_the_norm_of_clip(slides):
    model = TinyNet().double()
    before = [param.detach().clone() for param in model.parameters()]
    fit(model, slides[:1], epochs=1, lr=1.0, momentum=0.0, clip=1e-3, progress=False)
    squares = sum((a - b).square().sum() for a, b in zip(model.parameters(), before, strict=True))
    assert math.sqrt(squares.item()) == pytest.approx(1e-3, abs=1e-8)


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_mixed_precision(amp):
    history = fit(*synth_learner(8), epochs=2, amp=amp, progress=False)
    assert math.isfinite(history[-1]['train_loss'])


def test_the_same_seed_trains_the_same():
    histories = []
    for _ in range(2):
        model, train, _tuning = synth_learner(8)
        histories.append(without_times(fit(model, train, epochs=2, progress=False)))
    assert histories[0] == histories[1]


# callbacks


class EveryHook(Callback):
    "Notes the hooks that are called."

    def __init__(self):
        self.called = []

    def before_fit(self, state):
        self.called.append('before_fit')

    def after_load(self, state):
        self.called.append('after_load')

    def after_resume(self, state):
        self.called.append('after_resume')

    def before_epoch(self, state):
        self.called.append('before_epoch')

    def at_rest(self, state):
        self.called.append('at_rest')

    def after_step(self, state):
        self.called.append('after_step')

    def after_epoch(self, state):
        self.called.append('after_epoch')

    def after_fit(self, state):
        self.called.append('after_fit')


def test_order_of_hooks(slides, tuning):
    hooks = EveryHook()
    fit(TinyNet(), slides[:3], tuning[:1], epochs=1, batch=2, callbacks=[hooks], progress=False)
    first_batch = ['at_rest', 'after_step', 'at_rest']
    second_batch = ['after_step', 'at_rest']
    validation = ['at_rest', 'after_epoch', 'at_rest']
    assert hooks.called == [
        'before_fit',
        'before_epoch',
        *first_batch,
        *second_batch,
        *validation,
        'after_fit',
    ]


def test_hooks_of_a_training_that_resumes(slides):
    kept, hooks = KeptStates(), EveryHook()
    options = dict(epochs=1, batch=2, progress=False)
    fit(TinyNet(), slides[:3], callbacks=[kept], **options)
    fit(TinyNet(), slides[:3], callbacks=[hooks], resume=kept.all[1], **options)
    assert hooks.called[:3] == ['before_fit', 'after_load', 'after_resume']
    assert 'before_epoch' not in hooks.called


def test_any_object_with_a_hook_is_a_callback(slides):
    class Steps:
        count = 0

        def after_step(self, state):
            self.count += 1

    steps = Steps()
    fit(TinyNet(), slides[:3], epochs=1, batch=2, callbacks=[steps], progress=False)
    assert steps.count == 2


def test_only_what_has_a_state_is_in_checkpoints(slides, tuning):
    assert has_state(EarlyStopping()) and not has_state(EveryHook()) and not has_state(object())
    kept = KeptStates()
    callbacks = [EveryHook(), EarlyStopping(), kept]
    fit(TinyNet(), slides[:2], tuning[:2], epochs=1, callbacks=callbacks, progress=False)
    point = kept.all[-1]
    assert [name for name, _ in point['callbacks']] == ['EarlyStopping']
    assert point['fit']['callbacks'] == ['EarlyStopping']


def test_the_keys_of_a_checkpoint(slides):
    "Checkpoints of earlier versions are still read, so their keys cannot change."
    kept = KeptStates()
    fit(TinyNet(), slides[:2], epochs=1, callbacks=[kept], progress=False)
    keys = (
        'model optimizer scaler gradients epoch first step losses rows history seconds stop stage '
        'draws rng fit callbacks'
    )
    settings = (
        'trained epochs lr momentum batch seed device amp optimizer task clip callbacks'.split()
    )
    assert list(kept.all[0]) == keys.split()
    assert list(kept.all[0]['fit']) == ['training slides', 'tuning slides', *settings]


def test_halted(slides):
    class Asks(Callback):
        def at_rest(self, state):
            state.halt_requested = state.step == 3

    with pytest.raises(Halted, match='stopped in epoch 1, 4 of 6 slides done'):
        fit(*synth_learner(6), epochs=2, callbacks=[Asks()], progress=False)


# resuming


def small(n):
    return lambda: synth_learner(n)


AT_REST = {  # between slides (or mini-batches), tuning slides, and after the epoch
    'shuffled': 3 * (7 + 4 + 1),
    'loaders': 2 * (8 + 4 + 1),
    'joint': 2 * (2 + 4 + 1),
    'adamw': 2 * (6 + 3 + 1),
    'fp16': 2 * (4 + 2 + 1),
}
TRAININGS = {
    'shuffled': (shuffled_by_torch, dict(epochs=3, lr=0.1, batch=3)),
    'loaders': (in_slide_loaders, dict(epochs=2, lr=0.1, batch=3)),
    'joint': (with_survival, dict(epochs=2, lr=0.1, batch=4, task=Survival())),
    'adamw': (small(6), dict(epochs=2, optimizer='adamw', batch=4, clip=1.0)),
    'fp16': (small(4), dict(epochs=2, batch=2, amp='fp16', lr=0.1)),
}


@pytest.mark.parametrize('name', TRAININGS)
def test_resumed_from_any_checkpoint(name):
    make, options = TRAININGS[name]
    assert resumed_from_each(make, **options) == AT_REST[name]


@pytest.fixture(scope='module')
def halfway():
    "Slides, and a checkpoint when five of six were done."
    kept = KeptStates()
    model, train, tuning = synth_learner(6)
    fit(model, train, tuning, epochs=2, batch=4, callbacks=[kept], progress=False)
    return train, tuning, kept.all[4]


def test_a_changed_learning_rate(halfway):
    train, tuning, point = halfway
    options = dict(epochs=2, batch=4, resume=point, progress=False)
    said = complaint(fit, TinyNet(), train, tuning, **options | dict(lr=1e-5, batch=2))
    assert 'lr was 0.0002 and is 1e-05' in said
    history = fit(TinyNet(), train, tuning, lr=1e-5, accept_changes=True, **options)
    assert history[0]['lr'] == 1e-5


def test_changed_slides(halfway):
    train, tuning, point = halfway
    options = dict(epochs=3, batch=4, resume=point, progress=False)
    assert 'its training slides changed' in complaint(fit, TinyNet(), train[:5], tuning, **options)
    assert len(fit(TinyNet(), train[:5], tuning, accept_changes=True, **options)) == 3


@pytest.mark.parametrize('changed', [dict(task=Binary((1.0, 2.0))), dict(batch=3), dict(seed=1)])
def test_changes_that_restart_the_epoch(changed, halfway):
    train, tuning, point = halfway
    kept = KeptStates()
    options = dict(epochs=2, batch=4) | changed
    fit(
        TinyNet(),
        train,
        tuning,
        resume=point,
        accept_changes=True,
        callbacks=[kept],
        progress=False,
        **options,
    )
    assert (kept.all[0]['epoch'], kept.all[0]['step']) == (point['epoch'], 1)


def test_what_is_no_checkpoint_of_a_training(slides):
    weights = dict(model=TinyNet().state_dict())
    said = complaint(fit, TinyNet(), slides, epochs=1, resume=weights, progress=False)
    assert 'no checkpoint to resume from' in said


# on a GPU


@pytest.fixture
def deterministic():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@needs_cuda
@pytest.mark.parametrize(
    'make, options',
    [
        (shuffled_by_torch, dict()),
        (small(4), dict(amp='fp16')),
        (in_slide_loaders, dict(amp='bf16', clip=1.0)),
        (with_survival, dict(task=Survival())),
    ],
    ids=['float32', 'fp16', 'bf16', 'joint'],
)
def test_resumed_on_a_gpu(make, options, deterministic):
    assert resumed_from_each(make, device='cuda', epochs=2, batch=3, lr=0.1, **options)


@needs_cuda
def test_float64_trains_on_a_gpu_as_on_the_cpu(deterministic):
    def train_on(device):
        model, *data = synth_learner(8)
        options = dict(epochs=2, lr=0.1, batch=3, device=device, callbacks=[EMA(0.9)])
        return model.double(), fit(model, *data, progress=False, **options)

    (model, history), (other, other_history) = train_on('cpu'), train_on('cuda')
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a - b.cpu()).abs().max() < 1e-12
    for row, other_row in zip(history, other_history, strict=True):
        for name in ('train_loss', 'tuning_loss'):
            assert row[name] == pytest.approx(other_row[name], abs=1e-12)


@needs_cuda
def test_a_loss_that_is_nan_in_fp16_on_a_gpu():
    slides = synth_slides(4)
    slides[3] |= dict(image=torch.zeros(3, 99, 30, dtype=torch.uint8), slide_id='B7')
    with pytest.raises(InputError, match="'B7'"):
        fit(NanNet(), slides, epochs=1, device='cuda', amp='fp16', progress=False)


@needs_cuda
def test_what_does_not_fit_into_a_gpu_is_named():
    slides = synth_slides(4)
    large = slides[0] | dict(image=torch.zeros(3, 4000, 4000, dtype=torch.uint8))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e8 / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(InputError, match='4000 x 4000 pixels, does not fit'):
            options = dict(epochs=1, device='cuda', callbacks=[DryRun(large)], progress=False)
            fit(TinyNet(), slides, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_callback_of_an_earlier_version_is_refused(slides):
    "Its state would be left out of checkpoints without a word."

    class Earlier:
        def state(self):
            return {}

        def restore(self, state):
            pass

    with pytest.raises(InputError, match='Earlier has state and restore'):
        fit(TinyNet(), slides, epochs=1, progress=False, callbacks=[Earlier()])
