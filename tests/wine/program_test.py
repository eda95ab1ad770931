#!/usr/bin/env python3
"""vmtide.exe under Wine, beside vmtide for Linux: each reads what the other wrote, and qemu-img judges.

    tests/wine/run.sh program_test.py         (which builds, and sets Wine up)

What is shown:

  images     every format made by the one for Windows holds what qemu-img says it should, and the other way round;
             `info` and `check` say the same on both; children name their parents so that both find them
  repository made under Wine: full and incremental backups, restored by both to every format, byte for byte; verified
             by both; a restore point of each system beside those of the other; forget, prune; other passwords
  serve      over TCP, read by qemu-img; written through it; an export as a source of a backup
  refusals   what Windows has not is said so; the exit codes are those of every system; who writes keeps others off
  places     paths longer than 260 characters, file:/// with a drive, settings in %APPDATA%, passwords from a command
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from lab.processes import Tally, TestFailure, Workspace, kill, need_tools, run, start, wait_until  # noqa: E402
from lab.vmtide import PASSWORD, Finished, binary  # noqa: E402

FORMATS = ("vhdx", "vhd", "vmdk", "qcow2", "raw")
# What qemu-img calls them; it takes a VHD's size from its footer only when told to.
QEMU_FORMATS = {"vhd": "vpc"}
DISK_BYTES = 24 << 20
LIMIT_S = 180


def windows_path(path):
    """A path as Wine's programs see it: / is drive Z."""
    return "Z:" + str(Path(path).resolve()).replace("/", "\\")


class Program:
    """vmtide for one system. Arguments that are Paths are spelt as that system does."""

    def __init__(self, name, words, spell, environment):
        self.name = name
        self.words = words
        self.spell = spell
        self.environment = environment

    def argv(self, arguments):
        return [*self.words, *(self.spell(word) if isinstance(word, Path) else str(word) for word in arguments)]

    def run(self, *arguments, codes=(0,), environment=None):
        """Runs it with --json. Returns how it ended."""
        argv = [*self.argv(arguments), "--json"]
        result = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
            env=dict(self.environment, **(environment or {})),
        )
        out, err = result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")
        words = f"[{self.name}] vmtide " + " ".join(map(str, arguments))
        return Finished(words, result.returncode, out, err).must_end_with(*codes)

    def start(self, log, *arguments):
        with open(log, "wb") as out:
            return start([*self.argv(arguments), "--json"], stdout=out, stderr=out, env=self.environment)


class Scenario:
    def __init__(self, directory, tally):
        self.directory = directory
        self.tally = tally
        self.chance = random.Random(5)
        self.children = []
        environment = dict(os.environ, VMTIDE_PASSWORD=PASSWORD, RUST_BACKTRACE="1")
        exe = os.environ["VMTIDE_EXE"]
        on_windows = dict(environment, VMTIDE_STATE_DIR=windows_path(directory / "wstate"))
        on_linux = dict(environment, VMTIDE_STATE_DIR=str(directory / "state"))
        self.windows = Program("windows", ["wine", exe], windows_path, on_windows)
        self.linux = Program("linux", [binary()], str, on_linux)

    def ok(self, what):
        self.tally.passed += 1
        print(f"ok {self.tally.passed}: {what}", flush=True)

    def path(self, name):
        return self.directory / name

    def run(self):
        try:
            self.make_disk()
            self.images()
            self.chains()
            self.repository()
            self.both_in_one_repository()
            self.serving()
            self.refusals()
            self.places()
        finally:
            for child in self.children:
                kill(child)

    def make_disk(self):
        """A disk of text, noise and holes, whose end lies in a block."""
        self.disk = self.path("disk.raw")
        with open(self.disk, "wb") as file:
            file.truncate(DISK_BYTES)
            for offset, length, noise in ((0, 70_000, True), (3 << 20, 1_500_000, False), (9 << 20, 2_000_000, True), (DISK_BYTES - 5000, 5000, True)):
                file.seek(offset)
                file.write(self.chance.randbytes(length) if noise else (b"vmtide under Wine\n" * (length // 18)))

    def same(self, image, image_format, disk=None):
        qemu_format = QEMU_FORMATS.get(image_format, image_format)
        options = ["--image-opts"] if image_format == "vhd" else ["-F", qemu_format]
        name = f"driver=vpc,force_size_calc=current_size,file.filename={image}" if image_format == "vhd" else image
        reference = disk or self.disk
        if image_format == "vhd":
            run(["qemu-img", "compare", *options, f"driver=raw,file.filename={reference}", name])
        else:
            run(["qemu-img", "compare", "-f", "raw", *options, reference, name])

    def images(self):
        for image_format in FORMATS:
            made = self.path(f"windows.{image_format}")
            self.windows.run("convert", self.disk, made)
            self.same(made, image_format)
            back = self.path(f"back.{image_format}.raw")
            self.windows.run("convert", made, back)
            run(["cmp", self.disk, back])
            back.unlink()
            self.ok(f"{image_format} made for Windows holds the disk, for qemu-img and for itself")
            sayings = []
            for program in (self.windows, self.linux):
                info = program.run("info", made).summary
                check = program.run("check", made, codes=(0, 2) if image_format == "raw" else (0,)).events
                sayings.append(json.dumps([self.plain(info), self.plain(check)], sort_keys=True))
            if sayings[0] != sayings[1]:
                raise TestFailure(f"{image_format}: Windows says {sayings[0]}, Linux {sayings[1]}")
            self.ok(f"{image_format}: info and check say the same on both systems")
        for image_format in ("vhdx", "qcow2"):
            made = self.path(f"qemu.{image_format}")
            run(["qemu-img", "convert", "-O", image_format, self.disk, made])
            self.windows.run("compare", self.disk, made)
            self.ok(f"{image_format} of qemu-img is read for Windows")
        split = self.path("split.vmdk")
        self.windows.run("convert", self.disk, split, "--subformat", "monolithicFlat")
        self.same(split, "vmdk")
        if not self.path("split-flat.vmdk").exists():
            raise TestFailure("a monolithicFlat VMDK has no extent beside it")
        self.ok("a VMDK of two files is made, and read by qemu-img")
        if sorted(path.name for path in self.directory.glob(".*")):
            raise TestFailure(f"left over: {sorted(self.directory.glob('.*'))}")
        self.ok("nothing unfinished is left beside the images")

    def plain(self, value):
        """Without what differs between systems: paths, and what a file takes on its medium."""
        if isinstance(value, dict):
            return {key: self.plain(item) for key, item in value.items() if key not in ("path", "image", "disk_usage_bytes", "duration_ms")}
        if isinstance(value, list):
            return [self.plain(item) for item in value]
        if isinstance(value, str):
            return value.replace(windows_path(self.directory), "").replace(str(self.directory), "")
        return value

    def chains(self):
        chain = self.path("chain")
        chain.mkdir()
        for image_format in ("vhdx", "vhd", "qcow2", "vmdk"):
            for maker, reader in ((self.windows, self.linux), (self.linux, self.windows)):
                base, child = chain / f"{maker.name}-base.{image_format}", chain / f"{maker.name}-child.{image_format}"
                maker.run("convert", self.disk, base)
                maker.run("create", child, "--parent", base)
                for program in (maker, reader):
                    program.run("compare", self.disk, child)
        self.ok("children made on one system find their parents on the other: VHDX, VHD, qcow2, VMDK")
        child = chain / "windows-child.qcow2"
        run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.disk, child])
        self.ok("qemu-img finds the parent of a qcow2 child made for Windows")
        moved = chain / "moved"
        moved.mkdir()
        child = chain / "windows-child.vhdx"
        shutil.move(chain / "windows-base.vhdx", moved / "windows-base.vhdx")
        self.windows.run("compare", self.disk, child, codes=(6,))
        self.windows.run("chain", "rebase", child, "--parent", moved / "windows-base.vhdx", "--relink-only", "--backing", "allow")
        self.windows.run("compare", self.disk, child, "--backing", "allow")
        self.linux.run("compare", self.disk, child, "--backing", "allow")
        self.ok("a child whose parent was moved is led to it for Windows, and Linux follows")

    def change(self, disk, changes):
        """Changes a raw disk. Returns the changed ranges as `backup --changes` takes them."""
        ranges = []
        with open(disk, "r+b") as file:
            for _ in range(changes):
                offset = self.chance.randrange(DISK_BYTES // 65536) * 65536
                file.seek(offset)
                file.write(self.chance.randbytes(65536) if self.chance.randrange(3) else bytes(65536))
                ranges.append({"offset": offset, "length": 65536})
        return ranges

    def check_point(self, program, point, disk, name):
        target = self.path(f"{name}.raw")
        program.run("restore", point, "-r", self.repo, "--to", target)
        run(["cmp", disk, target])
        target.unlink()

    def repository(self):
        self.repo = self.path("repository")
        web = self.path("web.vhdx")
        self.moments = []
        state = self.path("state.raw")
        shutil.copy(self.disk, state)
        self.windows.run("init", self.repo)
        for number in range(3):
            ranges = self.change(state, 12) if number else []
            web.unlink(missing_ok=True)
            run(["qemu-img", "convert", "-O", "vhdx", state, web])
            options = []
            if number == 2:
                self.path("changes.json").write_text(json.dumps(ranges))
                options = ["--changes", self.path("changes.json")]
            summary = self.windows.run("backup", web, "-r", self.repo, *options).summary
            (disk,) = summary["disks"]
            if number == 2 and disk["read_bytes"] > 12 * 65536:
                raise TestFailure(f"{disk['read_bytes']} bytes were read for 12 changed blocks")
            # Chunks end where their content says so, with a key of the repository: a changed block touches two or three.
            if number and disk["new_bytes"] > 3 * 12 * 65536:
                raise TestFailure(f"{disk['new_bytes']} bytes were new for 12 changed blocks")
            moment = self.path(f"moment-{number}.raw")
            shutil.copy(state, moment)
            self.moments.append((summary["point"], moment))
        self.ok("a full and two incremental backups of a VHDX; only what changed was new")
        for program in (self.windows, self.linux):
            points = program.run("points", "-r", self.repo).summary["points"]
            if [point["id"] for point in points] != [point for point, _ in self.moments]:
                raise TestFailure(f"{program.name} lists {points}")
            program.run("verify", "-r", self.repo, "--read-data")
            for point, moment in self.moments:
                self.check_point(program, point, moment, f"restored-{program.name}")
        self.ok("both systems list, verify and restore all of them, byte for byte")
        for image_format in ("vhdx", "vhd", "qcow2", "vmdk"):
            target = self.path(f"restored.{image_format}")
            self.windows.run("restore", "web@latest", "-r", self.repo, "--to", target)
            self.same(target, image_format, self.moments[-1][1])
            target.unlink()
        self.ok("restores for Windows to VHDX, VHD, qcow2 and VMDK hold the disk, for qemu-img")
        place = self.path("in-place.raw")
        shutil.copy(self.moments[0][1], place)
        summary = self.windows.run("restore", "web@latest", "-r", self.repo, "--to", place, "--in-place").summary
        run(["cmp", self.moments[-1][1], place])
        if sum(disk["written_bytes"] for disk in summary["disks"]) > 24 * 65536:
            raise TestFailure(f"in place wrote more than what differs: {summary}")
        self.ok("a restore in place writes only what differs")
        folder = self.path("folder")
        self.windows.run("restore", "web@latest", "-r", self.repo, "--to", windows_path(folder) + "\\")
        restored = sorted(path.name for path in folder.iterdir())
        if len(restored) != 2 or "vm-config.json" not in restored:
            raise TestFailure(f"a restore to a directory left {restored}")
        self.ok("a restore to a directory with Windows' separators")

    def both_in_one_repository(self):
        data = self.path("data.qcow2")
        moment = self.path("moment-data.raw")
        shutil.copy(self.moments[0][1], moment)
        self.change(moment, 5)
        run(["qemu-img", "convert", "-O", "qcow2", moment, data])
        point = self.linux.run("backup", data, "-r", self.repo).summary["point"]
        self.check_point(self.windows, point, moment, "of-linux")
        self.ok("a restore point made on Linux in the repository made under Wine is restored there")
        first, _ = self.moments.pop(0)
        self.windows.run("forget", first, "-r", self.repo)
        self.windows.run("prune", "-r", self.repo)
        self.linux.run("prune", "-r", self.repo)
        for program in (self.windows, self.linux):
            program.run("verify", "-r", self.repo, "--read-data")
            self.check_point(program, self.moments[0][0], self.moments[0][1], "after-prune")
        self.ok("after forget and prune on both systems all that stays is whole")
        self.windows.run("key", "add", "-r", self.repo, environment={"VMTIDE_NEW_PASSWORD": "zweites"})
        second = {"VMTIDE_PASSWORD": "zweites"}
        self.linux.run("points", "-r", self.repo, environment=second)
        self.windows.run("points", "-r", self.repo, codes=(4,), environment={"VMTIDE_PASSWORD": "falsch"})
        self.ok("a password added under Wine opens on Linux; a wrong one ends with code 4")
        other = self.path("copy")
        self.linux.run("init", other)
        self.windows.run("copy", "--all", "-r", self.repo, "--to", other, environment={"VMTIDE_TO_PASSWORD": PASSWORD})
        self.linux.run("verify", "-r", other, "--read-data")
        self.ok("all is copied into a repository made on Linux")
        self.windows.run("doctor", self.repo, codes=(0, 3))
        self.windows.run("stats", "-r", self.repo)
        self.ok("doctor and stats")

    def listening(self, program, log, *arguments):
        """Starts a server. Returns it with the URL of its only export."""
        server = program.start(log, "serve", *arguments, "--nbd", "127.0.0.1:0")
        self.children.append(server)

        def url():
            if server.poll() is not None:
                raise TestFailure(f"serve ended with {server.returncode}: {log.read_text(errors='replace')}")
            for line in log.read_text(errors="replace").splitlines():
                if line.startswith("{") and json.loads(line)["type"] == "listening":
                    return json.loads(line)["exports"][0]["url"]
            return None

        return server, wait_until("vmtide serves", url, 60)

    def serving(self):
        image = self.path("served.vhdx")
        run(["qemu-img", "convert", "-O", "vhdx", self.disk, image])
        server, url = self.listening(self.windows, self.path("serve.log"), image, "--writable")
        run(["qemu-img", "compare", "-f", "raw", "-F", "raw", self.disk, url])
        self.ok("a VHDX served over TCP for Windows is read by qemu-img")
        run(["qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 300k", "-c", "write -z 9M 128k", "-c", "flush", url])
        changed = self.path("changed.raw")
        shutil.copy(self.disk, changed)
        run(["qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 300k", "-c", "write -z 9M 128k", changed])
        run(["qemu-img", "compare", "-f", "raw", "-F", "raw", changed, url])
        self.ok("what is written through it is read back")
        for words in (("convert", self.disk, image, "--in-place"), ("backup", image, "-r", self.repo)):
            result = self.windows.run(*words, codes=(1,))
            if "has it open" not in result.stderr + result.stdout:
                raise TestFailure(f"refused for another reason: {result.stdout} {result.stderr}")
        self.ok("while it is served writable, nobody else writes to it or backs it up")
        kill(server)
        self.windows.run("check", image, codes=(0, 3, 5))
        run(["qemu-img", "compare", "-f", "raw", "-F", "vhdx", changed, image])
        self.ok("killed with what was flushed in it, it holds that")
        server, url = self.listening(self.linux, self.path("linux.log"), self.disk)
        self.windows.run("backup", url, "-r", self.repo, "--name", "export")
        self.check_point(self.linux, "export@latest", self.disk, "export")
        kill(server)
        server, url = self.listening(self.windows, self.path("point.log"), "export@latest", "-r", self.repo)
        run(["qemu-img", "compare", "-f", "raw", "-F", "raw", self.disk, url])
        kill(server)
        self.ok("an NBD export is backed up for Windows, and its restore point served")

    def refusals(self):
        missing = self.path("none.vhdx")
        for words, code, text in (
            (("backup", "qemu+unix:///run/web.qmp", "-r", self.repo), 2, "not on Windows"),
            (("vm", "list", "qemu+unix:///run/web.qmp"), 2, "not on Windows"),
            (("backup", self.path("data.qcow2"), "-r", self.repo, "--track"), 1, "not on Windows"),
            (("serve", self.disk, "--nbd", "unix:/run/disk.sock"), 2, "Unix sockets"),
            (("info", r"\\.\PhysicalDrive0"), 1, "device"),
            (("info", missing), 6, "none.vhdx"),
            (("points", "-r", self.path("none")), 6, "not found"),
            (("convert", self.disk, self.path("windows.vhdx")), 1, "already exists"),
            (("init", self.repo), 1, "already exists"),
            (("frobnicate",), 2, "frobnicate"),
        ):
            result = self.windows.run(*words, codes=(code,))
            if text not in result.stdout + result.stderr:
                raise TestFailure(f"{words}: {text!r} is not in {result.stdout} {result.stderr}")
        self.ok("what cannot be is refused with the reason, and the exit codes are those of Linux")
        flipped = self.path("flipped")
        shutil.copytree(self.repo, flipped)
        for pack in (flipped / "packs").rglob("*"):
            if pack.is_file():
                content = bytearray(pack.read_bytes())
                content[len(content) // 2] ^= 1
                pack.write_bytes(content)
        self.windows.run("verify", "-r", flipped, "--read-data", codes=(5,))
        self.windows.run("restore", "web@latest", "-r", flipped, "--to", self.path("bad.raw"), codes=(5,))
        if self.path("bad.raw").exists():
            raise TestFailure("a damaged restore left a file under its name")
        self.ok("damage is found, ends with code 5, and leaves no target")

    def places(self):
        deep = self.directory
        while len(str(deep)) < 300:
            deep = deep / "a-rather-long-name-of-a-directory"
        deep.mkdir(parents=True)
        self.windows.run("init", deep / "repository", "--encryption", "none")
        self.windows.run("backup", self.disk, "-r", deep / "repository")
        target = deep / "restored.vhdx"
        self.windows.run("restore", "disk@latest", "-r", deep / "repository", "--to", target)
        self.same(target, "vhdx")
        self.ok("paths of more than 260 characters")
        url = "file:///" + windows_path(self.repo).replace("\\", "/")
        self.windows.run("points", "-r", url)
        # Wine sets %APPDATA% itself.
        appdata = run(["wine", "cmd", "/C", "echo %APPDATA%"]).stdout.strip()
        settings = Path(run(["winepath", "-u", appdata]).stdout.strip()) / "vmtide"
        settings.mkdir(exist_ok=True)
        repository = windows_path(self.repo).replace("\\", "\\\\")
        try:
            (settings / "vmtide.toml").write_text(f'repository = "{repository}"\n')
            self.windows.run("points")
        finally:
            shutil.rmtree(settings)
        self.windows.environment["VMTIDE_REPOSITORY"] = windows_path(self.repo)
        self.ok("a repository by file:/// with a drive, and by the settings in %APPDATA%")
        without = {"VMTIDE_PASSWORD": ""}
        environment = {key: value for key, value in self.windows.environment.items() if key != "VMTIDE_PASSWORD"}
        program = Program("windows", self.windows.words, windows_path, environment)
        program.run("points", "--password-command", f"echo {PASSWORD}")
        password = self.path("password")
        password.write_bytes(PASSWORD.encode() + b"\r\n")
        program.run("points", "--password-file", password)
        program.run("points", codes=(2,))
        self.windows.run("points", codes=(2,), environment=without)
        self.ok("passwords from a command of cmd.exe and from a file with CR LF")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    need_tools("qemu-img", "qemu-io", "wine")
    with Workspace("wine", options.keep) as directory:
        tally = Tally("tests/wine/run.sh sets up what it needs; keep what it made with --keep")
        with tally:
            Scenario(directory, tally).run()
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
