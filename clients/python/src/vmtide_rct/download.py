"""A disk of an agent in a local file: all of it, or what changed.

A file has its name only while it is complete. Until then it is called ``NAME.partial``, and a full download notes in
``NAME.partial.json`` how far it is, so that another run can go on with it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import BinaryIO, Callable, Iterator, List, Optional

from .client import AgentClient, Freeze
from .errors import ProtocolError, UsageError
from .model import Range, TrackingState

#: How much is asked for at once, in bytes. rct-service attaches the disk anew for every request.
DEFAULT_MAX_BYTES_PER_REQUEST = 64 << 20

#: At which grain zeros become holes.
_GRAIN = 64 << 10
_ZEROS = bytes(_GRAIN)

#: After how many bytes the file is brought to the medium and it is noted how far it is.
_CHECKPOINT = 256 << 20

Progress = Callable[[int, int], None]


@dataclass
class DownloadSummary:
    """What a download did."""

    #: The file.
    path: str
    #: The disk's size in bytes.
    size: int
    #: ``full`` or ``incremental``.
    level: str
    #: How many ranges had changed; 1 for a full download.
    ranges: int
    #: The bytes to be had.
    total_bytes: int
    #: The bytes that were received now; fewer where an earlier run had begun.
    received_bytes: int
    #: The tracking id for the next time: that of the moment, else the most recent one of before; none where the disk is
    #: not tracked.
    tracking_id: Optional[str]
    #: What the user should know, one line each.
    warnings: List[str] = field(default_factory=list)


def download_disk(
    client: AgentClient,
    disk: str,
    target: str,
    *,
    tracking_id: Optional[str] = None,
    moment: Optional[Freeze] = None,
    index: int = 0,
    max_bytes_per_request: int = DEFAULT_MAX_BYTES_PER_REQUEST,
    resume: bool = False,
    progress: Optional[Progress] = None,
) -> DownloadSummary:
    """Brings ``disk`` into the file ``target``, sparse, as raw bytes.

    :param tracking_id: only what changed since then; an existing file is brought up to date, a new one has holes.
    :param moment: a freeze to read from, and ``index`` the disk's place in it; without one the live disk is read, which
        is right where nobody writes to it.
    :param max_bytes_per_request: how much is asked for at once; 0 makes a request for every range.
    :param resume: go on with what an earlier run left, if nothing speaks against it.
    :param progress: called with the bytes done and the bytes in all.
    :raises ChangesUnknownError: where what changed since ``tracking_id`` is not known; the file is as it was.
    """
    info = client.info(disk)
    size = info.virtual_size if moment is None else moment.disks[index].size
    state = client.tracking(disk)
    next_id = (state.most_recent_id or None) if moment is None else moment.disks[index].tracking_id
    if tracking_id is None:
        ranges = [Range(0, size)] if size else []
    elif moment is None:
        ranges = client.changes(disk, tracking_id)
    else:
        ranges = moment.changes(index, tracking_id)
    job = _Download(client, disk, target, size, ranges, moment, index, progress)
    level = "full" if tracking_id is None else "incremental"
    summary = DownloadSummary(target, size, level, len(ranges), job.total, 0, next_id)
    if tracking_id is None:
        job.full(state, resume, max_bytes_per_request, summary)
    else:
        job.incremental(tracking_id, max_bytes_per_request, summary)
    return summary


class _Download:
    def __init__(
        self,
        client: AgentClient,
        disk: str,
        target: str,
        size: int,
        ranges: List[Range],
        moment: Optional[Freeze],
        index: int,
        progress: Optional[Progress],
    ) -> None:
        self._client = client
        self._disk = disk
        self._target = target
        self._partial = f"{target}.partial"
        self._note = f"{target}.partial.json"
        self._size = size
        self._ranges = ranges
        self._moment = moment
        self._index = index
        self._progress = progress
        self.total = sum(part.length for part in ranges)

    def full(self, state: TrackingState, resume: bool, at_once: int, summary: DownloadSummary) -> None:
        note = {
            "version": 1,
            "agent": self._client.agent,
            "disk": self._disk,
            "size": self._size,
            "tracking_id": state.most_recent_id if state.enabled and not state.newer_changes else None,
        }
        done = self._resumable(note, resume, summary)
        with open(self._partial, "r+b" if done else "wb") as file:
            file.truncate(self._size)
            summary.received_bytes = self._fetch(file, done, at_once, fresh=True, note=note)
        self._publish()

    def incremental(self, tracking_id: str, at_once: int, summary: DownloadSummary) -> None:
        note = {"version": 1, "agent": self._client.agent, "disk": self._disk, "size": self._size, "since": tracking_id}
        exists = os.path.exists(self._target)
        if not exists and os.path.exists(self._partial) and _read_note(self._note) != note:
            raise UsageError(
                f"{self._partial} is what another download left: finish that, or remove it with {self._note}"
            )
        is_new = not exists and not os.path.exists(self._partial)
        if exists and os.path.getsize(self._target) > self._size:
            raise UsageError(f"{self._target} is larger than the disk of {self._size} bytes: download it in full")
        # Until all is there it is neither what it was nor what it will be, and must not look like either.
        _write_note(self._note, note)
        if exists:
            os.replace(self._target, self._partial)
        with open(self._partial, "wb" if is_new else "r+b") as file:
            file.truncate(self._size)
            summary.received_bytes = self._fetch(file, 0, at_once, fresh=False, note=None)
        self._publish()
        if is_new:
            summary.warnings.append(f"{self._target} holds only what changed; the rest of it are holes")

    def _resumable(self, note: "dict[str, object]", resume: bool, summary: DownloadSummary) -> int:
        """How much of an earlier run's file can be kept, in bytes from the beginning."""
        if not resume or not os.path.exists(self._partial):
            return 0
        if self._moment is not None:
            summary.warnings.append("begins anew: an earlier run was of another moment")
            return 0
        earlier = _read_note(self._note) or {}
        done = earlier.pop("done", None)
        if not isinstance(done, int) or not 0 < done <= self._size or earlier != note:
            summary.warnings.append("begins anew: the disk was written since the earlier run, or it was of another disk")
            return 0
        if note["tracking_id"] is None:
            summary.warnings.append("whether the disk was written since the earlier run cannot be seen: it is not tracked")
        return done

    def _fetch(self, file: BinaryIO, done: int, at_once: int, fresh: bool, note: "Optional[dict[str, object]]") -> int:
        received = 0
        noted = done
        position = 0
        if self._progress:
            self._progress(done, self.total)
        for batch in _requests(self._ranges, at_once):
            length = sum(part.length for part in batch)
            skip = min(max(done - position, 0), length)
            position += length
            if skip == length:
                continue
            writer = _Writer(file, batch, skip, fresh)
            for part in self._parts(batch, skip):
                writer.write(part)
                received += len(part)
                if self._progress:
                    self._progress(position - length + skip + writer.written, self.total)
            if skip + writer.written != length:
                raise ProtocolError(f"{self._client.agent} answered {writer.written} bytes where {length - skip} were asked for")
            if note is not None and position - noted >= _CHECKPOINT:
                file.flush()
                os.fsync(file.fileno())
                _write_note(self._note, {**note, "done": position})
                noted = position
        file.flush()
        os.fsync(file.fileno())
        return received

    def _parts(self, batch: List[Range], skip: int) -> Iterator[bytes]:
        if self._moment is not None:
            return self._moment.content(self._index, batch, position=skip)
        return self._client.content(self._disk, batch, position=skip)

    def _publish(self) -> None:
        os.replace(self._partial, self._target)
        if os.path.exists(self._note):
            os.remove(self._note)


class _Writer:
    """Puts the bytes of ranges where they belong."""

    def __init__(self, file: BinaryIO, ranges: List[Range], skip: int, fresh: bool) -> None:
        self._file = file
        self._fresh = fresh
        self._places = iter(ranges)
        self._offset = self._left = 0
        self.written = 0
        while skip > 0 or self._left == 0:
            place = next(self._places, None)
            if place is None:
                break
            used = min(skip, place.length)
            skip -= used
            self._offset, self._left = place.offset + used, place.length - used
            if self._left:
                break

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._left == 0:
                place = next(self._places, None)
                if place is None:
                    raise ProtocolError("more content than was asked for")
                self._offset, self._left = place
                continue
            # Up to the next grain, so that a grain of zeros is seen as one.
            length = min(len(view), self._left, _GRAIN - self._offset % _GRAIN)
            piece = view[:length]
            if not (self._fresh and piece == _ZEROS[:length]):
                self._file.seek(self._offset)
                self._file.write(piece)
            self._offset += length
            self._left -= length
            self.written += length
            view = view[length:]


def _requests(ranges: List[Range], at_once: int) -> Iterator[List[Range]]:
    """The ranges in groups of at most ``at_once`` bytes; 0 puts each in a group of its own."""
    if at_once <= 0:
        for part in ranges:
            yield [part]
        return
    group: List[Range] = []
    room = at_once
    for part in ranges:
        offset, left = part
        while left:
            length = min(left, room)
            group.append(Range(offset, length))
            offset += length
            left -= length
            room -= length
            if room == 0:
                yield group
                group, room = [], at_once
    if group:
        yield group


def _read_note(path: str) -> "Optional[dict[str, object]]":
    try:
        with open(path, encoding="utf-8") as file:
            note = json.loads(file.read(1 << 20))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _write_note(path: str, note: "dict[str, object]") -> None:
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(note, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
