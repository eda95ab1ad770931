"""A virtual machine without an operating system: three disks that the test itself writes to, and a model of them.

Writes go through the devices' own block back ends (the human monitor's `qemu-io -d`), as a guest's would, one after
the other, each acknowledged before the next. So the test knows exactly what the disks hold at every moment: the model.
"""

import os
import random
import subprocess

from .processes import TestFailure, kill, run, start, wait_until
from .qmp import BlockState, Qmp, QmpError, assert_same_but_bitmaps

MIB = 1 << 20
# A bitmap and its name that are somebody else's: vmtide must leave them alone.
FOREIGN_BITMAP = "somebody-elses"


class Disk:
    """One disk: its image, its device, and the model of its contents."""

    def __init__(self, name, image, image_format, size, device, qdev):
        self.name = name
        self.image = image
        self.format = image_format
        self.size = size
        self.device = device
        self.qdev = qdev
        self.data = bytearray(size)

    def blockdev(self):
        return (
            f"driver={self.format},node-name={self.name},discard=unmap,"
            f"file.driver=file,file.filename={self.image},file.discard=unmap"
        )

    def create(self):
        options = ["-o", "compat=1.1"] if self.format == "qcow2" else []
        run(["qemu-img", "create", "-q", "-f", self.format, *options, self.image, self.size])

    def copy_to(self, path):
        """A raw copy of what the image holds, made by qemu-img, also while QEMU has it open (and is quiet)."""
        run(["qemu-img", "convert", "-U", "-f", self.format, "-O", "raw", self.image, path])


class Write:
    """One write of the machine: bytes, or zeros when `data` is None."""

    def __init__(self, disk, offset, length, data, verb):
        self.disk = disk
        self.offset = offset
        self.length = length
        self.data = data
        self.verb = verb
        # A real guest cannot write while its machine is stopped; the monitor that writes here can.
        self.while_stopped = False

    def touches(self, offset):
        return self.offset <= offset < self.offset + self.length

    def apply(self, contents):
        contents[self.offset : self.offset + self.length] = self.data if self.data is not None else bytes(self.length)


def make_disks(directory):
    """Two qcow2 and a raw one; two buses; the sizes are no multiples of a bitmap granule or of a chunk."""
    disks = [
        Disk("alpha", directory / "alpha.qcow2", "qcow2", 64 * MIB, "virtio-blk-pci,id=dev-alpha,drive=alpha",
             "/machine/peripheral/dev-alpha/virtio-backend"),
        Disk("beta", directory / "beta.raw", "raw", 24 * MIB + 4096, "virtio-blk-pci,id=dev-beta,drive=beta",
             "/machine/peripheral/dev-beta/virtio-backend"),
        Disk("gamma", directory / "gamma.qcow2", "qcow2", 33 * MIB + 3 * 512, "scsi-hd,id=dev-gamma,drive=gamma",
             "dev-gamma"),
    ]
    for disk in disks:
        disk.create()
    return disks


class Machine:
    """The running machine. Use in a `with` block."""

    def __init__(self, directory, disks, seed):
        self.directory = directory
        self.disks = disks
        self.random = random.Random(seed)
        self.process = None
        self.inspect = None
        self.baseline = None
        self.writes = []
        self.stopped = False

    @property
    def vmtide_source(self):
        return f"qemu+unix://{self.directory / 'qmp.sock'}"

    def start(self):
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-name", "vmtide-machine", "-machine", "q35", "-accel", "tcg", "-m", "32"]
        for name in ("qmp", "inspect"):
            argv += ["-chardev", f"socket,id={name},path={self.directory / name}.sock,server=on,wait=off"]
            argv += ["-mon", f"chardev={name},mode=control"]
            (self.directory / f"{name}.sock").unlink(missing_ok=True)
        argv += ["-device", "virtio-scsi-pci"]
        for disk in self.disks:
            argv += ["-blockdev", disk.blockdev(), "-device", disk.device]
        with open(self.directory / "qemu.log", "ab") as log:
            self.process = start(argv, stdout=log, stderr=subprocess.STDOUT)
        self.inspect = Qmp(self.directory / "inspect.sock")
        self.stopped = False
        self.inspect.execute("block-dirty-bitmap-add", node="beta", name=FOREIGN_BITMAP)
        self.baseline = BlockState(self.inspect)
        self.open_files = self._open_files()

    def stop(self, how):
        """`quit` closes the images properly; `kill` is kill -9, after which the model is read from the images anew."""
        if how == "quit":
            self.inspect.execute("quit")
            self.process.wait(60)
        else:
            kill(self.process)
        self.inspect.close()
        if how == "kill":
            for disk in self.disks:
                copy = self.directory / f"{disk.name}.reread"
                disk.copy_to(copy)
                disk.data[:] = copy.read_bytes()
                copy.unlink()

    def random_write(self):
        """A write as guests make them: random data of some KiB, a larger run, zeros, or zeros that free the space.

        No plain discards: what a disk holds after one is anybody's guess, so nothing could be compared.
        """
        disk = self.random.choice(self.disks)
        verb = self.random.choices(["write", "write -z", "write -z -u"], [80, 8, 12])[0]
        sectors = disk.size // 512
        length = 512 * self.random.choice([1, 8, 8, 8, 16, 128, 128, self.random.randrange(1, 2000)])
        offset = 512 * self.random.randrange(sectors - length // 512)
        if self.random.random() < 0.05:
            offset = disk.size - length  # the last, partial granule
        data = self.random.randbytes(length) if verb == "write" else None
        return Write(disk, offset, length, data, verb)

    def write(self, write=None):
        """Makes one write, on the disk and in the model."""
        write = write or self.random_write()
        verb = write.verb
        if write.data is not None:
            source = self.directory / "write.data"
            source.write_bytes(write.data)
            verb = f"write -s {source}"
        self._qemu_io(write.disk, f"{verb} {write.offset} {write.length}")
        # Events come in order with answers: so a stop that this write fell into is known now.
        write.while_stopped = self._take_run_state_events() or self.stopped
        write.apply(write.disk.data)
        self.writes.append(write)

    def _take_run_state_events(self):
        """Follows STOP and RESUME; true when there were any."""
        seen = False
        for event in self.inspect.events:
            if event["event"] in ("STOP", "RESUME"):
                self.stopped = event["event"] == "STOP"
                seen = True
        self.inspect.events.clear()
        return seen

    def is_running(self):
        running = self.inspect.execute("query-status")["status"] == "running"
        self._take_run_state_events()
        return running

    def wait_running(self, timeout_s=60):
        """vmtide may stop the machine for moments, and must never leave it stopped."""
        wait_until("the machine runs again after vmtide stopped it", self.is_running, timeout_s, 0.005)

    def _qemu_io(self, disk, words):
        answer = self.inspect.human(f'qemu-io -d {disk.qdev} "{words}"')
        if answer.strip():
            raise TestFailure(f"qemu-io {words} on {disk.name}: {answer.strip()}")

    def flush(self):
        for disk in self.disks:
            self._qemu_io(disk, "flush")

    def reference_copies(self, directory):
        """Raw copies by qemu-img of all disks, now, while nobody writes; checked against the model."""
        self.flush()
        copies = {}
        for disk in self.disks:
            copies[disk.name] = directory / f"{disk.name}.reference"
            disk.copy_to(copies[disk.name])
            copied = copies[disk.name].read_bytes()
            if copied != disk.data:
                at = next(at for at in range(0, disk.size, 512) if copied[at : at + 512] != disk.data[at : at + 512])
                last = [f"{w.verb} {w.offset} {w.length}" for w in self.writes if w.disk is disk and w.touches(at)]
                raise TestFailure(
                    f"the test is wrong, not vmtide: the model of {disk.name} differs from its image at {at}, "
                    f"where the last writes were {last[-3:]}"
                )
        return copies

    def contents(self):
        return {disk.name: bytes(disk.data) for disk in self.disks}

    def _open_files(self):
        """The files QEMU has open: scratch files that were left attached, even deleted ones, would show here."""
        files = []
        for entry in (self.directory.__class__(f"/proc/{self.process.pid}/fd")).iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:
                continue
            if target.startswith("/") and not target.startswith("/dev/"):
                files.append(target)
        return sorted(files)

    def assert_clean(self, when):
        """Nothing of vmtide's but at most one tracking bitmap per disk; what is somebody else's is untouched."""
        now = BlockState(self.inspect)
        assert_same_but_bitmaps(self.baseline, now, when)
        if ("beta", FOREIGN_BITMAP) not in now.bitmaps:
            raise TestFailure(f"{when}: a bitmap that is not vmtide's was removed")
        for disk in self.disks:
            names = [name for node, name in now.bitmaps if node == disk.name and name != FOREIGN_BITMAP]
            if len(names) > 1:
                raise TestFailure(f"{when}: more than the one tracking bitmap on {disk.name}: {names}")
        strangers = [key for key in now.bitmaps if key[0] not in {disk.name for disk in self.disks}]
        if strangers:
            raise TestFailure(f"{when}: bitmaps on other nodes: {strangers}")
        if self._open_files() != self.open_files:
            raise TestFailure(f"{when}: QEMU has other files open than before: {self._open_files()}")
        try:
            self.inspect.execute("nbd-server-stop")
        except QmpError:
            return
        raise TestFailure(f"{when}: QEMU's NBD server was left running")

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.inspect.close()
        kill(self.process)


def is_a_moment_of(base, writes, restored):
    """Whether `restored` is what all disks together held at one moment of the run of `writes` that began at `base`.

    That is: `base` and the first k writes, for some k. A write made while the machine was stopped could not have
    come from a guest: of a run of such writes, a moment may hold any subset.
    """
    if matching_prefixes(base, writes, restored):
        return True
    for begin, end in _stopped_runs(writes):
        run_of_writes = writes[begin:end]
        for chosen in range(1 << len(run_of_writes)):
            subset = [write for bit, write in enumerate(run_of_writes) if chosen >> bit & 1]
            moment = writes[:begin] + subset
            if len(moment) in matching_prefixes(base, moment, restored):
                return True
    return False


def _stopped_runs(writes):
    """Begin and end of the runs of writes made while stopped. Runs are short: the writer waits when it sees a stop."""
    runs = []
    for position, write in enumerate(writes):
        if write.while_stopped:
            if runs and runs[-1][1] == position and position - runs[-1][0] < 6:
                runs[-1] = (runs[-1][0], position + 1)
            else:
                runs.append((position, position + 1))
    return runs


def matching_prefixes(base, writes, restored):
    """Which k exist such that `base` with the first k of `writes` is exactly `restored` (all disks together).

    Pages that differ are counted; a write changes the verdict only of the pages it touches.
    """
    page = 4096
    state = {name: bytearray(data) for name, data in base.items()}
    wrong = set()

    def judge(name, first, last):
        for number in range(first, last + 1):
            span = slice(number * page, (number + 1) * page)
            if state[name][span] == restored[name][span]:
                wrong.discard((name, number))
            else:
                wrong.add((name, number))

    for name, data in state.items():
        if len(data) != len(restored[name]):
            return []
        stride = 256 * page
        for start_at in range(0, len(data), stride):
            if data[start_at : start_at + stride] != restored[name][start_at : start_at + stride]:
                judge(name, start_at // page, (min(start_at + stride, len(data)) - 1) // page)
    matches = [0] if not wrong else []
    for count, write in enumerate(writes, 1):
        write.apply(state[write.disk.name])
        judge(write.disk.name, write.offset // page, (write.offset + write.length - 1) // page)
        if not wrong:
            matches.append(count)
    return matches


def dirty_granules(writes, name, granularity=65536):
    """How many bytes a perfect dirty bitmap would mark for these writes to the disk `name`."""
    granules = set()
    for write in writes:
        if write.disk.name == name:
            granules.update(range(write.offset // granularity, (write.offset + write.length - 1) // granularity + 1))
    return len(granules) * granularity
