"Which tests are slow: all others run with `pytest -m fast`."

from pathlib import Path

LIST = Path(__file__).with_name('slow.txt')


def slow_tests() -> set[str]:
    "The ids of the slow tests, as pytest names them, and files of which all are slow."
    return set(LIST.read_text(encoding='utf-8').splitlines())


def is_slow(test: str, slow: set[str]) -> bool:
    "Whether a test, or its whole file, is among the slow ones."
    return test in slow or test.split('::')[0] in slow


def write_slow_tests(seconds: dict[str, float], limit: float):
    "Write the list anew for the tests that were run: those that took longer than `limit` seconds."
    measured = {*seconds, *(test.split('::')[0] for test in seconds)}
    slow = slow_tests() - measured
    slow |= {test for test, duration in seconds.items() if duration > limit}
    LIST.write_text(''.join(f'{test}\n' for test in sorted(slow)), encoding='utf-8')
