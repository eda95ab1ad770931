"""An agent, as callers see it."""

from __future__ import annotations

import http.client
import json
from types import TracebackType
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Type, Union

from . import zstd
from .errors import AgentError, ChangesUnknownError, NotFoundError, ProtocolError, RefusedError, UsageError
from .model import DiskInfo, FrozenDisk, Range, TrackingState, number, parse_ranges, text, tidy, truth
from .transport import Failure, Transport, segment

#: What is read from a connection at a time, in bytes.
PIECE = 1 << 20

#: The most ranges of one request: the agent takes a million, and a list of these is some megabytes.
MAX_RANGES_OF_REQUEST = 65536

#: How many ranges may be in a URL before they go into the request's body.
_RANGES_IN_URL = 1


class AgentClient:
    """A connection to one agent: vmtide's own, or rct-service, which has less.

    :param base_url: ``https://HOST:PORT``; the port is 6677 where none is given.
    :param auth_key: the key that the agent knows this client by.
    :param ca_file: authorities (PEM) to trust instead of the system's; also the agent's own certificate.
    :param fingerprint: the SHA-256 of the agent's certificate; where it is given nothing else of it is looked at.
    :param insecure: takes any certificate. Whoever is on the way then reads key and disks.
    :param timeout: seconds in which something must move.
    :param retry_time: seconds for which an agent that went away is waited for.
    :param compress: have content compressed on the way, if this Python can (:func:`vmtide_rct.zstd.is_available`).

    For one thread at a time.
    """

    def __init__(
        self,
        base_url: str = "https://localhost:6677",
        auth_key: Optional[str] = None,
        *,
        ca_file: Optional[str] = None,
        fingerprint: Union[str, bytes, None] = None,
        insecure: bool = False,
        timeout: float = 60.0,
        retry_time: float = 300.0,
        compress: bool = False,
    ) -> None:
        self._transport = Transport(base_url, auth_key, ca_file, fingerprint, insecure, timeout, retry_time)
        if compress and not zstd.is_available():
            raise UsageError("this Python has no zstd: use 3.14 or later, or install the package zstandard")
        self._compress = compress
        self._has_v1: Optional[bool] = None

    def __enter__(self) -> "AgentClient":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    @property
    def agent(self) -> str:
        """The agent's address."""
        return self._transport.agent

    # ---- what every agent has

    def info(self, path: str) -> DiskInfo:
        """What a disk is."""
        document = self._transport.document("GET", f"/vdisk/{segment(path)}/info")
        return DiskInfo(
            number(document, "virtual_size"),
            text(document, "parent_path"),
            number(document, "virtual_storage_type", 0),
            number(document, "provider_sub_type", 0),
        )

    def tracking(self, path: str) -> TrackingState:
        """The state of a disk's change tracking."""
        document = self._transport.document("GET", f"/vdisk/{segment(path)}/rct")
        return TrackingState(
            truth(document, "enabled"), truth(document, "newer_changes"), text(document, "most_recent_id") or ""
        )

    def set_tracking(self, path: str, enabled: bool) -> None:
        """Switches change tracking on or off. Needs a key that may write."""
        self._transport.document("PUT", f"/vdisk/{segment(path)}/rct?enabled={str(enabled).lower()}")

    def changes(self, path: str, tracking_id: str) -> List[Range]:
        """The ranges changed since ``tracking_id``: sorted, joined, all on the disk.

        :raises ChangesUnknownError: where that is not known, for whatever reason: read the disk in full.
        """
        size = self.info(path).virtual_size
        if self.has_v1():
            return self._pages(f"/v1/disks/changes?path={segment(path)}&since={segment(tracking_id)}", size)
        with _doubts():
            document = self._transport.document("GET", f"/vdisk/{segment(path)}/rct/{segment(tracking_id)}/changes")
            return tidy(parse_ranges(document), size)

    def content(
        self, path: str, ranges: Optional[Sequence[Range]] = None, *, position: int = 0
    ) -> Iterator[bytes]:
        """The bytes of ranges of the live disk, one after the other, in the order given; of all of it where none are
        given. ``position`` skips so many bytes of that. A connection that breaks is made again, and what comes goes on
        where it broke off.

        The parts are of any length. Their sum is that of the ranges, or an error is raised.
        """
        if ranges is None:
            ranges = [Range(0, self.info(path).virtual_size)]
        v1 = f"/v1/disks/content?path={segment(path)}&" if self._compress and self.has_v1() else None
        return self._content(v1, f"/vdisk/{segment(path)}/content", ranges, position)

    # ---- what only vmtide's own agent has

    def has_v1(self) -> bool:
        """Whether the agent is vmtide's own, with ``/v1``. Asks once."""
        if self._has_v1 is None:
            try:
                self._has_v1 = isinstance(self._transport.document("GET", "/v1"), Mapping)
            except (NotFoundError, ProtocolError):
                self._has_v1 = False
            except RefusedError as error:
                if error.status >= 500 and error.status != 501:
                    raise
                self._has_v1 = False
        return self._has_v1

    def _need_v1(self, what: str) -> None:
        if not self.has_v1():
            raise RefusedError(
                f"{self.agent} cannot {what}: it has only rct-service's interface; run `vmtide agent` there", 501
            )

    def details(self, path: str) -> Dict[str, Any]:
        """All that the agent tells of a disk: format, sectors, id, … (``GET /v1/disks``)."""
        self._need_v1("tell more of a disk")
        document = self._transport.document("GET", f"/v1/disks?path={segment(path)}")
        if not isinstance(document, dict):
            raise ProtocolError(f"{self.agent} answered no description of a disk")
        return document

    def seal(self, path: str) -> str:
        """Seals a tracking id of this moment of the live disk, and returns it. Needs a key that may write."""
        self._need_v1("seal a tracking id")
        document = self._transport.document("POST", f"/v1/disks/tracking/checkpoints?path={segment(path)}")
        sealed = text(document, "tracking_id")
        if not sealed:
            raise ProtocolError(f"{self.agent} answered no tracking id")
        return sealed

    def freeze(self, paths: Sequence[str], ttl: int = 600) -> "Freeze":
        """Fixes one moment of all of these disks. Use it in a ``with`` statement; what nobody uses ends after ``ttl``
        seconds in any case."""
        self._need_v1("freeze disks")
        document = self._transport.document("POST", "/v1/freezes", {"disks": list(paths), "ttl_seconds": ttl})
        identifier = text(document, "id")
        listed = document.get("disks") if isinstance(document, Mapping) else None
        if not identifier or not isinstance(listed, list) or len(listed) != len(paths):
            raise ProtocolError(f"{self.agent} answered no freeze of {len(paths)} disks")
        disks = [FrozenDisk(p, number(disk, "size_bytes"), text(disk, "tracking_id")) for p, disk in zip(paths, listed)]
        return Freeze(self, identifier, disks, ttl)

    def create(self, path: str, disk_format: str, size: int) -> None:
        """Makes a new, empty disk: ``vhdx``, ``vhd``, ``qcow2``, ``vmdk`` or ``raw``. Replaces nothing."""
        self._need_v1("make disks")
        body = {"format": disk_format, "virtual_size_bytes": size, "fixed": False}
        self._transport.document("POST", f"/v1/disks?path={segment(path)}", body)

    def write(self, path: str, offset: int, data: bytes) -> None:
        """Writes ``data``; when this returns it is on the disk's stable storage. Needs a key that may write."""
        self._need_v1("write disks")
        target = f"/v1/disks/content?path={segment(path)}&offset={offset}"
        tries = self._transport.tries()
        while True:
            try:
                response = self._transport.begin("PUT", target, data, {"Content-Type": "application/octet-stream"})
                written = number(self._transport._read_document(response), "position")
                if written != len(data):
                    raise ProtocolError(f"{self.agent} wrote {written} bytes of {len(data)}")
                return
            except Failure as failure:
                tries.again(failure.error, failure.verdict, failure.asked)

    # ---- how

    def _pages(self, target: str, size: int) -> List[Range]:
        found: List[Range] = []
        cursor = 0
        with _doubts():
            page = target
            while True:
                document = self._transport.document("GET", page)
                ranges = document.get("ranges") if isinstance(document, Mapping) else None
                found.extend(parse_ranges(ranges))
                if number(document, "disk_size_bytes") != size:
                    raise ChangesUnknownError("the answer is about a disk of another size: read the disk in full")
                if document.get("next_cursor") is None:
                    return tidy(found, size)
                following = number(document, "next_cursor")
                if following <= cursor:
                    raise ChangesUnknownError(f"the page of changes after {following} covers nothing: read the disk in full")
                cursor = following
                page = f"{target}&cursor={cursor}"

    def _content(
        self, v1: Optional[str], contract: Optional[str], ranges: Sequence[Range], position: int
    ) -> Iterator[bytes]:
        for batch in _batches(ranges):
            total = sum(part.length for part in batch)
            if position >= total:
                position -= total
                continue
            yield from self._batch(v1, contract, batch, position, total)
            position = 0

    def _batch(
        self, v1: Optional[str], contract: Optional[str], batch: Sequence[Range], done: int, total: int
    ) -> Iterator[bytes]:
        tries = self._transport.tries()
        while done < total:
            try:
                for part in self._once(v1, contract, batch, done, total):
                    done += len(part)
                    tries = self._transport.tries()
                    yield part
            except Failure as failure:
                tries.again(failure.error, failure.verdict, failure.asked)

    def _once(
        self, v1: Optional[str], contract: Optional[str], batch: Sequence[Range], done: int, total: int
    ) -> Iterator[bytes]:
        headers = {}
        if v1 is not None:
            target = f"{v1}from={done}" + ("&compress=zstd" if self._compress else "")
            rest = batch
        else:
            # The contract knows no positions: what is left is asked for anew.
            target = contract or ""
            rest = _after(batch, done)
        body: Optional[bytes] = None
        method = "GET"
        if v1 is not None and len(rest) <= _RANGES_IN_URL:
            target += "&ranges=" + ",".join(f"{part.offset}:{part.length}" for part in rest)
        else:
            method = "POST"
            body = json.dumps([{"offset": part.offset, "length": part.length} for part in rest]).encode()
            headers["Content-Type"] = "application/json"
        response = self._transport.begin(method, target, body, headers)
        left = total - done
        yield from self._parts(response, left)

    def _parts(self, response: http.client.HTTPResponse, left: int) -> Iterator[bytes]:
        packed = response.getheader("Content-Encoding", "")
        if packed not in ("", "identity", "zstd"):
            raise Failure(ProtocolError(f"{self.agent} answered with Content-Encoding {packed}"), "final")
        announced = response.getheader("Content-Length", "")
        if packed != "zstd" and announced.isdigit() and int(announced) != left:
            self.close()
            raise Failure(ProtocolError(f"{self.agent} announced {announced} bytes of content, not {left}"), "final")
        decompressor = zstd.Decompressor() if packed == "zstd" else None
        whole = False
        try:
            while True:
                try:
                    part = response.read(PIECE)
                except (OSError, http.client.HTTPException) as error:
                    raise self._transport.lost(error) from error
                if not part:
                    break
                if decompressor is not None:
                    try:
                        part = decompressor.feed(part)
                    except Exception as error:
                        raise Failure(ProtocolError(f"{self.agent}: content does not decompress: {error}"), "few") from error
                if len(part) > left:
                    raise Failure(ProtocolError(f"{self.agent} answered more content than was asked for"), "final")
                left -= len(part)
                if part:
                    yield part
            if left > 0 or (decompressor is not None and not decompressor.is_between_frames):
                raise self._transport.cut()
            whole = True
        finally:
            if not whole:
                # What was not read to its end cannot be used for another request.
                self.close()


class Freeze:
    """Disks of an agent at one moment, which leaving the ``with`` statement ends."""

    def __init__(self, client: AgentClient, identifier: str, disks: List[FrozenDisk], ttl: int) -> None:
        self._client = client
        self._target = f"/v1/freezes/{segment(identifier)}"
        self._ttl = ttl
        self._ended = False
        #: The disks, in the order asked for.
        self.disks = disks

    def __enter__(self) -> "Freeze":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        try:
            self.end()
        except AgentError:
            # It ends by itself, and an error that is on its way says more.
            if kind is None:
                raise

    def content(self, index: int, ranges: Optional[Sequence[Range]] = None, *, position: int = 0) -> Iterator[bytes]:
        """As :meth:`AgentClient.content`, of disk ``index`` at the moment."""
        if ranges is None:
            ranges = [Range(0, self.disks[index].size)]
        return self._client._content(f"{self._target}/disks/{index}/content?", None, ranges, position)

    def changes(self, index: int, tracking_id: str) -> List[Range]:
        """As :meth:`AgentClient.changes`, from ``tracking_id`` to the moment. It may name more, never less."""
        target = f"{self._target}/disks/{index}/changes?since={segment(tracking_id)}"
        return self._client._pages(target, self.disks[index].size)

    def renew(self) -> None:
        """Lets it live for its time from now on. Reading does so, too."""
        self._client._transport.document("PUT", self._target, {"ttl_seconds": self._ttl})

    def end(self) -> None:
        """Ends the moment."""
        if self._ended:
            return
        self._ended = True
        try:
            self._client._transport.document("DELETE", self._target, tries=2)
        except RefusedError as error:
            if error.code != "unknown_freeze":
                raise


class _doubts:
    """Whatever speaks against an answer about changes means that they are not known."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if isinstance(value, ChangesUnknownError):
            return
        if isinstance(value, (NotFoundError, RefusedError, ProtocolError)):
            code = getattr(value, "code", "")
            raise ChangesUnknownError(f"what changed is not known ({value}): read the disk in full", code) from value


def _batches(ranges: Iterable[Range]) -> Iterator[List[Range]]:
    batch: List[Range] = []
    for part in ranges:
        if part.length == 0:
            continue
        batch.append(Range(*part))
        if len(batch) == MAX_RANGES_OF_REQUEST:
            yield batch
            batch = []
    if batch:
        yield batch


def _after(ranges: Sequence[Range], position: int) -> List[Range]:
    """The ranges without their first ``position`` bytes."""
    rest: List[Range] = []
    for part in ranges:
        if position >= part.length:
            position -= part.length
        else:
            rest.append(Range(part.offset + position, part.length - position))
            position = 0
    return rest
