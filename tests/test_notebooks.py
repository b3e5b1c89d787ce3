"Every notebook is one test, run as nbdev runs it: flags are honoured, and the first cell that fails gives the traceback."

import os
import signal
import subprocess
from collections import Counter

import pytest
from forks import Forked
from nbdev.config import get_config
from notebooks import ROOT, cells, flags, name, notebooks

LIMIT = 540  # seconds for a notebook; a little less than pytest.ini gives, so that the message is this one


def run(path, skip):
    "What a notebook printed, and its exit status; None if the time limit ended it."
    process = Forked('run_notebook:run_and_end', path, *skip, new_session=True)
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        status = None
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what a notebook left running as well
    except ProcessLookupError:
        pass
    process.wait()
    return process.text(), status


@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_notebook(path, request, record_property):
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
    out, status = run(path, skip)
    if status is None:
        pytest.fail(f'{path.relative_to(ROOT)} was not done after {LIMIT} s\n{out}', pytrace=False)
    if status:
        pytest.fail(f'{path.relative_to(ROOT)} (exit status {status})\n{out}', pytrace=False)
