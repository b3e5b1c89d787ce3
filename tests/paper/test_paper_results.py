"Tables and figures of the comparison: drawn from result files, and honest where there are none."

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from notebooks import NBS
from refusals import refusal

from streaming_pathology.evaluation.auc import auc, delong_test
from streaming_pathology.paper.__main__ import runner_of
from streaming_pathology.paper.data import GLEASON
from streaming_pathology.paper.methods import methods_of
from streaming_pathology.paper.plan import PLANS, SMALL, jobs_of, slide_scores
from streaming_pathology.paper.results import (
    NOT_YET,
    base_of,
    compare,
    errors_of,
    figure_3,
    measured_on,
    mosaic_areas,
    mosaic_scores,
    results_in,
    scores_of,
    state_of,
    table_1,
    table_2,
    table_3,
    table_of_baselines,
    table_of_mosaic_differences,
    table_of_mosaic_maps,
    table_of_mosaics,
    table_of_sizes,
)
from streaming_pathology.paper.runner import read_job_result

PLAN = replace(SMALL, name='made', folds=4, seeds=(0, 1), smaller={0.5: (2, 1)})
GRADES = 24 * ['0+0'] + 8 * ['3+3'] + 4 * ['4+4']
IDS = [f's{number:02}' for number in range(36)]
LABELS = [GLEASON[grade] for grade in GRADES]


def write_results(folder, method, strength, plan=PLAN, jobs=None, change=None):
    "Results of jobs whose logits tell the label more or less, each fold on a scale of its own."
    rng = np.random.default_rng(len(method))
    for job in jobs or jobs_of(plan, [method]):
        members = [i for i in range(36) if i % plan.folds == job.fold]
        logits = {IDS[i]: strength * LABELS[i] + rng.standard_normal() for i in members}
        scaled = {slide_id: 10 * job.fold + 3 * logit for slide_id, logit in logits.items()}
        result = dict(
            job=dict(method=method, seed=job.seed, fold=job.fold, share=job.share, size=job.size),
            logits=scaled,
            labels={IDS[i]: LABELS[i] for i in members},
            grades={IDS[i]: GRADES[i] for i in members},
            cpu_seconds=36.0,
            machine=dict(
                date='2026-01-01 00:00+00:00',
                packages=dict(torch='2.0'),
                git_commit='0123456789',
                machine=dict(cpu='a processor', threads=1),
            ),
        )
        if change:
            change(result)
        path = folder / plan.name / f'{job.name}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path):
    "Results of both trained methods and one baseline."
    write_results(tmp_path, 'streaming', 3.0)
    write_results(tmp_path, 'mil', 2.0)
    write_results(tmp_path, 'colour', 0.5)
    return tmp_path


# ---- what is there


def test_a_method_is_measured_when_all_of_its_jobs_are(tmp_path):
    assert state_of(PLAN, 'mil', 1.0, tmp_path) == NOT_YET
    jobs = [job for job in jobs_of(PLAN, ['mil']) if job.share == 1]
    write_results(tmp_path, 'mil', 2.0, jobs=jobs[:-1])
    assert state_of(PLAN, 'mil', 1.0, tmp_path) == f'{NOT_YET} (7 of 8 jobs)'
    assert scores_of(PLAN, 'mil', 1.0, tmp_path) is None
    write_results(tmp_path, 'mil', 2.0, jobs=jobs)
    assert state_of(PLAN, 'mil', 1.0, tmp_path) == ''
    assert state_of(PLAN, 'mil', 0.5, tmp_path) == NOT_YET


def test_scores_are_ranks_of_folds_averaged_over_seeds(folder):
    found = scores_of(PLAN, 'streaming', 1.0, folder)
    results = results_in(PLAN, 'streaming', 1.0, folder)
    expected = slide_scores([result['logits'] for result in results])
    assert found.slide_ids == IDS and found.labels.tolist() == LABELS
    assert found.scores.tolist() == [expected[slide_id] for slide_id in IDS]
    assert found.area.value == auc(LABELS, found.scores)
    assert [*found.by_seed] == [0, 1]
    # scales of folds do not matter to ranks, and spoil pooled logits
    assert auc(found.labels, found.scores) > auc(found.labels, found.logits) + 0.1


def test_results_that_contradict_each_other(folder):
    def turned(result):
        result['labels'] = {slide_id: 1 - label for slide_id, label in result['labels'].items()}

    jobs = [job for job in jobs_of(PLAN, ['mil']) if job.seed == 1]
    write_results(folder, 'mil', 2.0, jobs=jobs, change=turned)
    assert 'has different labels' in refusal(scores_of, PLAN, 'mil', 1.0, folder)


# ---- comparisons


def test_a_comparison_is_the_paired_test(folder):
    first, second = (scores_of(PLAN, name, 1.0, folder) for name in ('streaming', 'mil'))
    found = compare(first, second)
    assert found.test == delong_test(LABELS, first.scores, second.scores)
    assert found.strict.low < found.test.low and found.n == 36
    assert found.bootstrap.low <= found.test.difference <= found.bootstrap.high
    assert compare(first, None) is None


def test_a_baseline_of_all_slides_is_compared_on_those_of_both(folder):
    few, all_slides = (scores_of(PLAN, 'mil', share, folder) for share in (0.5, 1.0))
    assert compare(few, all_slides).n == len(few.slide_ids) == 18


def test_methods_that_were_tested_on_other_slides(folder):
    first = scores_of(PLAN, 'mil', 0.5, folder)
    other = replace(first, slide_ids=[f'x{slide_id}' for slide_id in first.slide_ids])
    assert 'cannot be compared' in refusal(compare, first, other)


# ---- tables


def test_table_1_counts_the_plans_slides():
    rows = table_1(PLANS['real'])
    assert rows[1] == ['all', 123, 91, 24, 8]
    by_name = {row[0]: row[1:] for row in rows[2:]}
    parts = [by_name[name] for name in ('training', 'tuning', 'test')]
    assert [sum(counts) for counts in zip(*parts, strict=True)] == [123, 91, 24, 8]


def test_table_2(folder):
    rows = table_2(PLAN, folder)
    assert [row[0] for row in rows[1:]] == ['100%', '50%']
    assert [row[1] for row in rows[1:]] == [36, 18]
    first = scores_of(PLAN, 'streaming', 1.0, folder)
    assert rows[1][2] == first.area
    assert rows[1][-1] == compare(first, scores_of(PLAN, 'mil', 1.0, folder)).verdict


def test_tables_say_what_is_not_measured(tmp_path):
    write_results(tmp_path, 'mil', 2.0)
    rows = table_2(PLAN, tmp_path)
    assert rows[1][2] == NOT_YET and rows[1][-1] == '–' and rows[1][3] != NOT_YET
    assert table_3(PLAN, tmp_path)[1][1] == NOT_YET
    measured = {row[0]: row[1] for row in table_of_baselines(PLAN, tmp_path)[1:]}
    assert measured.keys() == set(methods_of(PLAN)) and measured['colour'] == NOT_YET
    assert all(row[1] == NOT_YET for row in table_of_mosaics(PLANS['small-mosaics'], tmp_path)[1:])


def test_baselines_stand_beside_what_is_compared(folder):
    rows = {row[0]: row for row in table_of_baselines(PLAN, folder)[1:]}
    streaming = scores_of(PLAN, 'streaming', 1.0, folder)
    colour = scores_of(PLAN, 'colour', 1.0, folder)
    assert rows['colour'][4] == compare(streaming, colour).interval
    assert rows['streaming'][4] == '–' and rows['mil'][4] != '–'
    assert len(rows['colour'][2].split(', ')) == 2


def test_sizes_are_compared_in_the_same_folds(tmp_path):
    larger = replace(PLAN, name='larger', size=256)
    for plan, strength in ((PLAN, 1.0), (larger, 2.0)):
        write_results(tmp_path, 'frozen-max', strength, plan)
    rows = {row[0]: row for row in table_of_sizes(PLAN, larger, tmp_path)}
    assert rows['method'] == ['method', 128, 256, '128 less 256']
    found = [scores_of(plan, 'frozen-max', 1.0, tmp_path) for plan in (PLAN, larger)]
    test = delong_test(found[0].labels, found[0].scores, found[1].scores)
    assert rows['frozen-max'][3].startswith(f'{test.difference:+.3f} ({test.low:+.3f}')
    assert rows['frozen-mean'][1:] == [NOT_YET, NOT_YET, '–']


def test_table_3_counts_errors_at_the_highest_accuracy(folder):
    found = scores_of(PLAN, 'mil', 1.0, folder)
    errors = errors_of(found)
    best = max(
        np.mean((found.scores >= threshold) == (found.labels == 1))
        for threshold in [*found.scores, 2.0]
    )
    assert sum(errors.values()) == round(36 * (1 - best))
    assert table_3(PLAN, folder)[2][1:] == [*errors.values()]


# ---- the figure


def test_figure_3_has_a_curve_for_each_that_is_measured(folder):
    figure = figure_3(PLAN, folder)
    left, right = figure.axes
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert [name.split('\n')[0].split(':')[0][:12] for name in names][0].startswith('streaming')
    assert len(names) == 4 and len(right.get_legend().get_texts()) == 2
    assert not left.texts and not right.texts
    plt.close(figure)


def test_figure_3_says_what_is_not_measured(tmp_path):
    write_results(tmp_path, 'mil', 2.0)
    figure = figure_3(PLAN, tmp_path)
    left, right = figure.axes
    assert 'streaming, 50%' in left.texts[0].get_text()
    assert right.texts[0].get_text() == f'{NOT_YET}:\nstreaming, 100%'
    plt.close(figure)


# ---- mosaics


def test_mosaics_by_share(tmp_path):
    plan = replace(PLANS['small-mosaics'], name='m')
    rng = np.random.default_rng(0)

    def of_mosaics(result):
        names = [
            f'b{result["job"]["fold"]}{base}-{share}-{label}'
            for base in range(6)
            for share in ('0.1', '0.5')
            for label in (0, 1)
        ]
        result['labels'] = {name: int(name[-1]) for name in names}
        result['grades'] = {name: name.split('-')[1] for name in names}
        strength = {'0.1': 0.0, '0.5': 8.0}
        result['logits'] = {
            name: int(name[-1]) * strength[name.split('-')[1]] + rng.standard_normal()
            for name in names
        }

    write_results(tmp_path, 'mil', 1.0, plan, change=of_mosaics)
    areas = mosaic_areas(plan, 'mil', tmp_path)
    assert areas['0.5'].value == 1 and areas['0.1'].value < 0.8
    assert areas['0.1'].method.startswith('clustered')
    assert base_of('0123-abc-0.05-1') == '0123-abc'
    assert mosaic_areas(plan, 'streaming', tmp_path) is None
    pairs = [('streaming', 'mil'), ('mil', 'mil')]
    rows = table_of_mosaic_differences(plan, tmp_path, pairs)
    assert rows[1] == ['streaming less mil', NOT_YET, '–']
    assert rows[2] == ['mil less mil', *2 * ['+0.000 (+0.000 to +0.000)']]
    write_results(tmp_path, 'streaming', 1.0, plan, change=of_mosaics)
    rows = table_of_mosaic_differences(plan, tmp_path, pairs)
    streaming, mil = (
        mosaic_scores(results_in(plan, name, 1.0, tmp_path), '0.1') for name in pairs[0]
    )
    assert streaming.bases == mil.bases and streaming.labels == mil.labels
    test = delong_test(mil.labels, streaming.scores, mil.scores, patient_ids=mil.bases)
    assert rows[1][1] == f'{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f})'


def test_maps_of_mosaics_are_of_all_folds(tmp_path):
    plan = replace(PLANS['small-mosaics'], name='m')

    def with_maps(result):
        of_map = dict(pointing=[1.0, 0.0], auprc=[0.4, 0.6])
        kinds = dict.fromkeys(('trained', 'randomised', 'darkness', 'green'), of_map)
        slides = [f'fold{result["job"]["fold"]}-{number}' for number in range(2)]
        result['maps'] = dict(slides=slides, prevalence=[0.1, 0.3], correlation=[0.2, 0.0], **kinds)

    write_results(tmp_path, 'mil', 1.0, plan, change=with_maps)
    rows = {row[0]: row[1:] for row in table_of_mosaic_maps(plan, tmp_path)}
    assert rows['mil'][:2] == [2 * plan.folds, '50%'] and rows['mil'][2].startswith('0.50 (')
    assert rows['streaming'][0] == NOT_YET
    write_results(tmp_path, 'streaming', 1.0, plan)  # as before maps were judged
    without = {row[0]: row[1:] for row in table_of_mosaic_maps(plan, tmp_path)}
    assert without['streaming'][0] == NOT_YET and without['mil'] == rows['mil']
    assert rows['darkness'][1] == '50%' and rows['prevalence'][2] == '0.20'


# ---- the committed results


def committed():
    return sorted((NBS / 'results/paper').glob('*/**/*.json'))


def test_committed_results_are_of_the_plan():
    "Each names its job, and was made with the settings that the plan has."
    assert committed()
    for path in committed():
        if path.name.startswith('views-') or path.parent.name not in PLANS:
            continue
        result = read_job_result(path)
        plan = PLANS[path.parent.name]
        method = runner_of(plan).methods[result['job']['method']]
        assert result['settings'] == method.settings_in(plan), path
        (job,) = [
            each for each in jobs_of(plan, [result['job']['method']]) if each.name == path.stem
        ]
        assert result['job'] == dict(job.__dict__)
        assert result['machine']['git_commit'] and result['machine']['date'] and result['ended']


def test_committed_results_hold_numbers_only():
    "Nothing of the images is in them: names, numbers, machine; no long text, no path."
    for path in committed():
        text = path.read_text(encoding='utf-8')
        assert '/work' not in text and '/home' not in text and '/tmp' not in text
        assert all(len(word) < 80 for word in texts_in(json.loads(text))), path


def texts_in(value):
    "All names and texts in what a file of JSON holds."
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from texts_in(each)


def test_where_it_was_measured(folder):
    lines = measured_on(PLAN, folder)
    assert lines[0] == '2026-01-01: a processor, 1 threads; torch 2.0; commit 0123456'
    assert lines[-1] == f'{36 * 30 / 3600:.2f} of 0.5 core-hours'
