"What the tests ask of a notebook: where it is, its cells, their flags."

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'


def notebooks():
    "Every notebook of the repository, in reading order."
    return [
        p
        for p in sorted(NBS.rglob('*.ipynb'))
        if not any(part[0] in '._' for part in p.relative_to(NBS).parts)
    ]


def name(path):
    "The name of a test: the path below nbs/ without its ending."
    return path.relative_to(NBS).with_suffix('').as_posix()


def cells(path, kind='code'):
    "The cells of one kind, each with its source as one string."
    return [
        {**c, 'source': ''.join(c['source'])}
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == kind
    ]


def flags(cell):
    "The `#|` directives of a cell, without their arguments."
    return {m.group(1) for m in re.finditer(r'^#\s*\|\s*(\w+)', cell['source'], re.M)}
