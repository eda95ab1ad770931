#!/usr/bin/env python3
"""Starts an agent on this host, serves disks made by qemu-img, and runs the matrix (matrix.py) against it; then what
only somebody on the host can see: keys that change while it runs, the audit log, its certificate, its end, systemd.

    VMTIDE_BIN=target/debug/vmtide python3 tests/agent/run.py [WORD…]

Needs qemu-img, openssl, curl and python3-requests. The last line is `test result: ok. N passed; M failed`.
"""

import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.dont_write_bytecode = True

import matrix  # noqa: E402  (beside this file)

VMTIDE = os.environ.get("VMTIDE_BIN", "vmtide")
SIZE = 8 << 20
START_TIMEOUT_S = 60
# A few times what the agent takes to look at its files again.
NOTICE_TIMEOUT_S = 20


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} {words[1]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def make_content(path):
    """Data in some places, zeros in others."""
    numbers = random.Random(7)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset, length in ((0, 70000), (1 << 20, 4096), ((3 << 20) + 517, 300000), (SIZE - 1000, 1000)):
            file.seek(offset)
            file.write(numbers.randbytes(length))


# The type of a VHDX' parent locator, as its bytes lie in the file (MS-VHDX 2.6.2.6).
LOCATOR = bytes.fromhex("b7ef4ab09ed1814ab78925b8e9445913")
PATH_KEYS = ("relative_path", "volume_path", "absolute_win32_path")


def name_parent(child, begin):
    """Has a VHDX name its parent by paths that begin so, in all ways in which it does; they stay as long as they were."""
    image = bytearray(child.read_bytes())
    at = image.index(LOCATOR)
    count = int.from_bytes(image[at + 18 : at + 20], "little")
    for entry in range(at + 20, at + 20 + 12 * count, 12):
        numbers = [(0, 4), (4, 8), (8, 10), (10, 12)]
        key_at, value_at, key_length, value_length = (int.from_bytes(image[entry + a : entry + b], "little") for a, b in numbers)
        key = image[at + key_at : at + key_at + key_length].decode("utf-16-le")
        if key in PATH_KEYS:
            name = begin + "p" * (value_length // 2 - len(begin) - len(".vhdx")) + ".vhdx"
            if len(name) * 2 != value_length:
                raise RuntimeError(f"{child}: {key} is too short for {begin}")
            image[at + value_at : at + value_at + value_length] = name.encode("utf-16-le")
    child.write_bytes(image)


def make_strangers(vmtide, root, outside):
    """Differencing disks in `root` whose parents are the image `outside`, on a share, or a device."""
    first = root / "stranger.vhdx"
    run(vmtide, "create", first, "--parent", outside)
    strangers = [first]
    for number, begin in enumerate(("\\\\h\\s\\", "\\\\.\\pipe\\", "\\\\?\\")):
        strangers.append(root / f"stranger-{number}.vhdx")
        shutil.copy(first, strangers[-1])
        name_parent(strangers[-1], begin)
    return strangers


class Lab:
    """Disks, keys, and directories in a temporary place."""

    def __init__(self, place):
        self.place = Path(place).resolve()
        self.root = self.place / "disks"
        self.other = self.place / "other"
        self.state = self.place / "state"
        for directory in (self.root / "directory", self.other, self.place / "disks2"):
            directory.mkdir(parents=True)
        self.keys = self.place / "keys"
        self.content = self.place / "content.raw"
        make_content(self.content)
        self.disks = []
        self.make_disks()
        self.make_traps()

    def make_disks(self):
        base = self.root / "web server.vhdx"
        for path, kind, options, numbers in (
            (base, "vhdx", ["-o", "subformat=dynamic"], (3, 3)),
            (self.root / "fixed.vhd", "vpc", ["-o", "subformat=fixed,force_size=on"], (2, 2)),
            (self.root / "directory" / "linux-ä.qcow2", "qcow2", [], (0, 3)),
            (self.root / "plain.raw", "raw", [], (0, 2)),
        ):
            run("qemu-img", "convert", "-f", "raw", "-O", kind, *options, self.content, path)
            self.add_disk(path, numbers, None)
        child = self.root / "child.vhdx"
        run(VMTIDE, "create", child, "--parent", base)
        self.add_disk(child, (3, 4), str(base))
        self.writable = self.root / "writable.vhdx"
        shutil.copy(base, self.writable)

    def add_disk(self, path, numbers, parent):
        self.disks.append(
            {
                "path": str(path),
                "content": str(self.content),
                "virtual_storage_type": numbers[0],
                "provider_sub_type": numbers[1],
                "parent_path": parent,
            }
        )

    def make_traps(self):
        secret = self.other / "secret.raw"
        shutil.copy(self.content, secret)
        shutil.copy(self.content, self.place / "disks2" / "web server.vhdx")
        links = {
            "link-out": secret,
            "link-relative": "../other/secret.raw",
            "link-directory": self.other,
            "link-root": "/",
            "link-device": "/dev/zero",
            "link-loop": "link-loop",
        }
        for name, to in links.items():
            (self.root / name).symlink_to(to)
        os.mkfifo(self.root / "pipe")
        (self.root / "broken.vhdx").write_bytes(b"vhdxfile" + random.Random(1).randbytes(400000))
        # A differencing disk whose parent lies outside.
        outside = self.other / "base.vhdx"
        shutil.copy(self.root / "web server.vhdx", outside)
        self.strangers = make_strangers(VMTIDE, self.root, outside)

    def fixture(self, tracked):
        return {
            "platform": "unix",
            "root": str(self.root),
            "outside": str(self.other / "secret.raw"),
            "broken": str(self.root / "broken.vhdx"),
            "disks": self.disks,
            "writable": str(self.writable) if tracked else None,
            "strangers": [str(path) for path in self.strangers],
        }

    def add_key(self, name, rights):
        to = self.place / f"key-{name}"
        run(VMTIDE, "agent", "key", "add", name, "--rights", rights, "--to", to, "--auth-key-file", self.keys)
        return to.read_text(encoding="ascii").strip()


class Process:
    """A running agent."""

    def __init__(self, lab, *more, words=None, keys=None, environment=None):
        if words is None:
            words = ["--listen", "127.0.0.1:0", "--root", lab.root]
            words += ["--auth-key-file", keys or lab.keys, "--state-dir", lab.state, *more]
        words = [VMTIDE, "agent", "--json", *words]
        self.log = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.listening = self.wait_for("listening")

    def wait_for(self, kind):
        while True:
            line = self.process.stdout.readline()
            if not line:
                self.log.seek(0)
                raise RuntimeError(f"the agent ended: {self.log.read()}")
            event = json.loads(line)
            if event["type"] == kind:
                return event

    def agent(self, key, read_key):
        return matrix.Agent(self.listening["url"], key, read_key, self.listening["certificate"])

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Host:
    """The checks that need the host; named like those of the matrix."""

    def __init__(self, lab, process, agent):
        self.lab = lab
        self.process = process
        self.agent = agent

    def info(self, key, agent=None):
        return (agent or self.agent).ask("GET", matrix.target(self.lab.disks[0]["path"], "info"), key=key).status

    def check_host(self):
        yield "host: a client built on requests, as rct-service's is", self.requests_client
        yield "host: HTTP/2, by curl", self.http2
        yield "host: keys are added and removed while it runs", self.keys_change
        yield "host: a broken file of keys changes nothing", self.broken_keys
        yield "host: a file that is exchanged for a link", self.exchanged
        yield "host: a new certificate is used", self.new_certificate
        yield "host: the audit log tells who did what", self.audit_log
        yield "host: nothing stays open", self.nothing_open
        yield "host: TLS 1.2 where it is switched on", self.tls12
        yield "host: a key in the clear, systemd, an orderly end", self.plain_key
        yield "host: a settings file says it all", self.settings_file
        yield "host: it does not start with what makes no sense", self.no_start
        yield "host: running transfers end before it does", self.drains

    def requests_client(self):
        """Calls like those of rct-service's Python client: paths as they are, escaped by requests alone."""
        import requests  # pylint: disable=import-outside-toplevel

        url, headers, verify = self.process.listening["url"], {"auth_key": self.agent.key}, self.process.listening["certificate"]
        for disk in self.lab.disks:
            base = f"{url}/vdisk/{disk['path']}"
            info = requests.get(f"{base}/info", headers=headers, verify=verify, timeout=60)
            info.raise_for_status()
            size = info.json()["virtual_size"]
            state = requests.get(f"{base}/rct", headers=headers, verify=verify, timeout=60)
            state.raise_for_status()
            copy, most = bytearray(size), 3 << 20
            for offset in range(0, size, most):
                ranges = [{"offset": offset, "length": min(most, size - offset)}]
                with requests.post(f"{base}/content", headers=headers, verify=verify, json=ranges, stream=True, timeout=60) as answer:
                    answer.raise_for_status()
                    for piece in answer.iter_content(chunk_size=1 << 20):
                        copy[offset : offset + len(piece)] = piece
                        offset += len(piece)
            matrix.want(bytes(copy) == self.lab.content.read_bytes(), f"{disk['path']}: other bytes")
        refused = requests.get(f"{base}/info", headers={"auth_key": "swordfish"}, verify=verify, timeout=60)
        matrix.want(refused.status_code == 401, f"status {refused.status_code}")

    def http2(self):
        to, size = self.lab.place / "http2", self.lab.content.stat().st_size
        where = matrix.target(self.lab.disks[0]["path"], "content") + f"?ranges=0:{size}"
        shown = run(
            "curl", "--silent", "--http2", "--cacert", self.process.listening["certificate"], "--header", f"auth_key: {self.agent.key}",
            "--output", to, "--write-out", "%{http_version} %{http_code}", self.process.listening["url"] + where,
        )
        matrix.want(shown == "2 200", shown)
        matrix.want(to.read_bytes() == self.lab.content.read_bytes(), "other bytes")

    def until(self, what, status):
        deadline = time.monotonic() + NOTICE_TIMEOUT_S
        while time.monotonic() < deadline:
            if what() == status:
                return
            time.sleep(0.2)
        raise matrix.Failed(f"{what()} instead of {status}")

    def keys_change(self):
        key = self.lab.add_key("new", "read-only")
        self.until(lambda: self.info(key), 200)
        run(VMTIDE, "agent", "key", "remove", "new", "--auth-key-file", self.lab.keys)
        self.until(lambda: self.info(key), 401)
        matrix.want(self.info(self.agent.key) == 200, "the other keys are gone")

    def broken_keys(self):
        good = self.lab.keys.read_text(encoding="ascii")
        self.lab.keys.write_text("writer:read-write:typo\n", encoding="ascii")
        self.process.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        matrix.want(self.info(self.agent.key) == 200, "the keys from before are gone")
        self.lab.keys.write_text(good, encoding="ascii")

    def exchanged(self):
        """One thread exchanges a disk for a link to a file outside, all the time; no byte of that one comes out."""
        path, secret = self.lab.root / "flip.raw", self.lab.other / "flip"
        secret.write_bytes(b"secret!!" * 512)
        good, link = self.lab.root / "good.tmp", self.lab.root / "link.tmp"
        flips = subprocess.Popen(
            [
                sys.executable, "-c",
                "import os, sys\n"
                "path, good, link, secret = sys.argv[1:]\n"
                "while True:\n"
                "    open(good, 'wb').write(b'harmless' * 512)\n"
                "    os.replace(good, path)\n"
                "    os.symlink(secret, link)\n"
                "    os.replace(link, path)\n",
                path, good, link, secret,
            ]
        )
        try:
            statuses = set()
            for _ in range(300):
                answer = self.agent.ask("GET", matrix.target(str(path), "content") + "?ranges=0:8")
                statuses.add(answer.status)
                matrix.want(answer.body != b"secret!!", "bytes of the file outside came out")
        finally:
            flips.kill()
            flips.wait()
        matrix.want(statuses <= {200, 404, 409, 422, 500, 403}, f"statuses {statuses}")

    def new_certificate(self):
        name = "localhost"
        for word in ("cert", "key"):
            self.lab.state.joinpath(f"agent-{word}.pem").rename(self.lab.state / f"old-{word}.pem")
        run(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", self.lab.state / "agent-key.pem", "-out", self.lab.state / "agent-cert.pem",
        )
        new = matrix.Agent(self.process.listening["url"], self.agent.key, self.agent.read_key, str(self.lab.state / "agent-cert.pem"))

        def status():
            try:
                return self.info(new.key, new)
            except ssl.SSLError:
                return None

        self.until(status, 200)
        self.agent.usual = new.usual

    def audit_log(self):
        # The query must not matter, nor the key.
        path = self.lab.disks[0]["path"]
        self.agent.ask("GET", matrix.target(path, "content") + "?ranges=0:1000", key=self.agent.read_key).must(200)
        self.agent.ask("GET", matrix.target(path, "info"), key=None).must(401)
        log = self.lab.state / "audit.log"

        # Lines are written after what they tell of; the last one may be half of one yet.
        def lines():
            return [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]

        def is_told():
            told = [line for line in lines() if line["disk"] == path]
            return (
                any(line["key"] == "reader" and line["bytes"] == 1000 for line in told)
                and any(line["status"] == 401 for line in told)
                and any(not line["complete"] for line in lines())
            )

        self.until(is_told, True)
        text, lines = log.read_text(encoding="utf-8"), lines()
        sent = [line for line in lines if line["key"] == "reader" and line["bytes"] == 1000 and line["disk"] == path]
        matrix.want(sent and sent[-1]["status"] == 200 and sent[-1]["complete"], "the transfer is missing")
        refused = [line for line in lines if line["status"] == 401 and line["key"] is None]
        matrix.want(refused and refused[-1]["disk"] == path, "the request without a key is missing")
        matrix.want(any(not line["complete"] for line in lines), "no client went away")
        matrix.want(self.agent.key not in text and self.agent.read_key not in text, "a key is in the log")
        matrix.want(log.stat().st_mode & 0o777 == 0o600, "others may read the log")

    def nothing_open(self):
        def open_disks():
            handles = Path(f"/proc/{self.process.process.pid}/fd")
            return sorted(str(to) for to in map(lambda at: os.path.realpath(at), handles.iterdir()) if str(to).startswith(str(self.lab.root)))

        deadline = time.monotonic() + NOTICE_TIMEOUT_S
        while open_disks() and time.monotonic() < deadline:
            time.sleep(0.1)
        matrix.want(not open_disks(), f"open: {open_disks()[:3]}")

    def tls12(self):
        process = Process(self.lab, "--tls12")
        try:
            agent = process.agent(self.agent.key, self.agent.read_key)
            context = agent.context()
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            agent.usual = context
            matrix.want(self.info(agent.key, agent) == 200, "TLS 1.2 is refused")
        finally:
            process.end()

    def plain_key(self):
        key = self.lab.place / "plain"
        key.write_text("swordfish\n", encoding="ascii")
        key.chmod(0o600)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(str(self.lab.place / "notify"))
            systemd.settimeout(START_TIMEOUT_S)
            process = Process(
                self.lab,
                keys=key,
                environment={"NOTIFY_SOCKET": str(self.lab.place / "notify"), "WATCHDOG_USEC": "400000"},
            )
            agent = process.agent("swordfish", "swordfish")
            matrix.want(self.info("swordfish", agent) == 200, "the key is refused")
            messages = {systemd.recv(100) for _ in range(4)}
            matrix.want({b"READY=1", b"WATCHDOG=1"} <= messages, f"systemd was told {messages}")
            matrix.want(process.end() == 0, "it did not end with 0")
            systemd.setblocking(False)
            try:
                while True:
                    messages.add(systemd.recv(100))
            except BlockingIOError:
                pass
            matrix.want(b"STOPPING=1" in messages, f"systemd was told {messages}")

    def settings_file(self):
        settings = self.lab.place / "vmtide.toml"
        settings.write_text(
            f'state-dir = "{self.lab.state}"\n[agent]\nlisten = "127.0.0.1:0"\nroot = ["{self.lab.root}"]\n'
            f'auth-key-file = "{self.lab.keys}"\ntls12 = true\n',
            encoding="utf-8",
        )
        process = Process(self.lab, words=["--config", settings])
        try:
            matrix.want(self.info(self.agent.key, process.agent(self.agent.key, self.agent.read_key)) == 200, "no answer")
        finally:
            matrix.want(process.end() == 0, "it did not end with 0")

    def no_start(self):
        base = [VMTIDE, "agent", "--state-dir", str(self.lab.state)]
        here = ["--listen", "127.0.0.1:0"]
        root, keys = ["--root", str(self.lab.root)], ["--auth-key-file", str(self.lab.keys)]
        for words, code in (
            (here + root, 2),
            (here + keys, 2),
            (here + root + ["--auth-key-file", str(self.lab.place / "missing")], 6),
            (here + keys + ["--root", str(self.lab.place / "missing")], 6),
            (here + keys + ["--root", str(self.lab.content)], 2),
            (here + root + keys + ["--cert", str(self.lab.content)], 2),
            (here + root + keys + ["--cert", str(self.lab.keys), "--key", str(self.lab.keys)], 1),
            (root + keys + ["--listen", "127.0.0.1:99999"], 1),
        ):
            done = subprocess.run(base + words, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
            matrix.want(done.returncode == code, f"{words}: {done.returncode} instead of {code}: {done.stderr}")

    def drains(self):
        path = self.lab.root / "large.raw"
        with open(path, "wb") as file:
            file.truncate(64 << 20)
        with self.agent.connect() as connection:
            where = matrix.target(str(path), "content") + f"?ranges=0:{64 << 20}"
            connection.sendall(self.agent.head("GET", where.encode(), [("auth_key", self.agent.key)]))
            received = len(connection.recv(1000))
            self.process.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            while piece := connection.recv(1 << 20):
                received += len(piece)
        matrix.want(received > 64 << 20, f"{received} bytes came")
        matrix.want(self.process.process.wait(timeout=60) == 0, "it did not end with 0")


def main():
    words = sys.argv[1:]
    for tool in ("qemu-img", "openssl", "curl"):
        if not shutil.which(tool):
            print(f"run.py: error: {tool} is not installed", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(prefix="vmtide-agent-") as place:
        lab = Lab(place)
        key, read_key = lab.add_key("writer", "read-write"), lab.add_key("reader", "read-only")
        process = Process(lab)
        try:
            agent = process.agent(key, read_key)
            fixture = lab.fixture(tracked=os.environ.get("VMTIDE_TEST_AGENT_TRACKING", "1") == "1")
            passed, failed = matrix.run(matrix.Matrix(agent, fixture), words)
            more_passed, more_failed = matrix.run(Host(lab, process, agent), words)
        finally:
            if process.process.poll() is None:
                process.end()
    passed, failed = passed + more_passed, failed + more_failed
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
