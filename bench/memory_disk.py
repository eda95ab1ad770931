#!/usr/bin/env python3
"""How fast a restore is where the disk does not bound it: to a loop device with sectors of 4 KiB whose file is in memory.

    bench/memory_disk.py [--runs 5] [--levels=-3,-1,1,3]

Needs root, the benchmark's disk (bench/make-disk.py), and room for it in /dev/shm. The pages of that file are there before,
so that no new memory is asked for. Every round, in turn: a restore of a full backup at each level, and dd writing the same
disk in pieces of 4 MiB past the page cache, one after the other. The first round warms up, and compares what
every restore wrote with the source. Raw figures go to work/results/memory-disk.jsonl.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys

from measure import WORK, Failed, allocated, data_offsets, measure, remove, warm, warm_tree

HERE = pathlib.Path(__file__).resolve().parent
VMTIDE = os.environ.get("VMTIDE_BIN") or str(HERE.parent / "target/release/vmtide")
HOME = WORK / "memory-disk"
DISK = WORK / "disk/disk.raw"
PIECE_BYTES = 1 << 20
FILE = pathlib.Path("/dev/shm/vmtide-memory-disk.raw")
SECRET = {"VMTIDE_PASSWORD": "of the benchmark", "XDG_STATE_HOME": str(HOME / "state"), "XDG_CACHE_HOME": str(HOME / "cache")}


@contextlib.contextmanager
def memory_disk():
    """A block device over a copy of the disk in memory; answers with its path."""
    device = None
    try:
        subprocess.run(["cp", "--sparse=auto", str(DISK), str(FILE)], check=True)
        made = subprocess.run(["losetup", "--sector-size", "4096", "--find", "--show", str(FILE)], check=True, capture_output=True, text=True)
        device = made.stdout.strip()
        yield device
    finally:
        if device:
            subprocess.run(["losetup", "--detach", device], check=False)
        remove(FILE)


def wipe(device):
    """Other bytes wherever the disk has data, so that nothing passes for restored that was there before."""
    other = b"\xaa" * PIECE_BYTES
    with open(DISK, "rb") as disk, open(device, "r+b") as out:
        for offset in data_offsets(disk.fileno(), PIECE_BYTES):
            os.pwrite(out.fileno(), other, offset)
        os.fsync(out.fileno())


def one_round(device, levels, compare):
    """Every command once: (what, figures)."""
    for level in levels:
        repo = HOME / f"level{level}"
        warm_tree(repo)
        if compare:
            wipe(device)
        figures = measure([VMTIDE, "restore", "disk@latest", "-r", str(repo), "--to", device, "--force", "--json"], SECRET)
        if compare and subprocess.run(["cmp", "-s", str(DISK), device]).returncode != 0:
            raise Failed(f"level {level}: another disk came back")
        yield f"restore, `--compression={level}`", figures
    warm(DISK)
    yield "dd", measure(["dd", f"if={DISK}", f"of={device}", "bs=4M", "oflag=direct", "conv=sparse,notrunc", "status=none"], {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--levels", default="-3,-1,1,3", type=lambda text: [int(level) for level in text.split(",")])
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("a loop device is made: needs root")
    size = allocated(DISK)
    results = {}
    remove(HOME)
    HOME.mkdir(parents=True)
    (WORK / "results").mkdir(exist_ok=True)
    try:
        for level in args.levels:
            repo = str(HOME / f"level{level}")
            measure([VMTIDE, "init", repo], SECRET)
            measure([VMTIDE, "backup", str(DISK), "-r", repo, f"--compression={level}", "--json"], SECRET, ok=(0, 3))
        with memory_disk() as device, open(WORK / "results/memory-disk.jsonl", "a") as log:
            for number in range(args.runs + 1):
                for what, figures in one_round(device, args.levels, number == 0):
                    log.write(json.dumps({"what": what, "round": number, "bytes": size, **figures}) + "\n")
                    print(f"round {number} {what}: {figures['wall_s']} s", file=sys.stderr)
                    if number > 0:
                        results.setdefault(what, []).append((figures["wall_s"], figures["cpu_s"]))
    except Failed as error:
        sys.exit(f"FAILED: {error}")
    finally:
        remove(HOME)
    print("| | s (median) | min–max | GB/s of data | CPU s |\n|---|---|---|---|---|")
    for what, found in results.items():
        seconds, processor = zip(*found)
        wall = statistics.median(seconds)
        print(f"| {what} | {wall:.2f} | {min(seconds):.2f}–{max(seconds):.2f} | {size / wall / 1e9:.2f} | {statistics.median(processor):.1f} |")


if __name__ == "__main__":
    main()
