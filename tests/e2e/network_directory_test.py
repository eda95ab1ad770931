#!/usr/bin/env python3
"""A repository in a directory of another machine's: over SFTP, by sshfs, which keeps neither locks nor all of what a local file system promises.

    VMTIDE_BIN=target/debug/vmtide tests/e2e/network_directory_test.py [--keep]

OpenSSH's sftp-server on loopback, without SSH around it. The program from init to prune, byte for byte; then a connection
that breaks during a backup: what was told done before stays, and the next backup goes on.

Needs sshfs and sftp-server, and to be root or to have /dev/fuse (`scripts/test.sh e2e` installs them). The last line is
`test result: ok. N passed; M failed`.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from lab.processes import Tally, TestFailure, Workspace, kill, run, start
from lab.repository import MIB, Job, live

SFTP_SERVER = "/usr/lib/openssh/sftp-server"
MOUNT_LIMIT_S = 30


class Server:
    """Serves SFTP to whoever connects; counts what it was sent, and breaks all connections when it is told to."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.servers = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                self.servers.append(subprocess.Popen([SFTP_SERVER], stdin=connection, stdout=connection, stderr=subprocess.DEVNULL))

    def tear(self):
        for server in self.servers:
            kill(server)
        self.servers.clear()

    def close(self):
        self.listener.close()
        self.tear()


@contextlib.contextmanager
def mounted(server, source, target):
    run(["sshfs", "-o", f"directport={server.port},reconnect", f"127.0.0.1:{source}", target], timeout_s=MOUNT_LIMIT_S)
    try:
        yield
    finally:
        run(["fusermount3", "-u", "-z", target], timeout_s=MOUNT_LIMIT_S, check=False)


def torn(server, job, tally):
    """The connection breaks while packs are written."""
    before = job.points()
    disk = job.path / "disk.raw"
    disk.write_bytes(os.urandom(192 * MIB))
    command = [job.program, "backup", "disk.raw", "--level", "full"]
    variables = job.environment | {"VMTIDE_PASSWORD": "of the test", "VMTIDE_REPOSITORY": job.repository, "XDG_STATE_HOME": str(job.path / "state")}
    packs = Path(job.repository) / "packs"
    there = len(list(packs.rglob("*")))
    process = start(command, cwd=job.path, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while process.poll() is None and len(list(packs.rglob("*"))) <= there and time.monotonic() < limit:
        time.sleep(0.01)
    server.tear()
    process.wait(timeout=120)
    if process.returncode == 0:
        raise TestFailure("the backup ended well although its connection broke")
    if job.points() != before:
        raise TestFailure("a backup that failed left a restore point, or took one away")
    job.run("verify", "--read-data")
    tally.passed += 1
    job.run("backup", "disk.raw", "--level", "full")
    job.must_hold(disk.read_bytes())
    tally.passed += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    arguments = parser.parse_args()
    with Workspace("network", arguments.keep) as path, Tally("tests/e2e/network_directory_test.py --keep shows the files") as tally:
        path = Path(path)
        (path / "source").mkdir()
        (path / "mounted").mkdir()
        server = Server()
        with contextlib.closing(server), mounted(server, path / "source", path / "mounted"):
            kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "VMTIDE_"))}
            job = Job(str(path / "mounted/repository"), kept, path)
            job.run("init", job.repository)
            live(job, tally)
            torn(server, job, tally)
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
