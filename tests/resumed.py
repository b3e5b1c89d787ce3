"Runs that were stopped, beside those that were not"

import csv

import torch
from runs import quick

from streaming_pathology.training.checkpoints import checkpoint_files, load_checkpoint

TRAIN = quick(3, 3, 1e-2, '--cosine', '--checkpoint-minutes', 0.003, '--augment', 'paper')


def rows(path, *but):  # of a CSV, without what is never the same
    with open(path) as f:
        return [{k: v for k, v in r.items() if k not in but} for r in csv.DictReader(f)]


def as_if_never_stopped(run, whole):
    a, b = (load_checkpoint(r / 'checkpoints/best.pt')['model'] for r in (run, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (load_checkpoint(checkpoint_files(r / 'checkpoints')[-1]) for r in (run, whole))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    assert rows(run / 'log.csv', 'seconds', 'peak_mb') == rows(
        whole / 'log.csv', 'seconds', 'peak_mb'
    )
    assert rows(run / 'predictions.csv', 'seconds') == rows(whole / 'predictions.csv', 'seconds')
    assert (run / 'metrics.json').read_bytes() == (
        whole / 'metrics.json'
    ).read_bytes() and not list(run.rglob('.*'))
