#!/usr/bin/env python3
"""Repositories in Ceph: its S3 gateway with a real monitor and a real disk (BlueStore) behind it.

    VMTIDE_BIN=target/debug/vmtide tests/e2e/ceph_test.py [--keep]

The tests of the store (`cargo test -p vmtide-s3 --test real_servers`) in a plain bucket and in one with versions and object
lock; the program from init to prune; restore points that the owner of the bucket cannot remove with all rights; users with
the rights that docs/s3.md tells to give, and no others; the gateway and the disk killed during a backup.

Needs radosgw, ceph-mon, ceph-osd and ceph-common (`scripts/test.sh ceph` installs them). The last line is
`test result: ok. N passed; M failed`.
"""

import argparse
import copy
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from lab.bucket import Owner
from lab.ceph import Cluster
from lab.processes import REPO_ROOT, Tally, TestFailure, Workspace, start
from lab.repository import MIB, Job
from lab.store import program, suite

PLAIN = "plain"
LOCKED = "locked"
OWNER = "owner"
KEEPER = "keeper"
ADDER = "adder"
READER = "reader"
KEPT = ("packs/", "maps/", "points/", "keys/", "vmtide.repo")
LOCK = ("--immutable-for", "2d", "--immutability")
# Noise, so that every byte goes over the line; large enough that a daemon dies in the middle of it.
OUTAGE_DISK_BYTES = 768 * MIB
# Shorter than what vmtide waits for a server that it has reached.
OUTAGE_S = 8


def noise(path, length_bytes, seed):
    source = random.Random(seed)
    # Python makes less than 256 MiB at once.
    content = b"".join(source.randbytes(8 * MIB) for _ in range(length_bytes // (8 * MIB)))
    path.write_bytes(content)
    return content


def locked_points(cluster, owner, account, path, tally):
    """What is immutable stays, whatever the owner of the bucket does with another program."""
    for mode in ("governance", "compliance"):
        job = Job(f"s3://{LOCKED}/{mode}", cluster.access(account), path)
        found = job.run("init", job.repository)["guarantees"]
        if found["object_lock"] != {"on": None} or found["versioning"] != "on":
            raise TestFailure(f"a bucket with object lock is taken for {found}")
        content = noise(path / "disk.raw", 24 * MIB, 5)
        job.run("backup", "disk.raw", *LOCK, mode)
        point = job.run("points")["points"][0]
        if point["immutable"]["mode"] != mode:
            raise TestFailure(f"not immutable: {point}")
        job.run("forget", point["id"], code=3)
        job.run("prune")
        if mode == "compliance":
            refused, gone = owner.remove(LOCKED, f"{mode}/")
            lost = [key for key in gone if key.startswith(tuple(f"{mode}/{part}" for part in KEPT))]
            if lost or len(refused) < len(KEPT):
                raise TestFailure(f"could be removed: {lost}; refused: {refused}")
            # The index is not locked: it is made anew from the packs.
            job.run("repair")
        job.must_hold(content)
        job.run("verify", "--read-data")
        tally.passed += 1


def rights(cluster, owner, path, tally):
    """The policies of docs/s3.md, each for a user of its own: all of it; only adding; only restores."""
    users = {name: cluster.account(name) for name in (KEEPER, ADDER, READER)}
    policy = path / "policy.json"
    for bucket, lock in ((PLAIN, []), (LOCKED, [*LOCK, "compliance"])):
        policy.write_text(json.dumps(documented_policy(bucket, "rights")), encoding="ascii")
        owner.policy(bucket, policy)
        keeps, adds, reads = (Job(f"s3://{bucket}/rights", cluster.access(user), path) for user in users.values())
        keeps.run("init", keeps.repository)
        keeps.run("init", f"s3://{bucket}/elsewhere", code=4)
        for seed, job in ((8, keeps), (9, adds)):
            content = noise(path / "disk.raw", 24 * MIB, seed)
            job.run("backup", "disk.raw", "--level", "full", *lock)
            for other in (keeps, adds, reads):
                other.must_hold(content)
        adds.run("verify", "--read-data")
        oldest = adds.points()[0]
        # What is locked is told to be, also to those who may not remove it.
        adds.run("forget", oldest, code=3 if lock else 4)
        adds.run("prune", code=4)
        reads.run("backup", "disk.raw", code=4)
        if len(keeps.points()) != 2:
            raise TestFailure("who may only add has removed a restore point")
        keeps.run("forget", oldest, code=3 if lock else 0)
        freed = keeps.run("prune", "--wait", "1m")["freed_bytes"]
        if not lock and freed < 20 * MIB:
            raise TestFailure(f"prune freed {freed} bytes of 24 MiB that nothing needs")
        reads.must_hold(content)
        tally.passed += 1


def documented_policy(bucket, prefix):
    text = (REPO_ROOT / "docs/s3.md").read_text(encoding="utf-8")
    everything = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1].replace("BUCKET", bucket).replace("PREFIX", prefix))
    may = {
        KEEPER: lambda action: True,
        ADDER: lambda action: action not in ("s3:DeleteObject", "s3:DeleteObjectVersion"),
        READER: lambda action: action in ("s3:ListBucket", "s3:GetObject"),
    }
    statements = []
    for name, allowed in may.items():
        for statement in copy.deepcopy(everything["Statement"]):
            statement["Principal"] = {"AWS": [f"arn:aws:iam:::user/{name}"]}
            statement["Action"] = [action for action in statement["Action"] if allowed(action)]
            statements.append(statement)
    return everything | {"Statement": statements}


def outages(cluster, account, path, tally):
    """kill -9 of the gateway, then of the disk, in the middle of a backup; the backup waits, and what it made is right."""
    job = Job(f"s3://{PLAIN}/outages", cluster.access(account), path)
    job.run("init", job.repository)
    for seed, (daemon, again) in enumerate((("radosgw", cluster.start_gateway), ("ceph-osd", cluster.start_disk))):
        content = noise(path / "disk.raw", OUTAGE_DISK_BYTES, seed)
        before = used_bytes(cluster)
        with open(path / "backup.log", "wb") as log:
            backup = start(job.command("backup", "disk.raw"), cwd=path, env=job.variables(), stdout=log, stderr=log)
            while used_bytes(cluster) < before + OUTAGE_DISK_BYTES // 8:
                if backup.poll() is not None:
                    raise TestFailure("the backup was done before anything could be killed")
                time.sleep(0.02)
            cluster.kill(daemon)
            time.sleep(OUTAGE_S)
            if backup.poll() is not None:
                raise TestFailure(f"the backup did not wait for {daemon}: {(path / 'backup.log').read_text()[-1000:]}")
            again()
            try:
                code = backup.wait(timeout=400)
            except subprocess.TimeoutExpired as error:
                raise TestFailure(f"the backup hangs after {daemon} came back") from error
        if code != 0:
            raise TestFailure(f"{daemon} was away for {OUTAGE_S} s: {(path / 'backup.log').read_text()[-1000:]}")
        job.must_hold(content)
        job.run("verify", "--read-data")
        tally.passed += 1


def used_bytes(cluster):
    """What the cluster's disk takes on this one: it is a sparse file."""
    return (cluster.path / "osd/block").stat().st_blocks * 512


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    arguments = parser.parse_args()
    with Workspace("ceph", arguments.keep) as path, Tally("tests/e2e/ceph_test.py --keep shows the files") as tally:
        with Cluster(path / "cluster") as cluster:
            account = cluster.account(OWNER)
            access = cluster.access(account)
            owner = Owner(access)
            owner.make(PLAIN)
            owner.make(LOCKED, locked=True)
            suite(access, f"s3://{PLAIN}/suite", locked=f"s3://{LOCKED}/suite")
            suite(access, f"s3://{LOCKED}/versions")
            tally.passed += 2
            program(access, cluster.access(account, account.secret[::-1]), f"s3://{PLAIN}/program", path, tally)
            locked_points(cluster, owner, account, path, tally)
            rights(cluster, owner, path, tally)
            outages(cluster, account, path, tally)
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
