"""README.md, made from nbs/index.ipynb: prose, code and text outputs; links from nbs/ become links from the root.

python tools/readme.py                   # write README.md
python tools/readme.py --check           # say whether README.md is what the notebook says
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def from_root(text):
    "Links and pictures written relative to nbs/, rewritten relative to the root; web addresses and anchors stay."
    return re.sub(
        r'(\]\()(?!\w+:|#|/)([^)\s]+)',
        lambda m: (
            m.group(1)
            + ('' if m.group(2).startswith('../') else 'nbs/')
            + m.group(2).removeprefix('../')
        ),
        text,
    )


def printed(output):
    "An output: a table of Markdown as it is, a text as code. A picture belongs into nbs/images, where README and site both find it."
    table = output.get('data', {}).get('text/markdown')
    if table is not None:
        return ''.join(table).rstrip()
    text = output.get('text') or output.get('data', {}).get('text/plain')
    if text is None or any(kind.startswith('image/') for kind in output.get('data', {})):
        raise SystemExit(
            'error: nbs/index.ipynb has an output that is no text; save the picture to nbs/images and show it with ![...](images/...)'
        )
    return '```\n' + ''.join(text).rstrip() + '\n```'


def readme(path=ROOT / 'nbs' / 'index.ipynb'):
    "The text of README.md."
    parts = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown':
            parts.append(from_root(source))
        elif cell['cell_type'] == 'code' and not re.search(r'^#\s*\|\s*hide\b', source, re.M):
            code = re.sub(r'^#\s*\|.*\n?', '', source, flags=re.M)
            if code and not re.search(r'^#\s*\|\s*echo:\s*false', source, re.M):
                parts.append(f'```python\n{code}\n```')
            parts += map(printed, cell['outputs'])
    return (
        f'<!-- Made from nbs/{path.name} by tools/readme.py: change the notebook. -->\n\n'
        + '\n\n'.join(parts)
        + '\n'
    )


if __name__ == '__main__':
    target, text = ROOT / 'README.md', readme()
    if '--check' in sys.argv:
        if not target.exists() or target.read_text(encoding='utf-8') != text:
            sys.exit(
                'error: README.md is not what nbs/index.ipynb says; run python tools/readme.py'
            )
    else:
        target.write_text(text, encoding='utf-8')
