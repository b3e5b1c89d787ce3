"Multiple-instance learning from the command line: beside streaming in all but the network."
import json, shutil, signal
import numpy as np, pytest
from streaming_pathology import cli
from streaming_pathology.checkpoints import last_point
from streaming_pathology.cohorts import tiny_cohort
from small import small_resnet
from test_cli import refused, tree
from test_resume import as_if_never_stopped, rows

TRAIN = ['--spacing', 4, '--epochs', 2, '--batch', 3, '--patch', 32, '--lr', 1e-3, '--heatmaps', 2, '--augment', 'paper', '--save-minutes', 0]

@pytest.fixture(scope='module')
def whole(once):
    "A cohort, and a run on it that was never stopped."
    def make(folder): assert cli.main(['mil', tiny_cohort(folder/'cohort', size=(150, 200)), folder/'run', *TRAIN]) == 0
    return once('mil', make)

def test_stopped_in_either_phase(whole, tmp_path, monkeypatch):
    argv, save, phases = ['mil', whole/'cohort/manifest.csv', tmp_path/'run', *TRAIN, '--resume'], cli.Checkpoints.save, set()
    for stop in range(1, 20): # after so many points
        seen = []
        def stopped(self, s): save(self, s); seen.append(1); len(seen) == stop and signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(cli.Checkpoints, 'save', stopped); status = cli.main(argv)
        if status == 0: break
        assert status == 75; point = last_point(tmp_path/'run/checkpoints')
        phases.add('training' if point['step'] else 'looking' if 0 < len(dict(point['callbacks'])['TwoPhases']['rows']) < 6 else 'between')
    assert status == 0 and {'training', 'looking'} <= phases, phases
    as_if_never_stopped(tmp_path/'run', whole/'run')

def test_what_it_writes(whole, tmp_path, capsys):
    "What sp_train writes: the same predictions, and a report that tells what was done."
    run, table = whole/'run', lambda p: rows(p, 'seconds')
    for name in ('report.html', 'metrics.json', 'log.csv', 'environment.json'): assert (run/name).exists()
    assert len(table(run/'predictions.csv')) == 12 and len([*run.glob('heatmaps/*.npy')]) == 2 and all(0 < np.load(p).max() < 1 for p in run.glob('heatmaps/*.npy'))
    assert cli.main(['predict', run/'checkpoints/best.pt', whole/'cohort/manifest.csv', tmp_path/'p.csv']) == 0 and table(tmp_path/'p.csv') == table(run/'predictions.csv')
    assert cli.main(['export', run, tmp_path/'m.safetensors']) == 0 and cli.main(['predict', tmp_path/'m.safetensors', whole/'cohort/manifest.csv', tmp_path/'q.csv', '--workers', 1]) == 0 and table(tmp_path/'q.csv') == table(run/'predictions.csv')
    assert cli.main(['predict', tmp_path/'m.safetensors', whole/'cohort/manifest.csv', tmp_path/'t.csv', '--tta', 'flips']) == 0 and table(tmp_path/'t.csv') != table(run/'predictions.csv')
    assert cli.main(['evaluate', run/'predictions.csv']) == 0 and 'AUC' in capsys.readouterr().out

def test_run_again(whole, tmp_path):
    assert cli.main(['mil', whole/'run/settings.toml', tmp_path/'run']) == 0; as_if_never_stopped(tmp_path/'run', whole/'run')

@pytest.mark.parametrize('options, says', [(['--patch', 20], 'a patch has 20'), (['--stride', 40], '40 pixels apart'), (['--tissue', 1.5], 'share of tissue is 1.5'), (['--magnify', '1,x'], 'whole numbers'), (['--magnify', '0'], 'different whole numbers'),
                                           (['--top', 0], '--top is 0'), (['--patch-batch', 0], '--patch-batch is 0'), (['--task', 'regression'], 'two classes'), (['--recipe', 'paper'], '--lr is a matter of the recipe'), (['--strip', 8], '--strip is no option')])
def test_settings(whole, tmp_path, capsys, options, says): refused(capsys, ['mil', whole/'cohort/manifest.csv', tmp_path/'run', *TRAIN, *options], says); assert not [*tmp_path.iterdir()]

def test_going_on(whole, tmp_path, capsys):
    "What is cut into patches, and how, cannot change; the other command does not go on with it."
    shutil.copytree(whole/'run', run := tmp_path/'run'); (run/'report.html').unlink(); before = tree(run)
    for options in (['--patch', 64], ['--tissue', .5], ['--magnify', '1,2']): refused(capsys, ['mil', whole/'cohort/manifest.csv', run, *TRAIN, *options, '--resume', '--accept-changes'], 'sees slides otherwise', options[0][2:])
    refused(capsys, ['train', whole/'cohort/manifest.csv', run, '--spacing', 4, '--epochs', 2, '--resume', '--accept-changes'], 'command sp_mil'); assert tree(run) == before

def test_recipe(whole, tmp_path):
    argv = ['mil', whole/'cohort/manifest.csv', tmp_path/'run', '--spacing', 4, '--patch', 32, '--heatmaps', 0, '--recipe', 'paper', '--epochs', 4]
    assert cli.main(argv) == 0 and [(r['stage'], r['lr']) for r in rows(tmp_path/'run/log.csv')] == [('1', '1e-05')]*2+[('2', '3e-06')]*2
