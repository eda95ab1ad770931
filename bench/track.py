#!/usr/bin/env python3
"""What change tracking costs a guest: the same writes through `vmtide serve --writable` and `vmtide track`.

    bench/track.py VMTIDE [--size GIB] [--writes N] [--rounds N] [--flush N]

`qemu-img bench` writes 64 KiB at a time, 16 at once, over a Unix socket, into a sparse raw image on the disk of
VMTIDE_BENCH_WORK (bench/work). Its offsets go on by a step that leads through the whole disk before it comes back, so nearly every
write is in another region than the one before: what is hardest for tracking, and what random writes are. Both
servers run in turn (A B B A …), each round with a fresh tracked state, so every round pays for its marks; the first
round warms up. The last line has the medians of the rounds' ratios: of time, and of the processor time of the server, which says more on a
machine that does other things.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys

from measure import WORK

BLOCK = 64 << 10
DEPTH = 16


def serve(vmtide, image, tracked):
    """Start a server; answer with its process and URL."""
    socket = WORK / "track.sock"
    where = f"unix:{socket}"
    command = [vmtide, "track", image, "--listen", where] if tracked else [vmtide, "serve", image, "--writable", "--nbd", where]
    process = subprocess.Popen([*map(str, command), "--json"], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{' '.join(map(str, command))} did not start")
    return process, json.loads(line)["exports"][0]["url"]


def one(arguments, image, tracked):
    """Seconds for all writes of one round, and processor seconds of the server."""
    for suffix in (".rct", ".mrt"):
        pathlib.Path(f"{image}{suffix}").unlink(missing_ok=True)
    os.sync()
    process, url = serve(arguments.vmtide, image, tracked)
    # An odd number of blocks, below the 2 GiB that qemu-img takes: every block of a disk of 2^n is visited, far from the one before.
    step = 20251 * BLOCK
    command = ["qemu-img", "bench", "-w", "-f", "raw", "-t", "none", "-c", arguments.writes, "-d", DEPTH, "-s", BLOCK, "-S", step]
    if arguments.flush:
        command += ["--flush-interval", arguments.flush]
    done = subprocess.run([*map(str, command), url], capture_output=True, text=True)
    process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return float(done.stdout.split("completed in ")[1].split()[0]), usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vmtide", help="the program")
    parser.add_argument("--size", type=int, default=16, help="the disk in GiB (16); it fills as it is written")
    parser.add_argument("--writes", type=int, default=40000, help="writes of a round (40000: 2.4 GiB)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (9)")
    parser.add_argument("--flush", type=int, default=0, help="a flush every so many writes (0: none; a guest with a file system has some)")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    image = WORK / "track.raw"
    image.unlink(missing_ok=True)
    with open(image, "wb") as out:
        out.truncate(arguments.size << 30)
    rounds = []
    for number in range(arguments.rounds + 1):
        found = {}
        for tracked in ((False, True) if number % 2 == 0 else (True, False)):
            found[tracked] = one(arguments, image, tracked)
        ratios = tuple(tracked / plain for tracked, plain in zip(found[True], found[False]))
        print(f"round {number}: plain {found[False][0]:.3f} s ({found[False][1]:.2f} s cpu), tracked {found[True][0]:.3f} s "
              f"({found[True][1]:.2f} s cpu), ratio {ratios[0]:.4f} ({ratios[1]:.4f})", flush=True)
        if number > 0:
            rounds.append(ratios)
    for suffix in ("", ".rct", ".mrt"):
        pathlib.Path(f"{image}{suffix}").unlink(missing_ok=True)
    for name, index in (("time", 0), ("processor time of the server", 1)):
        values = [ratios[index] for ratios in rounds]
        print(f"{name}: median ratio {statistics.median(values):.4f} of {len(values)} rounds, {min(values):.4f} to {max(values):.4f}")


if __name__ == "__main__":
    main()
