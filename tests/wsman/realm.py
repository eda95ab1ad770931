"""A real Kerberos realm of MIT's programs in a directory: nothing of the system is changed.

Needs the packages krb5-kdc (the KDC), krb5-admin-server (kadmin.local) and krb5-user (kinit).
"""

import os
import random
import secrets
import socket
import subprocess
import time
from pathlib import Path

REALM = "STANDIN.TEST"
START_TIMEOUT_S = 30
# Tickets are this much longer good at the server than they say, in seconds; the default of 300 would keep tests waiting.
# Every login has to be checked within it.
CLOCK_SKEW_S = 5


def free_port():
    """A port that nothing uses, below those that connections are given: those may be taken before it is used."""
    for port in random.sample(range(21000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RuntimeError("no port is free")


class Realm:
    """A KDC on loopback with its database, and what clients and services need to use it."""

    def __init__(self, place):
        self.place = Path(place)
        self.place.mkdir(parents=True)
        self.config = self.place / "krb5.conf"
        self.port = free_port()
        self.config.write_text(
            "[libdefaults]\n"
            f"  default_realm = {REALM}\n"
            "  dns_lookup_kdc = false\n  dns_lookup_realm = false\n  dns_canonicalize_hostname = false\n  rdns = false\n"
            f"  udp_preference_limit = 1\n  clockskew = {CLOCK_SKEW_S}\n"
            f"[realms]\n  {REALM} = {{\n    kdc = 127.0.0.1:{self.port}\n  }}\n"
            f"[domain_realm]\n  .standin.test = {REALM}\n"
        )
        self.profile = self.place / "kdc.conf"
        self.profile.write_text(
            f"[kdcdefaults]\n  kdc_listen = 127.0.0.1:{self.port}\n  kdc_tcp_listen = 127.0.0.1:{self.port}\n"
            f"[realms]\n  {REALM} = {{\n"
            f"    database_name = {self.place}/principal\n    key_stash_file = {self.place}/stash\n"
            f"    acl_file = {self.place}/acl\n    max_life = 1h\n"
            "    supported_enctypes = aes256-cts-hmac-sha1-96:normal\n  }\n"
            f"[logging]\n  kdc = FILE:{self.place}/kdc.log\n"
        )
        self.environment = {
            **os.environ,
            "KRB5_CONFIG": str(self.config),
            "KRB5_KDC_PROFILE": str(self.profile),
            "KRB5CCNAME": f"FILE:{self.place}/tickets",
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }
        self.run("kdb5_util", "create", "-s", "-r", REALM, "-P", secrets.token_hex(16))
        self.kdc = subprocess.Popen(["krb5kdc", "-n", "-r", REALM], env=self.environment, stderr=subprocess.PIPE)
        self.wait()

    def run(self, *words, text=None, check=True):
        done = subprocess.run(
            words, env=self.environment, input=text, capture_output=True, text=True, check=False, timeout=60
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{words[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def wait(self):
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self.kdc.poll() is not None:
                raise RuntimeError(f"krb5kdc ended: {self.kdc.stderr.read().decode()}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("krb5kdc does not listen")

    def add_user(self, name, password):
        # The password goes in by standard input, twice.
        self.run("kadmin.local", "-r", REALM, "addprinc", f"{name}@{REALM}", text=f"{password}\n{password}\n")

    def add_service(self, principal, keytab):
        self.run("kadmin.local", "-r", REALM, "addprinc", "-randkey", f"{principal}@{REALM}")
        self.run("kadmin.local", "-r", REALM, "ktadd", "-k", str(keytab), f"{principal}@{REALM}")

    def login(self, name, password, life="1h"):
        """Gets a ticket into the default cache; the exit code and the words of kinit."""
        self.logout()
        return self.run("kinit", "-l", life, f"{name}@{REALM}", text=f"{password}\n", check=False)

    def logout(self):
        self.run("kdestroy", "-q", check=False)

    def stop(self):
        self.kdc.terminate()
        self.kdc.wait(timeout=30)
