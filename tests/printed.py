"""What a cell prints now, compared with what was committed.

Texts have to be equal and numbers nearly so. What differs between two runs for a good reason is left
out (`VARIES`), and cells that show a measurement are not compared (`MEASURED`)."""

import difflib
import math
import re

# (notebook, id of a cell) -> why two runs of it print different numbers
MEASURED = {
    ('bench/03_measure', '6876fa8a'): 'speed of the memory',
    ('bench/03_measure', '1e9ba2bf'): 'strips planned by the speeds of this machine',
    ('cli/02_commands', '8263f05f'): 'seconds of each prediction',
    ('engine/11_ledger', '5b1f3aaf'): 'memory that was allocated',
    ('engine/11_ledger', 'b3466fa5'): 'speeds of this machine',
    ('engine/11_ledger', 'd88142e2'): 'seconds of a step',
    ('engine/12_plan', '17ad241c'): 'times predicted from the speeds of this machine',
    ('engine/12_plan', 'e40d1bb9'): 'times predicted from the speeds of this machine',
    ('evaluation/01_predict', '2262ac6c'): 'seconds of each prediction',
    ('paper/06_runner', 'ef5b6861'): 'hours of each job',
}

# What differs between two runs, and what stands for it
VARIES = [
    (r'\x1b\[[0-9;]*m', ''),  # colors of a terminal
    (r'( at)? 0x[0-9a-f]{6,}\b', ''),  # addresses of objects, which nbdev_clean removes
    (r'\bsha256 is [0-9a-f]{64}\b', 'sha256'),  # of files that torch.save wrote
    (r'\bexported 20\d\d-\d\d-\d\d\b', 'exported today'),
    (r'\bmodel `?[0-9a-f]{16}\b', 'model'),  # the last digits of trained weights vary by machine
]
PROGRESS_BAR = re.compile(r'\d+%\||\d+\w* \[\d\d:\d\d')

NUMBER = re.compile(r'(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)')

# Whole numbers are equal. Others come from sums whose order depends on the machine.
RELATIVE = 1e-3
ROUNDING = 1e-6  # what is smaller than this is a rounding error, whose size says nothing


def text_of(outputs: list, stream: str) -> str:
    "The text of the outputs of a cell on stdout, as its result, or on stderr; pictures are left out."
    texts = []
    for output in outputs:
        if output['output_type'] == 'stream':
            is_stderr = output['name'] == 'stderr'
            if is_stderr == (stream == 'stderr'):
                texts.append(''.join(output['text']))
        elif stream == 'stdout':
            data = output.get('data', {})
            for kind in ('text/markdown', 'text/plain'):
                if kind in data:
                    texts.append(''.join(data[kind]) + '\n')
                    break
    return ''.join(texts)


def normal(text: str) -> str:
    "A text without what differs between two runs; of lines that were overwritten, the last one."
    lines = [line.rstrip('\r').rpartition('\r')[2] for line in text.split('\n')]
    text = '\n'.join(lines)
    for pattern, replacement in VARIES:
        text = re.sub(pattern, replacement, text)
    return '\n'.join(line.rstrip() for line in text.split('\n') if line.strip())


def without_bars(text: str) -> str:
    "A text without the progress bars that tqdm draws on stderr."
    lines = normal(text).split('\n')
    return '\n'.join(line for line in lines if not PROGRESS_BAR.search(line))


def is_whole(number: str) -> bool:
    return number.lstrip('+-').isdigit()


def same_number(a: str, b: str) -> bool:
    "Whether two numbers are equal, or differ by no more than rounding."
    if is_whole(a) and is_whole(b):
        return int(a) == int(b)
    small = max(abs(float(a)), abs(float(b))) < ROUNDING
    return small or math.isclose(float(a), float(b), rel_tol=RELATIVE)


def same(a: str, b: str) -> bool:
    "Whether two texts are equal, but for spaces and the rounding of numbers."
    if NUMBER.sub('0', a).split() != NUMBER.sub('0', b).split():
        return False
    return all(map(same_number, NUMBER.findall(a), NUMBER.findall(b)))


def changes(before: str, after: str) -> str:
    "A diff of two texts; empty where they are the same."
    if same(before, after):
        return ''
    lines = difflib.unified_diff(
        before.split('\n'), after.split('\n'), 'committed', 'now', lineterm=''
    )
    return '\n'.join(lines)


def difference(committed: list, now: list) -> str:
    """How the outputs of a cell differ from the committed ones; empty where they do not. Text on
    stderr counts as a difference: a cell that shows an error prints it."""
    warned, warns = (without_bars(text_of(outputs, 'stderr')) for outputs in (committed, now))
    if warns:
        return f'it writes to stderr:\n{warns}'
    if warned:
        return f'text on stderr is committed:\n{warned}'
    before, after = (normal(text_of(outputs, 'stdout')) for outputs in (committed, now))
    return changes(before, after)
