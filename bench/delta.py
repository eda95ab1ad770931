#!/usr/bin/env python3
"""How fast a delta is applied to a VHDX, in place, beside dd writing as many bytes to the same file system.

    bench/delta.py VMTIDE [--size-mib 1024] [--rounds 5]

A dynamic VHDX full of random bytes, and two deltas that change all of it: to other random bytes, and to text that zstd halves and
more. Both have digests of the base, so that the target is read and held against them before the first byte is written. dd writes a
new file past the page cache, from memory (bs=1M oflag=direct conv=fdatasync), so its rate is the medium's. They take turns; the first round of
each warms up. Everything lies in VMTIDE_BENCH_WORK (bench/work). Rates count the disk's bytes and the whole command, to its last
flush; processor seconds are the command's. At the end the target is compared with what it should be.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import WORK

MIB = 1 << 20


def text(source, length):
    """Words in random order: what zstd compresses to less than half."""
    words = [bytes(source.choices(b"abcdefghijklmnopqrstuvwxyz", k=source.randrange(3, 9))) for _ in range(2000)]
    return b" ".join(source.choices(words, k=length // 4))[:length]


def fill(path, size_mib, pieces):
    with open(path, "wb") as file:
        for _ in range(size_mib):
            file.write(next(pieces))


def used(command):
    """Seconds by the clock, and processor seconds, of a command that must succeed."""
    begun = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{command}: {errors}")
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vmtide", type=Path)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    work, vmtide = WORK / "delta", arguments.vmtide.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    source, size = random.Random(1), arguments.size_mib
    base, target, written = work / "base.vhdx", work / "target.vhdx", work / "written"
    try:
        noise = iter(lambda: source.randbytes(MIB), None)
        fill(work / "base.raw", size, noise)
        used([vmtide, "convert", work / "base.raw", base])
        # Frames are compressed each for itself, so a few pieces again and again are as good as new ones.
        kinds = {"noise": noise, "text": itertools.cycle([text(source, MIB) for _ in range(16)])}
        for name, pieces in kinds.items():
            fill(work / f"{name}.raw", size, pieces)
            used([vmtide, "delta", "create", work / f"{name}.raw", "--base", base, "-o", work / f"{name}.delta"])
        rates = {name: [] for name in (*kinds, "dd")}
        processor = {name: [] for name in rates}
        for number in range(arguments.rounds + 1):
            for name in sorted(rates, reverse=number % 2 == 1):
                if name == "dd":
                    command = ["dd", "if=/dev/zero", f"of={written}", "bs=1M", f"count={size}", "oflag=direct", "conv=fdatasync"]
                else:
                    shutil.copy(base, target)
                    os.sync()
                    command = [vmtide, "delta", "apply", work / f"{name}.delta", target]
                seconds, cpu = used(command)
                if name != "dd":
                    used([vmtide, "compare", target, work / f"{name}.raw"])
                    Path(f"{target}.vmtide-delta").unlink(missing_ok=True)
                written.unlink(missing_ok=True)
                print(json.dumps({"round": number, "what": name, "gb_per_s": round(size * MIB / seconds / 1e9, 2),
                                  "processor_s": round(cpu, 2)}), flush=True)
                if number > 0:
                    rates[name].append(size * MIB / seconds / 1e9)
                    processor[name].append(cpu)
        print(json.dumps({"type": "summary", "size_mib": size,
                          "gb_per_s": {name: round(statistics.median(values), 2) for name, values in rates.items()},
                          "processor_s": {name: round(statistics.median(values), 2) for name, values in processor.items()}}))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
