"The memory that a machine has free, and that a process keeps."

import os
import sys
from pathlib import Path

import pytest
import torch
from forks import Forked

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


def print_memory(lean):
    "Whether memory is lean, and what a process has after forty blocks of 8 MB were given back."
    lean = lean and plan.lean_memory()
    torch.empty(2**22).zero_()
    large = [(torch.ones(2**21), torch.ones(2**16)) for _ in range(40)]
    small = [b for _, b in large]
    del large
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    print(int(lean), pages * os.sysconf('SC_PAGE_SIZE'), len(small))


def left(lean):
    "What `print_memory` finds in a process of its own."
    process = Forked('test_memory:print_memory', lean)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    lean, memory, _ = map(int, printed.split())
    return lean, memory


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc, and /proc')
def test_lean_memory_is_given_back():
    (_, default), (can, lean) = left(False), left(True)
    assert not can or default - lean > 2e8
