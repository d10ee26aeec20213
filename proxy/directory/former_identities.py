"""Addresses that had an identity lately: there is no clear text to them, whatever the directory says now, or does not say.

An endpoint that leaves the directory, and a service that does, are daily business. But a connection to an address that the directory does
not know goes there in clear text, so a directory that is wrong about what has left would let it out. For `keep` seconds such a connection
fails instead. By then a mistake has been noticed, or the address has been given to another pod.

An address is released before that if a new directory gives it an identity again, or allows that it has none. The pod itself is never
refused its own address: nothing of that passes a wire.

Bounded: `most` addresses. A directory that would make them more is not taken (proxy/directory/watcher.py), so none is forgotten for want of
room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.directory import Directory, Former
from proxy.net.address import Address


@dataclass(slots=True)
class FormerIdentities:
    """Synchronous, without a clock of its own: `now` is in seconds of any one clock. `keep` 0: nothing is remembered."""

    keep: float
    most: int
    _known: dict[str | Address, tuple[float, Former]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, address: Address, now: float) -> Former | None:
        """What this address was, if it had an identity less than `keep` seconds ago at this port."""
        known = self._known
        if not known:
            return None
        found = known.get(address.host)
        if found is None or address.port in found[1].skip_ports:
            found = known.get(address)
        return found[1] if found is not None and found[0] > now else None

    def fits(self, former: Mapping[str | Address, Former], now: float) -> bool:
        """Whether there is room for these."""
        self.sweep(now)
        return not self.keep or len(self._known) + len(former) <= self.most

    def take(self, directory: Directory, former: Mapping[str | Address, Former], now: float) -> None:
        """`directory` is used from now on, and has lost these."""
        self._known = {what: entry for what, entry in self._known.items() if entry[0] > now and not _released(what, entry[1], directory)}
        if self.keep:
            self._known.update({what: (now + self.keep, entry) for what, entry in former.items()})

    def sweep(self, now: float) -> None:
        """Forget what was long ago."""
        if self._known:
            self._known = {what: entry for what, entry in self._known.items() if entry[0] > now}


def _released(what: str | Address, former: Former, directory: Directory) -> bool:
    host = what.host if isinstance(what, Address) else what
    if directory.allowance.covers((host, *former.services)):
        return True
    if isinstance(what, Address):
        return what in directory.clustered
    pod = directory.pods.get(what)
    return pod is not None and pod.endpoint.identity is not None
