"""A repository from init to prune, with the program, wherever it lies."""

import json
import os
import random
from pathlib import Path

from .processes import TestFailure, run

MIB = 1 << 20
DISK_BYTES = 96 * MIB


class Job:
    """The program on one repository. `environment` is what leads to it."""

    def __init__(self, repository, environment, path):
        self.path = path
        self.repository = repository
        self.environment = environment
        self.program = Path(os.environ["VMTIDE_BIN"]).resolve()

    def command(self, *words):
        return [self.program, *words, "--json"]

    def variables(self, environment=None):
        return (environment or self.environment) | {
            "VMTIDE_PASSWORD": "of the test",
            "VMTIDE_REPOSITORY": self.repository,
            "XDG_STATE_HOME": str(self.path / "state"),
            "XDG_CONFIG_HOME": str(self.path / "config"),
            "TMPDIR": str(self.path),
        }

    def run(self, *words, code=0, environment=None):
        variables = self.variables(environment)
        result = run(self.command(*words), timeout_s=300, check=False, cwd=self.path, env=variables)
        if result.returncode != code:
            raise TestFailure(f"vmtide {' '.join(words)} ended with {result.returncode}, not {code}: {result.stderr or result.stdout}")
        return json.loads(result.stdout.splitlines()[-1])

    def must_hold(self, content, point="disk@latest"):
        target = self.path / "back.raw"
        target.unlink(missing_ok=True)
        self.run("restore", point, "--to", str(target))
        if target.read_bytes() != content:
            raise TestFailure(f"{point} restores something else")

    def points(self):
        return [point["id"] for point in self.run("points")["points"]]


def live(job, tally):
    """Two backups of a disk that changes, restores, verify, forget, prune, a third backup, doctor: what was made by init stays
    right through all of it."""
    noise = random.Random(7)
    disk = job.path / "disk.raw"
    first = noise.randbytes(DISK_BYTES)
    disk.write_bytes(first)
    job.run("backup", "disk.raw")
    job.must_hold(first)
    tally.passed += 1
    second = bytearray(first)
    second[40 * MIB : 56 * MIB] = noise.randbytes(16 * MIB)
    disk.write_bytes(second)
    (job.path / "changes.json").write_text(json.dumps([{"offset": 40 * MIB, "length": 16 * MIB}]))
    told = job.run("backup", "disk.raw", "--changes", "changes.json")
    counts = told["disks"][0]
    if told["level"] != "incremental" or counts["read_bytes"] > 17 * MIB or counts["new_bytes"] < 16 * MIB:
        raise TestFailure(f"no incremental of 16 MiB: {told}")
    job.must_hold(bytes(second))
    job.must_hold(first, job.points()[0])
    job.run("verify", "--read-data")
    tally.passed += 1
    job.run("forget", "--keep-last", "1")
    if len(job.points()) != 1:
        raise TestFailure("forget left the wrong points")
    freed = job.run("prune", "--wait", "1m", "--repack-below", "100")["freed_bytes"]
    if freed < 8 * MIB:
        raise TestFailure(f"prune freed {freed} bytes of 16 MiB that nothing needs")
    job.run("verify", "--read-data")
    job.must_hold(bytes(second))
    tally.passed += 1
    job.run("backup", "disk.raw", "--level", "full")
    job.must_hold(bytes(second))
    # A warning: who loses the only password loses all backups.
    job.run("doctor", job.repository, code=3)
    job.run("key", "add", "--recovery", "--recovery-file", "recovery")
    job.run("doctor", job.repository)
    tally.passed += 1
