"The memory that a machine has free."

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
