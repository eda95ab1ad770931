"""What an agent answers, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, List, Mapping, NamedTuple, Optional

from .errors import ChangesUnknownError, ProtocolError

#: The most ranges that an answer about changes may have; more is read in full at less cost.
MAX_RANGES = 4 << 20

_MAX_U64 = (1 << 64) - 1


class Range(NamedTuple):
    """Bytes of a disk."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


@dataclass(frozen=True)
class DiskInfo:
    """What a disk is. The numbers are those of virtdisk.h."""

    #: Size that the guest sees, in bytes.
    virtual_size: int
    #: The parent of a differencing disk.
    parent_path: Optional[str]
    #: 0 unknown, 1 ISO, 2 VHD, 3 VHDX, 4 VHD set.
    virtual_storage_type: int
    #: 2 fixed, 3 dynamic, 4 differencing.
    provider_sub_type: int


@dataclass(frozen=True)
class TrackingState:
    """The state of a disk's change tracking."""

    #: Whether writes are tracked.
    enabled: bool
    #: Whether something was written since the most recent id.
    newer_changes: bool
    #: The most recent id; empty where there is none.
    most_recent_id: str


@dataclass(frozen=True)
class FrozenDisk:
    """One disk of a moment."""

    path: str
    #: In bytes.
    size: int
    #: The tracking id of the moment, for the next time; none where the disk is not tracked.
    tracking_id: Optional[str]


def number(document: Any, key: str, default: Optional[int] = None) -> int:
    """A number of a JSON object, checked."""
    value = document.get(key, default) if isinstance(document, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_U64:
        raise ProtocolError(f"the agent answered without a number {key}")
    return value


def text(document: Any, key: str) -> Optional[str]:
    """A text of a JSON object, or none."""
    value = document.get(key) if isinstance(document, Mapping) else None
    return value if isinstance(value, str) else None


def truth(document: Any, key: str) -> bool:
    """A truth value of a JSON object, checked."""
    value = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(value, bool):
        raise ProtocolError(f"the agent answered without a truth value {key}")
    return value


def parse_ranges(document: Any) -> List[Range]:
    """A JSON list of ``{"offset", "length"}``."""
    if not isinstance(document, list):
        raise ProtocolError("the agent answered no list of ranges")
    if len(document) > MAX_RANGES:
        raise ChangesUnknownError(f"more than {MAX_RANGES} changed ranges: read the disk in full")
    return [Range(number(item, "offset"), number(item, "length")) for item in document]


def tidy(ranges: Iterable[Range], size: int) -> List[Range]:
    """Changed ranges sorted, joined and cut at the end of the disk. One that does not lie on the disk puts the whole
    answer in doubt."""
    result: List[Range] = []
    for part in sorted(ranges):
        if part.length == 0:
            continue
        if part.offset >= size or part.end > _MAX_U64:
            raise ChangesUnknownError(
                f"the changed range {part.offset}+{part.length} is not on a disk of {size} bytes: read the disk in full"
            )
        end = min(part.end, size)
        if result and part.offset <= result[-1].end:
            last = result[-1]
            result[-1] = Range(last.offset, max(last.end, end) - last.offset)
        else:
            result.append(Range(part.offset, end - part.offset))
    return result
