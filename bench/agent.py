#!/usr/bin/env python3
"""Measure the agent's streams of content over TLS on loopback, side by side with nginx serving the same raw file.

    bench/agent.py run [--size-mib 2048] [--rounds 5]   every contender in turn, in turning order; prints a table
    bench/agent.py hostile                              how long a good client waits beside 500 hostile connections

Contenders: `agent` as it is; `agent-16k`, the same program sending pieces of 16 KiB one after the other, as
rct-service does; `agent-16k-requests`, the agent as it is, asked for 16 KiB at a time over the one connection (the first
eighth of the file, because it takes so long); `nginx` with its own defaults for files and one worker per core. The client is curl with one
connection, HTTP/1.1, TLS 1.3, writing to /dev/null; all run on the same cores. The file is in the page cache: what is
measured is the way from there to the client. Round 0 warms up and is not counted; the table has medians. The processor
time of server and client for each GiB says more than the rate on a machine that does other work beside. `--ciphers 0`
leaves the cipher to client and server.

Needs: target/release/vmtide (or VMTIDE_BIN), nginx, openssl, curl. Raw figures go to work/results/agent.jsonl.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
WORK = HERE / "work"
VMTIDE = os.environ.get("VMTIDE_BIN") or str(HERE.parent / "target/release/vmtide")
KEY = "a-key-for-measurements"
# What rct-service reads and sends at a time, in bytes.
SMALL = 16 << 10
CIPHERS = ("TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens at port {port}")


def prepare(home, size_mib):
    """The file, in the page cache, and a certificate for both servers."""
    (home / "disks").mkdir(parents=True, exist_ok=True)
    disk = home / "disks/disk.raw"
    if not disk.exists() or disk.stat().st_size != size_mib << 20:
        with open(disk, "wb") as out:
            for _ in range(size_mib):
                out.write(os.urandom(1 << 20))
    with open(disk, "rb") as whole:
        while whole.read(1 << 20):
            pass
    if not (home / "cert.pem").exists():
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                        "-keyout", str(home / "key.pem"), "-out", str(home / "cert.pem"), "-days", "30", "-subj", "/CN=localhost",
                        "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    (home / "keys").write_text(KEY + "\n")
    (home / "keys").chmod(0o600)
    return disk


@contextlib.contextmanager
def agent(home, *options):
    port = free_port()
    command = [VMTIDE, "agent", "--listen", f"127.0.0.1:{port}", "--root", str(home / "disks"), "--auth-key-file", str(home / "keys"),
               "--cert", str(home / "cert.pem"), "--key", str(home / "key.pem"), *options]
    env = {**os.environ, "XDG_STATE_HOME": str(home / "state")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    try:
        wait_for(port)
        yield f"https://127.0.0.1:{port}/v1/disks/content?path={home / 'disks/disk.raw'}", process.pid
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def nginx(home):
    port = free_port()
    (home / "nginx.conf").write_text(f"""
daemon off; worker_processes auto; pid {home}/nginx.pid; error_log {home}/nginx.log;
events {{ }}
http {{
  access_log off; sendfile on; tcp_nopush on; client_body_temp_path {home}/b; proxy_temp_path {home}/p;
  fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u; scgi_temp_path {home}/s;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {home}/cert.pem; ssl_certificate_key {home}/key.pem;
    ssl_protocols TLSv1.3; root {home}/disks;
  }}
}}
""")
    process = subprocess.Popen(["nginx", "-p", str(home), "-c", str(home / "nginx.conf")], stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield f"https://127.0.0.1:{port}/disk.raw", process.pid
    finally:
        process.terminate()
        process.wait()


def processor_seconds(pid):
    """What a process and its children have used until now."""
    ticks = 0
    for place in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of the program may hold anything, and ends with the last bracket.
            head, rest = place.read_text().rsplit(")", 1)
            fields = rest.split()
            if pid in (int(head.split()[0]), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def download(url, pid, home, size, cipher):
    """GB/s of one download, in one request or in several, and the processor seconds of the client and the server."""
    ciphers = ["--tls13-ciphers", cipher] if cipher else []
    usage, served = os.times(), processor_seconds(pid)
    began = time.monotonic()
    shown = subprocess.run(["curl", "-sS", "--fail", "--http1.1", *ciphers, "--cacert", str(home / "cert.pem"),
                            "-H", f"auth_key: {KEY}", "-o", "/dev/null", "-w", "%{size_download}\\n", url],
                           check=True, capture_output=True, text=True)
    took = time.monotonic() - began
    after, served = os.times(), processor_seconds(pid) - served
    received = sum(map(int, shown.stdout.split()))
    if received != size:
        raise SystemExit(f"{url}: {received} bytes of {size}")
    client = after.children_user + after.children_system - usage.children_user - usage.children_system
    return size / took / 1e9, client, served


def run(args):
    home = WORK / "agent"
    home.mkdir(parents=True, exist_ok=True)
    size = args.size_mib << 20
    prepare(home, args.size_mib)
    results = {}
    (WORK / "results").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack, open(WORK / "results/agent.jsonl", "a") as log:
        contenders = {"agent": stack.enter_context(agent(home)),
                      "agent-16k": stack.enter_context(agent(home, "--piece-size", "16KiB", "--read-ahead", "1", "--readers", "1"))}
        url, process = contenders["agent"]
        part = size // 8
        contenders["agent-16k-requests"] = f"{url}&ranges=[0-{part - SMALL}:{SMALL}]:{SMALL}", process
        if shutil.which("nginx"):
            contenders["nginx"] = stack.enter_context(nginx(home))
        for extra in args.option:
            contenders["agent " + extra] = stack.enter_context(agent(home, *extra.split()))
        names = list(contenders)
        for cipher in CIPHERS[:args.ciphers] or ("",):
            for number in range(args.rounds + 1):
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    length = part if name == "agent-16k-requests" else size
                    speed, client, served = download(*contenders[name], home, length, cipher)
                    if number > 0:
                        gib = length / (1 << 30)
                        results.setdefault((name, cipher), []).append((speed, served / gib, client / gib))
                        log.write(json.dumps({"name": name, "cipher": cipher, "gb_per_s": speed, "client_s": client,
                                              "server_s": served, "size": length, "load": os.getloadavg()[0]}) + "\n")
    print("| server | cipher | GB/s (median) | least | most | server s/GiB | client s/GiB |\n|---|---|---|---|---|---|---|")
    for (name, cipher), found in results.items():
        speeds, served, client = zip(*found)
        print(f"| {name} | {cipher or 'as they agree'} | {statistics.median(speeds):.2f} | {min(speeds):.2f} | {max(speeds):.2f} "
              f"| {statistics.median(served):.3f} | {statistics.median(client):.3f} |")


def hostile(_):
    subprocess.run(["cargo", "test", "--release", "-p", "vmtide-agent", "--test", "hostile", "--", "--ignored", "--nocapture",
                    "five_hundred"], check=True, cwd=HERE.parent)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--size-mib", type=int, default=2048)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--ciphers", type=int, default=1, help="how many of the ciphers to measure")
    command.add_argument("--option", action="append", default=[], help="one more agent, with these options")
    command.set_defaults(do=run)
    commands.add_parser("hostile").set_defaults(do=hostile)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    sys.exit(main())
