#!/usr/bin/env python3
"""A repository in Garage: a real S3 server that takes conditions (`If-None-Match`) and passes them over.

    VMTIDE_BIN=target/debug/vmtide tests/e2e/garage_test.py [--keep]

One node on loopback with a bucket of its own. First the tests of the store (`cargo test -p vmtide-s3 --test real_servers`)
with this server beside the others; then the program: init, which must find out that conditions are passed over,
two backups, restore byte for byte, verify, forget, prune, a third backup, wrong keys.

Needs garage (VMTIDE_GARAGE, else ~/.cache/vmtide-tests/bin/garage; `scripts/test.sh garage` installs it). The last line is
`test result: ok. N passed; M failed`.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from lab.processes import Tally, TestFailure, Workspace, free_port, kill, start
from lab.store import program, suite

BUCKET = "vmtide"
REGION = "garage"
# The forms that Garage asks for; they are nobody's.
KEY_ID = "GK31c2f218a2e44f485b94239e"
SECRET = "b892c0665f0ada8a4755dae98baa3b133590e11dae3bcc1f9d769d67f16c3835"
START_LIMIT_S = 60


def garage_program():
    named = os.environ.get("VMTIDE_GARAGE")
    program = Path(named) if named else Path.home() / ".cache/vmtide-tests/bin/garage"
    if not program.is_file():
        raise TestFailure(f"missing: {program} (`scripts/test.sh garage` installs it)")
    return program


class Node:
    """One node, with a bucket and a key for it."""

    def __init__(self, path):
        self.path = path
        self.port = free_port()
        rpc = free_port()
        path.mkdir()
        (path / "garage.toml").write_text(
            f'metadata_dir = "{path}/meta"\ndata_dir = "{path}/data"\ndb_engine = "sqlite"\nreplication_factor = 1\n'
            f'rpc_bind_addr = "127.0.0.1:{rpc}"\nrpc_public_addr = "127.0.0.1:{rpc}"\nrpc_secret = "{"5a" * 32}"\n'
            f'[s3_api]\ns3_region = "{REGION}"\napi_bind_addr = "127.0.0.1:{self.port}"\n',
            encoding="ascii",
        )
        self.log = open(path / "log", "wb")
        self.process = None

    def __enter__(self):
        environment = os.environ | {
            "GARAGE_DEFAULT_BUCKET": BUCKET,
            "GARAGE_DEFAULT_ACCESS_KEY": KEY_ID,
            "GARAGE_DEFAULT_SECRET_KEY": SECRET,
        }
        program = [garage_program(), "-c", self.path / "garage.toml", "server", "--single-node", "--default-bucket"]
        self.process = start(program, env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        limit = time.monotonic() + START_LIMIT_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > limit:
                raise TestFailure(f"garage does not start: {(self.path / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_):
        if self.process is not None:
            kill(self.process)
        self.log.close()

    def answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2):
                return True
        except OSError:
            return False

    def access(self, secret=SECRET):
        """The variables that lead to it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "VMTIDE_"))}
        return kept | {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": REGION,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    arguments = parser.parse_args()
    with Workspace("garage", arguments.keep) as path, Tally("tests/e2e/garage_test.py --keep shows the files") as tally:
        with Node(Path(path) / "node") as node:
            suite(node.access(), f"s3://{BUCKET}/suite")
            tally.passed += 1
            # Conditions are not honoured, and nothing depends on them.
            wrong = node.access(SECRET[::-1])
            program(node.access(), wrong, f"s3://{BUCKET}/program", Path(path), tally, conditional_write="no")
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
