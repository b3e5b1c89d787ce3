"Ways to train: what they decide of settings that were not given."

import pytest
from refusals import refusal

from streaming_pathology.runs.methods import method_of, single_stage
from streaming_pathology.runs.settings import MILSettings, StreamingSettings


@pytest.mark.parametrize('kind', [StreamingSettings, MILSettings])
def test_adamw_needs_no_momentum(kind):
    settings = kind(manifest='slides.csv', optimizer='adamw', momentum=None)
    method_of(settings).settle()
    stage = single_stage(settings)
    assert (stage.optimizer, stage.momentum, stage.epochs) == ('adamw', 0.9, 50)


@pytest.mark.parametrize('name', ['lr', 'optimizer', 'momentum', 'batch_size'])
def test_a_schedule_without_recipe_has_to_be_whole(name):
    settings = StreamingSettings(manifest='slides.csv', **{name: None})
    assert f'{name} is None' in refusal(method_of(settings).settle)


def test_no_augmentation_is_a_word():
    settings = StreamingSettings(manifest='slides.csv', augment=None)
    assert "give 'none'" in refusal(method_of(settings).settle)


def test_patches_have_a_learning_rate_of_their_own():
    settings = MILSettings(manifest='slides.csv')
    method_of(settings).settle()
    assert single_stage(settings).lr == 1e-5


def test_a_recipe_leaves_the_schedule_open():
    settings = StreamingSettings(manifest='slides.csv', recipe='paper')
    method_of(settings).settle()
    assert (settings.epochs, settings.lr, settings.momentum) == (75, None, None)
