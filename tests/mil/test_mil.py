"Multiple-instance learning from the command line: beside streaming in all but the network."

import csv
import shutil
import signal
import time

import numpy as np
import pytest
from forks import Forked
from resumed import as_if_never_stopped, rows
from runs import refused, tree

from streaming_pathology.cli import commands as cli
from streaming_pathology.slides.cohorts import tiny_cohort
from streaming_pathology.slides.synthetic import write_cohort
from streaming_pathology.training.checkpoints import Checkpoints, last_checkpoint

pytestmark = pytest.mark.usefixtures('small_resnet')

TRAIN = [
    '--spacing',
    4,
    '--epochs',
    2,
    '--batch-size',
    3,
    '--patch-size',
    32,
    '--lr',
    1e-3,
    '--heatmaps',
    2,
    '--augment',
    'paper',
    '--checkpoint-minutes',
    0,
]


@pytest.fixture(scope='module')
def whole(once):
    "A cohort, and a run on it that was never stopped."

    def make(folder):
        assert (
            cli.main(
                ['mil', tiny_cohort(folder / 'cohort', size=(150, 200)), folder / 'run', *TRAIN]
            )
            == 0
        )

    return once('mil', make)


def test_stopped_in_either_phase(whole, tmp_path, monkeypatch):
    argv, save, phases = (
        ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *TRAIN, '--resume'],
        Checkpoints.save,
        set(),
    )
    for stop in range(1, 20):  # after so many points
        seen = []

        def stopped(self, s):
            save(self, s)
            seen.append(1)
            len(seen) == stop and signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Checkpoints, 'save', stopped)
        status = cli.main(argv)
        if status == 0:
            break
        assert status == 75
        point = last_checkpoint(tmp_path / 'run/checkpoints')
        phases.add(
            'training'
            if point['step']
            else 'looking'
            if 0 < len(dict(point['callbacks'])['TwoPhases']['rows']) < 6
            else 'between'
        )
    assert status == 0 and {'training', 'looking'} <= phases, phases
    as_if_never_stopped(tmp_path / 'run', whole / 'run')


def test_what_it_writes(whole, tmp_path, capsys):
    "What sp_train writes: the same predictions, and a report that tells what was done."
    run, table = whole / 'run', lambda p: rows(p, 'seconds')
    for name in ('report/index.html', 'metrics.json', 'log.csv', 'environment.json'):
        assert (run / name).exists()
    assert (
        len(table(run / 'predictions.csv')) == 12
        and len([*run.glob('heatmaps/*.npy')]) == 2
        and all(0 < np.load(p).max() < 1 for p in run.glob('heatmaps/*.npy'))
    )
    assert cli.main(
        ['predict', run / 'checkpoints/best.pt', whole / 'cohort/manifest.csv', tmp_path / 'p.csv']
    ) == 0 and table(tmp_path / 'p.csv') == table(run / 'predictions.csv')
    assert (
        cli.main(['export', run, tmp_path / 'm.safetensors']) == 0
        and cli.main(
            [
                'predict',
                tmp_path / 'm.safetensors',
                whole / 'cohort/manifest.csv',
                tmp_path / 'q.csv',
                '--workers',
                1,
            ]
        )
        == 0
        and table(tmp_path / 'q.csv') == table(run / 'predictions.csv')
    )
    assert cli.main(
        [
            'predict',
            tmp_path / 'm.safetensors',
            whole / 'cohort/manifest.csv',
            tmp_path / 't.csv',
            '--tta',
            'flips',
        ]
    ) == 0 and table(tmp_path / 't.csv') != table(run / 'predictions.csv')
    assert cli.main(['evaluate', run / 'predictions.csv']) == 0 and 'AUC' in capsys.readouterr().out


def test_run_again(whole, tmp_path):
    assert cli.main(['mil', whole / 'run/settings.toml', tmp_path / 'run']) == 0
    as_if_never_stopped(tmp_path / 'run', whole / 'run')


@pytest.mark.parametrize(
    'options, says',
    [
        (['--patch-size', 20], 'a patch has 20'),
        (['--stride', 40], '40 pixels apart'),
        (['--tissue', 1.5], 'share of tissue is 1.5'),
        (['--downsample', '1,x'], 'whole numbers'),
        (['--downsample', '0'], 'different whole numbers'),
        (['--top-k', 0], '--top-k is 0'),
        (['--patch-batch-size', 0], '--patch-batch-size is 0'),
        (['--task', 'regression'], 'two classes'),
        (['--recipe', 'paper'], '--lr is set by --recipe paper'),
        (['--strip', 8], 'unknown option --strip'),
    ],
)
def test_settings(whole, tmp_path, capsys, options, says):
    refused(
        capsys, ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *TRAIN, *options], says
    )
    assert not [*tmp_path.iterdir()]


def test_going_on(whole, tmp_path, capsys):
    "What is cut into patches, and how, cannot change; the other command does not go on with it."
    shutil.copytree(whole / 'run', run := tmp_path / 'run')
    shutil.rmtree(run / 'report')
    before = tree(run)
    for options in (['--patch-size', 64], ['--tissue', 0.5], ['--downsample', '1,2']):
        refused(
            capsys,
            [
                'mil',
                whole / 'cohort/manifest.csv',
                run,
                *TRAIN,
                *options,
                '--resume',
                '--accept-changes',
            ],
            'cannot be changed on resume',
            options[0][2:],
        )
    refused(
        capsys,
        [
            'train',
            whole / 'cohort/manifest.csv',
            run,
            '--spacing',
            4,
            '--epochs',
            2,
            '--resume',
            '--accept-changes',
        ],
        'was trained with sp_mil',
    )
    assert tree(run) == before


def test_recipe(whole, tmp_path):
    argv = [
        'mil',
        whole / 'cohort/manifest.csv',
        tmp_path / 'run',
        '--spacing',
        4,
        '--patch-size',
        32,
        '--heatmaps',
        0,
        '--recipe',
        'paper',
        '--epochs',
        4,
    ]
    assert (
        cli.main(argv) == 0
        and [(r['stage'], r['lr']) for r in rows(tmp_path / 'run/log.csv')]
        == [('1', '1e-05')] * 2 + [('2', '3e-06')] * 2
    )


FEATURES = [
    '--spacing',
    4,
    '--epochs',
    3,
    '--batch-size',
    3,
    '--patch-size',
    64,
    '--stride',
    32,
    '--heatmaps',
    2,
    '--checkpoint-minutes',
    0,
    '--aggregator',
    'abmil',
    '--augment',
    'paper',
    '--views',
    2,
]


@pytest.fixture(scope='module')
def features(whole, once):
    "A run on features, never stopped."

    def make(folder):
        assert cli.main(['mil', whole / 'cohort/manifest.csv', folder / 'run', *FEATURES]) == 0

    return once('features', make) / 'run'


def test_features_stopped(whole, features, tmp_path, monkeypatch):
    "After each slide; what is kept on the way is what is used."
    argv, save, checkpoint_files = (
        ['mil', whole / 'cohort/manifest.csv', tmp_path / 'run', *FEATURES, '--resume'],
        Checkpoints.save,
        [],
    )

    def stopped(self, s):
        save(self, s)
        checkpoint_files.append(1)
        len(checkpoint_files) % 7 == 0 and signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, 'save', stopped)
    stops = 0
    while (status := cli.main(argv)) == 75:
        stops += 1
    assert status == 0 and stops >= 3
    as_if_never_stopped(tmp_path / 'run', features)
    assert {p.name: p.read_bytes() for p in (tmp_path / 'run/features').iterdir()} == {
        p.name: p.read_bytes() for p in (features / 'features').iterdir()
    }


def test_features_killed(whole, features, tmp_path):
    "While features are made, and between epochs; no file of them is ever half there, and none is made again."
    run, seen = tmp_path / 'run', {}
    for n, minutes in (
        (2, 10),
        (4, 10),
        (17, 0),
    ):  # files that are there when it is killed, at first before there is a point
        words = [*FEATURES, '--resume', '--checkpoint-minutes', minutes]
        p = Forked('small:command', 'mil', whole / 'cohort/manifest.csv', run, *words)
        while p.poll() is None and len([*run.glob('features/*.safetensors')]) < n:
            time.sleep(0.002)
        p.kill()
        p.wait()
        now = {f.name: f.stat().st_mtime_ns for f in run.glob('features/s*')}
        assert len(now) >= n and all(now[k] == v for k, v in seen.items())
        seen = now
    assert cli.main(['mil', whole / 'cohort/manifest.csv', run, *FEATURES, '--resume']) == 0
    as_if_never_stopped(run, features)
    assert {p.name: p.read_bytes() for p in (run / 'features').iterdir()} == {
        p.name: p.read_bytes() for p in (features / 'features').iterdir()
    }


def test_features_predicted(whole, features, tmp_path):
    "The backbone comes with the run, and with what is exported of it."
    table = lambda p: rows(p, 'seconds')
    assert (
        len([*(features / 'features').iterdir()]) == 8 * 2 + 12
        and len([*features.glob('heatmaps/*.npy')]) == 2
    )
    assert cli.main(
        [
            'predict',
            features / 'checkpoints/best.pt',
            whole / 'cohort/manifest.csv',
            tmp_path / 'p.csv',
        ]
    ) == 0 and table(tmp_path / 'p.csv') == table(features / 'predictions.csv')
    assert (
        cli.main(['export', features, tmp_path / 'm.safetensors']) == 0
        and cli.main(
            [
                'predict',
                tmp_path / 'm.safetensors',
                whole / 'cohort/manifest.csv',
                tmp_path / 'q.csv',
                '--workers',
                1,
            ]
        )
        == 0
        and table(tmp_path / 'q.csv') == table(features / 'predictions.csv')
    )
    assert (
        cli.main(
            [
                'predict',
                tmp_path / 'm.safetensors',
                whole / 'cohort/manifest.csv',
                tmp_path / 't.csv',
                '--tta',
                'flips',
            ]
        )
        == 0
    )
    assert (
        cli.main(
            [
                'mil',
                features / 'settings.toml',
                tmp_path / 'again',
                '--features',
                features / 'features',
            ]
        )
        == 0
    )
    as_if_never_stopped(tmp_path / 'again', features)
    assert not (tmp_path / 'again/features').exists()


def test_heatmaps(whole, features, tmp_path, capsys):
    "Of patches, by probability or attention."
    for run in (whole / 'run', features):
        assert (
            cli.main(
                [
                    'heatmap',
                    run / 'checkpoints/best.pt',
                    whole / 'cohort/slides/s00.tiff',
                    out := tmp_path / run.parent.name,
                ]
            )
            == 0
        )
        heat = np.load(out / 'maps/s00.npy')
        assert (
            0 <= heat.min() <= heat.max() <= 1
            and (out / 'geojson/s00.geojson').exists()
            and (out / 'overlay/s00.png').exists()
        )
        refused(
            capsys,
            [
                'heatmap',
                run / 'checkpoints/best.pt',
                whole / 'cohort/slides',
                tmp_path / 'x',
                '--method',
                'gradient',
            ],
            'network of patches',
        )


def test_other_backbone(whole, features, tmp_path, capsys):
    "Weights of another backbone beside the run are refused, at resume and when predicting; so are none."
    shutil.copytree(features, run := tmp_path / 'run')
    shutil.rmtree(run / 'report')
    assert (
        cli.main(
            [
                'mil',
                whole / 'cohort/manifest.csv',
                tmp_path / 'other',
                *FEATURES,
                '--epochs',
                1,
                '--seed',
                7,
            ]
        )
        == 0
    )
    shutil.copy(
        tmp_path / 'other/checkpoints/encoder.safetensors', run / 'checkpoints/encoder.safetensors'
    )
    assert not {p.name for p in (tmp_path / 'other/features').iterdir()} & {
        p.name for p in (features / 'features').iterdir()
    }
    refused(
        capsys,
        ['mil', whole / 'cohort/manifest.csv', run, *FEATURES, '--resume'],
        'is not the one that',
        'encoder.safetensors',
    )
    refused(
        capsys,
        ['predict', run / 'checkpoints/best.pt', whole / 'cohort/manifest.csv', tmp_path / 'p.csv'],
        'is not the backbone whose features',
    )
    (run / 'checkpoints/encoder.safetensors').unlink()
    refused(
        capsys,
        ['predict', run / 'checkpoints/best.pt', whole / 'cohort/manifest.csv', tmp_path / 'p.csv'],
        'encoder.safetensors',
    )
    refused(
        capsys,
        ['mil', whole / 'cohort/manifest.csv', run, *FEATURES, '--resume'],
        'is not the one that',
    )


@pytest.mark.parametrize(
    'aggregator, more',
    [
        ('rnn', []),
        ('topk', ['--top-k', 2]),
        ('clam', ['--dropout', 0.2, '--amp', 'bf16', '--ema', 0.9]),
    ],
)
def test_on_a_trained_backbone(whole, tmp_path, aggregator, more):
    assert (
        cli.main(
            [
                'mil',
                whole / 'cohort/manifest.csv',
                tmp_path / 'run',
                '--spacing',
                4,
                '--epochs',
                1,
                '--patch-size',
                64,
                '--heatmaps',
                0,
                '--backbone',
                whole / 'run',
                '--aggregator',
                aggregator,
                *more,
            ]
        )
        == 0
    )
    assert (
        cli.main(
            [
                'predict',
                tmp_path / 'run/checkpoints/best.pt',
                whole / 'cohort/slides',
                tmp_path / 'p.csv',
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    'options, says',
    [
        (['--aggregator', 'rnn'], 'how suspicious'),
        (['--aggregator', 'mil'], '--aggregator'),
        (['--aggregator', 'abmil', '--top-k', 3], '--top-k only applies with --aggregator topk'),
        (['--backbone', 'x.pt'], '--backbone only applies with --aggregator'),
        (['--aggregator', 'max', '--backbone', 'x.pt'], 'that is there'),
        (['--aggregator', 'max', '--views', 0], '--views'),
        (['--aggregator', 'max', '--dropout', 1], '--dropout'),
        (['--aggregator', 'max', '--freeze-until', 'layer4'], '--freeze-until'),
        (['--aggregator', 'clam', '--task', 'ordinal'], 'two classes'),
        (['--aggregator', 'max', '--backbone', 'torchvision:alexnet2'], 'has no network'),
        (
            ['--annotation', 'truth', '--aggregator', 'max'],
            '--aggregator does not apply with --annotation',
        ),
        (['--annotation', 'outlines'], 'outlines'),
        (['--classes', '2'], '--classes only applies with --annotation'),
    ],
)
def test_settings_of_features(whole, tmp_path, capsys, options, says):
    refused(
        capsys,
        [
            'mil',
            whole / 'cohort/manifest.csv',
            tmp_path / 'run',
            '--spacing',
            4,
            '--patch-size',
            64,
            *options,
        ],
        says,
    )
    assert not [*tmp_path.iterdir()]


def test_annotations(tmp_path, capsys):
    "Patches learn from masks; run again, it is the same."
    painted = write_cohort(
        tmp_path / 'cohort',
        12,
        size=(128, 256),
        spacing=4.0,
        tumour_fractions=(0.2, 0.5),
        seed=3,
        look='natural',  # in which a few epochs find tumour
    )
    argv = [
        '--spacing',
        4,
        '--epochs',
        4,
        '--batch-size',
        3,
        '--patch-size',
        32,
        '--heatmaps',
        0,
        '--lr',
        3e-3,
        '--optimizer',
        'adamw',
        '--annotation',
        'truth',
        '--classes',
        '3',
        '--checkpoint-minutes',
        0,
    ]
    assert (
        cli.main(['mil', painted, tmp_path / 'run', *argv]) == 0
        and cli.main(['mil', tmp_path / 'run/settings.toml', tmp_path / 'again']) == 0
    )
    as_if_never_stopped(tmp_path / 'again', tmp_path / 'run')
    assert float(rows(tmp_path / 'run/log.csv')[-1]['train_loss']) < 0.6
    text = painted.read_text()
    bare = tmp_path / 'cohort/bare.csv'
    learned = {r['slide_id'] for r in rows(tmp_path / 'run/cohort.csv') if r['split'] == 'train'}
    first = next(
        r
        for r in csv.DictReader(text.splitlines())
        if r['label'] == '1' and r['slide_id'] in learned
    )
    bare.write_text(text.replace(first['truth'], ''))
    refused(capsys, ['mil', bare, tmp_path / 'x', *argv], 'has no annotation', first['slide_id'])
    refused(
        capsys,
        ['mil', painted, tmp_path / 'x', *argv, '--classes', '9'],
        'is positive, and nothing',
        'it holds 0, 1, ',
    )
    assert not (tmp_path / 'x').exists()
    before = tree(tmp_path / 'run')
    refused(
        capsys,
        [
            'mil',
            painted,
            tmp_path / 'run',
            *argv,
            '--classes',
            '1',
            '--epochs',
            5,
            '--resume',
            '--accept-changes',
        ],
        'is negative, and something',
    )
    assert tree(tmp_path / 'run') == before
    refused(
        capsys,
        ['mil', painted, tmp_path / 'x', *argv, '--classes', '1'],
        'is negative, and something',
        'it holds 0, 1',
    )
    assert not (tmp_path / 'x').exists()


def test_own_backbone(whole, tmp_path, monkeypatch, capsys):
    "A network of one's own whose weights are others each time it is built, named from another folder; a trained one that is gone when the run goes on."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'mine.py').write_text(
        'import torch\ndef net():\n    torch.seed(); net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 6))\n    net[2].also = net[2].weight # one tensor under two names\n    return net, lambda x: x.float()/255\n'
    )
    shutil.copytree(whole / 'run', tmp_path / 'trained')
    argv = [
        '--spacing',
        4,
        '--patch-size',
        64,
        '--heatmaps',
        0,
        '--lr',
        1e-3,
        '--aggregator',
        'max',
    ]
    for run, backbone in ('own', 'mine.py:net'), ('other', 'trained'):
        command = [
            'mil',
            whole / 'cohort/manifest.csv',
            tmp_path / run,
            *argv,
            '--backbone',
            backbone,
            '--features',
            'kept',
        ]
        monkeypatch.chdir(tmp_path)
        assert cli.main([*command, '--epochs', 1]) == 0
        assert (
            cli.main(
                ['predict', f'{run}/checkpoints/best.pt', whole / 'cohort/manifest.csv', 'p.csv']
            )
            == 0
        )
        new, old = rows('p.csv', 'seconds'), rows(f'{run}/predictions.csv', 'seconds')
        assert [float(r.pop('probability')) for r in new] == pytest.approx(
            [float(r.pop('probability')) for r in old], abs=1e-6
        ) and new == old  # patches may lie otherwise in memory
        monkeypatch.chdir(whole)
        if run == 'own':
            assert (
                cli.main(['mil', tmp_path / run / 'settings.toml', tmp_path / 'again']) == 0
                and cli.main(
                    [
                        'mil',
                        tmp_path / run / 'settings.toml',
                        tmp_path / run,
                        '--epochs',
                        2,
                        '--resume',
                        '--accept-changes',
                    ]
                )
                == 0
            )
            continue
        refused(
            capsys,
            [
                'mil',
                whole / 'cohort/manifest.csv',
                tmp_path / 'trained',
                *argv,
                '--backbone',
                tmp_path / 'trained',
                '--overwrite',
            ],
            'which would be replaced',
        )
        (tmp_path / 'leak/checkpoints').mkdir(parents=True)
        shutil.copy(tmp_path / 'trained/checkpoints/best.pt', tmp_path / 'leak/checkpoints')
        shutil.copy(tmp_path / 'trained/environment.json', tmp_path / 'leak')
        (tmp_path / 'leak/cohort.csv').write_text(
            (tmp_path / 'trained/cohort.csv').read_text().replace(',test,', ',train,')
        )
        refused(
            capsys,
            [
                'mil',
                whole / 'cohort/manifest.csv',
                tmp_path / 'new',
                *argv,
                '--backbone',
                tmp_path / 'leak',
            ],
            'training or tuning split of the backbone',
        )
        refused(
            capsys,
            [
                'mil',
                whole / 'cohort/manifest.csv',
                tmp_path / 'new',
                *argv,
                '--features',
                tmp_path / 'new/kept',
            ],
            'in the folder of the run',
        )
        refused(
            capsys,
            [*command, '--epochs', 2, '--resume', '--accept-changes', '--backbone', 'traned'],
            'that is there',
        )
        shutil.rmtree(tmp_path / 'trained')
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        assert (
            cli.main([*command, '--epochs', 2, '--resume', '--accept-changes']) == 0
            and "the run's own copy is used" in capsys.readouterr().err
        )
        refused(capsys, [*command, '--epochs', 2, '--overwrite'], 'that is there')


def test_timm():
    pytest.importorskip('timm')
    import torch

    from streaming_pathology.mil.features import built, make_encoder

    encoder, patches = (
        make_encoder('timm:resnet10t'),
        torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
    )
    x, scores = encoder(patches)
    again = built(encoder.card)
    again.load_state_dict(encoder.state_dict())
    assert (
        scores is None
        and x.shape == (2, 512)
        and torch.equal(again(patches)[0], x)
        and again.sealed() == encoder.sealed()
    )
