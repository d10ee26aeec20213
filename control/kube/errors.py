"""What can go wrong with a request to the API server. Nothing else leaves this package for what the
server or the network does."""

from __future__ import annotations


class KubeError(Exception):
    """All errors of this package."""


class AccessError(KubeError):
    """The configuration cannot be used: a kubeconfig, a token, a certificate. The message says
    which, and why; never a secret's text."""


class Unreachable(KubeError):
    """There was no whole answer: no connection, no TLS, no time left, or the connection was lost.
    Whether the server has acted is not known."""


class InvalidAnswer(KubeError):
    """The answer breaks the protocol: no HTTP, no JSON, another kind of object, or larger than the
    limit."""


class TooLarge(InvalidAnswer):
    """The answer is larger than the limit for it. A smaller page may fit."""


class Refused(KubeError):
    """The server said no. `code` is the HTTP status, `reason` the API's word for it ("NotFound",
    "Conflict"; "" if there is none), `retry_after` the seconds that the server asks to wait (None:
    it does not say), `causes` the API's words for details."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        retry_after: float | None = None,
        causes: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(f"{code} {reason}: {message}" if reason else f"{code}: {message}")
        self.code = code
        self.reason = reason
        self.retry_after = retry_after
        self.causes = causes

    @property
    def expired(self) -> bool:
        """The resourceVersion, or the continue token, is older than what the server still knows:
        only a new list helps."""
        return self.code == 410 or self.reason in ("Expired", "Gone")

    @property
    def from_the_future(self) -> bool:
        """The resourceVersion is newer than the server's state: it was restored from a backup, or
        another replica answers."""
        return "ResourceVersionTooLarge" in self.causes
