"""Addresses that recently had an identity: the proxy sends no clear text to them.

It is normal that an endpoint or a service leaves the directory. But a connection to an address that
the directory does not have goes there in clear text, so a mistake in the directory would expose it.
For `keep` seconds such a connection fails instead. After that time, operators have noticed the
mistake, or the address belongs to another pod.

An address is released earlier if a new directory gives it an identity again, or permits that it has
none. The proxy never refuses connections to the pod's own addresses, because they do not leave the
pod.

Bounded to `most` addresses. The watcher refuses a directory that would exceed this number
(proxy/directory/watcher.py), so no address is dropped to make space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.directory import Directory, Former
from proxy.net.address import Address


@dataclass(slots=True)
class FormerIdentities:
    """Synchronous, without a clock: `now` is in seconds of the caller's clock. `keep` 0: remembers
    nothing."""

    keep: float
    most: int
    _known: dict[str | Address, tuple[float, Former]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, address: Address, now: float) -> Former | None:
        """The former identity of an address, if it had one at this port less than `keep` seconds
        ago."""
        known = self._known
        if not known:
            return None
        found = known.get(address.host)
        if found is None or address.port in found[1].skip_ports:
            found = known.get(address)
        return found[1] if found is not None and found[0] > now else None

    def fits(self, former: Mapping[str | Address, Former], now: float) -> bool:
        """Whether these addresses fit into the limit."""
        self.sweep(now)
        return not self.keep or len(self._known) + len(former) <= self.most

    def take(
        self, directory: Directory, former: Mapping[str | Address, Former], now: float
    ) -> None:
        """`directory` is now in use, and these addresses lost their identity with it."""
        self._known = {
            what: entry
            for what, entry in self._known.items()
            if entry[0] > now and not _released(what, entry[1], directory)
        }
        if self.keep:
            self._known.update({what: (now + self.keep, entry) for what, entry in former.items()})

    def release(self, host: str) -> None:
        """The host is known to have no identity now: clear text is right."""
        self._known.pop(host, None)

    def sweep(self, now: float) -> None:
        """Drop expired entries."""
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
