"Every notebook is one test, run as nbdev runs it: flags are honoured, and the first cell that fails gives the traceback."

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from nbdev.config import get_config
from notebooks import NBS, ROOT, cells, flags, name, notebooks

LIMIT = 540  # seconds for a notebook; a little less than pytest.ini gives, so that the message is this one


@pytest.fixture(scope='module')
def server():
    "A process that runs notebooks: see `run_notebook`."
    process = subprocess.Popen(
        [sys.executable, ROOT / 'tests' / 'run_notebook.py'],
        cwd=NBS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(120)


def run(server, path, skip, out):
    "What a notebook printed, and its exit status; None if the time limit ended it."
    out.touch()
    print(json.dumps([str(path), str(out), *skip]), file=server.stdin, flush=True)
    group, late = int(server.stdout.readline()), []

    def end(late=late):
        late.append(True)
        os.killpg(group, signal.SIGKILL)

    timer = threading.Timer(LIMIT, end)
    timer.start()
    status = int(server.stdout.readline())
    timer.cancel()
    try:
        os.killpg(group, signal.SIGKILL)  # what a notebook left running as well
    except ProcessLookupError:
        pass
    return out.read_text(errors='replace'), None if late else status


@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_notebook(path, request, record_property, server, tmp_path):
    "The notebook runs from top to bottom; a process each, so that no notebook sees another's threads, seeds or memory."
    skip = set(get_config(path=ROOT).tst_flags.split()) - set(
        request.config.getoption('flags').split()
    )
    skipped = Counter(flag for cell in cells(path) for flag in flags(cell) & skip)
    if skipped:
        record_property(
            'skipped_cells',
            f'{name(path)} {", ".join(f"{n} {flag}" for flag, n in sorted(skipped.items()))}',
        )
    out, status = run(server, path, skip, tmp_path / 'out')
    if status is None:
        pytest.fail(f'{path.relative_to(ROOT)} was not done after {LIMIT} s\n{out}', pytrace=False)
    if status:
        pytest.fail(f'{path.relative_to(ROOT)} (exit status {status})\n{out}', pytrace=False)
