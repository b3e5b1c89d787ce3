"The memory that a machine has free, and that a process keeps."

import subprocess
import sys
from pathlib import Path

import pytest

from streaming_pathology.engine import plan


@pytest.mark.parametrize(
    'says, expected',
    [('MemTotal: 9 kB\nMemAvailable:  7 kB\n', 7 * 1024), ('MemTotal: 9 kB\n', None)],
    ids=['today', 'before Linux 3.14'],
)
def test_free_on_host(tmp_path, monkeypatch, says, expected):
    "Where Linux does not say what is available, what is free counts."
    (tmp_path / 'meminfo').write_text(says)
    monkeypatch.setattr(plan, 'Path', lambda path: tmp_path / Path(path).name)
    free = plan.free_on_host()
    assert free == expected if expected else free > 0


LARGE_AND_SMALL = """
import os, torch
from streaming_pathology.engine.plan import lean_memory
lean = LEAN and lean_memory()
torch.empty(2**22).zero_()
large = [(torch.ones(2**21), torch.ones(2**16)) for _ in range(40)]
small = [b for _, b in large]
del large
print(int(lean), int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE'))
"""


def left(lean):
    "Whether memory is lean, and what a process has after forty blocks of 8 MB were given back."
    command = [sys.executable, '-c', LARGE_AND_SMALL.replace('LEAN', str(lean))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc, and /proc')
def test_lean_memory_is_given_back():
    (_, default), (can, lean) = left(False), left(True)
    assert not can or default - lean > 2e8
