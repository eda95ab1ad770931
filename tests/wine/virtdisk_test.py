#!/usr/bin/env python3
"""virtdisk.dll as vmtide calls it, call by call: tests/standins/virtdisk/src/bin/virtdisk-calls.rs beside the stand-in.

    tests/wine/run.sh virtdisk_test.py        (which builds, and sets Wine up)
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from lab.processes import Workspace, need_tools  # noqa: E402

LIMIT_S = 300


def windows_path(path):
    """A path as Wine's programs see it: / is drive Z."""
    return "Z:" + str(Path(path).resolve()).replace("/", "\\")


def main():
    need_tools("wine")
    program = Path(os.environ["VMTIDE_EXE_STANDIN"]).with_name("virtdisk-calls.exe")
    with Workspace("wine-virtdisk") as directory:
        for name in ("disks", "handles"):
            (directory / name).mkdir()
        environment = dict(
            os.environ,
            WINEDLLOVERRIDES=f"{os.environ.get('WINEDLLOVERRIDES', '')};virtdisk=n".strip(";"),
            VMTIDE_STANDIN_DIR=windows_path(directory / "handles"),
            VMTIDE_STANDIN_FAULTS=windows_path(directory / "faults"),
        )
        # It prints the result line itself.
        done = subprocess.run(["wine", program, windows_path(directory / "disks")], env=environment, timeout=LIMIT_S, check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
