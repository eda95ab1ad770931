"""Hosts whose disks Bacula's jobs back up: a stand-in Hyper-V host over WinRM with its disks on a real Samba, and the real
agent. All of it on loopback, as the current user."""

import getpass
import json
import socket
import subprocess
from pathlib import Path

from lab.processes import TestFailure, free_port, kill, run, start, wait_until
from lab.processes import _die_with_parent as die_with_parent
from lab.vmtide import binary

PASSWORD = "Backup!2026"


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    except OSError:
        return False


class Samba:
    """A real smbd with one share, `vms`."""

    def __init__(self, directory):
        self.directory = directory
        for name in ("vms", "run", "state", "sam"):
            (directory / name).mkdir(parents=True)
        self.port = free_port()
        self.config = directory / "smb.conf"
        self.config.write_text(f"""[global]
 server role = standalone server
 workgroup = LAB
 netbios name = HV1
 smb ports = {self.port}
 interfaces = 127.0.0.1/8
 bind interfaces only = yes
 pid directory = {directory}/run
 lock directory = {directory}/run
 ncalrpc dir = {directory}/run
 state directory = {directory}/state
 cache directory = {directory}/state
 private dir = {directory}/sam
 passdb backend = tdbsam:{directory}/sam/passdb.tdb
 log file = {directory}/run/log
 map to guest = never
 load printers = no
 disable spoolss = yes
[vms]
 path = {directory}/vms
 read only = no
""")
        added = subprocess.run(
            ["smbpasswd", "-c", self.config, "-L", "-s", "-a", getpass.getuser()],
            input=f"{PASSWORD}\n{PASSWORD}\n", text=True, capture_output=True, check=False,
        )
        if added.returncode != 0:
            raise TestFailure(f"smbpasswd: {added.stderr}")
        # Where it ends it ends all of its group.
        self.process = start(
            ["smbd", "--foreground", "--no-process-group", "-s", self.config],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
        )
        wait_until("smbd listens", lambda: listens(self.port), 60)

    def stop(self):
        # Asked to end, it ends its children, too.
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            kill(self.process)


class HypervHost:
    """The stand-in of a Hyper-V host with one VM, `web`, that has two disks."""

    def __init__(self, directory):
        program = binary().parent / "standin-hyperv-host"
        if not program.exists():
            raise TestFailure(f"{program} is missing: build it (cargo build -p vmtide-standin-hyperv-winrm)")
        self.samba = Samba(directory)
        self.volumes = directory / "vms"
        user = getpass.getuser()
        self.process = subprocess.Popen(
            [program, "--directory", self.volumes, "--vm", "web:24,8", "--user", f"{user}:{PASSWORD}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
        )
        line = self.process.stdout.readline()
        if not line:
            raise TestFailure(f"the stand-in for a Hyper-V host ended with {self.process.wait()}")
        self.source = f"hyperv+winrm://127.0.0.1:{json.loads(line)['port']}/web"
        (directory / "password").write_text(f"{PASSWORD}\n")
        # What the file daemon's administrator writes into vmtide's settings.
        self.settings = {
            "winrm-user": user,
            "winrm-password-file": str(directory / "password"),
            "winrm-auth": "ntlm",
            "smb-port": self.samba.port,
            "smb-map": [r"C:=\\127.0.0.1\vms\C"],
        }

    def tell(self, order):
        """Gives the world an order, and returns its answer."""
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, dict) and "error" in answer:
            raise TestFailure(f"{order}: {answer['error']}")
        return answer

    def settled_disks(self, directory, name="web"):
        """The content of a VM's disks once the host has merged its checkpoints, read by qemu-img."""
        self.tell("settle")
        contents = []
        vms = [vm for vm in self.tell("vms")["vms"] if vm["name"].startswith(f"{name} (")]
        if len(vms) != 1:
            raise TestFailure(f"the host has {len(vms)} VMs of the name {name}")
        for number, path in enumerate(vms[0]["disks"]):
            image = self.volumes / path.replace(":", "").replace("\\", "/")
            if image.suffix.lower() != ".vhdx":
                raise TestFailure(f"the VM still writes to {path}")
            raw = directory / f"hyperv-{number}.raw"
            run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", image, raw])
            contents.append(raw.read_bytes())
            raw.unlink()
        return contents

    def assert_nothing_left(self, when):
        self.tell("settle")
        left = self.tell("leftovers")
        if left["recovery_snapshots"] or left["unmerged_files"] or len(left["reference_points"]) != 1:
            raise TestFailure(f"{when}: on the host there is {left}")

    def stop(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
        self.samba.stop()


class Agent:
    """The real agent, which serves the directory `disks`."""

    def __init__(self, directory):
        self.directory = directory
        self.disks = directory / "disks"
        self.disks.mkdir(parents=True)
        keys, self.key = directory / "keys", directory / "key"
        run([binary(), "agent", "key", "add", "bacula", "--rights", "read-write", "--auth-key-file", keys, "--to", self.key])
        self.process = subprocess.Popen(
            [binary(), "agent", "--json", "--listen", "127.0.0.1:0", "--root", self.disks, "--auth-key-file", keys,
             "--state-dir", directory / "state"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=open(directory / "log", "ab"), text=True,
            preexec_fn=die_with_parent,
        )
        for line in self.process.stdout:
            event = json.loads(line)
            if event.get("type") == "listening":
                break
        else:
            raise TestFailure(f"the agent ended: {(directory / 'log').read_text()}")
        self.address = event["address"]
        self.settings = {"agent-key-file": str(self.key), "agent-fingerprint": event["fingerprint_sha256"]}

    def source(self, path):
        return f"agent+https://{self.address}{path}"

    def write(self, path, content):
        """Makes a disk hold this, through the agent, which tracks what changes."""
        changed, repository = self.directory / "changed.raw", self.directory / "repository"
        changed.write_bytes(content)
        if not repository.exists():
            run([binary(), "init", repository, "--encryption", "none"])
        run([binary(), "backup", changed, "-r", repository, "--name", "changed"])
        run([binary(), "restore", "changed@latest", "-r", repository, "--to", self.source(path), "--in-place", "--format", "raw",
             "--agent-key-file", self.settings["agent-key-file"], "--agent-fingerprint", self.settings["agent-fingerprint"]])

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()


def write_settings(path, *parts):
    """A settings file of vmtide; strings and lists are written in TOML as in JSON."""
    settings = {key: value for part in parts for key, value in part.items()}
    Path(path).write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
