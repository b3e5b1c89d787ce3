"Recipes: windows, averages, stages, and resuming in any of them"

import copy
import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from trainings import KeptStates, complaint

from streaming_pathology.training.checkpoints import load_checkpoint, save_checkpoint
from streaming_pathology.training.loop import Callback, TinyNet, synth_learner
from streaming_pathology.training.recipes import (
    Stage,
    WindowCheckpoints,
    average_weights,
    best_window,
    paper_streaming,
    run_recipe,
    scaled,
)

RECIPE = (Stage(6, 0.1, 'head', 'middle', batch=4), Stage(8, 0.05, batch=4))


class StagedNet(TinyNet):
    "Can train its linear layer alone."

    def freeze_until(self, stage):
        self.conv.requires_grad_(stage is None)
        return self


def new_model():
    torch.manual_seed(0)
    return StagedNet()


@pytest.fixture(scope='module')
def slides():
    "Slides to train on, and tuning slides."
    _, train, tuning = synth_learner()
    return train, tuning


class Watch(Callback):
    "After each epoch: its number, its learning rate and the weights."

    def __init__(self):
        self.epochs, self.weights = [], []

    def after_epoch(self, state):
        row, lr = state.history[-1], state.optimizer.param_groups[0]['lr']
        self.epochs.append((row['epoch'], lr))
        self.weights.append(copy.deepcopy(state.model.state_dict()))


@pytest.mark.parametrize(
    'losses, width, window',
    [
        ([0.9, 0.7, 0.2, 0.8, 0.6, 0.5, 0.52, 0.48, 0.5, 0.7], 5, range(4, 9)),
        ([0.3, 0.2], 5, range(2)),
        ([1.0] * 9, 3, range(3)),
    ],
    ids=['lowest', 'few', 'equal'],
)
def test_best_window(losses, width, window):
    assert best_window(losses, width) == window


@pytest.mark.parametrize('losses', [[], [math.nan]])
def test_no_window(losses):
    assert 'tuning' in complaint(best_window, losses)


def test_average_weights():
    first, second = (
        dict(w=torch.tensor([1.0, value]), n=torch.tensor(value).long()) for value in (2.0, 5.0)
    )
    average = average_weights([first, second])
    assert {name: tensor.tolist() for name, tensor in average.items()} == dict(w=[1.0, 3.5], n=5)
    assert average_weights([first, first])['w'].tolist() == first['w'].tolist()
    assert 'different networks' in complaint(average_weights, [first, dict(w=first['w'])])
    other = dict(first, w=torch.zeros(3))
    assert 'different networks' in complaint(average_weights, [first, other])


@pytest.fixture(scope='module')
def trained(slides, tmp_path_factory):
    "A model after both stages, their history, what was seen after each epoch, and the folder."
    folder, model, watch = tmp_path_factory.mktemp('recipe'), new_model(), Watch()
    history = run_recipe(model, *slides, RECIPE, folder, callbacks=[watch], progress=False)
    return model, history, watch, folder


def test_stages(trained):
    model, history, watch, folder = trained
    stages = [(epoch, 0.1) for epoch in range(1, 7)] + [(epoch, 0.05) for epoch in range(7, 15)]
    assert watch.epochs == stages
    before = new_model().state_dict()['conv.weight']
    frozen = [torch.equal(weights['conv.weight'], before) for weights in watch.weights]
    assert frozen == [True] * 6 + [False] * 8
    window = best_window([row['tuning_loss'] for row in history[6:]])
    for name, tensor in model.state_dict().items():
        mean = torch.stack([watch.weights[6 + i][name].double() for i in window]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, atol=1e-6, rtol=0)
    kept = sorted(int(path.stem.removeprefix('epoch_')) for path in (folder / 'stage_2').iterdir())
    assert kept == sorted({*(7 + i for i in window), *range(11, 15)})


@pytest.fixture
def first_stage(slides, tmp_path):
    "A model after the first stage, its history and its checkpoints."
    model = new_model()
    history = run_recipe(model, *slides, RECIPE[:1], tmp_path, progress=False)
    kept = WindowCheckpoints(tmp_path / 'stage_1')
    kept.epochs = [row['epoch'] for row in history]
    kept.losses = [row['tuning_loss'] for row in history]
    return model, history, kept


def test_the_second_stage_begins_with_the_middle_of_the_window(first_stage, trained):
    model, history, _ = first_stage
    _, _, watch, _ = trained
    window = best_window([row['tuning_loss'] for row in history])
    middle = watch.weights[window[len(window) // 2]]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, middle[name])


def test_epochs_of_a_window_that_cannot_be_used(first_stage):
    _, _, kept = first_stage
    whole = kept.weights('average')
    first, *others = kept.window()
    kept.path(first).write_bytes(kept.path(first).read_bytes()[:-9])
    with pytest.warns(UserWarning, match='the other epochs of its window are used'):
        average = kept.weights('average')['head.weight']
    assert not torch.equal(average, whole['head.weight'])
    weights = [load_checkpoint(kept.path(epoch))['model']['head.weight'] for epoch in others]
    mean = torch.stack(weights).mean(0)
    torch.testing.assert_close(average, mean, atol=1e-6, rtol=0)
    save_checkpoint(
        kept.path(others[-1]), model=new_model().state_dict(), epoch=others[-1], tuning_loss=0.0
    )
    with pytest.warns(UserWarning, match='is not of this training'):
        assert len(kept.weights_of_window()) == len(others) - 1


def test_no_epoch_of_a_window_is_there(first_stage):
    _, _, kept = first_stage
    window = kept.window()
    for epoch in window:
        kept.path(epoch).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        said = complaint(kept.weights, 'middle')
    assert f'none of the epochs {window[0]} to {window[-1]}' in said
    kept.before_fit(None)
    assert 'no epoch of this stage was judged' in complaint(kept.weights, 'middle')


def test_what_is_refused(slides, tmp_path):
    train, tuning = slides
    said = complaint(run_recipe, TinyNet(), train, tuning, RECIPE, tmp_path, progress=False)
    assert 'no freeze_until' in said
    said = complaint(run_recipe, new_model(), train[:2], None, RECIPE[1:], tmp_path, progress=False)
    assert 'tuning slides' in said
    assert 'hands on' in complaint(Stage, 1, 0.1, hands_on='last')
    assert 'too few' in complaint(scaled, paper_streaming, 1)


@pytest.mark.parametrize(
    'epochs, shares', [(75, [25, 50]), (30, [10, 20]), (3, [1, 2]), (2, [1, 1])]
)
def test_scaled(epochs, shares):
    assert [stage.epochs for stage in scaled(paper_streaming, epochs)] == shares


def test_each_stage_has_an_epoch_when_scaled():
    recipe = (Stage(1, 0.1), Stage(98, 0.1), Stage(1, 0.1))
    assert scaled(recipe, 6) == (Stage(1, 0.1), Stage(4, 0.1), Stage(1, 0.1))


def test_a_stage_of_one_epoch(slides, tmp_path):
    train, tuning = slides
    recipe = (replace(RECIPE[1], epochs=1),)
    history = run_recipe(new_model(), train[:2], tuning[:2], recipe, tmp_path, progress=False)
    assert len(history) == 1


# resuming

SHORT = (Stage(3, 0.1, 'head', 'middle', batch=4), Stage(3, 0.05, batch=4))


@pytest.fixture(scope='module')
def interrupted(slides, tmp_path_factory):
    "How to run a short recipe, what one that was never interrupted came to, and its states."
    train, tuning = slides
    folder, kept = tmp_path_factory.mktemp('short'), KeptStates()

    def run(folder, recipe=SHORT, **options):
        model = new_model()
        history = run_recipe(
            model, train[:6], tuning[:3], recipe, folder, 3, progress=False, **options
        )
        return model, [row['tuning_loss'] for row in history]

    return run, run(folder, callbacks=[kept]), kept.all, folder


def test_a_recipe_that_resumes(interrupted, tmp_path):
    run, (whole, losses), states, folder = interrupted
    for i, state in enumerate(states[::3] + states[-1:]):
        again = shutil.copytree(folder, tmp_path / str(i))
        model, losses_again = run(again, resume=state)
        assert losses_again == losses
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[name])


@pytest.mark.parametrize('stage', [3, 0, None])
def test_a_checkpoint_of_another_recipe(stage, interrupted, tmp_path):
    run, _, states, _ = interrupted
    said = complaint(run, tmp_path, resume=dict(states[0], stage=stage))
    assert 'belongs to no recipe' in said


def test_a_stage_that_changed(interrupted, tmp_path):
    run, _, states, _ = interrupted
    recipe = (Stage(3, 0.2, 'head', 'middle', batch=4),)
    said = complaint(run, tmp_path, recipe=recipe, resume=states[0])
    assert 'lr was 0.1 and is 0.2' in said
