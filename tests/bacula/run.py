#!/usr/bin/env python3
"""vmtide's plugin in a real Bacula: director, storage daemon and file daemon of the distribution, on loopback.

    tests/bacula/run.py [--keep] [TEST…]

Needs Bacula 15 (scripts/test.sh installs it), QEMU, Samba, and vmtide with its plugin and the stand-in for a Hyper-V host
built: VMTIDE_BIN names vmtide and VMTIDE_FD_PLUGIN the plugin, else the newest ones in the target directory are taken.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from daemons import CANCELLED, FATAL, GOOD, WARNINGS, Bacula  # noqa: E402
from hosts import Agent, HypervHost, write_settings  # noqa: E402
from lab.machine import MIB, Disk, Machine, make_disks  # noqa: E402
from lab.processes import Tally, TestFailure, Workspace, kill, need_tools, run, start, wait_until  # noqa: E402
from lab.vmtide import binary  # noqa: E402

IMAGE_BYTES = 12 * MIB + 512
# A source that is read slowly, so that a job is still at it when the test interferes (nbdkit counts in bits).
SLOW_BYTES = 24 * MIB
SLOW, FAST = "8M", "100G"


def plugin():
    """The plugin to test: VMTIDE_FD_PLUGIN, else the one beside vmtide."""
    path = Path(os.environ.get("VMTIDE_FD_PLUGIN", binary().parent / "libvmtide_fd.so"))
    if not path.exists():
        raise TestFailure(f"no plugin at {path}: build it (cargo build -p vmtide-bacula-fd) or set VMTIDE_FD_PLUGIN")
    return path


def must_be_same(path, expected, what):
    """A restored disk is what the disk was, byte for byte."""
    found = Path(path).read_bytes()
    if found != expected:
        pairs = zip(range(0, len(expected), 512), range(0, len(expected), 512))
        at = next((at for at, _ in pairs if found[at : at + 512] != expected[at : at + 512]), min(len(found), len(expected)))
        raise TestFailure(f"{what}: {path} ({len(found)} bytes) differs from the disk ({len(expected)} bytes) at {at}")


class Image:
    """A raw image that the test changes between jobs, and a model of it."""

    def __init__(self, path, size, seed):
        self.path = path
        self.random = random.Random(seed)
        self.data = bytearray(size)
        # Two thirds data, with a hole in it and at its end.
        for offset in [*range(0, size // 3, MIB), *range(size // 2, size * 5 // 6, MIB)]:
            self.put(offset, self.random.randbytes(min(MIB, size - offset)))
        self.save()

    def put(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "wb") as file:
            file.truncate(len(self.data))
            for offset in range(0, len(self.data), 65536):
                block = self.data[offset : offset + 65536]
                if any(block):
                    file.seek(offset)
                    file.write(block)

    def change(self, blocks):
        """Changes this many blocks of 64 KiB: most to data, some to zeros. Returns the bytes changed."""
        count = len(self.data) // 65536
        for number, block in enumerate(self.random.sample(range(count), blocks)):
            self.put(block * 65536, bytes(65536) if number % 4 == 3 else self.random.randbytes(65536))
        self.save()
        return blocks * 65536


class Throttled:
    """An image behind an NBD server whose speed the test chooses, and that fails to read while a file is there."""

    def __init__(self, directory, name, image):
        self.socket = directory / f"{name}.sock"
        self.rate_file = directory / f"{name}.rate"
        self.error_file = directory / f"{name}.errors"
        self.image = image
        self.set_rate(FAST)

    def set_rate(self, rate):
        self.rate_file.write_text(rate)

    def start(self):
        self.process = start(["nbdkit", "-f", "-U", self.socket, "--filter=error", "--filter=rate", "file", self.image,
                              f"rate={FAST}", f"rate-file={self.rate_file}", "error=EIO", "error-pread-rate=100%",
                              f"error-file={self.error_file}"])
        wait_until("nbdkit listens", self.socket.exists, 60)

    def restart(self, rate):
        """A new server: the old one may wait for a client that is gone, at the old rate."""
        kill(self.process)
        self.socket.unlink(missing_ok=True)
        self.set_rate(rate)
        self.start()


class NetworkDisk(Disk):
    """A disk of the machine that lies behind such a server."""

    server = None

    def blockdev(self):
        return (
            f"driver=raw,node-name={self.name},discard=unmap,file.driver=nbd,"
            f"file.server.type=unix,file.server.path={self.server.socket}"
        )


class Tests:
    def __init__(self, path, tally):
        self.path = path
        self.tally = tally
        self.images = {}
        self.servers = {}
        self.bacula = Bacula(path, plugin(), binary(), 19301 + os.getpid() % 500 * 3)

    def image(self, name, size=IMAGE_BYTES, slow=False):
        image = self.images[name] = Image(self.path / f"data/{name}.raw", size, name)
        source = image.path
        if slow:
            server = self.servers[name] = Throttled(self.path, name, image.path)
            source = f"nbd+unix:///?socket={server.socket} name={name} timeout_s=10"
        self.bacula.add_fileset(f"fs-{name}", [f'Plugin = "vmtide: source={source}"'])

    def configure(self):
        """Everything that jobs need, before the daemons start."""
        bacula = self.bacula
        for name in ("plain", "formats", "lost", "tiny"):
            self.image(name)
        for name in ("cancelled", "killed", "daemon", "broken"):
            self.image(name, SLOW_BYTES, slow=True)
        for name in ("plain", "formats", "lost", "cancelled", "killed", "daemon", "broken"):
            bacula.add_job(name, f"fs-{name}")
        bacula.add_job("tiny", "fs-tiny")
        bacula.add_job("tiny-full", "fs-tiny", "Pool = TinyPool", "Storage = Tiny")
        bacula.add_job("inaccurate", "fs-plain", "Accurate = no")
        bacula.add_fileset("fs-wrong", ['Plugin = "vmtide: source=/nowhere.raw sorce=x"'])
        bacula.add_job("wrong", "fs-wrong")
        bacula.add_fileset("fs-missing", ['Plugin = "vmtide: source=/nowhere/disk.raw"'])
        bacula.add_job("missing", "fs-missing")
        (self.path / "machine").mkdir()
        disks = make_disks(self.path / "machine")
        self.beta = NetworkDisk.server = self.servers["beta"] = Throttled(self.path, "beta", disks[1].image)
        disks[1].__class__ = NetworkDisk
        self.machine = Machine(self.path / "machine", disks, 7)
        # A machine with three disks, by its monitor; and only two of them.
        source = f"source=qemu+unix://{self.path}/machine/qmp.sock"
        bacula.add_fileset("fs-machine", [f'Plugin = "vmtide: {source} consistency=crash"'])
        bacula.add_job("machine", "fs-machine")
        bacula.add_fileset("fs-machine-2", [f'Plugin = "vmtide: {source} consistency=crash disk=dev-alpha,dev-beta"'])
        bacula.add_job("machine-two", "fs-machine-2")
        self.configure_hosts()

    def configure_hosts(self):
        """A Hyper-V host without anything installed, and an agent's disk. Secrets are in the settings of vmtide."""
        self.hyperv = HypervHost(self.path / "hyperv")
        self.agent = Agent(self.path / "agent")
        self.hosts = [self.hyperv, self.agent]
        image = self.images["agent"] = Image(self.path / "agent/disks/mail.raw", IMAGE_BYTES, "agent")
        for name, source in (
            ("hyperv", f"{self.hyperv.source} consistency=app"),
            ("agent", f"{self.agent.source(image.path)} track=yes"),
        ):
            self.bacula.add_fileset(f"fs-{name}", [f'Plugin = "vmtide: source={source}"'])
            self.bacula.add_job(name, f"fs-{name}")
        settings = self.path / "vmtide.toml"
        write_settings(settings, self.hyperv.settings, self.agent.settings)
        self.bacula.environment["VMTIDE_CONFIG"] = str(settings)

    # --- images ---

    def restored(self, name):
        return self.path / f"restore/@image/{name}/disk0.raw"

    def check_restore(self, name, job_ids, expected):
        shutil.rmtree(self.path / "restore/@image", ignore_errors=True)
        self.bacula.restore(job_ids).must_be(GOOD)
        must_be_same(self.restored(name), expected, f"restore of jobs {job_ids}")
        leftovers = [path for path in self.restored(name).parent.iterdir() if "partial" in path.name]
        if leftovers:
            raise TestFailure(f"left behind by a restore: {leftovers}")

    def test_image_levels(self):
        """Full, incremental, differential, incremental of an image: each restored, each delta as large as what changed."""
        image = self.images["plain"]
        full = self.bacula.run("plain").must_be(GOOD)
        states = {full.id: bytes(image.data)}
        disk = "/@image/plain/disk0.raw"
        chain, sequences = [full.id], []
        changed_since_full = 0
        for level in ("Incremental", "Incremental", "Differential", "Incremental"):
            changed = image.change(20)
            changed_since_full += changed
            job = self.bacula.run("plain", level).must_be(GOOD)
            if job.level != level[0]:
                raise TestFailure(f"the job became one of level {job.level}:\n{job.report}")
            limit = (changed_since_full if level == "Differential" else changed) * 1.1 + 16384
            if job.bytes > limit:
                raise TestFailure(f"{level} sent {job.bytes} bytes, more than {limit}:\n{job.report}")
            chain = [full.id, job.id] if level == "Differential" else [*chain, job.id]
            sequences.append(self.bacula.files(job.id)[disk])
            states[tuple(chain)] = bytes(image.data)
        if sequences != [1, 2, 1, 2]:
            raise TestFailure(f"the deltas are numbered {sequences}")
        for jobs, expected in states.items():
            self.check_restore("plain", [jobs] if isinstance(jobs, int) else jobs, expected)
        self.last_chain = chain

    def test_restore_by_console_selection(self):
        """What bconsole selects by itself for the newest state is the newest state."""
        job = self.bacula.begin("restore client=t-fd fileset=fs-plain select current all done yes")
        self.bacula.finish(job).must_be(GOOD)
        must_be_same(self.restored("plain"), bytes(self.images["plain"].data), "current")

    def test_a_delta_without_its_base(self):
        """Of a restore of an incremental alone no image comes: bconsole itself leaves a delta without its base out."""
        shutil.rmtree(self.path / "restore/@image", ignore_errors=True)
        last = self.last_chain[-1]
        # bconsole's choice is empty but for the configuration, or empty: no job, or one that ends well.
        output = self.bacula.console(f"restore client=t-fd jobid={last} all done yes")
        for line in output.splitlines():
            if "Job queued. JobId=" in line:
                self.bacula.finish(int(line.split("JobId=")[1].split()[0])).must_be(GOOD, WARNINGS)
        if self.restored("plain").exists():
            raise TestFailure("an image appeared without its full backup")

    def test_catalogue(self):
        """The VM is an object of the catalogue; the configuration is a file; nothing else is."""
        rows = self.bacula.query("select ObjectCategory, ObjectType, ObjectName from Object where ObjectName='plain'")
        if not rows or rows[0] != ("Virtual Machine", "image", "plain"):
            raise TestFailure(f"objects in the catalogue: {rows}")
        files = self.bacula.files(self.last_chain[0])
        if set(files) != {"/@image/plain/configuration.json", "/@image/plain/disk0.raw"}:
            raise TestFailure(f"files in the catalogue: {files}")
        configuration = self.path / "restore/@image/plain/configuration.json"
        if json.loads(configuration.read_text())["name"] != "plain":
            raise TestFailure(f"{configuration} is not the VM's")

    def test_accurate_is_required(self):
        """Without Accurate = yes an incremental fails, and says what to do."""
        self.bacula.run("inaccurate", "Full").must_be(GOOD)
        self.bacula.run("inaccurate", "Incremental").must_be(FATAL).must_say("Accurate = yes")

    def test_estimate(self):
        """An estimate lists the files with their sizes, and finds every mistake of the plugin line."""
        listing = self.bacula.console("estimate job=plain level=Full listing")
        if "/@image/plain/disk0.raw" not in listing or "2000 OK estimate" not in listing:
            raise TestFailure(f"estimate: {listing}")
        # With accurate=yes the daemon looks entries up by name, and once fell over those without.
        self.bacula.console("estimate job=plain level=Incremental accurate=yes")
        self.bacula.assert_sound("after an estimate")
        self.bacula.run("wrong").must_be(FATAL).must_say("unknown parameter sorce=")
        self.bacula.run("missing").must_be(FATAL).must_say("/nowhere/disk.raw")

    def test_formats(self):
        """A backup with its deltas, restored as another format, to a directory, and over the original."""
        image = self.images["formats"]
        jobs = [self.bacula.run("formats").must_be(GOOD).id]
        image.change(15)
        jobs.append(self.bacula.run("formats", "Incremental").must_be(GOOD).id)
        expected = bytes(image.data)
        target = self.path / "elsewhere"
        for image_format in ("qcow2", "vhdx"):
            self.restore_with(jobs, to=str(target), format=image_format).must_be(GOOD)
            restored = target / f"formats/disk0.{image_format}"
            copy = self.path / "copy.raw"
            run(["qemu-img", "convert", "-f", image_format, "-O", "raw", restored, copy])
            must_be_same(copy, expected, image_format)
        image.change(40)
        self.restore_with(jobs, to="original").must_be(GOOD)
        must_be_same(image.path, expected, "original")
        self.restore_with(jobs, format="iso").must_be("E", FATAL).must_say("format=iso")

    def restore_with(self, jobs, **options):
        """A restore with bconsole's menu of plugin options."""
        numbers = ",".join(map(str, jobs))
        lines = [f"restore client=t-fd jobid={numbers} all done", "mod", "13"]
        for name, value in options.items():
            lines += ["mod", {"to": "1", "format": "2"}[name], value]
        output = self.bacula.console(*lines, "yes", "yes")
        for line in output.splitlines():
            if "Job queued. JobId=" in line:
                return self.bacula.finish(int(line.split("JobId=")[1].split()[0]))
        raise TestFailure(f"no restore was queued:\n{output}")

    def test_lost_state(self):
        """Without its log of moments vmtide sends the whole disk in an incremental job, says why, and it restores."""
        image = self.images["lost"]
        full = self.bacula.run("lost").must_be(GOOD)
        image.change(3)
        # The list of digests has gone, then the whole state.
        for what in ("digests-*", "moments.json"):
            for path in (self.path / "state/bacula").glob(f"*/{what}"):
                if str(image.path) in (path.parent / "moments.json").read_text():
                    path.unlink()
            job = self.bacula.run("lost", "Incremental").must_be(GOOD, WARNINGS).must_say("is sent whole")
            self.check_restore("lost", [full.id, job.id], bytes(image.data))
            image.change(3)

    # --- things that go wrong ---

    def begin_slow(self, job, server):
        """Begins a full job of a source that is slow, and waits for its middle."""
        server.set_rate(SLOW)
        job_id = self.bacula.begin(f"run job={job} level=Full yes")
        self.wait_for_data(job_id)
        return job_id

    def wait_for_data(self, job_id):
        """Until a slow job is in the middle of its disk."""

        def moves():
            text = self.bacula.console("status client=t-fd running")
            if self.bacula.query("select 1 from Job where JobId=? and JobStatus in ('T','f','A','E','W')", job_id):
                raise TestFailure(f"the job ended too early:\n{self.bacula.report(job_id)}")
            for line in text.splitlines():
                if "Bytes=" in line:
                    sent = line.split("Bytes=")[1].split()[0].replace(",", "")
                    if int(sent) > MIB:
                        return True
            return False
        wait_until(f"data of job {job_id}", moves, 60, 0.2)

    def test_cancel(self):
        """A job cancelled in its middle ends as such and soon, leaves nothing running, and the next one is good."""
        job = self.begin_slow("cancelled", self.servers["cancelled"])
        begun = time.monotonic()
        self.bacula.cancel(job)
        self.bacula.finish(job).must_be(CANCELLED)
        if time.monotonic() - begun > 60:
            raise TestFailure("cancelling took more than a minute")
        self.bacula.assert_no_backends("after a cancelled job")
        self.check_next("cancelled")

    def check_next(self, name):
        """After whatever happened: a full and an incremental that restore."""
        image = self.images[name]
        if name in self.servers:
            self.servers[name].restart(FAST)
        jobs = [self.bacula.run(name).must_be(GOOD).id]
        image.change(5)
        jobs.append(self.bacula.run(name, "Incremental").must_be(GOOD).id)
        self.check_restore(name, jobs, bytes(image.data))

    def backend_of(self, job_id):
        found = [process for process, words in self.bacula.backends() if b"bacula-backend" in words]
        if len(found) != 1:
            raise TestFailure(f"job {job_id}: {len(found)} backends run")
        return found[0]

    def test_killed_backend(self):
        """A backend that is killed fails its job, and not the daemon."""
        job = self.begin_slow("killed", self.servers["killed"])
        os.kill(self.backend_of(job), signal.SIGKILL)
        self.bacula.finish(job).must_be(FATAL).must_say("the backend ended before its work was done")
        self.check_next("killed")

    def test_silent_backend(self):
        """A backend that stands still is given up after its time, and not the daemon with it."""
        job = self.begin_slow("killed", self.servers["killed"])
        os.kill(self.backend_of(job), signal.SIGSTOP)
        self.bacula.finish(job).must_be(FATAL).must_say("has said nothing for 10 s")
        self.bacula.assert_no_backends("after a silent backend")
        self.check_next("killed")

    def test_read_error(self):
        """A disk that cannot be read in its middle fails its job: no hole stands for what was not read, no error passes as a
        warning. The incremental after it builds on the full before it."""
        image, server = self.images["broken"], self.servers["broken"]
        full = self.bacula.run("broken").must_be(GOOD)
        image.change(5)
        job = self.begin_slow("broken", server)
        server.error_file.touch()
        self.bacula.finish(job).must_be(FATAL).must_say("disk0", "Input/output error")
        self.bacula.assert_no_backends("after a read error")
        server.error_file.unlink()
        server.restart(FAST)
        later = self.bacula.run("broken", "Incremental").must_be(GOOD, WARNINGS)
        if later.level != "I":
            raise TestFailure(f"the job became one of level {later.level}:\n{later.report}")
        self.check_restore("broken", [full.id, later.id], bytes(image.data))

    def test_cancelled_restore(self):
        """A restore cancelled in its middle ends as such, leaves no image, whole or in parts, and can be done again."""
        image = self.images["broken"]
        full = self.bacula.run("broken").must_be(GOOD)
        shutil.rmtree(self.path / "restore/@image", ignore_errors=True)
        directory = self.restored("broken").parent
        job = self.bacula.begin(f"restore client=t-fd jobid={full.id} all done yes")
        wait_until("the restore has begun to write", lambda: list(directory.glob(".disk0*partial*")), 60, 0.002)
        backend = self.backend_of(job)
        os.kill(backend, signal.SIGSTOP)
        if self.restored("broken").exists():
            raise TestFailure("the restore was done before it could be cancelled")
        self.bacula.cancel(job)
        os.kill(backend, signal.SIGCONT)
        self.bacula.finish(job).must_be(CANCELLED)
        self.bacula.assert_no_backends("after a cancelled restore")
        left = [path for path in directory.iterdir() if "disk0" in path.name] if directory.exists() else []
        if left:
            raise TestFailure(f"left behind by a cancelled restore: {left}")
        self.check_restore("broken", [full.id], bytes(image.data))

    def test_concurrent(self):
        """Two jobs of one VM do not work on it at once: the second is refused."""
        job = self.begin_slow("killed", self.servers["killed"])
        self.bacula.run("killed").must_be(FATAL).must_say("another vmtide job")
        self.bacula.cancel(job)
        self.bacula.finish(job).must_be(CANCELLED)
        self.servers["killed"].set_rate(FAST)
        self.bacula.assert_no_backends("after a cancelled job")

    def test_killed_file_daemon(self):
        """A file daemon that is killed takes its backend with it, and nothing stays frozen or locked."""
        job = self.begin_slow("daemon", self.servers["daemon"])
        self.bacula.processes["fd"].kill()
        self.bacula.processes["fd"].wait()
        self.bacula.assert_no_backends("after the file daemon was killed")
        self.bacula.start_daemon("fd")
        self.bacula.finish(job).must_be(FATAL, "E")
        self.check_next("daemon")

    def test_full_volume(self):
        """A job that waits for a volume holds on; cancelled there, it leaves nothing, and the next one is good."""
        job = self.bacula.begin("run job=tiny-full level=Full yes")
        wait_until("the job waits for a volume",
                   lambda: "Cannot find any appendable volumes" in self.bacula.console("status storage=Tiny")
                   or "Cannot find any appendable volumes" in self.bacula.report(job), 60, 0.5)
        self.bacula.cancel(job)
        self.bacula.finish(job).must_be(CANCELLED)
        self.bacula.assert_no_backends("after a job without a volume")
        self.check_next("tiny")

    # --- a machine of QEMU ---

    def check_machine(self, name, jobs, contents, leave_out=()):
        shutil.rmtree(self.path / "restore/@qemu", ignore_errors=True)
        self.bacula.restore(jobs).must_be(GOOD)
        for disk in self.machine.disks:
            path = self.path / f"restore/@qemu/{name}/dev-{disk.name}.raw"
            if disk.name in leave_out:
                if path.exists():
                    raise TestFailure(f"{path} was left out of the backup")
                continue
            must_be_same(path, contents[disk.name], f"jobs {jobs}")

    def test_machine(self):
        """A running machine with three disks: full, incremental, differential, incremental; each restored."""
        machine = self.machine
        for _ in range(60):
            machine.write()
        full = self.bacula.run("machine").must_be(GOOD)
        machine.assert_clean("after a full")
        states = [([full.id], machine.contents())]
        chain = [full.id]
        for level in ("Incremental", "Differential", "Incremental"):
            for _ in range(15):
                machine.write()
            job = self.bacula.run("machine", level).must_be(GOOD)
            machine.assert_clean(f"after {level}")
            if "sent whole" in job.report:
                # A raw image's bitmap is in QEMU's memory, which lives on here.
                raise TestFailure(f"change tracking was not used:\n{job.report}")
            chain = [full.id, job.id] if level == "Differential" else [*chain, job.id]
            states.append((list(chain), machine.contents()))
        for jobs, contents in states:
            self.check_machine("vmtide-machine", jobs, contents)

    def test_machine_interrupted(self):
        """A cancelled job and a killed backend of a running machine leave nothing in QEMU, and tracking goes on."""
        machine = self.machine
        for disk in machine.disks:
            # Enough for a slow job to be in the middle of.
            for at in range(0, 6 * MIB, MIB):
                machine._qemu_io(disk, f"write -P {1 + at // MIB} {at} {MIB}")
                disk.data[at : at + MIB] = bytes([1 + at // MIB]) * MIB
        jobs = [self.bacula.run("machine-two").must_be(GOOD).id]
        for how in ("cancel", "kill"):
            machine.write()
            job = self.begin_slow("machine-two", self.beta)
            if how == "cancel":
                self.bacula.cancel(job)
                self.bacula.finish(job).must_be(CANCELLED)
                self.bacula.assert_no_backends("after a cancelled job")
                machine.assert_clean("after a cancelled job")
            else:
                os.kill(self.backend_of(job), signal.SIGKILL)
                self.bacula.finish(job).must_be(FATAL)
            self.beta.set_rate(FAST)
            machine.wait_running()
        job = self.bacula.run("machine-two", "Incremental").must_be(GOOD)
        if "sent whole" in job.report:
            raise TestFailure(f"change tracking was lost:\n{job.report}")
        machine.wait_running()
        self.check_machine("vmtide-machine", [*jobs, job.id], machine.contents(), ["gamma"])

    # --- hosts ---

    def restored_disks(self, name, jobs):
        """The disks that a restore of these jobs makes, by name, each with its path."""
        shutil.rmtree(self.path / "restore/@hyperv", ignore_errors=True)
        self.bacula.restore(jobs).must_be(GOOD)
        return sorted((self.path / f"restore/@hyperv/{name}").glob("*.raw"))

    def levels_of(self, name, change, contents, sound):
        """Full, incremental, differential, incremental of a tracked source: small, and each restored, byte by byte. `change`
        is what happens between two jobs, and answers with at most how many bytes it changed; `sound` is asked after each."""
        full = self.bacula.run(name).must_be(GOOD)
        sound("a full")
        states, chain, since_full = [([full.id], contents())], [full.id], 0
        for level in ("Incremental", "Differential", "Incremental"):
            changed = change()
            since_full += changed
            job = self.bacula.run(name, level).must_be(GOOD)
            sound(level)
            if "sent whole" in job.report:
                raise TestFailure(f"change tracking was not used:\n{job.report}")
            limit = (since_full if level == "Differential" else changed) * 1.1 + 65536
            if job.bytes > limit:
                raise TestFailure(f"{level} sent {job.bytes} bytes, more than {limit}:\n{job.report}")
            chain = [full.id, job.id] if level == "Differential" else [*chain, job.id]
            states.append((list(chain), contents()))
        return states

    def test_hyperv_host(self):
        """A VM of a host on which nothing was installed: over WS-Management and SMB, by the host's own change tracking."""

        def change():
            self.hyperv.tell("write")
            # Eight writes of at most 16 KiB, at any sector of a unit of 4 KiB.
            return 8 * (16384 + 2 * 4096)

        states = self.levels_of("hyperv", change, lambda: self.hyperv.settled_disks(self.path), self.hyperv.assert_nothing_left)
        for jobs, contents in states:
            found = self.restored_disks("web", jobs)
            if len(found) != len(contents):
                raise TestFailure(f"restored were {found}, and the VM has {len(contents)} disks")
            for path, content in zip(found, contents):
                must_be_same(path, content, f"jobs {jobs}")
        self.restore_to_host(states)
        estimate = self.bacula.console("estimate job=hyperv level=Full listing")
        if estimate.count("/@hyperv/web/") < 3:
            raise TestFailure(f"estimate: {estimate}")

    def restore_to_host(self, states):
        """What was backed up becomes a VM on the host: of a chain, not beside one of its name, and not without a disk."""
        chain, contents = states[-1]
        place = self.hyperv.source.removesuffix("/web")
        self.restore_with(chain, to=f"{place}/again").must_be(GOOD).must_say("again is on the host")
        if self.hyperv.settled_disks(self.path, "again") != contents:
            raise TestFailure("the VM that was restored to the host has other disks")
        before = self.hyperv.tell("vms")
        self.restore_with(chain, to=f"{place}/again").must_be("E", FATAL).must_say("again")
        self.restore_with(chain, to="hyperv+winrm:///again").must_be("E", FATAL)
        self.restore_with(chain, to="original").must_be("E", FATAL).must_say("on another host")
        # Only the first of its disks.
        lines = [f"restore client=t-fd jobid={chain[0]}", "cd /@hyperv/web", "mark *0.raw", "done", "mod", "13", "mod", "1",
                 f"{place}/part", "yes", "yes"]
        output = self.bacula.console(*lines)
        queued = [line for line in output.splitlines() if "Job queued. JobId=" in line]
        if not queued:
            raise TestFailure(f"no restore was queued:\n{output}")
        job = self.bacula.finish(int(queued[0].split("JobId=")[1].split()[0]))
        job.must_be("E", FATAL).must_say("a host gets all disks of a VM or none")
        if self.hyperv.tell("vms") != before:
            raise TestFailure(f"a restore that failed left something: {before} became {self.hyperv.tell('vms')}")

    def test_agent_disk(self):
        """A disk of an agent: what changed is tracked there."""
        image = self.images["agent"]

        def change():
            content = bytearray(image.data)
            places = image.random.sample(range(len(content) // 65536), 3)
            for number, block in enumerate(places):
                at = block * 65536
                content[at : at + 65536] = bytes(65536) if number == 2 else image.random.randbytes(65536)
            self.agent.write(image.path, content)
            image.data = content
            # Where something differs, a restore in place writes up to a MiB.
            return MIB * len(places)

        states = self.levels_of("agent", change, lambda: [bytes(image.data)], lambda when: None)
        for jobs, contents in states:
            (path,) = self.restored_disks("mail", jobs)
            must_be_same(path, contents[0], f"jobs {jobs}")

    # --- all ---

    def run_all(self, only):
        names = [name for name in dir(self) if name.startswith("test_") and (not only or name[5:] in only)]
        order = list(type(self).__dict__)
        names.sort(key=order.index)
        for server in self.servers.values():
            server.start()
        with self.machine, self.bacula:
            for name in names:
                begun = time.monotonic()
                getattr(self, name)()
                self.bacula.assert_sound(name)
                self.bacula.assert_no_backends(name)
                self.tally.passed += 1
                print(f"ok  {name[5:]} ({time.monotonic() - begun:.1f} s)", flush=True)
            version = self.bacula.console("status client=t-fd")
            if "vmtide" not in version:
                raise TestFailure(f"the daemon does not list the plugin: {version[:600]}")
        for host in self.hosts:
            host.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    parser.add_argument("tests", nargs="*", help="only these")
    arguments = parser.parse_args()
    with Workspace("bacula", arguments.keep) as path, Tally("tests/bacula/run.py --keep shows the files") as tally:
        need_tools("nbdkit", "bacula-fd", "bacula-sd", "bconsole", "qemu-system-x86_64", "qemu-img", "smbd", "smbpasswd")
        tests = Tests(path, tally)
        tests.configure()
        tests.run_all(arguments.tests)
    return tally.exit_code()


if __name__ == "__main__":
    sys.exit(main())
