"""A whole Bacula on loopback: director, storage daemon and file daemon of the distribution, with a catalogue of its own
in one SQLite file, run by whoever runs the test. Nothing of it outlives the test."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from lab.processes import TestFailure, kill, run, start, wait_until  # noqa: E402

SCHEMA = Path("/usr/share/dbconfig-common/data/bacula-director-sqlite3/install/sqlite3")
PASSWORD = "only-on-loopback"
# What a job can end as, in the catalogue.
GOOD, WARNINGS, FATAL, CANCELLED = "T", "W", "f", "A"
ENDED = "TWEfAeD"


def director_program():
    """The director: its package drags a mail server in, so it is unpacked and not installed (scripts/test.sh)."""
    places = [os.environ.get("BACULA_DIR", ""), str(Path.home() / ".cache/vmtide-tests/bacula/usr/sbin/bacula-dir"),
              "/usr/sbin/bacula-dir"]
    for place in places:
        if place and Path(place).exists():
            return place
    raise TestFailure("bacula-dir is missing (scripts/test.sh installs what the tests need)")


class Ended:
    """A job that has ended, as the catalogue and the job's report have it."""

    def __init__(self, bacula, row):
        self.id, self.name, self.level, self.status, self.errors, self.files, self.bytes = row
        self.report = bacula.report(self.id)

    def must_be(self, *statuses):
        if self.status not in statuses:
            raise TestFailure(f"job {self.id} ({self.name}) ended with {self.status}, not {statuses}:\n{self.report}")
        return self

    def must_say(self, *words):
        for word in words:
            if word not in self.report:
                raise TestFailure(f"job {self.id} ({self.name}) does not say {word!r}:\n{self.report}")
        return self


class Bacula:
    """The three daemons. Use in a `with` block."""

    def __init__(self, directory, plugin, backend, port):
        self.directory = directory
        self.port = port
        self.processes = {}
        self.environment = dict(os.environ, VMTIDE_BACULA_BACKEND=str(backend), RUST_BACKTRACE="1")
        self.environment["VMTIDE_STATE_DIR"] = str(directory / "state")
        for name in ("etc", "work/dir", "work/sd", "work/fd", "run", "vol", "restore", "plugins"):
            (directory / name).mkdir(parents=True)
        # A regular file: the daemon passes over links without a word.
        shutil.copy(plugin, directory / "plugins/vmtide-fd.so")
        self.resources = []
        # More directives of the pool.
        self.pool = ""
        with sqlite3.connect(self.catalogue) as catalogue:
            catalogue.executescript(SCHEMA.read_text())

    @property
    def catalogue(self):
        return self.directory / "work/dir/bacula.db"

    def add_fileset(self, name, lines, signature="MD5"):
        entries = "\n".join(f"  {line}" for line in lines)
        options = f"  Options {{ signature = {signature} }}\n" if signature else ""
        self.resources.append(f'FileSet {{ Name = "{name}"; Include {{\n{options}{entries}\n}} }}')

    def add_job(self, name, fileset, *more):
        extra = "".join(f"  {line}\n" for line in more)
        self.resources.append(
            f'Job {{ Name = "{name}"; Type = Backup; Level = Full; JobDefs = Defaults; FileSet = "{fileset}"\n{extra}}}'
        )

    def write_configuration(self):
        path, port = self.directory, self.port
        (path / "etc/query.sql").touch()
        (path / "etc/dir.conf").write_text(f"""\
Director {{ Name = t-dir; DIRport = {port}; DirAddress = 127.0.0.1; QueryFile = "{path}/etc/query.sql"
  WorkingDirectory = "{path}/work/dir"; PidDirectory = "{path}/run"; Maximum Concurrent Jobs = 10
  FD Connect Timeout = 10; SD Connect Timeout = 10; Password = "{PASSWORD}"; Messages = M }}
Catalog {{ Name = C; dbname = "bacula"; dbuser = "x"; dbpassword = "" }}
Messages {{ Name = M; append = "{path}/work/dir/bacula.log" = all, !skipped; catalog = all }}
Storage {{ Name = S; Address = 127.0.0.1; SDPort = {port + 1}; Password = "{PASSWORD}"; Device = D; Media Type = F
  Maximum Concurrent Jobs = 10 }}
Storage {{ Name = Tiny; Address = 127.0.0.1; SDPort = {port + 1}; Password = "{PASSWORD}"; Device = T; Media Type = T }}
Pool {{ Name = P; Pool Type = Backup; Label Format = "Vol-"; Maximum Volumes = 50; Recycle = no; AutoPrune = no
  {self.pool} }}
Pool {{ Name = TinyPool; Pool Type = Backup; Label Format = "Tiny-"; Maximum Volumes = 1
  Maximum Volume Bytes = 3000000
  Recycle = no; AutoPrune = no }}
Client {{ Name = t-fd; Address = 127.0.0.1; FDPort = {port + 2}; Catalog = C; Password = "{PASSWORD}"; AutoPrune = no
  Maximum Concurrent Jobs = 10 }}
Schedule {{ Name = Never }}
JobDefs {{ Name = Defaults; Type = Backup; Client = t-fd; Storage = S; Pool = P; Messages = M; Schedule = Never
  Accurate = yes; Maximum Concurrent Jobs = 5 }}
FileSet {{ Name = Nothing; Include {{ File = "{path}/etc/query.sql" }} }}
Job {{ Name = Restore; Type = Restore; Client = t-fd; Storage = S; Pool = P; FileSet = Nothing; Messages = M
  Where = "{path}/restore" }}
""" + "\n".join(self.resources) + "\n")
        device = 'Device Type = File; Archive Device = "{0}/vol"; LabelMedia = yes; Random Access = yes' \
                 "\n  AutomaticMount = yes; RemovableMedia = no; AlwaysOpen = no".format(path)
        (path / "etc/sd.conf").write_text(f"""\
Storage {{ Name = t-sd; SDPort = {port + 1}; SDAddress = 127.0.0.1; WorkingDirectory = "{path}/work/sd"
  Pid Directory = "{path}/run"; Maximum Concurrent Jobs = 10 }}
Director {{ Name = t-dir; Password = "{PASSWORD}" }}
Device {{ Name = D; Media Type = F; {device} }}
Device {{ Name = T; Media Type = T; {device} }}
Messages {{ Name = M; director = t-dir = all }}
""")
        (path / "etc/fd.conf").write_text(f"""\
FileDaemon {{ Name = t-fd; FDport = {port + 2}; FDAddress = 127.0.0.1; WorkingDirectory = "{path}/work/fd"
  Pid Directory = "{path}/run"; Plugin Directory = "{path}/plugins"; Maximum Concurrent Jobs = 10 }}
Director {{ Name = t-dir; Password = "{PASSWORD}" }}
Messages {{ Name = M; director = t-dir = all, !skipped, !restored }}
""")
        (path / "etc/bconsole.conf").write_text(
            f'Director {{ Name = t-dir; DIRport = {port}; Address = 127.0.0.1; Password = "{PASSWORD}" }}\n'
        )

    def start_daemon(self, name):
        programs = {"sd": "/usr/sbin/bacula-sd", "fd": "/usr/sbin/bacula-fd", "dir": director_program()}
        with open(self.directory / f"work/{name}.out", "ab") as out:
            self.processes[name] = start(
                [programs[name], "-f", "-c", self.directory / f"etc/{name}.conf"],
                stdout=out, stderr=subprocess.STDOUT, env=self.environment, cwd="/",
            )

    def __enter__(self):
        self.write_configuration()
        for name in ("sd", "fd", "dir"):
            self.start_daemon(name)
        wait_until("Bacula's director answers", self._answers, 180, 0.3)
        return self

    def _answers(self):
        for name, process in self.processes.items():
            if process.poll() is not None:
                text = (self.directory / f"work/{name}.out").read_text(errors="replace")
                raise TestFailure(f"bacula-{name} does not start: {text[-2000:]}")
        try:
            return "t-fd Version" in self.console("status client=t-fd", timeout_s=20)
        except (TestFailure, subprocess.TimeoutExpired):
            return False

    def __exit__(self, *_):
        for name in ("dir", "fd", "sd"):
            process = self.processes.get(name)
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                kill(process)

    def console(self, *lines, timeout_s=120):
        result = subprocess.run(
            ["/usr/sbin/bconsole", "-n", "-c", self.directory / "etc/bconsole.conf"],
            input="\n".join([*lines, "quit", ""]), capture_output=True, text=True, timeout=timeout_s, check=False,
        )
        if result.returncode != 0:
            raise TestFailure(f"bconsole ended with {result.returncode}: {result.stdout[-2000:]}{result.stderr}")
        return result.stdout

    def query(self, sql, *values):
        for _ in range(50):
            try:
                with sqlite3.connect(f"file:{self.catalogue}?mode=ro", uri=True, timeout=10) as catalogue:
                    return catalogue.execute(sql, values).fetchall()
            except sqlite3.OperationalError:
                time.sleep(0.1)  # the director writes
        raise TestFailure(f"the catalogue stays locked: {sql}")

    def report(self, job_id):
        return "".join(text for (text,) in self.query("select LogText from Log where JobId=? order by LogId", job_id))

    def begin(self, command):
        """Starts a job by a console command; returns its number."""
        output = self.console(command)
        for line in output.splitlines():
            if "Job queued. JobId=" in line:
                return int(line.split("JobId=")[1].split()[0])
        raise TestFailure(f"no job was queued by {command!r}:\n{output}")

    def finish(self, job_id, timeout_s=120):
        """Waits for a job's end."""
        sql = "select JobId, Name, Level, JobStatus, JobErrors, JobFiles, JobBytes from Job where JobId=?"

        def ended():
            rows = self.query(sql, job_id)
            # Its report is complete when its last line is in the catalogue.
            return rows and rows[0][3] in ENDED and "Termination:" in self.report(job_id) and rows
        try:
            rows = wait_until(f"the end of job {job_id}", ended, timeout_s, 0.1)
        except TestFailure as failure:
            raise TestFailure(f"{failure}\n{self.report(job_id)}\n{self.console('status client=t-fd')}") from None
        return Ended(self, rows[0])

    def run(self, job, level="Full", more="", timeout_s=120):
        return self.finish(self.begin(f"run job={job} level={level} {more} yes"), timeout_s)

    def restore(self, job_ids, more="", where=None):
        """Restores all files of these jobs."""
        numbers = ",".join(str(number) for number in job_ids)
        place = f" where={where}" if where else ""
        return self.finish(self.begin(f"restore client=t-fd jobid={numbers}{place} {more} all done yes"))

    def cancel(self, job_id):
        self.console(f"cancel jobid={job_id} yes")

    def files(self, job_id):
        """Path, delta number and size of everything a job has in the catalogue."""
        rows = self.query(
            "select Path || Filename, DeltaSeq from File join Path using (PathId) where JobId=? and FileIndex>0", job_id
        )
        return dict(rows)

    def assert_sound(self, when):
        """No daemon has crashed or lost memory."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise TestFailure(f"{when}: bacula-{name} has ended with {process.returncode}")
        for trace in (self.directory / "work").rglob("*.traceback"):
            raise TestFailure(f"{when}: a daemon crashed: {trace.read_text(errors='replace')[:2000]}")
        for name in self.processes:
            text = (self.directory / f"work/{name}.out").read_text(errors="replace")
            if "Orphaned buffer" in text:
                raise TestFailure(f"{when}: bacula-{name} lost memory: {text[-1000:]}")

    def backends(self):
        """The vmtide processes that run for this Bacula."""
        mark = f"VMTIDE_STATE_DIR={self.environment['VMTIDE_STATE_DIR']}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if not words[0].endswith((b"bacula-fd", b"bacula-sd", b"bacula-dir")):
                        found.append((int(entry.name), words))
            except OSError:
                continue  # ended meanwhile
        return found

    def assert_no_backends(self, when, timeout_s=30):
        wait_until(f"{when}: no process of vmtide is left, but {self.backends()}", lambda: not self.backends(), timeout_s)


def raw_compare(one, other):
    """Byte for byte, by size first."""
    run(["cmp", one, other])
    if os.path.getsize(one) != os.path.getsize(other):
        raise TestFailure(f"{one} and {other} have different sizes")
