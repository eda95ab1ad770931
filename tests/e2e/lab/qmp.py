"""A small QMP client: QEMU's monitor protocol, JSON objects over a Unix socket.

Written from QEMU's docs/interop/qmp-spec.rst and independent of vmtide's own client, which it is here to check.
"""

import json
import socket
import time

from .processes import TestFailure, wait_until


class QmpError(TestFailure):
    """QEMU answered with an error."""


class Qmp:
    """One connection to a monitor. Not for several threads."""

    def __init__(self, path, timeout_s=60):
        self.path = str(path)
        self.timeout_s = timeout_s
        self.buffer = b""
        self.events = []
        self.socket = None
        wait_until(f"QEMU listens on {path}", self._connect, timeout_s)
        self._read_message()  # the greeting
        self.execute("qmp_capabilities")

    def _connect(self):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self.timeout_s)
        try:
            connection.connect(self.path)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return False
        self.socket = connection
        return True

    def _read_message(self):
        while b"\n" not in self.buffer:
            try:
                part = self.socket.recv(65536)
            except TimeoutError:
                raise TestFailure(f"QEMU does not answer on {self.path} for {self.timeout_s} s: it hangs") from None
            if not part:
                raise TestFailure(f"QEMU closed the monitor {self.path}")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def execute(self, command, **arguments):
        """Runs a command and returns what it returns. Underscores in names of arguments become dashes."""
        request = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._read_message()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(f"{command}: {message['error'].get('desc', message['error'])}")
            elif "return" in message:
                return message["return"]

    def human(self, line):
        """A command of the human monitor; returns its text."""
        return self.execute("human-monitor-command", command_line=line)

    def wait_event(self, name, timeout_s=30):
        """The next event of that name, also one that came already."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for position, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(position)
            message = self._read_message()
            if "event" in message:
                self.events.append(message)
        raise TestFailure(f"no event {name} from QEMU within {timeout_s} s")

    def close(self):
        if self.socket is not None:
            self.socket.close()
            self.socket = None


class BlockState:
    """What a virtual machine's block layer holds: nodes, jobs, exports, bitmaps, the NBD server, devices' drives."""

    def __init__(self, qmp):
        nodes = qmp.execute("query-named-block-nodes", flat=True)
        self.nodes = {node["node-name"] for node in nodes}
        self.bitmaps = {}
        for node in nodes:
            for bitmap in node.get("dirty-bitmaps", []):
                self.bitmaps[(node["node-name"], bitmap["name"])] = bitmap
        self.jobs = {job["id"] for job in qmp.execute("query-jobs")}
        self.exports = {export["id"] for export in qmp.execute("query-block-exports")}
        self.files = {node["file"] for node in nodes}
        self.drives = {}
        for block in self._blocks(qmp):
            self.drives[block["qdev"]] = block.get("inserted", {}).get("node-name")
        self.status = self._status(qmp)

    @staticmethod
    def _blocks(qmp):
        try:
            return [block for block in qmp.execute("query-block") if block.get("qdev")]
        except QmpError:
            return []  # the storage daemon has no devices

    @staticmethod
    def _status(qmp):
        try:
            return qmp.execute("query-status")["status"]
        except QmpError:
            return "no machine"


def assert_same_but_bitmaps(before, after, when):
    """Nothing but the tracking bitmaps may differ: no node, job, export, file or device changed, the VM still runs."""
    for name in ("nodes", "jobs", "exports", "files"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise TestFailure(f"{when}: {name} differ: left behind {sorted(new - old)}, lost {sorted(old - new)}")
    if before.drives != after.drives:
        raise TestFailure(f"{when}: the devices' drives differ: {before.drives} became {after.drives}")
    if before.status != after.status:
        raise TestFailure(f"{when}: the machine was {before.status} and is {after.status}")
