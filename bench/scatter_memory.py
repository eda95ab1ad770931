#!/usr/bin/env python3
"""Keep free memory from being given back to the host of a virtual machine, for measurements.

    bench/scatter_memory.py       says "ready" and stays until it is killed

Some hosts take the free memory of their guests back, in pieces of 2 MiB (free page reporting). A
program whose data comes to lie in such a piece then waits for the host: a conversion takes up to
five times as long, and which one does is chance. This process takes most of the memory, gives it
back but for one page of each MiB, and stays: what is free then is in smaller pieces. Memory that it
did not get, such as that of files which are removed later, still comes together into such pieces.
"""

import mmap
import time

PAGE_BYTES = 4096
PIECE_BYTES = 1 << 20
# Of the memory that is to be had; the rest is for who runs meanwhile.
SHARE = 0.85


def main():
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    size = int(available * SHARE) // PIECE_BYTES * PIECE_BYTES
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, size, PAGE_BYTES):
        memory[at] = 1
    for at in range(0, size, PIECE_BYTES):
        memory.madvise(mmap.MADV_DONTNEED, at + PAGE_BYTES, PIECE_BYTES - PAGE_BYTES)
    print("ready", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
