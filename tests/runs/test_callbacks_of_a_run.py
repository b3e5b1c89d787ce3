"A run with callbacks of one's own: their order, and what checkpoints keep of them."

import pytest

from streaming_pathology.core import Halted, InputError
from streaming_pathology.runs.runs import Run
from streaming_pathology.runs.settings import StreamingSettings
from streaming_pathology.slides.cohorts import tiny_cohort
from streaming_pathology.training.checkpoints import last_checkpoint
from streaming_pathology.training.loop import Callback

pytestmark = pytest.mark.usefixtures('small_resnet')


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    return tiny_cohort(tmp_path_factory.mktemp('callbacks') / 'cohort', size=(64, 64))


def run_in(folder, manifest):
    "A run of one epoch: 8 training slides, 2 tuning slides."
    settings = StreamingSettings(
        manifest=str(manifest), spacing=4.0, epochs=1, strip=64, heatmaps=0, device='cpu'
    )
    return Run(settings, folder)


class Calls(Callback):
    "Notes its name with each hook that is called."

    def __init__(self, name, calls):
        self.name = name
        self.calls = calls

    def before_fit(self, state):
        self.calls.append(('before_fit', self.name))

    def after_epoch(self, state):
        self.calls.append(('after_epoch', self.name))

    def after_fit(self, state):
        self.calls.append(('after_fit', self.name))


class Rests(Callback):
    "Counts the moments between slides; may ask for a halt at one of them."

    def __init__(self, halt_at=None):
        self.count = 0
        self.halt_at = halt_at

    def at_rest(self, state):
        self.count += 1
        if self.count == self.halt_at:
            state.halt_requested = True

    def state_dict(self):
        return dict(count=self.count)

    def load_state_dict(self, state):
        self.count = state['count']


def saved_count(folder):
    "What the last checkpoint of a run keeps of `Rests`."
    point = last_checkpoint(folder / 'checkpoints')
    return dict(point['callbacks'])['Rests']['count']


def test_they_are_called_in_their_order_and_before_a_checkpoint_is_saved(manifest, tmp_path):
    calls, rests = [], Rests()
    callbacks = [Calls('a', calls), Calls('b', calls), rests]
    run_in(tmp_path / 'run', manifest).train(callbacks=callbacks)
    hooks = ('before_fit', 'after_epoch', 'after_fit')
    assert calls == [(hook, name) for hook in hooks for name in 'ab']
    assert rests.count == 8 + 2 + 1  # after each slide, and after the epoch
    assert saved_count(tmp_path / 'run') == rests.count


def test_what_they_remember_is_saved_and_given_back(manifest, tmp_path):
    folder = tmp_path / 'run'
    with pytest.raises(Halted, match='4 of 8 slides done'):
        run_in(folder, manifest).train(callbacks=[Rests(halt_at=3)])
    assert saved_count(folder) == 4
    with pytest.raises(InputError, match='callbacks'):
        run_in(folder, manifest).train(resume=True)
    rests = Rests()
    run_in(folder, manifest).train(resume=True, callbacks=[rests])
    assert rests.count == 8 + 2 + 1
    assert saved_count(folder) == rests.count
