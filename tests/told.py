"What a command tells when it is called in this process."

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO


def told(command, *words):
    "Exit status, stdout and stderr of a command."
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = command([str(word) for word in words])
    return status, out.getvalue().strip(), err.getvalue().strip()


def told_in_lines(command, *words):
    "Exit status, lines on stdout, and the last line on stderr."
    status, out, err = told(command, *words)
    return status, out.splitlines(), ''.join(err.splitlines()[-1:])
