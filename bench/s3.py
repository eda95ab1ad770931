#!/usr/bin/env python3
"""What a repository in S3 costs beside one in a directory, on one machine: server, vmtide and their disk are the same.

    bench/s3.py [--size-mib 2048] [--runs 5] [--disk work/disk/disk.raw] [--server rustfs] [--apart] [--quick-ack]

Every round, in turn: a backup into a directory, a backup into a bucket, and curl sending as many bytes to the server in
objects as long as packs, four at a time: what the server itself takes from a client that neither reads a disk nor
compresses, encrypts or signs content. The same for a restore and curl fetching. The disk is noise, so that bytes on the
line are bytes of the disk; `--disk` measures a real one as well. Round 0 warms up and is not counted.

A server elsewhere does not take the client's processors: with `--apart` it has the last core to itself, and vmtide and
curl have the others, with the directory, too.

s3s-fs leaves Nagle's algorithm on (TCP_NODELAY): it holds back the end of an answer until
what went before is acknowledged, and Linux waits with that for up to 40 ms. With `--quick-ack` the kernel acknowledges at
once whatever comes over loopback, for every program and as long as the measurement takes. Needs root and iproute2.

The server is s3s-fs (VMTIDE_S3S_FS, else ~/.cache/vmtide-tests/bin/s3s-fs; for figures that count one that is built with
optimisation: `cargo install --features binary --version 0.14.1 s3s-fs`), its files lie beside the directory's.
`--server rustfs` measures RustFS (VMTIDE_RUSTFS, else on the path; `cargo install rustfs` with the newest Rust), which turns it off, and
`--server ceph` the gateway of Ceph with a monitor and a disk (`scripts/test.sh ceph` installs it), which leaves it on unless told
otherwise, and whose daemons keep in memory what they see fit.
Both need the Python environment of moto that `scripts/test.sh` makes, for their bucket. Needs curl 7.88 or later. Raw figures go to work/results/s3.jsonl.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

from measure import WORK, Failed, apparent, measure, remove, warm, warm_tree

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests/e2e"))

from lab.bucket import Owner  # noqa: E402
from lab.ceph import Cluster  # noqa: E402
from lab.processes import free_port  # noqa: E402

VMTIDE = os.environ.get("VMTIDE_BIN") or str(HERE.parent / "target/release/vmtide")
SERVER = os.environ.get("VMTIDE_S3S_FS") or str(pathlib.Path.home() / ".cache/vmtide-tests/bin/s3s-fs")
RUSTFS = os.environ.get("VMTIDE_RUSTFS") or "rustfs"
HOME = WORK / "s3"
MIB = 1 << 20
OBJECT_BYTES = 64 * MIB
AT_ONCE = 4
ACCESS = {"AWS_ACCESS_KEY_ID": "AKIDOFTHEBENCHMARK", "AWS_SECRET_ACCESS_KEY": "a-secret-for-measurements"}


def on(cores, command):
    """The command, on these cores only."""
    return ["taskset", "--cpu-list", ",".join(str(core) for core in sorted(cores)), *command]


class Served:
    """A running server with an empty bucket. `files` is where objects lie as files, if they do."""

    def __init__(self, url, processes, files=None):
        self.url = url
        self.processes = processes
        self.files = files

    def processor_seconds(self):
        """What its processes have used until now."""
        return sum(processor_seconds(process.pid) for process in self.processes)


@contextlib.contextmanager
def s3s_fs(cores):
    port = free_port()
    (HOME / "served/bench").mkdir(parents=True)
    command = [SERVER, "--host", "127.0.0.1", "--port", str(port), "--access-key", ACCESS["AWS_ACCESS_KEY_ID"],
               "--secret-key", ACCESS["AWS_SECRET_ACCESS_KEY"], str(HOME / "served")]
    with running(on(cores, command), port) as process:
        yield Served(f"http://127.0.0.1:{port}", [process], HOME / "served/bench")


@contextlib.contextmanager
def rustfs(cores):
    port = free_port()
    (HOME / "served/data").mkdir(parents=True)
    settings = {"RUSTFS_ADDRESS": f"127.0.0.1:{port}", "RUSTFS_ACCESS_KEY": ACCESS["AWS_ACCESS_KEY_ID"],
                "RUSTFS_SECRET_KEY": ACCESS["AWS_SECRET_ACCESS_KEY"], "RUSTFS_CONSOLE_ENABLE": "false"}
    with running(on(cores, [RUSTFS, "server", str(HOME / "served/data")]), port, settings) as process:
        url = f"http://127.0.0.1:{port}"
        Owner({**os.environ, **ACCESS, "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}).make("bench")
        yield Served(url, [process], HOME / "served/data")


@contextlib.contextmanager
def running(command, port, settings=None):
    """A server of one process, from when it answers until all its files are removed."""
    process = subprocess.Popen(command, env={**os.environ, **(settings or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as asked:
                asked.sendall(b"GET / HTTP/1.0\r\n\r\n")
                if asked.recv(4) == b"HTTP":
                    break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()
        remove(HOME / "served")


@contextlib.contextmanager
def ceph(cores):
    # Its daemons begin on the cores that this process has.
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        with Cluster(HOME / "served") as cluster:
            os.sched_setaffinity(0, own)
            account = cluster.account("bench", ACCESS["AWS_ACCESS_KEY_ID"], ACCESS["AWS_SECRET_ACCESS_KEY"])
            Owner(cluster.access(account)).make("bench")
            yield Served(f"http://127.0.0.1:{cluster.port}", list(cluster.processes.values()))
    finally:
        os.sched_setaffinity(0, own)
        remove(HOME / "served")


SERVERS = {"s3s-fs": s3s_fs, "rustfs": rustfs, "ceph": ceph}


def loopback_route(*words):
    command = ["ip", "route", "replace", "table", "local", "local", "127.0.0.1", "dev", "lo", "proto", "kernel", "scope", "host", "src", "127.0.0.1"]
    subprocess.run([*command, *words], check=True)


@contextlib.contextmanager
def quick_ack():
    """What comes over loopback is acknowledged at once."""
    loopback_route("quickack", "1")
    try:
        yield
    finally:
        loopback_route()


def processor_seconds(pid):
    """What a process has used until now."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def curl(transfers):
    """curl moving objects; every request is signed with the digest of its content, which the server checks as it does vmtide's.

    Each of `transfers` is that digest and the words of one.
    """
    user = ACCESS["AWS_ACCESS_KEY_ID"] + ":" + ACCESS["AWS_SECRET_ACCESS_KEY"]
    command = ["curl", "--parallel", "--parallel-max", str(AT_ONCE)]
    for number, (digest, words) in enumerate(transfers):
        command += ["--next"] if number else []
        command += ["-sS", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", user, "-H", f"x-amz-content-sha256: {digest}", *words]
    return command


def run(command, url, cores):
    return measure(on(cores, command), {**ACCESS, "AWS_ENDPOINT_URL": url, "VMTIDE_PASSWORD": "of the benchmark", "XDG_STATE_HOME": str(HOME / "state"),
                             "XDG_CACHE_HOME": str(HOME / "cache")})


def one_round(disk, served, parts, cores):
    """Every command once; (what, figures, bytes)."""
    url, size = served.url, 0
    for kind in ("directory", "s3"):
        remove(HOME / "repo")
        remove(HOME / "state")
        repo = str(HOME / "repo") if kind == "directory" else "s3://bench/repo"
        run([VMTIDE, "init", repo], url, cores)
        warm(disk)
        before = served.processor_seconds()
        figures = run([VMTIDE, "backup", str(disk), "-r", repo, "--json"], url, cores)
        size = apparent(HOME / "repo") if kind == "directory" else size
        yield f"backup, {kind}", {**figures, "server_s": served.processor_seconds() - before}, size
        warm_files(HOME / "repo" if kind == "directory" else served.files)
        before = served.processor_seconds()
        figures = run([VMTIDE, "restore", f"{disk.stem}@latest", "-r", repo, "--to", str(HOME / "back.raw")], url, cores)
        yield f"restore, {kind}", {**figures, "server_s": served.processor_seconds() - before}, size
        same = subprocess.run(["cmp", "-s", str(disk), str(HOME / "back.raw")]).returncode == 0
        if not same:
            raise Failed(f"{kind}: another disk came back")
        remove(HOME / "back.raw")
        remove(HOME / "repo")
    warm_tree(HOME / "parts")
    count = -(-size // OBJECT_BYTES)
    names = list(parts)[:count]
    if len(names) < count:
        raise Failed(f"{count} objects are to be sent, and {len(names)} are there")
    had = apparent(served.files) if served.files else 0
    before = served.processor_seconds()
    sends = [(parts[name], ("-T", str(HOME / "parts" / name), f"{url}/bench/{name}")) for name in names]
    figures = run(curl(sends), url, cores)
    if served.files and (sent := apparent(served.files) - had) < count * OBJECT_BYTES:
        raise Failed(f"{sent} bytes arrived of {count * OBJECT_BYTES}")
    yield "backup, curl alone", {**figures, "server_s": served.processor_seconds() - before}, count * OBJECT_BYTES
    warm_files(served.files)
    before = served.processor_seconds()
    fetches = [(hashlib.sha256().hexdigest(), ("-o", "/dev/null", f"{url}/bench/{name}")) for name in names]
    figures = run(curl(fetches), url, cores)
    yield "restore, curl alone", {**figures, "server_s": served.processor_seconds() - before}, count * OBJECT_BYTES


def warm_files(path):
    if path:
        warm_tree(path)


def noise(path, size):
    """Makes a file of random bytes; answers with its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for _ in range(size // MIB):
            piece = os.urandom(MIB)
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=2048, help="length of the disk of noise")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--disk", type=pathlib.Path, help="a raw disk to measure as well")
    parser.add_argument("--server", choices=SERVERS, default="s3s-fs")
    parser.add_argument("--apart", action="store_true", help="the server has a core of its own")
    parser.add_argument("--quick-ack", action="store_true", help="the kernel acknowledges at once what comes over loopback")
    args = parser.parse_args()
    ours = theirs = os.sched_getaffinity(0)
    if args.apart:
        if len(ours) < 2:
            sys.exit("--apart: there is one core only")
        theirs = {max(ours)}
        ours = ours - theirs
    remove(HOME)
    disks = [HOME / "noise.raw"]
    noise(disks[0], args.size_mib * MIB)
    if args.disk:
        disks.append(args.disk)
    names = [f"{number:04}" for number in range(args.size_mib * MIB // OBJECT_BYTES + 2)]
    parts = {name: noise(HOME / "parts" / name, OBJECT_BYTES) for name in names}
    results = {}
    (WORK / "results").mkdir(parents=True, exist_ok=True)
    try:
        with quick_ack() if args.quick_ack else contextlib.nullcontext(), open(WORK / "results/s3.jsonl", "a") as log:
            for number in range(args.runs + 1):
                for disk in disks:
                    with SERVERS[args.server](theirs) as served:
                        for what, figures, size in one_round(disk, served, parts, ours):
                            log.write(json.dumps({"server": args.server, "disk": disk.stem, "apart": args.apart, "quick_ack": args.quick_ack, "what": what, "round": number, "bytes": size, **figures}) + "\n")
                            print(f"round {number} {disk.stem} {what}: {figures['wall_s']} s", file=sys.stderr)
                            if number > 0:
                                found = figures["wall_s"], size / figures["wall_s"] / 1e6, figures["cpu_s"], figures["server_s"]
                                results.setdefault((disk.stem, what), []).append(found)
    except Failed as error:
        sys.exit(f"FAILED: {error}")
    finally:
        remove(HOME)
    print("| disk | what | s (median) | least | most | MB/s of what is stored | client's processor s | server's |\n|---|---|---|---|---|---|---|---|")
    for (disk, what), found in results.items():
        seconds, rates, client, served = zip(*found)
        print(f"| {disk} | {what} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} | {statistics.median(rates):.0f} "
              f"| {statistics.median(client):.1f} | {statistics.median(served):.1f} |")


if __name__ == "__main__":
    main()
