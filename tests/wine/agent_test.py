#!/usr/bin/env python3
"""The agent for Windows under Wine, with the stand-in for virtdisk.dll beside it (tests/standins/virtdisk).

    tests/wine/run.sh agent_test.py           (which builds, and sets Wine up)

What is shown:

  matrix     tests/agent/matrix.py, the contract's own checks, unchanged
  changes    an incremental download is the disk, for writes that the agent makes and writes made elsewhere
  faults     every documented way of virtdisk.dll to answer wrongly: read in full, or the same answer as without
  errors     every error code of the interface is an answer of one line, and the agent goes on
  handles    none is left open
  service    installed, started, asked, stopped, removed
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "e2e"), str(HERE.parent / "agent")]
sys.dont_write_bytecode = True

import matrix  # noqa: E402
import run as lab_of_linux  # noqa: E402
from lab.processes import Tally, TestFailure, Workspace, free_port, kill, need_tools, run, start, wait_until  # noqa: E402

MATRIX_LIMIT_S = 600
# Longer than the agent keeps a disk attached that nobody asks for.
CLOSES_WITHIN_S = 30
CODES = [*range(0x01, 0x2B), 0x30, 0x34]


def windows_path(path):
    """A path as Wine's programs see it: / is drive Z."""
    return "Z:" + str(Path(path).resolve()).replace("/", "\\")


class Scenario:
    def __init__(self, directory, tally):
        self.directory = directory.resolve()
        self.tally = tally
        self.children = []
        self.failures = []
        self.root = self.directory / "disks"
        self.outside = self.directory / "outside"
        self.handles = self.directory / "handles"
        self.state = self.directory / "state"
        for path in (self.root, self.outside, self.handles):
            path.mkdir()
        self.faults_file = self.directory / "faults"
        self.faults_file.write_text("")
        self.keys = self.directory / "keys"
        self.exe = os.environ["VMTIDE_EXE_STANDIN"]
        self.vmtide = os.environ["VMTIDE_BIN"]
        overrides = os.environ.get("WINEDLLOVERRIDES", "")
        self.environment = dict(
            os.environ,
            WINEDLLOVERRIDES=f"{overrides};virtdisk=n".strip(";"),
            VMTIDE_STANDIN_DIR=windows_path(self.handles),
            VMTIDE_STANDIN_FAULTS=windows_path(self.faults_file),
            RUST_BACKTRACE="1",
        )

    def ok(self, what):
        self.tally.passed += 1
        print(f"ok {self.tally.passed}: {what}", flush=True)

    def run(self, words):
        """Every part, or those whose names hold a word. A part that fails does not keep the others from running."""
        parts = (
            self.run_matrix,
            self.changes_made_elsewhere,
            self.many_changes,
            self.faults_of_changes,
            self.faults_of_content,
            self.faults_of_everything,
            self.parents_are_left_alone,
            self.disks_are_made,
            self.error_codes,
            self.no_handle_is_left,
            self.service,
        )
        try:
            self.make_disks()
            self.start_agent()
            for part in parts:
                if not words or any(word in part.__name__ for word in words):
                    self.attempt(part)
        finally:
            for child in self.children:
                kill(child)
        if self.failures:
            raise TestFailure(f"{len(self.failures)} parts: {', '.join(self.failures)}")

    def attempt(self, part):
        begun = time.monotonic()
        try:
            part()
        except Exception:  # pylint: disable=broad-except
            traceback.print_exc()
            self.failures.append(part.__name__)
        finally:
            self.faults()
        print(f"    {part.__name__}: {time.monotonic() - begun:.0f} s", flush=True)

    # What there is.

    def add_key(self, name, rights):
        to = self.directory / f"key-{name}"
        run([self.vmtide, "agent", "key", "add", name, "--rights", rights, "--to", to, "--auth-key-file", self.keys])
        return to.read_text(encoding="ascii").strip()

    def make_disks(self):
        self.content = self.directory / "content.raw"
        lab_of_linux.make_content(self.content)
        self.disks = []
        base = self.root / "web server.vhdx"
        for path, kind, options, numbers in (
            (base, "vhdx", ["-o", "subformat=dynamic"], (3, 3)),
            (self.root / "fixed.vhd", "vpc", ["-o", "subformat=fixed,force_size=on"], (2, 2)),
        ):
            run(["qemu-img", "convert", "-f", "raw", "-O", kind, *options, self.content, path])
            self.add_disk(path, numbers, None)
        child = self.root / "child.vhdx"
        run([self.vmtide, "create", child, "--parent", base])
        self.add_disk(child, (3, 4), windows_path(base))
        for name in ("writable.vhdx", "elsewhere.vhdx", "many.vhdx"):
            shutil.copy(base, self.root / name)
        shutil.copy(base, self.outside / "secret.vhdx")
        self.child = child
        self.strangers = lab_of_linux.make_strangers(self.vmtide, self.root, self.outside / "secret.vhdx")
        (self.root / "broken.vhdx").write_bytes(b"vhdxfile" + bytes(400000))
        self.key = self.add_key("writer", "read-write")
        self.read_key = self.add_key("reader", "read-only")

    def add_disk(self, path, numbers, parent):
        self.disks.append(
            {
                "path": windows_path(path),
                "content": str(self.content),
                "virtual_storage_type": numbers[0],
                "provider_sub_type": numbers[1],
                "parent_path": parent,
            }
        )

    def options(self, listen, state):
        return ["--listen", listen, "--root", windows_path(self.root), "--auth-key-file", windows_path(self.keys), "--state-dir", windows_path(state)]

    def start_agent(self):
        log = self.directory / "agent.log"
        with open(log, "wb") as out:
            self.process = start(["wine", self.exe, "agent", "--json", *self.options("127.0.0.1:0", self.state)], stdout=out, stderr=out, env=self.environment)
        self.children.append(self.process)

        def listening():
            if self.process.poll() is not None:
                raise TestFailure(f"the agent ended: {log.read_text(errors='replace')}")
            for line in log.read_text(errors="replace").splitlines():
                if line.startswith("{") and json.loads(line)["type"] == "listening":
                    return json.loads(line)
            return None

        self.url = wait_until("the agent listens", listening, 90)["url"]
        self.certificate = self.state / "agent-cert.pem"
        self.agent = matrix.Agent(self.url, self.key, self.read_key, str(self.certificate))
        self.ok("it starts, and makes a certificate")

    def run_matrix(self):
        fixture = {
            "platform": "windows",
            "root": windows_path(self.root),
            "outside": windows_path(self.outside / "secret.vhdx"),
            "broken": windows_path(self.root / "broken.vhdx"),
            "disks": self.disks,
            "writable": windows_path(self.root / "writable.vhdx"),
            "strangers": [windows_path(path) for path in self.strangers],
        }
        path = self.directory / "fixture.json"
        path.write_text(json.dumps(fixture))
        environment = dict(
            os.environ,
            VMTIDE_TEST_AGENT_URL=self.url,
            VMTIDE_TEST_AGENT_KEY=self.key,
            VMTIDE_TEST_AGENT_READ_KEY=self.read_key,
            VMTIDE_TEST_AGENT_CERT=str(self.certificate),
            VMTIDE_TEST_AGENT_DISKS=str(path),
        )
        # Its own result line is the last it prints, and is added up with ours.
        done = subprocess.run([sys.executable, HERE.parent / "agent" / "matrix.py"], env=environment, timeout=MATRIX_LIMIT_S, check=False)
        if done.returncode != 0:
            raise TestFailure("the contract's matrix failed; see above")
        self.ok("the contract's matrix, as for Linux")

    # Questions.

    def ask(self, method, disk, verb, **more):
        return self.agent.ask(method, matrix.target(windows_path(disk), verb), **more)

    def tracking(self, disk):
        return self.ask("GET", disk, "rct").must(200).json()

    def changes(self, disk, since):
        return self.ask("GET", disk, f"rct/{quote(since, safe='')}/changes")

    def ranges(self, disk, since):
        return [(item["offset"], item["length"]) for item in self.changes(disk, since).must(200).json()]

    def read(self, disk, offset, length):
        return self.ask("GET", disk, f"content?ranges={offset}:{length}")

    def switch(self, disk, enabled):
        return self.ask("PUT", disk, f"rct?enabled={str(enabled).lower()}")

    def faults(self, **values):
        """`a__b=1` is the fault a.b."""
        self.faults_file.write_text("".join(f"{name.replace('__', '.')} = {value}\n" for name, value in values.items()))

    def write_elsewhere(self, disk, commands):
        """Writes as a machine does whose disk is hosted with tracking: by vmtide for Linux, over NBD."""
        address = self.directory / "track.sock"
        address.unlink(missing_ok=True)
        log = self.directory / "track.log"
        with open(log, "wb") as out:
            host = start([self.vmtide, "track", disk, "--listen", f"unix:{address}"], stdout=out, stderr=out)
        self.children.append(host)
        wait_until("the disk is hosted", address.exists, 60)
        words = [word for command in commands for word in ("-c", command)]
        run(["qemu-io", "-f", "raw", *words, f"nbd+unix:///?socket={address}"])
        host.terminate()
        if host.wait(timeout=60) != 0:
            raise TestFailure(f"hosting the disk ended badly: {log.read_text()}")

    def changes_made_elsewhere(self):
        self.disk = self.root / "elsewhere.vhdx"
        size = os.path.getsize(self.content)
        before = self.read(self.disk, 0, size).must(200).body
        self.switch(self.disk, True).must(200)
        self.id = self.tracking(self.disk)["most_recent_id"]
        self.wait_for_handles()
        self.write_elsewhere(self.disk, ["write -P 0x5a 1M 300k", "write -P 0x77 5M 4k", "write -z 3M 64k", "flush"])
        if not self.tracking(self.disk)["newer_changes"]:
            raise TestFailure("writes are not noticed")
        self.truth = self.ranges(self.disk, self.id)
        now = self.read(self.disk, 0, size).must(200).body
        copy = bytearray(before)
        for offset, length in self.truth:
            copy[offset : offset + length] = now[offset : offset + length]
        if bytes(copy) != now or now == before:
            raise TestFailure("the changed ranges do not make the old disk the new one")
        if sum(length for _, length in self.truth) > 1 << 20:
            raise TestFailure(f"nearly everything changed: {self.truth}")
        self.ok("changes by another host of the disk: an incremental download is the disk")

    def many_changes(self):
        """More ranges than one call of the interface can tell."""
        disk = self.root / "many.vhdx"
        run(["qemu-img", "create", "-q", "-f", "vhdx", "-o", "subformat=dynamic", disk.with_suffix(".big.vhdx"), "2G"])
        disk = disk.with_suffix(".big.vhdx")
        self.switch(disk, True).must(200)
        since = self.tracking(disk)["most_recent_id"]
        # 5,000 blocks of 64 KiB, every third one.
        self.write_elsewhere(disk, [f"write -z -q {number * 196608} 512" for number in range(5000)])
        expected = [(number * 196608, 65536) for number in range(5000)]
        if self.ranges(disk, since) != expected:
            raise TestFailure(f"{len(self.ranges(disk, since))} ranges instead of {len(expected)}")
        self.ok("5,000 changed ranges arrive, 4,096 of them in the first call")

    # Faults.

    def faults_of_changes(self):
        for name, values in (
            ("an unknown id", {"query__error": "0xC03A0029"}),
            ("tracking is off", {"query__error": "0xC03A002A"}),
            ("tracking information is missing", {"query__error": "0xC03A0030"}),
            ("the disk was changed offline", {"query__error": "0xC03A0022"}),
            ("nothing is processed", {"query__processed": 0}),
            ("more ranges than the array holds", {"query__count": 5000}),
            ("more ranges than any array holds", {"query__count": 0xFFFFFFFF}),
        ):
            self.faults(**values)
            answer = self.changes(self.disk, self.id).must(404)
            if not answer.text().startswith("RCT ID not found"):
                raise TestFailure(f"{name}: {answer.text()}")
            self.ok(f"changes: {name}: the client reads in full")
        for name, values in (
            ("the array holds one range", {"query__capacity": 1}),
            ("the array holds two ranges", {"query__capacity": 2}),
            ("half is processed each time", {"query__short": 1}),
            ("both", {"query__short": 1, "query__capacity": 1}),
            ("a range past the disk", {"query__outside": 1}),
            ("more is processed than asked", {"query__processed": 1 << 50}),
            ("the first buffer for tracking is too small", {"tracking__buffer": 1}),
        ):
            self.faults(**values)
            if matrix_merged(self.ranges(self.disk, self.id)) != matrix_merged(self.truth):
                raise TestFailure(f"{name}: {self.ranges(self.disk, self.id)} instead of {self.truth}")
            if self.tracking(self.disk)["most_recent_id"] != self.id:
                raise TestFailure(f"{name}: another id")
            self.ok(f"changes: {name}: the answer is the same")
        self.faults(tracking__id_length=255)
        long_id = self.tracking(self.disk)["most_recent_id"]
        if len(long_id) != 255 or self.ranges(self.disk, long_id) != self.truth:
            raise TestFailure(f"an id of 255 characters came as {len(long_id)}")
        self.ok("changes: ids of 255 characters")
        self.faults()
        self.changes(self.disk, "y" * 256).must(404)
        self.ok("changes: an id of 256 characters is not known")

    def copy(self, name):
        disk = self.root / f"{name}.vhdx"
        shutil.copy(self.root / "web server.vhdx", disk)
        return disk

    def faults_of_content(self):
        content = self.content.read_bytes()
        for number, (name, values) in enumerate(
            (
                ("attaching without a device is refused", {"attach__handle_error": 50}),
                ("attaching without a device is no parameter", {"attach__handle_error": 87}),
                ("the handle cannot be read", {"attach__handle_unreadable": 1}),
                ("sectors of 4 KiB", {"info__sector": 4096}),
                ("sectors of 4 KiB, through the device", {"info__sector": 4096, "attach__handle_error": 1}),
            )
        ):
            disk = self.copy(f"content-{number}")
            self.faults(**values)
            for offset, length in ((0, len(content)), (1, 1), (511, 2), (4095, 70001), (len(content) - 1, 1)):
                body = self.read(disk, offset, length).must(200).body
                if body != content[offset : offset + length]:
                    raise TestFailure(f"{name}: other bytes at {offset}")
            self.ok(f"content: {name}: the same bytes")
        for number, (name, values, status) in enumerate(
            (
                ("attaching is denied", {"attach__error": 5}, 403),
                ("the privilege is missing", {"attach__error": 1314}, 403),
                ("somebody has attached it", {"attach__error": 32}, 409),
                ("a machine holds it", {"open__error": 32}, 409),
                ("sectors of 3 bytes", {"info__sector": 3}, 501),
            )
        ):
            disk = self.copy(f"refused-{number}")
            self.faults(**values)
            answer = self.read(disk, 0, 512).must(status)
            if "\n" in answer.text().strip():
                raise TestFailure(answer.text())
            self.faults()
            if self.read(disk, 0, 512).must(200).body != content[:512]:
                raise TestFailure("other bytes afterwards")
            self.ok(f"content: {name}: {status}, and all is well when it is over")

    def faults_of_everything(self):
        disk = self.copy("held")
        self.faults(open__write_error=32)
        self.ask("GET", disk, "info").must(200)
        self.switch(disk, True).must(409)
        if self.read(disk, 0, 512).must(200).body != self.content.read_bytes()[:512]:
            raise TestFailure("other bytes")
        self.faults()
        self.switch(disk, True).must(200)
        self.ok("a machine writes the disk: it is read, its tracking left alone")

    def parents_are_left_alone(self):
        """Before it is known where its parents are a disk is opened without them, whatever is asked."""
        self.faults(open__parents_error=32)
        for path in (self.child, *self.strangers):
            self.ask("GET", path, "info").must(200)
        for path in self.strangers:
            for verb in ("rct", "rct/x/changes", "content?ranges=0:512"):
                self.ask("GET", path, verb).must(403)
        # The fault is there: a chain that may be opened is.
        self.read(self.child, 0, 512).must(409)
        self.faults()
        if self.read(self.child, 0, 512).must(200).body != self.content.read_bytes()[:512]:
            raise TestFailure("other bytes")
        self.ok("parents outside of the roots are not opened to learn where they are")

    def make(self, disk, **more):
        body = {"format": "vhdx", "virtual_size_bytes": 8 << 20, "fixed": False, **more}
        return "POST", "/v1/disks?path=" + quote(windows_path(disk), safe=""), [("Content-Type", "application/json")], json.dumps(body).encode()

    def disks_are_made(self):
        disk = self.root / "made.vhdx"
        for name, more, faults, status in (
            ("a VHD of 3 TiB", {"format": "vhd", "virtual_size_bytes": 3 << 40}, {}, 400),
            ("a VHD of sectors of 4 KiB", {"format": "vhd", "logical_sector_bytes": 4096}, {}, 400),
            ("half a sector", {"virtual_size_bytes": (8 << 20) + 256}, {}, 400),
            ("no id", {"disk_id": "x"}, {}, 400),
            ("a size that Windows refuses", {}, {"create__error": "0xC03A0012"}, 400),
            ("a full volume", {}, {"create__error": 112}, 507),
            ("an error in the middle", {}, {"create__error": 1117}, 500),
        ):
            self.faults(**faults)
            answer = self.agent.ask(*self.make(disk, **more)).must(status)
            if disk.exists() or "\n" in answer.text().strip():
                raise TestFailure(f"{name}: {answer.text()}")
        self.faults(create__pending=3)
        self.agent.ask(*self.make(disk, fixed=True)).must(201)
        self.agent.ask(*self.make(disk)).must(409)
        self.ok("disks are made, also such as take time, and errors of a client are told from others")
        # Nobody waits for this one any more.
        disk = self.root / "given up.vhdx"
        # Ten seconds, which cannot be cut short: long enough for the agent to see that nobody waits.
        self.faults(create__pending=100)
        connection = self.agent.connect()
        method, where, headers, body = self.make(disk, fixed=True)
        head = self.agent.head(method, where.encode(), [("auth_key", self.key), ("Content-Length", str(len(body))), *headers])
        connection.sendall(head + body)
        wait_until("the disk is begun", disk.exists, 30)
        connection.close()
        wait_until("the disk is given up", lambda: not disk.exists(), 60)
        self.ask("GET", self.child, "info").must(200)
        self.ok("a fixed disk that nobody waits for is given up, and no file is left")

    def error_codes(self):
        disk = self.copy("codes")
        for low in CODES:
            self.faults(open__error=hex(0xC03A0000 + low))
            answer = self.ask("GET", disk, "info")
            text = answer.text().strip()
            if not 400 <= answer.status < 600 or "\n" in text or not text or "virtual_size" in text:
                raise TestFailure(f"0xC03A00{low:02X}: {answer.status} {text}")
        self.faults()
        self.ask("GET", disk, "info").must(200)
        self.ok(f"all {len(CODES)} error codes of the interface are answers of one line")

    def wait_for_handles(self):
        wait_until("the agent closes what nobody uses", lambda: not any(self.handles.iterdir()), CLOSES_WITHIN_S)

    def no_handle_is_left(self):
        self.wait_for_handles()
        if self.process.poll() is not None:
            raise TestFailure("the agent ended")
        self.ok("no handle and no attachment is left")

    # The service.

    def wine(self, *words, codes=(0,), timeout_s=180):
        done = subprocess.run(["wine", self.exe, *map(str, words)], env=self.environment, capture_output=True, timeout=timeout_s, check=False)
        text = (done.stdout + done.stderr).decode(errors="replace")
        if done.returncode not in codes:
            raise TestFailure(f"{words} ended with {done.returncode}: {text}")
        return text

    def service(self):
        port = free_port()
        # The directory is not there: the service makes it.
        state, name = self.directory / "service", "vmtide-test"
        self.wine("agent", "service", "start", "--name", name, codes=(6,))
        listen = f"127.0.0.1:{port}"
        self.wine("agent", "service", "install", "--name", name, *self.options(listen, state))
        try:
            self.wine("agent", "service", "install", "--name", name, *self.options(listen, state), codes=(1,))
            self.wine("agent", "service", "start", "--name", name)
            agent = matrix.Agent(f"https://{listen}", self.key, self.read_key, str(state / "agent-cert.pem"))
            agent.ask("GET", "/vdisk/x/info", key=None).must(401)
            agent.ask("GET", "/vdisk/x/info").must(404)
            self.wine("agent", "service", "stop", "--name", name)
            try:
                agent.ask("GET", "/vdisk/x/info", key=None)
                raise TestFailure("it still answers")
            except OSError:
                pass
        finally:
            self.wine("agent", "service", "remove", "--name", name)
        self.wine("agent", "service", "stop", "--name", name, codes=(6,))
        if "listening at" not in (state / "agent.log").read_text(errors="replace"):
            raise TestFailure("the service wrote no log")
        self.ok("as a service: installed, started, asked, stopped, removed")


def matrix_merged(ranges):
    """Ranges that touch are one: pages cut them."""
    out = []
    for offset, length in sorted(ranges):
        if out and out[-1][0] + out[-1][1] >= offset:
            out[-1] = (out[-1][0], max(out[-1][0] + out[-1][1], offset + length) - out[-1][0])
        else:
            out.append((offset, length))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only the parts whose names hold one of these")
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    need_tools("qemu-img", "qemu-io", "wine")
    with Workspace("wine-agent", options.keep) as directory:
        tally = Tally("tests/wine/run.sh sets up what it needs; keep what it made with --keep")
        with tally:
            begun = time.monotonic()
            Scenario(directory, tally).run(options.words)
            print(f"in {time.monotonic() - begun:.0f} s")
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
