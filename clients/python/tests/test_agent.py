"""The client against the real agent: set VMTIDE_BIN to a vmtide executable (scripts/test.sh does)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
import unittest
from pathlib import Path

import vmtide_rct
from vmtide_rct import zstd
from vmtide_rct.model import Range

VMTIDE = os.environ.get("VMTIDE_BIN")
MIB = 1 << 20


@unittest.skipUnless(VMTIDE, "VMTIDE_BIN names no vmtide executable")
class TestAgent(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.keep = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.keep.cleanup)
        place = Path(cls.keep.name).resolve()
        (place / "disks").mkdir()
        environment = {**os.environ, "HOME": str(place), "XDG_CONFIG_HOME": str(place / "config")}
        environment.pop("VMTIDE_CONFIG", None)
        keys = ["--auth-key-file", str(place / "keys")]
        add = [str(VMTIDE), "agent", "key", "add", "test", *keys, "--to", str(place / "key")]
        subprocess.run(add, check=True, capture_output=True, env=environment)
        serve = [str(VMTIDE), "agent", "--json", "--listen", "127.0.0.1:0", "--root", str(place / "disks"), *keys]
        cls.process = subprocess.Popen(
            [*serve, "--state-dir", str(place / "state")], stdout=subprocess.PIPE, text=True, env=environment
        )
        cls.addClassCleanup(cls.process.stdout.close)
        cls.addClassCleanup(cls.process.wait)
        cls.addClassCleanup(cls.process.terminate)
        for line in cls.process.stdout:
            event = json.loads(line)
            if event["type"] == "listening":
                break
        else:
            raise RuntimeError("the agent ended")
        cls.place = place
        cls.url = event["url"]
        cls.fingerprint = event["fingerprint_sha256"]
        cls.certificate = event["certificate"]
        cls.auth_key = (place / "key").read_text().strip()

    def connect(self, **options: object) -> vmtide_rct.AgentClient:
        client = vmtide_rct.AgentClient(self.url, self.auth_key, **{"fingerprint": self.fingerprint, **options})
        self.addCleanup(client.close)
        return client

    def make(self, name: str) -> Path:
        content = bytearray(random.Random(name).randbytes(6 * MIB))
        content[2 * MIB : 4 * MIB] = bytes(2 * MIB)
        path = self.place / "disks" / name
        path.write_bytes(content)
        return path

    def test_full_then_incremental(self) -> None:
        disk = self.make("web.raw")
        client = self.connect()
        client.set_tracking(str(disk), True)
        target = self.place / "web.raw"
        with client.freeze([str(disk)]) as moment:
            full = vmtide_rct.download_disk(client, str(disk), str(target), moment=moment)
        self.assertEqual(target.read_bytes(), disk.read_bytes())
        self.assertIsNotNone(full.tracking_id)
        client.write(str(disk), 5 * MIB + 512, b"\xa5" * 70_000)
        changed = client.changes(str(disk), full.tracking_id)
        self.assertTrue(any(r.offset <= 5 * MIB + 512 < r.end for r in changed), changed)
        following = vmtide_rct.download_disk(client, str(disk), str(target), tracking_id=full.tracking_id)
        self.assertEqual(target.read_bytes(), disk.read_bytes())
        self.assertLess(following.received_bytes, MIB)
        with self.assertRaises(vmtide_rct.ChangesUnknownError):
            client.changes(str(disk), "rctX:00000000:0000:0000:0000:000000000000:00000009")

    def test_content_in_every_form(self) -> None:
        disk = self.make("form.raw")
        content = disk.read_bytes()
        ranges = [Range(5 * MIB, 1000), Range(0, 3 * MIB), Range(7, 1)]
        expected = b"".join(content[r.offset : r.end] for r in ranges)
        clients = [self.connect(), self.connect(fingerprint=None, ca_file=self.certificate)]
        if zstd.is_available():
            clients.append(self.connect(compress=True))
        for client in clients:
            self.assertEqual(b"".join(client.content(str(disk), ranges)), expected)
            self.assertEqual(b"".join(client.content(str(disk), ranges, position=2000)), expected[2000:])
            with client.freeze([str(disk)]) as moment:
                self.assertEqual(b"".join(moment.content(0)), content)
                self.assertEqual(b"".join(moment.content(0, ranges, position=MIB)), expected[MIB:])
                moment.renew()

    def test_making_and_refusing(self) -> None:
        client = self.connect()
        path = str(self.place / "disks" / "new.vhdx")
        client.create(path, "vhdx", 8 * MIB)
        self.assertEqual((client.info(path).virtual_size, client.info(path).virtual_storage_type), (8 * MIB, 3))
        self.assertEqual(client.details(path)["format"], "vhdx")
        with self.assertRaises(vmtide_rct.RefusedError):
            client.create(path, "vhdx", 8 * MIB)
        with self.assertRaises(vmtide_rct.NotFoundError):
            client.info("/etc/passwd")
        wrong = vmtide_rct.AgentClient(self.url, "wrong", fingerprint=self.fingerprint)
        self.addCleanup(wrong.close)
        with self.assertRaises(vmtide_rct.DeniedError):
            wrong.info(path)


if __name__ == "__main__":
    unittest.main()
