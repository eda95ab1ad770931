"""What can go wrong: one class for each thing that a caller does something else about."""

from __future__ import annotations


class AgentError(Exception):
    """Anything that went wrong with an agent; one line, without the key."""

    #: How a program ends that fails with this.
    exit_code = 1


class UsageError(AgentError):
    """An option or argument that cannot be."""

    exit_code = 2


class UnreachableError(AgentError):
    """The agent cannot be reached, or went away and did not come back."""


class CertificateError(AgentError):
    """The agent's certificate is not the expected one."""


class DeniedError(AgentError):
    """The key is missing, wrong, or lacks the right."""

    exit_code = 4


class NotFoundError(AgentError):
    """There is no such disk, tracking id or freeze. ``code`` is the agent's own word for it, or empty."""

    exit_code = 6

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class ChangesUnknownError(NotFoundError):
    """What changed is not known: the id is unknown, tracking is off or was lost, or the answer breaks its own rules.
    Read the disk in full."""


class RefusedError(AgentError):
    """The agent refused or failed. ``status`` is that of HTTP, ``code`` the agent's own word for it, or empty."""

    def __init__(self, message: str, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ProtocolError(AgentError):
    """The agent does not keep to its protocol."""
