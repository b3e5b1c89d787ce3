"""Processes that need not import PyTorch again, which takes seconds: they are forked from one that
has imported it.

`Forked('module:function', ...)` is such a process, with what of `subprocess.Popen` the tests need;
`ranks` calls a function in several of them that train together."""

import atexit
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTED = (
    'execnb.shell',
    'hypothesis',
    'matplotlib.pyplot',
    'nbdev.process',
    'pytest',
    'sklearn.metrics',
    'torch.distributed.run',
    'torchvision',
    'streaming_pathology.engine.bands',
    'streaming_pathology.mil.features',
    'streaming_pathology.runs.runs',
)


class Forked:
    """A process that calls a function of a module and exits with what that returns. What it prints
    on both streams is `text()`, that on standard error alone what `communicate` returns."""

    server = None

    def __init__(self, target, *args, new_session=False, file_size=None):
        self.returncode = None
        self.folder = tempfile.TemporaryDirectory()
        self.pid = self.ask(
            target=target,
            args=args,
            path=sys.path,
            folder=self.folder.name,
            new_session=new_session,
            file_size=file_size,
        )

    @classmethod
    def ask(cls, **what):
        "What the process answers that forks them."
        if cls.server is None:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            cls.server = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
            atexit.register(cls.server.stdin.close)  # it ends then
        cls.server.stdin.write(json.dumps(what, default=str) + '\n')
        cls.server.stdin.flush()
        return json.loads(cls.server.stdout.readline())

    def poll(self):
        "The exit status, or None while it runs; negative where a signal ended it."
        if self.returncode is None:
            self.returncode = self.ask(status_of=self.pid)
        return self.returncode

    def wait(self, timeout=60):
        "The exit status, once it has one."
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def text(self, name='*'):
        "What it has printed until now."
        return ''.join(
            path.read_text(errors='replace') for path in sorted(Path(self.folder.name).glob(name))
        )

    def communicate(self, timeout=60):
        "What it printed on standard output and on standard error, once it has ended."
        self.wait(timeout)
        return self.text('out'), self.text('err')

    def send_signal(self, number):
        "Send a signal, if it still runs."
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        "End it at once."
        self.send_signal(signal.SIGKILL)


def ranks(target, n_ranks, *args, timeout=300):
    "Call `function(rank, n_ranks, *args)` in so many processes, and wait for them."
    processes = [Forked(target, rank, n_ranks, *args) for rank in range(n_ranks)]
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        statuses = [process.poll() for process in processes]
        if any(statuses) or None not in statuses:
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
    statuses = [process.wait() for process in processes]
    assert not any(statuses), '\n'.join(process.text() for process in processes)


def serve():
    "Fork a process for each line of standard input; what it is to do, in that process alone."
    for name in IMPORTED:
        importlib.import_module(name)
    running = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if 'target' in asked:
            answer = os.fork()
            if answer == 0:
                return asked
            running.add(answer)
        else:
            pid, status = os.waitpid(asked['status_of'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        print(json.dumps(answer), flush=True)
    for pid in running:  # whose test has ended before them
        os.kill(pid, signal.SIGKILL)
    sys.exit()


def begin(asked):
    "Make this process as a new one would be."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if asked['new_session']:
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, 'out'), (2, 'err')):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(Path(asked['folder']) / name, flags), number)
    if asked['file_size']:  # what is written beyond that is an error, not a signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked['file_size'],) * 2)
    sys.path[:] = asked['path']


if __name__ == '__main__':
    asked = serve()
    begin(asked)
    module, function = asked['target'].split(':')
    sys.exit(getattr(importlib.import_module(module), function)(*asked['args']))
