"The settings files of the tutorials, and the cohorts that they begin with."

import tomllib
from pathlib import Path

import pytest

from streaming_pathology.cli import commands
from streaming_pathology.cli.commands import sp_cohort
from streaming_pathology.cli.parser import parse
from streaming_pathology.core import InputError
from streaming_pathology.mil.bags import check_annotation
from streaming_pathology.slides.cohorts import leaks, read_manifest
from streaming_pathology.slides.masks import numbers_in
from streaming_pathology.slides.published import (
    DATASETS,
    paint_camelyon16,
    paint_panda,
    published_cohort,
)

TUTORIALS = Path(__file__).parents[2] / 'nbs/tutorials'
FILES = ('panda.toml', 'camelyon16.toml')


def parsed(name, path):
    "The settings of a command by a settings file."
    command = getattr(commands, f'sp_{name}')
    return parse(command.kinds, f'sp_{name}', '', '', ['--settings', str(path)], command.files)


@pytest.mark.parametrize('file', FILES)
def test_every_section_is_understood_by_its_command(file):
    path = TUTORIALS / file
    sections = tomllib.loads(path.read_text())
    assert list(sections)[:2] == ['cohort', 'check'] and 'report' in sections
    for name, values in sections.items():
        objects = parsed(name, path)
        for each in objects:
            each.check()
        known = {option for each in objects for option in each.options()}
        assert set(values) <= known


@pytest.mark.parametrize('file', FILES)
def test_each_command_reads_what_the_one_before_has_written(file):
    sections = tomllib.loads((TUTORIALS / file).read_text())
    assert sections['trim']['slides'] == sections['cohort']['out']
    for name in ('train', 'mil'):
        assert sections[name]['manifest'] == f'{sections["trim"]["out"]}/manifest.csv'
        assert sections[name]['spacing'] == sections['trim']['spacing']
    assert sections['evaluate']['predictions'] == f'{sections["train"]["out"]}/predictions.csv'
    assert sections['compare']['settings_a'] == sections['train']['out']
    assert sections['compare']['settings_b'] == sections['mil']['out']
    assert sections['report']['maps'] == sections['heatmap']['out']
    assert sections['report']['comparison'] == sections['compare']['out']


def test_datasets_have_the_same_names():
    assert commands.DATASET_NAMES == DATASETS


@pytest.fixture(scope='module')
def panda(tmp_path_factory):
    return paint_panda(tmp_path_factory.mktemp('panda') / 'panda', n=8)


def test_panda_is_split_by_grade(panda):
    cases = published_cohort('panda', panda, providers=['radboud'], fractions=(0.5, 0.25, 0.25))
    assert len(cases) == 8 and leaks(cases) == []
    for split in ('train', 'tuning', 'test'):
        assert {case.label for case in cases if case.split == split} == {0, 1}
    assert [case.mask for case in cases] == [None] * 8
    assert sum(case.annotation is None for case in cases) == 1
    with_masks = published_cohort('panda', panda, tissue_masks=True)
    assert len(with_masks) == 16
    assert all(case.mask == case.annotation for case in with_masks)


@pytest.mark.parametrize(
    'provider, values, cancer',
    [('radboud', {0, 1, 2, 3, 4, 5}, (3, 4, 5)), ('karolinska', {0, 1, 2}, (2,))],
)
def test_masks_of_panda_have_the_classes_of_their_provider(panda, provider, values, cancer):
    cases = published_cohort('panda', panda, providers=[provider])
    found = set()
    for case in cases:
        if case.annotation is not None:
            found |= set(numbers_in(case.annotation))
            check_annotation(case, cancer)
    assert found == values


def test_camelyon16_keeps_its_test_set(tmp_path):
    folder = paint_camelyon16(tmp_path / 'c16', n_train=8, n_test=4)
    with pytest.warns(UserWarning, match='are taken for it'):
        cases = published_cohort('camelyon16', folder, fractions=(0.5, 0.5, 0), seed=1)
    splits = {case.slide_id: case.split for case in cases}
    assert {name for name in splits if splits[name] == 'test'} == {
        f'test_{i:03}' for i in (1, 2, 3, 4)
    }
    assert sorted(splits.values()).count('tuning') == 4
    assert {case.grade for case in cases} == {'', 'micro', 'macro'}


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(dataset='pnda'), 'is no data set that is known; use panda or'),
        (dict(dataset='camelyon16', label='isup'), 'are for panda, and not for camelyon16'),
        (dict(dataset='panda', exclude=['x']), "has no slide 'x' to leave out"),
        (dict(dataset='panda', exclude=[f'{5:031x}']), f'did you mean {5:032x}?'),
    ],
)
def test_bad_settings_are_refused(panda, options, says):
    with pytest.raises(InputError) as e:
        published_cohort(folder=panda, **options)
    assert says in str(e.value)


def test_slides_are_left_out(panda, tmp_path, capsys):
    first = f'{0:032x}'
    out = tmp_path / 'panda.csv'
    assert sp_cohort(['panda', str(panda), str(out), '--exclude', first]) == 0
    assert 'wrote' in capsys.readouterr().out
    cases = read_manifest(out, annotation='annotation')
    assert len(cases) == 15 and first not in {case.slide_id for case in cases}
    assert sp_cohort(['panda', str(panda), str(out), '--seed', '1']) == 0  # replaces it
    assert sp_cohort(['panda', str(panda / 'none'), str(out)]) == 2
    assert 'is no folder; give that of the data set' in capsys.readouterr().err
    assert sp_cohort(['panda', str(panda), str(panda / 'train.csv')]) == 2
    assert 'exists and is something else' in capsys.readouterr().err
    assert sp_cohort(['panda', str(panda), str(out), '--fractions', '0.5,0.5']) == 2
    assert 'give three shares that add up to 1' in capsys.readouterr().err
