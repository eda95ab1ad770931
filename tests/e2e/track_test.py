#!/usr/bin/env python3
"""A real Linux guest whose data disk is a VHDX that vmtide hosts and tracks (`vmtide track`).

    tests/e2e/track_test.py [--keep]

The guest mounts the disk over NBD, writes and deletes files. What is proven, byte by byte against copies of the disk:

  the ranges since an id hold every byte that differs, asked while the guest runs and after a clean end
  they hold less than half of the disk: tracking that says "everything" would be no help
  kill -9 of the host under a writing guest: the answer afterwards still holds every byte that differs
  a restore of a full backup with the changed ranges of the second one boots, and the guest finds all its files
"""

import argparse
import json
import signal
import subprocess
import sys
import time

from lab.guest import Guest, Verdict, boot_and_check, make_guest
from lab.processes import Tally, TestFailure, Workspace, kill, need_tools, start, wait_until
from lab.vmtide import Vmtide, binary

BLOCK = 64 << 10


class Host:
    """`vmtide track IMAGE --listen`, in a `with` block."""

    def __init__(self, image, socket):
        self.socket = socket
        socket.unlink(missing_ok=True)
        self.process = start([binary(), "track", image, "--listen", f"unix:{socket}", "--json"], stdout=subprocess.PIPE)
        if not self.process.stdout.readline():
            raise TestFailure(f"`vmtide track {image}` did not start")

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(60) != 0:
            raise TestFailure(f"`vmtide track` ended with {self.process.returncode}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        kill(self.process)
        self.process.stdout.close()


class Scenario:
    def __init__(self, directory, tally):
        self.directory = directory
        self.image = directory / "data.vhdx"
        self.vmtide = Vmtide(directory)
        self.tally = tally

    def ok(self, what):
        self.tally.passed += 1
        print(f"ok {self.tally.passed}: {what}", flush=True)

    def ask(self, *words):
        answer = subprocess.run([binary(), "track", self.image, *words], capture_output=True, text=True, timeout=120, check=False)
        if answer.returncode:
            raise TestFailure(f"vmtide track {words}: {answer.stderr.strip()}")
        return answer.stdout

    def copy(self, name):
        """The content of the disk at rest."""
        path = self.directory / name
        self.vmtide.run("convert", self.image, path, "--overwrite")
        return path.read_bytes()

    def must_hold(self, since, before, after, what):
        """Every byte that differs is in a range that changed since the id."""
        ranges = [(it["offset"], it["length"]) for it in json.loads(self.ask("--changes", since))]
        differing = [at for at in range(0, len(after), BLOCK) if before[at:at + BLOCK] != after[at:at + BLOCK]]
        for at in differing:
            covered = bytearray(min(BLOCK, len(after) - at))
            for offset, length in ranges:
                begin, end = max(offset, at), min(offset + length, at + len(covered))
                covered[begin - at:end - at] = b"\1" * max(end - begin, 0)
            for index, is_covered in enumerate(covered):
                if not is_covered and before[at + index] != after[at + index]:
                    raise TestFailure(f"{what}: byte {at + index} differs and is in no range")
        if not differing:
            raise TestFailure(f"{what}: the guest changed nothing")
        changed = sum(length for _, length in ranges)
        self.ok(f"{what}: {len(differing)} blocks differ, {changed >> 10} KiB of {len(after) >> 20} MiB are said to")
        return changed

    def run(self):
        make_guest(self.directory)
        self.vmtide.run("convert", self.directory / "data.raw", self.image)
        self.ask("--enable")
        first = self.ask("--checkpoint").strip()
        before = self.copy("before.raw")
        self.vmtide.backup(self.image, "--name", "web")
        self.written_and_ended(first, before)
        second = self.ask("--checkpoint").strip()
        self.killed_under_the_guest(second)
        self.restored(first)

    def written_and_ended(self, first, before):
        with Host(self.image, self.directory / "track.sock") as host:
            with Guest(self.directory, data_nbd=host.socket) as guest:
                guest.wait_ready()
                guest.ask("write 1 20 300")
                guest.ask("delete 3")
                live = json.loads(self.ask("--changes", first))
                if not live:
                    raise TestFailure("a running host says that nothing was written")
                guest.ask("poweroff")
                guest.wait_off()
            host.end()
        after = self.copy("after.raw")
        changed = self.must_hold(first, before, after, "after a clean end")
        if changed * 2 > len(after):
            raise TestFailure(f"{changed} bytes of {len(after)} are said to have changed")

    def killed_under_the_guest(self, since):
        before = self.copy("before.raw")
        with Host(self.image, self.directory / "track.sock") as host, Guest(self.directory, data_nbd=host.socket) as guest:
            guest.wait_ready()
            guest.ask("write 50 10 200")
            guest.control.send("write 51 200 300")
            time.sleep(1.5)
            kill(host.process)
            wait_until("the host is gone", lambda: host.process.poll() is not None, 20)
        after = self.copy("after.raw")
        self.must_hold(since, before, after, "after kill -9 under a writing guest")

    def restored(self, first):
        """The guest mends its file system and checks; then the changed ranges since the full backup are all that is read."""
        with Host(self.image, self.directory / "track.sock") as host:
            with Guest(self.directory, data_nbd=host.socket) as guest:
                guest.wait_ready()
                guest.ask("poweroff")
                guest.wait_off()
            host.end()
        changes = self.directory / "changes.json"
        changes.write_text(self.ask("--changes", first))
        done = self.vmtide.backup(self.image, "--name", "web", "--changes", changes)
        restored = self.directory / "restored.raw"
        self.vmtide.restore("web@latest", restored)
        if restored.read_bytes() != self.copy("after.raw"):
            raise TestFailure("the restored disk is not the hosted one")
        verdict = boot_and_check(self.directory, None, restored)
        if not isinstance(verdict, Verdict) or not verdict.files:
            raise TestFailure("the guest found no files")
        self.ok(f"an incremental by the tracked changes, restored and booted: {verdict.files} files ({done['disks'][0]['read_bytes'] >> 10} KiB read)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    need_tools("qemu-system-x86_64", "qemu-img")
    with Workspace("track", options.keep) as directory:
        tally = Tally("keep what it made with --keep")
        with tally:
            Scenario(directory, tally).run()
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
