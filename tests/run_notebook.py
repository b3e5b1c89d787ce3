"Run one notebook as nbdev_test runs it, in a process of its own: python tests/run_notebook.py NOTEBOOK [FLAG TO SKIP ...]"
import sys
from pathlib import Path
from nbdev.test import test_nb

if __name__ == '__main__':
    path, skip = Path(sys.argv[1]).resolve(), sys.argv[2:]
    ok, _ = test_nb(path, skip_flags=skip, basepath=Path(__file__).resolve().parent.parent)   # prints the traceback itself
    sys.stdout.flush(), sys.stderr.flush()
    sys.exit(0 if ok else 1)
