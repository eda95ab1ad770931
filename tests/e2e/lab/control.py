#!/usr/bin/env python3
"""The guest's command port: one line there, one line back (scripts/guest/control). Also a command:

    python3 tests/e2e/lab/control.py DIR/run/control.sock write 7 20 100
"""

import select
import socket
import sys
import time


class Control:
    """A connection to the command port of a running guest."""

    def __init__(self, path, timeout_s=120):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout_s)
        self.socket.connect(str(path))
        self.buffer = b""

    def send(self, line):
        self.socket.sendall(line.encode() + b"\n")

    def answer(self, timeout_s=120):
        """The guest's answer to what was sent. Raises TimeoutError, or OSError when the guest is gone."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self.buffer:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            part = self.socket.recv(4096)
            if not part:
                raise ConnectionError("the guest's command port was closed")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode(errors="replace").strip()

    def has_answer(self):
        return b"\n" in self.buffer or bool(select.select([self.socket], [], [], 0)[0])

    def ask(self, line, timeout_s=120):
        self.send(line)
        return self.answer(timeout_s)

    def close(self):
        self.socket.close()


def main():
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        answer = Control(sys.argv[1]).ask(" ".join(sys.argv[2:]))
    except OSError as error:
        print(f"control: error: {error}: is the guest running?", file=sys.stderr)
        return 1
    print(answer)
    return 0 if answer.startswith(("OK", "CHECK OK")) else 1


if __name__ == "__main__":
    sys.exit(main())
