"""Where the credentials of a process come from: one interface for all sources (`identity.source`).

files     mounted or written files: FileSource, below
control   the control plane signs a certificate for a service account token (proxy/enrollment)
spiffe    a SPIFFE Workload API (proxy/enrollment)

A source keeps an Identity current. Its contract:

- It gives complete sets (key, chain, trust roots) to `Identity.use`: one as soon as it has it, and
  another after each change. It never gives an empty or partial set.
- `Identity.use` checks each set. If it raises MaterialError, the set in use stays, and the source
  continues as after any other failure.
- It calls `changed` after each set that is now in use, and `failed` for each failure: once for a
  failure that only repeats itself without an attempt of the source.
- It tries again by itself, without end. `run` only returns when it is cancelled. What is known
  stays in use meanwhile, until it expires. Only after a refusal that the protocol declares final
  (InvalidArgument of a Workload API) does it report once and wait.
- Keys that it makes or receives stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from proxy.files import Settling, signature
from proxy.identity.credential_files import MaterialError
from proxy.identity.identity import Identity

Changed = Callable[[Identity], None]
Failed = Callable[[Exception], None]


class CredentialSource(Protocol):
    """See the top of this module."""

    async def run(self, identity: Identity, changed: Changed, failed: Failed) -> None:
        """Keep `identity` current, until cancelled. The callbacks are synchronous; the exception
        that `failed` gets says what is wrong, in words for an operator.
        """


class FileSource:
    """The files of the identity. Checks for changes every `interval` seconds.

    A check is one stat() per file (it follows the symbolic links that Kubernetes swaps). Only if
    something changed are the contents read. They are used when two reads agree,
    `TLSSettings.settle` seconds apart.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval

    async def run(self, identity: Identity, changed: Changed, failed: Failed) -> None:
        """See CredentialSource."""
        files = identity.files
        paths = files.all if files is not None else ()
        seen: tuple[object, ...] | None = None
        settling = Settling(identity.settings.settle)
        while True:
            # Taken before reading: a change during the read is noticed at the next check.
            signatures = tuple(signature(path) for path in paths)
            # Invalid credentials may become valid without a change of the files: a certificate that
            # is not valid yet.
            if signatures != seen or identity.last_error is not None or settling.waiting:
                seen = signatures
                try:
                    if identity.reload(settling):
                        changed(identity)
                except MaterialError as error:
                    failed(error)
            await trio.sleep(
                min(self._interval, settling.settle) if settling.waiting else self._interval
            )


async def report_expiry(identity: Identity, interval: float, warn: Callable[[str], None]) -> None:
    """Call `warn` for each text of Identity.expiry_warnings, until cancelled. Looks every
    `interval` seconds.
    """
    while True:
        for sentence in identity.expiry_warnings():
            warn(sentence)
        await trio.sleep(interval)
