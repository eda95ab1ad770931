#!/usr/bin/env python3
"""Compare layouts of a repository: chunk sizes, frame sizes, levels, on several kinds of disks.

    bench/layouts.py variants              once: three disks of one distribution, from the packages of make-disk.py
    bench/layouts.py run [--quick]         every layout on every workload; appends to work/results/layouts.jsonl
    bench/layouts.py table                 prints the tables of docs/decisions/0013-layout.md

Workloads: `variants` (three machines of one distribution, backed up one after the other into one repository), `days` (the
benchmark disk and its next day's state, each read in full), `writes` (a disk of which 2 % is written anew at random
places in 64 KiB pieces every day, 30 incrementals by a list of changes).

The figures come from `cargo build --release -p vmtide-repo --example measure_layout`, one process for each layout, so that
its peak of memory is its own. Speeds are in processor time, which other work on the machine disturbs less than the clock.
`--scratch DIR` says where the repositories are made; in memory (/dev/shm) the disk does not count.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

from measure import WORK, restore_ratio

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLE = pathlib.Path(os.environ.get("VMTIDE_MEASURE_LAYOUT") or HERE.parent / "target/release/examples/measure_layout")
RESULTS = WORK / "results/layouts.jsonl"
KIB, MIB = 1 << 10, 1 << 20
# What all three machines have, and what each has besides.
COMMON = ("bash coreutils dpkg libc6 locales perl-modules-5.36 python3.11-minimal libpython3.11-stdlib systemd tzdata util-linux "
          "vim-runtime git libicu72 samba-libs gcc-12 cpp-12").split()
OWN = (("postgresql-15", "python3-django", "nginx", "openjdk-17-jre-headless"),
       ("mariadb-server", "mariadb-server-core", "php8.2-cli", "apache2-bin", "docker.io"),
       ("g++-12", "gdb", "libstdc++-12-dev", "python3-numpy", "python3-scipy", "openjdk-17-jre-headless"))
VARIANT_BYTES = 1 << 30
# Chunk bytes, frame bytes, level.
LAYOUTS = ([(chunk * KIB, 2 * MIB, 3) for chunk in (16, 32, 64, 128, 256, 1024)]
           + [(64 * KIB, frame * KIB, 3) for frame in (64, 256, 1024, 4096)]
           + [(64 * KIB, 2 * MIB, 1)])
QUICK = [(16 * KIB, 2 * MIB, 3), (64 * KIB, 2 * MIB, 3), (64 * KIB, 256 * KIB, 3), (256 * KIB, 2 * MIB, 3)]


def variant(number, directory):
    """One machine's disk: an ext4 file system with the files of its packages, the same bytes every time."""
    tree, disk = directory / f"tree{number}", directory / f"variant{number}.raw"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in (*COMMON, *OWN[number]):
        subprocess.run(["cp", "-rP", "--preserve=mode,links", f"{WORK}/pkg/{name}/.", str(tree)], check=True)
    disk.unlink(missing_ok=True)
    env = {**os.environ, "E2FSPROGS_FAKE_TIME": "1760000000"}
    seed = f"0b7d5c3a-93f2-4f0e-8a41-7e55a90c6b1{number}"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-U", seed, "-E", f"hash_seed={seed}", "-d", str(tree), str(disk),
                    str(VARIANT_BYTES >> 10)], check=True, env=env)
    shutil.rmtree(tree)
    return disk


def workloads(directory):
    """Name and arguments of what is measured."""
    return {
        "variants": ["disks", *(str(directory / f"variant{number}.raw") for number in range(len(OWN)))],
        "writes": ["writes", "512", "30", "2", "64", "2048"],
        "days": ["disks", str(WORK / "disk/disk.raw"), str(WORK / "day2.raw")],
    }


def run(directory, scratch, quick, names):
    RESULTS.parent.mkdir(exist_ok=True)
    for name, arguments in workloads(directory).items():
        if name not in names:
            continue
        for chunk, frame, level in QUICK if quick else LAYOUTS:
            target = pathlib.Path(scratch) / f"layout-{os.getpid()}"
            command = [str(EXAMPLE), str(chunk), str(frame), str(level), str(target), *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            shutil.rmtree(target, ignore_errors=True)
            if done.returncode != 0:
                sys.exit(f"{' '.join(command)}: {done.stderr[-500:]}")
            row = {"workload": name, **json.loads(done.stdout)}
            with open(RESULTS, "a") as out:
                out.write(json.dumps(row) + "\n")
            print(name, chunk >> 10, frame >> 10, level, "done", flush=True)


def metadata(added):
    return sum(added[kind]["bytes"] for kind in ("maps", "index", "points"))


def objects(added):
    return sum(kind["objects"] for kind in added.values())


def table():
    rows = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        rows[row["workload"], row["chunk_bytes"], row["frame_bytes"], row["level"]] = row
    for name in ("variants", "days"):
        print(f"\n**{name}**\n\n| chunks | frames | level | read MiB | new MiB | stored MiB | metadata KiB | objects (PUTs) "
              "| backup MiB/s of a core | restore MiB/s of a core | peak MiB |\n" + "|---" * 11 + "|")
        for (workload, chunk, frame, level), row in rows.items():
            if workload != name:
                continue
            backups = row["backups"]
            total = lambda key: sum(backup[key] for backup in backups)
            stored = sum(backup["added"]["packs"]["bytes"] for backup in backups)
            print(f"| {chunk >> 10} KiB | {frame >> 10} KiB | {level} | {total('read_bytes') / MIB:.0f} | {total('new_bytes') / MIB:.0f} "
                  f"| {stored / MIB:.1f} | {sum(metadata(b['added']) for b in backups) / KIB:.0f} "
                  f"| {sum(objects(b['added']) for b in backups)} | {total('read_bytes') / MIB / total('cpu_s'):.0f} "
                  f"| {row['restore']['mib_per_cpu_s']:.0f} | {row['peak_bytes'] / MIB:.0f} |")
    print("\n**writes**\n\n| chunks | frames | level | changed MiB | stored / changed | metadata / changed | objects a day "
          "| backup MiB/s of a core | restore, last day against first (CPU) | peak MiB |\n" + "|---" * 10 + "|")
    for (workload, chunk, frame, level), row in rows.items():
        if workload != "writes":
            continue
        changed, added = row["changed_bytes"], row["added"]
        print(f"| {chunk >> 10} KiB | {frame >> 10} KiB | {level} | {changed / MIB:.0f} | {added['packs']['bytes'] / changed:.3f} "
              f"| {metadata(added) / changed * 100:.2f} % | {objects(added) / row['days']:.1f} | {changed / MIB / row['cpu_s']:.0f} "
              f"| {restore_ratio(row, 'cpu_s'):.2f} | {row['peak_bytes'] / MIB:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("variants", "run", "table"))
    parser.add_argument("--quick", action="store_true", help="four layouts only")
    parser.add_argument("--workloads", default="variants,writes,days")
    parser.add_argument("--directory", type=pathlib.Path, default=WORK / "variants", help="where the three disks are")
    parser.add_argument("--scratch", default="/dev/shm", help="where repositories are made")
    options = parser.parse_args()
    if options.what == "variants":
        for number in range(len(OWN)):
            print(variant(number, options.directory))
    elif options.what == "run":
        run(options.directory, options.scratch, options.quick, options.workloads.split(","))
    else:
        table()


if __name__ == "__main__":
    main()
