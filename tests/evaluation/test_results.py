"All metrics of tables of predictions of every task, and what is refused."

import json
import re

import matplotlib
import numpy as np
import pytest
from refusals import refusal

from streaming_pathology.evaluation.auc import INTERVALS, Resampling, auc, percentile_estimate
from streaming_pathology.evaluation.evaluation import operating_point
from streaming_pathology.evaluation.outcomes import class_aucs, kappa
from streaming_pathology.evaluation.results import (
    REPORTED,
    ReportedMetric,
    draw_results,
    effective_patients,
    few_patients,
    figures_of,
    read_outcomes,
    results,
    sentences_of,
    without_width,
)
from streaming_pathology.io import write_csv

matplotlib.use('Agg')


def write_table(path, labels, predicted, split='test'):
    "A table of predictions of some columns."
    n_slides = len(next(iter(labels.values())))
    rows = []
    for number in range(n_slides):
        row = dict(slide_id=f's{number}')
        row |= {name: values[number] for name, values in labels.items()}
        row |= dict(split=split)
        row |= {name: values[number] for name, values in predicted.items()}
        rows.append(row | dict(seconds=1))
    write_csv(path, rows)
    return path


@pytest.fixture
def two_classes(tmp_path):
    "The tables of 200 slides, four of each patient: predictions and manifest."
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    probabilities = 1 / (1 + np.exp(-rng.normal(3 * labels - 1.5, 1.5)))
    predictions, manifest = [], []
    for number in range(200):
        slide = dict(slide_id=f's{number}', label=labels[number])
        split = 'tuning' if number < 80 else 'test'
        predictions.append(slide | dict(split=split, probability=probabilities[number]))
        tumour = probabilities[number] if labels[number] else None
        site = 'ab'[number % 3 == 0]
        manifest.append(slide | dict(patient_id=f'p{number // 4}', site=site, tumour=tumour))
    write_csv(tmp_path / 'p.csv', predictions)
    write_csv(tmp_path / 'manifest.csv', manifest)
    return tmp_path / 'p.csv', tmp_path / 'manifest.csv', labels, probabilities


@pytest.fixture
def other_tasks(tmp_path):
    "A table of each other task: {task: path}."
    rng = np.random.default_rng(0)
    grades, logits = rng.integers(0, 3, 90), rng.normal(0, 1, (90, 3))
    logits[range(90), grades] += 1.5
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    risks = rng.normal(0, 1, 90)
    months = rng.exponential(20 * np.exp(-risks)) + 0.1
    survival = dict(months=months.clip(max=30), event=(months < 30).astype(int))
    several = dict(atypia=[None] * 5 + [0, 1] * 42 + [1], mitoses=[0, 0, 1] * 30)
    columns = dict(
        multiclass=(dict(isup=grades), {f'probability_{k}': shares[:, k] for k in range(3)}),
        survival=(survival, dict(log_risk=risks)),
        multilabel=(several, {f'probability_{name}': rng.random(90) for name in several}),
        regression=(dict(psa=months), dict(predicted_psa=months + risks)),
    )
    return {task: write_table(tmp_path / f'{task}.csv', *each) for task, each in columns.items()}


# ---- what is found


def test_two_classes(two_classes):
    predictions, manifest, labels, probabilities = two_classes
    found = results(
        predictions,
        threshold_split='tuning',
        target_sensitivity=0.95,
        manifest=manifest,
        subgroups=['site', 'tumour'],
        n_bootstrap=200,
    )
    assert json.loads(json.dumps(found)) == found
    assert (found['patients'], found['n'], [*found['groups']]) == (30, 120, ['site', 'tumour'])
    assert abs(found['auc'] - auc(labels[80:], probabilities[80:])) < 1e-5
    names = [*found]
    assert names[names.index('task') :] == [
        'task',
        *REPORTED,
        'calibration',
        'temperature',
        'at_sensitivity',
        'groups',
        'notes',
    ]
    sentences = sentences_of(found)
    assert len(sentences) == 2 + len(REPORTED) + 3 + 2 + 3
    assert 'against all negative slides' in sentences[-1]


def test_the_metrics_that_are_reported(two_classes):
    found = results(two_classes[0], n_bootstrap=50)
    sentences = sentences_of(found)
    for name, metric in REPORTED.items():
        assert found[name]['low'] <= found[name]['value'] <= found[name]['high']
        assert any(sentence.startswith(metric.words) for sentence in sentences)


def balanced_accuracy(labels, probabilities, resampling):
    "A metric of one's own: the mean of sensitivity and specificity at 0.5."
    called = probabilities >= 0.5

    def of_resamples(weights):
        positives, negatives = weights @ labels, weights @ (1 - labels)
        both = (positives > 0) & (negatives > 0)
        sensitivity = weights @ (labels * called) / np.maximum(positives, 1)
        specificity = weights @ ((1 - labels) * ~called) / np.maximum(negatives, 1)
        return np.where(both, (sensitivity + specificity) / 2, np.nan)

    value = of_resamples(np.ones((1, len(labels))))[0]
    return percentile_estimate(value, of_resamples, len(labels), resampling)


def test_a_metric_of_ones_own(two_classes, monkeypatch):
    "Entered into one table, it is in the results and in the sentences, with its interval."
    metric = ReportedMetric('balanced accuracy', balanced_accuracy)
    monkeypatch.setitem(REPORTED, 'balanced_accuracy', metric)
    path, _, labels, probabilities = two_classes
    found = results(path, n_bootstrap=50)
    called = probabilities[80:] >= 0.5
    expected = np.mean([called[labels[80:] == 1].mean(), 1 - called[labels[80:] == 0].mean()])
    assert abs(found['balanced_accuracy']['value'] - expected) < 1e-5
    text = '; '.join(sentences_of(found))
    interval = '{value:.3f} ({low:.3f} to {high:.3f})'.format(**found['balanced_accuracy'])
    assert f'balanced accuracy {interval}' in text


def test_a_file_from_before_a_metric_was_added_has_none(two_classes):
    found = results(two_classes[0], n_bootstrap=50)
    del found['average_precision']
    assert 'average precision' not in '; '.join(sentences_of(found))


@pytest.mark.parametrize('former, task', [('classes', 'multiclass'), ('measure', 'regression')])
def test_tasks_by_their_former_names(other_tasks, former, task):
    found = results(other_tasks[task], n_bootstrap=50)
    assert sentences_of(found | dict(task=former)) == sentences_of(found)


def test_two_classes_without_options(two_classes):
    found = results(two_classes[0], n_bootstrap=50)
    assert found['patients'] is None
    assert found == results(two_classes[0], threshold_split='tuning', n_bootstrap=50)


@pytest.mark.parametrize('task', ['multiclass', 'survival', 'multilabel', 'regression'])
def test_other_tasks(other_tasks, task):
    assert read_outcomes(other_tasks[task]).task == task
    found = results(other_tasks[task], n_bootstrap=100)
    assert found['task'] == task and json.loads(json.dumps(found)) == found
    assert sentences_of(found)


@pytest.mark.parametrize('method', INTERVALS)
def test_intervals_of_classes_are_made_as_the_table_says(other_tasks, method):
    "They were always made of 10,000 resamples with seed 0."
    found = results(other_tasks['multiclass'], n_bootstrap=50, seed=3, method=method)
    outcomes = read_outcomes(other_tasks['multiclass']).of_split('test', {})
    resampling = Resampling(found['draws'], found['seed'])
    expected = class_aucs(outcomes.labels[:, 0], outcomes.predicted, method, resampling)
    for row, estimate in zip(found['classes'], expected):
        assert (row['low'], row['high']) == (estimate.low, estimate.high)


# ---- by which method


def test_the_method_that_made_an_interval_is_written_and_said(two_classes):
    predictions, manifest, *_ = two_classes
    alone = results(predictions, n_bootstrap=50)
    by_patient = results(predictions, manifest=manifest, n_bootstrap=50)
    assert (alone['method'], by_patient['method']) == ('logit', 'clustered_logit')
    assert 'by DeLong on the logit scale)' in sentences_of(alone)[0]
    assert "by Obuchowski's variance on the logit scale)" in sentences_of(by_patient)[0]


def test_the_method_of_perfect_predictions_is_newcombes(few):
    found = results(few, n_bootstrap=20)
    assert found['method'] == 'newcombe'
    assert "by Newcombe's method 5)" in sentences_of(found)[0]


def test_a_file_without_a_method_names_none(few):
    found = results(few, n_bootstrap=20)
    del found['method']
    assert 'AUC 1.000 (0.207 to 1.000), by' in sentences_of(found)[0]


@pytest.mark.parametrize('task', ['multiclass', 'multilabel'])
def test_each_class_and_label_has_the_method_of_its_interval(other_tasks, task):
    found = results(other_tasks[task], n_bootstrap=20)
    rows = found['labels'].values() if task == 'multilabel' else found['classes']
    assert [row['method'] for row in rows] == ['logit'] * len(rows)
    assert 'by DeLong on the logit scale)' in sentences_of(found)[-1]


# ---- classes with and without an order


def beside_settings(path, task):
    (path.parent / 'settings.toml').write_text(f'title = "a run"\ntask = "{task}"\n')


def test_quadratic_kappa_is_only_of_classes_with_an_order(other_tasks):
    path = other_tasks['multiclass']
    ordinal = results(path, n_bootstrap=50, task='ordinal')
    assert (ordinal['task'], ordinal['task_from']) == ('ordinal', 'given')
    assert ordinal['weights'] == 'quadratic' and 'macro_auc' not in ordinal
    assert sentences_of(ordinal)[0].startswith('quadratic kappa')
    found = results(path, n_bootstrap=50, task='multiclass')
    assert (found['task'], found['task_from']) == ('multiclass', 'given')
    said = sentences_of(found)[0]
    assert said.startswith('macro-averaged AUC') and 'unweighted kappa' in said
    assert 'quadratic' not in said and 'assumed' not in said
    outcomes = read_outcomes(path).of_split('test', {})
    labels, called = outcomes.labels[:, 0], outcomes.predicted.argmax(1)
    for each, weights in ((ordinal, 'quadratic'), (found, 'none')):
        expected = kappa(labels, called, weights, 3, Resampling(50))
        assert each['kappa'] == expected.value
    assert (found['kappa_low'], found['kappa_high']) == (expected.low, expected.high)
    areas = [area['auc'] for area in found['classes']]
    assert abs(found['macro_auc'] - np.mean(areas)) < 1e-12
    assert found['low'] < found['macro_auc'] < found['high']


@pytest.mark.parametrize('task', ['ordinal', 'multiclass'])
def test_the_task_is_that_of_the_settings_beside_the_table(other_tasks, task):
    path = other_tasks['multiclass']
    beside_settings(path, task)
    found = results(path, n_bootstrap=20)
    assert (found['task'], found['task_from']) == (task, 'settings.toml')
    assert 'assumed' not in sentences_of(found)[0] and found['notes'] == []


@pytest.mark.parametrize('text', [None, 'task = "survival"', 'title = "x"', 'task = = 1'])
def test_where_the_task_is_not_known_it_is_said_which_was_assumed(other_tasks, text):
    path = other_tasks['multiclass']
    if text is not None:
        (path.parent / 'settings.toml').write_text(text)
    found = results(path, n_bootstrap=20)
    assert (found['task'], found['task_from']) == ('multiclass', 'assumed')
    assert 'it is assumed that the classes have no order' in sentences_of(found)[0]
    assert "results(task='ordinal')" in found['notes'][0]


@pytest.mark.parametrize(
    'task, given', [('multiclass', 'survival'), ('survival', 'ordinal'), ('multiclass', 'grades')]
)
def test_a_task_that_the_table_is_not_of_is_refused(other_tasks, task, given):
    says = refusal(results, other_tasks[task], task=given)
    assert f'{task}.csv is a table of {task}' in says and f'not of {given!r}' in says


def test_former_files_of_classes_have_the_quadratic_kappa(other_tasks):
    former = dict(
        task='classes',
        kappa=0.5,
        low=0.4,
        high=0.6,
        weights='quadratic',
        accuracy=0.75,
        n=90,
        classes=[dict(auc=0.8, low=0.7, high=0.9), None],
    )
    assert sentences_of(former) == [
        'quadratic kappa 0.500 (0.400 to 0.600), 90 slides, accuracy 0.750',
        'class 0 against the rest: AUC 0.800 (0.700 to 0.900)',
    ]


# ---- survival of patients


@pytest.fixture
def survival_by_patient(tmp_path):
    "The tables of 60 patients with five slides each: predictions and manifest."
    rng = np.random.default_rng(0)
    patients = np.arange(60).repeat(5)
    months = rng.exponential(20, 60).clip(0.1, 30)[patients]
    risks = rng.normal(0, 1, 60)[patients] + rng.normal(0, 0.7, 300)
    labels = dict(months=months, event=(months < 30).astype(int))
    path = write_table(tmp_path / 'survival.csv', labels, dict(log_risk=risks))
    rows = [dict(slide_id=f's{number}', patient_id=f'p{number // 5}') for number in range(300)]
    write_csv(tmp_path / 'manifest.csv', rows)
    return path, tmp_path / 'manifest.csv', months, risks


def test_groups_of_risk_are_of_patients(survival_by_patient):
    "One patient is in one group, that of the slide with the highest log risk."
    path, manifest, months, risks = survival_by_patient
    found = results(path, manifest=manifest, n_bootstrap=20)
    highest = risks.reshape(60, 5).max(1)
    assert (found['n'], found['patients'], found['high_risk']) == (300, 60, 30)
    assert found['threshold'] == np.median(highest)
    assert found['events'] == (months[::5] < 30).sum()
    concordance, groups = sentences_of(found)
    assert f'300 slides of 60 patients, of whom {found["events"]} had the event' in concordance
    assert groups.startswith('30 patients of high risk, by the highest log risk')
    assert 'as ill as the worst of the slides' in found['notes'][0]


def test_curves_count_patients(survival_by_patient):
    import matplotlib.pyplot as plt

    path, manifest, *_ = survival_by_patient
    found = results(path, manifest=manifest, n_bootstrap=20)
    _, ax = plt.subplots()
    figures_of(found, path, manifest)['survival'](ax)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    counts = [[int(word) for word in text.split() if word.isdigit()] for text in texts]
    assert [group for group, _ in counts] == [30, 30]
    assert sum(events for _, events in counts) == found['events']
    assert ax.get_legend().get_title().get_text() == f'log-rank p = {found["logrank_p"]:.2g}'
    plt.close(ax.figure)


def test_the_median_is_of_the_patients_of_the_tuning_split(survival_by_patient):
    path, manifest, _, risks = survival_by_patient
    lines = path.read_text().splitlines(True)
    tuned = [line.replace(',test,', ',tuning,') for line in lines[1:101]]
    path.write_text(''.join([lines[0], *tuned, *lines[101:]]))
    found = results(path, threshold_split='tuning', manifest=manifest, n_bootstrap=20)
    highest = risks.reshape(60, 5).max(1)
    assert found['threshold'] == np.median(highest[:20])
    assert found['high_risk'] == (highest[20:] > found['threshold']).sum()
    assert 'the median of the patients of the split tuning' in sentences_of(found)[1]


def test_patients_whose_slides_have_different_outcomes_are_told(survival_by_patient):
    path, manifest, *_ = survival_by_patient
    lines = path.read_text().splitlines(True)
    months = lines[1].split(',')[1]
    path.write_text(''.join(lines).replace(f's0,{months}', 's0,29.5'))
    notes = results(path, manifest=manifest, n_bootstrap=20)['notes']
    assert any('different times or events: 1;' in note for note in notes)


def test_survival_without_patients_counts_slides(other_tasks):
    found = results(other_tasks['survival'], n_bootstrap=20)
    assert found['patients'] is None and found['notes'] == []
    concordance, groups = sentences_of(found)
    assert concordance.endswith(f'90 slides, {found["events"]} events')
    assert groups.startswith('45 slides of high risk, above')


def test_former_files_of_survival_count_slides(other_tasks):
    found = results(other_tasks['survival'], n_bootstrap=20)
    former = {name: value for name, value in found.items() if name != 'patients'}
    assert sentences_of(former) == sentences_of(found)


# ---- intervals that say less than they seem to


def test_an_interval_without_width_has_a_note():
    assert without_width(dict(a=(0.1, 0.2), b=(0.1, 0.3))) == []
    (note,) = without_width({'kappa': (0.8, 0.8), 'b': (0.1, 0.3), 'Brier score': (0.0, 0.0)})
    assert note.endswith('It has none for kappa; Brier score.')


def test_perfect_predictions_have_a_note(few):
    note = next(note for note in results(few, n_bootstrap=20)['notes'] if 'width' in note)
    assert "the AUC by the paper's bootstrap, as the two classes do not overlap" in note
    assert note.endswith('average precision.')


@pytest.mark.parametrize(
    'task, says',
    [('multiclass', 'AUC; kappa'), ('survival', 'the concordance'), ('multilabel', 'bootstrap')],
)
def test_slides_of_one_patient_have_a_note(other_tasks, tmp_path, task, says):
    rows = [dict(slide_id=f's{number}', patient_id='a') for number in range(90)]
    write_csv(tmp_path / 'one.csv', rows)
    notes = results(other_tasks[task], manifest=tmp_path / 'one.csv', n_bootstrap=20)['notes']
    note = next(note for note in notes if 'without width' in note)
    assert says in note


def test_sentences_leave_out_intervals_without_width(few):
    "They would look like certainty."
    text = '; '.join(sentences_of(results(few, n_bootstrap=20)))
    assert "by the paper's bootstrap no interval, as it would have no width" in text
    assert 'average precision 1.000 (no interval, as it would have no width)' in text
    assert '1.000 to 1.000' not in text


@pytest.mark.parametrize('task', ['binary', 'multiclass', 'survival', 'multilabel'])
def test_sentences_leave_out_intervals_of_very_few_patients(
    two_classes, other_tasks, tmp_path, task
):
    paths = dict(other_tasks, binary=two_classes[0])
    rows = [dict(slide_id=f's{number}', patient_id=f'p{number % 4}') for number in range(200)]
    write_csv(tmp_path / 'four.csv', rows)
    found = results(paths[task], manifest=tmp_path / 'four.csv', n_bootstrap=20)
    text = '; '.join(sentences_of(found))
    assert 'no interval, as it would be of 4 patients only' in text
    assert not re.search(r'\(\d\.\d+ to ', text)


def test_intervals_with_a_width_have_no_note(two_classes, other_tasks):
    predictions, manifest, *_ = two_classes
    assert results(predictions, manifest=manifest, n_bootstrap=50)['notes'] == []
    assert results(other_tasks['survival'], n_bootstrap=50)['notes'] == []


def test_few_and_unequal_patients_are_told():
    assert effective_patients(np.arange(60) // 4) == 15
    unequal = np.r_[np.zeros(40, int), np.arange(1, 31)]
    assert abs(effective_patients(unequal) - 70**2 / (40**2 + 30)) < 1e-12
    every = np.ones(70, bool)
    (note,) = few_patients(unequal, {'positive slides': every})
    assert '70 positive slides: 31, one of whom has 57% of them' in note
    assert few_patients(np.arange(70), {'slides': every}) == []
    assert few_patients(None, {'slides': every[:3]}) == []


def test_few_patients_are_told_with_their_class(two_classes, tmp_path):
    "The positive slides of the test split are of five patients, the negative ones of sixty."
    path, _, labels, _ = two_classes
    rows = []
    for number in range(200):
        patient = f'p{number % 10}' if labels[number] else f'n{number}'
        rows.append(dict(slide_id=f's{number}', patient_id=patient))
    write_csv(tmp_path / 'few.csv', rows)
    (note,) = results(path, manifest=tmp_path / 'few.csv', n_bootstrap=50)['notes']
    assert 'patients of the 60 positive slides: 5, one of whom has 20% of them' in note
    assert 'negative' not in note


def test_no_temperature_where_all_slides_are_right(tmp_path):
    path = tmp_path / 'easy.csv'
    path.write_text(
        'slide_id,label,split,probability\na,0,tuning,.1\nb,1,tuning,.9\nc,0,test,.2\nd,1,test,.4\n'
    )
    found = results(path, threshold_split='tuning', n_bootstrap=20)
    assert 'right side' in found['notes'][0]


# ---- where the threshold is chosen


def test_thresholds_are_chosen_on_the_tuning_slides_if_the_table_has_them(two_classes):
    "Those of the evaluated slides would be optimistic."
    found = results(two_classes[0], n_bootstrap=20)
    _, _, labels, probabilities = two_classes
    tuning = operating_point(labels[:80], probabilities[:80])
    assert found['threshold_from'] == 'tuning'
    assert abs(found['threshold'] - tuning.threshold) < 1e-5
    assert found['temperature']['chosen_on'] == 'tuning'
    assert not any('optimistic' in note for note in found['notes'])


@pytest.mark.parametrize(
    'tuning', ['', 'c,0,tuning,.3\nd,0,tuning,.2\n', 'c,0,tuning,.3\nd,,tuning,.2\n']
)
def test_thresholds_of_the_slides_evaluated_are_told_as_optimistic(tmp_path, tuning):
    "Without tuning slides of both classes there are no others to choose them on."
    path = tmp_path / 'p.csv'
    path.write_text(f'slide_id,label,split,probability\na,0,test,.1\nb,1,test,.8\n{tuning}')
    found = results(path, n_bootstrap=20)
    assert found['threshold_from'] == 'test' and 'temperature' not in found
    (note,) = [note for note in found['notes'] if 'optimistic' in note]
    assert "'test'" in note and '--threshold-split' in note


@pytest.mark.parametrize('split', ['test', 'tuning'])
def test_a_split_that_chooses_its_own_threshold_is_told_as_optimistic(two_classes, split):
    found = results(two_classes[0], split, threshold_split=split, n_bootstrap=20)
    assert found['threshold_from'] == split and 'temperature' not in found
    assert any('optimistic' in note for note in found['notes'])


def test_the_median_risk_is_that_of_the_slides_evaluated(tmp_path):
    "It does not depend on their outcomes, so it is not optimistic."
    rows = [
        dict(slide_id=f's{number}', months=number + 1, event=1, split=split, log_risk=number)
        for number, split in enumerate(['tuning', 'test'] * 10)
    ]
    write_csv(tmp_path / 'p.csv', rows)
    found = results(tmp_path / 'p.csv', n_bootstrap=20)
    assert found['threshold_from'] == 'test'
    assert not any('optimistic' in note for note in found['notes'])


# ---- patients

FEW = (
    'slide_id,label,split,probability\n'
    'a,0,test,.1\nb,1,test,.8\nc,0,tuning,.3\nd,1,tuning,.2\ne,,test,.9\n'
)


@pytest.fixture
def few(tmp_path):
    path = tmp_path / 'few.csv'
    path.write_text(FEW)
    return path


def test_slides_without_a_label_do_not_count(few):
    found = results(few, n_bootstrap=20)
    assert (found['auc'], found['n']) == (1.0, 2)
    assert found['patients'] is None


def test_patients_are_those_of_the_run(few, tmp_path):
    (tmp_path / 'cohort.csv').write_text(
        'slide_id,patient_id,split\na,1,test\nb,1,test\nc,2,tuning\n'
    )
    assert results(few, n_bootstrap=20)['patients'] == 1
    assert results(few, 'tuning', n_bootstrap=20)['patients'] is None


def test_patients_are_those_of_the_run_where_a_manifest_names_none(few, tmp_path):
    (tmp_path / 'cohort.csv').write_text('slide_id,patient_id\na,1\nb,1\n')
    sites = tmp_path / 'sites.csv'
    sites.write_text('slide_id,site\n' + ''.join(f'{name},x\n' for name in 'abcde'))
    assert results(few, n_bootstrap=20, manifest=sites, subgroups=['site'])['patients'] == 1


def test_patients_of_a_manifest_that_is_not_there(few, tmp_path):
    says = refusal(results, few, manifest=tmp_path / 'none.csv')
    assert 'none.csv does not exist' in says


# ---- what is refused


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('slide_id,label,split,p\na,0,test,.1\n', 'no table of predictions'),
        ('slide_id,split\n', 'has no rows'),
        (
            'slide_id,isup,split,probability_0,probability_1\na,x,test,.1,.9\n',
            "isup 'x' is no number",
        ),
        ('slide_id,isup,split,probability_0,probability_1\na,1,test,,.9\n', 'probability_0'),
        (
            'slide_id,isup,split,probability_0,probability_1\na,1,test,.1,.9\na,0,test,.1,.9\n',
            'more than once',
        ),
        ('slide_id,isup,split,probability_0,probability_1\na,,test,.1,.9\n', 'no labelled slide'),
        ('slide_id,isup,split,probability_0,probability_1\na,1,test,.1,7\n', 'between 0 and 1'),
        ('slide_id,isup,split,probability_0,probability_1\na,1.7,test,.1,.9\n', '1.7'),
        ('slide_id,label,split,probability\na,0,test,.1\nb,0,test,.9\n', 'both classes'),
        ('slide_id,label,split,probability\na,1,tuning,.5\n', 'no labelled slide'),
        ('slide_id,label,split,probability\na,,test,.5\n', 'no labelled slide'),
        ('slide_id,label,split,probability\na,1,test,nan\n', "probability 'nan' is no number"),
        (
            'split,probability_0,probability_1,grade,slide_id\ntest,.1,.9,1,a\n',
            'no table of predictions',
        ),
        ('slide_id,split,time,event,log_risk\na,test,1,1,2\n', 'no table of predictions'),
        ('slide_id,split\na,test\n', 'no table of predictions'),
        ('slide_id,time,split,log_risk\na,3,test,1\n', 'no table of predictions'),
    ],
)
def test_mistakes_in_a_table_are_told_with_its_name(tmp_path, text, says):
    path = tmp_path / 'x.csv'
    path.write_text(text)
    found = refusal(results, path, n_bootstrap=20)
    assert says in found and 'x.csv' in found


def test_a_table_that_is_not_there(tmp_path):
    assert 'does not exist' in refusal(results, tmp_path / 'none.csv')


def test_impossible_levels_are_told_with_the_name_of_the_table(few):
    says = refusal(results, few, confidence=95)
    assert "few.csv, split 'test': level 95" in says


def test_subgroups_need_a_cohort(two_classes):
    says = refusal(results, two_classes[0], subgroups=['site'], n_bootstrap=20)
    assert 'cohort.csv does not exist' in says


@pytest.mark.parametrize('column', ['site', 'grade'])
def test_a_cohort_needs_all_slides(two_classes, tmp_path, column):
    write_csv(tmp_path / 'other.csv', [dict(slide_id='s0', site='a')])
    options = dict(manifest=tmp_path / 'other.csv', subgroups=[column], n_bootstrap=20)
    assert 'no row of 199' in refusal(results, two_classes[0], **options)


def test_a_column_that_says_nothing(two_classes, tmp_path):
    write_csv(tmp_path / 'other.csv', [dict(slide_id=f's{k}', site=None) for k in range(200)])
    options = dict(manifest=tmp_path / 'other.csv', subgroups=['site'], n_bootstrap=20)
    assert "says nothing in 'site'" in refusal(results, two_classes[0], **options)


def test_slides_that_are_in_no_subgroup_are_told(two_classes, tmp_path):
    predictions, manifest, labels, _ = two_classes
    rows = [
        dict(slide_id=f's{k}', site=None if k % 4 == 1 else 'a', stage=None) for k in range(200)
    ]
    for row, label in zip(rows, labels, strict=True):
        row['stage'] = 'I' if label else None
    rows[81]['stage'] = None
    write_csv(tmp_path / 'other.csv', rows)
    options = dict(manifest=tmp_path / 'other.csv', subgroups=['site', 'stage'], n_bootstrap=20)
    notes = results(predictions, **options)['notes']
    told = [note for note in notes if 'subgroups' in note]
    assert told == [
        "30 of 120 slides have nothing in 'site' and are in none of its subgroups ('s81' is the "
        'first).',
        "1 of 120 slides have nothing in 'stage' and are in none of its subgroups ('s81' is the "
        'first).',
    ]
    assert not [
        note
        for note in results(
            predictions, manifest=manifest, subgroups=['site', 'tumour'], n_bootstrap=20
        )['notes']
        if 'subgroups' in note
    ]


def test_patients_that_contradict_themselves(two_classes, tmp_path):
    rows = [dict(slide_id=f's{number // 2}', patient_id=number) for number in range(400)]
    write_csv(tmp_path / 'twice.csv', rows)
    says = refusal(results, two_classes[0], manifest=tmp_path / 'twice.csv', n_bootstrap=20)
    assert "has the patient_id '1' here" in says


@pytest.mark.parametrize(
    ('task', 'option', 'flag'),
    [
        ('multiclass', dict(subgroups=['site']), '--subgroups'),
        ('multiclass', dict(target_sensitivity=0.9), '--target-sensitivity'),
        ('multilabel', dict(threshold_split='tuning'), '--threshold-split'),
        ('survival', dict(method='bca'), '--interval'),
        ('regression', dict(method='bca'), '--interval'),
    ],
)
def test_options_of_two_classes_are_refused_for_other_tasks(other_tasks, task, option, flag):
    "By the name of the command line, and by that of Python."
    says = refusal(results, other_tasks[task], **option)
    assert f'{flag} ({[*option][0]}) does not apply' in says
    assert task in says


@pytest.mark.parametrize(
    ('task', 'option'),
    [
        ('multiclass', dict(method='bca')),
        ('multilabel', dict(method='delong')),
        ('survival', dict(threshold_split='test')),
    ],
)
def test_options_that_other_tasks_have_too(other_tasks, task, option):
    assert results(other_tasks[task], n_bootstrap=20, **option)['task'] == task


# ---- figures


def test_figures(two_classes, other_tasks):
    import matplotlib.pyplot as plt

    predictions, manifest, *_ = two_classes
    found = results(predictions, subgroups=['site'], manifest=manifest, n_bootstrap=20)
    figures = figures_of(found, predictions, manifest)
    assert [*figures] == ['roc', 'precision_recall', 'reliability', 'groups_site']
    for task, names in dict(
        multiclass=['confusion'], survival=['survival'], multilabel=[], regression=[]
    ).items():
        path = other_tasks[task]
        more = figures_of(results(path, n_bootstrap=20), path)
        assert [*more] == names
        figures |= more
    for draw in figures.values():
        _, ax = plt.subplots()
        assert draw(ax) is ax
        plt.close(ax.figure)


def test_figures_whose_names_clash_have_files_of_their_own(tmp_path, monkeypatch):
    drawn = []
    titles = ['a b', 'a_b', 'a_b_2', 'a-b']
    figures = {title: lambda ax, title=title: drawn.append(title) for title in titles}
    monkeypatch.setattr('streaming_pathology.evaluation.results.figures_of', lambda *args: figures)
    names = draw_results({}, tmp_path / 'p.csv', tmp_path)
    assert len(set(names)) == 4 == len(list(tmp_path.glob('*.svg'))) and drawn == titles
