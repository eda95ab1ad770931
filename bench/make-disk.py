#!/usr/bin/env python3
"""Make the benchmark's virtual disk: two states of one 8 GiB machine disk, a day apart.

The disk has a GPT and one ext4 partition filled with the files of a fixed list of Debian
packages (packages.txt) plus a database file and logs. Nothing is mounted and nothing needs
root: the file system is made by mke2fs and filled by debugfs from a sorted script, with fixed
identifiers and a fixed clock, so that the same package versions give the same bytes on any
machine. Versions and hashes are recorded in packages.lock; the disk's own hash is printed and
written to work/disk.json, and every published figure names it.

Result, in bench/work (ignored by git):
  disk/disk.raw     the first day, sparse
  day2.raw          the second day, sparse
  changes.json      the 64 KiB ranges in which they differ, [{"offset":…,"length":…}]
  disk.json         sizes, hashes, versions

Needs: apt-get, dpkg-deb, mke2fs, debugfs, e2fsck, sgdisk, fallocate, cp.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import stat
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
WORK = pathlib.Path(os.environ.get("VMTIDE_BENCH_WORK") or HERE / "work")
MIB = 1 << 20
DISK_BYTES = 8 << 30
# Where the partition starts. 1 MiB is what every current installer does.
PART_OFFSET = MIB
# GPT keeps 33 sectors at the end; leave 1 MiB so the partition stays 4 KiB aligned.
PART_BYTES = DISK_BYTES - 2 * MIB
BLOCK = 4096
# Granularity of QEMU's dirty bitmaps by default, and of the list of changes.
GRANULARITY = 65536
FS_UUID = "6f1c0d1e-5a0b-4a53-9d0f-2c9b1a7e4d01"
HASH_SEED = "0b7d5c3a-93f2-4f0e-8a41-7e55a90c6b02"
DISK_GUID = "A3D3B6F0-6C62-4B8B-9C39-5E1D5F9A0003"
PART_GUID = "A3D3B6F0-6C62-4B8B-9C39-5E1D5F9A0004"
DAY1_TIME = 1_760_000_000
DAY2_TIME = DAY1_TIME + 86_400
DB_PAGE = 8192
DB_PAGES = 32_768  # 256 MiB
DB_PAGES_CHANGED = 2_500
DB_PATH = "/var/lib/app/records.db"


def run(command, **kw):
    """Run a command, stop with its error text when it fails, return its output."""
    done = subprocess.run(command, text=True, capture_output=True, **kw)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


# --- packages -------------------------------------------------------------------------------


def wanted():
    """The list of (when, name) of packages.txt."""
    rows = []
    for line in (HERE / "packages.txt").read_text().splitlines():
        line = line.split("#")[0].split()
        if line:
            rows.append((line[0], line[1]))
    return rows


def real_name(name):
    """The package behind the two names that follow the distribution's kernel version."""
    meta = {"linux-image": "linux-image-amd64", "linux-headers": "linux-headers-amd64"}.get(name)
    if meta is None:
        return name
    depends = run(["apt-cache", "show", "--no-all-versions", meta])
    return re.search(rf"^Depends:.*?({name}-[0-9][^\s,(]*)", depends, re.M).group(1)


def read_lock():
    """name -> (package, version, sha256) of packages.lock, empty when there is none."""
    path = HERE / "packages.lock"
    if not path.exists():
        return {}
    return {f[0]: (f[1], f[2], f[3]) for f in (l.split() for l in path.read_text().splitlines()) if len(f) == 4}


def download(name, lock, store):
    """Fetch one package, at the locked version when the archive still has it."""
    package, version, digest = lock.get(name, (None, None, None))
    if package:
        for file in store.glob(f"{package}_*.deb"):
            if hashlib.sha256(file.read_bytes()).hexdigest() == digest:
                return file, package, version, digest
        got = subprocess.run(["apt-get", "download", f"{package}={version}"], cwd=store, capture_output=True, text=True)
        if got.returncode != 0:
            print(f"note: {package} {version} is no longer in the archive, taking the present version")
            package = None
    if not package:
        package = real_name(name)
        for old in store.glob(f"{package}_*.deb"):
            old.unlink()
        run(["apt-get", "download", package], cwd=store)
    file = next(store.glob(f"{package}_*.deb"))
    version = run(["dpkg-deb", "-f", str(file), "Version"]).strip()
    return file, package, version, hashlib.sha256(file.read_bytes()).hexdigest()


def fetch_all(rows):
    """Download and unpack every package into work/pkg/NAME; returns the lock rows."""
    store, trees = WORK / "deb", WORK / "pkg"
    store.mkdir(parents=True, exist_ok=True)
    lock, found = read_lock(), []
    for _, name in rows:
        file, package, version, digest = download(name, lock, store)
        found.append((name, package, version, digest))
        tree = trees / name
        if not tree.exists():
            tree.mkdir(parents=True)
            run(["dpkg-deb", "-x", str(file), str(tree)])
        print(f"{len(found)}/{len(rows)} {package} {version}", flush=True)
    return found


# --- contents made here ---------------------------------------------------------------------

WORDS = ("account order customer invoice shipped pending paid address street city country item price "
         "quantity discount warehouse carrier note created updated status session login error retry").split()


def db_page(number, generation):
    """One page of the made-up database: half text-like rows, a quarter random, a quarter zero."""
    rng = random.Random(f"page {number} {generation}")
    text = " ".join(rng.choices(WORDS, k=700)).encode()[: DB_PAGE // 2]
    page = text + rng.randbytes(DB_PAGE // 4)
    return page + bytes(DB_PAGE - len(page))


def log_lines(seed, count):
    """Lines as syslog writes them: much repetition, some numbers."""
    rng = random.Random(seed)
    out = []
    for n in range(count):
        out.append(f"Oct  9 {n // 3600 % 24:02}:{n // 60 % 60:02}:{n % 60:02} srv1 {rng.choice(WORDS)}[{rng.randrange(65536)}]: "
                   f"{' '.join(rng.choices(WORDS, k=8))} id={rng.getrandbits(64):016x} ms={rng.randrange(9999)}\n")
    return "".join(out).encode()


def write_made_files():
    """The database and the logs of both days, into work/made."""
    made = WORK / "made"
    made.mkdir(exist_ok=True)
    with open(made / "records.db", "wb") as out:
        for number in range(DB_PAGES):
            out.write(db_page(number, 1))
    (made / "syslog-day1").write_bytes(log_lines("day1", 300_000))
    (made / "syslog-day2").write_bytes(log_lines("day2", 300_000))


# --- file system ----------------------------------------------------------------------------


def quote(text):
    """An argument for debugfs: in double quotes, an inner one doubled."""
    return '"' + text.replace('"', '""') + '"'


def usable(name):
    """debugfs reads one command per line: names with control characters cannot be written."""
    return all(c.isprintable() for c in name)


def scan(name, files, dirs):
    """Add what package `name` contains to `files` (path -> (kind, source)) and `dirs`."""
    root = WORK / "pkg" / name
    inodes = {}
    for base, subdirs, names in os.walk(root):
        rel = "/" + os.path.relpath(base, root) if base != str(root) else ""
        for entry in sorted(subdirs + names):
            path, source = f"{rel}/{entry}", os.path.join(base, entry)
            mode = os.lstat(source).st_mode
            if not usable(path):
                continue
            if stat.S_ISLNK(mode):
                files[path] = ("link", os.readlink(source))
            elif stat.S_ISREG(mode):
                files[path] = ("file", source)
                inodes.setdefault(os.lstat(source).st_ino, []).append(path)
            elif stat.S_ISDIR(mode):
                dirs.add(path)


    # Several names of one file stay that: copies would be duplicate data that no real disk has
    # (the 13 names of Mesa's driver alone would add 295 MiB).
    for paths in inodes.values():
        first, *others = sorted(paths)
        files.update({path: ("hard", first) for path in others})


def add_dirs(path, dirs):
    """Add every parent directory of `path` to `dirs`."""
    while (path := path.rpartition("/")[0]):
        dirs.add(path)


def commands(files, dirs, known_dirs, removed):
    """The debugfs script that removes `removed`, then makes `dirs` and `files`, in sorted order."""
    out = [f"rm {quote(path)}" for path in sorted(removed)]
    for path in sorted(dirs - known_dirs):
        out.append(f"mkdir {quote(path)}")
    cwd = None
    names = {}
    for path in sorted(files):
        kind, source = files[path]
        if kind == "hard":
            names.setdefault(source, []).append(path)
            continue
        parent, _, entry = path.rpartition("/")
        if parent != cwd:
            out.append(f"cd {quote(parent or '/')}")
            cwd = parent
        out.append(f"write {quote(source)} {quote(entry)}" if kind == "file" else f"symlink {quote(entry)} {quote(source)}")
    for first, others in names.items():  # debugfs leaves the link count to the caller
        out += [f"ln {quote(first)} {quote(other)}" for other in others]
        out.append(f"set_inode_field {quote(first)} links_count {1 + len(others)}")
    return "\n".join(out) + "\n"


def debugfs(image, script, now):
    """Run a script on the partition inside `image`; stop when any command failed."""
    path = WORK / "debugfs.cmd"
    path.write_text(script)
    env = dict(os.environ, E2FSPROGS_FAKE_TIME=str(now))
    done = subprocess.run(["debugfs", "-w", "-f", str(path), f"{image}?offset={PART_OFFSET}"], env=env,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    errors = [l for l in done.stderr.splitlines() if l and not l.startswith("debugfs 1.")]
    if done.returncode != 0 or errors:
        sys.exit(f"debugfs failed ({len(errors)} errors): " + "\n".join(errors[:10]))


def make_empty(image):
    """A sparse disk with a GPT and an empty ext4 file system, identifiers and clock fixed."""
    image.unlink(missing_ok=True)
    with open(image, "wb") as out:
        out.truncate(DISK_BYTES)
    run(["sgdisk", "-o", "-U", DISK_GUID, "-n", f"1:{PART_OFFSET // 512}:{(PART_OFFSET + PART_BYTES) // 512 - 1}",
         "-t", "1:8300", "-c", "1:root", "-u", f"1:{PART_GUID}", str(image)])
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-U", FS_UUID, "-L", "root", "-m", "1",
         "-E", f"offset={PART_OFFSET},hash_seed={HASH_SEED},root_owner=0:0,nodiscard", str(image), str(PART_BYTES // BLOCK)],
        env=dict(os.environ, E2FSPROGS_FAKE_TIME=str(DAY1_TIME)))


def finish(image):
    """Check the file system and turn blocks of zeros into holes."""
    run(["e2fsck", "-fn", f"{image}?offset={PART_OFFSET}"])
    run(["fallocate", "--dig-holes", str(image)])


def physical(image, path):
    """(first logical block, first physical block, count) of every extent of a file."""
    out = run(["debugfs", "-R", f"ex {path}", f"{image}?offset={PART_OFFSET}"])
    rows = re.findall(r"^\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+(\d+)\s*-\s*\d+\s+(\d+)\s*-\s*\d+\s+(\d+)", out, re.M)
    return [(int(l), int(p), int(n)) for depth, of, l, p, n in rows if depth == of]


def change_pages(image):
    """Overwrite pages of the database in place, as a database does."""
    extents = physical(image, DB_PATH)
    per_page = DB_PAGE // BLOCK
    rng = random.Random("pages of day 2")
    with open(image, "r+b") as disk:
        for number in sorted(rng.sample(range(DB_PAGES), DB_PAGES_CHANGED)):
            page = db_page(number, 2)
            for i in range(per_page):
                logical = number * per_page + i
                start, phys, _ = next(e for e in extents if e[0] <= logical < e[0] + e[2])
                disk.seek(PART_OFFSET + (phys + logical - start) * BLOCK)
                disk.write(page[i * BLOCK:(i + 1) * BLOCK])


def make_day1(image, rows):
    """Build the first day's disk; returns its directories and each package's paths."""
    files, dirs, owned = {}, set(), {}
    for when, name in rows:
        if when == "2":
            continue
        mine = {}
        scan(name, mine, dirs)
        owned[name] = mine
        files.update(mine)
    files[DB_PATH] = ("file", str(WORK / "made/records.db"))
    files["/var/log/syslog.1"] = ("file", str(WORK / "made/syslog-day1"))
    for path in files:
        add_dirs(path, dirs)
    files = {p: v for p, v in files.items() if p not in dirs}
    make_empty(image)
    debugfs(image, commands(files, dirs, set(), ()), DAY1_TIME)
    finish(image)
    return files, dirs, owned


def make_day2(image, first, rows, files, dirs, owned):
    """Copy the first day's disk and live a day on it: remove, upgrade, install, log, update rows."""
    run(["cp", "--sparse=always", "--reflink=auto", str(first), str(image)])
    gone, new, new_dirs = set(), {}, set(dirs)
    for when, name in rows:
        if when == "2":
            scan(name, new, new_dirs)
            continue
        mine = {p for p, v in owned[name].items() if files.get(p) == v}
        if when in ("1-", "1="):
            gone |= mine
        if when == "1=":
            new.update({p: files[p] for p in mine})
    for when, name in rows:
        if when in ("1=", "2"):
            deb = next((WORK / "deb").glob(f"{name}_*.deb"))
            new[f"/var/cache/apt/archives/{name}.deb"] = ("file", str(deb))
    new["/var/log/syslog"] = ("file", str(WORK / "made/syslog-day2"))
    for path in new:
        add_dirs(path, new_dirs)
    new = {p: v for p, v in new.items() if p not in new_dirs and (p not in files or p in gone)}
    debugfs(image, commands(new, new_dirs, dirs, gone), DAY2_TIME)
    change_pages(image)
    finish(image)


# --- comparison -----------------------------------------------------------------------------


def data_extents(handle, size):
    """Data extents of a sparse file."""
    at = 0
    while at < size:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(handle, start, os.SEEK_HOLE)
        yield start, at


def changed_ranges(first, second):
    """64 KiB aligned ranges in which two images of one size differ, merged."""
    a, b = os.open(first, os.O_RDONLY), os.open(second, os.O_RDONLY)
    units = set()
    for handle in (a, b):
        for start, end in data_extents(handle, DISK_BYTES):
            units.update(range(start // GRANULARITY, (end + GRANULARITY - 1) // GRANULARITY))
    ranges = []
    for unit in sorted(units):
        at = unit * GRANULARITY
        if os.pread(a, GRANULARITY, at) == os.pread(b, GRANULARITY, at):
            continue
        if ranges and ranges[-1]["offset"] + ranges[-1]["length"] == at:
            ranges[-1]["length"] += GRANULARITY
        else:
            ranges.append({"offset": at, "length": GRANULARITY})
    os.close(a)
    os.close(b)
    return ranges


def digest(path):
    """SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep-packages", action="store_true", help="keep the unpacked packages (5 GiB)")
    parser.add_argument("--write-lock", action="store_true", help="record the versions used in packages.lock")
    options = parser.parse_args()
    os.umask(0o022)
    (WORK / "disk").mkdir(parents=True, exist_ok=True)
    first, second = WORK / "disk/disk.raw", WORK / "day2.raw"
    if (WORK / "disk.json").exists():
        print(f"{WORK / 'disk.json'} exists: the disk is made. Delete that file to make it again.")
        return
    rows = wanted()
    lock = fetch_all(rows)
    if options.write_lock or not read_lock():
        (HERE / "packages.lock").write_text("".join(" ".join(r) + "\n" for r in lock))
    same = {r[0]: r[1:] for r in lock} == read_lock()
    write_made_files()
    files, dirs, owned = make_day1(first, rows)
    make_day2(second, first, rows, files, dirs, owned)
    ranges = changed_ranges(first, second)
    (WORK / "changes.json").write_text(json.dumps(ranges))
    facts = {
        "files": len(files),
        "virtual_bytes": DISK_BYTES,
        "day1": {"sha256": digest(first), "allocated_bytes": first.stat().st_blocks * 512},
        "day2": {"sha256": digest(second), "allocated_bytes": second.stat().st_blocks * 512},
        "changed_ranges": len(ranges),
        "changed_bytes": sum(r["length"] for r in ranges),
        "packages_as_locked": same,
    }
    (WORK / "disk.json").write_text(json.dumps(facts, indent=1) + "\n")
    if not options.keep_packages:
        shutil.rmtree(WORK / "pkg")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
