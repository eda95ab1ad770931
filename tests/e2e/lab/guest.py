"""The Linux guest of scripts/make-guest.sh, run by scripts/run-guest.sh."""

import re
import subprocess

from .control import Control
from .processes import REPO_ROOT, TestFailure, kill, run, start, wait_until
from .qmp import Qmp

# The emulator without hardware help boots the guest in three seconds on an idle machine.
BOOT_TIMEOUT_S = 180


def make_guest(directory, system_mib=1024, data_mib=128):
    """Makes a guest's kernel and disks in `directory`."""
    script = REPO_ROOT / "scripts/make-guest.sh"
    run(["bash", script, directory, "--system-mib", system_mib, "--data-mib", data_mib], timeout_s=600)


class Guest:
    """A running guest. Use in a `with` block: at its end QEMU is gone, whatever happened."""

    def __init__(self, directory, append="", system=None, data=None, data_nbd=None):
        self.directory = directory
        self.run_dir = directory / "run"
        argv = ["bash", REPO_ROOT / "scripts/run-guest.sh", directory]
        if append:
            argv += ["--append", append]
        if system:
            argv += ["--system", system]
        if data:
            argv += ["--data", data]
        if data_nbd:
            argv += ["--data-nbd", data_nbd]
        self.run_dir.mkdir(exist_ok=True)
        (self.run_dir / "console.log").unlink(missing_ok=True)
        self.log = open(self.run_dir / "qemu.log", "ab")
        self.process = start(argv, stdout=self.log, stderr=subprocess.STDOUT)
        self._inspect = None
        self._control = None

    @property
    def vmtide_source(self):
        return f"qemu+unix://{self.run_dir / 'qmp.sock'}"

    @property
    def inspect(self):
        """The test's own monitor, beside the one vmtide uses."""
        if self._inspect is None:
            self._inspect = Qmp(self.run_dir / "inspect.sock")
        return self._inspect

    @property
    def control(self):
        if self._control is None:
            self._control = Control(self.run_dir / "control.sock")
        return self._control

    def console(self):
        try:
            return (self.run_dir / "console.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def wait_ready(self):
        def ready():
            if self.process.poll() is not None:
                log = (self.run_dir / "qemu.log").read_text(errors="replace")
                raise TestFailure(f"QEMU ended while the guest started: {log} {self.console()}")
            return "VMTIDE GUEST READY" in self.console()

        wait_until("the guest is ready", ready, BOOT_TIMEOUT_S)
        return self

    def ask(self, line, timeout_s=180):
        """A command for the guest, which must succeed. Returns the answer."""
        answer = self.control.ask(line, timeout_s)
        if not answer.startswith(("OK", "CHECK OK")):
            raise TestFailure(f"the guest answers `{line}` with `{answer}`")
        return answer

    def wait_off(self, timeout_s=BOOT_TIMEOUT_S):
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TestFailure(f"the guest does not power off; its console: {self.console()[-2000:]}") from None

    def kill(self):
        kill(self.process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in (self._inspect, self._control):
            if connection is not None:
                connection.close()
        self.kill()
        self.log.close()


class Verdict:
    """What the guest said after it checked all its files."""

    def __init__(self, line):
        match = re.search(r"CHECK OK (\d+) files(.*)", line)
        if not match:
            raise TestFailure(f"the guest's check failed: {line.strip()}")
        self.files = int(match[1])
        # Per place: generation and the checksum of the manifest, which stands for the exact set of files.
        self.generations = {}
        self.manifests = {}
        for place, generation, manifest in re.findall(r"(/\w+)=(\d+):(\w*)", match[2]):
            self.generations[place] = int(generation)
            self.manifests[place] = manifest


def boot_and_check(directory, system, data):
    """Boots the disks with vmtide.check=1: the guest checks every file and powers off. Returns the Verdict."""
    with Guest(directory, append="vmtide.check=1", system=system, data=data) as guest:
        guest.wait_off()
        console = guest.console()
    lines = [line for line in console.splitlines() if "CHECK" in line]
    if not lines:
        raise TestFailure(f"the guest gave no verdict; its console: {console[-2000:]}")
    return Verdict(lines[-1])
