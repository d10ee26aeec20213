"""The service account token: a JWT that the kubelet projects into the pod, and replaces in time.

Only the API server can verify it. What is read here is not verified: for whom the token is, so that
the proxy asks for that name, and whether it can be useful at all. A token is a secret: no message
contains one.
"""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from proxy.enrollment.messages import AUDIENCE, MAX_TOKEN_BYTES
from proxy.files import FileUnusable, read_bytes

_PREFIX = "system:serviceaccount:"


class TokenUnusable(Exception):
    """The token cannot be used. The message says why."""


class Claims(msgspec.Struct, frozen=True):
    """What a token says of itself. `exp`: when it expires, in seconds since the epoch."""

    sub: str = ""
    aud: tuple[str, ...] | str = ()
    exp: float = 0.0

    @property
    def audiences(self) -> tuple[str, ...]:
        """For whom the token is."""
        return (self.aud,) if isinstance(self.aud, str) else self.aud

    @property
    def account(self) -> tuple[str, str]:
        """Namespace and name of the service account. Raises TokenUnusable."""
        namespace, _, name = self.sub.removeprefix(_PREFIX).partition(":")
        if not self.sub.startswith(_PREFIX) or not namespace or not name:
            raise TokenUnusable("it is not the token of a service account")
        return namespace, name

    def check(self, audience: str, now: datetime) -> None:
        """Raise TokenUnusable if the token is for another audience, or has expired."""
        if audience not in self.audiences:
            found = ", ".join(self.audiences)[:200] or "none"
            raise TokenUnusable(f"its audience is {found!r}, not {audience!r}")
        if self.exp <= now.timestamp():
            raise TokenUnusable("it has expired")


def read_token(path: Path) -> str:
    """The token in a file. Raises TokenUnusable."""
    try:
        data = read_bytes(path, MAX_TOKEN_BYTES)
    except FileUnusable as error:
        raise TokenUnusable(str(error)) from None
    token = data.decode("ascii", "replace").strip()
    if not token:
        raise TokenUnusable(f"{path} is empty")
    return token


def claims_of(token: str) -> Claims:
    """What a token says of itself; not verified. Raises TokenUnusable."""
    parts = token.split(".")
    try:
        if len(parts) != 3 or len(token) > MAX_TOKEN_BYTES:
            raise ValueError
        payload = base64.b64decode(
            parts[1] + "=" * (-len(parts[1]) % 4), altchars=b"-_", validate=True
        )
        return msgspec.json.decode(payload, type=Claims)
    except (ValueError, binascii.Error, msgspec.MsgspecError, RecursionError):
        raise TokenUnusable("it is not a JSON Web Token") from None


def usable_token(path: Path, now: datetime) -> tuple[str, Claims]:
    """The token in a file, for our audience and not expired. Raises TokenUnusable with the path."""
    token = read_token(path)
    try:
        claims = claims_of(token)
        claims.check(AUDIENCE, now)
        claims.account  # noqa: B018  # raises
    except TokenUnusable as error:
        raise TokenUnusable(f"the token in {path} cannot be used: {error}") from None
    return token, claims


def expiry(claims: Claims) -> datetime:
    """When a token expires."""
    return datetime.fromtimestamp(claims.exp, UTC)
