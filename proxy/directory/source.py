"""Where a proxy has its directory from: a file (watcher.py), or the control plane (channel/).

The flows use both in the same way. A file has the whole directory, so each question is answered at
once. The control plane is asked at the first use of an address or a name. The flows wait for the
answer before they use the snapshot (`learn`), and hold an address while a connection to it is open
(`holding`), so that its entry stays current.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import trio

from proxy.directory.former_identities import FormerIdentities
from proxy.directory.reader import DirectoryError
from proxy.directory.snapshot import Directory
from proxy.net.address import Address

Report = Callable[[DirectoryError | None], None]

NOTHING_HELD: AbstractContextManager[None] = nullcontext()


class Source(Protocol):
    """A source of the directory."""

    # Whether `learn` and `learn_name` may have to wait.
    asks: ClassVar[bool]

    @property
    def current(self) -> Directory:
        """The current snapshot. It is replaced as a whole, so read it once per decision."""
        ...

    @property
    def former(self) -> FormerIdentities:
        """The addresses that recently had an identity."""
        ...

    def holding(self, original: Address) -> AbstractContextManager[None]:
        """While this context is open, the entry of the address is in use."""
        ...

    async def learn(self, original: Address) -> None:
        """Wait until the entry of an address that is held is known, or the limit is reached. Never
        raises. Without an answer, the snapshot has `UNANSWERED` for an address of the cluster.
        """
        ...

    async def learn_name(self, authority: bytes, namespace: str) -> None:
        """Wait until the service is known that the authority names for a pod in `namespace`, or the
        limit is reached. Never raises."""
        ...

    def inside(self, host: str) -> bool:
        """Whether an IP address is in the networks of the cluster: nothing is sent there without an
        answer."""
        ...

    def doubt(self) -> None:
        """An endpoint of the snapshot does not answer, or is another peer: the snapshot may be
        old."""
        ...

    async def run(self, report: Report) -> None:
        """Keep the snapshot current until cancelled. Calls `report(None)` after a replacement, and
        `report(error)` for a new error."""
        ...

    def not_ready(self) -> str | None:
        """Why no directory is known yet; None: one is known."""
        ...


@dataclass(slots=True)
class NoSource:
    """The source of a proxy without a directory: an empty one."""

    asks: ClassVar[bool] = False
    current: Directory = field(default_factory=Directory)
    former: FormerIdentities = field(default_factory=lambda: FormerIdentities(0.0, 1))

    # The three take what Source passes, and need none of it: this directory never changes.
    def holding(self, original: Address) -> AbstractContextManager[None]:  # noqa: ARG002
        """See Source."""
        return NOTHING_HELD

    async def learn(self, original: Address) -> None:
        """See Source."""

    async def learn_name(self, authority: bytes, namespace: str) -> None:
        """See Source."""

    # as above
    def inside(self, host: str) -> bool:  # noqa: ARG002
        """See Source."""
        return False

    def doubt(self) -> None:
        """See Source."""

    # as above
    async def run(self, report: Report) -> None:  # noqa: ARG002
        """See Source."""
        await trio.sleep_forever()

    def not_ready(self) -> str | None:
        """See Source."""
        return None
