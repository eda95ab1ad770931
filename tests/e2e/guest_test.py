#!/usr/bin/env python3
"""A real Linux guest, backed up while it runs and writes, lost, restored, booted, and asked whether all is there.

    tests/e2e/guest_test.py [--keep]

Two disks (a qcow2 root and a raw data disk). The guest keeps a manifest of checksums on each; its generations say
which moment a disk shows, and that both disks show the same one (scripts/guest/files.sh). What is proven:

  a full backup with file-system consistency while the guest writes; the file systems in it are clean: they were frozen
  an incremental of a quiet guest: exactly the files of that moment; only what changed was read
  an incremental, crash consistent, while the guest writes: a moment between the start and the end
  kill -9 of vmtide at moments spread over a backup with frozen file systems: the guest can write again, each time,
    and the next backup leaves the machine clean
  after each: the guest runs and is thawed, and QEMU holds nothing of vmtide's but the tracking bitmaps
  all restore points but those of killed runs, in raw and qcow2, boot and check every file, after the original disks are destroyed
"""

import argparse
import struct
import sys
import time

from lab.guest import BOOT_TIMEOUT_S, Guest, Verdict, boot_and_check, make_guest
from lab.processes import Tally, TestFailure, Workspace, need_tools, run, wait_until
from lab.qmp import BlockState, QmpError, assert_same_but_bitmaps
from lab.vmtide import Vmtide

PARTITION_OFFSET = 1 << 20
# How often vmtide is killed, at moments spread evenly over a backup.
KILLS = 6
# A guest whose vmtide was killed may stay frozen this long at most.
THAW_TIMEOUT_S = 60
# From the ext4 documentation, "The Super Block": s_feature_incompat, and its flag "needs recovery".
EXT4_SUPERBLOCK = 1024
EXT4_INCOMPATIBLE = 0x60
EXT4_NEEDS_RECOVERY = 0x4


class Scenario:
    def __init__(self, directory, tally):
        self.directory = directory
        self.vmtide = Vmtide(directory)
        self.tally = tally

    def ok(self, what):
        self.tally.passed += 1
        print(f"ok {self.tally.passed}: {what}", flush=True)

    def run(self):
        make_guest(self.directory)
        with Guest(self.directory) as guest:
            guest.wait_ready()
            self.baseline = BlockState(guest.inspect)
            guest.ask("write 1 30 400")
            full = self.full_while_writing(guest)
            quiet = self.incremental_of_quiet_guest(guest)
            writing = self.incremental_while_writing(guest)
            after_kills = self.killed_while_freezing(guest)
            guest.ask("poweroff")
            guest.wait_off()
        wait_until("all processes of vmtide end", lambda: not self.vmtide.processes(), 60)
        self.lose_originals()
        for point, judge in (full, quiet, writing, after_kills):
            judge(*self.restore(point, "raw"))
        self.restored_as_qcow2(quiet)
        self.vmtide.run("verify", "-r", self.vmtide.repository, "--read-data")
        self.ok("all of the repository verifies")

    def backup_while_writing(self, guest, *options):
        """A backup during which the guest obeys write and delete commands. Returns the summary and the generations
        that were surely complete before it and possibly begun at its end."""
        begun = Verdict(guest.ask("check")).generations["/srv"]
        issued, seed, outstanding = begun, 1000 * begun + 7, False
        running = self.vmtide.start_backup(guest.vmtide_source, *options)
        while running.running():
            if outstanding and guest.control.has_answer():
                self.must_be_ok(guest.control.answer(BOOT_TIMEOUT_S))
                outstanding = False
            if not outstanding:
                seed += 1
                guest.control.send(f"write {seed} 3 150" if seed % 3 else "delete 2")
                issued, outstanding = issued + 1, True
            time.sleep(0.005)
        if outstanding:
            self.must_be_ok(guest.control.answer(BOOT_TIMEOUT_S))
        summary = running.finish().must_end_with(0).summary
        self.nothing_left(guest)
        return summary, begun, issued

    @staticmethod
    def must_be_ok(answer):
        if not answer.startswith("OK"):
            raise TestFailure(f"the guest could not write during the backup: {answer}")

    def nothing_left(self, guest):
        now = BlockState(guest.inspect)
        assert_same_but_bitmaps(self.baseline, now, "after a backup")
        extra = [key for key in now.bitmaps if key[0] not in ("system", "data")]
        if extra or len(now.bitmaps) != 2:
            raise TestFailure(f"after a backup there are not just two tracking bitmaps: {sorted(now.bitmaps)}")
        try:
            guest.inspect.execute("nbd-server-stop")
        except QmpError:
            pass
        else:
            raise TestFailure("QEMU's NBD server was left running")
        # A frozen guest could not do this.
        guest.ask("write 999999 1 4", timeout_s=60)
        guest.ask("delete 1", timeout_s=60)

    def full_while_writing(self, guest):
        summary, begun, issued = self.backup_while_writing(guest, "--consistency", "fs")
        if any(disk["tracking"]["used"] for disk in summary["disks"]):
            raise TestFailure(f"the first backup used tracking: {summary['disks']}")
        self.ok(f"full backup with frozen file systems while the guest wrote ({issued - begun} commands)")

        def judge(system, data, verdict):
            self.is_moment(verdict, begun, issued)
            for image, offset in ((system, PARTITION_OFFSET), (data, 0)):
                self.file_system_is_clean(image, offset)
            self.ok("the full restore point boots, its files are whole, its file systems were frozen")

        return summary["point"], judge

    def incremental_of_quiet_guest(self, guest):
        guest.ask("write 2 20 300")
        guest.ask("delete 10")
        guest.ask("sync")
        before = Verdict(guest.ask("check"))
        summary = self.vmtide.backup(guest.vmtide_source, "--consistency", "fs")
        self.nothing_left(guest)
        for disk in summary["disks"]:
            if not disk["tracking"]["used"]:
                raise TestFailure(f"the incremental read {disk['id']} in full: {disk['tracking']['reason']}")
            if disk["read_bytes"] > 1.1 * disk["changed_bytes"]:
                raise TestFailure(f"{disk['id']}: {disk['read_bytes']} read for {disk['changed_bytes']} changed bytes")
        self.ok("incremental of a quiet guest reads only what changed")

        def judge(_system, _data, verdict):
            if verdict.manifests != before.manifests:
                raise TestFailure(f"the restored disks have not the files of that moment: {vars(verdict)}, {vars(before)}")
            self.ok(f"the incremental restore point boots with exactly the {verdict.files} files of its moment")

        return summary["point"], judge

    def incremental_while_writing(self, guest):
        summary, begun, issued = self.backup_while_writing(guest, "--consistency", "crash")
        if not all(disk["tracking"]["used"] for disk in summary["disks"]):
            raise TestFailure(f"the incremental did not use tracking: {summary['disks']}")
        self.ok(f"crash-consistent incremental while the guest wrote ({issued - begun} commands)")

        def judge(_system, _data, verdict):
            self.is_moment(verdict, begun, issued)
            self.ok("the crash-consistent restore point boots, its files are whole")

        return summary["point"], judge

    def killed_while_freezing(self, guest):
        begin = time.monotonic()
        self.vmtide.backup(guest.vmtide_source, "--consistency", "fs")
        duration_s = time.monotonic() - begin
        in_the_act = 0
        for number in range(KILLS):
            running = self.vmtide.start_backup(guest.vmtide_source, "--consistency", "fs")
            time.sleep(duration_s * (number + 0.5) / KILLS)
            in_the_act += running.kill()
            # A guest that stayed frozen would never answer.
            guest.ask(f"write {50 + number} 2 50", timeout_s=THAW_TIMEOUT_S)
        before = Verdict(guest.ask("check"))
        summary = self.vmtide.backup(guest.vmtide_source, "--consistency", "fs")
        self.nothing_left(guest)
        self.ok(f"vmtide killed {in_the_act} times: the guest wrote on, the next backup cleaned up")

        def judge(_system, _data, verdict):
            if verdict.manifests != before.manifests:
                raise TestFailure(f"the restored disks have not the files of that moment: {vars(verdict)}, {vars(before)}")
            self.ok(f"the restore point after the kills boots with exactly the {verdict.files} files of its moment")

        return summary["point"], judge

    @staticmethod
    def is_moment(verdict, begun, issued):
        system, data = verdict.generations["/srv"], verdict.generations["/data"]
        if not begun <= system <= issued:
            raise TestFailure(f"the restore point shows generation {system}, the backup ran from {begun} to {issued}")
        if system - data not in (0, 1):
            raise TestFailure(f"the disks are of different moments: system at generation {system}, data at {data}")

    def lose_originals(self):
        for name in ("system.qcow2", "data.raw"):
            (self.directory / name).write_bytes(b"lost")

    def restore(self, point, image_format):
        """Restores both disks, checks them with the guest. Returns system, data, verdict."""
        target = self.directory / f"restored-{point[:12]}-{image_format}"
        summary = self.vmtide.restore(point, target, "--format", image_format)
        paths = {}
        for entry in summary["disks"]:
            paths["system" if "system" in entry["id"] else "data"] = entry["path"]
        # The guest writes to what it boots (it replays the journal), so it gets overlays.
        overlays = {}
        for name, path in paths.items():
            overlays[name] = self.directory / f"{name}.overlay"
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", image_format, "-b", path, overlays[name]])
        verdict = boot_and_check(self.directory, overlays["system"], overlays["data"])
        return paths["system"], paths["data"], verdict

    def restored_as_qcow2(self, quiet):
        point, judge = quiet
        system, data, verdict = self.restore(point, "qcow2")
        for path in (system, data):
            run(["qemu-img", "check", "-q", "-f", "qcow2", path])
        judge(system, data, verdict)

    @staticmethod
    def file_system_is_clean(image, offset):
        with open(image, "rb") as file:
            file.seek(offset + EXT4_SUPERBLOCK + EXT4_INCOMPATIBLE)
            (incompatible,) = struct.unpack("<I", file.read(4))
        if incompatible & EXT4_NEEDS_RECOVERY:
            raise TestFailure(f"the file system in {image} was not frozen: its journal needs recovery")
        run(["e2fsck", "-f", "-n", f"{image}?offset={offset}" if offset else image])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    need_tools("qemu-system-x86_64", "qemu-img", "e2fsck")
    with Workspace("guest", options.keep) as directory:
        tally = Tally("keep what it made with --keep")
        with tally:
            Scenario(directory, tally).run()
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
