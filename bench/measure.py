"""Running one command and measuring it: wall time, CPU time, peak memory, bytes left on disk.

CPU and memory come from wait4(2), that is from the kernel's account of the child and of the
children it waited for. Peak memory of a process tree is therefore that of its largest member,
and can never be seen smaller than this Python process (about 20 MiB) was when it forked.
"""

import os
import pathlib
import shutil
import statistics
import subprocess
import time


# Where the disk, the repositories and the figures live; VMTIDE_BENCH_WORK puts them on another disk.
WORK = pathlib.Path(os.environ.get("VMTIDE_BENCH_WORK") or pathlib.Path(__file__).resolve().parent / "work")


class Failed(Exception):
    """A measured command ended with an exit code that is not success."""


def measure(command, env=None, cwd=None, ok=(0,), settle=os.sync):
    """Run `command` (a list); return its figures. Output goes to work/last-output.

    `settled_s` is wall time plus the time the file system then needs to have everything on the
    disk: tools that end without fsync look faster than they are without it. `settle` brings it there.
    """
    log = WORK / "last-output"
    os.sync()
    load = os.getloadavg()[0]
    with open(log, "wb") as out:
        start = time.monotonic()
        child = subprocess.Popen(command, env={**os.environ, **(env or {})}, cwd=cwd, stdin=subprocess.DEVNULL,
                                 stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    settle()
    settled = time.monotonic() - start
    if child.returncode not in ok:
        tail = log.read_text(errors="replace")[-1500:]
        raise Failed(f"{' '.join(command)}: exit {child.returncode}\n{tail}")
    return {
        "wall_s": round(wall, 3),
        "settled_s": round(settled, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "user_s": round(usage.ru_utime, 3),
        "sys_s": round(usage.ru_stime, 3),
        "rss_bytes": usage.ru_maxrss * 1024,
        "load_before": round(load, 2),
    }


def allocated(path):
    """Bytes a file or a directory tree occupies on disk (holes do not count)."""
    path = pathlib.Path(path)
    if path.is_file():
        return path.stat().st_blocks * 512
    return sum(f.lstat().st_blocks * 512 for f in path.rglob("*") if not f.is_symlink())


def apparent(path):
    """Sum of the lengths of the regular files below a directory."""
    return sum(f.lstat().st_size for f in pathlib.Path(path).rglob("*") if f.is_file())


def remove(path):
    """Remove a file or a directory tree, if it is there."""
    path = pathlib.Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def data_offsets(handle, piece):
    """Where the data of a sparse file lies in whole pieces of `piece` bytes, from its start on."""
    size, at = os.fstat(handle).st_size, 0
    while at < size:
        try:
            at = os.lseek(handle, at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(handle, at, os.SEEK_HOLE)
        while at + piece <= end:
            yield at
            at += piece
        at = max(at, end)


def warm(path):
    """Bring the data of a sparse file into the page cache; holes are not read."""
    handle = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(handle).st_size, 0
        while at < size:
            try:
                at = os.lseek(handle, at, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(handle, at, os.SEEK_HOLE)
            while at < end:
                at += len(os.pread(handle, min(1 << 20, end - at), at)) or (1 << 20)
    finally:
        os.close(handle)


def warm_tree(path):
    """Bring every file of a directory tree into the page cache."""
    for file in pathlib.Path(path).rglob("*"):
        if file.is_file():
            warm(file)


def restore_ratio(row, key):
    """How much more the restore of a year's last point took than that of its first: medians of restores in turn."""
    first, last = (statistics.median(restore[point][key] for restore in row["restores"]) for point in ("first", "last"))
    return last / first
