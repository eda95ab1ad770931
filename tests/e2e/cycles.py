#!/usr/bin/env python3
"""Cycles of {guest writes, incremental backup, kill -9 at a random moment}; every restore point must restore exactly.

    tests/e2e/cycles.py [--cycles 200] [--seed N] [--keep]

A machine with three disks is backed up over and over. In each cycle the test writes to the disks, then runs
`vmtide backup` in one of these ways:

  quiet         nobody writes during the backup: the restore point must equal, byte for byte, raw copies of the disks
                that qemu-img made at that moment
  writing       writes go on during the backup: the restore point must be what all disks held together after some
                acknowledged write between the start and the end of the backup
  kill vmtide   kill -9 at a random moment; the machine must go on, and the next backup must clean up
  kill qemu     kill -9 of QEMU at a random moment: vmtide must end with an error, and the next backup must read
                the disks in full, saying why
  restart       QEMU is shut down properly and started again before the backup

Every restore point that becomes visible is restored and compared, also when its vmtide was killed. After every
backup that ended well the machine must hold nothing of vmtide's but one tracking bitmap per disk. At the end the
repository is verified and restore points of all ages are restored and compared once more.
"""

import argparse
import hashlib
import random
import sys
import time
from pathlib import Path

from lab.machine import Machine, dirty_granules, is_a_moment_of, make_disks
from lab.processes import Tally, TestFailure, Workspace, need_tools, run, wait_until
from lab.vmtide import Vmtide

# Every way occurs in the first cycles, so that a short run sees them all; after these it is chance.
FIRST_CYCLES = ["quiet", "writing", "kill vmtide", "quiet", "kill qemu", "writing", "restart", "kill vmtide"]
CHANCES = {"quiet": 25, "writing": 30, "kill vmtide": 25, "kill qemu": 12, "restart": 8}
# How many old restore points are restored once more at the end.
FINAL_RESTORES = 25


class Cycles:
    def __init__(self, directory, seed, tally):
        self.tally = tally
        self.directory = directory
        self.random = random.Random(seed)
        self.disks = make_disks(directory)
        self.machine = Machine(directory, self.disks, seed)
        self.vmtide = Vmtide(directory)
        # Restore point -> checksum of each disk, as compared once.
        self.known = {}
        # What the disks held, and how many writes there had been, when the last backup that ended well began.
        self.writes_at_base = 0
        # Why each disk's next backup must be a full pass; empty when the changes must be used.
        self.full_expected = {disk.name: "first backup" for disk in self.disks}
        # A killed vmtide may have committed, and so begun the tracking that was expected to be missing.
        self.unsure_after_kill = False
        self.durations_s = [1.0]

    def run(self, cycles):
        with self.machine:
            for number in range(cycles):
                way = FIRST_CYCLES[number] if number < len(FIRST_CYCLES) else self._choose()
                started = time.monotonic()
                self.cycle(way)
                self.tally.passed += 1
                self.tally.count(way)
                print(f"cycle {number + 1:3} {way:11} {len(self.known):3} restore points, "
                      f"{time.monotonic() - started:.1f} s", flush=True)
            self.cycle("quiet")
            self.final_check()

    def _choose(self):
        return self.random.choices(list(CHANCES), list(CHANCES.values()))[0]

    def cycle(self, way):
        for _ in range(self.random.randrange(1, 40)):
            self.machine.write()
        if way == "restart":
            self.machine.stop("quit")
            self.machine.start()
            self.full_expected["beta"] = "raw image: no persistent bitmap"
            way = "quiet"
        {"quiet": self.quiet, "writing": self.writing, "kill vmtide": self.kill_vmtide, "kill qemu": self.kill_qemu}[way]()

    # The ways.

    def quiet(self):
        copies = self.machine.reference_copies(self.directory)
        begin = time.monotonic()
        finished = self.start_backup().finish()
        self.durations_s.append(time.monotonic() - begin)
        contents = self.machine.contents()
        summary = self.ended_well(finished, self.machine.writes)
        restored = self.restore(summary["point"])
        for disk in self.disks:
            run(["qemu-img", "compare", "-f", "raw", "-F", "raw", copies[disk.name], restored[disk.name]])
        self.remember_new_points(lambda found: found == contents, {summary["point"]: restored})

    def writing(self):
        base, begun_at, running = self.machine.contents(), len(self.machine.writes), self.start_backup()
        before = self.machine.writes[self.writes_at_base :]
        while running.running():
            self.write_like_a_guest()
        finished = running.finish()
        during = self.machine.writes[begun_at:]
        self.tally.count("writes during backups", len(during))
        summary = self.ended_well(finished, before + during, exact=False)
        # What was written during the backup may belong to the next one.
        self.writes_at_base = begun_at
        self.remember_new_points(lambda found: is_a_moment_of(base, during, found), must_have=summary["point"])

    def kill_vmtide(self):
        base, begun_at, running = self.machine.contents(), len(self.machine.writes), self.start_backup()
        deadline = time.monotonic() + self.random.uniform(0, 1.1) * self.typical_duration_s()
        writes_go_on = self.random.random() < 0.7
        while running.running() and time.monotonic() < deadline:
            if writes_go_on:
                self.write_like_a_guest()
            else:
                time.sleep(0.002)
        self.tally.count("vmtide killed in the act" if running.kill() else "vmtide was faster than the kill")
        self.unsure_after_kill = True
        # The guest must be able to go on.
        self.machine.wait_running()
        for _ in range(5):
            self.write_like_a_guest()
        during = self.machine.writes[begun_at:]
        self.remember_new_points(lambda found: is_a_moment_of(base, during, found))

    def kill_qemu(self):
        base, begun_at, running = self.machine.contents(), len(self.machine.writes), self.start_backup()
        deadline = time.monotonic() + self.random.uniform(0, 1.0) * self.typical_duration_s()
        while running.running() and time.monotonic() < deadline:
            self.write_like_a_guest()
        faster = not running.running()
        during = self.machine.writes[begun_at:]
        self.machine.stop("kill")
        finished = running.finish(timeout_s=120)
        self.tally.count("vmtide was faster than the kill" if faster else "QEMU killed in the act")
        if not faster:
            finished.must_end_with(0, 1, 3)
        if finished.code == 1 and not finished.stderr.strip() and not finished.stdout.strip():
            raise TestFailure("vmtide failed without saying why")
        self.remember_new_points(lambda found: is_a_moment_of(base, during, found))
        self.machine.start()
        for disk in self.disks:
            self.full_expected[disk.name] = "QEMU was killed"

    # What they share.

    def start_backup(self):
        return self.vmtide.start_backup(self.machine.vmtide_source, "--consistency", "crash")

    def write_like_a_guest(self):
        self.machine.write()
        if self.machine.stopped:
            self.machine.wait_running()

    def typical_duration_s(self):
        return sorted(self.durations_s)[len(self.durations_s) // 2]

    def ended_well(self, finished, writes, exact=True):
        """The backup succeeded, says the truth about tracking, read no more than it had to, and left nothing."""
        expect_full = {name: reason for name, reason in self.full_expected.items() if reason}
        finished.must_end_with(3 if expect_full and self.known else 0, 0)
        summary = finished.summary
        by_name = {self.disk_of(entry).name: entry for entry in summary["disks"]}
        if set(by_name) != {disk.name for disk in self.disks}:
            raise TestFailure(f"the summary has not the machine's disks: {summary['disks']}")
        since_base = writes[self.writes_at_base :] if exact else writes
        for name, entry in by_name.items():
            tracking = entry["tracking"]
            if tracking["used"] and expect_full.get(name) and not self.unsure_after_kill:
                raise TestFailure(f"{name} was read by changes, though: {expect_full[name]}")
            if not tracking["used"]:
                if not tracking.get("reason"):
                    raise TestFailure(f"{name} was read in full without a reason shown")
                if not expect_full.get(name):
                    raise TestFailure(f"{name} was read in full without need: {tracking['reason']}")
                self.tally.count("disks read in full")
                continue
            self.tally.count("disks read by changes")
            limit = dirty_granules(since_base, name)
            if entry["read_bytes"] > 1.1 * limit:
                raise TestFailure(f"{name}: {entry['read_bytes']} bytes read where {limit} were dirty")
        self.machine.wait_running()
        self.machine.assert_clean("after a backup that ended well")
        self.full_expected = {disk.name: "" for disk in self.disks}
        self.unsure_after_kill = False
        self.writes_at_base = len(self.machine.writes)
        return summary

    def disk_of(self, entry):
        for disk in self.disks:
            if disk.name in entry["id"]:
                return disk
        raise TestFailure(f"the summary names an unknown disk: {entry['id']}")

    def restore(self, point):
        """Restores all disks as raw files. Returns disk name -> file."""
        target = self.directory / "restored"
        run(["rm", "-rf", target])
        summary = self.vmtide.restore(point, target)
        files = {}
        for entry in summary["disks"]:
            files[self.disk_of(entry).name] = entry["path"]
        return files

    def remember_new_points(self, is_right, restored=None, must_have=None):
        """Restores and judges every restore point not seen before."""
        new = [point["id"] for point in self.vmtide.points() if point["id"] not in self.known]
        if must_have and must_have not in new:
            raise TestFailure(f"the restore point {must_have} is not listed")
        if len(new) > 1:
            raise TestFailure(f"one backup made several restore points: {new}")
        for point in new:
            files = (restored or {}).get(point) or self.restore(point)
            found = {name: Path(path).read_bytes() for name, path in files.items()}
            if not is_right(found):
                raise TestFailure(f"the restore point {point} is not what the disks held at any moment of its backup")
            self.tally.count("restore points restored exactly")
            self.known[point] = {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}

    def final_check(self):
        """Nothing that happened later may have hurt an earlier restore point; nothing of vmtide still runs."""
        wait_until("all processes of vmtide end", lambda: not self.vmtide.processes(), 60)
        listed = {point["id"] for point in self.vmtide.points()}
        if listed != set(self.known):
            raise TestFailure(f"restore points came or went by themselves: {listed ^ set(self.known)}")
        self.vmtide.run("verify", "-r", self.vmtide.repository, "--read-data")
        chosen = self.random.sample(sorted(self.known), min(FINAL_RESTORES, len(self.known)))
        for point in chosen:
            for name, path in self.restore(point).items():
                if hashlib.sha256(Path(path).read_bytes()).hexdigest() != self.known[point][name]:
                    raise TestFailure(f"the restore point {point} restores {name} differently than before")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=8, help="how many (default: %(default)s; a long run: 200)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run's choices")
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    need_tools("qemu-system-x86_64", "qemu-img")
    print(f"cycles: {options.cycles}, seed {seed}")
    with Workspace("cycles", options.keep) as directory:
        tally = Tally(f"repeat with --seed {seed}")
        with tally:
            Cycles(directory, seed, tally).run(options.cycles)
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
