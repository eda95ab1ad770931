"""Requests to one agent: sent, answered, and sent again while the failure may pass."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import re
import socket
import ssl
import time
from typing import Any, Dict, Mapping, Optional, Union
from urllib.parse import quote, urlsplit

from .errors import (
    AgentError,
    CertificateError,
    DeniedError,
    NotFoundError,
    ProtocolError,
    RefusedError,
    UnreachableError,
    UsageError,
)

#: The port of agents, and of rct-service.
DEFAULT_PORT = 6677

#: The most of an answer that is a document, in bytes.
MAX_DOCUMENT = 256 << 20

_FIRST_WAIT = 0.2
_LONGEST_WAIT = 10.0
# How long an agent that was never reached is waited for: its address is probably wrong.
_UNREACHED_TIME = 10.0
# How often something is tried that the agent itself failed at: rct-service answers 500 to whatever it did not expect.
_TRIES_OF_FAILURES = 3
_MAX_WORDS = 300


def segment(text: str) -> str:
    """A path or any other text as one segment of a URL."""
    return quote(text, safe="")


def parse_fingerprint(text: str) -> bytes:
    """The SHA-256 of a certificate: 64 hexadecimal digits, with or without colons or ``sha256:`` before them."""
    digits = re.sub(r"^\s*sha-?256(\s+fingerprint)?\s*[:=]\s*", "", text, flags=re.IGNORECASE)
    digits = re.sub(r"[:\s]", "", digits)
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
        raise UsageError("a certificate's fingerprint has 64 hexadecimal digits (SHA-256), with or without colons")
    return bytes.fromhex(digits)


class _Connection(http.client.HTTPSConnection):
    """A connection to exactly the agent that is meant: nothing is sent before its certificate was held against the
    fingerprint."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, timeout: float, pinned: Optional[bytes]) -> None:
        super().__init__(host, port, context=context, timeout=timeout)
        self._pinned = pinned

    def connect(self) -> None:
        super().connect()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._pinned is None:
            return
        certificate = self.sock.getpeercert(binary_form=True)
        shown = hashlib.sha256(certificate or b"").digest()
        if shown != self._pinned:
            self.close()
            raise CertificateError(
                f"the certificate of {self.host}:{self.port} is sha256:{shown.hex()} and not "
                f"sha256:{self._pinned.hex()}: either it was made anew, or this is another host that poses as the agent"
            )


class Tries:
    """The tries of one request."""

    def __init__(self, limit: float, reached: bool) -> None:
        self._begun = time.monotonic()
        self._limit = limit if reached else min(limit, _UNREACHED_TIME)
        self._made = 0
        self._failures = 0

    def again(self, error: AgentError, verdict: str, asked: float = 0.0) -> None:
        """Waits for the next try, or raises ``error``."""
        self._made += 1
        most = min(_FIRST_WAIT * 2 ** min(self._made - 1, 16), _LONGEST_WAIT)
        # Between half and all of it, so that clients that failed together do not come back together.
        wait = max(most * random.uniform(0.5, 1.0), min(asked, _LONGEST_WAIT))
        self._failures += verdict == "few"
        more = verdict == "passing" or (verdict == "few" and self._failures < _TRIES_OF_FAILURES)
        if not more or time.monotonic() - self._begun + wait > self._limit:
            raise error
        time.sleep(wait)


class Failure(Exception):
    """One failed try."""

    def __init__(self, error: AgentError, verdict: str, asked: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.verdict = verdict
        self.asked = asked


class Transport:
    """The connection to one agent. For one thread at a time."""

    def __init__(
        self,
        base_url: str,
        auth_key: Optional[str],
        ca_file: Optional[str],
        fingerprint: Union[str, bytes, None],
        insecure: bool,
        timeout: float,
        retry_time: float,
    ) -> None:
        parts = urlsplit(base_url if "//" in base_url else f"https://{base_url}")
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.query:
            raise UsageError(f"{parts.scheme}://{parts.hostname}: an agent's address is https://HOST:PORT")
        if auth_key is not None and not re.fullmatch(r"[\x21-\x7e]{1,4096}", auth_key):
            raise UsageError("the agent's key must have 1 to 4096 characters, all ASCII and none a space")
        self._key = auth_key
        self._host = parts.hostname
        try:
            self._port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise UsageError(f"{parts.hostname}: bad port") from error
        self._prefix = parts.path.rstrip("/")
        self.agent = f"https://{parts.netloc}"
        self._pinned = parse_fingerprint(fingerprint) if isinstance(fingerprint, str) else fingerprint
        self._timeout = timeout
        self.retry_time = retry_time
        self.reached = False
        self._context = self._tls(ca_file, insecure)
        self._connection: Optional[_Connection] = None

    def _tls(self, ca_file: Optional[str], insecure: bool) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise UsageError(f"CA file {ca_file}: {error}") from error
        if self._pinned is not None or insecure:
            # The fingerprint says more than any name or signature.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def tries(self) -> Tries:
        """The tries of a new request."""
        return Tries(self.retry_time, self.reached)

    def close(self) -> None:
        """Closes the connection; the next request makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def begin(
        self, method: str, target: str, body: Optional[bytes] = None, headers: Optional[Mapping[str, str]] = None
    ) -> http.client.HTTPResponse:
        """Sends a request once, and returns the head of its answer if that is a success.

        :raises Failure: otherwise.
        """
        all_headers: Dict[str, str] = {"User-Agent": "vmtide-rct/0.1.0", "Accept": "*/*", **(headers or {})}
        if self._key is not None:
            all_headers["auth_key"] = self._key
        try:
            response = self._send(method, self._prefix + target, body, all_headers)
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise Failure(
                CertificateError(
                    f"the certificate of {self.agent} is not trusted: {error.verify_message}; give the fingerprint that "
                    "the agent prints at its start (VMTIDE_AGENT_FINGERPRINT), or its authority"
                ),
                "final",
            ) from error
        except CertificateError as error:
            self.close()
            raise Failure(error, "final") from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self.lost(error) from error
        self.reached = True
        if 200 <= response.status < 300:
            return response
        raise self._refused(response)

    def _send(
        self, method: str, target: str, body: Optional[bytes], headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        if self._connection is not None:
            try:
                self._connection.request(method, target, body=body, headers=headers)
                return self._connection.getresponse()
            except (ConnectionError, http.client.RemoteDisconnected, ssl.SSLEOFError, http.client.CannotSendRequest):
                # The agent closed it while nobody used it: that is no failure yet.
                self.close()
        self._connection = _Connection(self._host, self._port, self._context, self._timeout, self._pinned)
        self._connection.request(method, target, body=body, headers=headers)
        return self._connection.getresponse()

    def lost(self, error: BaseException) -> Failure:
        """The failure of a connection."""
        detail = str(error) or type(error).__name__
        return Failure(UnreachableError(f"cannot reach {self.agent}: {detail}"), "passing")

    def cut(self) -> Failure:
        """The failure of an answer that ended too early."""
        self.close()
        return Failure(UnreachableError(f"{self.agent}: the connection ended before the answer did"), "passing")

    def document(
        self, method: str, target: str, body: Any = None, headers: Optional[Mapping[str, str]] = None, tries: int = 0
    ) -> Any:
        """The answer of a request as JSON; none where it is empty. Tried again while that may help, or ``tries``
        times."""
        raw = None if body is None else json.dumps(body).encode()
        all_headers = dict(headers or {})
        if raw is not None:
            all_headers["Content-Type"] = "application/json"
        elif method in ("PUT", "POST"):
            raw = b""
        waits = self.tries()
        made = 0
        while True:
            try:
                return self._read_document(self.begin(method, target, raw, all_headers))
            except Failure as failure:
                made += 1
                if made == tries:
                    raise failure.error from failure
                waits.again(failure.error, failure.verdict, failure.asked)

    def _read_document(self, response: http.client.HTTPResponse) -> Any:
        try:
            raw = response.read(MAX_DOCUMENT + 1)
            rest = response.read(1) if len(raw) <= MAX_DOCUMENT else b""
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self.lost(error) from error
        if len(raw) > MAX_DOCUMENT:
            self.close()
            raise Failure(ProtocolError(f"{self.agent} answered more than {MAX_DOCUMENT} bytes"), "final")
        announced = response.getheader("Content-Length")
        if rest or (announced is not None and announced.isdigit() and int(announced) != len(raw)):
            raise self.cut()
        if not raw.strip():
            return None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Failure(ProtocolError(f"{self.agent} answered no JSON"), "final") from error

    def _refused(self, response: http.client.HTTPResponse) -> Failure:
        status = response.status
        try:
            raw = response.read(64 << 10)
        except (OSError, http.client.HTTPException):
            raw = b""
        if not response.isclosed():
            self.close()
        code, message = _words(raw, response.reason)
        asked = response.getheader("Retry-After") or ""
        wait = float(asked) if asked.isdigit() and len(asked) < 6 else 0.0
        if status in (408, 425, 429, 502, 503, 504):
            return Failure(RefusedError(f"{self.agent} answered {status}: {message}", status, code), "passing", wait)
        if status == 500:
            return Failure(RefusedError(f"{self.agent} answered 500: {message}", status, code), "few")
        if status == 401:
            what = "wrong key" if self._key is not None else "a key is needed"
            return Failure(
                DeniedError(f"{self.agent}: {what}: give the agent's key with VMTIDE_AGENT_KEY or --auth-key-file"), "final"
            )
        if status == 403:
            return Failure(DeniedError(f"{self.agent}: denied: {message}"), "final")
        if status == 404 and code == "unknown_freeze":
            what = f"{self.agent}: the moment that was read is gone: {message}"
            return Failure(RefusedError(what, status, code), "final")
        if status == 404:
            return Failure(NotFoundError(f"{self.agent}: {message}", code), "final")
        return Failure(RefusedError(f"{self.agent} answered {status}: {message}", status, code), "final")


def _words(raw: bytes, reason: str) -> "tuple[str, str]":
    """What an error says of itself: the agent's own form, or the text of rct-service."""
    code, message = "", raw.decode("utf-8", "replace").strip()
    try:
        error = json.loads(raw)["error"]
        code, message = str(error.get("code", "")), str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    if not message or message.startswith("<"):
        message = reason or "no reason was given"
    return code[:_MAX_WORDS], re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", message)[:_MAX_WORDS]
