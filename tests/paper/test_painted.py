"Experiments on painted cohorts: what is painted, that darkness does not tell it, methods, maps, and what is said of results."

import json
from dataclasses import replace
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
from refusals import refusal

from streaming_pathology.evaluation.auc import auc, delong_test
from streaming_pathology.mil.bags import PatchGrid
from streaming_pathology.paper.__main__ import ALL_PLANS, asked_jobs, main
from streaming_pathology.paper.data import ImageBags
from streaming_pathology.paper.painted import (
    COVERAGE_PLAN,
    DARKNESS,
    FULL_PLANS,
    LABELS_PLAN,
    LARGER_PLAN,
    SMALL_COVERAGE,
    SMALL_LABELS,
    SMALL_PLANS,
    SMALL_SPACING,
    Cohort,
    PaintedPlan,
    check_darkness,
    darkness,
    painted_jobs,
    split_by_case,
    truth_of,
)
from streaming_pathology.paper.painted_jobs import (
    PAINTED_METHODS,
    PaintedRunner,
    painted_estimate,
    planned_split,
)
from streaming_pathology.paper.painted_results import (
    NO_JOB,
    area_of,
    plot_methods,
    table_of_darkness,
    table_of_maps,
    table_of_methods,
)
from streaming_pathology.paper.plan import Job
from streaming_pathology.paper.results import NOT_YET
from streaming_pathology.paper.runner import Clock, read_job_result
from streaming_pathology.slides.synthetic import LABELS

TINY = replace(SMALL_LABELS, name='tiny', labels=('tumour',), mapped=0, frozen_epochs=2)


@pytest.fixture(scope='module')
def small(once):
    "The folder of results of all small plans, run by the command."

    def run(folder):
        for plan in SMALL_PLANS:
            paths = ['--work', str(folder / 'work'), '--out', str(folder / 'out')]
            assert main(['run', plan.name, *paths]) == 0

    return once('small-painted', run) / 'out'


@pytest.fixture
def make(tmp_path):
    "A runner in a folder of the test, and what it has said."

    def made(plan=TINY, name='a', **options):
        said = []
        folder = tmp_path / name
        runner = PaintedRunner(plan, None, folder / 'work', folder / 'out', said.append, **options)
        runner.said = said
        return runner

    return made


def job(method, plan=TINY):
    return next(each for each in painted_jobs(plan, [method]))


# ---- plans


def test_full_plans_are_as_the_small_ones_and_keep_to_their_budgets():
    assert [plan.budget_hours for plan in FULL_PLANS] == [2.2, 0.9, 0.5, 0.6]
    assert LARGER_PLAN == replace(
        COVERAGE_PLAN,
        name='painted-coverage-larger',
        labels=('tumour',),
        areas={'tumour': (0.05, 0.6)},
        methods=COVERAGE_PLAN.methods[:5],
        frozen_epochs=30,
        budget_hours=0.5,
    )
    first = [plan for plan in FULL_PLANS if plan is not LARGER_PLAN]
    for full, little in zip(first, SMALL_PLANS, strict=True):
        assert little.name == f'small-{full.name}'
        assert {*little.methods} <= {*full.methods} <= {*PAINTED_METHODS}
        assert ALL_PLANS[full.name] is full
    assert LABELS_PLAN.labels == LABELS
    assert len(asked_jobs(LABELS_PLAN, None)) == 4 * len(LABELS_PLAN.methods)


def test_every_method_has_the_same_slides_and_a_file_of_its_own():
    jobs = painted_jobs(LABELS_PLAN)
    assert len({each.name for each in jobs}) == len(jobs)
    cohorts = {Cohort(LABELS_PLAN, each.label, each.spacing, each.seed).checksum for each in jobs}
    assert len(cohorts) == 4


@pytest.mark.parametrize(
    'changes, says',
    [
        (dict(labels=('tumor',)), "no label 'tumor'"),
        (dict(labels=('share',), areas={}), "areas has no shares of tumour for the label 'share'"),
        (dict(spacings=(3.0,)), 'whole number of pixels at a spacing of 3'),
        (dict(spacings=(0.0,)), 'whole number of pixels'),
    ],
)
def test_plans_that_are_refused(changes, says):
    assert says in refusal(PaintedPlan, **changes)


# ---- cohorts


def test_the_same_slides_at_several_spacings(tmp_path):
    parts = []
    for spacing in SMALL_SPACING.spacings:
        cohort = Cohort(replace(SMALL_SPACING, slides=8), 'tumour', spacing, 0)
        cases = cohort.paint(tmp_path / f'{spacing:g}')
        shares = [(truth_of(case) >= 3).mean() / (truth_of(case) > 0).mean() for case in cases]
        parts.append(([(case.slide_id, case.label, case.split) for case in cases], shares))
        assert truth_of(cases[0]).shape == 2 * (cohort.plan_at.size,)
    assert parts[0][0] == parts[1][0]
    np.testing.assert_allclose(parts[0][1], parts[1][1], atol=0.02)


def test_darkness_does_not_find_tumour_in_the_small_plans(small):
    found = [*small.glob('*/cohorts-*.json')]
    assert len(found) == 5
    for path in found:
        cohort = json.loads(path.read_text())
        assert DARKNESS[0] <= cohort['darkness']['all'] <= DARKNESS[1]
        assert cohort['settings']['look'] == 'matched' and cohort['machine']['git_commit']


def test_darkness_is_measured_over_places(tmp_path):
    cases = split_by_case(Cohort(TINY, 'tumour', 8.0, 2).paint(tmp_path)).test
    found = darkness(cases, 8)
    assert found['tumour'] < found['places']
    assert 'no slide has places with tumour and without' in refusal(
        darkness, [case for case in cases if not case.label], 8
    )
    assert 'darkness finds tumour with an AUC of 0.700' in refusal(
        check_darkness, found | {'all': 0.7}, 'x'
    )


def test_a_cohort_that_darkness_tells_is_refused(make):
    runner = make()
    with mock.patch('streaming_pathology.paper.painted.DARKNESS', (0.9, 1.0)):
        assert 'darkness finds tumour' in refusal(runner.run, [job('streaming')])
    assert not [*runner.out.glob('*')] and runner.spent() > 0


# ---- jobs


def test_the_small_plans_end_to_end(small):
    for plan in SMALL_PLANS:
        for each in painted_jobs(plan):
            result = read_job_result(small / plan.name / f'{each.name}.json')
            assert len(result['logits']) == result['slides']['test'] == 20
            assert result['labels'].keys() == result['logits'].keys()
            assert result['starts'] == 1 and result['machine']['packages']['torch']
            assert result['settings']['size'] == round(plan.side_um / each.spacing)
            parts = [row['part'] for row in result['history']]
            assert parts == ['frozen'] + (['whole'] if plan.epochs else [])
            assert ('maps' in result) == (plan.mapped > 0 and each.label == 'tumour')


def test_a_job_that_is_done_is_not_done_again_nor_painted(make, tmp_path):
    make().run([job('streaming')])
    again = make()
    with mock.patch.object(Cohort, 'paint', side_effect=AssertionError):
        again.run([job('streaming')])
    assert not again.said


def test_results_of_other_settings_are_not_used(make):
    make().run([job('mil-max')])
    assert 'was made with settings' in refusal(
        make(replace(TINY, mil_frozen_lr=7.0)).run, [job('mil-max')]
    )
    other = replace(TINY, threshold=0.3)  # another cohort
    assert 'was made with' in refusal(make(other).run, [job('mil-max', other)])
    make(replace(TINY, frozen_lr=7.0)).run([job('mil-max')])  # of streaming alone


class Killed(BaseException):
    "In the place of a signal that cannot be caught."


@pytest.mark.parametrize('method', ['streaming-avg', 'mil-abmil'])
def test_a_killed_job_goes_on_and_ends_with_the_same(make, method):
    whole = make(name='whole')
    whole.run([job(method)])
    expected = read_job_result(whole.path(job(method)))
    left = [9]

    def at_rest(self, state):
        self.write()
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    runner = make(minutes=0)
    with mock.patch.object(Clock, 'at_rest', at_rest), pytest.raises(Killed):
        runner.run([job(method)])
    assert not runner.path(job(method)).exists()
    again = make(minutes=0)
    again.run([job(method)])
    found = read_job_result(again.path(job(method)))
    assert found['logits'] == expected['logits'] and found['starts'] == 2


def test_patches_are_drawn_anew_in_each_epoch(make):
    from streaming_pathology.paper.painted_jobs import SampledViews
    from streaming_pathology.paper.views import ViewSlides

    runner = make(SMALL_COVERAGE)
    each = job('sampled-4', SMALL_COVERAGE)
    split, views = runner.split(each), runner.experiment_of(each).views('patches')
    data = SampledViews(ViewSlides(split.train, views, augmented=True), 4, seed=1)
    bags = [data[0, epoch]['image'] for epoch in (0, 2, 0)]  # of the same view
    drawn = [bag.sample.tolist() for bag in bags]
    assert all(len(sample) == 4 for sample in drawn) and drawn[0] == drawn[2] != drawn[1]
    assert {*map(tuple, drawn[0])} <= {*map(tuple, bags[0].positions.tolist())}
    assert SampledViews(data, None, seed=1)[0, 0]['image'].sample is None


def test_other_jobs_and_data_are_refused(make, tmp_path):
    assert 'is no job of a painted cohort' in refusal(make().run, [Job('streaming', 0, 0)])
    assert '--data x has no effect' in refusal(PaintedRunner, TINY, 'x', tmp_path, tmp_path)
    assert "there is no method 'mil'" in refusal(asked_jobs, TINY, 'mil')


def test_an_estimate_names_all_that_takes_time(make):
    runner = make(replace(TINY, mapped=2, methods=('streaming', 'mil-mean')))
    rows = painted_estimate(runner)
    names = [row[0].removeprefix('8 um, ') for row in rows[1:]]
    assert names == [
        'slides painted',
        'views of image',
        'views of patches',
        'streaming',
        'mil-mean',
        'heatmaps',
    ]
    assert all(row[2] > 0 for row in rows[1:]) and not runner.out.exists()
    assert len(planned_split(TINY, 'tumour', 0).test) == 20


# ---- tables


def test_tables_say_what_is_not_there(tmp_path):
    for plan in FULL_PLANS:
        assert table_of_methods(plan, tmp_path)[1][0] == NO_JOB
        assert table_of_maps(plan, tmp_path)[1][0] == NO_JOB
        ax = plot_methods(plan, tmp_path)
        assert ax.texts[0].get_text() == NO_JOB and not ax.containers
        plt.close(ax.figure)
    assert table_of_darkness(FULL_PLANS, tmp_path)[1][0] == 'no cohort is painted yet'


def test_tables_are_of_the_results(small):
    plan = SMALL_LABELS
    rows = table_of_methods(plan, small)
    assert [row[0] for row in rows[1:]] == [*plan.methods]
    found = [
        read_job_result(small / plan.name / f'share-8um-{method}-seed2.json')
        for method in ('mil-mean', 'streaming')
    ]
    labels = [*found[0]['labels'].values()]
    logits = [[*each['logits'].values()] for each in found]
    test = delong_test(labels, *logits)
    cell = rows[1 + plan.methods.index('mil-mean')][2]
    assert f'{auc(labels, logits[0]):.3f}' in cell
    assert f'{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f})' in cell
    area = area_of(plan, 'mil-mean', 'share', 8.0, small)
    assert area is not None and area.value == pytest.approx(auc(labels, logits[0]))
    partly = replace(plan, methods=(*plan.methods, 'streaming-attention'))
    assert table_of_methods(partly, small)[-1] == ['streaming-attention', NOT_YET, NOT_YET]


def test_the_table_of_maps(small):
    rows = table_of_maps(SMALL_LABELS, small)
    assert [row[0] for row in rows[1:]] == [
        *SMALL_LABELS.methods,
        'darkness',
        'green',
        'prevalence',
    ]
    assert {row[-1] for row in rows[1 : 1 + len(SMALL_LABELS.methods)]} <= {'yes', 'no'}
    assert len(table_of_darkness(SMALL_PLANS, small)) == 6


def test_the_figure_has_a_point_for_each_method_and_cohort(small):
    ax = plot_methods(SMALL_LABELS, small)
    assert len(ax.containers) == len(SMALL_LABELS.methods)
    assert len(ax.containers[0].lines[0].get_xdata()) == 2
    plt.close(ax.figure)


def test_bags_of_a_cohort_have_patches_of_the_same_microns(tmp_path):
    for spacing in (8.0, 4.0):
        cohort = Cohort(replace(SMALL_SPACING, slides=4), 'tumour', spacing, 0)
        plan = cohort.plan_at
        size = (plan.size, plan.size)
        case = cohort.paint(tmp_path / f'{spacing:g}')[:1]
        bag = ImageBags(case, 2.0, size, grid=PatchGrid(plan.patch))[0]['image']
        assert bag.size * spacing == plan.patch_um and len(bag) > 1
