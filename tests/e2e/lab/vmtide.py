"""Running the vmtide command as a user would, and reading its JSON events."""

import itertools
import json
import os
import subprocess
from pathlib import Path

from .processes import REPO_ROOT, TestFailure, kill, start

PASSWORD = "a test's password"


def binary():
    """The vmtide to test: VMTIDE_BIN, else the newest one built in the target directory."""
    if os.environ.get("VMTIDE_BIN"):
        return Path(os.environ["VMTIDE_BIN"])
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPO_ROOT / "target"))
    built = [path for path in (target / "release/vmtide", target / "debug/vmtide") if path.exists()]
    if not built:
        raise TestFailure("no vmtide found: build it (cargo build --release) or set VMTIDE_BIN")
    return max(built, key=lambda path: path.stat().st_mtime)


class Finished:
    """How a run of vmtide ended."""

    def __init__(self, words, code, stdout, stderr):
        self.words = words
        self.code = code
        self.stderr = stderr
        self.stdout = stdout
        self.events = []
        for line in stdout.splitlines():
            try:
                self.events.append(json.loads(line))
            except json.JSONDecodeError:
                raise TestFailure(f"{words}: with --json this line is no JSON: {line!r}") from None

    @property
    def summary(self):
        if not self.events or self.events[-1].get("type") != "summary":
            raise TestFailure(f"{self.words}: the last event is no summary: {self.stdout[-500:]!r} {self.stderr[-500:]!r}")
        return self.events[-1]

    def must_end_with(self, *codes):
        if self.code not in codes:
            raise TestFailure(f"`{self.words}` ended with {self.code}, not {codes}: {self.stderr.strip()[-2000:]}")
        if "panicked" in self.stderr:
            raise TestFailure(f"`{self.words}` panicked: {self.stderr.strip()[-2000:]}")
        return self


class Running:
    """A vmtide in the background; its output goes to files, so that it never waits for the test. Several may run."""

    _numbers = itertools.count()

    def __init__(self, directory, arguments, environment):
        self.words = " ".join(["vmtide", *map(str, arguments)])
        number = next(self._numbers)
        self.paths = (directory / f"vmtide-{number}.out", directory / f"vmtide-{number}.err")
        with open(self.paths[0], "wb") as out, open(self.paths[1], "wb") as err:
            self.process = start([binary(), *arguments], stdout=out, stderr=err, env=environment)

    def running(self):
        return self.process.poll() is None

    def kill(self):
        """kill -9. False when it had ended before."""
        killed = self.running()
        kill(self.process)
        return killed

    def finish(self, timeout_s=300):
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill(self.process)
            raise TestFailure(f"`{self.words}` hangs: not done after {timeout_s} s") from None
        out, err = (path.read_text(errors="replace") for path in self.paths)
        for path in self.paths:
            path.unlink()
        return Finished(self.words, self.process.returncode, out, err)


class Vmtide:
    """vmtide with one repository."""

    def __init__(self, directory, encryption=True):
        self.directory = directory
        self.repository = directory / "repository"
        self.environment = dict(os.environ, VMTIDE_PASSWORD=PASSWORD, RUST_BACKTRACE="1")
        # State of vmtide (its journals) stays inside the test's directory.
        self.environment["VMTIDE_STATE_DIR"] = str(directory / "state")
        options = [] if encryption else ["--encryption", "none"]
        self.run("init", self.repository, *options)

    def start(self, *arguments):
        return Running(self.directory, [*arguments, "--json"], self.environment)

    def run(self, *arguments, codes=(0,), timeout_s=300):
        return self.start(*arguments).finish(timeout_s).must_end_with(*codes)

    def processes(self):
        """The processes of this vmtide that still run, also such as were started by one that is gone."""
        mark = f"VMTIDE_STATE_DIR={self.environment['VMTIDE_STATE_DIR']}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # ended meanwhile, or is somebody else's
        return found

    def start_backup(self, source, *options):
        return self.start("backup", source, "-r", self.repository, *options)

    def backup(self, source, *options, codes=(0,)):
        return self.start_backup(source, *options).finish().must_end_with(*codes).summary

    def points(self):
        """The restore points, oldest first."""
        return self.run("points", "-r", self.repository).summary["points"]

    def restore(self, point, target, *options):
        return self.run("restore", point, "-r", self.repository, "--to", target, *options).summary
