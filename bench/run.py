#!/usr/bin/env python3
"""Measure vmtide and its peers side by side on one machine, on one disk, in turn.

    bench/make-disk.py                        once: makes the disk
    bench/run.py backup                       full, restore, verify, and the backups of the days after
    bench/run.py copy                         plain copies of the disk, the floor for a restore
    bench/run.py scale                        the same 1 GiB of changes on a 16 GiB and a 1 TiB disk
    bench/run.py scale-qemu                   the same, of running machines, by QEMU's dirty bitmap
    bench/run.py report                       write docs/benchmarks.md from what was measured

Every round runs every tool once (A B C A B C …), so that what else the machine does falls on
all of them; the first round warms up and is not counted. Raw figures are appended to
work/results/*.jsonl, and the report is made from these alone.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import qemu_scale
import report
import tools
from measure import WORK, Failed, allocated, apparent, data_offsets, measure, remove, warm, warm_tree

HERE = pathlib.Path(__file__).resolve().parent
LIVE = WORK / "live/disk.raw"
STEPS = ("full", "restore", "verify", "unchanged", "day2", "incremental")
MIB, GIB = 1 << 20, 1 << 30
SCALE_SIZES = (16 * GIB, 1024 * GIB)
SCALE_BASE = GIB
SCALE_DIRTY = GIB
# Length of one changed range of the scale scenario: what a bitmap of 64 KiB shows when a guest
# writes here and there in pieces larger than that.
SCALE_RANGE = 256 << 10


def record(scenario, row):
    """Append one measured row, and show it."""
    path = WORK / "results" / f"{scenario}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as out:
        out.write(json.dumps(row) + "\n")
    extra = "".join(f" {k}={row[k] / MIB:.0f}MiB" for k in ("stored_bytes", "added_bytes", "target_bytes", "dirty_bytes", "read_bytes") if k in row)
    print(f"round {row['round']} {row['tool']:<15} {row['step']:<12} {row['wall_s']:8.2f} s wall {row['settled_s']:8.2f} s settled "
          f"{row['cpu_s']:8.2f} s cpu {row['rss_bytes'] / MIB:6.0f} MiB rss{extra}  load {row['load_before']}", flush=True)


def call(tool, command):
    """Run a command that is not measured; stop with its text when it fails."""
    done = subprocess.run(command, env={**os.environ, **tool.env()}, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-1500:]}")


def put_live(image, now):
    """Make `image` the disk that is backed up: same path, new modification time, no copy."""
    LIVE.parent.mkdir(exist_ok=True)
    remove(LIVE)
    os.link(image, LIVE)
    os.utime(LIVE, (now, now))
    warm(LIVE)


def fresh(tool):
    """An empty repository."""
    remove(tool.home)
    tool.repo.mkdir(parents=True)
    for command in tool.init():
        call(tool, command)


def timed(tool, step, number, command, **extra):
    """Measure one command and record it with the tool's identity."""
    figures = measure(command, tool.env(), ok=tool.ok)
    return {"time": int(time.time()), "tool": tool.name, "label": tool.label, "setting": tool.setting,
            "version": tool.version(), "step": step, "round": number, **figures, **extra}


def same(a, b):
    """Whether two images hold the same bytes; holes count as zeros."""
    return subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", str(a), str(b)]).returncode == 0


def restore_step(tool, number, source, compare):
    """Restore (or copy) into an empty directory and measure; compare the bytes when asked."""
    target = WORK / "target"
    remove(target)
    target.mkdir()
    command, file = tool.restore(target, source)
    row = timed(tool, "restore", number, command)
    if compare and not same(file, source):
        raise Failed(f"{tool.name}: the restored disk differs from the source")
    row["target_bytes"] = allocated(file)
    remove(target)
    return row


def next_step(tool, number, step, compare, changes=None):
    """A further backup into the repository: of the disk that did not change, or of the next day's. When asked, it is
    restored and compared; that is not measured."""
    image, age = (WORK / "disk/disk.raw", 1000) if step == "unchanged" else (WORK / "day2.raw", 0)
    put_live(image, int(time.time()) - age)
    size = apparent(tool.stored())
    row = timed(tool, step, number, tool.backup(LIVE, changes))
    record("backup", {**row, "added_bytes": apparent(tool.stored()) - size})
    if compare and step != "unchanged":
        restore_step(tool, number, LIVE, compare)


def backup_chain(tool, number, steps, compare):
    """Full backup, restore, verification, backup of the untouched disk, backup of the next day's disk: by reading it, and, of tools
    that take one, by a list of what changed."""
    put_live(WORK / "disk/disk.raw", int(time.time()) - 3000)
    fresh(tool)
    row = timed(tool, "full", number, tool.backup(LIVE))
    record("backup", {**row, "stored_bytes": apparent(tool.stored())})
    if "restore" in steps:
        warm_tree(tool.repo)
        warm(LIVE)
        record("backup", restore_step(tool, number, LIVE, compare))
    if "verify" in steps and tool.verify():
        warm_tree(tool.repo)
        record("backup", timed(tool, "verify", number, tool.verify()))
    if not tool.dedups:
        return
    if "unchanged" in steps:
        next_step(tool, number, "unchanged", compare)
    by_list = "incremental" in steps and tool.takes_changes
    before = tool.home / "before"
    if by_list and "day2" in steps:
        # Both begin from the same repository. Its objects are never changed, so that links are a copy.
        subprocess.run(["cp", "-al", str(tool.repo), str(before)], check=True)
    if "day2" in steps:
        next_step(tool, number, "day2", compare)
    if by_list:
        if before.exists():
            remove(tool.repo)
            before.rename(tool.repo)
        next_step(tool, number, "incremental", compare, WORK / "changes.json")


def chosen(names, classes):
    """The tools asked for that are installed here; says which are not."""
    picked = []
    for cls in classes if names is None else tools.ALL_TOOLS:
        tool = cls(WORK)
        if names is not None and tool.name not in names:
            continue
        if tool.available():
            picked.append(tool)
        else:
            print(f"note: {tool.name} is not installed ({tool.binary()}), left out")
    if not picked:
        sys.exit("no tool to run; names: " + " ".join(c(WORK).name for c in tools.ALL_TOOLS))
    return picked


def rounds(options, picked, work):
    """Warm-up round 0, then the counted ones, each tool in turn; a tool that fails is dropped."""
    first = 1 if options.no_warm_up else 0
    for number in range(first, options.runs + 1):
        for tool in list(picked):
            try:
                work(tool, number)
            except Failed as error:
                print(f"FAILED {tool.name}: {error}", file=sys.stderr)
                picked.remove(tool)
            finally:
                remove(tool.home)
    remove(LIVE)
    remove(WORK / "target")


def backup(options):
    """Scenario `backup`."""
    steps = set(options.steps.split(","))
    if not steps <= set(STEPS):
        sys.exit(f"steps are {','.join(STEPS)}")
    picked = chosen(options.tools, tools.BACKUP_TOOLS)
    rounds(options, picked, lambda tool, number: backup_chain(tool, number, steps, number == 0))


def copy(options):
    """Scenario `copy`: nbdcopy and qemu-img from a raw export of the same disk."""
    picked = chosen(options.tools, tools.COPY_TOOLS)
    disk = WORK / "disk/disk.raw"
    warm(disk)
    rounds(options, picked, lambda tool, number: record("backup", restore_step(tool, number, disk, number == 0)))


# --- scale ----------------------------------------------------------------------------------


def data_pieces(piece):
    """The non-zero data of the benchmark's disk in pieces of `piece` bytes, from its start on."""
    with open(WORK / "disk/disk.raw", "rb") as disk:
        for at in data_offsets(disk.fileno(), piece):
            yield os.pread(disk.fileno(), piece, at)


def scale_images(size):
    """A sparse disk of `size` bytes with 1 GiB of data spread over it, then 1 GiB of other data
    over other places: two files and the list of changed ranges. The ranges are the same number,
    length and content whatever the size."""
    home = WORK / f"scale-{size // GIB}"
    before, after, changes = home / "before/disk.raw", home / "after/disk.raw", home / "changes.json"
    if changes.exists():
        return before, after, changes
    for file in (before, after):
        file.parent.mkdir(parents=True, exist_ok=True)
    count = SCALE_DIRTY // SCALE_RANGE
    slots = random.Random("scale").sample(range(16 * GIB // SCALE_RANGE), count * 2)
    spread = size // (16 * GIB)
    pieces = data_pieces(SCALE_RANGE)
    with open(before, "wb") as out:
        out.truncate(size)
        for slot in slots[:count]:
            out.seek(slot * spread * SCALE_RANGE)
            out.write(next(pieces))
    subprocess.run(["cp", "--sparse=always", str(before), str(after)], check=True)
    # Half of the changes overwrite data, half fall on places that were never written.
    dirty = sorted(slots[count // 2:count] + slots[count:count + count // 2])
    with open(after, "r+b") as out:
        for slot in dirty:
            out.seek(slot * spread * SCALE_RANGE)
            out.write(next(pieces))
    changes.write_text(json.dumps([{"offset": s * spread * SCALE_RANGE, "length": SCALE_RANGE} for s in dirty]))
    return before, after, changes


def scale_chain(tool, number, size, images):
    """Full backup of the sparse disk, then the measured incremental by the list of changes."""
    before, after, changes = images
    now = int(time.time())
    put_live(before, now - 3000)
    fresh(tool)
    step = f"{size // GIB} GiB"
    full = timed(tool, f"full {step}", number, tool.backup(LIVE))
    first = apparent(tool.repo)
    record("scale", {**full, "stored_bytes": first})
    put_live(after, now)
    row = timed(tool, f"incremental {step}", number, tool.backup(LIVE, changes))
    record("scale", {**row, "added_bytes": apparent(tool.repo) - first})
    if number == 0:
        target = WORK / "target"
        target.mkdir(exist_ok=True)
        command, file = tool.restore(target, LIVE)
        record("scale", timed(tool, f"restore {step}", number, command))
        if not same(file, after):
            raise Failed(f"{tool.name}: the restored disk differs from the source")
    remove(WORK / "target")
    remove(tool.home)


def scale(options):
    """Scenario `scale`: only tools that take changed ranges; the others would read 1 TiB."""
    picked = chosen(options.tools or ["vmtide"], tools.ALL_TOOLS)
    images = {size: scale_images(size) for size in SCALE_SIZES}

    def work(tool, number):
        for size in SCALE_SIZES:
            scale_chain(tool, number, size, images[size])

    rounds(options, picked, work)


def scale_through_qemu(options):
    """Scenario `scale-qemu`."""
    try:
        qemu_scale.run(options, record)
    except Failed as error:
        sys.exit(f"FAILED: {error}")


def discard(scenario):
    """Forget the figures of one scenario. `backup` and `copy` share a file: only their own rows go."""
    scale = scenario.startswith("scale")
    path = WORK / "results" / (f"{scenario}.jsonl" if scale else "backup.jsonl")
    if scale or not path.exists():
        return remove(path)
    copiers = {tool.name for tool in tools.COPY_TOOLS}
    rows = [line for line in path.read_text().splitlines(True) if (json.loads(line)["tool"] in copiers) != (scenario == "copy")]
    path.write_text("".join(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=("backup", "copy", "scale", "scale-qemu", "report"))
    parser.add_argument("--runs", type=int, default=5, help="counted rounds after the warm-up (default 5)")
    parser.add_argument("--no-warm-up", action="store_true", help="leave out round 0, which also compares restored bytes")
    parser.add_argument("--tools", type=lambda s: s.split(","), help="names, comma separated (default: all)")
    parser.add_argument("--steps", default=",".join(STEPS), help="of `backup`: " + ",".join(STEPS))
    parser.add_argument("--dirty-mib", type=int, default=1024, help="of `scale-qemu`: MiB written between two backups (default 1024)")
    parser.add_argument("--discard", action="store_true", help="forget earlier figures of this scenario first")
    parser.add_argument("--output", type=pathlib.Path, default=HERE.parent / "docs/benchmarks.md", help="of `report`: the file to fill")
    parser.add_argument("--note", default="", help="of `report`: a line to print below the machine's description")
    options = parser.parse_args()
    if options.scenario == "report":
        return report.write(WORK, options.output, options.note)
    if not (WORK / "disk.json").exists():
        sys.exit("no disk.json: run bench/make-disk.py first")
    if options.discard:
        discard(options.scenario)
    {"backup": backup, "copy": copy, "scale": scale, "scale-qemu": scale_through_qemu}[options.scenario](options)
    return None


if __name__ == "__main__":
    main()
