#!/usr/bin/env python3
"""vmtide's plugin against Bacula's own file backup of the same raw file, in one Bacula, in turn; and what an incremental sends.

    bench/bacula.py [--size-mib 4096] [--runs 3] [--cache warm|cold]

Needs what tests/bacula/run.py needs, and a release build: cargo build --release -p vmtide -p vmtide-bacula-fd. The data
cannot be compressed. Times are those of whole jobs, of which some 3 s are Bacula's own preparations: sizes below some GiB say little.
Before every job the file is read into the page cache, or with --cache cold dropped from it, and what was written is brought to the
disk: when Bacula has read a file it drops it from the cache, so that otherwise its own job would always find the file there, read by
vmtide's job before, and vmtide's never. Beside them stand the processor seconds of each part, which say more on a machine that does other things: the file daemon
(user and system), the storage daemon, and the backend.
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


def processor_seconds(bacula):
    """What the daemons, and the backends that the file daemon has waited for, have used: user and system, each in seconds."""
    ticks = os.sysconf("SC_CLK_TCK")

    def of(name, first):
        fields = Path(f"/proc/{bacula.processes[name].pid}/stat").read_text().rsplit(")", 1)[1].split()
        return [int(field) / ticks for field in fields[first : first + 2]]

    return {"file daemon": of("fd", 11), "storage daemon": of("sd", 11), "backend": of("fd", 13)}


def prepare(disk, cache):
    """Nothing waits to be written, and the file is in the page cache or not."""
    os.sync()
    with open(disk, "rb", buffering=0) as file:
        if cache == "cold":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            piece = bytearray(MIB)
            while file.readinto(piece):
                pass


def timed(bacula, job, level="Full"):
    """A job by the clock: from its start to its end in the catalogue, where Bacula's own overhead is part of both sides."""
    before, begun = processor_seconds(bacula), time.monotonic()
    ended = bacula.run(job, level, timeout_s=3600).must_be(GOOD)
    seconds, after = time.monotonic() - begun, processor_seconds(bacula)
    parts = {part: [after[part][kind] - before[part][kind] for kind in range(2)] for part in after}
    used = ", ".join(f"{part} {user:.1f}+{system:.1f}" for part, (user, system) in parts.items())
    print(f"    {job}: {seconds:.1f} s, {ended.bytes / seconds / 1e6:.0f} MB/s; processor: {used} s", flush=True)
    # Each job has a volume of its own, which nobody reads again.
    for volume in (bacula.directory / "vol").iterdir():
        volume.unlink()
    return seconds, ended, sum(map(sum, parts.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    arguments = parser.parse_args()
    plugin = Path(os.environ.get("VMTIDE_FD_PLUGIN", binary().parent / "libvmtide_fd.so"))
    with Workspace("bacula-bench") as path:
        disk = path / "disk.raw"
        fill(disk, arguments.size_mib)
        bacula = Bacula(path / "lab", plugin, binary(), 21301)
        bacula.pool = "Maximum Volume Jobs = 1"
        bacula.add_fileset("fs-own", [f'File = "{disk}"'])
        bacula.add_fileset("fs-vmtide", [f'Plugin = "vmtide: source={disk}"'])
        bacula.add_job("own", "fs-own")
        bacula.add_job("vmtide", "fs-vmtide")
        seconds = {"own": [], "vmtide": []}
        processor = {"own": [], "vmtide": []}
        with bacula:
            for _ in range(arguments.runs):
                for job in seconds:
                    prepare(disk, arguments.cache)
                    took, _, used = timed(bacula, job)
                    seconds[job].append(took)
                    processor[job].append(used)
            changed = 0
            source = random.Random(2)
            with open(disk, "r+b") as file:
                for block in source.sample(range(arguments.size_mib * 16), arguments.size_mib // 4):
                    file.seek(block * 65536)
                    file.write(source.randbytes(65536))
                    changed += 65536
            prepare(disk, arguments.cache)
            took, incremental, _ = timed(bacula, "vmtide", "Incremental")
        own, ours = (statistics.median(seconds[job]) for job in ("own", "vmtide"))
        own_used, ours_used = (statistics.median(processor[job]) for job in ("own", "vmtide"))
        print(f"Bacula's own file backup: {own:.1f} s; vmtide's plugin: {ours:.1f} s (medians of {arguments.runs})")
        print(f"rate of the plugin / rate of the file backup: {own / ours:.2f}")
        print(f"processor seconds of all together: {own_used:.1f}; with vmtide's plugin: {ours_used:.1f}")
        print(f"incremental: {incremental.bytes} bytes for {changed} changed ({incremental.bytes / changed:.3f}), {took:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
