"""A stand-in for an agent: the interface of rct-service and a part of /v1 over a disk in memory, with faults that can be
switched on. Only for tests."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "a-key-for-tests"
KNOWN_ID = "rctX:5f0c1b2a:4d3e:4f5a:8b6c:7d8e9f0a1b2c:00000001"
DISK = "C:\\VMs\\a b.vhdx"


def make_certificate(directory: Path) -> Tuple[Path, Path, str]:
    """A certificate, its key, and its fingerprint."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-x509", "-nodes", "-days", "2"]
            + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
            + ["-keyout", str(key), "-out", str(certificate)],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError as error:
        raise RuntimeError("these tests need openssl: install it (scripts/test.sh does)") from error
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
    return certificate, key, hashlib.sha256(der).hexdigest()


class StandIn:
    """The agent. Use it in a ``with`` statement."""

    def __init__(self, certificate: Path, key: Path, content: bytes, v1: bool = False) -> None:
        self.content = bytearray(content)
        self.v1 = v1
        self.enabled = True
        self.newer_changes = False
        #: What /changes answers; a text is sent as it is.
        self.changes: Any = [{"offset": 0, "length": 65536}]
        #: The pages of /v1's changes.
        self.pages: List[Dict[str, Any]] = []
        #: Connections are cut after so many bytes of content; each time one is taken out.
        self.cuts: List[int] = []
        #: Statuses that are answered before anything else; each time one is taken out.
        self.statuses: List[int] = []
        #: The last header of keys, and all requests.
        self.requests: List[str] = []
        self.bodies: List[Any] = []
        self.frozen: Dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "StandIn":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type:
        agent = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    pass

            def do_GET(self) -> None:
                agent._answer(self, None)

            do_DELETE = do_GET

            def do_POST(self) -> None:
                agent._answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_PUT = do_POST

        return Handler

    @staticmethod
    def _send(handler: Any, status: int, body: bytes, kind: str = "application/json") -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _json(self, handler: Any, document: Any, status: int = 200) -> None:
        self._send(handler, status, document.encode() if isinstance(document, str) else json.dumps(document).encode())

    def _answer(self, handler: Any, body: Optional[bytes]) -> None:
        self.requests.append(f"{handler.command} {handler.path}")
        if self.statuses:
            return self._send(handler, self.statuses.pop(0), b"")
        if handler.headers.get("auth_key") != KEY:
            return self._send(handler, 401, b"<!DOCTYPE html>")
        parts = urlsplit(handler.path)
        if parts.path.startswith("/v1") and self.v1:
            return self._answer_v1(handler, parts.path, parse_qs(parts.query), body)
        match = re.fullmatch(r"/vdisk/([^/]+)/(info|rct|rct/([^/]+)/changes|content)", parts.path)
        if not match:
            return self._send(handler, 404, b"<!DOCTYPE html>")
        path, what = unquote(match[1]), match[2]
        if path != DISK:
            return self._send(handler, 404, f"Bad vdisk path: {path}".encode(), "text/plain")
        if what == "info":
            info = {"virtual_size": len(self.content), "parent_path": None, "virtual_storage_type": 3, "provider_sub_type": 3}
            return self._json(handler, info)
        if what == "rct" and handler.command == "PUT":
            self.enabled = parse_qs(parts.query)["enabled"] == ["true"]
            return self._send(handler, 200, b"")
        if what == "rct":
            state = {"enabled": self.enabled, "newer_changes": self.newer_changes, "most_recent_id": KNOWN_ID}
            return self._json(handler, state)
        if what == "content":
            self.bodies.append(json.loads(body or b"null"))
            return self._stream(handler, bytes(self.content), self.bodies[-1], 0)
        if unquote(match[3]) != KNOWN_ID:
            return self._send(handler, 404, b"RCT ID not found", "text/plain")
        return self._json(handler, self.changes)

    def _stream(self, handler: Any, content: bytes, ranges: List[Dict[str, int]], position: int) -> None:
        data = b"".join(content[r["offset"] : r["offset"] + r["length"]] for r in ranges)[position:]
        handler.send_response(200)
        handler.send_header("Content-Type", "application/octet-stream")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if self.cuts:
            cut = self.cuts.pop(0)
            handler.wfile.write(data[:cut])
            handler.wfile.flush()
            handler.connection.close()
            handler.close_connection = True
            return
        handler.wfile.write(data)

    def _answer_v1(self, handler: Any, path: str, query: Dict[str, List[str]], body: Optional[bytes]) -> None:
        if path == "/v1":
            return self._json(handler, {"version": "stand-in"})
        if path == "/v1/freezes":
            self.frozen["f1"] = bytes(self.content)
            disks = [
                {"index": i, "path": p, "size_bytes": len(self.content), "tracking_id": "rctX:frozen"}
                for i, p in enumerate(json.loads(body or b"{}")["disks"])
            ]
            return self._json(handler, {"id": "f1", "ttl_seconds": 600, "disks": disks}, 201)
        if path == "/v1/freezes/f1" and handler.command == "DELETE":
            del self.frozen["f1"]
            return self._send(handler, 204, b"")
        if path.endswith("/changes"):
            cursor = int(query.get("cursor", ["0"])[0])
            page = next(p for p in self.pages if p.get("at", 0) == cursor)
            return self._json(handler, page)
        if path == "/v1/freezes/f1/disks/0/content":
            listed = query.get("ranges")
            if listed:
                ranges = [dict(zip(("offset", "length"), map(int, r.split(":")))) for r in listed[0].split(",")]
            else:
                ranges = json.loads(body or b"[]")
            return self._stream(handler, self.frozen["f1"], ranges, int(query.get("from", ["0"])[0]))
        return self._send(handler, 404, b'{"error":{"code":"not_found","message":"no such route"}}')
