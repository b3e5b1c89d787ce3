"Callbacks: logs, early stopping, a dry run, and an average of the weights"

from types import SimpleNamespace

import pytest
import torch
from trainings import complaint

from streaming_pathology.training.callbacks import (
    EMA,
    CSVLog,
    DryRun,
    EarlyStopping,
    LiveCurves,
    TensorBoardLog,
    Tracker,
    csv_value,
)
from streaming_pathology.training.loop import (
    Callback,
    TinyNet,
    fit,
    predict,
    summary,
    synth_learner,
    synth_slides,
)


class StopAt(Callback):
    "Stops after an epoch, counted from 1."

    def __init__(self, epoch):
        self.epoch = epoch

    def after_epoch(self, state):
        state.stop = state.epoch + 1 >= self.epoch


def test_logs(tmp_path):
    tracked = []
    logs = [
        CSVLog(tmp_path / 'log.csv'),
        TensorBoardLog(tmp_path / 'tensorboard'),
        Tracker(tracked.append),
    ]
    fit(*synth_learner(8), epochs=9, callbacks=[*logs, StopAt(2)], progress=False)
    lines = (tmp_path / 'log.csv').read_text().splitlines()
    assert lines[0] == 'epoch,train_loss,tuning_loss,tuning_auc,lr,seconds,peak_mb'
    assert len(lines) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ['log.csv', 'tensorboard']
    assert any((tmp_path / 'tensorboard').iterdir())
    assert [row['epoch'] for row in tracked] == [1, 2]


@pytest.mark.parametrize(
    'value, text', [(3, 3), (0.123456789, '0.123457'), (float('nan'), ''), (2e-4, '0.0002')]
)
def test_numbers_in_a_log(value, text):
    assert csv_value(value) == text


def test_live_curves_are_shown_once_and_then_updated():
    live, updates = LiveCurves(), []
    live.before_fit(None)
    live.display = lambda fig, **_: SimpleNamespace(update=updates.append)
    history = [dict(epoch=1, train_loss=1.0), dict(epoch=2, train_loss=0.5)]
    for _ in range(3):
        live.after_epoch(SimpleNamespace(history=history))
    assert len(updates) == 2


def test_early_stopping():
    _, train, tuning = synth_learner()
    options = dict(epochs=50, lr=1e-9, callbacks=[EarlyStopping(3, 1e-3)], progress=False)
    assert len(fit(TinyNet(), train[:4], tuning[:4], **options)) == 4


def test_early_stopping_needs_tuning_slides():
    options = dict(epochs=2, callbacks=[EarlyStopping()], progress=False)
    assert 'tuning slides' in complaint(fit, TinyNet(), synth_slides(1), **options)


def test_a_dry_run_changes_nothing():
    histories = []
    for callbacks in ([DryRun(synth_slides(1)[0])], []):
        histories.append(fit(*synth_learner(4), epochs=1, callbacks=callbacks, progress=False))
    assert histories[0][0]['train_loss'] == histories[1][0]['train_loss']


def test_a_slide_that_does_not_fit_is_named():
    class TooLarge(TinyNet):
        def forward(self, x):
            raise torch.OutOfMemoryError('CUDA out of memory')

    slides = synth_slides(2)
    options = dict(epochs=1, callbacks=[DryRun(slides[0])], progress=False)
    assert "'s000'" in complaint(fit, TooLarge(), slides, **options)


class Weights(Callback):
    "All weights after each step."

    def __init__(self):
        self.all = []

    def after_step(self, state):
        self.all.append([param.detach().clone() for param in state.model.parameters()])


def test_the_average_of_the_weights():
    model, train, tuning = synth_learner(8)
    steps, options = Weights(), dict(epochs=2, lr=0.1, batch=2, progress=False)
    history = fit(model, train, tuning, callbacks=[EMA(0.8), steps], **options)
    for i, param in enumerate(model.parameters()):
        average = steps.all[0][i]
        for weights in steps.all[1:]:
            average = 0.8 * average + 0.2 * weights[i]
        torch.testing.assert_close(param.detach(), average, atol=1e-6, rtol=0)
    loss = summary(predict(model, tuning, progress=False))['loss']
    assert history[-1]['tuning_loss'] == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize('decay', [0, 1])
def test_a_decay_is_between_0_and_1(decay):
    assert 'between 0 and 1' in complaint(EMA, decay)
