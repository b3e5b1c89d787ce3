"What a report is made of: runs, comparisons, and what is shown without names."

import json
import shutil

import numpy as np
import pytest
from refusals import refusal

from streaming_pathology.evaluation.report_inputs import (
    FinishedRun,
    evaluation_options,
    read_comparison,
    read_run,
    without_names,
)
from streaming_pathology.evaluation.results import results
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


# ---- metrics.json of before


def test_a_file_that_calls_newcombes_interval_by_what_was_asked_for(part):
    "The small run has no pair in the wrong order."
    path = part / 'metrics.json'
    metrics = json.loads(path.read_text())
    assert metrics['method'] == 'newcombe'
    path.write_text(json.dumps(metrics | dict(method='logit')))
    assert read_run(part).results == read_run_with(path, metrics).results


def read_run_with(path, metrics):
    path.write_text(json.dumps(metrics))
    return read_run(path.parent)


@pytest.mark.parametrize(
    'written, method',
    [
        (dict(method='logit'), 'logit'),
        (dict(method='newcombe'), 'logit'),
        (dict(method='clustered_delong'), 'delong'),
        (dict(method='bca'), 'bca'),
        ({}, 'logit'),
        (dict(classes=[None, dict(auc=0.5), dict(method='clustered_delong')]), 'delong'),
        (dict(labels=dict(a=dict(method='bca'))), 'bca'),
    ],
)
def test_intervals_are_made_again_as_they_were_asked_for(written, method):
    assert evaluation_options(written).method == method


def test_several_labels_are_evaluated_again_as_each_of_them_says():
    label = dict(draws=50, seed=3, level=0.9, split='tuning', threshold_from='tuning')
    options = evaluation_options(dict(task='multilabel', labels=dict(a=label)))
    assert (options.n_bootstrap, options.seed, options.confidence) == (50, 3, 0.9)
    assert options.split == 'tuning' and options.threshold_split is None


def test_a_run_whose_threshold_is_of_the_slides_evaluated_keeps_it(part):
    "As sp_evaluate chose it where there were tuning slides too, and where it was asked to."
    path = part / 'metrics.json'
    found = results(part / 'predictions.csv', threshold_split='test', n_bootstrap=50)
    path.write_text(json.dumps(found))
    assert read_run(part).results == found


@pytest.mark.parametrize(
    'damage',
    [
        dict(seed=0.5),
        dict(level='high'),
        dict(at_sensitivity=dict(wanted='most')),
        dict(labels=[1]),
    ],
)
def test_options_that_cannot_be_read_are_told_as_damage(part, damage):
    path = part / 'metrics.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert 'metrics.json' in refusal(read_run, part)


@pytest.fixture
def classes(tmp_path):
    "A run of three classes: its folder, whose settings do not say the task yet."
    rng = np.random.default_rng(0)
    labels, shares = rng.integers(0, 3, 60), rng.dirichlet([1, 1, 1], 60)
    shares[np.arange(60), labels] += 0.5
    shares /= shares.sum(1, keepdims=True)
    rows = [
        dict(slide_id=f's{number}', grade=label, split='test')
        | {f'probability_{each}': share for each, share in enumerate(row)}
        for number, (label, row) in enumerate(zip(labels, shares, strict=True))
    ]
    write_csv(tmp_path / 'run/predictions.csv', rows)
    return tmp_path / 'run'


def former_metrics(run):
    "What was written of classes, with or without an order, when the kappa was always quadratic."
    found = results(run / 'predictions.csv', n_bootstrap=50, task='ordinal')
    former = {name: value for name, value in found.items() if name != 'task_from'}
    for area in former['classes']:
        del area['method']
    return former


@pytest.mark.parametrize('former_task', ['classes', 'multiclass'])
@pytest.mark.parametrize('task', ['multiclass', 'ordinal'])
def test_a_file_with_the_quadratic_kappa_of_any_classes_is_read(classes, task, former_task):
    (classes / 'settings.toml').write_text(f'task = "{task}"\n')
    former = former_metrics(classes) | dict(task=former_task)
    (classes / 'metrics.json').write_text(json.dumps(former))
    found = read_run(classes).results
    assert (found['task'], found['task_from']) == (task, 'settings.toml')
    changed = former | dict(accuracy=0.123, kappa=0.123)
    (classes / 'metrics.json').write_text(json.dumps(changed))
    assert 'run sp_evaluate again' in refusal(read_run, classes)


@pytest.mark.parametrize('name', ['macro_auc', 'low', 'high'])
def test_other_metrics_of_classes_than_their_own_are_refused(classes, name):
    (classes / 'settings.toml').write_text('task = "multiclass"\n')
    found = results(classes / 'predictions.csv', n_bootstrap=50)
    (classes / 'metrics.json').write_text(json.dumps(found))
    assert read_run(classes).results == found
    (classes / 'metrics.json').write_text(json.dumps(found | {name: found[name] + 0.01}))
    assert 'run sp_evaluate again' in refusal(read_run, classes)


def test_a_file_with_the_median_of_slides_is_read(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        dict(
            slide_id=f's{number}',
            months=10 + number // 2,
            event=number // 2 % 2,
            split='test',
            log_risk=rng.normal(),
        )
        for number in range(40)
    ]
    write_csv(tmp_path / 'predictions.csv', rows)
    patients = [
        dict(slide_id=f's{number}', split='test', patient_id=f'p{number // 2}')
        for number in range(40)
    ]
    write_csv(tmp_path / 'cohort.csv', patients)
    (tmp_path / 'settings.toml').write_text('task = "survival"\n')
    found = results(tmp_path / 'predictions.csv', n_bootstrap=50)
    former = {name: value for name, value in found.items() if name != 'patients'}
    (tmp_path / 'metrics.json').write_text(json.dumps(former | dict(threshold=0.0)))
    assert read_run(tmp_path).results == found
    (tmp_path / 'metrics.json').write_text(json.dumps(found | dict(threshold=0.0)))
    assert 'says threshold 0.0' in refusal(read_run, tmp_path)


# ---- a comparison


def test_what_is_read_of_a_comparison(run, compared):
    comparison = read_comparison(compared, run)
    assert comparison.names == ['mine', 'other']
    assert (comparison.difference.value, comparison.difference.high) == (0.1, 0.2)
    assert [area.value for area in comparison.aucs] == [0.9, 0.8]
    assert comparison.p_values == dict(DeLong='0.03', permutation='–')
    assert len(comparison.labels) == 24


def test_the_test_of_patients_is_called_by_its_variance(run, compared):
    (compared / 'comparison.json').write_text(json.dumps(COMPARED | dict(patients=12)))
    assert [*read_comparison(compared, run).p_values] == [
        "DeLong, with Obuchowski's variance for patients",
        'permutation',
    ]


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
        ('comparison.json', json.dumps(COMPARED | dict(auc=COMPARED['auc'][:1])), 'cannot be read'),
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
