#!/usr/bin/env python3
"""kill -9 at random moments of what works on a repository; whatever was reported done holds.

    tests/e2e/kills.py [--kills 1000] [--seed N] [--keep]

Each round runs one of backup, forget, prune, copy (into a second repository), hold, release, and changing or
removing a password, and kills it at a random moment of the time that it usually takes. After each:

  * every restore point that was reported done and not forgotten is listed, and one of them, chosen by chance, restores
    byte for byte; so does one that became visible though its backup or copy was killed
  * a restore point that is held is there, whatever forgot
  * the old or the new password opens the repository; the new one where it was told to be in force
  * the next command needs no repair

Every so often, and at the end, both repositories are verified with all their data; at the end every restore point of both
is restored and compared.
"""

import argparse
import hashlib
import random
import shutil
import sys
import time

from lab.processes import Tally, TestFailure, Workspace
from lab.vmtide import Vmtide

IMAGE_BYTES = 12 << 20
CHANCES = {"backup": 30, "forget": 15, "prune": 15, "copy": 15, "hold": 8, "release": 5, "rotate": 8, "remove": 4}
# Rounds between two verifications of all data.
VERIFY_EVERY = 25
# More restore points than this are not kept, so that a round stays short.
MAX_POINTS = 10


class Repository:
    """A repository and what must hold of it."""

    def __init__(self, directory, name):
        directory = directory / name
        directory.mkdir()
        self.vmtide = Vmtide(directory)
        self.path = self.vmtide.repository
        # Restore point -> checksum of its disk.
        self.known = {}

    def run(self, *arguments, codes=(0,)):
        return self.vmtide.run(*arguments, "-r", self.path, codes=codes)

    def listed(self):
        return {point["id"]: point for point in self.run("points").summary["points"]}

    def check_restores(self, point, directory):
        to = directory / "restored.raw"
        self.run("restore", point, "--to", to, "--force")
        found = checksum(to)
        to.unlink()
        if found != self.known[point]:
            raise TestFailure(f"restore point {point} in {self.path} holds other bytes")


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Kills:
    def __init__(self, directory, seed, tally):
        self.directory = directory
        self.tally = tally
        self.random = random.Random(seed)
        self.main = Repository(directory, "main")
        self.copy = Repository(directory, "copy")
        self.image = directory / "web.raw"
        self.image.write_bytes(self.random.randbytes(IMAGE_BYTES // 2) + bytes(IMAGE_BYTES // 2))
        self.held = set()
        # How long each takes; the next run is killed at a random moment of that and a little more.
        self.durations_s = dict.fromkeys(CHANCES, 1.0)
        self.main.vmtide.environment["VMTIDE_TO_PASSWORD"] = self.copy.vmtide.environment["VMTIDE_PASSWORD"]

    def killed_run(self, kind, *arguments):
        """Runs until the end or a random moment. The finished run, or None where it was killed."""
        running = self.main.vmtide.start(*arguments, "-r", self.main.path)
        begun = time.monotonic()
        deadline = begun + self.random.uniform(0, 1.3 * self.durations_s[kind])
        while running.running() and time.monotonic() < deadline:
            time.sleep(0.002)
        if running.kill():
            # It may take longer than is thought.
            self.durations_s[kind] *= 1.1
            self.tally.count(f"{kind} killed")
            return None
        self.durations_s[kind] = max(0.05, (self.durations_s[kind] + time.monotonic() - begun) / 2)
        self.tally.count(f"{kind} done")
        return running.finish()

    def choose(self, points):
        return self.random.choice(sorted(points)) if points else None

    def backup(self):
        with open(self.image, "r+b") as file:
            for _ in range(self.random.randrange(1, 4)):
                file.seek(self.random.randrange(IMAGE_BYTES - (1 << 20)))
                file.write(self.random.randbytes(self.random.randrange(1, 1 << 20)))
        expected = checksum(self.image)
        done = self.killed_run("backup", "backup", self.image)
        if done:
            self.main.known[done.must_end_with(0).summary["point"]] = expected
            return
        for point in self.main.listed():
            if point not in self.main.known:
                # It was committed, and nobody was told.
                self.main.known[point] = expected
                self.main.check_restores(point, self.directory)
                self.tally.count("committed by a killed backup")

    def forget(self):
        points = sorted(self.main.known)
        chosen = set(self.random.sample(points, min(len(points), 3)))
        if not chosen:
            return
        done = self.killed_run("forget", "forget", *sorted(chosen))
        if done:
            done.must_end_with(3 if chosen & self.held else 0)
            gone = chosen - self.held
        else:
            gone = (chosen - self.held) - set(self.main.listed())
        for point in gone:
            del self.main.known[point]

    def prune(self):
        done = self.killed_run("prune", "prune")
        if done:
            done.must_end_with(0)

    def copy_all(self):
        done = self.killed_run("copy", "copy", "--all", "--to", self.copy.path)
        if done:
            done.must_end_with(0)
        origins = {}
        for point, facts in self.copy.listed().items():
            origin = facts["origin"]["point"]
            if origin in origins:
                raise TestFailure(f"{origin} was copied twice: {origins[origin]}, {point}")
            origins[origin] = point
            if point not in self.copy.known:
                if origin not in self.main.known:
                    raise TestFailure(f"{point} is a copy of {origin}, which is not known")
                self.copy.known[point] = self.main.known[origin]
        missing = set(self.main.known) - set(origins)
        if done and missing:
            raise TestFailure(f"not copied, though that was told: {missing}")

    def hold(self):
        point = self.choose(set(self.main.known) - self.held)
        if point is None or len(self.held) > 3:
            return
        done = self.killed_run("hold", "hold", point, "--reason", "kill test")
        if done:
            done.must_end_with(0)
        holds = {hold["point"] for hold in self.main.run("hold", "--list").summary["holds"]}
        if (done and point not in holds) or not self.held <= holds:
            raise TestFailure(f"holds are missing: {self.held | {point}} of {holds}")
        self.held = holds

    def release(self):
        holds = self.main.run("hold", "--list").summary["holds"]
        if not holds:
            return
        chosen = self.random.choice(holds)
        done = self.killed_run("release", "hold", "--release", chosen["id"])
        if done:
            done.must_end_with(0)
        self.held = {hold["point"] for hold in self.main.run("hold", "--list").summary["holds"]}

    def opens(self, password):
        environment = dict(self.main.vmtide.environment, VMTIDE_PASSWORD=password)
        saved, self.main.vmtide.environment = self.main.vmtide.environment, environment
        try:
            return self.main.run("key", "list", codes=(0, 4)).code == 0
        finally:
            self.main.vmtide.environment = saved

    def rotate(self):
        environment = self.main.vmtide.environment
        old, new = environment["VMTIDE_PASSWORD"], f"password {self.random.randrange(1 << 60)}"
        environment["VMTIDE_NEW_PASSWORD"] = new
        done = self.killed_run("rotate", "key", "rotate")
        if done:
            done.must_end_with(0)
            if self.opens(old):
                raise TestFailure("the old password opens after it was changed")
        working = [password for password in (new, old) if self.opens(password)]
        if not working or (done and working != [new]):
            raise TestFailure("neither the old nor the new password opens the repository")
        environment["VMTIDE_PASSWORD"] = working[0]

    def remove(self):
        """Removes a key that is not in use; makes one where there is none."""
        others = [key for key in self.main.run("key", "list").summary["keys"] if not key["used"]]
        if not others:
            self.main.vmtide.environment["VMTIDE_NEW_PASSWORD"] = f"other {self.random.randrange(1 << 60)}"
            self.main.run("key", "add")
            return
        done = self.killed_run("remove", "key", "remove", self.random.choice(others)["id"])
        if done:
            done.must_end_with(0)
        self.main.run("key", "list")

    def round(self, kind):
        {"copy": self.copy_all}.get(kind, getattr(self, kind))()
        for repository in (self.main, self.copy) if kind == "copy" else (self.main,):
            listed = repository.listed()
            missing = set(repository.known) - set(listed)
            if missing:
                raise TestFailure(f"after {kind}: restore points are gone: {missing}")
            point = self.choose(repository.known)
            if point:
                repository.check_restores(point, self.directory)
        if not self.held <= set(self.main.listed()):
            raise TestFailure(f"after {kind}: held restore points are gone")

    def verify(self):
        for repository in (self.main, self.copy):
            repository.run("verify", "--read-data")

    def run(self, kills):
        kinds, weights = list(CHANCES), list(CHANCES.values())
        rounds = 0
        while len(self.main.known) < 2:
            point = self.main.vmtide.backup(self.image)["point"]
            self.main.known[point] = checksum(self.image)
        while sum(number for what, number in self.tally.counts.items() if what.endswith(" killed")) < kills:
            kind = self.random.choices(kinds, weights)[0]
            if len(self.main.known) > MAX_POINTS:
                kind = "forget"
            self.round(kind)
            rounds += 1
            if rounds % VERIFY_EVERY == 0:
                self.verify()
            self.tally.passed += 1
        self.main.run("prune")
        self.verify()
        for repository in (self.main, self.copy):
            for point in sorted(repository.known):
                repository.check_restores(point, self.directory)
        self.tally.passed += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many (default: %(default)s; a long run: 1000)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run's choices")
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    print(f"kills: {options.kills}, seed {seed}")
    with Workspace("kills", options.keep) as directory:
        if shutil.disk_usage(directory).free < (1 << 30):
            raise TestFailure(f"less than 1 GiB free in {directory}")
        tally = Tally(f"repeat with --seed {seed}")
        with tally:
            Kills(directory, seed, tally).run(options.kills)
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
