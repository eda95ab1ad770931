#!/usr/bin/env python3
"""vmtide's plugin against Bacula's own file backup of the same raw file, in one Bacula, in turn; and what an incremental sends.

    bench/bacula.py [--size-mib 4096] [--runs 3]

Needs what tests/bacula/run.py needs, and a release build: cargo build --release -p vmtide -p vmtide-bacula-fd. The data
cannot be compressed. Times are those of whole jobs, of which some 3 s are Bacula's own preparations: sizes below some GiB say little.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/bacula"), str(ROOT / "tests/e2e")]

from daemons import GOOD, Bacula  # noqa: E402
from lab.processes import Workspace  # noqa: E402
from lab.vmtide import binary  # noqa: E402

MIB = 1 << 20


def fill(path, size_mib, seed=1):
    source = random.Random(seed)
    with open(path, "wb") as file:
        for _ in range(size_mib):
            file.write(source.randbytes(MIB))


def timed(bacula, job, level="Full"):
    """A job by the clock: from its start to its end in the catalogue, where Bacula's own overhead is part of both sides."""
    begun = time.monotonic()
    ended = bacula.run(job, level, timeout_s=3600).must_be(GOOD)
    seconds = time.monotonic() - begun
    print(f"    {job}: {seconds:.1f} s, {ended.bytes / seconds / 1e6:.0f} MB/s", flush=True)
    return seconds, ended


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    plugin = Path(os.environ.get("VMTIDE_FD_PLUGIN", binary().parent / "libvmtide_fd.so"))
    with Workspace("bacula-bench") as path:
        disk = path / "disk.raw"
        fill(disk, arguments.size_mib)
        bacula = Bacula(path / "lab", plugin, binary(), 21301)
        bacula.add_fileset("fs-own", [f'File = "{disk}"'])
        bacula.add_fileset("fs-vmtide", [f'Plugin = "vmtide: source={disk}"'])
        bacula.add_job("own", "fs-own")
        bacula.add_job("vmtide", "fs-vmtide")
        seconds = {"own": [], "vmtide": []}
        with bacula:
            for _ in range(arguments.runs):
                for job in seconds:
                    seconds[job].append(timed(bacula, job)[0])
            changed = 0
            source = random.Random(2)
            with open(disk, "r+b") as file:
                for block in source.sample(range(arguments.size_mib * 16), arguments.size_mib // 4):
                    file.seek(block * 65536)
                    file.write(source.randbytes(65536))
                    changed += 65536
            took, incremental = timed(bacula, "vmtide", "Incremental")
        own, ours = (statistics.median(seconds[job]) for job in ("own", "vmtide"))
        print(f"Bacula's own file backup: {own:.1f} s; vmtide's plugin: {ours:.1f} s (medians of {arguments.runs})")
        print(f"rate of the plugin / rate of the file backup: {own / ours:.2f}")
        print(f"incremental: {incremental.bytes} bytes for {changed} changed ({incremental.bytes / changed:.3f}), {took:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
