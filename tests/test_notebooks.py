"Every notebook is one test, run as nbdev runs it: flags are honoured, and the first cell that fails gives the traceback."
import os, signal, subprocess, sys
from collections import Counter
import pytest
from nbdev.config import get_config
from notebooks import ROOT, NBS, cells, flags, name, notebooks

LIMIT = 540   # seconds for a notebook; a little less than pytest.ini gives, so that the message is this one

def run(command, limit=LIMIT):
    "Run a command from nbs/ as a group of processes; what it printed and its status, None if the time limit ended it."
    process = subprocess.Popen(command, cwd=NBS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True)
    try: return process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired as e: return (e.stdout or b'').decode(errors='replace'), None
    finally:
        try: os.killpg(process.pid, signal.SIGKILL)   # what a notebook left running as well
        except ProcessLookupError: pass

@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_notebook(path, request, record_property):
    "The notebook runs from top to bottom; a process each, so that no notebook sees another's threads, seeds or memory."
    skip = set(get_config(path=ROOT).tst_flags.split()) - set(request.config.getoption('flags').split())
    skipped = Counter(flag for cell in cells(path) for flag in flags(cell) & skip)
    if skipped: record_property('skipped_cells', f"{name(path)} {', '.join(f'{n} {flag}' for flag, n in sorted(skipped.items()))}")
    out, status = run([sys.executable, ROOT/'tests'/'run_notebook.py', path, *skip])
    if status is None: pytest.fail(f'{path.relative_to(ROOT)} was not done after {LIMIT} s\n{out}', pytrace=False)
    if status: pytest.fail(f'{path.relative_to(ROOT)} (exit status {status})\n{out}', pytrace=False)
