"""Processes that need not import PyTorch again, which takes seconds: they are forked from one that
has imported it.

`Forked('module:function', ...)` is such a process, with what of `subprocess.Popen` the tests need;
`ranks` calls a function in several of them that train together."""

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
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

TIMEOUT = 300  # seconds: no process needs them, however much else the machine does


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
    def processor_seconds(cls):
        "What the process that forks them, and those that have ended, took of the processor."
        return 0.0 if cls.server is None else cls.ask(processor_seconds=True)

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

    def wait(self, timeout=TIMEOUT):
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

    def communicate(self, timeout=TIMEOUT):
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


def processor_seconds():
    "What this process, and those of its own that have ended, took of the processor."
    usages = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def serve():
    "Fork a process for each line of standard input; what it is to do, in that process alone."
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # garbage is never looked for in what all processes share
    running = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if 'target' in asked:
            answer = os.fork()
            if answer == 0:
                return asked
            running.add(answer)
        elif 'processor_seconds' in asked:
            answer = processor_seconds()
        else:
            pid, status = os.waitpid(asked['status_of'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        print(json.dumps(answer), flush=True)
    for pid in running:  # whose test has ended before them
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


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


def status_of(asked):
    "The exit status of a process that calls what was asked for; errors are printed as usual."
    module, function = asked['target'].split(':')
    try:
        status = getattr(importlib.import_module(module), function)(*asked['args'])
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if status is None or isinstance(status, int):
        return status or 0
    print(status, file=sys.stderr)
    return 1


def end(status):
    """End this process as the interpreter does: threads are waited for, and what was registered is
    called. But its objects are not taken down one by one: all of them are those of the process that
    it was forked from, of which it would get a copy for that, page by page, in two seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status & 0xFF)


if __name__ == '__main__':
    asked = serve()
    begin(asked)
    end(status_of(asked))
