"""Errors of requests to the API server. The package raises no other errors for what the server or
the network does.
"""

from __future__ import annotations


class KubeError(Exception):
    """The base of all errors of this package."""


class AccessError(KubeError):
    """The configuration is not usable: a kubeconfig, a token or a certificate. The message says
    which and why. It never contains a secret.
    """


class Unreachable(KubeError):
    """There was no complete response: no connection, no TLS, a timeout, or a lost connection. The
    server may or may not have acted.
    """


class InvalidAnswer(KubeError):
    """The response breaks the protocol: not HTTP, not JSON, the wrong kind of object, or larger
    than the limit.
    """


class TooLarge(InvalidAnswer):
    """The response is larger than its limit. A smaller page may fit."""


class Refused(KubeError):
    """The server refused the request, or answered with an error.

    `code` is the HTTP status. `reason` is the API's reason, such as "NotFound" or "Conflict" ("":
    not given). `retry_after` is how many seconds the server asks to wait (None: not given).
    `causes` are the reasons in the details of the Status.
    """

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
        """The resourceVersion or the continue token is too old for the server. Only a new list
        helps.
        """
        return self.code == 410 or self.reason in ("Expired", "Gone")

    @property
    def from_the_future(self) -> bool:
        """The resourceVersion is newer than the server's state: the server was restored from a
        backup, or another replica answers.
        """
        return "ResourceVersionTooLarge" in self.causes
