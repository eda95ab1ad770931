#!/usr/bin/env python3
"""Several vmtide at the same time on one repository, killed at random moments; nothing reported done may be lost.

    tests/e2e/kills.py [--kills 1000] [--seed N] [--keep]

In each round one to three of {backup, forget, prune, copy, hold, release, adding and removing a password, verify} run at
the same time on one repository, or the password is changed, and most of them are killed at a random moment. Then must hold:

  * each restore point that a backup reported, and that nobody asked to forget, is listed and restores, byte for byte,
    what the disk held; so does every other restore point that is listed, in the second repository too
  * a restore point that is held is there, whatever forgot; nothing is copied twice
  * what was not killed ended well, without any repair by hand in between
  * every password that was reported as added opens the repository, none that was reported as removed does; a killed
    change leaves the old password or the new one in force
  * at the end `verify --read-data` finds nothing wrong, and a prune that nothing disturbs leaves no more than a new
    repository of the same restore points takes, and a little
"""

import argparse
import hashlib
import os
import random
import shutil
import sys
import time
from pathlib import Path

from lab.processes import Tally, TestFailure, Workspace
from lab.vmtide import PASSWORD, Vmtide

DISK_BYTES = 24 << 20
BLOCK_BYTES = 64 << 10
VMS = ("alpha", "beta")
# How many restore points the test lets a repository have before it forgets more than it adds.
MANY_POINTS = 14
# After how many rounds all is compared, and read whole.
CHECK_EVERY = 5
READ_ALL_EVERY = 40
# More points than this are not held, so that there is something to forget.
MANY_HOLDS = 3
WARNINGS = 3
WRONG_PASSWORD = 4


class Disk:
    """A disk image that the test changes between backups, and what it held at each of them."""

    def __init__(self, directory, name, chance):
        self.name = name
        self.path = directory / f"{name}.raw"
        self.chance = chance
        self.path.write_bytes(b"")
        os.truncate(self.path, DISK_BYTES)
        for _ in range(60):
            self.change()

    def change(self):
        """Writes a few blocks: new content, content that is somewhere else already, or zeros."""
        with open(self.path, "r+b") as file:
            for _ in range(self.chance.randrange(1, 12)):
                block = self.chance.randrange(DISK_BYTES // BLOCK_BYTES)
                way = self.chance.randrange(4)
                if way == 0:
                    content = bytes(BLOCK_BYTES)
                elif way == 1:
                    file.seek(self.chance.randrange(DISK_BYTES // BLOCK_BYTES) * BLOCK_BYTES)
                    content = file.read(BLOCK_BYTES)
                else:
                    content = self.chance.randbytes(BLOCK_BYTES)
                file.seek(block * BLOCK_BYTES)
                file.write(content)

    def digest(self):
        return digest_of(self.path)


def digest_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Job:
    """One vmtide of a round."""

    def __init__(self, kind, arguments, kill_after_s=None, done=None, codes=(0,)):
        self.kind = kind
        self.arguments = arguments
        self.kill_after_s = kill_after_s
        # Called with how it ended when it was not killed.
        self.done = done or (lambda finished: None)
        self.codes = codes
        self.when_killed = lambda: None
        self.running = None
        self.killed = False


class Kills:
    def __init__(self, directory, seed, tally):
        self.tally = tally
        self.directory = directory
        self.random = random.Random(seed)
        self.vmtide = Vmtide(directory)
        self.vmtide.environment["VMTIDE_TO_PASSWORD"] = PASSWORD
        self.second = directory / "second"
        self.password = PASSWORD
        self.run_second("init", self.second)
        self.disks = [Disk(directory, name, self.random) for name in VMS]
        # What the disk held for the backup with this tag.
        self.held = {}
        # Restore points a backup reported, and those that somebody asked to forget.
        self.reported, self.doomed = set(), set()
        # Restore points that are held, as far as anybody was told.
        self.holds = set()
        # Passwords that open the repository, that do not any more, and of which nobody can know after a kill.
        self.passwords, self.gone, self.unsure = {PASSWORD: None}, set(), set()
        self.durations_s = {}
        self.number = 0
        self.rounds = 0

    def run(self, *arguments, codes=(0,), password=None):
        environment = self.vmtide.environment
        environment["VMTIDE_PASSWORD"] = password or self.password
        try:
            return self.vmtide.run(*arguments, codes=codes)
        finally:
            environment["VMTIDE_PASSWORD"] = self.password

    def run_second(self, *arguments):
        """On the second repository, whose password never changes."""
        return self.run(*arguments, password=PASSWORD)

    def total_kills(self):
        return sum(number for what, number in self.tally.counts.items() if what.startswith("killed in the act: "))

    # The jobs of a round.

    def jobs(self):
        makers = {"backup": 40, "forget": 15, "prune": 20, "copy": 12, "key": 10, "verify": 5, "hold": 8, "release": 5}
        chosen, jobs = set(), []
        if self.random.random() < 0.05:
            # Alone: who opens the repository beside it may have the old password.
            return self.with_kills([self.make_rotate()])
        for _ in range(self.random.choices((1, 2, 3), (50, 30, 20))[0]):
            kind = self.random.choices(list(makers), list(makers.values()))[0]
            if kind in chosen and kind != "backup":
                continue
            chosen.add(kind)
            job = getattr(self, f"make_{kind}")(jobs)
            if job:
                jobs.append(job)
        return self.with_kills(jobs)

    def with_kills(self, jobs):
        for job in jobs:
            if self.random.random() < 0.85:
                job.kill_after_s = self.random.uniform(0, 1.05) * self.durations_s.get(job.kind, 0.4)
        return jobs

    def listed_holds(self):
        return self.run("hold", "--list", "-r", self.vmtide.repository).summary["holds"]

    def make_hold(self, others):
        # A hold beside a forget of the same point may come too late; which of the two won nobody is told.
        points = [point["id"] for point in self.vmtide.points() if point["id"] not in self.holds | self.doomed]
        points = [point for point in points if not any(point in job.arguments for job in others)]
        if not points or len(self.holds) >= MANY_HOLDS:
            return None
        point = self.random.choice(points)
        return Job(
            "hold",
            ["hold", point, "--reason", "kill test", "-r", self.vmtide.repository],
            done=lambda _: self.holds.add(point),
        )

    def make_release(self, others):
        holds = [] if any(job.kind in ("hold", "forget") for job in others) else self.listed_holds()
        if not holds:
            return None
        hold = self.random.choice(holds)
        # From now on nobody may rely on it.
        self.holds.discard(hold["point"])
        return Job("release", ["hold", "--release", hold["id"], "-r", self.vmtide.repository])

    def make_rotate(self):
        self.number += 1
        old, new = self.password, f"password {self.number}"
        self.vmtide.environment["VMTIDE_NEW_PASSWORD"] = new
        slot = self.passwords.pop(old)
        self.unsure |= {old, new}

        def settle(working):
            self.unsure -= {old, new}
            self.gone.add(new if working == old else old)
            self.password = self.vmtide.environment["VMTIDE_PASSWORD"] = working
            self.passwords[working] = slot

        def killed():
            working = [password for password in (new, old) if self.opens(password)]
            if not working:
                raise TestFailure("neither the old nor the new password opens the repository")
            if len(working) == 2:
                # Both, until the next change; only the one that is used from here on is known to stay.
                self.unsure.add(old)
                self.password = self.vmtide.environment["VMTIDE_PASSWORD"] = new
                self.passwords[new] = slot
                self.unsure.discard(new)
            else:
                settle(working[0])

        job = Job("rotate", ["key", "rotate", "-r", self.vmtide.repository], done=lambda _: settle(new))
        job.when_killed = killed
        return job

    def opens(self, password):
        arguments = ("points", "-r", self.vmtide.repository)
        return self.run(*arguments, codes=(0, WRONG_PASSWORD), password=password).code == 0

    def make_backup(self, others):
        idle = [disk for disk in self.disks if not any(str(disk.path) in map(str, job.arguments) for job in others)]
        if not idle:
            return None
        disk = self.random.choice(idle)
        disk.change()
        self.number += 1
        self.held[str(self.number)] = disk.digest()
        return Job(
            "backup",
            ["backup", disk.path, "-r", self.vmtide.repository, "--name", disk.name, "--tag", f"run={self.number}"],
            done=lambda finished: self.reported.add(finished.summary["point"]),
        )

    def make_forget(self, others):
        points = [point["id"] for point in self.vmtide.points()]
        points = [point for point in points if not any(point in job.arguments for job in others)]
        number = self.random.randrange(1, 4) if len(points) <= MANY_POINTS else len(points) - MANY_POINTS // 2
        if len(points) < 4 or any(job.kind == "release" for job in others):
            return None
        chosen = self.random.sample(points, min(number, len(points) - 2))
        # Holds of killed commands may be in force, too.
        held = {hold["point"] for hold in self.listed_holds()} & set(chosen)
        self.doomed.update(set(chosen) - held)

        def done(_):
            left = {point["id"] for point in self.vmtide.points()}
            if left & set(chosen) != held:
                raise TestFailure(f"forget of {chosen} was reported; there are {left & set(chosen)}, held are {held}")

        codes = (WARNINGS,) if held else (0,)
        return Job("forget", ["forget", *chosen, "-r", self.vmtide.repository], done=done, codes=codes)

    def make_prune(self, _):
        return Job("prune", ["prune", "-r", self.vmtide.repository])

    def make_copy(self, _):
        return Job("copy", ["copy", "-r", self.vmtide.repository, "--to", self.second, "--all"])

    def make_verify(self, _):
        return Job("verify", ["verify", "-r", self.vmtide.repository])

    def make_key(self, _):
        known = [password for password, slot in self.passwords.items() if slot and password != self.password]
        if known and self.random.random() < 0.5:
            password = self.random.choice(known)
            slot = self.passwords.pop(password)
            self.unsure.add(password)

            def removed(_):
                self.unsure.discard(password)
                self.gone.add(password)

            return Job("key", ["key", "remove", slot, "-r", self.vmtide.repository], done=removed)
        self.number += 1
        password = f"password {self.number}"
        file = self.directory / "new-password"
        file.write_text(password)
        self.unsure.add(password)

        def added(finished):
            self.unsure.discard(password)
            self.passwords[password] = finished.summary["id"]

        return Job("key", ["key", "add", "--new-password-file", file, "-r", self.vmtide.repository], done=added)

    # A round.

    def round(self):
        self.rounds += 1
        jobs = self.jobs()
        begun = time.monotonic()
        for job in jobs:
            job.running = self.vmtide.start(*job.arguments)
        for job in sorted(jobs, key=lambda job: job.kill_after_s if job.kill_after_s is not None else 1e9):
            if job.kill_after_s is None:
                continue
            while job.running.running() and time.monotonic() < begun + job.kill_after_s:
                time.sleep(0.001)
            job.killed = job.running.kill()
            self.tally.count(f"killed in the act: {job.kind}" if job.killed else "ended before the kill")
        for job in jobs:
            finished = job.running.finish()
            if job.killed:
                job.when_killed()
                continue
            if job.kill_after_s is None and len(jobs) == 1:
                self.durations_s[job.kind] = time.monotonic() - begun
            finished.must_end_with(*job.codes)
            self.tally.count(f"ended well: {job.kind}")
            job.done(finished)
        if self.rounds % CHECK_EVERY == 0:
            self.check(everything=self.rounds % READ_ALL_EVERY == 0)
        self.tally.passed += 1

    def check(self, everything):
        points = self.vmtide.points()
        lost = self.reported - self.doomed - {point["id"] for point in points}
        if lost:
            raise TestFailure(f"restore points that were reported done are gone: {sorted(lost)}")
        self.restore(self.vmtide.repository, points if everything else self.random.sample(points, min(2, len(points))))
        if not self.holds <= {point["id"] for point in points}:
            raise TestFailure(f"held restore points are gone: {sorted(self.holds)}")
        copies = self.run_second("points", "-r", self.second).summary["points"]
        origins = [copy["origin"]["point"] for copy in copies]
        if len(origins) != len(set(origins)):
            raise TestFailure(f"a restore point was copied twice: {sorted(origins)}")
        self.restore(self.second, copies if everything else self.random.sample(copies, min(1, len(copies))))
        self.check_passwords(everything)
        if everything:
            self.run("verify", "-r", self.vmtide.repository, "--read-data")
            self.run_second("verify", "-r", self.second, "--read-data")
            self.tally.count("whole checks")

    def restore(self, repository, points):
        target = self.directory / "restored.raw"
        for point in points:
            run = self.run_second if repository == self.second else self.run
            run("restore", point["id"], "-r", repository, "--to", target)
            expected = self.held[point["tags"]["run"]]
            if digest_of(target) != expected:
                raise TestFailure(f"restore point {point['id']} of {repository} is not what the disk held")
            target.unlink()
            self.tally.count("restores compared")

    def check_passwords(self, everything):
        for passwords, codes in ((set(self.passwords), (0,)), (self.gone, (WRONG_PASSWORD,))):
            chosen = sorted(passwords)
            for password in chosen if everything else self.random.sample(chosen, min(1, len(chosen))):
                self.run("points", "-r", self.vmtide.repository, codes=codes, password=password)

    def final_check(self):
        self.check(everything=True)
        for hold in self.listed_holds():
            self.run("hold", "--release", hold["id"], "-r", self.vmtide.repository)
        self.holds.clear()
        self.run("prune", "-r", self.vmtide.repository, "--repack-below", "100")
        self.check(everything=True)
        fresh = self.directory / "fresh"
        self.run_second("init", fresh)
        self.run("copy", "-r", self.vmtide.repository, "--to", fresh, "--all")
        stored, needed = size_of(self.vmtide.repository), size_of(fresh)
        print(f"at the end {stored} bytes; a new repository of the same restore points has {needed}")
        if stored > needed * 1.2 + (2 << 20):
            raise TestFailure(f"prune leaves {stored} bytes where {needed} are needed")
        shutil.rmtree(fresh)


def size_of(directory):
    """What its objects take. What killed writers leave in `tmp` is kept for a day, because nobody can tell that they
    were killed."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.parent.name != "tmp")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many (default: %(default)s; a long run: 1000)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run's choices")
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    print(f"kills: {options.kills}, seed {seed}", flush=True)
    with Workspace("kills", options.keep) as directory:
        tally = Tally(f"repeat with --seed {seed}")
        with tally:
            kills = Kills(directory, seed, tally)
            while kills.total_kills() < options.kills:
                kills.round()
                if kills.rounds % 50 == 0:
                    print(f"round {kills.rounds}: {kills.total_kills()} killed", flush=True)
            kills.final_check()
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
