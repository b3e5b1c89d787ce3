"""Run notebooks as nbdev_test runs them, and compare what their cells print with what was committed.

python tests/run_notebook.py NOTEBOOK [FLAG TO SKIP ...]

The tests run each in a process of its own: `Forked('run_notebook:run_and_end', ...)`."""

import os
import sys
from pathlib import Path

from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from printed import MEASURED, TO_STDERR, difference

ROOT = Path(__file__).resolve().parent.parent


def is_run(cell, skip: set) -> bool:
    "Whether nbdev_test would run a cell."
    if cell.cell_type != 'code' or 'nbdev_export(' in cell.source:
        return False
    directives = getattr(cell, 'directives_', {}) or {}
    if directives.get('eval:', [''])[0].lower() == 'false':
        return False
    return not skip & directives.keys()


def run(notebook, *skip) -> int:
    """The exit status. What is printed has the traceback of a cell that fails, or how the outputs of
    cells differ from the committed ones."""
    path = Path(notebook).resolve()
    name = path.relative_to(ROOT / 'nbs').with_suffix('').as_posix()
    sys.path.insert(0, str(ROOT))
    os.environ['IN_TEST'] = '1'
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if getattr(nb, 'frontmatter_', {}).get('skip_exec'):
        return 0
    different = []
    with working_directory(path.parent):
        shell = CaptureShell(path)
        for cell in nb.cells:
            if not is_run(cell, set(skip)):
                continue
            committed = cell.get('outputs', [])
            shell._cell_idx = cell.idx_ + 1  # which `prettytb` names
            now = shell.run(cell.source)
            if shell.exc:
                print(shell.prettytb(fname=path), flush=True)
                return 1
            key = name, cell.id
            found = difference(committed, now, key in TO_STDERR)
            if found and key not in MEASURED:
                different.append(f'cell {cell.idx_ + 1} (id {cell.id}): {found}')
    if different:
        print(f'{name} prints something else than was committed; run it, look, and save it:\n')
        print('\n\n'.join(different), flush=True)
    return int(bool(different))


def run_and_end(notebook, *skip):
    "End this process with the exit status of `run`, whatever threads a notebook has left."
    try:
        status = run(notebook, *skip)
    except BaseException as e:
        status = 1
        print(f'{type(e).__name__}: {e}')
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
    sys.exit(run(*sys.argv[1:]))
