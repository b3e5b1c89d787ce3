"The memory that a machine has free, and that a process keeps."

import os
import sys
from pathlib import Path

import pytest
import torch
from forks import Forked
from torch import nn

from streaming_pathology.engine import plan
from streaming_pathology.engine.storage import host_memory
from streaming_pathology.engine.stream import stream

HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')
LEAN = HUGE_PAGES.exists() and '[never]' not in HUGE_PAGES.read_text()


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
    print(int(lean), resident_bytes(), len(small))


def resident_bytes():
    "Bytes of memory that this process has."
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


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


def print_memory_of_backward(gives_back):
    "What a process has at the end of a backward pass with kept strips, beyond what it had before."
    assert plan.lean_memory()
    host_memory.is_lean = gives_back
    maps = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(8)]
    net = stream(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *maps), strip=64, keep=48)
    image = torch.rand(1, 3, 4096, 256)
    before = resident_bytes()
    net(image).square().mean().backward()
    print(resident_bytes() - before)


def after_backward(gives_back):
    "What `print_memory_of_backward` finds in a process of its own."
    process = Forked('test_memory:print_memory_of_backward', gives_back)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return int(printed)


@pytest.mark.skipif(not LEAN, reason='glibc, and huge pages')
def test_what_kept_strips_took_is_given_back():
    kept, given_back = after_backward(False), after_backward(True)
    assert given_back < kept - 5e7
