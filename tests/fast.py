"Which tests are slow: all others run with `pytest -m fast`."

from pathlib import Path

LIST = Path(__file__).with_name('slow.txt')


def slow_tests() -> set[str]:
    "The ids of the slow tests, as pytest names them."
    return set(LIST.read_text(encoding='utf-8').splitlines())


def write_slow_tests(seconds: dict[str, float], limit: float):
    "Write the list anew for the tests that were run: those that took longer than `limit` seconds."
    slow = slow_tests() - set(seconds)
    slow |= {test for test, duration in seconds.items() if duration > limit}
    LIST.write_text(''.join(f'{test}\n' for test in sorted(slow)), encoding='utf-8')
