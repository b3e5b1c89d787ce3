"The runner of the comparison: results, what is skipped, what goes on after a kill, the budget."

import json
import os
import shutil
import signal
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from refusals import refusal

from streaming_pathology.core import Halted, InputError
from streaming_pathology.paper.__main__ import asked_jobs, changed_plan, main
from streaming_pathology.paper.data import Split, paint_stand_in
from streaming_pathology.paper.methods import METHODS, Method, methods_of, seed_of
from streaming_pathology.paper.plan import PILOT, REAL, SMALL, Job, jobs_of
from streaming_pathology.paper.runner import (
    Clock,
    Runner,
    estimate,
    estimate_text,
    few,
    read_job_result,
    steps_of,
    table_of,
)
from streaming_pathology.slides.cohorts import Case
from streaming_pathology.training.loop import State

pytestmark = pytest.mark.usefixtures('small_resnet')
PLAN = replace(SMALL, name='test', size=96, patch=32, smaller={}, frozen_epochs=2, views=1)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return paint_stand_in(tmp_path_factory.mktemp('paper') / 'painted', (5, 4, 3), size=192)


@pytest.fixture
def make(data, tmp_path):
    "A runner in a folder of the test, and what it has said."

    def made(plan=PLAN, name='a', **options):
        said = []
        folder = tmp_path / name
        runner = Runner(plan, data, folder / 'work', folder / 'out', said.append, **options)
        runner.said = said
        return runner

    return made


@pytest.fixture(scope='module')
def result_of(data, tmp_path_factory):
    "The result of a job of each method, which is run once for all tests."
    folder, found = tmp_path_factory.mktemp('whole'), {}

    def result(method):
        if method not in found:
            runner = Runner(PLAN, data, folder / 'work', folder / 'out', lambda text: None)
            runner.run([job(method)])
            found[method] = read_job_result(runner.path(job(method)))
        return found[method]

    return result


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def job(method, **options):
    return Job(method, 0, 0, size=PLAN.size, **options)


# ---- results


@pytest.mark.parametrize('method', ['colour', 'frozen-mean', 'frozen-abmil', 'streaming', 'mil'])
def test_a_result_says_all_that_it_depends_on(result_of, method):
    result = result_of(method)
    assert result['job'] == dict(method=method, seed=0, fold=0, share=1.0, size=96)
    assert result['seed'] == seed_of(job(method))
    assert result['settings'].items() <= PLAN.as_json().items()
    assert result['machine']['packages']['torch'] and result['machine']['git_commit']
    assert result['logits'].keys() == result['labels'].keys() == result['grades'].keys()
    assert len(result['logits']) == result['slides']['test'] == 6
    assert result['starts'] == 1 and result['cpu_seconds'] > 0
    parts = [row['part'] for row in result['history'] if 'part' in row]
    assert parts == (['frozen', 'frozen', 'whole'] if method in ('streaming', 'mil') else [])
    assert all(np.isfinite(row['tuning_loss']) for row in result['history'])


def test_no_weights_stay_when_a_job_is_done(make):
    runner = make()
    runner.run([job('streaming')])
    assert not [*runner.work.rglob('*.pt')]
    assert not [path for path in runner.out.rglob('*') if path.suffix != '.json']


def test_methods_see_the_same_seeds_and_differ(result_of):
    results = [result_of(name) for name in ('streaming', 'mil')]
    assert results[0]['seed'] == results[1]['seed']
    assert results[0]['logits'].keys() == results[1]['logits'].keys()
    assert results[0]['logits'] != results[1]['logits']


def test_a_job_gives_the_same_again(make, result_of):
    runner = make()
    runner.run([job('mil'), job('streaming')])
    for method in ('mil', 'streaming'):
        again = read_job_result(runner.path(job(method)))
        assert again['logits'] == result_of(method)['logits']


def test_a_method_that_forgets_a_slide(make, monkeypatch):
    def forgetful(job, split, experiment, training):
        return {case.slide_id: 0.0 for case in split.test[1:]}, []

    monkeypatch.setitem(METHODS, 'forgetful', Method(forgetful, ('size',)))
    runner = make()
    assert 'not every test slide has a finite logit' in refusal(runner.run, [job('forgetful')])
    assert not runner.path(job('forgetful')).exists()


# ---- what is done


def test_what_is_done_is_not_done_again(make):
    jobs = jobs_of(PLAN, ['colour', 'area'])
    make().run(jobs[:3])
    before = {path: path.stat().st_mtime_ns for path in make().out.iterdir()}
    runner = make()
    runner.run(jobs)
    assert len(before) == 3 and len(names(runner.out)) == 4 and len(runner.said) == 1
    assert (
        before.items() <= {path: path.stat().st_mtime_ns for path in runner.out.iterdir()}.items()
    )


def test_results_of_other_settings_are_not_used(make):
    make().run([job('colour'), job('frozen-max')])
    other = make(replace(PLAN, tuning=0.4))
    assert 'was made with settings' in refusal(other.run, [job('colour')])
    trunk = make(replace(PLAN, lr=7.0, epochs=9))  # no matter of either
    trunk.run([job('colour'), job('frozen-max')])
    assert not trunk.said


def test_results_of_other_data_are_not_used(make, data):
    runner = make()
    runner.run([job('colour')])
    path = runner.path(job('colour'))
    path.write_text(path.read_text().replace(runner.data, 64 * '0'))
    assert 'was made with data 0000' in refusal(make().run, [job('colour')])


def test_a_damaged_result_is_named(make):
    runner = make()
    runner.run([job('colour')])
    runner.path(job('colour')).write_text('{"job"')
    assert 'is no result of a job' in refusal(make().run, [job('colour')])


def test_two_runners_at_once(make):
    def inner(*args):
        with pytest.raises(InputError, match='another process'):
            make().run([job('colour')])
        raise KeyError('seen')

    runner = make()
    with mock.patch.object(runner, 'run_job', inner), pytest.raises(KeyError, match='seen'):
        runner.run([job('area')])


# ---- killed


class Killed(BaseException):
    "In the place of a signal that cannot be caught."


def killed_after(rests):
    "A `Clock.at_rest` that dies after so many rests between slides."
    left = [rests]

    def at_rest(self, state):
        self.write()
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return at_rest


@pytest.mark.parametrize('rests', [1, 7, 21])
@pytest.mark.parametrize('method', ['streaming', 'mil'])
def test_a_killed_job_goes_on_and_ends_with_the_same(make, result_of, method, rests):
    expected = result_of(method)
    runner = make(minutes=0)
    with mock.patch.object(Clock, 'at_rest', killed_after(rests)):
        with pytest.raises(Killed):
            runner.run([job(method)])
    assert not runner.path(job(method)).exists()
    spent = runner.spent()
    assert spent > 0
    again = make(minutes=0)
    again.run([job(method)])
    found = read_job_result(again.path(job(method)))
    assert found['logits'] == expected['logits']
    losses = [[row['tuning_loss'] for row in each['history']] for each in (found, expected)]
    assert losses[0] == losses[1]
    assert found['starts'] == 2 and again.spent() > spent


def test_a_signal_saves_and_the_same_command_goes_on(make):
    runner = make()

    def stop(self, state):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Clock, 'at_rest', stop), pytest.raises(Halted):
        runner.run([job('streaming')])
    assert [*runner.work.rglob('point_*.pt')]
    make().run([job('streaming')])
    assert read_job_result(runner.path(job('streaming')))['starts'] == 2


def test_killed_while_views_are_computed(make):
    runner = make()
    split = runner.split(job('streaming'))
    with mock.patch.object(Clock, 'tick', side_effect=Killed), pytest.raises(Killed):
        runner.fill('image', job('streaming'))
    assert not runner.views_path('image', job('streaming')).exists() and runner.spent() > 0
    again = make()
    again.fill('image', job('streaming'))
    about = json.loads(again.views_path('image', job('streaming')).read_text())
    n_plain = len(split.tuning) + len(split.test)
    assert about['files'] == 2 * len(split.train) + n_plain and about['starts'] == 2
    assert about['bytes'] > 0 and again.spent() == pytest.approx(about['cpu_seconds'], rel=1e-3)


def test_views_are_made_when_a_job_needs_them(make):
    runner = make()
    runner.run([job('frozen-max')])
    about = json.loads(runner.views_path('features', job('frozen-max')).read_text())
    assert about['files'] == len(runner.cases)  # no augmented ones
    runner.run([job('frozen-abmil')])
    more = json.loads(runner.views_path('features', job('frozen-max')).read_text())
    assert more['files'] > about['files'] and more['cpu_seconds'] > about['cpu_seconds']
    done = [read_job_result(runner.path(job(name))) for name in ('frozen-max', 'frozen-abmil')]
    total = sum(each['cpu_seconds'] for each in done) + more['cpu_seconds']
    assert runner.spent() == pytest.approx(total, rel=1e-3)


# ---- budget


def write_result(runner, each, hours):
    runner.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(job={}, logits={}, cpu_seconds=3600 * hours))
    runner.path(each).write_text(text)


def test_a_job_that_would_not_fit_is_not_begun(make):
    runner = make(replace(PLAN, budget_hours=1.0))
    write_result(runner, job('mil'), 0.6)
    other = Job('mil', 0, 1, size=96)
    assert runner.expected(other) == 0.6 * 3600
    assert not runner.affords(other)
    assert 'would take 0.60 h, and 0.60 of 1 h are spent' in runner.said[0]
    assert runner.affords(job('colour'))
    runner.run([other])
    assert not runner.path(other).exists()


def test_what_killed_jobs_took_counts(make):
    runner = make(replace(PLAN, budget_hours=1.0))
    clock = runner.clock_path(job('mil'))
    clock.parent.mkdir(parents=True)
    clock.write_text(json.dumps(dict(cpu_seconds=4000.0, seconds=1.0, starts=1)))
    assert runner.spent() == 4000 and not runner.affords(job('colour'))
    write_result(runner, job('mil'), 0.5)  # done, and killed before its folder was removed
    assert runner.spent() == 1800


def test_the_clock_adds_up(tmp_path):
    first = Clock(tmp_path / 'clock.json')
    sum(range(10**6))
    first.write()
    second = Clock(tmp_path / 'clock.json')
    assert second.total()['starts'] == 2
    assert second.total()['cpu_seconds'] >= first.former['cpu_seconds']
    second.at_rest(mock.Mock(State))


def test_the_budgets_of_the_plans_are_eight_hours():
    assert REAL.budget_hours + PILOT.budget_hours == 8


# ---- table and command


def test_the_table(make, tmp_path):
    runner = make()
    write_result(runner, job('mil'), 1.5)
    text = runner.table(jobs_of(PLAN))
    assert 'mil                   1    1 of 2     1.50' in text
    assert text.splitlines()[-1].split() == ['all', '1.50', 'of', '0.5']
    assert 'streaming             1    0 of 15' in table_of(REAL, jobs_of(REAL), tmp_path / 'none')


def test_the_command(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('STREAMING_PATHOLOGY_PAPER', str(data))
    paths = ['--work', tmp_path / 'work', '--out', tmp_path / 'out', '--set', 'size=96', 'folds=2']
    words = ['run', 'small', *paths, '--name', 'mine', '--methods', 'colour,area', '--only', 3]
    assert main([str(word) for word in words]) == 0
    assert len(names(tmp_path / 'out/mine')) == 3
    assert main([str(word) for word in words]) == 0
    assert len(names(tmp_path / 'out/mine')) == 4
    assert 'colour                1    2 of 2' in capsys.readouterr().out


@pytest.mark.parametrize(
    'words, says',
    [
        (['run', 'real'], '--work is missing'),
        (['run', 'real', '--work', 'x', '--set', 'lr=1'], 'give a name of its own'),
        (['run', 'real', '--work', 'x', '--name', 'pilot', '--set', 'lr=1'], 'a name of its own'),
        (['table', 'real', '--name', 'x', '--set', 'rl=1'], 'there is no such setting'),
        (['table', 'real', '--methods', 'magic'], "there is no method 'magic'"),
        (['table', 'unreal'], 'invalid choice'),
        (['run', 'small', '--work', 'x'], 'no folder of biopsies is given'),
    ],
)
def test_commands_that_are_refused(words, says, capsys, monkeypatch):
    monkeypatch.delenv('STREAMING_PATHOLOGY_PAPER', raising=False)
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_plans_of_ones_own():
    plan = changed_plan(PILOT, 'pilot-fast', ['lr=0.01', 'optimizer=adamw', 'views=4'])
    assert (plan.lr, plan.optimizer, plan.views, plan.name) == (0.01, 'adamw', 4, 'pilot-fast')
    assert changed_plan(REAL, None, []) is REAL


def test_shortcuts_are_learned_from_all_training_slides_only():
    jobs = asked_jobs(REAL, None)
    assert {each.share for each in jobs if each.method == 'colour'} == {1.0}
    assert {each.share for each in jobs if each.method == 'frozen-max'} == {1.0, 0.5, 0.25}
    assert {each.method for each in jobs} == set(methods_of(REAL))


def test_a_cache_that_is_made_again_adds_to_what_it_took(make):
    runner = make()
    runner.run([job('frozen-max')])
    before = json.loads(runner.views_path('features', job('frozen-max')).read_text())
    shutil.rmtree(runner.work)
    make().run([job('frozen-mean')])
    after = json.loads(runner.views_path('features', job('frozen-max')).read_text())
    assert after['cpu_seconds'] > before['cpu_seconds'] and after['starts'] == 2
    assert after['files'] == before['files']


# ---- what it will take


def test_steps_of_an_epoch():
    cases = [Case(f's{i}', int(i < 3), 'none') for i in range(10)]
    assert steps_of(Split(cases, cases[:6], cases)) == 2 * 7 + 2
    split = few(Split(cases, cases, cases))
    assert [case.label for case in split.train] == [0, 0, 1, 1]
    assert (len(split.tuning), len(split.test)) == (2, 1)


def test_an_estimate_is_near_to_what_a_job_takes(make):
    runner = make(replace(PLAN, frozen_epochs=6, epochs=2))
    rows = estimate(runner)
    assert not [*runner.work.rglob('*.pt')] and not runner.out.exists()
    hours = {row[0]: row[2] for row in rows[1:]}
    runner.run([job('streaming')])
    taken = read_job_result(runner.path(job('streaming')))['cpu_seconds'] / 3600
    assert 0.2 < hours['streaming, share 1'] / 2 / taken < 2
    text = estimate_text(rows, 0.5)
    assert text.splitlines()[-1].startswith('all') and text.endswith('of 0.5')
