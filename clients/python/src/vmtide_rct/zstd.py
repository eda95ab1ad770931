"""Decompressing zstd, by whatever this Python has."""

from __future__ import annotations

from typing import Any, List, Optional


def _module() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14

        return zstd
    except ImportError:
        pass
    try:
        import zstandard  # type: ignore[import-not-found,unused-ignore]

        return zstandard
    except ImportError:
        return None


def is_available() -> bool:
    """Whether this Python can decompress zstd: 3.14 and later by itself, earlier ones with the package zstandard."""
    return _module() is not None


class Decompressor:
    """Takes zstd frames apart, one after the other."""

    def __init__(self) -> None:
        self._module = _module()
        self._frame: Optional[Any] = None

    def _new_frame(self) -> Any:
        decompressor = self._module.ZstdDecompressor()
        return decompressor.decompressobj() if hasattr(decompressor, "decompressobj") else decompressor

    def feed(self, data: bytes) -> bytes:
        """What ``data`` decompresses to; the rest comes with what is fed next."""
        parts: List[bytes] = []
        while data:
            if self._frame is None:
                self._frame = self._new_frame()
            parts.append(self._frame.decompress(data))
            if not self._frame.eof:
                break
            data = self._frame.unused_data
            self._frame = None
        return b"".join(parts)

    @property
    def is_between_frames(self) -> bool:
        """Whether all that was fed was whole frames."""
        return self._frame is None
