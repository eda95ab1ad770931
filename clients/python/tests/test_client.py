"""The client and its command line against a stand-in of an agent."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import tempfile
import unittest
from pathlib import Path
from typing import Any, List, Tuple
from unittest import mock

from standin import DISK, KEY, KNOWN_ID, StandIn, make_certificate

import vmtide_rct
from vmtide_rct import cli, transport, zstd
from vmtide_rct.download import _requests
from vmtide_rct.model import Range, tidy

MIB = 1 << 20


def some_content(size: int) -> bytes:
    content = bytearray(random.Random(7).randbytes(size))
    content[size // 2 : size * 3 // 4] = bytes(size * 3 // 4 - size // 2)
    return bytes(content)


class WithAgent(unittest.TestCase):
    v1 = False

    @classmethod
    def setUpClass(cls) -> None:
        cls.keep = tempfile.TemporaryDirectory()
        cls.certificate, cls.key, cls.fingerprint = make_certificate(Path(cls.keep.name))

    @classmethod
    def tearDownClass(cls) -> None:
        cls.keep.cleanup()

    def setUp(self) -> None:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.content = some_content(4 * MIB + 512)
        self.agent = stack.enter_context(StandIn(self.certificate, self.key, self.content, self.v1))
        self.client = self.connect()
        stack.enter_context(mock.patch.object(transport, "_FIRST_WAIT", 0.001))

    def connect(self, **options: Any) -> vmtide_rct.AgentClient:
        options.setdefault("fingerprint", self.fingerprint)
        client = vmtide_rct.AgentClient(self.agent.url, options.pop("key", KEY), **options)
        self.addCleanup(client.close)
        return client

    def run_cli(self, *words: str, environment: Any = None) -> Tuple[int, List[Any], str]:
        out, err = io.StringIO(), io.StringIO()
        variables = {"VMTIDE_AGENT_KEY": KEY, "VMTIDE_AGENT_FINGERPRINT": self.fingerprint, **(environment or {})}
        arguments = ["--base-url", self.agent.url, "--remote-vhd-path", DISK, "--json", *words]
        with mock.patch.dict(os.environ, variables), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main(arguments)
            except SystemExit as exit_:
                code = int(exit_.code or 0)
        return code, [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


class TestContract(WithAgent):
    def test_what_a_disk_is(self) -> None:
        self.assertEqual(self.client.info(DISK), vmtide_rct.DiskInfo(len(self.content), None, 3, 3))
        self.assertEqual(self.client.tracking(DISK), vmtide_rct.TrackingState(True, False, KNOWN_ID))
        self.client.set_tracking(DISK, False)
        self.assertFalse(self.client.tracking(DISK).enabled)
        self.assertFalse(self.client.has_v1())
        self.assertIn("GET /vdisk/C%3A%5CVMs%5Ca%20b.vhdx/info", self.agent.requests)

    def test_content_of_ranges_in_the_order_given(self) -> None:
        ranges = [Range(MIB, 1000), Range(0, 3), Range(10, 0), Range(4 * MIB, 512)]
        expected = b"".join(self.content[r.offset : r.end] for r in ranges)
        self.assertEqual(b"".join(self.client.content(DISK, ranges)), expected)
        self.assertEqual(b"".join(self.client.content(DISK, ranges, position=1001)), expected[1001:])
        self.assertEqual(b"".join(self.client.content(DISK)), self.content)
        self.assertEqual(list(self.client.content(DISK, [])), [])

    def test_connections_that_break_go_on_where_they_broke_off(self) -> None:
        self.agent.cuts = [100_000, 0, 1, 2 * MIB]
        self.assertEqual(b"".join(self.client.content(DISK)), self.content)
        first = [body[0]["offset"] for body in self.agent.bodies]
        self.assertEqual(len(first), 5)
        self.assertEqual(first, sorted(first))
        self.assertGreater(first[-1], MIB)

    def test_failures_that_pass_are_tried_again_and_others_not(self) -> None:
        self.agent.statuses = [503, 429, 500]
        self.client.info(DISK)
        self.agent.requests.clear()
        self.agent.statuses = [500, 500, 500, 500]
        with self.assertRaises(vmtide_rct.RefusedError):
            self.client.info(DISK)
        self.assertEqual(len(self.agent.requests), 3)
        self.agent.statuses = []
        self.agent.requests.clear()
        with self.assertRaises(vmtide_rct.NotFoundError):
            self.client.info("D:\\none.vhdx")
        self.assertEqual(len(self.agent.requests), 1)

    def test_changes_are_tidy(self) -> None:
        size = len(self.content)
        self.agent.changes = [{"offset": size - 512, "length": 65536}, {"offset": 100, "length": 50}, {"offset": 0, "length": 101}]
        self.assertEqual(self.client.changes(DISK, KNOWN_ID), [Range(0, 150), Range(size - 512, 512)])

    def test_every_doubt_means_that_changes_are_not_known(self) -> None:
        for answer in (
            [{"offset": 1 << 40, "length": 1}],
            [{"offset": -1, "length": 1}],
            [{"offset": 1}],
            {"offset": 1, "length": 1},
            "[{",
            "",
            [{"offset": 5, "length": (1 << 64) - 1}],
            "[" * 100_000,
        ):
            self.agent.changes = answer
            with self.assertRaises(vmtide_rct.ChangesUnknownError, msg=str(answer)[:50]):
                self.client.changes(DISK, KNOWN_ID)
        with self.assertRaises(vmtide_rct.ChangesUnknownError):
            self.client.changes(DISK, "rctX:unknown")

    def test_only_the_expected_certificate(self) -> None:
        with self.assertRaises(vmtide_rct.CertificateError) as caught:
            self.connect(fingerprint="00" * 32).info(DISK)
        self.assertIn(self.fingerprint, str(caught.exception))
        self.assertEqual(self.agent.requests, [], "nothing may be sent to another host, the key least of all")
        with self.assertRaises(vmtide_rct.CertificateError):
            self.connect(fingerprint=None).info(DISK)
        self.connect(fingerprint=None, ca_file=str(self.certificate)).info(DISK)
        self.connect(fingerprint=None, insecure=True).info(DISK)
        colons = "SHA256 Fingerprint=" + ":".join(self.fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
        self.connect(fingerprint=colons).info(DISK)

    def test_a_wrong_key_is_denied_and_never_shown(self) -> None:
        for key in ("wrong-secret", None):
            with self.assertRaises(vmtide_rct.DeniedError) as caught:
                self.connect(key=key).info(DISK)
            self.assertNotIn("wrong-secret", str(caught.exception))
        with self.assertRaises(vmtide_rct.UsageError) as usage:
            self.connect(key="two words")
        self.assertNotIn("two words", str(usage.exception))

    def test_nobody_there(self) -> None:
        client = vmtide_rct.AgentClient("https://127.0.0.1:1", KEY, fingerprint="00" * 32, retry_time=0.01)
        with self.assertRaises(vmtide_rct.UnreachableError):
            client.info(DISK)


class TestDownload(WithAgent):
    def path(self, name: str) -> str:
        return str(self.directory / name)

    def test_a_full_disk_is_identical_and_sparse(self) -> None:
        target = self.path("web.raw")
        seen: List[int] = []
        summary = vmtide_rct.download_disk(
            self.client, DISK, target, max_bytes_per_request=MIB, progress=lambda done, total: seen.append(done)
        )
        self.assertEqual(Path(target).read_bytes(), self.content)
        self.assertEqual((summary.level, summary.tracking_id), ("full", KNOWN_ID))
        self.assertEqual((seen[0], seen[-1]), (0, len(self.content)))
        self.assertEqual(len(self.agent.bodies), 5)
        if os.name == "posix":
            self.assertLess(os.stat(target).st_blocks * 512, len(self.content) - MIB // 2)
        self.assertEqual(os.listdir(self.directory), ["web.raw"])

    def test_changes_bring_a_file_up_to_date(self) -> None:
        target = self.path("web.raw")
        vmtide_rct.download_disk(self.client, DISK, target)
        for offset, length in ((10, 5), (3 * MIB - 7, 70_000), (2 * MIB, 100)):
            self.agent.content[offset : offset + length] = bytes(length) if offset == 10 else b"\xa5" * length
        self.agent.changes = [{"offset": 0, "length": 65536}, {"offset": 2 * MIB - 65536, "length": 3 * 65536}]
        self.agent.changes += [{"offset": 3 * MIB - 65536, "length": 3 * 65536}]
        self.agent.cuts = [1000, 66_000]
        for at_once in (0, 100_000, 1 << 30):
            summary = vmtide_rct.download_disk(self.client, DISK, target, tracking_id=KNOWN_ID, max_bytes_per_request=at_once)
            self.assertEqual(Path(target).read_bytes(), bytes(self.agent.content))
            self.assertEqual((summary.level, summary.ranges, summary.received_bytes), ("incremental", 3, 7 * 65536))
        self.assertEqual(os.listdir(self.directory), ["web.raw"])

    def test_an_unknown_id_leaves_the_file_alone(self) -> None:
        target = self.path("web.raw")
        Path(target).write_bytes(b"what was there")
        with self.assertRaises(vmtide_rct.ChangesUnknownError):
            vmtide_rct.download_disk(self.client, DISK, target, tracking_id="rctX:gone")
        self.assertEqual(Path(target).read_bytes(), b"what was there")

    def test_what_is_not_complete_has_another_name_and_can_be_gone_on_with(self) -> None:
        target = self.path("web.raw")
        client = self.connect(retry_time=0.0)
        with mock.patch("vmtide_rct.download._CHECKPOINT", MIB):
            self.agent.cuts = [MIB, MIB, 1000]
            # The first two end on the boundaries of requests, the third inside of one.
            with mock.patch.object(transport, "_LONGEST_WAIT", 0.0), self.assertRaises(vmtide_rct.UnreachableError):
                vmtide_rct.download_disk(client, DISK, target, max_bytes_per_request=MIB)
        self.assertEqual(sorted(os.listdir(self.directory)), ["web.raw.partial", "web.raw.partial.json"])
        self.agent.bodies.clear()
        summary = vmtide_rct.download_disk(self.client, DISK, target, max_bytes_per_request=MIB, resume=True)
        self.assertEqual(Path(target).read_bytes(), self.content)
        self.assertEqual(summary.received_bytes, len(self.content) - 2 * MIB)
        self.assertEqual(summary.warnings, [])
        self.assertEqual(os.listdir(self.directory), ["web.raw"])

    def test_nobody_goes_on_with_a_disk_that_was_written(self) -> None:
        target = self.path("web.raw")
        self.agent.cuts = [MIB]
        with mock.patch("vmtide_rct.download._CHECKPOINT", 1), self.assertRaises(vmtide_rct.UnreachableError):
            vmtide_rct.download_disk(self.connect(retry_time=0.0), DISK, target, max_bytes_per_request=MIB + 5)
        self.agent.newer_changes = True
        summary = vmtide_rct.download_disk(self.client, DISK, target, resume=True)
        self.assertEqual(summary.received_bytes, len(self.content))

    def test_an_interrupted_incremental_can_only_be_repeated(self) -> None:
        target = self.path("web.raw")
        Path(target).write_bytes(self.content)
        self.agent.content[0:10] = b"0123456789"
        self.agent.cuts = [5]
        with self.assertRaises(vmtide_rct.UnreachableError):
            vmtide_rct.download_disk(self.connect(retry_time=0.0), DISK, target, tracking_id=KNOWN_ID)
        self.assertFalse(os.path.exists(target))
        vmtide_rct.download_disk(self.client, DISK, target, tracking_id=KNOWN_ID)
        self.assertEqual(Path(target).read_bytes(), bytes(self.agent.content))


class TestV1(WithAgent):
    v1 = True

    def test_changes_in_pages(self) -> None:
        size = len(self.content)
        self.agent.pages = [
            {"at": 0, "ranges": [{"offset": 0, "length": 10}], "next_cursor": 500, "disk_size_bytes": size},
            {"at": 500, "ranges": [], "next_cursor": 900, "disk_size_bytes": size},
            {"at": 900, "ranges": [{"offset": 900, "length": 10}], "next_cursor": None, "disk_size_bytes": size},
        ]
        self.assertEqual(self.client.changes(DISK, KNOWN_ID), [Range(0, 10), Range(900, 10)])
        for key, value in (("next_cursor", 500), ("disk_size_bytes", size + 1), ("ranges", None), ("next_cursor", "x")):
            with self.subTest(key=key, value=value), mock.patch.dict(self.agent.pages[1], {key: value}):
                with self.assertRaises(vmtide_rct.ChangesUnknownError):
                    self.client.changes(DISK, KNOWN_ID)

    def test_a_moment_stays_while_the_disk_goes_on(self) -> None:
        with self.client.freeze([DISK]) as moment:
            self.agent.content[0:100] = bytes(100)
            self.assertEqual(moment.disks, [vmtide_rct.FrozenDisk(DISK, len(self.content), "rctX:frozen")])
            self.agent.cuts = [5000]
            many = [Range(i * 4096, 4096) for i in range(200)]
            self.assertEqual(b"".join(moment.content(0, many)), self.content[: 200 * 4096])
            self.agent.cuts = [5000]
            self.assertEqual(b"".join(moment.content(0)), self.content)
        self.assertEqual(self.agent.frozen, {})

    def test_a_moment_by_the_command_line(self) -> None:
        target = self.directory / "web.raw"
        code, lines, _ = self.run_cli("--freeze", "--local-disk-path", str(target))
        self.assertEqual((code, lines[-1]["tracking_id"]), (0, "rctX:frozen"))
        self.assertEqual(target.read_bytes(), self.content)
        self.assertEqual(self.agent.frozen, {})


class TestCommandLine(WithAgent):
    def test_information_and_switching(self) -> None:
        code, lines, _ = self.run_cli("--show-rct-info")
        self.assertEqual((code, lines[-1]["info"]["virtual_size"]), (0, len(self.content)))
        self.assertEqual(lines[-1]["rct"]["most_recent_id"], KNOWN_ID)
        code, lines, _ = self.run_cli("--disable-rct")
        self.assertEqual((code, lines[-1]["rct"]["enabled"]), (0, False))
        code, lines, _ = self.run_cli("--enable-rct")
        self.assertEqual((code, lines[-1]["rct"]["enabled"]), (0, True))

    def test_downloads(self) -> None:
        target = self.directory / "web.raw"
        code, lines, _ = self.run_cli("--local-disk-path", str(target), "--max-bytes-per-request", "1000000")
        self.assertEqual((code, lines[-1]["type"], lines[-1]["level"]), (0, "summary", "full"))
        self.agent.content[5:9] = b"\0\1\0\1"
        code, lines, _ = self.run_cli("--local-disk-path", str(target), "--rct-id", KNOWN_ID)
        self.assertEqual((code, lines[-1]["received_bytes"]), (0, 65536))
        self.assertEqual(target.read_bytes(), bytes(self.agent.content))
        code, lines, _ = self.run_cli("--local-disk-path", str(self.directory / "new.raw"), "--rct-id", KNOWN_ID)
        self.assertEqual((code, lines[0]["type"]), (3, "warning"))
        code, lines, _ = self.run_cli("--list-changes", "--rct-id", KNOWN_ID)
        self.assertEqual((code, lines[-1]["changed_bytes"]), (0, 65536))

    def test_codes(self) -> None:
        for code, words, environment in (
            (4, ["--show-rct-info"], {"VMTIDE_AGENT_KEY": "wrong"}),
            (1, ["--show-rct-info"], {"VMTIDE_AGENT_FINGERPRINT": "11" * 32}),
            (2, ["--show-rct-info"], {"VMTIDE_AGENT_FINGERPRINT": "11"}),
            (2, ["--list-changes"], {}),
            (2, ["--show-rct-info", "--enable-rct"], {}),
            (2, [], {}),
            (6, ["--list-changes", "--rct-id", "rctX:gone"], {}),
            (6, ["--show-rct-info", "--remote-vhd-path", "D:\\none.vhdx"], {}),
            (6, ["--show-rct-info", "--auth-key-file", "/nonexistent/key"], {}),
            (1, ["--freeze", "--local-disk-path", "x"], {}),
        ):
            with self.subTest(words=words):
                ended, _, err = self.run_cli(*words, environment=environment)
                self.assertEqual(ended, code, err)

    def test_the_key_from_a_file(self) -> None:
        file = self.directory / "key"
        file.write_text(f"{KEY}\n")
        code, _, _ = self.run_cli("--show-rct-info", "--auth-key-file", str(file), environment={"VMTIDE_AGENT_KEY": "wrong"})
        self.assertEqual(code, 0)


class TestParts(unittest.TestCase):
    def test_requests_hold_no_more_than_they_may(self) -> None:
        ranges = [Range(0, 10), Range(20, 5), Range(100, 30)]
        for at_once in (1, 4, 10, 12, 45, 100):
            groups = list(_requests(ranges, at_once))
            self.assertTrue(all(0 < sum(p.length for p in group) <= at_once for group in groups))
            self.assertEqual(tidy([part for group in groups for part in group], 1000), ranges)
        self.assertEqual(list(_requests(ranges, 0)), [[part] for part in ranges])

    def test_addresses(self) -> None:
        for bad in ("http://host", "https://", "https://user@host", "https://host:x", "https://host?a"):
            with self.subTest(bad=bad), self.assertRaises(vmtide_rct.UsageError):
                vmtide_rct.AgentClient(bad)
        self.assertEqual(vmtide_rct.AgentClient("hv1:7000").agent, "https://hv1:7000")

    @unittest.skipUnless(zstd.is_available(), "this Python has no zstd (3.14, or the package zstandard)")
    def test_compressed_frames_one_after_the_other(self) -> None:
        module = zstd._module()
        pack = module.compress if hasattr(module, "compress") else module.ZstdCompressor().compress
        packed = pack(b"a" * 1000) + pack(b"b" * 500)
        decompressor = zstd.Decompressor()
        parts = [decompressor.feed(packed[i : i + 7]) for i in range(0, len(packed), 7)]
        self.assertEqual(b"".join(parts), b"a" * 1000 + b"b" * 500)
        self.assertTrue(decompressor.is_between_frames)


if __name__ == "__main__":
    unittest.main()
