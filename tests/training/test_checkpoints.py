"Checkpoints: damage is detected, nothing runs code, and a training stopped at any moment resumes"

import shutil
import signal
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from trainings import complaint

from streaming_pathology.core import Halted
from streaming_pathology.training.checkpoints import (
    Checkpoints,
    HaltOnSignal,
    checkpoint_files,
    describe_checkpoint,
    last_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from streaming_pathology.training.loop import Callback, TinyNet, fit, synth_learner


@pytest.fixture
def checkpoint(tmp_path):
    "A small checkpoint."
    state = dict(weights=torch.arange(3.0), where=tmp_path, loss=np.float32(0.5), shape=(2, 3))
    return save_checkpoint(tmp_path / 'a.pt', **state)


def test_what_is_saved_is_loaded(checkpoint):
    state = load_checkpoint(checkpoint)
    assert state['weights'].tolist() == [0, 1, 2]
    assert state['where'] == str(checkpoint.parent)
    assert (state['loss'], state['shape']) == (0.5, (2, 3))
    assert torch.load(checkpoint, weights_only=True)['loss'] == 0.5


def test_a_checkpoint_that_was_cut_is_refused(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for size in range(0, len(whole), 100):
        (tmp_path / 'cut.pt').write_bytes(whole[:size])
        complaint(load_checkpoint, tmp_path / 'cut.pt')


def test_any_byte_that_changed_is_noticed(checkpoint, tmp_path):
    whole, path = checkpoint.read_bytes(), tmp_path / 'changed.pt'
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        complaint(load_checkpoint, path)


def test_bytes_at_the_end_are_noticed(checkpoint, tmp_path):
    whole, path = checkpoint.read_bytes(), tmp_path / 'longer.pt'
    for i in range(0, len(whole), 7):
        path.write_bytes(whole + bytes(i + 1))
        complaint(load_checkpoint, path)


def test_what_a_checkpoint_contains(checkpoint, tmp_path):
    assert describe_checkpoint(checkpoint)['contains'] == dict(
        weights=dict(tensors=1, numbers=3), where='str', loss=0.5, shape='tuple'
    )
    many = {f'k{i}': torch.zeros(1) for i in range(999)}
    save_checkpoint(tmp_path / 'many.pt', text='x' * 10**5, **many)
    assert describe_checkpoint(tmp_path / 'many.pt')['contains'] == dict(tensors=999, numbers=999)
    (tmp_path / 'text.pt').write_text('epoch,loss\n')
    assert 'no checkpoint' in complaint(describe_checkpoint, tmp_path / 'text.pt')


def test_a_disk_without_space(checkpoint):
    with patch('shutil.disk_usage', return_value=SimpleNamespace(free=10)):
        assert 'are free' in complaint(save_checkpoint, checkpoint, x=torch.zeros(9))


def test_what_a_checkpoint_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match='builtin_function'):
        save_checkpoint(tmp_path / 'x.pt', f=print)


def test_a_folder_that_is_a_file(checkpoint):
    assert 'cannot be written' in complaint(save_checkpoint, checkpoint / 'x.pt')


def test_a_disk_that_fills_up_leaves_what_was_there(checkpoint):
    whole = checkpoint.read_bytes()
    with patch('os.fsync', side_effect=OSError(28, 'No space left on device')):
        assert 'No space left' in complaint(save_checkpoint, checkpoint)
    assert checkpoint.read_bytes() == whole
    assert not list(checkpoint.parent.glob('.*'))


def test_a_folder_is_no_checkpoint(tmp_path):
    complaint(load_checkpoint, tmp_path)


def test_weights_of_another_network():
    state = dict(model=TinyNet().state_dict())
    load_weights(TinyNet(), state)
    said = complaint(load_weights, TinyNet(n_out=3), state)
    assert said == (
        'the checkpoint does not fit this network: 2 of its tensors differ, '
        "'head.weight' is the first"
    )


# while training

OPTIONS = dict(epochs=12, lr=0.2, batch=4, progress=False)


def train_in(folder, *callbacks, **more):
    "A model that is trained with a checkpoint between any two slides."
    model, train, tuning = synth_learner()
    saves = Checkpoints(folder, minutes=0)
    fit(model, train, tuning, callbacks=[saves, *callbacks], **OPTIONS, **more)
    return model


def damage(path):
    "Change one bit of a file."
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def assert_same_weights(model, other):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder, the model and the history of a training that was never stopped."
    folder = tmp_path_factory.mktemp('whole')
    model, train, tuning = synth_learner()
    saves = Checkpoints(folder, dict(width=4))
    history = fit(model, train, tuning, callbacks=[saves], **OPTIONS)
    return SimpleNamespace(folder=folder, model=model, history=history)


def test_the_best_epoch_and_the_last_checkpoints(whole):
    best, last = load_checkpoint(whole.folder / 'best.pt'), last_checkpoint(whole.folder)
    assert best['epoch'] == 1 + np.argmin([row['tuning_loss'] for row in whole.history])
    names = [path.name for path in checkpoint_files(whole.folder)]
    assert names == ['point_000011_000000.pt', 'point_000012_000000.pt']
    assert last['history'] == whole.history
    load_weights(TinyNet(**best['settings']), best)


def test_the_last_checkpoint_is_damaged(whole, tmp_path):
    class Interrupt(Callback):
        def at_rest(self, state):
            if (state.epoch, state.step) == (7, 10):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, Interrupt())
    damage(checkpoint_files(tmp_path)[-1])
    with pytest.warns(UserWarning, match='the checkpoint before it is used'):
        point = last_checkpoint(tmp_path)
    assert (point['epoch'], point['step']) == (7, 9)
    assert_same_weights(train_in(tmp_path, resume=point), whole.model)
    best, best_of_whole = (load_checkpoint(path / 'best.pt') for path in (tmp_path, whole.folder))
    assert best['epoch'] == best_of_whole['epoch']


def test_no_checkpoint_in_a_folder(tmp_path):
    assert last_checkpoint(tmp_path / 'none') is None


@pytest.mark.filterwarnings('ignore')
def test_all_checkpoints_are_damaged(whole, tmp_path):
    shutil.copy(checkpoint_files(whole.folder)[-1], tmp_path)
    damage(checkpoint_files(tmp_path)[0])
    assert 'no intact checkpoint' in complaint(last_checkpoint, tmp_path)


@pytest.mark.parametrize('keep', [1, 2, 3])
def test_how_many_checkpoints_are_kept(keep, tmp_path):
    saves = Checkpoints(tmp_path, minutes=0, keep=keep)
    fit(*synth_learner(3), epochs=2, callbacks=[saves], progress=False)
    assert len(checkpoint_files(tmp_path)) == keep


# signals


class Terminate(Callback):
    "Sends a signal to stop at some (epoch, step)."

    def __init__(self, *moments):
        self.moments = moments

    def at_rest(self, state):
        if (state.epoch, state.step) in self.moments:
            signal.raise_signal(signal.SIGTERM)


def halted(folder, *moments):
    "What a training says that gets a signal to stop at some moments."
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with HaltOnSignal() as halt:
            train_in(folder, Terminate(*moments), halt)
    except (Halted, KeyboardInterrupt) as e:
        return str(e) or type(e).__name__
    finally:
        assert signal.signal(signal.SIGTERM, former) is signal.default_int_handler
    return 'it was not halted'


@pytest.mark.parametrize(
    'moment, said',
    [
        ((3, 5), 'stopped in epoch 4, 6 of 24 slides done'),
        ((12, 0), 'stopped in epoch 12, all of 24 slides done'),
    ],
    ids=['in an epoch', 'while the last checkpoint is written'],
)
def test_a_signal_halts_a_training(moment, said, whole, tmp_path):
    assert halted(tmp_path, moment) == said
    assert_same_weights(train_in(tmp_path, resume=last_checkpoint(tmp_path)), whole.model)


def test_a_second_signal_ends_it_at_once(tmp_path):
    class Twice(Terminate):
        def at_rest(self, state):
            super().at_rest(state)
            super().at_rest(state)

    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), HaltOnSignal() as halt:
            train_in(tmp_path, Twice((0, 1)), halt)
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_signal_after_the_last_epoch(whole, tmp_path):
    class Late(Callback):
        def after_fit(self, state):
            signal.raise_signal(signal.SIGTERM)

    folder = shutil.copytree(whole.folder, tmp_path / 'run')
    with pytest.raises(Halted, match='stopped in epoch 12, all of 24'), HaltOnSignal() as halt:
        train_in(folder, Late(), halt, resume=last_checkpoint(folder))


# what was accepted, and the best epoch


@pytest.fixture(scope='module')
def stopped_once(tmp_path_factory):
    "The folder of a training that was halted in its last epoch."
    folder = tmp_path_factory.mktemp('stopped')
    assert halted(folder, (11, 10)) == 'stopped in epoch 12, 11 of 24 slides done'
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    "A copy of it."
    return shutil.copytree(stopped_once, tmp_path / 'run')


def test_what_was_accepted_is_saved_at_once(stopped):
    "With all that the checkpoint before it had."

    class Leave(Callback):
        def after_resume(self, state):
            raise Halted

    point = last_checkpoint(stopped)
    assert (point['epoch'], point['step']) == (11, 11)
    assert point['gradients']
    before = checkpoint_files(stopped)[-1].stat().st_mtime_ns
    with pytest.raises(Halted):
        train_in(stopped, Leave(), resume=point, accept_changes=True)
    assert checkpoint_files(stopped)[-1].stat().st_mtime_ns > before
    new = last_checkpoint(stopped)
    for key in 'epoch step losses draws rng gradients optimizer callbacks'.split():
        assert str(new[key]) == str(point[key]), key


def test_a_best_epoch_that_this_training_does_not_know(stopped):
    "As of an epoch that is trained again after a change."
    path, point = stopped / 'best.pt', last_checkpoint(stopped)
    unknown = dict(epoch=12, history=[*point['history'], dict(epoch=12, tuning_loss=0.0)])
    save_checkpoint(path, **load_checkpoint(path) | unknown)
    best = dict(callbacks=[['Checkpoints', dict(best=0.0)]])
    save_checkpoint(checkpoint_files(stopped)[-1], **point | best)
    with pytest.warns(UserWarning, match='an epoch 12 that this training does not know'):
        train_in(stopped, resume=last_checkpoint(stopped), accept_changes=True)
    assert str(load_checkpoint(path)['history']) == str(last_checkpoint(stopped)['history'])


def test_the_best_epoch_was_deleted(stopped):
    path = stopped / 'best.pt'
    path.unlink()
    with pytest.warns(UserWarning, match='is gone, and with it the best epoch; epoch 12 takes'):
        train_in(stopped, resume=last_checkpoint(stopped))
    assert load_checkpoint(path)['epoch'] == 12


def test_the_best_epoch_is_damaged(stopped):
    path = stopped / 'best.pt'
    path.write_bytes(path.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        said = complaint(train_in, stopped, resume=last_checkpoint(stopped))
    assert 'with it the best epoch' in said
