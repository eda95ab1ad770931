"""Child processes that never outlive the test, and temporary directories that do not either."""

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[3]
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class TestFailure(Exception):
    """The product did something wrong; the text says what."""


def _die_with_parent():
    # Even when the test itself is killed with SIGKILL, the kernel ends its children.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start(argv, **options):
    """Starts a child that dies with this process. Returns the Popen."""
    return subprocess.Popen(
        [str(part) for part in argv],
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,
        **options,
    )


def kill(process):
    """kill -9 and reap, when it still runs."""
    if process.poll() is None:
        process.kill()
    process.wait()


def run(argv, timeout_s=120, check=True, **options):
    """Runs a tool to its end; its output is in the failure when it fails. Returns the CompletedProcess (text)."""
    result = subprocess.run(
        [str(part) for part in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        **options,
    )
    if check and result.returncode != 0:
        words = " ".join(str(part) for part in argv)
        raise TestFailure(f"`{words}` ended with {result.returncode}: {result.stderr.strip() or result.stdout.strip()}")
    return result


def wait_until(what, condition, timeout_s, interval_s=0.05):
    """Waits until condition() is true and returns its value; fails with `what` when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TestFailure(f"waited {timeout_s} s in vain: {what}")
        time.sleep(interval_s)


def free_port():
    """A port that nothing uses, below those that connections are given: those may be taken before it is used."""
    for port in random.sample(range(21000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise TestFailure("no port is free")


class Workspace:
    """A temporary directory, removed at the end of the `with` block unless `keep`."""

    def __init__(self, name, keep=False):
        # Short: paths of Unix sockets below it must fit 107 bytes.
        self.path = Path(tempfile.mkdtemp(prefix=f"vmtide-{name}-"))
        self.keep = keep

    def __enter__(self):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self.path

    def __exit__(self, *_):
        if self.keep:
            print(f"kept: {self.path}", file=sys.stderr)
        else:
            shutil.rmtree(self.path, ignore_errors=True)


class Tally:
    """Counts what passed; a failure inside its `with` block is told, with a hint, and counted. The last line it
    prints has the form of cargo test's, for whoever adds up."""

    def __init__(self, hint):
        self.hint = hint
        self.passed = 0
        self.failed = 0
        self.counts = {}

    def count(self, what, number=1):
        self.counts[what] = self.counts.get(what, 0) + number

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.counts:
            print(", ".join(f"{what}: {number}" for what, number in sorted(self.counts.items())))
        if kind is not None and issubclass(kind, Exception):
            self.failed = 1
            if not isinstance(error, TestFailure):
                traceback.print_exception(error)
            print(f"FAILED ({self.hint}): {error}", file=sys.stderr)
            print(f"test result: FAILED. {self.passed} passed; 1 failed", flush=True)
            return True
        if kind is None:
            print(f"test result: ok. {self.passed} passed; 0 failed", flush=True)
        return False

    def exit_code(self):
        return 1 if self.failed else 0


def need_tools(*names):
    """Fails with a clear line when a program the test stands on is missing."""
    missing = [name for name in names if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    if missing:
        raise TestFailure(f"missing: {', '.join(missing)} (scripts/test.sh installs what the tests need)")
