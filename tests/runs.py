"Runs of commands in tests: what they refuse, say and write"

import re
from pathlib import Path

from streaming_pathology.cli import commands as cli


def quick(epochs, batch_size, lr, *more):
    "Options of a training of small slides that takes seconds."
    of_network = ['--spacing', 4, '--strip', 64, '--heatmaps', 0]
    return [*of_network, '--epochs', epochs, '--batch-size', batch_size, '--lr', lr, *more]


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob('*')}


def refused(capsys, argv, *says, status=2):
    "Run a command in this process; it must refuse, and say these things in its one line."
    capsys.readouterr()
    assert cli.main(argv) == status
    out, err = capsys.readouterr()
    errors = [l for l in re.split('[\r\n]+', err) if 'error:' in l]
    assert len(errors) == 1 and errors[0].startswith('error: ') and 'Traceback' not in err, err
    for s in says:
        assert str(s) in errors[0], errors[0]
    return errors[0]
