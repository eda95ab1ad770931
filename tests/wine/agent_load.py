#!/usr/bin/env python3
"""What the agent for Windows bears: a million changed ranges, and 500 hostile connections. Takes minutes, so it is no part of the others.

    tests/wine/run.sh agent_load.py           (which builds, and sets Wine up)

Times are told, not judged: Wine shares its processors with everybody. Memory, handles and attachments are judged.
"""

import argparse
import json
import os
import re
import ssl
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

import agent_test  # noqa: E402
import matrix  # noqa: E402
from lab.processes import Tally, TestFailure, Workspace, kill, need_tools, run, wait_until  # noqa: E402

RANGES = 1_000_000
BLOCK = 64 << 10
# What the answers may take beside what the agent has anyway.
RANGES_MEMORY = 64 << 20
HOSTILE = 500
# As for the agent on Linux (crates/vmtide-agent/tests/hostile.rs): all transfers, and each connection.
TRANSFERS_MEMORY = 128 << 20
CONNECTION_MEMORY = 256 << 10
GONE_WITHIN_S = 90


class Load(agent_test.Scenario):
    def run(self, words):
        try:
            self.make_disks()
            self.start_agent()
            for part in (self.million, self.siege):
                if not words or any(word in part.__name__ for word in words):
                    self.attempt(part)
        finally:
            for child in self.children:
                kill(child)
        if self.failures:
            raise TestFailure(f"{len(self.failures)} parts: {', '.join(self.failures)}")

    # What the process has.

    def status(self, name):
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(rf"{name}:\s+(\d+) kB", text).group(1)) << 10

    def forget_peak(self):
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="ascii")

    def metrics(self):
        text = self.agent.ask("GET", "/v1/metrics").must(200).text()
        return {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.e+]+)$", text, re.MULTILINE)}

    def wait_until_idle(self, handles):
        def idle():
            found = self.metrics()
            names = ("transfers", "change_lists", "freezes", "open_disks", "attached_disks", "blocking_threads")
            left = {name: found[f"vmtide_agent_{name}"] for name in names}
            return not any(left.values()) and found["vmtide_agent_connections"] <= 1 and found["process_open_fds"] <= handles

        try:
            wait_until("everything is given back", idle, GONE_WITHIN_S)
        except TestFailure as error:
            raise TestFailure(f"{error}: {self.metrics()}, {handles} handles before") from error

    # A million ranges.

    def million(self):
        disk = self.root / "million.vhdx"
        run(["qemu-img", "create", "-q", "-f", "vhdx", "-o", "subformat=dynamic", disk, str(2 * BLOCK * RANGES)])
        self.switch(disk, True).must(200)
        since = self.tracking(disk)["most_recent_id"]
        self.read(disk, 0, 512).must(200)
        handles = self.metrics()["process_open_fds"]
        before = self.status("VmRSS")
        self.forget_peak()
        self.faults(query__every=2 * BLOCK)
        begun = time.monotonic()
        text = self.changes(disk, since).must(200).body
        took = time.monotonic() - begun
        found = json.loads(text)
        expected = [{"offset": number * 2 * BLOCK, "length": BLOCK} for number in range(RANGES)]
        if found != expected:
            raise TestFailure(f"{len(found)} ranges instead of {RANGES}")
        self.ok(f"{RANGES} changed ranges: answered in {took:.0f} s, {len(text) >> 20} MiB")
        self.faults()
        # A few bytes of each: what is measured is the list, not the reading.
        body = json.dumps([{"offset": item["offset"] + 100, "length": 8} for item in expected], separators=(",", ":")).encode()
        begun = time.monotonic()
        answer = self.agent.ask("POST", matrix.target(agent_test.windows_path(disk), "content"), [("Content-Type", "application/json")], body).must(200)
        took = time.monotonic() - begun
        if answer.body != bytes(8 * RANGES):
            raise TestFailure("other bytes")
        extra = self.status("VmHWM") - before
        if extra > RANGES_MEMORY:
            raise TestFailure(f"{extra >> 20} MiB more, {RANGES_MEMORY >> 20} MiB allowed")
        self.ok(f"{RANGES} ranges: streamed in {took:.0f} s, {extra >> 20} MiB more than {before >> 20} MiB")
        self.wait_until_idle(handles + 8)
        self.ok("no handle and no attachment is left of it")

    # Hostile connections.

    def hello(self):
        """The first bytes of a client."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self.agent.usual.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
        except ssl.SSLWantReadError:
            pass
        return outgoing.read()

    def attack(self, number):
        where = matrix.target(agent_test.windows_path(self.root / "fixed.vhd"), "content").encode()
        keyed = [("auth_key", self.key), ("Content-Type", "application/json")]
        kind = number % 8
        if kind < 3:
            plain = matrix.socket.create_connection(self.agent.address, timeout=1)
            plain.sendall((b"", os.urandom(4096), self.hello()[:150])[kind])
            return plain
        secure = self.agent.connect()
        secure.settimeout(1)
        heads = {
            3: b"GET /v1/disks?path=x HTTP/1.1\r\nHost: a\r\nx: ",
            4: self.agent.head("POST", where, [*keyed, ("Content-Length", str(1 << 30))], close=False) + b" " * 65536,
            5: self.agent.head("POST", where, [*keyed, ("Transfer-Encoding", "chunked")], close=False) + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 64,
            6: self.agent.head("POST", where, [*keyed, ("Content-Length", "1000")], close=False) + b'[{"offset":',
            7: self.agent.head("GET", where + f"?ranges=0:{self.content.stat().st_size}".encode(), keyed),
        }
        try:
            secure.sendall(heads[kind])
        except OSError:
            # Refused in the middle, or not taken: it is held as it is.
            pass
        return secure

    def good(self, count):
        """How long a good client waits, in milliseconds."""
        key, content = self.add_key_once(), self.content.read_bytes()[:65536]
        took = []
        for _ in range(count):
            begun = time.monotonic()
            answer = self.agent.ask("GET", matrix.target(agent_test.windows_path(self.root / "web server.vhdx"), "content?ranges=0:65536"), key=key)
            took.append((time.monotonic() - begun) * 1000)
            if answer.must(200).body != content:
                raise TestFailure("other bytes for a good client")
        return statistics.median(took)

    def add_key_once(self):
        if not hasattr(self, "good_key"):
            self.good_key = self.add_key("good", "read-only")
            wait_until("the key is known", lambda: self.agent.ask("GET", "/v1", key=self.good_key).status == 200, 30)
        return self.good_key

    def siege(self):
        quiet = self.good(15)
        self.wait_for_handles()
        handles = self.metrics()["process_open_fds"]
        before = self.status("VmRSS")
        self.forget_peak()
        held = [self.attack(number) for number in range(HOSTILE)]
        busy = self.good(15)
        extra = self.status("VmHWM") - before
        for connection in held:
            connection.close()
        if extra > TRANSFERS_MEMORY + HOSTILE * CONNECTION_MEMORY:
            raise TestFailure(f"{extra >> 20} MiB more for {HOSTILE} connections")
        self.ok(f"{HOSTILE} hostile connections: {extra >> 20} MiB more than {before >> 20} MiB; a good client waits {busy:.0f} ms, {quiet:.0f} ms before")
        self.wait_until_idle(handles + 8)
        self.ok("no connection, handle or attachment is left of them")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only the parts whose names hold one of these")
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    options = parser.parse_args()
    need_tools("qemu-img", "wine")
    with Workspace("wine-agent-load", options.keep) as directory:
        tally = Tally("tests/wine/run.sh sets up what it needs; keep what it made with --keep")
        with tally:
            Load(directory, tally).run(options.words)
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
