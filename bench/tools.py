"""The tools compared: how each is set up, backs up, and restores, with the exact commands.

Each tool gets the disk in the way that is natural to it: restic, rustic and borg a directory
with the raw file in it, vmtide the file. Encryption is on for every one of them. A tool that
has no notion of a list of changed ranges reads the disk again; that is the comparison, not an
accident of it.
"""

import os
import pathlib
import shutil
import subprocess

PASSWORD = "benchmark password"
HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent


def first_line(command):
    """First line that a version command prints, or the reason why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"not found ({error.strerror})"
    return (done.stdout or done.stderr).strip().splitlines()[0]


class Tool:
    """One tool in one setting. `repo` is a directory that it may fill as it likes."""

    name = ""
    label = ""
    setting = ""
    dedups = True
    # Whether `backup` makes use of a list of changed ranges.
    takes_changes = False
    # Exit codes that mean the work is done.
    ok = (0,)

    def __init__(self, work):
        self.work = work
        self.home = work / "run" / self.name
        self.repo = self.home / "repo"
        self.cache = self.home / "cache"

    def available(self):
        return shutil.which(self.binary()) is not None

    def binary(self):
        return self.name.split("-")[0]

    def version(self):
        return first_line([self.binary(), "--version"])

    def env(self):
        return {}

    def stored(self):
        """What counts as stored: the repository, not caches that can be rebuilt."""
        return self.repo

    def init(self):
        """Commands that make an empty repository (not measured)."""
        return []

    def backup(self, disk, changes=None):
        raise NotImplementedError

    def restore(self, target, disk):
        """Command that brings the newest backup back, and the path of the file it makes."""
        raise NotImplementedError

    def verify(self):
        """Command that reads all that is stored and holds it against its digests; None where there is none."""
        return None


class Restic(Tool):
    name, label, setting = "restic", "restic", "default (`--compression auto`)"
    compression = "auto"

    def version(self):
        return first_line(["restic", "version"])

    def env(self):
        return {"RESTIC_PASSWORD": PASSWORD, "RESTIC_REPOSITORY": str(self.repo),
                "RESTIC_CACHE_DIR": str(self.cache)}

    def init(self):
        return [["restic", "init", "--repository-version", "2", "-q"]]

    def backup(self, disk, changes=None):
        return ["restic", "backup", "-q", "--compression", self.compression, str(disk.parent)]

    def restore(self, target, disk):
        return ["restic", "restore", "-q", "latest", "--target", str(target)], target / str(disk)[1:]

    def verify(self):
        return ["restic", "check", "-q", "--read-data"]


class ResticMax(Restic):
    name, label, setting, compression = "restic-max", "restic", "`--compression max`", "max"


class Rustic(Tool):
    name, label, setting = "rustic", "rustic", "default (zstd 3, rabin chunker)"
    options = ()

    def env(self):
        return {"RUSTIC_PASSWORD": PASSWORD, "RUSTIC_REPOSITORY": str(self.repo),
                "RUSTIC_CACHE_DIR": str(self.cache), "RUSTIC_NO_PROGRESS": "true", "RUSTIC_LOG_LEVEL": "warn"}

    def init(self):
        return [["rustic", "init", *self.options]]

    def backup(self, disk, changes=None):
        return ["rustic", "backup", str(disk.parent)]

    def restore(self, target, disk):
        return ["rustic", "restore", "--sparse", "by-content", "latest", str(target)], target / str(disk)[1:]

    def verify(self):
        return ["rustic", "check", "--read-data"]


class Rustic1(Rustic):
    name, label, setting = "rustic-1", "rustic", "`--set-compression 1`"
    options = ("--set-compression", "1")


class RusticFixed(Rustic):
    name, label, setting = "rustic-fixed", "rustic", "`--set-compression 1 --set-chunker fixed_size`"
    options = ("--set-compression", "1", "--set-chunker", "fixed_size")


class Borg(Tool):
    name, label, setting = "borg", "borg", "default (`--compression lz4`)"
    compression = "lz4"

    def env(self):
        return {"BORG_PASSPHRASE": PASSWORD, "BORG_REPO": str(self.repo), "BORG_BASE_DIR": str(self.cache),
                "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}

    def init(self):
        self.cache.mkdir(parents=True, exist_ok=True)
        return [["borg", "init", "--encryption=repokey-blake2"]]

    def backup(self, disk, changes=None):
        return ["borg", "create", "--compression", self.compression, "::{utcnow:%Y%m%dT%H%M%S%f}", str(disk.parent)]

    def restore(self, target, disk):
        script = 'cd "$1" && borg extract --sparse "::$(borg list --last 1 --short)"'
        return ["sh", "-c", script, "borg", str(target)], target / str(disk)[1:]

    def verify(self):
        return ["borg", "check", "--verify-data"]


class Borg1(Borg):
    name, label, setting, compression = "borg-zstd1", "borg", "`--compression zstd,1`", "zstd,1"


class Vmtide(Tool):
    name, label, setting = "vmtide", "vmtide", "default"
    options = ()
    takes_changes = True
    # 3 is done with a warning, such as a disk read in full for want of tracking.
    ok = (0, 3)

    def binary(self):
        return os.environ.get("VMTIDE_BIN") or str(ROOT / "target/release/vmtide")

    def env(self):
        return {"VMTIDE_PASSWORD": PASSWORD}

    def init(self):
        return [[self.binary(), "init", str(self.repo)]]

    def backup(self, disk, changes=None):
        command = [self.binary(), "backup", str(disk), "-r", str(self.repo), "--json", *self.options]
        return command + (["--changes", str(changes)] if changes else [])

    def restore(self, target, disk):
        file = target / "restored.raw"
        return [self.binary(), "restore", f"{disk.stem}@latest", "-r", str(self.repo), "--to", str(file)], file

    def verify(self):
        return [self.binary(), "verify", "--read-data", "-r", str(self.repo), "--json"]


class VmtideQuick(Vmtide):
    name, setting, options = "vmtide-quick", "`--compression=-1`", ("--compression=-1",)


class VmtideFast(Vmtide):
    name, setting, options = "vmtide-fast", "`--compression=-3`", ("--compression=-3",)


class VmtideFaster(Vmtide):
    """Stores about what borg's default (lz4) stores."""

    name, setting, options = "vmtide-faster", "`--compression=-4`", ("--compression=-4",)


class Vmtide1(Vmtide):
    name, setting, options = "vmtide-1", "`--compression 1`", ("--compression", "1")


class Vmtide2(Vmtide):
    name, setting, options = "vmtide-2", "`--compression 2`", ("--compression", "2")


class Zstd(Tool):
    """Compression alone, no deduplication, no encryption: what the same bytes cost at least."""

    dedups = False
    level = 1

    def __init__(self, work):
        self.name = f"zstd-{self.level}"
        super().__init__(work)
        self.label, self.setting = "zstd", f"`-{self.level} -T2` (yardstick)"

    def backup(self, disk, changes=None):
        return ["zstd", f"-{self.level}", "-T2", "-q", "-f", str(disk), "-o", str(self.repo / "disk.zst")]

    def restore(self, target, disk):
        file = target / "restored.raw"
        return ["zstd", "-d", "-q", "-f", "--sparse", str(self.repo / "disk.zst"), "-o", str(file)], file


class Zstd3(Zstd):
    level = 3


class Copier(Tool):
    """Copies the raw disk to a new sparse file: the floor for a restore."""

    def restore(self, target, disk):
        file = target / "restored.raw"
        return self.copy(str(disk), str(file)), file


class NbdcopyNbdkit(Copier):
    name, label, setting = "nbdcopy-nbdkit", "nbdcopy", "from `nbdkit file`"

    def binary(self):
        return "nbdcopy"

    def copy(self, disk, file):
        return ["nbdcopy", "--flush", "--", "[", "nbdkit", "--exit-with-parent", "-r", "file", disk, "]", file]


class NbdcopyQemu(Copier):
    name, label, setting = "nbdcopy-qemu", "nbdcopy", "from `qemu-nbd`"

    def binary(self):
        return "nbdcopy"

    def copy(self, disk, file):
        return ["nbdcopy", "--flush", "--", "[", "qemu-nbd", "-r", "-f", "raw", disk, "]", file]


class QemuImg(Copier):
    name, label, setting = "qemu-img", "qemu-img", "`convert` with defaults"

    def binary(self):
        return "qemu-img"

    def copy(self, disk, file):
        return ["qemu-img", "convert", "-f", "raw", "-O", "raw", disk, file]


BACKUP_TOOLS = [Vmtide, VmtideFaster, VmtideFast, VmtideQuick, Vmtide1, Vmtide2, Restic, Rustic, Rustic1, RusticFixed, Borg, Borg1, Zstd, Zstd3]
COPY_TOOLS = [NbdcopyNbdkit, NbdcopyQemu, QemuImg]
EXTRA_TOOLS = [ResticMax]
ALL_TOOLS = BACKUP_TOOLS + COPY_TOOLS + EXTRA_TOOLS
