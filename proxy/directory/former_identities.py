"""Addresses that recently had an identity: the proxy sends no clear text to them.

It is normal that an endpoint or a service leaves the directory. But a connection to an address that
the directory does not have goes there in clear text, so a mistake in the directory would expose it.
For `keep` seconds such a connection fails instead. After that time, operators have noticed the
mistake, or the address belongs to another pod.

An address is released earlier if a new directory gives it an identity again, or permits that it has
none. The proxy never refuses connections to the pod's own addresses, because they do not leave the
pod. `losses` counts what directories have lost, and the log names services and addresses.

Bounded to `most` addresses. The watcher refuses a directory that would exceed this number
(proxy/directory/watcher.py), so no address is dropped to make space."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from proxy.directory import Directory, Former
from proxy.net.address import Address

_log = logging.getLogger("isthmus.directory")

# Maximum number of names in one log line.
_NAMED = 5


@dataclass(slots=True)
class FormerIdentities:
    """Synchronous, without a clock: `now` is in seconds of the caller's clock. `keep` 0: remembers
    nothing. `losses`, for metrics: services with identities that have left the directory, wholly or
    in part (`service`), endpoints that have (`endpoint`), and addresses that are still there
    without their identity (`identity`)."""

    keep: float
    most: int
    losses: Counter[str] = field(
        default_factory=lambda: Counter(service=0, endpoint=0, identity=0), init=False
    )
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
        return self.room(len(former), now)

    def room(self, count: int, now: float) -> bool:
        """Whether this number of addresses fits into the limit."""
        if self.keep and len(self._known) + count > self.most:
            self.sweep(now)
        return not self.keep or len(self._known) + count <= self.most

    def take(
        self,
        directory: Directory,
        former: Mapping[str | Address, Former],
        now: float,
        services: Collection[str] = (),
    ) -> None:
        """`directory` is now in use, and these addresses lost their identity with it. `services`:
        those with identities that have left. Counts and logs what is lost, also services that have
        lost only an address or a port."""
        self._known = {
            what: entry
            for what, entry in self._known.items()
            if entry[0] > now and not _released(what, entry[1], directory)
        }
        self.note(former, now)
        parts = (
            entry.services
            for what, entry in former.items()
            if isinstance(what, Address) and not entry.in_place and what not in directory.clustered
        )
        self._report(former, {*services}.union(*parts))

    def note(self, former: Mapping[str | Address, Former], now: float) -> None:
        """Remember these addresses."""
        if self.keep:
            self._known.update({what: (now + self.keep, entry) for what, entry in former.items()})

    def _report(self, former: Mapping[str | Address, Former], services: Collection[str]) -> None:
        changed = {what: entry for what, entry in former.items() if entry.in_place}
        self.losses["service"] += len(services)
        self.losses["identity"] += len(changed)
        self.losses["endpoint"] += sum(
            isinstance(what, str) and not entry.in_place for what, entry in former.items()
        )
        result = (
            f"the proxy sends no clear text to them for {self.keep:g} s"
            if self.keep
            else "connections to them go out in clear text (directory.remember)"
        )
        if services:
            _log.warning(
                "services with identities have left the directory, or some of their addresses or"
                " ports have: %s; %s",
                _listed(sorted(services)),
                result,
            )
        if changed:
            _log.warning(
                "addresses have lost their identity in the directory: %s; %s",
                _listed(f"{what} had {entry.identity}" for what, entry in changed.items()),
                result,
            )

    def release(self, host: str, *, meshed: bool) -> None:
        """The directory states this host's identity, or that it has none. An address that lost its
        identity in place is released only by an identity: no pod loses its sidecar while it
        runs."""
        found = self._known.get(host)
        if found is not None and (meshed or not found[1].in_place):
            del self._known[host]

    def sweep(self, now: float) -> None:
        """Drop expired entries."""
        if self._known:
            self._known = {what: entry for what, entry in self._known.items() if entry[0] > now}


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return f"{', '.join(every[:_NAMED])}{more}"


def _released(what: str | Address, former: Former, directory: Directory) -> bool:
    host = what.host if isinstance(what, Address) else what
    if directory.allowance.covers((host, *former.services)):
        return True
    if isinstance(what, Address):
        # Connections to a service without endpoints fail. It may leave next.
        target = directory.clustered.get(what)
        return target is not None and bool(target.endpoints or target.plan is not None)
    pod = directory.pods.get(what)
    return pod is not None and pod.endpoint.identity is not None
