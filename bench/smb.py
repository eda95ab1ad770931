#!/usr/bin/env python3
"""How fast disks are read over SMB, beside smbclient fetching the same file, and how many bytes an incremental takes.

    bench/smb.py SMB_READ [--size GIB] [--rounds N] [--threads N]

SMB_READ is the program of `cargo build --release -p vmtide-smb --example smb_read`. A Samba of its own serves a directory of
VMTIDE_BENCH_WORK (bench/work) on loopback, so the network costs nothing and the client's and the server's processor time are what
counts. The disk is a dynamic VHDX full of random bytes; smbclient gets the file, vmtide reads the disk in it. Both run in turn
(A B B A …): both with messages signed, both encrypted, and smbclient as it is called without options, which neither
signs nor encrypts, beside vmtide encrypted; the first round of each warms up. Then pieces of 64 KiB spread over the disk are
read, as an incremental does, and what came over the network is compared with what was wanted.

The last line has the medians of the ratios of throughput (vmtide's over smbclient's; wanted: 0.7 or more) and the bytes received for each byte
wanted (wanted: 1.1 or less).
"""

import argparse
import getpass
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

from measure import WORK

PASSWORD = "benchmark password"


def samba(root):
    """Start an smbd as the current user; answer with its process and port."""
    shutil.rmtree(root, ignore_errors=True)
    for name in ("vms", "run", "state", "sam"):
        (root / name).mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = root / "smb.conf"
    config.write_text(f"""[global]
 server role = standalone server
 workgroup = LAB
 netbios name = HV1
 smb ports = {port}
 interfaces = 127.0.0.1/8
 bind interfaces only = yes
 pid directory = {root}/run
 lock directory = {root}/run
 ncalrpc dir = {root}/run
 state directory = {root}/state
 cache directory = {root}/state
 private dir = {root}/sam
 passdb backend = tdbsam:{root}/sam/passdb.tdb
 log file = {root}/run/log
 map to guest = never
 load printers = no
 disable spoolss = yes
[vms]
 path = {root}/vms
 read only = no
""")
    subprocess.run(["smbpasswd", "-c", config, "-L", "-s", "-a", getpass.getuser()], input=f"{PASSWORD}\n{PASSWORD}\n", text=True,
                   check=True, capture_output=True)
    process = subprocess.Popen(["smbd", "--foreground", "--no-process-group", "-s", config], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process, port
        except OSError:
            time.sleep(0.05)
    sys.exit(f"smbd does not listen: {(root / 'run/log').read_text()}")


def disk(root, gib):
    """A dynamic VHDX full of random bytes."""
    raw = root / "disk.raw"
    with open(raw, "wb") as file:
        for _ in range(gib << 4):
            file.write(os.urandom(64 << 20))
    image = root / "vms" / "disk.vhdx"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vhdx", raw, image], check=True)
    raw.unlink()
    return image


def ours(arguments, port, protection, *rest):
    command = [arguments.smb_read, "127.0.0.1", port, getpass.getuser(), r"C:\VMs\disk.vhdx", r"C:\VMs=\\127.0.0.1\vms",
               arguments.threads, protection, *rest]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={**os.environ, "VMTIDE_HYPERV_PASSWORD": PASSWORD})
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def theirs(port, protection):
    """Bytes a second of smbclient, by its own clock around the transfer: the login does not count."""
    options = {"signed": ["--client-protection=sign"], "encrypted": ["--client-protection=encrypt"], "default": []}[protection]
    command = ["smbclient", "//127.0.0.1/vms", "-p", str(port), "-m", "SMB3", *options, "-c", "get disk.vhdx /dev/null"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "USER": getpass.getuser(), "PASSWD": PASSWORD})
    seconds = time.monotonic() - start
    if done.returncode != 0 or "NT_STATUS" in done.stdout + done.stderr:
        sys.exit(done.stdout + done.stderr)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("smb_read", type=pathlib.Path)
    parser.add_argument("--size", type=int, default=2, help="of the disk, in GiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    root = WORK / "smb"
    process, port = samba(root)
    try:
        image = disk(root, arguments.size)
        file_bytes = image.stat().st_size
        report = {"type": "summary", "file_bytes": file_bytes}
        # smbclient as it is called without options neither signs nor encrypts here; vmtide then still encrypts.
        for protection in ("signed", "encrypted", "default"):
            ratios = []
            for number in range(arguments.rounds + 1):
                pair = {}
                for who in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                    if who == "ours":
                        read = ours(arguments, port, protection)
                        pair[who] = read["read_bytes"] / read["seconds"]
                    else:
                        pair[who] = file_bytes / theirs(port, protection)
                if number == 0:
                    continue
                ratios.append(pair["ours"] / pair["theirs"])
                line = {who: round(rate / 1e6) for who, rate in pair.items()}
                print(json.dumps({"protection": protection, "mb_per_s": line, "ratio": round(ratios[-1], 3)}), flush=True)
            report[f"{protection}_ratio"] = round(statistics.median(ratios), 3)
        part = ours(arguments, port, "encrypted", 64 << 10, 2000)
        report["received_per_wanted"] = round(part["received_bytes"] / part["read_bytes"], 4)
        print(json.dumps(report))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
