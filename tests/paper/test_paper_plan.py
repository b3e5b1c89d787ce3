"The plan of the comparison on real tissue: folds, parts, jobs, and what could be told."

import json

import numpy as np
import pytest
from notebooks import NBS
from refusals import refusal
from scipy.stats import norm

from streaming_pathology.evaluation.auc import delong_test
from streaming_pathology.paper.plan import (
    MARGIN,
    REAL,
    SMALL,
    VERDICTS,
    Job,
    Plan,
    binormal_scores,
    fold_numbers,
    fold_ranks,
    jobs_of,
    paired_delong,
    part_of,
    power,
    power_cells,
    read_power,
    slide_scores,
    verdict,
    write_power,
)

STRATA = 91 * ['0+0'] + 24 * ['3+3'] + 8 * ['4+4']
IDS = [f's{number:03}' for number in range(123)]


@pytest.mark.parametrize('seed', [0, 1, 2, 99])
def test_folds_are_stratified_and_even(seed):
    numbers = fold_numbers(IDS, STRATA, 5, seed)
    for stratum in set(STRATA):
        counts = np.bincount(numbers[np.array(STRATA) == stratum], minlength=5)
        assert counts.max() - counts.min() <= 1
    counts = np.bincount(numbers)
    assert counts.max() - counts.min() <= 1


def test_folds_do_not_depend_on_the_order_of_slides():
    numbers = dict(zip(IDS, fold_numbers(IDS, STRATA, 5, 0), strict=True))
    order = np.random.default_rng(0).permutation(123)
    ids, strata = [IDS[i] for i in order], [STRATA[i] for i in order]
    assert dict(zip(ids, fold_numbers(ids, strata, 5, 0), strict=True)) == numbers


def test_folds_differ_by_seed_and_are_the_same_tomorrow():
    first = fold_numbers(IDS, STRATA, 5, 0)
    assert (first != fold_numbers(IDS, STRATA, 5, 1)).any()
    assert first[:12].tolist() == FIRST_FOLDS


FIRST_FOLDS = [0, 2, 2, 2, 3, 1, 4, 0, 1, 4, 2, 3]


def test_folds_that_cannot_be():
    assert "8 slides of '4+4', too few for 9 folds" in refusal(fold_numbers, IDS, STRATA, 9, 0)
    assert 'two slides have the same id' in refusal(fold_numbers, ['a', 'a'], ['0', '0'], 2, 0)


def test_smaller_parts_lie_within_larger_ones():
    parts = [part_of(IDS, STRATA, share, 0, 'train') for share in (0.01, 0.25, 0.5, 1.0)]
    assert len(parts[0]) == 3  # one of each stratum
    assert all(small < large for small, large in zip(parts, parts[1:]))
    assert parts[-1] == set(IDS)
    assert part_of(IDS, STRATA, 0.5, 0, 'tuning') != parts[2]


def test_jobs_come_in_an_order_in_which_the_budget_may_end():
    jobs = jobs_of(REAL)
    assert len({job.name for job in jobs}) == len(jobs) == 42
    assert {(job.share, job.seed) for job in jobs[:10]} == {(1.0, 0)}
    assert {job.share for job in jobs[10:22]} == {0.5, 0.25}
    assert [job.method for job in jobs[:4]] == ['streaming', 'mil', 'streaming', 'mil']
    assert Job('mil', 0, 1, 0.25, 512).name == 'mil-512-share0.25-seed0-fold1'


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(folds=1), 'at least 2'),
        (dict(tuning=0), 'between 0 and 1'),
        (dict(smaller={2.0: (1, 1)}), 'a share lies between 0 and 1'),
        (dict(smaller={0.5: (9, 1)}), 'at most 5 folds'),
        (dict(views=-1), 'neither can be below 0'),
        (dict(augmentation=dict(rotate=-1)), 'rotate'),
        (dict(window=0), 'window is 0'),
    ],
)
def test_settings_that_are_out_of_range(options, says):
    assert says in refusal(Plan, **options)


def test_settings_can_be_written():
    assert json.loads(json.dumps(REAL.as_json())) == REAL.as_json() != SMALL.as_json()


def test_verdicts():
    intervals = [(0.01, 0.1), (-0.04, 0.01), (-0.04, -0.01), (-0.1, -0.01), (-0.1, 0.1)]
    assert [verdict(*interval) for interval in intervals] == list(VERDICTS)


def test_many_delong_intervals_at_once_are_those_of_one():
    rng = np.random.default_rng(3)
    positive = binormal_scores(rng, 5, 32, (2.5, 2.0), 0.7)
    negative = binormal_scores(rng, 5, 91, (0.0, 0.0), 0.7)
    differences, errors = paired_delong(positive, negative)
    labels = np.repeat([1, 0], [32, 91])
    for i in range(5):
        scores = np.concatenate([positive[:, i], negative[:, i]], 1)
        found = delong_test(labels, *scores)
        np.testing.assert_allclose(
            [differences[i], errors[i]], [found.difference, found.error], atol=1e-12
        )


def test_scores_have_the_auc_and_the_correlation_that_was_asked_for():
    rng = np.random.default_rng(0)
    shift = 2**0.5 * norm.ppf(0.9)
    positive = binormal_scores(rng, 1, 4000, (shift, shift), 0.6)[:, 0]
    negative = binormal_scores(rng, 1, 4000, (0.0, 0.0), 0.6)[:, 0]
    assert abs(np.corrcoef(positive)[0, 1] - 0.6) < 0.03
    assert abs((positive[1][:, None] > negative[1]).mean() - 0.9) < 0.01


def test_power_grows_with_agreement_and_with_slides():
    few = power(0.935, 0.0, 0.3, n=400)
    assert few.not_inferior < power(0.935, 0.0, 0.9, n=400).not_inferior
    assert few.not_inferior < power(0.935, 0.0, 0.3, positives=320, n=400).not_inferior
    assert abs(sum(few.shares.values()) - 1) < 1e-9
    assert power(0.9, -0.15, 0.9, n=400).worse > 0.95


def test_power_of_aucs_that_cannot_be():
    assert 'must be between 0 and 1' in refusal(power, 0.95, 0.05, 0.5)
    assert 'correlation 2' in refusal(power, 0.9, 0.0, 2)


def test_power_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr('streaming_pathology.paper.plan.REFERENCES', (0.9,))
    monkeypatch.setattr('streaming_pathology.paper.plan.CORRELATIONS', (0.5,))
    about, cells = read_power(write_power(tmp_path / 'power.json', n=20))
    assert about['n'] == 20 and about['margin'] == MARGIN and about['date']
    assert len(cells) == len([*power_cells()])
    assert cells[0] == power(0.9, -0.15, 0.5, n=20)


def test_the_committed_power_is_what_the_code_gives():
    "A cell of it is simulated again, with as many data sets."
    about, cells = read_power(NBS / 'results/paper/power.json')
    (cell,) = [
        each
        for each in cells
        if (each.reference, each.difference, each.correlation, each.level)
        == (0.969, 0.0, 0.5, 0.95)
    ]
    assert cell == power(0.969, 0.0, 0.5, n=about['n'])


def test_ranks_within_a_fold():
    ranks = fold_ranks(dict(a=-100.0, b=3.0, c=3.0, d=4.0))
    assert ranks == dict(a=0.0, b=0.5, c=0.5, d=1.0)
    assert 'a fold of 1 slides' in refusal(fold_ranks, dict(a=1.0))
    assert "slide 'b' has the logit nan" in refusal(fold_ranks, dict(a=1.0, b=float('nan')))


def test_scores_do_not_depend_on_the_scale_of_a_fold():
    folds = [dict(a=1.0, b=2.0, c=3.0), dict(d=1.0, e=2.0, f=3.0)]
    other = [folds[0], {slide: 1000 * logit + 7 for slide, logit in folds[1].items()}]
    assert slide_scores(folds) == slide_scores(other)
    assert [*slide_scores(reversed(folds))] == ['a', 'b', 'c', 'd', 'e', 'f']
    seeds = [*folds, dict(a=3.0, e=2.0, c=1.0), dict(d=1.0, b=2.0, f=3.0)]
    assert slide_scores(seeds)['a'] == 0.5
