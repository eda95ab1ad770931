#!/usr/bin/env python3
"""vmtide.dll used by C programs under Wine: the example and the programs of crates/vmtide-capi/tests/c, compiled by MinGW.

    tests/wine/run.sh capi_test.py        (which builds, and sets Wine up)

What the example's disk is afterwards is read by vmtide for Linux as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))

from lab.processes import Tally, TestFailure, Workspace, need_tools  # noqa: E402

CRATE = ROOT / "crates/vmtide-capi"
LIMIT_S = 300


def windows_path(path):
    """A path as Wine's programs see it: / is drive Z."""
    return "Z:" + str(Path(path).resolve()).replace("/", "\\")


class Programs:
    def __init__(self, library, directory, tally):
        self.library = library
        self.directory = directory
        self.tally = tally

    def run(self, source, *arguments):
        """Compiles a program and runs it beside the library; returns what it prints."""
        work = self.directory / Path(source).stem
        work.mkdir()
        program = self.library.with_name(f"{work.name}.exe")
        subprocess.run(
            ["x86_64-w64-mingw32-gcc", "-std=c11", "-D__USE_MINGW_ANSI_STDIO=1", "-Wall", "-Wextra", "-Werror",
             f"-I{CRATE / 'include'}", CRATE / source, "-o", program, self.library],
            check=True, timeout=LIMIT_S)
        done = subprocess.run(["wine", program, windows_path(work), *arguments], capture_output=True, text=True,
                              errors="replace", timeout=LIMIT_S, check=False)
        if done.returncode:
            raise TestFailure(f"{source} under Wine ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}")
        self.tally.passed += 1
        print(f"ok {self.tally.passed}: {source}", flush=True)
        return work

    def example_is_read_elsewhere(self, work):
        images = [path for path in work.iterdir() if path.is_file()]
        if not images:
            raise TestFailure(f"the example left no image in {work}")
        for image in images:
            answer = subprocess.run([os.environ["VMTIDE_BIN"], "info", image, "--json"], capture_output=True, text=True,
                                    timeout=LIMIT_S, check=False)
            if answer.returncode or not json.loads(answer.stdout.splitlines()[-1]):
                raise TestFailure(f"vmtide for Linux does not read {image}: {answer.stderr}")
        self.tally.passed += 1
        print(f"ok {self.tally.passed}: vmtide for Linux reads what it made", flush=True)


def main():
    need_tools("wine", "x86_64-w64-mingw32-gcc")
    with Workspace("wine-capi") as directory:
        tally = Tally("tests/wine/run.sh capi_test.py runs it alone")
        with tally:
            programs = Programs(Path(os.environ["VMTIDE_DLL"]), directory, tally)
            programs.example_is_read_elsewhere(programs.run("examples/backup.c"))
            programs.run("tests/c/wrong_arguments.c")
            programs.run("tests/c/cycles.c", "300")
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
