#!/usr/bin/env python3
"""The contract of the agent, checked from outside: every endpoint, every error, every way to write a path.

The same matrix runs against every build of the agent, on every platform. It needs nothing but Python's standard
library, and nothing of vmtide's own code. The agent runs already; what it serves is told by the environment:

VMTIDE_TEST_AGENT_URL        https://HOST:PORT
VMTIDE_TEST_AGENT_KEY        a read-write key
VMTIDE_TEST_AGENT_READ_KEY   a read-only key
VMTIDE_TEST_AGENT_CERT       the agent's certificate (PEM); without it the connection is not verified
VMTIDE_TEST_AGENT_DISKS      a JSON file that tells what is where:

{"platform": "unix" or "windows",
 "root": the served directory, as clients write it, without a slash at its end,
 "outside": a disk outside of it, which is there,
 "broken": a file in it that is no disk although its name and first bytes say so,
 "disks": [{"path": as clients write it, "content": a raw file with what it holds, on this host,
            "virtual_storage_type": …, "provider_sub_type": …, "parent_path": null or what info shall say}],
 "writable": a path of one of the disks that may be changed, or null: change tracking is tried on it,
 "strangers": differencing disks in it whose parents are outside of it: files, shares, devices}

    python3 tests/agent/matrix.py [WORD…]      only the checks whose names hold a WORD

The last line is `test result: ok. N passed; M failed`, and the exit code 1 when anything failed.
"""

import http.client
import json
import os
import random
import socket
import ssl
import sys
import threading
import time
import traceback
from urllib.parse import quote, urlsplit

# What the HTTP library of rct-service's Python client leaves unescaped in a path.
REQUESTS_SAFE = "!#$%&'()*+,/:;=?@[]~"
TIMEOUT_S = float(os.environ.get("VMTIDE_TEST_AGENT_TIMEOUT_S", "60"))


class Failed(Exception):
    """A check that found something else than it wanted."""


def want(condition, text):
    if not condition:
        raise Failed(text)


class Answer:
    """The answer to one request."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def text(self):
        return self.body.decode(errors="replace")

    def json(self):
        want(self.headers.get("content-type") == "application/json", f"type {self.headers.get('content-type')}")
        return json.loads(self.body)

    def must(self, status):
        want(self.status == status, f"status {self.status} instead of {status}: {self.text()[:200]}")
        return self


class Agent:
    """The agent under test. Requests go out byte for byte as they are given here."""

    def __init__(self, url, key, read_key, cert):
        parts = urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.key = key
        self.read_key = read_key
        self.cert = cert
        self.usual = self.context()

    def context(self):
        if self.cert:
            return ssl.create_default_context(cafile=self.cert)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def connect(self, context=None):
        plain = socket.create_connection(self.address, timeout=TIMEOUT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return (context or self.usual).wrap_socket(plain, server_hostname=self.address[0])

    def head(self, method, target, headers, close=True):
        lines = [f"{method} ".encode() + target + b" HTTP/1.1", b"Host: agent"]
        if close:
            lines.append(b"Connection: close")
        for name, value in headers:
            lines.append(f"{name}: {value}".encode("latin-1"))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def send(self, connection, method, target, headers=(), body=b"", close=True):
        """One request over an open connection."""
        target = target if isinstance(target, bytes) else target.encode()
        headers = list(headers)
        if body or method in ("POST", "PUT"):
            headers.append(("Content-Length", str(len(body))))
        connection.sendall(self.head(method, target, headers, close) + body)
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        return Answer(response)

    def ask(self, method, target, headers=None, body=b"", key=""):
        """One request over a connection of its own. `key`: '' for the read-write one, None for no key."""
        sent = [] if key is None else [("auth_key", key or self.key)]
        with self.connect() as connection:
            return self.send(connection, method, target, sent + list(headers or []), body)


def as_requests(path):
    """A path as the client of rct-service puts it on the wire."""
    return quote(path, safe=REQUESTS_SAFE)


def target(path, verb):
    return f"/vdisk/{as_requests(path)}/{verb}"


def pattern(content, ranges):
    with open(content, "rb") as file:
        out = b""
        for offset, length in ranges:
            file.seek(offset)
            out += file.read(length)
        return out


class Matrix:
    """The checks; every method whose name begins with check_ is one, or yields several."""

    def __init__(self, agent, fixture):
        self.agent = agent
        self.fixture = fixture
        self.disks = fixture["disks"]
        self.disk = fixture["disks"][0]
        self.windows = fixture["platform"] == "windows"

    # What a disk is.

    def check_info(self):
        for disk in self.disks:
            yield f"info of {disk['path']}", lambda disk=disk: self.info(disk)

    def info(self, disk):
        answer = self.agent.ask("GET", target(disk["path"], "info")).must(200)
        size = os.path.getsize(disk["content"])
        expected = {
            "virtual_size": size,
            "parent_path": disk["parent_path"],
            "virtual_storage_type": disk["virtual_storage_type"],
            "provider_sub_type": disk["provider_sub_type"],
        }
        want(answer.json() == expected, f"{answer.text()} instead of {expected}")
        # Names, order and the lack of spaces, too.
        text = json.dumps(expected, separators=(",", ":"), ensure_ascii=False)
        want(answer.text() == text, f"{answer.text()} instead of {text}")
        want(answer.headers.get("content-length") == str(len(answer.body)), "the length is missing")

    def spellings(self):
        path = self.disk["path"]
        everything = quote(path, safe="")
        found = [
            as_requests(path),
            everything,
            "".join(f"%{byte:02X}" for byte in path.encode()),
            "".join(f"%{byte:02x}" for byte in path.encode()),
            as_requests(path) + "/",
        ]
        if self.windows:
            plain = path.replace(" ", "%20")
            slashes = plain.replace("\\", "/")
            found += [plain, slashes, "/" + slashes, quote(path.replace("\\", "/"), safe=""), plain.replace("\\", "\\\\"), plain.upper(), plain.lower()]
        else:
            sent = as_requests(path)
            found += [sent.lstrip("/"), "/" + sent, sent.replace("/", "//"), "%2F" + sent[1:], "%2f" + sent[1:]]
        return found

    def check_spellings(self):
        for number, spelled in enumerate(self.spellings()):
            yield f"path spelled {number}: {spelled[:60]}", lambda s=spelled: self.spelled(s)

    def spelled(self, spelled):
        answer = self.agent.ask("GET", f"/vdisk/{spelled}/info").must(200)
        want(answer.json()["virtual_size"] == os.path.getsize(self.disk["content"]), answer.text())
        self.agent.ask("GET", f"/vdisk/{spelled}/info/").must(200)
        self.agent.ask("GET", f"/vdisk/{spelled}/rct").must(200)
        data = self.agent.ask("GET", f"/vdisk/{spelled}/content?ranges=0:512").must(200).body
        want(data == pattern(self.disk["content"], [(0, 512)]), "other bytes")

    # Keys.

    def endpoints(self):
        path = self.disk["path"]
        return [
            ("GET", target(path, "info"), b""),
            ("GET", target(path, "rct"), b""),
            ("PUT", target(path, "rct") + "?enabled=false", b""),
            ("GET", target(path, "rct/rctX:0:0:0:0:0:00000001/changes"), b""),
            ("GET", target(path, "content") + "?ranges=0:512", b""),
            ("POST", target(path, "content"), b'[{"offset":0,"length":512}]'),
            ("GET", target(path + ".missing", "info"), b""),
            ("GET", target(self.fixture["outside"], "info"), b""),
        ]

    def check_keys(self):
        key = self.agent.key
        wrong = {
            "none": [],
            "empty": [("auth_key", "")],
            "another": [("auth_key", "swordfish")],
            "longer": [("auth_key", key + "x")],
            "shorter": [("auth_key", key[:-1])],
            "other case": [("auth_key", key.swapcase())],
            "huge": [("auth_key", "x" * 20000)],
            "bearer, another": [("Authorization", "Bearer swordfish")],
            "bearer, empty": [("Authorization", "Bearer ")],
            "basic": [("Authorization", "Basic " + key)],
            "no scheme": [("Authorization", key)],
            "in the query": [],
            "not ASCII": [("auth_key", "sch\xf6n")],
        }
        for name, headers in wrong.items():
            yield f"key: {name}", lambda n=name, h=headers: self.refused(h, "?auth_key=" + key if n == "in the query" else "")
        yield "key: header auth_key", lambda: self.accepted([("auth_key", key)])
        yield "key: header AUTH_KEY", lambda: self.accepted([("AUTH_KEY", key)])
        yield "key: bearer", lambda: self.accepted([("Authorization", "Bearer " + key)])
        yield "key: bearer in small letters", lambda: self.accepted([("authorization", "bearer " + key)])
        yield "key: the read-only one reads", self.read_only_reads
        yield "key: the read-only one changes nothing", self.read_only_changes_nothing

    def refused(self, headers, query):
        for method, where, body in self.endpoints():
            sent = headers + ([("Content-Type", "application/json")] if body else [])
            where += query if "?" not in where else query.replace("?", "&")
            answer = self.agent.ask(method, where, sent, body, key=None)
            want(answer.status == 401, f"{method} {where}: {answer.status}")
            want(b"virtual_size" not in answer.body and len(answer.body) < 512, f"{method} {where}: {answer.body[:80]}")

    def accepted(self, headers):
        self.agent.ask("GET", target(self.disk["path"], "info"), headers, key=None).must(200)

    def read_only_reads(self):
        key = self.agent.read_key
        self.agent.ask("GET", target(self.disk["path"], "info"), key=key).must(200)
        self.agent.ask("GET", target(self.disk["path"], "content") + "?ranges=0:512", key=key).must(200)

    def read_only_changes_nothing(self):
        before = self.agent.ask("GET", target(self.disk["path"], "rct")).must(200).json()
        for value in ("true", "false"):
            self.agent.ask("PUT", target(self.disk["path"], "rct") + f"?enabled={value}", key=self.agent.read_key).must(403)
        want(self.agent.ask("GET", target(self.disk["path"], "rct")).json() == before, "tracking was changed")

    # Errors of rct-service.

    def check_errors(self):
        path = self.disk["path"]
        missing = path + ".missing"
        nowhere = self.fixture["root"] + ("\\no\\such\\a.vhdx" if self.windows else "/no/such/a.vhdx")
        for bad in (missing, nowhere, self.fixture["outside"]):
            for method, verb, body in (
                ("GET", "info", b""),
                ("GET", "rct", b""),
                ("PUT", "rct?enabled=true", b""),
                ("GET", "rct/rctX:0:0:0:0:0:00000001/changes", b""),
                ("GET", "content?ranges=0:512", b""),
                ("POST", "content", b'[{"offset":0,"length":512}]'),
            ):
                yield f"404: {method} {verb} of {bad[-24:]}", lambda b=bad, m=method, v=verb, d=body: self.bad_path(b, m, v, d)
        for what in (
            ("GET", "/"), ("GET", "/vdisk"), ("GET", "/vdisk/"), ("GET", "/vdisk/info"), ("GET", "/nothing"),
            ("GET", target(path, "")), ("GET", target(path, "inf")), ("GET", target(path, "changes")),
            ("GET", target(path, "rct/changes")), ("GET", target(path, "INFO")),
            ("GET", target(path, "content")), ("GET", target(path, "content?range=0:512")),
            ("POST", target(path, "info")), ("DELETE", target(path, "rct")), ("PUT", target(path, "info")),
            ("PATCH", target(path, "content")), ("PUT", target(path, "rct")), ("PUT", target(path, "rct?enabled")),
            ("PUT", target(path, "rct?enabled=maybe")), ("PUT", target(path, "rct?enabled=TRUE")),
            ("PUT", target(path, "rct?enable=true")), ("POST", target(path, "rct?enabled=true")),
        ):
            yield f"404: {what[0]} {what[1][-40:]}", lambda w=what: self.agent.ask(w[0], w[1]).must(404)
        for name, kind in (("form", "application/x-www-form-urlencoded"), ("text", "text/plain"), ("none", None)):
            yield f"404: POST content of type {name}", lambda k=kind: self.wrong_type(k)
        yield "404: unknown id", self.unknown_id
        yield "an error has one line of text", self.one_line

    def bad_path(self, bad, method, verb, body):
        sent = [("Content-Type", "application/json")] if body else []
        answer = self.agent.ask(method, target(bad, verb), sent, body).must(404)
        want(answer.text() == f"Bad vdisk path: {bad}", answer.text())

    def wrong_type(self, kind):
        sent = [("Content-Type", kind)] if kind else []
        self.agent.ask("POST", target(self.disk["path"], "content"), sent, b'[{"offset":0,"length":512}]').must(404)

    def unknown_id(self):
        for bad in ("rctX:00000000:0000:0000:0000:000000000000:00000001", "x", "%00", "%C3%A4", "y" * 255, "y" * 5000, "a%2Fb"):
            answer = self.agent.ask("GET", target(self.disk["path"], "rct/") + bad + "/changes").must(404)
            want(answer.text().startswith("RCT ID not found: "), answer.text()[:80])

    def one_line(self):
        answer = self.agent.ask("GET", target(self.fixture["broken"], "info"))
        want(400 <= answer.status < 600, f"status {answer.status}")
        want("\n" not in answer.text().strip() and len(answer.body) < 2000, answer.text())

    def check_ranges(self):
        size = os.path.getsize(self.disk["content"])
        for text in ("", "a", "0", "0:", ":1", "0:1:2", "0:1,", ",0:1", "-1:1", "+0:1", "0x0:1", "0:1;2:3", "18446744073709551616:1", "0 :1", "%00"):
            yield f"400: ranges={text}", lambda t=text: self.agent.ask("GET", target(self.disk["path"], "content") + "?ranges=" + quote(t, safe=":,;%+")).must(400)
        for offset, length in ((size, 1), (size - 1, 2), (0, size + 1), (1 << 63, 512), ((1 << 64) - 1, 1), ((1 << 64) - 1, (1 << 64) - 1)):
            yield f"416: {offset}:{length}", lambda o=offset, n=length: self.outside_disk(o, n)
        for status, body in (
            (400, b""), (400, b"["), (400, b'[{"offset":0,"length":1}'), (400, b'[{"offset":0,"length":1},]'), (400, b"\xff"), (400, b"?"),
            (422, b"{}"), (422, b"null"), (422, b"[1]"), (422, b'[{"offset":0}]'), (422, b'[{"length":1}]'),
            (422, b'[{"offset":-1,"length":1}]'), (422, b'[{"offset":"0","length":1}]'), (422, b'[{"offset":0.5,"length":1}]'),
            (422, b'[{"offset":18446744073709551616,"length":1}]'), (422, b'{"offset":0,"length":1}'),
        ):
            yield f"{status}: POST {body[:40]!r}", lambda s=status, b=body: self.post(b).must(s)

    def post(self, body, kind="application/json"):
        return self.agent.ask("POST", target(self.disk["path"], "content"), [("Content-Type", kind)], body)

    def outside_disk(self, offset, length):
        where = target(self.disk["path"], "content") + f"?ranges={offset}:{length}"
        self.agent.ask("GET", where).must(416)
        self.agent.ask("GET", target(self.disk["path"], "content") + f"?ranges=0:512,{offset}:{length}").must(416)
        self.post(json.dumps([{"offset": offset, "length": length}]).encode()).must(416)

    # Content.

    def check_content(self):
        for disk in self.disks:
            size = os.path.getsize(disk["content"])
            lists = {
                "all of it": [(0, size)],
                "its beginning": [(0, 512)],
                "its last byte": [(size - 1, 1)],
                "nothing of it": [(0, 0)],
                "nothing at its end": [(size, 0)],
                "two neighbours": [(0, 65536), (65536, 65536)],
                "backwards": [(65536, 512), (0, 512)],
                "the same twice": [(4096, 4096), (4096, 4096)],
                "overlapping": [(0, 8192), (4096, 8192)],
                "unaligned": [(1, 1), (513, 1023), (65535, 2), (size // 2 + 1, 100001 if size // 2 > 100002 else 1)],
                "with empty ones": [(0, 0), (512, 512), (7, 0), (9, 1)],
                "many": self.many(size, 400),
            }
            for name, ranges in lists.items():
                yield f"content of {os.path.basename(disk['content'])}: {name}", lambda d=disk, r=ranges: self.content(d, r)
        yield "content: an empty list", self.empty_list
        yield "content: other members, spaces, a charset", self.loose_json
        yield "content: ranges escaped in the query", self.escaped_ranges
        yield "content: 20,000 ranges", lambda: self.content(self.disk, self.many(os.path.getsize(self.disk["content"]), 20000), get=False)
        yield "content: in chunks that the client sends", self.chunked_request
        yield "content: sixteen clients at once", self.at_once

    def many(self, size, count):
        numbers = random.Random(count)
        return [(offset, min(numbers.randrange(0, 700), size - offset)) for offset in (numbers.randrange(0, size) for _ in range(count))]

    def content(self, disk, ranges, get=True):
        expected = pattern(disk["content"], ranges)
        body = json.dumps([{"offset": o, "length": n} for o, n in ranges]).encode()
        answer = self.agent.ask("POST", target(disk["path"], "content"), [("Content-Type", "application/json")], body)
        self.same(answer, expected)
        if get:
            where = target(disk["path"], "content") + "?ranges=" + ",".join(f"{o}:{n}" for o, n in ranges)
            self.same(self.agent.ask("GET", where), expected)
            answer = self.agent.ask("HEAD", where).must(200)
            want(answer.headers.get("content-length") == str(len(expected)), "HEAD has another length")

    def same(self, answer, expected):
        answer.must(200)
        want(answer.headers.get("content-type") == "application/octet-stream", f"type {answer.headers.get('content-type')}")
        want(answer.headers.get("content-length") == str(len(expected)), f"length {answer.headers.get('content-length')} instead of {len(expected)}")
        want(answer.headers.get("content-encoding") is None, "compressed, and nobody asked for it")
        want(answer.body == expected, f"other bytes, from {first_difference(answer.body, expected)} on")

    def empty_list(self):
        self.same(self.post(b"[]"), b"")
        self.same(self.post(b" [ ] \n"), b"")

    def loose_json(self):
        body = b' [ { "length" : 512 , "note" : "x" , "offset" : 1024 } ]\n'
        self.same(self.post(body, "application/json; charset=utf-8"), pattern(self.disk["content"], [(1024, 512)]))
        self.same(self.post(body, "Application/JSON"), pattern(self.disk["content"], [(1024, 512)]))

    def escaped_ranges(self):
        where = target(self.disk["path"], "content") + "?x=1&ranges=0%3A512%2C1024%3A1&y"
        self.same(self.agent.ask("GET", where), pattern(self.disk["content"], [(0, 512), (1024, 1)]))

    def chunked_request(self):
        with self.agent.connect() as connection:
            headers = [("auth_key", self.agent.key), ("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
            connection.sendall(self.agent.head("POST", target(self.disk["path"], "content").encode(), headers))
            for piece in (b'[{"offs', b'et":512,"le', b'ngth":5', b"12}]"):
                connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                time.sleep(0.01)
            connection.sendall(b"0\r\n\r\n")
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            self.same(Answer(response), pattern(self.disk["content"], [(512, 512)]))

    def at_once(self):
        failures = []

        def client(number):
            try:
                size = os.path.getsize(self.disk["content"])
                for round_number in range(3):
                    self.content(self.disk, self.many(size, 20 + number * 3 + round_number))
            except Exception as error:  # pylint: disable=broad-except
                failures.append(f"client {number}: {error}")

        threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        want(not failures, "; ".join(failures[:3]))

    # HTTP.

    def check_http(self):
        yield "HEAD of JSON", self.head
        yield "several requests over one connection", self.keep_alive
        yield "HTTP/1.0", self.old_http
        yield "a client that goes away in the middle", self.goes_away
        yield "TLS 1.2 is refused", self.no_tls12
        yield "plain HTTP is refused", self.no_plain
        yield "garbage instead of HTTP", self.garbage
        yield "the certificate holds", self.certificate

    def head(self):
        for verb in ("info", "rct"):
            full = self.agent.ask("GET", target(self.disk["path"], verb)).must(200)
            head = self.agent.ask("HEAD", target(self.disk["path"], verb)).must(200)
            want(head.body == b"" and head.headers.get("content-length") == str(len(full.body)), "HEAD differs")
        self.agent.ask("HEAD", target(self.disk["path"] + ".missing", "info")).must(404)

    def keep_alive(self):
        with self.agent.connect() as connection:
            sent = [("auth_key", self.agent.key)]
            for _ in range(3):
                self.agent.send(connection, "GET", target(self.disk["path"], "info"), sent, close=False).must(200)
                self.agent.send(connection, "GET", target(self.disk["path"] + "x", "info"), sent, close=False).must(404)
                answer = self.agent.send(connection, "GET", target(self.disk["path"], "content") + "?ranges=0:70000", sent, close=False)
                self.same(answer, pattern(self.disk["content"], [(0, 70000)]))

    def old_http(self):
        with self.agent.connect() as connection:
            connection.sendall(f"GET {target(self.disk['path'], 'info')} HTTP/1.0\r\nauth_key: {self.agent.key}\r\n\r\n".encode())
            response = http.client.HTTPResponse(connection)
            response.begin()
            Answer(response).must(200)

    def goes_away(self):
        size = os.path.getsize(self.disk["content"])
        for _ in range(8):
            connection = self.agent.connect()
            where = target(self.disk["path"], "content") + f"?ranges=0:{size}"
            connection.sendall(self.agent.head("GET", where.encode(), [("auth_key", self.agent.key)]))
            connection.recv(1000)
            connection.close()
        self.info(self.disk)

    def no_tls12(self):
        context = self.agent.context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            self.agent.connect(context).close()
        except (ssl.SSLError, ConnectionError):
            return
        raise Failed("TLS 1.2 was taken")

    def no_plain(self):
        with socket.create_connection(self.agent.address, timeout=TIMEOUT_S) as plain:
            plain.sendall(self.agent.head("GET", target(self.disk["path"], "info").encode(), [("auth_key", self.agent.key)]))
            try:
                answer = plain.recv(4096)
            except ConnectionError:
                answer = b""
            want(b"HTTP/1." not in answer and b"virtual_size" not in answer, repr(answer[:80]))

    def garbage(self):
        numbers = random.Random(5)
        for length in (1, 10, 1000, 100000):
            with self.agent.connect() as connection:
                try:
                    connection.sendall(numbers.randbytes(length) + b"\r\n\r\n")
                    answer = connection.recv(4096)
                except (ConnectionError, ssl.SSLError, TimeoutError):
                    answer = b""
                want(b" 200 " not in answer.split(b"\r\n")[0], repr(answer[:80]))
        self.info(self.disk)

    def certificate(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            self.agent.connect(context).close()
            raise Failed("a certificate nobody knows was taken by this test")
        except ssl.SSLCertVerificationError:
            pass
        want(self.agent.cert is None or self.agent.connect().version() == "TLSv1.3", "not TLS 1.3")

    # Paths.

    def check_paths(self):
        for number, attempt in enumerate(self.attempts()):
            yield f"outside {number}: {attempt[:70]!r}", lambda a=attempt: self.outside(a)

    def outside(self, attempt):
        raw = attempt if isinstance(attempt, bytes) else attempt.encode()
        for method, verb, body in (
            ("GET", b"/info", b""),
            ("GET", b"/content?ranges=0:1", b""),
            ("POST", b"/content", b'[{"offset":0,"length":1}]'),
            ("GET", b"/rct", b""),
        ):
            sent = [("Content-Type", "application/json")] if body else []
            answer = self.agent.ask(method, b"/vdisk/" + raw + verb, sent, body)
            want(answer.status in (400, 404, 414), f"{method} {verb}: {answer.status} {answer.body[:80]!r}")

    def attempts(self):
        return self.windows_attempts() if self.windows else self.unix_attempts()

    def unix_attempts(self):
        root, outside, disk = self.fixture["root"], self.fixture["outside"], self.disk["path"]
        name = os.path.basename(outside)
        up = f"{root}/../{os.path.basename(os.path.dirname(outside))}/{name}"
        deep = f"{root}/" + "../" * 30 + outside.lstrip("/")
        plain = [
            outside, up, deep, up.replace("/../", "/./../"), up.replace("/../", "//..//"), f"{root}/..", f"{root}/.", root, f"{root}/",
            f"{root}/link-out", f"{root}/link-relative", f"{root}/link-directory/{name}", f"{root}/link-root/etc/passwd",
            f"{root}/link-device", f"{root}/link-loop", f"{root}/pipe", f"{root}/directory", f"{root}2/{os.path.basename(disk)}",
            f"{disk}/..", f"{disk}/../{os.path.basename(disk)}", f"{disk}/.", disk.upper(), disk + ".", disk + " ", " " + disk,
            f"{disk}:stream", f"{disk}::$DATA", "/etc/passwd", "//etc/passwd", "/etc/shadow", "/dev/zero", "/dev/null", "/dev/sda",
            "/proc/self/environ", "/proc/self/root" + outside, "/proc/self/cwd", "/proc/self/fd/0", "/dev/fd/0", "/sys/kernel",
            "C:\\Windows\\win.ini", "\\\\server\\share\\a.vhdx", "\\\\.\\PhysicalDrive0", "\\\\?\\C:\\a.vhdx", "C:foo", "NUL", "~root/a", "$HOME/a",
            "file://" + outside, "nbd://127.0.0.1/", "json:{}", "http://127.0.0.1/", f"{root}/*", f"{root}/a.vhd?", f"{root}/\uff0e\uff0e/{name}",
            f"{root}/\u2024\u2024/{name}", f"{root}/..\u2215{name}", f"{root}/..\\{name}",
        ]
        spelled = [quote(path, safe="") for path in plain]
        raw = [
            quote(up, safe="/").replace("..", "%2e%2e"),
            quote(up, safe="/").replace("..", "%2E%2E"),
            quote(up, safe="/").replace("..", ".%2e"),
            quote(up, safe="/").replace("..", "%252e%252e"),
            quote(up, safe="/").replace("/../", "/%2e%2e%2f"),
            quote(up, safe="/").replace("/../", "/..%252f"),
            quote(up, safe="/").replace("/../", "/..%5c"),
            quote(up, safe="/").replace("/../", "/..%c0%af"),
            quote(up, safe="/").replace("/../", "/%c0%ae%c0%ae/"),
            quote(up, safe="/").replace("/../", "/%e0%80%ae%e0%80%ae/"),
            quote(up, safe="/").replace("/../", "/%u002e%u002e/"),
            quote(up, safe="/").replace("/../", "/..;/"),
            quote(up, safe="/").replace("/../", "/..%00/"),
            up,
            deep,
            quote(disk, safe="") + "%00",
            quote(disk, safe="") + "%00.raw",
            quote(disk, safe="") + "%0a",
            quote(disk, safe="") + "%0d%0a",
            quote(disk, safe="") + "%ff",
            quote(quote(disk, safe=""), safe=""),
            "%2F" * 3000,
            "a" * 5000,
            "%2E",
            "%2E%2E",
            ".",
            "..",
            "%00",
        ]
        return spelled + raw

    def windows_attempts(self):
        root, outside, disk = self.fixture["root"], self.fixture["outside"], self.disk["path"]
        name, drive = outside.rsplit("\\", 1)[1], root[:2]
        up = f"{root}\\..\\{outside.split(chr(92), 1)[1]}" if root.count("\\") == 1 else f"{root}\\" + "..\\" * root.count("\\") + outside.split("\\", 1)[1]
        plain = [
            outside, up, up.replace("\\..\\", "\\.\\..\\"), up.replace("\\", "/"), f"{root}\\..", f"{root}\\.", root, f"{root}\\", f"{root}2\\a.vhdx",
            f"{root}\\.. \\{name}", f"{root}\\...\\{name}", f"{root}\\..\\..\\..\\..\\Windows\\win.ini", f"{disk}\\..", f"{disk}\\",
            f"{disk}:stream", f"{disk}::$DATA", f"{root}::$INDEX_ALLOCATION\\{name}", f"{root}:x\\a", disk + ".", disk + " ", disk + "...", disk + ". .",
            f"{root}.\\{disk.rsplit(chr(92), 1)[1]}", f"{root} \\{disk.rsplit(chr(92), 1)[1]}", f"{root}\\ a.vhdx",
            f"{root}\\NUL", f"{root}\\nul.vhdx", f"{root}\\CON", f"{root}\\con.vhdx", f"{root}\\PRN", f"{root}\\AUX", f"{root}\\COM1", f"{root}\\com1.vhdx",
            f"{root}\\LPT1", f"{root}\\COM\u00b9", f"{root}\\CONIN$", f"{root}\\CONOUT$", f"{root}\\CLOCK$", "NUL", "CON", "COM1:", "AUX:",
            f"\\\\?\\{disk}", f"\\\\.\\{disk}", f"\\??\\{disk}", "\\\\.\\PhysicalDrive0", "\\\\?\\PhysicalDrive0", "//./PhysicalDrive0", "//?/PhysicalDrive0",
            "\\\\.\\HarddiskVolume1", f"\\\\.\\{drive}", "\\\\?\\GLOBALROOT\\Device\\Harddisk0\\DR0", "\\Device\\Harddisk0\\DR0", "\\\\.\\pipe\\x",
            "\\\\?\\Volume{00000000-0000-0000-0000-000000000000}\\a", "\\\\localhost\\C$\\Windows\\win.ini", "\\\\127.0.0.1\\C$\\a.vhdx",
            f"\\\\localhost\\{drive[0]}${disk[2:]}", "\\\\?\\UNC\\localhost\\C$\\a", "\\\\server\\share\\a.vhdx", "//server/share/a.vhdx",
            f"{drive}a.vhdx", f"{drive}..\\a.vhdx", f"{drive}", f"{drive}\\", disk[2:], "a.vhdx", "..\\a.vhdx", ".\\a.vhdx", "\\a.vhdx", "/a.vhdx",
            f"{root}\\A~1.VHD", f"{drive}\\PROGRA~1\\a.vhdx", f"{drive}\\WINDOW~1", f"{root}\\*", f"{root}\\a?.vhdx", f"{root}\\<", f"{root}\\a|b", f'{root}\\"a"',
            "C:\\Windows\\win.ini", "Z:\\etc\\passwd", "/etc/passwd", "%SystemRoot%\\win.ini", "file:///C:/Windows/win.ini", f"{root}\\\uff0e\uff0e\\{name}",
            f"{drive}\uff3c{name}", f"{root}\\$MFT", "C:\\$MFT",
        ]
        spelled = [quote(path, safe="") for path in plain]
        raw = [
            quote(up, safe="").replace("..", "%2e%2e"),
            quote(up, safe="").replace("..", "%252e%252e"),
            quote(up, safe="").replace("%5C..%5C", "%5C..%255c"),
            quote(up, safe="").replace("%5C..%5C", "%5C..%c0%af"),
            quote(up, safe="").replace("%5C..%5C", "%5C..%c1%9c"),
            quote(up, safe="").replace("%5C..%5C", "%5C..%00%5C"),
            quote(disk, safe="") + "%00",
            quote(disk, safe="") + "%00.vhdx",
            quote(disk, safe="") + "%0d%0a",
            quote(disk, safe="") + "%ff",
            quote(quote(disk, safe=""), safe=""),
            "a" * 40000,
        ]
        return spelled + raw

    def check_strangers(self):
        for path in self.fixture["strangers"]:
            yield f"a parent outside: {path[-30:]}", lambda p=path: self.stranger(p)

    def stranger(self, path):
        """What it is may be told, as its own file tells it; nothing is read through its parent, by any way."""
        info = self.agent.ask("GET", target(path, "info")).must(200).json()
        want(info["provider_sub_type"] == 4 and info["parent_path"], f"info: {info}")
        query = "?path=" + quote(path, safe="")
        listed = [("Content-Type", "application/json")]
        for method, where, headers, body in (
            ("GET", target(path, "rct"), [], b""),
            ("PUT", target(path, "rct?enabled=true"), [], b""),
            ("GET", target(path, "rct/rctX:0:0:0:0:0:00000001/changes"), [], b""),
            ("GET", target(path, "content?ranges=0:512"), [], b""),
            ("POST", target(path, "content"), listed, b'[{"offset":0,"length":512}]'),
            ("GET", "/v1/disks/tracking" + query, [], b""),
            ("GET", "/v1/disks/changes" + query + "&since=x", [], b""),
            ("GET", "/v1/disks/content" + query, [], b""),
            ("PUT", "/v1/disks/content" + query + "&offset=0", [("Content-Type", "application/octet-stream")], bytes(512)),
            ("POST", "/v1/disks/tracking/checkpoints" + query, [], b""),
            ("POST", "/v1/freezes", listed, json.dumps({"disks": [path]}).encode()),
        ):
            answer = self.agent.ask(method, where, headers, body)
            # By the name alone, or because no such name is there: never an error of who looked for it elsewhere.
            want(answer.status == 403 and "its parent " in answer.text(), f"{method} {where}: {answer.status} {answer.text()[:200]}")
            want("\n" not in answer.text().strip(), answer.text())

    # Change tracking, where a disk may be changed.

    def check_tracking(self):
        if self.fixture.get("writable") is None:
            return
        yield "tracking is switched on and off", self.switched
        yield "an incremental download is the disk", self.incremental

    def state(self, path):
        answer = self.agent.ask("GET", target(path, "rct")).must(200)
        state = answer.json()
        want(list(state) == ["enabled", "newer_changes", "most_recent_id"], f"members {list(state)}")
        want(" " not in answer.text(), "spaces in the JSON")
        return state

    def switch(self, path, value):
        answer = self.agent.ask("PUT", target(path, "rct") + f"?enabled={value}").must(200)
        want(answer.body == b"" and answer.headers.get("content-length") == "0", "the answer has a body")

    def switched(self):
        path = self.fixture["writable"]
        for value, expected in (("true", True), ("true", True), ("false", False), ("on", True), ("off", False)):
            self.switch(path, value)
            want(self.state(path)["enabled"] is expected, f"enabled={value}: {self.state(path)}")

    def incremental(self):
        path = self.fixture["writable"]
        self.switch(path, "true")
        size = self.agent.ask("GET", target(path, "info")).must(200).json()["virtual_size"]
        query = "?path=" + quote(path, safe="")
        before = bytearray(self.agent.ask("GET", target(path, "content") + f"?ranges=0:{size}").must(200).body)
        sealed = self.agent.ask("POST", "/v1/disks/tracking/checkpoints" + query).must(201).json()["tracking_id"]
        want(self.state(path)["most_recent_id"] == sealed, "the id is not the most recent one")
        want(self.changes(path, sealed) == [], "changes before anything was changed")
        numbers = random.Random(11)
        written = [(0, 512), (size // 3 // 512 * 512, 100000), (size - 512, 512)]
        for offset, length in written:
            data = numbers.randbytes(length)
            sent = [("Content-Type", "application/octet-stream")]
            self.agent.ask("PUT", "/v1/disks/content" + query + f"&offset={offset}", sent, data).must(200)
        want(self.state(path)["newer_changes"] is True, "no newer changes")
        ranges = self.changes(path, sealed)
        for offset, length in written:
            for at in (offset, offset + length - 1):
                want(any(o <= at < o + n for o, n in ranges), f"byte {at} is missing in {ranges}")
        want(sum(n for _, n in ranges) < size // 2, f"nearly everything changed: {ranges}")
        for get in (False, True):
            self.download(path, before, ranges, get)

    def changes(self, path, since):
        found = self.agent.ask("GET", target(path, f"rct/{since}/changes")).must(200).json()
        ranges = [(item["offset"], item["length"]) for item in found]
        want(all(list(item) == ["offset", "length"] for item in found), "other members")
        want(all(a[0] + a[1] < b[0] for a, b in zip(ranges, ranges[1:])), "not sorted and joined")
        return ranges

    def download(self, path, before, ranges, get):
        if get:
            answer = self.agent.ask("GET", target(path, "content") + "?ranges=" + ",".join(f"{o}:{n}" for o, n in ranges))
        else:
            body = json.dumps([{"offset": o, "length": n} for o, n in ranges]).encode()
            answer = self.agent.ask("POST", target(path, "content"), [("Content-Type", "application/json")], body)
        data, copy = answer.must(200).body, bytearray(before)
        for offset, length in ranges:
            copy[offset : offset + length] = data[:length]
            data = data[length:]
        now = self.agent.ask("GET", target(path, "content") + f"?ranges=0:{len(before)}").must(200).body
        want(bytes(copy) == now, f"other bytes, from {first_difference(bytes(copy), now)} on")


def first_difference(one, other):
    for at in range(0, min(len(one), len(other)), 4096):
        if one[at : at + 4096] != other[at : at + 4096]:
            return at + next(i for i, (a, b) in enumerate(zip(one[at:], other[at:])) if a != b)
    return min(len(one), len(other))


def checks_of(matrix):
    for name in dir(matrix):
        if name.startswith("check_"):
            yield from getattr(matrix, name)()


def run(matrix, words):
    passed = failed = 0
    for name, check in checks_of(matrix):
        if words and not any(word in name for word in words):
            continue
        try:
            check()
            passed += 1
        except Exception as error:  # pylint: disable=broad-except
            failed += 1
            reason = str(error) if isinstance(error, Failed) else traceback.format_exc(limit=-3)
            print(f"FAILED {name}: {reason}", flush=True)
    return passed, failed


def main():
    try:
        with open(os.environ["VMTIDE_TEST_AGENT_DISKS"], encoding="utf-8") as file:
            fixture = json.load(file)
        agent = Agent(
            os.environ["VMTIDE_TEST_AGENT_URL"],
            os.environ["VMTIDE_TEST_AGENT_KEY"],
            os.environ["VMTIDE_TEST_AGENT_READ_KEY"],
            os.environ.get("VMTIDE_TEST_AGENT_CERT") or None,
        )
    except KeyError as error:
        print(__doc__, file=sys.stderr)
        print(f"matrix: error: {error} is not set", file=sys.stderr)
        return 2
    passed, failed = run(Matrix(agent, fixture), sys.argv[1:])
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
