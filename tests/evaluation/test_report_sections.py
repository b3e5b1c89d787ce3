"The sections of a report that are about all slides together."

import shutil
from dataclasses import replace

import numpy as np
import pytest
from refusals import refusal
from reports import Page

from streaming_pathology.evaluation.auc import Estimate
from streaming_pathology.evaluation.evaluation import Prediction
from streaming_pathology.evaluation.report_inputs import FinishedRun, read_run, without_names
from streaming_pathology.evaluation.report_sections import (
    CODE,
    calibration_section,
    cohort_table,
    curves_uri,
    facts_of,
    flattened,
    flow_table,
    group_row,
    guessing_in_words,
    made_section,
    main_metric,
    memory_in_words,
    prediction_section,
    result_section,
    training_section,
    verdict_of,
)
from streaming_pathology.evaluation.results import REPORTED, results
from streaming_pathology.evaluation.subgroups import Subgroup
from streaming_pathology.io import write_csv


@pytest.fixture(scope='module')
def run(toy):
    return read_run(toy)


def page_of(section):
    (contents,) = section.contents
    return Page(str(contents))


def rows_of(table):
    "The texts of a table, a list for each row of its body."
    rows = []
    for row in str(table).partition('<tbody>')[2].split('<tr>')[1:]:
        page = Page(f'<tr>{row.partition("</tr>")[0]}</tr>')
        rows.append([text for text in page.texts if text.strip()])
    return rows


# ---- result


def test_result_has_the_auc_on_a_line(run):
    page = page_of(result_section(run))
    for text in ('0.5, guessing', run.metrics.estimate.interval, 'Synthetic cohort.', '911 MB'):
        assert text in page.text
    assert f'{run.metrics.auc:.3f}' in page.texts
    assert len(page.all('img')) == 1


@pytest.mark.parametrize(
    'probabilities, says',
    [([0.1, 0.2, 0.8, 0.9], 'do not overlap'), ([0.1, 0.9, 0.2, 0.8], 'from guessing')],
)
def test_result_warns(run, tmp_path, probabilities, says):
    assert says not in page_of(result_section(run)).text
    path = tmp_path / 'predictions.csv'
    rows = [
        dict(slide_id=number, label=number // 2, split='test', probability=value, seconds=None)
        for number, value in enumerate(probabilities)
    ]
    write_csv(path, rows)
    other = replace(run, results=results(path, n_bootstrap=100))
    assert says in page_of(result_section(other)).text


@pytest.mark.parametrize(
    'low, high, says',
    [
        (0.4, 0.6, 'cannot be told from guessing'),
        (0.5, 0.9, 'cannot be told from guessing'),
        (0.2, 0.5, 'cannot be told from guessing'),
        (0.045, 0.214, 'are the labels the right way round?'),
    ],
)
def test_what_an_interval_says_about_guessing(low, high, says):
    assert says in guessing_in_words(low, high).lower()


def test_an_interval_above_guessing_says_nothing_about_it():
    assert guessing_in_words(0.501, 0.9) is None


def result_of(run, folder, labels, probabilities, patients=None):
    "The page of the result of other predictions."
    path = folder / 'predictions.csv'
    rows = [
        dict(slide_id=f's{number}', label=label, split='test', probability=value, seconds=None)
        for number, (label, value) in enumerate(zip(labels, probabilities, strict=True))
    ]
    write_csv(path, rows)
    manifest = None
    if patients is not None:
        manifest = folder / 'patients.csv'
        ids = [dict(slide_id=f's{number}', patient_id=each) for number, each in enumerate(patients)]
        write_csv(manifest, ids)
    found = results(path, n_bootstrap=100, manifest=manifest)
    return page_of(result_section(replace(run, results=found)))


@pytest.mark.parametrize(
    'sign, says, does_not',
    [
        (0, 'cannot be told from guessing', 'right way round'),
        (-1, 'right way round', 'told from guessing'),
        (1, 'The interval is by', 'right way round'),
    ],
)
def test_result_says_what_the_interval_says_about_guessing(run, tmp_path, sign, says, does_not):
    labels = np.arange(60) % 2
    probabilities = 0.5 + sign * 0.2 * (labels - 0.5) + np.tile([-0.1, -0.1, 0, 0, 0.2, 0.2], 10)
    text = result_of(run, tmp_path, labels, probabilities).text
    assert says in text and does_not not in text


def test_result_names_the_method_that_made_the_interval(run, tmp_path):
    labels, mixed = np.arange(60) % 2, np.random.default_rng(0).random(60)
    plain = result_of(run, tmp_path, labels, mixed).text
    assert 'The interval is by DeLong on the logit scale; the paper’s' in plain
    apart = result_of(run, tmp_path, labels, 0.4 * labels + 0.3 * mixed).text
    assert "The interval is by Newcombe's method 5, as these slides give no error" in apart
    by_patient = result_of(run, tmp_path, labels, mixed, np.arange(60) // 2).text
    assert "is by Obuchowski's variance on the logit scale; the paper’s" in by_patient


def test_result_says_that_the_auc_is_of_slides(run, tmp_path):
    labels, mixed = np.arange(60) % 2, np.random.default_rng(0).random(60)
    text = result_of(run, tmp_path, labels, mixed, np.arange(60) // 2).text
    assert '30 negative, of 30 patients. The AUC is of slides' in text
    assert (
        'taken as alike in its interval' in text and 'bootstrap resamples of the patients' in text
    )
    assert 'as one each' not in text
    alone = result_of(run, tmp_path, labels, mixed).text
    assert 'The AUC is of slides' not in alone and 'of the patients' not in alone


def test_result_says_that_patients_are_few(run, tmp_path):
    labels, mixed = np.arange(60) % 2, np.random.default_rng(0).random(60)
    text = result_of(run, tmp_path, labels, mixed, np.arange(60) // 10).text
    assert 'patients of the 30 positive slides: 6, one of whom has 17% of them' in text


def test_result_leaves_out_intervals_of_very_few_patients(run, tmp_path):
    labels, mixed = np.arange(60) % 2, np.random.default_rng(0).random(60)
    page = result_of(run, tmp_path, labels, mixed, np.arange(60) // 20)
    assert 'no interval, as it would be of 3 patients only' in page.text
    assert '95% interval' not in page.text and 'guessing.' not in page.text
    assert not [each for each in page.all('span') if each.get('class') == 'span']


def test_a_note_on_calibration_stands_there_only(run):
    notes = ['No temperature: all slides are on the right side.', 'Intervals may be too narrow.']
    other = replace(run, results=run.results | dict(notes=notes))
    assert 'too narrow' in page_of(result_section(other)).text
    assert 'No temperature' not in page_of(result_section(other)).text
    calibration = page_of(calibration_section(other.results, other.figures)).text
    assert 'No temperature' in calibration and 'too narrow' not in calibration


def test_result_without_metrics_says_why(run):
    other = replace(run, results=None, notes=dict(metrics='No AUC: <too few>.'), settings={})
    text = page_of(result_section(other)).text
    assert 'No AUC: <too few>.' in text
    assert 'Synthetic' not in text


def test_facts_have_the_metrics_that_are_reported(run):
    facts = {fact.name: fact for fact in facts_of(run)}
    for name, metric in REPORTED.items():
        found = run.results[name]
        assert facts[metric.words].value == f'{found["value"]:.3f}'
        assert facts[metric.words].interval == f'{found["low"]:.3f} to {found["high"]:.3f}'


def test_the_main_metric_of_another_task_has_its_interval(run, tmp_path):
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 2, 40)
    probabilities = 0.4 * grades + 0.6 * rng.random(40)
    rows = [
        dict(slide_id=f's{number}', grade=grade, split='test', probability_0=1 - p, probability_1=p)
        for number, (grade, p) in enumerate(zip(grades, probabilities, strict=True))
    ]
    write_csv(tmp_path / 'predictions.csv', rows)
    found = results(tmp_path / 'predictions.csv', n_bootstrap=100, task='ordinal')
    page = page_of(result_section(replace(run, results=found, settings={}, figures={})))
    assert f'{found["kappa"]:.3f}' in page.texts
    assert f'95% interval {found["low"]:.3f}–{found["high"]:.3f}' in page.texts
    assert 'Quadratic kappa' in page.text
    found = results(tmp_path / 'predictions.csv', n_bootstrap=100)
    page = page_of(result_section(replace(run, results=found, settings={}, figures={})))
    assert f'{found["macro_auc"]:.3f}' in page.texts
    assert f'95% interval {found["low"]:.3f}–{found["high"]:.3f}' in page.texts
    assert 'Macro-averaged AUC' in page.text and 'Quadratic' not in page.text
    assert 'it is assumed that the classes have no order' in page.text


def test_the_main_metric_of_regression_has_no_interval(run):
    found = dict(task='regression', mean_absolute_error=0.25)
    assert main_metric(found) == ('Mean absolute error', '0.250', '')


@pytest.mark.parametrize('megabytes, text', [(911, '911 MB'), (999.4, '999 MB'), (2345, '2.35 GB')])
def test_memory_in_words(megabytes, text):
    assert memory_in_words(megabytes) == text


def test_calibration_in_words(run):
    page = page_of(calibration_section(run.results, run.figures))
    assert 'Brier score' in page.text
    alts = [image['alt'] for image in page.all('img')]
    assert 'Brier score' in alts[0] and 'average precision' in alts[1]


def test_a_row_for_each_subgroup():
    share = Estimate(0.5, 0.25, 0.75)
    all_there = Subgroup('a', 9, 4, False, Estimate(0.9, 0.8, 0.95), share, share)
    assert group_row(all_there) == (
        'a',
        9,
        4,
        '0.900 (0.800 to 0.950)',
        '50% (25% to 75%)',
        '50% (25% to 75%)',
    )
    of_tumours = replace(all_there, against_all=True, specificity=None)
    assert group_row(of_tumours)[3] == '0.900 (0.800 to 0.950) against all negative slides'
    assert group_row(of_tumours)[5] is None
    assert group_row(replace(all_there, auc=None))[3] == 'one class'


# ---- training


def test_curves_of_columns_that_are_there(run):
    assert curves_uri(run, ('train_loss', 'tuning_loss'), 'loss')
    assert curves_uri(run, ('no_such',), '') is None


def test_training_without_what_is_missing(run):
    log = [dict(epoch=0, train_loss=0.5)]
    page = page_of(training_section(replace(run, log=log)))
    assert 'After 1 epoch: training loss 0.500.' in page.text
    assert len(page.all('img')) == 1


def test_training_without_epochs(run):
    page = page_of(training_section(replace(run, log=[])))
    assert 'no epochs yet' in page.text and not page.all('img')


# ---- predictions


@pytest.mark.parametrize(
    'label, probability, threshold, text, kind',
    [
        (1.0, 0.7, None, '', ''),
        (1.0, 0.7, 0.7, 'right', 'right'),
        (0.0, 0.7, 0.7, 'false positive', 'wrong'),
        (1.0, 0.6, 0.7, 'false negative', 'wrong'),
        (None, 0.7, 0.7, 'called positive', ''),
        (None, 0.6, 0.7, 'called negative', ''),
    ],
)
def test_verdicts(label, probability, threshold, text, kind):
    assert verdict_of(Prediction('a', label, 'test', probability), threshold) == (text, kind)


def test_predictions_fold_where_there_are_many(run):
    few = page_of(prediction_section(run))
    many = page_of(prediction_section(replace(run, predictions=run.predictions * 3)))
    assert 'open' in few.all('details')[0] and 'open' not in many.all('details')[0]
    assert '75 predictions' in many.text


# ---- how it was made


def test_nested_values_as_rows():
    values = dict(a=1, b=dict(c=2, d=[3, 4], e=dict(f=None)))
    assert [*flattened(values)] == [('a', 1), ('b · c', 2), ('b · d', '3, 4'), ('b · e · f', None)]


def test_slides_by_split(run):
    assert rows_of(cohort_table(run)) == [
        ['train', '24', '24', '0', '30'],
        ['tuning', '6', '6', '0', '12'],
        ['test', '12', '12', '1', '25'],
    ]


def test_from_the_manifest_to_the_metrics(run):
    assert rows_of(flow_table(run)) == [
        ['in the manifest', '85'],
        ['left out: to learn from', '48'],
        ['left out: to choose epochs and thresholds by', '12'],
        ['left out: no label', '1'],
        ['evaluated, split test', '24'],
    ]


def test_slides_that_cannot_be_used_are_among_those_of_the_manifest(toy, tmp_path):
    "The training left them out, so they are not in cohort.csv; a report without names counts them."
    folder = shutil.copytree(toy, tmp_path / 'run')
    with open(folder / 'settings.toml', 'a') as file:
        file.write('left_out = ["damaged", "fluor"]\n')
    run = read_run(folder)
    for shown in (run, without_names(run, [])):
        rows = rows_of(flow_table(shown))
        assert rows[:2] == [
            ['in the manifest', '87'],
            ['left out: cannot be read or has no tissue', '2'],
        ]
        assert 87 == 2 + sum(int(count) for _, count in rows[2:])
    assert 'damaged' not in str(made_section(without_names(run, [])))


def test_slides_beside_the_manifest_and_of_other_splits(run):
    cohort = [row for row in run.cohort if row['slide_id'] != 'biopsy_000']
    cohort += [dict(slide_id='more', label='', split=''), dict(slide_id='b', label='', split='b')]
    rows = rows_of(flow_table(replace(run, cohort=cohort)))
    assert ['left out: no prediction, split none', '1'] in rows
    assert ['left out: no prediction, split b', '1'] in rows
    assert ['predicted, but in no manifest', '1'] in rows


def test_order_of_splits_is_always_the_same(run):
    "train, tuning and test first, then others by their names: a set has another order each time."
    splits = ['z', 'b', '', 'test', 'y', 'a', 'tuning', 'x', 'train', 'c']
    cohort = [dict(slide_id=split, label='', split=split) for split in splits]
    rows = rows_of(cohort_table(replace(run, cohort=cohort)))
    order = ['train', 'tuning', 'test', 'a', 'b', 'c', 'none', 'x', 'y', 'z']
    assert [split for split, *_ in rows] == order


@pytest.mark.parametrize('label', ['x', '2'])
def test_labels_of_a_cohort_are_checked(run, label):
    cohort = [dict(slide_id='a', label=label, split='test')]
    assert 'cohort.csv: a label is not 0' in refusal(cohort_table, replace(run, cohort=cohort))


def test_what_is_missing_is_said(tmp_path):
    notes = {'cohort.csv': 'There is no <cohort>.'}
    page = page_of(made_section(FinishedRun(tmp_path, {}, [], notes=notes)))
    assert 'There is no <cohort>.' in page.text
    assert page.all('a') == [dict(href=CODE, rel='noreferrer')]
