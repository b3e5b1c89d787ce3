"""Run notebooks as nbdev_test runs them, each in a process of its own.

python tests/run_notebook.py NOTEBOOK [FLAG TO SKIP ...]      one
python tests/run_notebook.py                                  those of the lines of stdin: JSON of a notebook, the file for what it prints, and flags to skip. The process of each,
                                                              whose number is told and then its status, is forked from this one, which has imported what takes long"""

import json
import os
import sys
from pathlib import Path

from nbdev.test import test_nb


def run(notebook, *skip):  # exit status; what it prints has the traceback
    ok, _ = test_nb(
        Path(notebook).resolve(), skip_flags=skip, basepath=Path(__file__).resolve().parent.parent
    )
    sys.stdout.flush(), sys.stderr.flush()
    return 0 if ok else 1


def serve():
    # so that no notebook has to import them again
    import matplotlib.pyplot  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    for line in sys.stdin:
        notebook, out, *skip = json.loads(line)
        if (child := os.fork()) == 0:
            os.setsid()
            fd = os.open(out, os.O_WRONLY)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            try:
                status = run(notebook, *skip)
            except BaseException as e:
                status = 1
                print(f'{type(e).__name__}: {e}', flush=True)
            os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == '__main__':
    if len(sys.argv) > 1:
        sys.exit(run(*sys.argv[1:]))
    serve()
