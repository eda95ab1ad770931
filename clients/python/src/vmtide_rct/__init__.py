"""A client of vmtide's agent, and of rct-service: which ranges of a virtual disk changed, and what they hold."""

from .client import AgentClient, Freeze
from .download import DownloadSummary, download_disk
from .errors import (
    AgentError,
    CertificateError,
    ChangesUnknownError,
    DeniedError,
    NotFoundError,
    ProtocolError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from .model import DiskInfo, FrozenDisk, Range, TrackingState

__all__ = [
    "AgentClient",
    "AgentError",
    "CertificateError",
    "ChangesUnknownError",
    "DeniedError",
    "DiskInfo",
    "DownloadSummary",
    "Freeze",
    "FrozenDisk",
    "NotFoundError",
    "ProtocolError",
    "Range",
    "RefusedError",
    "TrackingState",
    "UnreachableError",
    "UsageError",
    "download_disk",
]
__version__ = "0.1.0"
