"""Scenario `scale-qemu`: the same changes on two running machines, one with a small and one with a large disk.

Both machines are QEMU, paused before their first instruction (-S), each with one sparse qcow2 disk whose changes QEMU
tracks in a dirty bitmap. What is written goes through the disk's device, as a guest's writes would, and lies within
the first 16 GiB of both: the same offsets, the same bytes. So the two backups differ in nothing but the size of the
disk. Between two backups of one machine stand the same steps on the other.
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import tools
from measure import WORK, Failed, data_offsets, measure, remove

sys.path.insert(0, str(tools.ROOT / "tests/e2e"))
from lab.processes import kill, start  # noqa: E402  (the path above is where it is)
from lab.qmp import Qmp  # noqa: E402

MIB, GIB = 1 << 20, 1 << 30
SIZES = (16 * GIB, 1024 * GIB)
# Where the writes fall, on both disks.
WINDOW = 16 * GIB
# One write, aligned: one bit of a bitmap of QEMU's usual granularity, so that dirty bytes are exactly known.
GRANULE = 64 << 10
BLOCK = 4096


class Machine:
    """A paused QEMU with one disk, and a repository of its own."""

    def __init__(self, size, dirty):
        self.name = f"{size // GIB} GiB"
        self.size = size
        self.home = WORK / f"scale-qemu-{size // GIB}"
        self.tool = tools.Vmtide(self.home)
        self.repo = self.home / "repository"
        # Half of what is written later falls on data of the first backup, half on places never written.
        count = dirty // GRANULE
        slots = random.Random("scale-qemu").sample(range(WINDOW // GRANULE), count + count // 2)
        self.base = slots[:count]
        self.dirty = slots[count // 2:]

    def __enter__(self):
        remove(self.home)
        self.home.mkdir(parents=True)
        image = self.home / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(self.size)], check=True)
        # Sockets have short paths.
        self.sockets = WORK.__class__(f"/tmp/vmtide-bench-{os.getpid()}-{self.size // GIB}")
        self.sockets.mkdir()
        argv = ["qemu-system-x86_64", "-S", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-m", "64",
                "-machine", "q35", "-name", "scale"]
        for name in ("qmp", "writer"):
            argv += ["-chardev", f"socket,id={name},path={self.sockets / name},server=on,wait=off", "-mon", f"chardev={name},mode=control"]
        argv += ["-blockdev", f"driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={image},file.discard=unmap",
                 "-device", "virtio-blk-pci,id=dev,drive=disk"]
        with open(self.home / "qemu.log", "wb") as log:
            self.process = start(argv, stdout=log, stderr=subprocess.STDOUT)
        self.writer = Qmp(self.sockets / "writer")
        subprocess.run([self.tool.binary(), "init", str(self.repo)], env=self.env(), check=True, capture_output=True)
        return self

    def __exit__(self, *_):
        self.writer.close()
        kill(self.process)
        shutil.rmtree(self.sockets, ignore_errors=True)
        remove(self.home)

    def env(self):
        return {**os.environ, **self.tool.env(), "VMTIDE_STATE_DIR": str(self.home / "state")}

    def write(self, slots, number, data):
        """Writes one piece of data to each slot, unlike anything written before."""
        file = self.sockets / "piece"
        for slot, piece in zip(slots, data.of_round(number)):
            marked = bytearray(piece)
            for block in range(0, GRANULE, BLOCK):
                marked[block:block + 16] = (number << 64 | slot << 16 | block // BLOCK).to_bytes(16, "little")
            file.write_bytes(marked)
            answer = self.writer.human(f'qemu-io -d /machine/peripheral/dev/virtio-backend "write -q -s {file} {slot * GRANULE} {GRANULE}"')
            if answer.strip():
                raise Failed(f"qemu-io: {answer.strip()}")

    def backup(self, number, dirty, step):
        """One measured backup; the row to record."""
        command = [self.tool.binary(), "backup", f"qemu+unix://{self.sockets / 'qmp'}", "-r", str(self.repo), "--json"]
        figures = measure(command, self.env(), ok=(0,))
        disk = summary_of(WORK / "last-output")["disks"][0]
        if step == "incremental" and not disk["tracking"]["used"]:
            raise Failed(f"the bitmap was not used: {disk['tracking']['reason']}")
        return {"time": int(time.time()), "tool": "vmtide", "label": "vmtide", "setting": "default", "version": self.tool.version(),
                "step": f"{step} {self.name}", "round": number, **figures, "dirty_bytes": dirty, "read_bytes": disk["read_bytes"],
                "added_bytes": disk["stored_bytes"]}


def summary_of(output):
    """The last event of a run with --json."""
    for line in reversed(output.read_text(errors="replace").splitlines()):
        if line.startswith("{"):
            event = json.loads(line)
            if event.get("type") == "summary":
                return event
    raise Failed(f"no summary in {output}")


class Data:
    """Pieces of one granule of the benchmark's disk; every round begins elsewhere. They are read one by one: what
    this process has in memory would show as peak memory of what it measures."""

    def __init__(self):
        self.disk = open(WORK / "disk/disk.raw", "rb")
        self.offsets = list(data_offsets(self.disk.fileno(), GRANULE))

    def of_round(self, number):
        start = number * len(self.offsets) // 4
        for place in itertools.count(start):
            yield os.pread(self.disk.fileno(), GRANULE, self.offsets[place % len(self.offsets)])


def run(options, record):
    """Round 0 warms up and is not counted; `record` takes the rows."""
    dirty, data = options.dirty_mib * MIB, Data()
    with Machine(SIZES[0], dirty) as small, Machine(SIZES[1], dirty) as large:
        machines = (small, large)
        for machine in machines:
            machine.write(machine.base, 0, data)
            record("scale-qemu", machine.backup(1, len(machine.base) * GRANULE, "full"))
        for number in range(options.runs + 1):
            # Who comes first changes: the second finds the machine's caches as the first left them.
            for machine in machines if number % 2 == 0 else reversed(machines):
                machine.write(machine.dirty, number + 1, data)
                record("scale-qemu", machine.backup(number, len(machine.dirty) * GRANULE, "incremental"))
