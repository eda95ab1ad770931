#!/usr/bin/env python3
"""What a repository costs when it is old and large.

    bench/scale.py year [--quick]      365 daily incrementals with 2 % change: restore of the last against the first
    bench/scale.py index [--tib 20]    the index of so many TiB of chunks of 64 KiB: memory, speed of look-ups

Both need `cargo build --release -p vmtide-repo --example measure_layout --example measure_index`, and print one line of JSON
and whether the targets are met. `year` works on a disk of 1 GiB (--mib), of which 2 % is written anew at random places in
64 KiB pieces every day: the same number of generations, the same share of every pack in use, the same fragments of map
and frames as with 100 GiB, in a hundredth of the space. Half of the content is noise; a disk of the full length takes as
many changes and as large a map and index in little space where less of it is: `--mib 102400 --noise 64` stores 20 GiB,
takes half an hour, and decompresses so quickly that all other work of a restore counts for more than on real disks.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

from measure import restore_ratio

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLES = pathlib.Path(os.environ.get("VMTIDE_EXAMPLES") or HERE.parent / "target/release/examples")
KIB, MIB = 1 << 10, 1 << 20


def call(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command}: exit {done.returncode}\n{done.stderr[-1000:]}")
    print(done.stdout.strip())
    return json.loads(done.stdout)


def verdict(what, value, limit, unit=""):
    print(f"{'yes' if value <= limit else 'NO ':<4} {what}: {value:.3f}{unit}, limit {limit}{unit}")
    return value <= limit


def year(options):
    scratch = pathlib.Path(options.scratch) / f"year-{os.getpid()}"
    days, mib = (60, 256) if options.quick else (365, options.mib)
    try:
        row = call(EXAMPLES / "measure_layout", 64 * KIB, 2 * MIB, options.level, scratch, "writes", mib, days, 2, 64, options.noise)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    added = row["added"]
    metadata = sum(added[kind]["bytes"] for kind in ("maps", "index", "points"))
    share = (metadata - days * 64 * KIB) / row["changed_bytes"]
    fine = [
        verdict(f"restore of day {days} against day 0, by the clock", restore_ratio(row, "wall_s"), 1.3, "x"),
        verdict(f"restore of day {days} against day 0, processor time", restore_ratio(row, "cpu_s"), 1.3, "x"),
        # Noise is what compression cannot go below. Where there is little, what zstd adds to it counts, and this says nothing.
        options.noise < 2048
        or verdict("stored for each changed byte, before compression", added["packs"]["bytes"] / row["changed_bytes"] / 0.5, 1.1),
        verdict("metadata for changed bytes, less 64 KiB a day, mean", share * 100, 0.2, " %"),
        verdict("peak of memory", row["peak_bytes"] / MIB, 256, " MiB"),
    ]
    print(f"     stored in all: {row['stored_bytes'] / MIB:.0f} MiB")
    print(f"     largest metadata of one day: {row['largest_metadata_of_a_day_bytes'] / KIB:.0f} KiB")
    return all(fine)


def index(options):
    scratch = pathlib.Path(options.scratch) / f"index-{os.getpid()}"
    tib = 1 if options.quick else options.tib
    try:
        row = call(EXAMPLES / "measure_index", tib, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for stage in row["index"]["stages"]:
        print(f"     {stage['stage']}: {stage['operations'] / stage['seconds']:.0f} a second, {stage['seconds']:.2f} s")
    print(f"     stored: {row['index']['stored_bytes'] / MIB / tib:.1f} MiB for each TiB; peak while it was written: "
          f"{row['peak_bytes'] / MIB:.0f} MiB")
    return verdict("memory of the index for each TiB", row["index"]["memory_bytes"] / MIB / tib, 64, " MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("year", "index"))
    parser.add_argument("--quick", action="store_true", help="some seconds instead of minutes")
    parser.add_argument("--mib", type=int, default=1024, help="length of the disk of a year; 9 times that is stored")
    parser.add_argument("--noise", type=int, default=2048, help="bytes of each 4 KiB of it that do not compress, a power of two")
    parser.add_argument("--tib", type=int, default=20, help="how much the index is of; 0.4 GiB in --scratch for each")
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--scratch", default="/dev/shm", help="where repositories are made")
    options = parser.parse_args()
    sys.exit(0 if {"year": year, "index": index}[options.what](options) else 1)


if __name__ == "__main__":
    main()
