"What the commands do with bad input: one `error:` line that names the thing, exit status 2, no traceback, nothing half-written."

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import geojson
import numpy as np
import pytest
import pyvips
import torch
import tqdm.std
from forks import Forked
from PIL import Image
from runs import quick, refused, tree
from safetensors import safe_open
from small import COMMAND

from streaming_pathology.cli import commands as cli
from streaming_pathology.cli.parser import COMMANDS
from streaming_pathology.io import read_table, write_csv
from streaming_pathology.runs.inputs import find_slides
from streaming_pathology.slides.cohorts import open_slide, tiny_cohort
from streaming_pathology.slides.readers import sample_slide, write_tiff
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import write_cohort
from streaming_pathology.training.checkpoints import save_checkpoint

pytestmark = pytest.mark.usefixtures('small_resnet')

QUICK = quick(1, 4, 1e-3)
HEADER = 'slide_id,label,path,patient_id,split\n'


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "A folder with a good cohort of 12 small slides."
    return tiny_cohort(tmp_path_factory.mktemp('good') / 'cohort', size=(64, 64)).parent


@pytest.fixture
def bad(cohort, tmp_path):
    "A copy of the cohort to spoil."
    shutil.copytree(cohort, tmp_path / 'cohort')
    return tmp_path / 'cohort'


@pytest.fixture(scope='module')
def trained(cohort, tmp_path_factory):
    "A run folder."
    out = tmp_path_factory.mktemp('trained') / 'run'
    assert cli.main(['train', cohort / 'manifest.csv', out, *QUICK]) == 0
    return out


def training_refused(capsys, folder, *says, options=()):
    "sp_train on the folder's manifest must refuse and write nothing."
    before = tree(folder.parent)
    said = refused(
        capsys, ['train', folder / 'manifest.csv', folder.parent / 'run', *QUICK, *options], *says
    )
    assert tree(folder.parent) == before
    return said


def manifest(folder, text):
    (folder / 'manifest.csv').write_text(text)


# the manifest


def test_missing(bad, capsys):
    (bad / 'manifest.csv').unlink()
    training_refused(capsys, bad, 'manifest.csv', 'does not exist')


def test_empty(bad, capsys):
    manifest(bad, '')
    training_refused(capsys, bad, 'manifest.csv is empty')


def test_only_a_header(bad, capsys):
    manifest(bad, HEADER)
    training_refused(capsys, bad, 'manifest.csv', 'no rows')


def test_no_label_column(bad, capsys):
    manifest(bad, 'slide_id,path\ns00,slides/s00.tiff\n')
    training_refused(capsys, bad, 'manifest.csv', "'label'", 'slide_id, path')


def test_no_id_column(bad, capsys):
    manifest(bad, 'slide,label\ns00,1\n')
    training_refused(capsys, bad, 'manifest.csv', "'slide_id'")


def test_duplicates(bad, capsys):
    manifest(bad, HEADER + 's00,0,slides/s00.tiff,p,\ns00,1,slides/s01.tiff,q,\n')
    training_refused(capsys, bad, 'line 3', "'s00'", 'line 2')


def test_label_no_number(bad, capsys):
    manifest(bad, HEADER + 's00,0,slides/s00.tiff,p,\ns01,tumour,slides/s01.tiff,q,\n')
    training_refused(capsys, bad, 'line 3', "'tumour' is no number")


def test_label_beyond_two_classes(bad, capsys):
    manifest(bad, HEADER + 's00,0,slides/s00.tiff,p,\ns01,3,slides/s01.tiff,q,\n')
    training_refused(capsys, bad, 'line 3', "'3'", '0, 1')


def test_one_class(bad, capsys):
    manifest(bad, HEADER + 's00,1,slides/s00.tiff,p,\ns01,1,slides/s01.tiff,q,\n')
    training_refused(capsys, bad, 'every label is 1')


def test_one_class_to_train_on(bad, capsys):
    manifest(bad, HEADER + 's00,1,slides/s00.tiff,p,train\ns01,0,slides/s01.tiff,q,tuning\n')
    training_refused(capsys, bad, "'train'", 'every label is 1')


def test_unknown_split(bad, capsys):
    manifest(bad, HEADER + 's00,1,slides/s00.tiff,p,holdout\n')
    training_refused(capsys, bad, "'holdout'", 'tuning')


def test_unsafe_id(bad, capsys):
    manifest(bad, HEADER + '../s00,1,slides/s00.tiff,p,\n')
    training_refused(capsys, bad, "'../s00'", 'file name')


def test_leaking_patient(bad, capsys):
    manifest(bad, HEADER + 's00,1,slides/s00.tiff,p,train\ns01,0,slides/s01.tiff,p,test\n')
    training_refused(capsys, bad, "patient 'p'", 'line 2')


def test_not_text(bad, capsys):
    (bad / 'manifest.csv').write_bytes(os.urandom(2000))
    training_refused(capsys, bad, 'manifest.csv')


def test_all_problems_at_once(bad, capsys):
    said = training_refused(
        capsys,
        (
            manifest(
                bad, HEADER + ''.join(f's{i:02},x,slides/s{i:02}.tiff,p{i},\n' for i in range(12))
            ),
            bad,
        )[1],
        '12 problems',
        'and 4 more',
    )
    assert said.count('line ') == 8


# the slides


def test_slide_missing(bad, capsys):
    (bad / 'slides/s03.tiff').unlink()
    training_refused(capsys, bad, 's03.tiff does not exist', 'line 5')


def test_slide_truncated(bad, capsys):
    p = bad / 'slides/s03.tiff'
    p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])
    training_refused(capsys, bad, "'s03'", 'truncated')


def test_slide_truncated_svs(bad, capsys):
    (bad / 'slides/s03.svs').write_bytes(sample_slide().read_bytes()[:1_000_000])
    (bad / 'slides/s03.tiff').unlink()
    manifest(bad, (bad / 'manifest.csv').read_text().replace('s03.tiff', 's03.svs'))
    training_refused(capsys, bad, "'s03'", 'truncated')


def test_slide_empty(bad, capsys):
    (bad / 'slides/s03.tiff').write_bytes(b'')
    training_refused(capsys, bad, "'s03'", 'empty')


def test_not_an_image(bad, capsys):
    (bad / 'slides/s03.tiff').write_text('no image')
    training_refused(capsys, bad, "'s03'", 'not an image')


def test_no_spacing(bad, capsys):
    pyvips.Image.new_from_file(str(bad / 'slides/s03.tiff')).pngsave(str(bad / 'slides/s03.png'))
    manifest(bad, (bad / 'manifest.csv').read_text().replace('s03.tiff', 's03.png'))
    training_refused(capsys, bad, "'s03'", 'spacing')


def test_no_tissue(bad, capsys):
    white = pyvips.Image.new_from_array(np.full((64, 64, 3), 244, np.uint8)).copy(
        interpretation='srgb'
    )
    white.tiffsave(str(bad / 'slides/s03.tiff'), xres=250, yres=250)
    training_refused(capsys, bad, "'s03'", 'no tissue')


def test_finer_than_the_slide(bad, capsys):
    training_refused(capsys, bad, '12 of 12', 'invent detail', options=('--spacing', 0.5))


def test_all_bad_slides_at_once(bad, capsys):
    for i in (1, 2, 5):
        (bad / f'slides/s{i:02}.tiff').write_text('no image')
    training_refused(capsys, bad, '3 of 12', "'s01'", "'s02'", "'s05'")


@pytest.mark.parametrize('size,crops', [('32,40', True), ('96,160', False)])
def test_larger_and_smaller_than_the_canvas(cohort, tmp_path, capsys, size, crops):
    assert (
        cli.main(['train', cohort / 'manifest.csv', tmp_path / 'run', *QUICK, '--size', size]) == 0
    )
    err = capsys.readouterr().err
    assert ('larger than the canvas' in err) == crops and err.count('larger than the canvas') <= 1
    assert (tmp_path / 'run/report/index.html').stat().st_size > 10_000


# where to


def test_out_below_a_file(bad, capsys):
    (bad / 'f').write_text('')
    refused(
        capsys, ['train', bad / 'manifest.csv', bad / 'f/run', *QUICK], 'f/run cannot be written'
    )


def test_out_not_ours(bad, capsys):
    before = tree(bad)
    refused(
        capsys,
        ['train', bad / 'manifest.csv', bad, *QUICK, '--overwrite'],
        'which no former run wrote',
    )
    assert tree(bad) == before


def test_out_holds_a_run(cohort, trained, capsys):
    before = tree(trained)
    refused(capsys, ['train', cohort / 'manifest.csv', trained, *QUICK], '--overwrite')
    assert tree(trained) == before


@pytest.mark.skipif(not Path('/proc/self').exists(), reason='needs /proc')
def test_out_on_a_filesystem_without_writing(cohort, capsys):
    refused(
        capsys,
        ['train', cohort / 'manifest.csv', '/proc/run', *QUICK],
        '/proc/run cannot be written',
    )


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='permissions do not bind root')
def test_out_without_permission(cohort, tmp_path, capsys):
    (tmp_path / 'locked').mkdir()
    (tmp_path / 'locked').chmod(0o500)
    for argv in (
        ['train', cohort / 'manifest.csv', tmp_path / 'locked/run'],
        ['demo', '--out', tmp_path / 'locked/demo'],
    ):
        refused(capsys, argv, 'locked', 'cannot be written')


@pytest.mark.parametrize('name', ['demo', 'synth'])
def test_demo_and_synth_check_first(bad, capsys, name):
    flag = ['--out'] if name == 'demo' else []
    before = tree(bad)
    for where in (bad, bad / 'manifest.csv', bad / 'manifest.csv/x'):
        refused(capsys, [name, *flag, where], where)
    assert tree(bad) == before


# settings


@pytest.mark.parametrize(
    'options,says',
    [
        (['--epochs', 0], '--epochs'),
        (['--lr', 'nan'], '--lr'),
        (['--epoch', 3], '--epochs'),
        (['--spacing', -1], '--spacing'),
        (['--arch', 'vit'], 'vit'),
        (['--amp', 'half'], 'bf16'),
        (['--size', '12'], '12'),
        (['--device', 'tpu'], 'tpu'),
        (['--weights', 'none.pt'], 'none.pt'),
        (['--freeze-until', 'layer9'], 'layer9'),
        (['--pool', 'none-such'], 'avg'),
        (['--workers', -1], '--workers'),
    ],
)
def test_settings(bad, capsys, options, says):
    training_refused(capsys, bad, says, options=options)


def test_commands(capsys):
    refused(capsys, ['trian'], 'did you mean train?')
    refused(capsys, ['train'], 'manifest, out')


# predict, evaluate, report


@pytest.mark.parametrize(
    'spoil,says',
    [
        (lambda p: p.unlink(), 'no such checkpoint'),
        (lambda p: p.write_bytes(b''), 'empty'),
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), 'damaged'),
        (lambda p: p.write_text('x'), 'damaged'),
        (lambda p: torch.save({'a': 1}, p), 'no checkpoint of this package'),
        (lambda p: torch.save({'versions': {}, 'f': Path}, p), 'run code'),
    ],
)
def test_checkpoints(cohort, trained, tmp_path, capsys, spoil, says):
    shutil.copy(trained / 'checkpoints/best.pt', tmp_path / 'c.pt')
    spoil(tmp_path / 'c.pt')
    refused(
        capsys, ['predict', tmp_path / 'c.pt', cohort / 'slides', tmp_path / 'p.csv'], 'c.pt', says
    )
    assert not (tmp_path / 'p.csv').exists()


def test_predictions_stay(cohort, trained, bad, tmp_path, capsys):
    "A slide that cannot be read leaves the predictions of before untouched, and keeps those that are done."
    model, out = trained / 'checkpoints/best.pt', tmp_path / 'p.csv'
    assert cli.main(['predict', model, bad / 'manifest.csv', out]) == 0
    rows = lambda p, *but: [
        l.split(',')[:4] for l in p.read_text().splitlines() if not l.startswith(but)
    ]
    assert rows(out) == rows(trained / 'predictions.csv') and len(rows(out)) == 13
    before = out.read_bytes()
    whole = (bad / 'slides/s03.tiff').read_bytes()
    (bad / 'slides/s03.tiff').write_text('no image')
    refused(capsys, ['predict', model, bad / 'manifest.csv', out], "'s03'", '--skip-failed')
    assert out.read_bytes() == before and not list(tmp_path.glob('.*'))
    assert (
        cli.main(['predict', model, bad / 'manifest.csv', out, '--skip-failed']) == 3
        and rows(out) == rows(trained / 'predictions.csv', 's03')
        and "'s03'" in capsys.readouterr().err
    )
    (bad / 'slides/s03.tiff').write_bytes(whole)
    assert cli.main(['predict', model, bad / 'manifest.csv', out]) == 0 and rows(out) == rows(
        trained / 'predictions.csv'
    )


def test_a_point_is_no_model(cohort, trained, tmp_path, capsys):
    "It may be handed on, but is said to be one, and its card has no figures that were measured on other weights."

    def card(path):
        with safe_open(path, 'pt') as f:
            return json.loads(f.metadata()['card'])

    point = sorted(trained.glob('checkpoints/point_*.pt'))[-1]
    best = trained / 'checkpoints/best.pt'
    for path, is_point in ((point, True), (best, False)):
        assert (
            cli.main(['export', path, tmp_path / 'm.safetensors']) == 0
            and ('is a checkpoint to resume training from' in capsys.readouterr().err) == is_point
        )
        assert (
            bool(card(tmp_path / 'm.safetensors')['tuning']) != is_point
            and ('auc' in card(tmp_path / 'm.safetensors').get('metrics', {})) != is_point
        )
    assert (
        cli.main(['predict', point, cohort / 'manifest.csv', tmp_path / 'p.csv']) == 0
        and 'is a checkpoint to resume' in capsys.readouterr().err
    )


def test_predictions_go_on(cohort, trained, tmp_path):
    "Killed in the middle, also of a line; rows that are done are not computed again, and the table is that of one that was never broken off."
    model, out = trained / 'checkpoints/best.pt', tmp_path / 'p.csv'

    def lines():
        return sum(p.read_bytes().count(b'\n') for p in tmp_path.glob('p.csv.unfinished'))

    for k in range(3):
        argv = ['predict', model, cohort / 'manifest.csv', out, '--tta', 'all']
        p = Forked('small:command', *argv)
        there = lines()
        while p.poll() is None and lines() < max(1, there) + 2:
            time.sleep(0.002)
        p.kill()
        p.wait()
        (journal,) = tmp_path.glob('p.csv.unfinished')
        assert not out.exists()
        journal.write_bytes(journal.read_bytes() + b'["torn')
    done = lines() - 1
    assert 6 <= done <= 12
    assert (
        cli.main(['predict', model, cohort / 'manifest.csv', out, '--tta', 'all']) == 0
        and cli.main(
            ['predict', model, cohort / 'manifest.csv', tmp_path / 'q.csv', '--tta', 'all']
        )
        == 0
    )
    but_seconds = lambda p: [
        l.split(',')[:4] + l.split(',')[5:] for l in p.read_text().splitlines()
    ]
    assert but_seconds(out) == but_seconds(tmp_path / 'q.csv') and not journal.exists()


@pytest.mark.parametrize(
    'task,header,label',
    [
        ('ordinal', 'grade', lambda i: i % 3),
        ('multiclass', 'kind', lambda i: i % 4),
        (
            'multilabel',
            'tumour,inflamed',
            lambda i: f'{i % 2},' + ('' if i == 5 else f'{i // 2 % 2}'),
        ),
        ('regression', 'ki67', lambda i: i / 3),
        ('survival', 'months,event', lambda i: f'{i + 1.5},{i % 2}'),
    ],
)
def test_tasks(cohort, tmp_path, capsys, task, header, label):
    "What a label is: trained, predicted, exported, reported."
    run, split = tmp_path / 'run', lambda i: ('train', 'train', 'tuning', 'test')[i // 3 % 4]
    (tmp_path / 'm.csv').write_text(
        f'slide_id,{header},path,split\n'
        + ''.join(f'a{i},{label(i)},{cohort}/slides/s{i:02}.tiff,{split(i)}\n' for i in range(12))
    )
    train = [
        'train',
        tmp_path / 'm.csv',
        run,
        '--spacing',
        4,
        '--epochs',
        1,
        '--strip',
        64,
        '--heatmaps',
        0,
        '--batch-size',
        4,
    ]
    refused(capsys, train, "'label'")
    refused(capsys, [*train, '--task', task, '--label', 'nothing'], "'nothing'")
    refused(
        capsys,
        [
            *train,
            '--task',
            'multilabel' if task in ('ordinal', 'multiclass', 'regression') else 'binary',
            '--label',
            header,
        ],
        'one number' if task == 'multilabel' else 'none of 0, 1',
    )
    assert (
        cli.main([*train, '--task', task, '--label', header]) == 0
        and 'test loss' in capsys.readouterr().out
    )
    table = [l.split(',') for l in (run / 'predictions.csv').read_text().splitlines()]
    names = dict(
        ordinal=[f'probability_{i}' for i in range(3)],
        multiclass=[f'probability_{i}' for i in range(4)],
        multilabel=['probability_tumour', 'probability_inflamed'],
        regression=['predicted_ki67'],
        survival=['log_risk'],
    )[task]
    assert (
        table[0] == ['slide_id', *header.split(','), 'split', *names, 'seconds', 'model', 'version']
        and len(table) == 13
    )
    assert [r[1 : 2 + header.count(',')] for r in table[1:]] == [
        [f'{float(v):g}' if v else '' for v in str(label(i)).split(',')] for i in range(12)
    ]
    if task in ('ordinal', 'multiclass'):
        assert all(abs(sum(map(float, r[3:-3])) - 1) < 1e-6 for r in table[1:])
    assert (
        cli.main(['export', run, tmp_path / 'm.safetensors']) == 0
        and cli.main(
            ['predict', tmp_path / 'm.safetensors', tmp_path / 'm.csv', tmp_path / 'p.csv']
        )
        == 0
    )
    assert [l.split(',')[:-3] for l in (tmp_path / 'p.csv').read_text().splitlines()] == [
        r[:-3] for r in table
    ]
    assert (
        cli.main([*train, '--task', task, '--label', header, '--resume']) == 0
        and task in (run / 'report/index.html').read_text()
    )


def test_evaluate_takes_a_task_that_the_table_does_not_tell(tmp_path, capsys):
    table = tmp_path / 'p.csv'
    rows = ['slide_id,label,split,probability_0,probability_1,probability_2']
    for i in range(60):
        shares = [0.2, 0.2, 0.2]
        shares[min(2, i % 3 + (i % 7 == 0))] += 0.4
        rows.append(f's{i},{i % 3},test,' + ','.join(f'{share:.1f}' for share in shares))
    table.write_text('\n'.join(rows) + '\n')
    words = ['evaluate', table, '--n-bootstrap', 50]
    found = {}
    for task in (None, 'multiclass', 'ordinal'):
        out = tmp_path / f'{task}.json'
        more = [] if task is None else ['--task', task]
        assert cli.main([*words, '--out', out, *more]) == 0
        told = capsys.readouterr()
        assert ('give --task ordinal' in told.err) == (task is None)
        assert ('quadratic kappa' in told.out) == (task == 'ordinal')
        found[task] = json.loads(out.read_text())
    assert found[None]['task_from'] == 'assumed' and found[None]['task'] == 'multiclass'
    assert [found[task]['task_from'] for task in ('multiclass', 'ordinal')] == ['given', 'given']
    assert found['ordinal']['kappa'] != found['multiclass']['kappa']
    refused(capsys, [*words, '--task', 'survival'], 'p.csv', 'leave --task')
    refused(capsys, [*words, '--task', 'grades'], '--task')


def test_evaluate(trained, tmp_path, capsys):
    rows = (trained / 'predictions.csv').read_text().splitlines()
    p = tmp_path / 'p.csv'
    for text, says in [
        ('', 'p.csv'),
        (rows[0], 'no rows'),
        ('\n'.join(rows).replace('probability', 'score'), 'probability'),
        ('\n'.join(r for r in rows if ',1,' not in r), 'both classes'),
        ('\n'.join(rows + rows[1:2]), 'more than once'),
        ('\n'.join([rows[0] + ',probability', *(r + ',.1' for r in rows[1:])]), 'twice'),
        ('\n'.join([rows[0], 'a,1,test,0,85,0.1,m,v']), '8 values for 7 columns'),
        (rows[0] + '\n ,1,test,.5,1,m,v', 'slide_id'),
    ]:
        p.write_text(text)
        refused(capsys, ['evaluate', p, '--out', tmp_path / 'm.json'], 'p.csv', says)
    p.write_text('\n'.join(rows))
    refused(capsys, ['evaluate', tmp_path / 'none.csv'], 'none.csv')
    refused(capsys, ['evaluate', p, '--split', 'night'], "'night'")
    refused(capsys, ['evaluate', p, '--out', p / 'm.json'], 'cannot be written')
    for seed in (-1, 10**20):
        refused(capsys, ['evaluate', p, '--seed', seed], '--seed')
    assert not (tmp_path / 'm.json').exists()
    assert (
        cli.main(['evaluate', p, '--out', tmp_path / 'm.json', '--n-bootstrap', 100]) == 0
        and json.loads((tmp_path / 'm.json').read_text())['n'] == 2
    )
    for option, value, says in (
        ('--interval', 'wald', '--interval'),
        ('--target-sensitivity', 2, 'above 0, up to 1'),
        ('--subgroups', 'grade', 'cohort.csv'),
        ('--confidence', 1, 'between 0 and 1'),
        ('--figures', p, 'is a file'),
        ('--manifest', tmp_path / 'no.csv', 'no.csv'),
    ):
        refused(capsys, ['evaluate', p, option, value], says)
    (tmp_path / 'all.csv').write_text(
        'slide_id,label,split,probability\n'
        + ''.join(
            f's{i},{i % 2},{"tuning" if i < 20 else "test"},{0.3 * (i % 2) + 0.01 * (i * 7 % 50):.3f}\n'
            for i in range(60)
        )
    )
    (tmp_path / 'cohort.csv').write_text(
        'slide_id,patient_id,site\n'
        + ''.join(f's{i},p{i // 4},{"ab"[i % 3 == 0]}\n' for i in range(60))
    )
    capsys.readouterr()
    assert (
        cli.main(
            [
                'evaluate',
                tmp_path / 'all.csv',
                '--threshold-split',
                'tuning',
                '--target-sensitivity',
                0.9,
                '--manifest',
                tmp_path / 'cohort.csv',
                '--subgroups',
                'site',
                '--figures',
                tmp_path / 'figures',
                '--out',
                tmp_path / 'all.json',
                '--n-bootstrap',
                200,
            ]
        )
        == 0
    )
    said, found = capsys.readouterr().out, json.loads((tmp_path / 'all.json').read_text())
    assert (
        'of 10 patients' in said
        and 'site a' in said
        and 'temperature' in said
        and found['groups']['site'][0]['n'] == 27
        and found['method'] == 'clustered_logit'
        and found['seed'] == 0
    )
    assert {f.name for f in (tmp_path / 'figures').iterdir()} == {
        'roc.svg',
        'precision_recall.svg',
        'reliability.svg',
        'groups_site.svg',
    }

    def drawn(folder):
        return ['evaluate', tmp_path / 'all.csv', '--n-bootstrap', 20, '--figures', folder]

    assert cli.main(drawn(tmp_path / 'figures')) == 0
    (tmp_path / 'figures/roc.svg').write_text('<svg>mine</svg>')
    refused(capsys, drawn(tmp_path / 'figures'), 'roc.svg')
    assert 'mine' in (tmp_path / 'figures/roc.svg').read_text()
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/environment.json').touch()
    refused(capsys, drawn(tmp_path / 'run/report'), 'lies in a run')


def test_report(trained, cohort, tmp_path, capsys):
    out, before = tmp_path / 'r', tree(trained)
    refused(capsys, ['report', tmp_path / 'none'], 'none')
    refused(capsys, ['report', trained, '--out', trained / 'log.csv/r'], 'in the run')
    refused(capsys, ['report', trained, '--out', cohort / 'manifest.csv/r'], 'cannot be written')
    refused(capsys, ['report', trained, '--out', trained / 'mine'], 'in the run')
    refused(capsys, ['report', trained, '--max-slides', -1], '--max-slides')
    assert (
        cli.main(['report', trained, '--out', out]) == 0
        and tree(trained) == before
        and {p.relative_to(out): p.read_bytes() for p in out.rglob('*') if p.is_file()}
        == {
            p.relative_to(at): p.read_bytes()
            for at in [trained / 'report']
            for p in at.rglob('*')
            if p.is_file()
        }
    )
    manifest = list(csv.DictReader((cohort / 'manifest.csv').open()))
    write_csv(
        tmp_path / 'm.csv',
        [dict(slide_id=r['slide_id'], site='ab'[k // 2 % 2]) for k, r in enumerate(manifest)],
    )
    assert (
        cli.main(
            [
                'heatmap',
                trained / 'checkpoints/best.pt',
                cohort / 'manifest.csv',
                tmp_path / 'maps',
                '--method',
                'activation',
            ]
        )
        == 0
    )
    assert (
        cli.main(
            [
                'report',
                trained,
                '--out',
                out,
                '--subgroups',
                'site',
                '--manifest',
                tmp_path / 'm.csv',
                '--maps',
                tmp_path / 'maps',
                '--anonymous',
                '--max-slides',
                2,
            ]
        )
        == 0
    )
    pages = {p.relative_to(out): p.read_text() for p in out.rglob('*.html')}
    said = ' '.join(pages.values())
    assert (
        'By site' in said
        and 'class activation' in said
        and not any(r['slide_id'] in said for r in manifest)
    )
    refused(capsys, ['report', trained, '--maps', cohort], 'heatmaps.json')
    refused(capsys, ['report', trained, '--comparison', cohort], 'comparison.json')
    refused(capsys, ['report', trained, '--subgroups', 'grade'], 'grade')
    refused(capsys, ['report', trained, '--error-review', tmp_path / 'm.csv'], 'error')
    assert all(v == before[k] for k, v in tree(trained).items() if k.is_file())


@pytest.mark.parametrize(
    'method, more',
    [
        ('smoothgrad', ['--n-samples', 2, '--cell', 8]),
        ('integrated', ['--n-steps', 2, '--cell', 8]),
        ('activation', []),
        ('occlusion', ['--occlusion-size', 32]),
    ],
)
def test_heatmaps(trained, bad, tmp_path, capsys, method, more):
    "Maps lie on their slides; what is there is not drawn again; what cannot be drawn is named, and the others are drawn."
    out, argv = (
        tmp_path / 'maps',
        [
            'heatmap',
            trained / 'checkpoints/best.pt',
            bad / 'manifest.csv',
            tmp_path / 'maps',
            '--method',
            method,
            *more,
        ],
    )
    rows = (bad / 'manifest.csv').read_text().splitlines()
    (bad / 'manifest.csv').write_text('\n'.join(rows[:4]) + '\n')
    first = bad / 'slides/s00.tiff'
    good = first.read_bytes()
    first.write_bytes(good[:300])
    refused(capsys, argv, "'s00'", status=3)
    assert sorted(p.stem for p in (out / 'maps').glob('*.npy')) == ['s01', 's02']
    first.write_bytes(good)
    before = tree(out / 'maps')
    assert (
        cli.main(argv) == 0
        and {k: v for k, v in tree(out / 'maps').items() if k in before} == before
    )
    found = list(csv.DictReader((out / 'regions.csv').open()))
    assert {r['slide_id'] for r in found} <= {'s00', 's01', 's02'} and not list(out.rglob('.*'))
    for k in range(3):
        with Slide(bad / f'slides/s0{k}.tiff') as slide, Slide(out / f'tiff/s0{k}.tiff') as over:
            assert all(
                abs(a * slide.spacing - b * over.spacing) <= over.spacing
                for a, b in zip(slide.size, over.size)
            )
        collection = geojson.loads((out / f'geojson/s0{k}.geojson').read_text())
        assert collection.is_valid and len(collection.features) == sum(
            r['slide_id'] == f's0{k}' for r in found
        )
        for f in collection.features:
            x, y = zip(*f.geometry.coordinates[0])
            assert (
                f.properties['objectType'] == 'annotation'
                and max(x) > 0
                and max(y) > 0
                and min(x) < 10**4
            )
    refused(capsys, [*argv, '--region-threshold', 0.7], 'other settings')


def test_a_map_follows_its_mask(trained, bad, tmp_path):
    "What a map was made of has changed, or what was written of it is gone: it is drawn again."
    slide, argv = (
        bad / 'slides/s00.tiff',
        [
            'heatmap',
            trained / 'checkpoints/best.pt',
            tmp_path / 'm.csv',
            tmp_path / 'maps',
            '--method',
            'gradient',
            '--cell',
            8,
        ],
    )
    with Slide(slide) as s:
        mask = np.full(s.size, 255, np.uint8)
    for left in (False, True):
        mask[:, mask.shape[1] // 2 :] *= not left
        Image.fromarray(mask).save(tmp_path / f'{left}.png')

    def drawn(left):  # when
        (tmp_path / 'm.csv').write_text(
            f'slide_id,label,path,mask\ns00,1,{slide},{tmp_path / f"{left}.png"}\n'
        )
        assert cli.main(argv) == 0
        return (tmp_path / 'maps/maps/s00.npy').stat().st_mtime_ns

    first = drawn(False)
    assert drawn(False) == first and (second := drawn(True)) > first and drawn(True) == second
    (tmp_path / 'maps/overlay/s00.png').unlink()
    drawn(True)
    assert (tmp_path / 'maps/overlay/s00.png').exists()


def test_heatmaps_refused(trained, cohort, tmp_path, capsys):
    for more, says in (
        (['--method', 'patches'], 'sp_mil'),
        (['--method', 'shap'], '--method'),
        (['--method', 'attention'], 'attention pooling'),
        (['--n-samples', 0], '--n-samples'),
        (['--region-threshold', 0], '--region-threshold'),
        (['--cell', 0], '--cell'),
        (['--target', 3], 'target=3'),
        (['--noise-std', -1], '--noise-std'),
        (['--n-steps', 3], '--n-steps has no effect'),
        (['--method', 'activation', '--cell', 8], '--cell has no effect'),
    ):
        refused(
            capsys,
            [
                'heatmap',
                trained / 'checkpoints/best.pt',
                cohort / 'slides/s00.tiff',
                tmp_path / 'x',
                *more,
            ],
            says,
        )
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/a.txt').write_text('a')
    refused(
        capsys,
        ['heatmap', trained / 'checkpoints/best.pt', cohort / 'slides', tmp_path / 'mine'],
        'a.txt',
    )
    refused(
        capsys, ['heatmap', trained / 'checkpoints/best.pt', cohort / 'slides', cohort], 'holds'
    )


def test_outputs_never_replace_what_is_read(trained, bad, tmp_path, capsys):
    model, p = trained / 'checkpoints/best.pt', tmp_path / 'p.csv'
    shutil.copy(trained / 'predictions.csv', p)
    before = tree(bad), p.read_bytes(), tree(trained)
    refused(
        capsys, ['predict', model, bad / 'manifest.csv', bad / 'manifest.csv'], 'is what is read'
    )
    refused(capsys, ['predict', model, bad / 'slides/s00.tiff', bad / 'slides/s00.tiff'], 'same')
    refused(capsys, ['predict', model, bad / 'slides', bad / 'manifest.csv'], 'something else')
    refused(
        capsys,
        ['predict', model, bad / 'slides', bad / 'none/x/../../manifest.csv/p.csv'],
        'cannot be written',
    )
    refused(capsys, ['evaluate', p, '--out', p], '.json')
    refused(capsys, ['evaluate', p, '--out', '.'], 'is a folder')
    refused(capsys, ['report', trained, '--out', trained / 'predictions.csv'], 'in the run')
    refused(capsys, ['report', trained, '--out', p], 'is a file')
    refused(
        capsys,
        ['predict', model, bad / 'slides', trained / 'predictions.csv'],
        'belongs to the run',
    )
    refused(capsys, ['evaluate', p, '--out', ''], 'is empty')
    page = tmp_path / 'site/index.html'
    page.parent.mkdir()
    page.write_text(
        '<!doctype html>\n<html lang="en">\n<head><title>My lab</title></head></html>\n'
    )
    refused(capsys, ['report', trained, '--out', page.parent], 'no former run wrote')
    assert 'My lab' in page.read_text()
    assert (tree(bad), p.read_bytes(), tree(trained)) == before


def test_numbers_that_are_damaged(cohort, trained, tmp_path, capsys):
    model, out = tmp_path / 'c.pt', tmp_path / 'p.csv'
    state = torch.load(trained / 'checkpoints/best.pt')
    state['model']['head.fc.bias'] *= float('nan')
    save_checkpoint(model, **state)
    refused(
        capsys,
        ['predict', model, cohort / 'slides/s00.tiff', out, '--slide-spacing', 4],
        "'s00'",
        'nan',
    )
    whole = bytearray((trained / 'checkpoints/best.pt').read_bytes())
    whole[len(whole) // 2] ^= 64
    model.write_bytes(whole)
    refused(capsys, ['predict', model, cohort / 'slides/s00.tiff', out], 'damaged')
    assert not out.exists()


def test_spacing_is_filled_in_only_where_a_slide_does_not_say(tmp_path):
    pyvips.Image.black(64, 64, bands=3).pngsave(str(tmp_path / 'flat.png'))
    (of_file,) = find_slides(sample_slide(), 1.0).cases
    assert open_slide(of_file).spacing == pytest.approx(0.499)
    (of_user,) = find_slides(tmp_path / 'flat.png', 1.0).cases
    assert open_slide(of_user).spacing == 1


# a training that fails, interrupted, out of disk


def test_a_training_that_diverges_leaves_what_was_there(cohort, trained, tmp_path, capsys):
    argv = [
        'train',
        cohort / 'manifest.csv',
        tmp_path / 'run',
        *QUICK,
        '--lr',
        1e30,
        '--batch-size',
        1,
    ]
    refused(capsys, argv, 's0')
    assert not list(tmp_path.iterdir())
    shutil.copytree(trained, tmp_path / 'run')
    before = tree(tmp_path)
    refused(capsys, [*argv, '--overwrite'], 's0')
    assert {p: t for p, t in tree(tmp_path).items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    } and len(list(tmp_path.iterdir())) == 1


def started(folder, *argv):
    "sp_train in a process of its own, once it has emptied `folder` for its work."
    p = Forked('small:command', 'train', *argv)
    while not (folder / 'environment.json').exists() or (folder / 'report/index.html').exists():
        assert p.poll() is None, p.text()
        time.sleep(0.01)
    return p


@pytest.mark.parametrize('stop', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_training_gives_back_what_it_replaced(cohort, trained, tmp_path, stop):
    run = tmp_path / 'run'
    shutil.copytree(trained, run)
    before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    p = started(run, cohort / 'manifest.csv', run, *QUICK, '--epochs', 1000, '--overwrite')
    p.send_signal(stop)
    _, err = p.communicate()
    assert (
        p.returncode,
        ('stopped: epoch' if (halted := p.returncode == 75) else 'error: interrupted') in err,
    ) in ((75, True), (130, True)) and 'Traceback' not in err, err
    held = (
        run / '.former'
        if any((run / 'checkpoints').glob('point_*.pt')) and (run / '.former').exists()
        else run
    )  # it may have got to a point
    assert not halted or held != run
    assert {
        run / p.relative_to(held): p.read_bytes() for p in held.rglob('*') if p.is_file()
    } == before


def interrupted_at_a_bar(*argv):
    "sp_train, in a process of its own, that is interrupted while a progress bar is made."
    tqdm.std.tqdm._get_free_pos = classmethod(lambda *_: signal.raise_signal(signal.SIGINT))
    return COMMANDS['train']([*map(str, argv)])


def test_an_interrupt_may_come_while_a_bar_is_made(cohort, tmp_path):
    argv = [cohort / 'manifest.csv', tmp_path / 'run', *QUICK]
    p = Forked('test_commands:interrupted_at_a_bar', *argv)
    _, err = p.communicate()
    assert (p.returncode, err) == (130, 'error: interrupted\n')


class Going:
    "Raises an interrupt while it goes."

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        sum(range(10))


def interrupted_in_vain(*argv):
    "sp_train, in a process of its own, of which the first interrupts are lost."
    init = tqdm.std.tqdm.__init__

    def and_lose_one(self, *args, **kwargs):
        init(self, *args, **kwargs)
        Going()
        time.sleep(3)

    tqdm.std.tqdm.__init__ = and_lose_one
    return COMMANDS['train']([*map(str, argv)])


def test_an_interrupt_that_is_lost_comes_again(cohort, tmp_path):
    "As one is that arrives while an object goes, or in a callback of a library."
    argv = [cohort / 'manifest.csv', tmp_path / 'run', *QUICK, '--epochs', 1000]
    p = Forked('test_commands:interrupted_in_vain', *argv)
    _, err = p.communicate()
    assert (
        p.returncode == 130
        and err.splitlines()[-1] == 'error: interrupted'
        and 'Traceback' not in err
    ), err


def test_a_killed_training_loses_nothing(cohort, trained, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(trained, run)
    report = (run / 'report/index.html').read_bytes()
    p = started(run, cohort / 'manifest.csv', run, *QUICK, '--epochs', 1000, '--overwrite')
    refused(
        capsys, ['train', cohort / 'manifest.csv', run, *QUICK, '--overwrite'], 'another process'
    )
    p.kill()
    p.communicate()
    assert (run / '.former/report/index.html').read_bytes() == report
    assert cli.main(['train', cohort / 'manifest.csv', run, *QUICK, '--overwrite']) == 0
    assert (run / 'report/index.html').exists() and not list(run.glob('.*'))


def test_a_demo_never_replaces_a_training(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / 'run')
    f = tmp_path / 'run/settings.toml'
    f.write_text(f.read_text() + 'note = "as sp_demo"\n')
    before = tree(tmp_path)
    refused(
        capsys,
        ['demo', '--tiny', '--out', tmp_path / 'run'],
        'holds what a former run wrote; give the name',
    )
    assert tree(tmp_path) == before


def test_interrupted_demo_leaves_nothing(tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('streaming_pathology.runs.runs.check_cohort', stop)
    refused(capsys, ['demo', '--tiny', '--out', tmp_path / 'demo'], 'interrupted', status=130)
    assert not list(tmp_path.iterdir())


def test_ink_that_is_no_ink(tmp_path, capsys):
    "Slides in a stain that looks like ink are trimmed, trained on and predicted whole where one says so; from trimmed ones it need not be said again."
    folder = tiny_cohort(tmp_path / 'cohort', n=8, size=(96, 96)).parent
    for p in (folder / 'slides').iterdir():
        rgb = np.full((96, 96, 3), 243, np.uint8)
        rgb[20:70, 20:80] = (200, 120, 180)
        rgb[20:70, 20:48] = (60, 90, 170)
        write_tiff(rgb, p, 4.0)
    boxes = {}
    for name, argv in (('ink', []), ('stain', ['--keep-pen'])):
        assert cli.main(['train', folder / 'manifest.csv', tmp_path / name, *QUICK, *argv]) == 0
        with Image.open(next((tmp_path / name / 'images').iterdir())) as im:
            boxes[name] = im.size
        assert (
            cli.main(
                [
                    'predict',
                    tmp_path / name / 'checkpoints/best.pt',
                    folder / 'manifest.csv',
                    tmp_path / f'{name}.csv',
                ]
            )
            == 0
        )
        keep = lambda p: [l.split(',')[:4] for l in p.read_text().splitlines()]
        assert keep(tmp_path / f'{name}.csv') == keep(tmp_path / name / 'predictions.csv')
    assert boxes['stain'][0] > boxes['ink'][0]
    assert (
        cli.main(
            [
                'trim',
                folder / 'manifest.csv',
                tmp_path / 'trimmed',
                '--spacing',
                4,
                '--min-area-mm2',
                0.001,
                '--keep-pen',
                '--workers',
                1,
            ]
        )
        == 0
    )
    assert cli.main(['train', tmp_path / 'trimmed/manifest.csv', tmp_path / 'again', *QUICK]) == 0
    for name, slides in (('table', 'manifest.csv'), ('folder', 'biopsies')):
        assert (
            cli.main(
                [
                    'predict',
                    tmp_path / 'again/checkpoints/best.pt',
                    tmp_path / 'trimmed' / slides,
                    tmp_path / f'{name}.csv',
                ]
            )
            == 0
        )
    column = lambda p: {
        r['slide_id']: r['probability'] for r in read_table(p, ['slide_id', 'probability'])
    }
    assert column(tmp_path / 'table.csv') == column(tmp_path / 'folder.csv')
    (tmp_path / 'linked').mkdir()
    (tmp_path / 'linked/a.tiff').symlink_to(folder / 'slides/s00.tiff')
    (tmp_path / 'linked/b.tiff').symlink_to(folder / 'slides/s00.tiff')
    linked = ['trim', tmp_path / 'linked', tmp_path / 'o', '--spacing', 4, '--min-area-mm2', 0.001]
    assert cli.main([*linked, '--workers', 1]) == 0
    assert "is the same slide as 'a'" in (tmp_path / 'o/slides.csv').read_text()
    with Image.open(next((tmp_path / 'again/images').iterdir())) as im:
        assert abs(np.subtract(im.size, boxes['stain'])).max() <= 32


def test_biopsies_that_turn_beyond_their_canvas(cohort, tmp_path, capsys):
    assert (
        cli.main(
            [
                'train',
                cohort / 'manifest.csv',
                tmp_path / 'run',
                *QUICK,
                '--augment',
                'paper',
                '--size',
                '64,64',
            ]
        )
        == 0
    )
    err = capsys.readouterr().err
    assert (
        err.count('the augmentation may turn or scale 8 of 8 slides beyond the canvas of 64 x 64')
        == 1
        and 'larger than' not in err
    ), err


def test_full_disk(cohort, trained, tmp_path, capsys, monkeypatch):
    def full(f):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    refused(
        capsys,
        ['predict', trained / 'checkpoints/best.pt', cohort / 'slides', tmp_path / 'p.csv'],
        'No space left',
    )
    assert not list(tmp_path.iterdir())


# as processes


def test_as_a_process(cohort, tmp_path):
    r = subprocess.run(
        [
            sys.executable,
            '-m',
            'streaming_pathology.cli',
            'train',
            tmp_path / 'none.csv',
            tmp_path / 'run',
        ],
        capture_output=True,
        text=True,
    )
    assert (
        r.returncode == 2
        and r.stdout == ''
        and r.stderr.count('\n') == 1
        and r.stderr.startswith('error: ')
        and 'none.csv' in r.stderr
    )
    assert not list(tmp_path.iterdir())


def test_help_of_every_command(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as e:
            cli.main([name, '--help'])
        assert e.value.code == 0 and f'sp_{name}' in capsys.readouterr().out


def trimming(manifest, out, workers):
    "Arguments of a trimming."
    options = ['--spacing', 2, '--min-area-mm2', 0.01, '--workers', workers]
    return ['trim', manifest, out, *options]


@pytest.mark.parametrize('workers', [0, 2])
def test_a_trimming_that_is_stopped_ends_at_once(tmp_path, workers):
    "And what it began is whole or not there; the next run goes on."
    manifest = write_cohort(tmp_path / 'cohort', n=4, size=(256, 512), spacing=2.0, progress=False)
    argv = trimming(manifest, tmp_path / 'out', workers)
    # images of 30,000 x 30,000 pixels
    p = Forked('small:command', *argv, '--margin', 30000)
    while not (tmp_path / 'out/overview').exists() or not any(
        (tmp_path / 'out/overview').glob('*.jpg')
    ):
        assert p.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    begun = time.perf_counter()
    _, err = p.communicate(timeout=60)
    assert not any((tmp_path / 'out').rglob('*.partial'))
    assert (
        time.perf_counter() - begun < 15
        and p.returncode == 130
        and err.strip().splitlines()[-1] == 'error: interrupted'
        and 'Traceback' not in err
    ), err
    assert not any((tmp_path / 'out').glob('biopsies/*.tiff'))
    _, err = Forked('small:command', *argv).communicate(timeout=60)
    assert 'other settings' in err


def trimmed_tree(out):
    return {
        p.relative_to(out): p.read_bytes()
        for p in out.rglob('*')
        if p.is_file() and p.parent.name != 'notes'
    }


def test_a_trimming_that_is_killed_goes_on(tmp_path):
    "At any moment, and with a second process that tries to write there too: in the end all is there as if nothing had happened."
    manifest = write_cohort(tmp_path / 'cohort', n=6, size=(256, 384), spacing=2.0, progress=False)

    def trim(name, workers):
        return Forked('small:command', *trimming(manifest, tmp_path / name, workers))

    assert trim('whole', 0).wait() == 0
    first = trim('killed', 1)
    while not any((tmp_path / 'killed/biopsies').glob('*.tiff')):
        assert first.poll() is None, first.text()
        time.sleep(0.01)
    other = trim('killed', 0)
    time.sleep(0.2)
    for p in (first, other):
        p.kill()
        p.wait()
    last = [trim('killed', 0) for _ in range(2)]
    said = [p.communicate(timeout=120)[1] for p in last]
    assert sorted(p.returncode for p in last) in ([0, 2], [0, 0]) and all(
        'another process' in s for s, p in zip(said, last) if p.returncode
    ), said
    a, b = trimmed_tree(tmp_path / 'whole'), trimmed_tree(tmp_path / 'killed')
    assert a.keys() == b.keys() and [k for k in a if a[k] != b[k]] == []


@pytest.mark.parametrize(
    'program, of, more, spared',
    [
        (
            [Path(sys.executable).with_name('sp_trim')],
            'slides',
            ['--spacing', 8, '--min-area-mm2', 0.001],
            ['torch', 'streaming_pathology.cli'],
        ),
        ([COMMAND[1], 'train'], 'manifest.csv', QUICK, ['torchvision', 'streaming_pathology.cli']),
    ],
    ids=['trim', 'train'],
)
def test_processes_import_what_they_need(cohort, tmp_path, program, of, more, spared):
    argv = [
        sys.executable,
        '-X',
        'importtime',
        *program,
        cohort / of,
        tmp_path / 'out',
        *more,
        '--workers',
        1,
    ]
    done = subprocess.run(
        [*map(str, argv)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    imported = [line.split('|')[-1].strip() for line in lines if line.startswith('import time:')]
    told = '\n'.join(line for line in lines if not line.startswith('import time:'))
    # also at the interpreter's end, which processes of other tests do not reach
    assert not any(word in told for word in ('Traceback', 'Exception ignored', 'leaked')), told
    assert imported.count('streaming_pathology.slides.slides') > 1 and all(
        imported.count(m) == 1 for m in spared
    ), {m: imported.count(m) for m in ('streaming_pathology.slides.slides', *spared)}


def test_trimming_onto_a_full_disk(tmp_path):
    "Every slide that could not be written is named, nothing half-written is there, and with room again it goes on."
    manifest = write_cohort(tmp_path / 'cohort', n=3, size=(256, 384), spacing=2.0, progress=False)
    argv = trimming(manifest, tmp_path / 'out', 0)
    # files of 20 kB at most
    p = Forked('small:command', *argv, file_size=20_000)
    _, err = p.communicate()
    assert (
        p.returncode == 2
        and '3 of 3 slides failed' in err
        and 'Traceback' not in err
        and 'cannot be written' in (tmp_path / 'out/failed.csv').read_text()
    ), err
    assert not any((tmp_path / 'out').rglob('*.partial')) and not any(
        (tmp_path / 'out/biopsies').glob('*')
    )
    assert Forked('small:command', *argv).wait() == 0
