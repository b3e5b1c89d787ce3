"What a report is made of: runs, comparisons, and what is shown without names."

import json
import shutil

import pytest
from refusals import refusal

from streaming_pathology.evaluation.report_inputs import (
    FinishedRun,
    read_comparison,
    read_run,
    without_names,
)
from streaming_pathology.io import write_csv, write_whole

COMPARED = dict(
    names=['mine', 'other'],
    difference=0.1,
    paired=dict(low=0, high=0.2, level=0.95),
    auc=[dict(auc=0.9, low=0.8, high=1), dict(auc=0.8, low=0.7, high=0.9)],
    delong=dict(p=0.03),
    permutation_p=None,
)


@pytest.fixture(scope='module')
def run(toy):
    return read_run(toy)


@pytest.fixture
def compared(run, tmp_path):
    "A comparison whose first side has the predictions of the run."
    folder = tmp_path / 'compared'
    rows = [
        dict(slide_id=each.slide_id, label=each.label, probability_a=each.probability)
        for each in run.labelled
    ]
    rows = [row | dict(probability_b=(number + 10) / 100) for number, row in enumerate(rows)]
    write_csv(folder / 'comparison.csv', rows)
    write_whole(folder / 'comparison.json', json.dumps(COMPARED))
    return folder


# ---- a run


def test_a_made_up_run_has_the_files_of_a_real_one(toy):
    assert sorted(path.name for path in toy.iterdir()) == [
        'cohort.csv',
        'environment.json',
        'heatmaps',
        'images',
        'log.csv',
        'metrics.json',
        'predictions.csv',
        'settings.toml',
    ]


def test_what_is_read_of_a_run(run):
    assert (len(run.labelled), len(run.unlabelled), run.notes) == (24, 1, {})
    assert [each.slide_id for each in (*run.labelled, *run.unlabelled)] == [*run.numbers]
    assert run.title == 'Toy run'
    assert run.metrics.threshold == run.threshold
    assert len(run.cohort) == 85 and len(run.log) == 12


@pytest.mark.parametrize(
    'settings, name, meaning, source',
    [
        ({}, 'SmoothGrad', 'SmoothGrad', 'Smilkov'),
        (dict(command='sp_mil'), 'patch probability', 'probability of each patch', 'Campanella'),
        (dict(annotation='masks'), 'SmoothGrad', 'SmoothGrad', 'Bulten'),
        (dict(command='sp_mil', aggregator='abmil'), 'attention', 'attention', 'Ilse'),
    ],
)
def test_what_the_maps_of_a_run_are_called(tmp_path, settings, name, meaning, source):
    run = FinishedRun(tmp_path, settings, [])
    assert run.map_name == name
    assert meaning in run.map_meaning
    assert source in run.method_source


def test_logged_values_without_those_that_are_missing(part):
    (part / 'log.csv').write_text('epoch,train_loss,tuning_auc\n0,.5,\n1,.4,.9\n')
    run = read_run(part)
    assert run.logged('tuning_auc') == [0.9]
    assert run.logged('no_such_column') == []


@pytest.mark.parametrize('name', ['threshold', 'low', 'auc'])
def test_other_figures_than_its_own_are_refused(part, name):
    path = part / 'metrics.json'
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {name: metrics[name] + 0.01}))
    assert 'run sp_evaluate again' in refusal(read_run, part)


def test_a_wanted_sensitivity_is_asked_for_again(part):
    path = part / 'metrics.json'
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | dict(at_sensitivity=dict(wanted=0.9))))
    assert read_run(part).results['at_sensitivity']['wanted'] == 0.9
    path.write_text(json.dumps(metrics | dict(at_sensitivity=0.9)))
    assert 'metrics.json is damaged' in refusal(read_run, part)


# ---- a comparison


def test_what_is_read_of_a_comparison(run, compared):
    comparison = read_comparison(compared, run)
    assert comparison.names == ['mine', 'other']
    assert (comparison.difference.value, comparison.difference.high) == (0.1, 0.2)
    assert [area.value for area in comparison.aucs] == [0.9, 0.8]
    assert comparison.p_values == dict(DeLong='0.03', permutation='–')
    assert len(comparison.labels) == 24


def test_runs_are_called_by_what_they_are_without_names(run, compared):
    assert read_comparison(compared, run, True).names == ['this run', 'the other run']
    table = compared / 'comparison.csv'
    head, rest = table.read_text().split('\n', 1)
    swapped = head.replace('probability_a', 'x').replace('probability_b', 'probability_a')
    table.write_text(swapped.replace('x', 'probability_b') + '\n' + rest)
    assert read_comparison(compared, run, True).names == ['the other run', 'this run']


@pytest.mark.parametrize(
    'name, text, says',
    [
        ('comparison.csv', 'biopsy_000,0,.5,.5\n', 'both classes'),
        ('comparison.csv', 'biopsy_000,0,.5,.5\nbiopsy_001,1,.5,.5\n', 'neither has'),
        ('comparison.json', None, 'comparison.json does not exist'),
        ('comparison.json', '{"names": [1]}', 'cannot be read'),
        ('comparison.json', json.dumps(COMPARED | dict(names='ab')), 'cannot be read'),
        ('comparison.json', json.dumps(COMPARED | dict(difference=None)), 'cannot be read'),
        ('comparison.json', json.dumps(COMPARED | dict(difference='nan')), 'are no numbers'),
    ],
)
def test_damaged_comparisons_are_refused(run, compared, name, text, says):
    path = compared / name
    if text is None:
        path.unlink()
    elif name == 'comparison.csv':
        path.write_text('slide_id,label,probability_a,probability_b\n' + text)
    else:
        path.write_text(text)
    assert says in refusal(read_comparison, compared, run)


# ---- without names


def test_settings_and_environment_without_names(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / 'run')
    settings = folder / 'settings.toml'
    settings.write_text('annotation = "masks"\nowner = "somebody"\n' + settings.read_text())
    environment = dict(user='somebody', machine=dict(cpus=2, name='desk'), python='3.11')
    (folder / 'environment.json').write_text(json.dumps(environment))
    run = without_names(read_run(folder), ['site'])
    assert run.is_anonymous and run.title == 'A run'
    assert run.settings['annotation'] == 'given'
    assert run.settings['arch'] == 'resnet18' and run.settings['lr'] == 0.01
    assert 'owner' not in run.settings
    assert run.environment == dict(machine=dict(cpus=2), python='3.11')
    assert run.name('sample') == 'Slide 25'


def test_groups_that_would_show_names_are_refused(run):
    assert 'would show names' in refusal(without_names, run, ['site', 'patient_id'])
