"""A Ceph cluster of one of each: monitor, disk (BlueStore in a file) and S3 gateway, on loopback, from the distribution's packages.

Nothing of the system's own Ceph is read or changed: configuration, keys and data are in one directory. There is no manager
daemon; S3 needs none.
"""

import json
import os
import subprocess
import urllib.error
import urllib.request
import uuid

from .processes import TestFailure, free_port, kill, need_tools, run, start, wait_until

REGION = "us-east-1"
START_LIMIT_S = 120
# The file is sparse; what is written to it takes room.
DISK_BYTES = 16 << 30

CONFIGURATION = """[global]
fsid = {fsid}
mon_initial_members = a
mon_host = [v2:127.0.0.1:{port}/0]
public_addr = 127.0.0.1
keyring = {path}/keyring
run_dir = {path}/run
admin_socket = {path}/run/$name.$pid.asok
log_file = {path}/$name.log
mon_data = {path}/mon
mon_data_avail_warn = 1
mon_data_avail_crit = 0
osd_data = {path}/osd
osd_objectstore = bluestore
bluestore_block_size = {disk_bytes}
osd_memory_target = 939524096
# One disk: no second copy.
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
# Few groups, and nobody who would change their number.
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
auth_allow_insecure_global_id_reclaim = false
rgw_data = {path}/rgw
"""


class Account:
    """Keys of one user of the gateway."""

    def __init__(self, key_id, secret):
        self.key_id = key_id
        self.secret = secret


class Cluster:
    """The cluster; `with` starts and ends it. The gateway and the disk can be killed and started again."""

    def __init__(self, path):
        need_tools("ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "radosgw", "radosgw-admin")
        self.path = path
        self.port = free_port()
        self.processes = {}
        for name in ("mon", "osd", "run", "rgw"):
            (path / name).mkdir(parents=True)
        self.configuration = path / "ceph.conf"

    def __enter__(self):
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in ("radosgw", "ceph-osd", "ceph-mon"):
            self.kill(name)

    def _begin(self):
        fsid, disk, port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        self.configuration.write_text(
            CONFIGURATION.format(fsid=fsid, port=port, path=self.path, disk_bytes=DISK_BYTES), encoding="ascii"
        )
        keyring, everything = self.path / "keyring", ("--cap", "mgr", "allow *", "--cap", "osd", "allow *")
        self.tool("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self.tool("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *", *everything)
        self.tool("ceph-authtool", keyring, "--gen-key", "-n", "osd.0", "--cap", "mon", "allow profile osd", *everything)
        monitors = self.path / "monitors"
        self.tool("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{port}]", "--fsid", fsid, monitors)
        self.tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors, "--keyring", keyring)
        self._start("ceph-mon", "-i", "a")
        self.tool("ceph", "--connect-timeout", str(START_LIMIT_S), "osd", "new", disk)
        self.tool("ceph", "auth", "import", "-i", keyring)
        self.tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self.start_disk()
        self.start_gateway()

    def tool(self, *words):
        """A command of Ceph's, to its end; its output."""
        return run(words, timeout_s=START_LIMIT_S, env=self._environment()).stdout

    def start_disk(self):
        self._start("ceph-osd", "-i", "0")
        self._wait_for("ceph-osd", lambda: json.loads(self.tool("ceph", "osd", "stat", "--format", "json"))["num_up_osds"] == 1)

    def start_gateway(self):
        self._start("radosgw", "-n", "client.admin", "--rgw-frontends", f"beast endpoint=127.0.0.1:{self.port}")
        self._wait_for("radosgw", self._answers)

    def kill(self, name):
        """kill -9 of a daemon."""
        process = self.processes.pop(name, None)
        if process is not None:
            kill(process)

    def account(self, name, key_id=None, secret=None):
        """A new user, with these keys or keys that the gateway makes."""
        keys = ["--access-key", key_id, "--secret-key", secret] if key_id else []
        made = json.loads(self.tool("radosgw-admin", "user", "create", "--uid", name, "--display-name", name, *keys))
        return Account(made["keys"][0]["access_key"], made["keys"][0]["secret_key"])

    def access(self, account, secret=None):
        """The variables that lead to it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "VMTIDE_"))}
        return kept | {
            "AWS_ACCESS_KEY_ID": account.key_id,
            "AWS_SECRET_ACCESS_KEY": secret or account.secret,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": REGION,
        }

    def _environment(self):
        return os.environ | {"CEPH_CONF": str(self.configuration), "CEPH_ARGS": ""}

    def _start(self, program, *words):
        log = open(self.path / f"{program}.out", "ab")
        with log:
            command = [program, "-f", *words]
            self.processes[program] = start(command, env=self._environment(), stdout=log, stderr=subprocess.STDOUT)

    def _wait_for(self, program, condition):
        def done():
            if self.processes[program].poll() is not None:
                told = (self.path / f"{program}.out").read_text(errors="replace")
                raise TestFailure(f"{program} ends: {told[-2000:]}")
            return condition()

        wait_until(f"{program} to start", done, START_LIMIT_S, interval_s=0.3)

    def _answers(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False
