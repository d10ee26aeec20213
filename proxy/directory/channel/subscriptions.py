"""What a proxy has asked the control plane for, and what it knows: a state machine without I/O.

An entry is wanted while connections use it, and stays subscribed for a while after the last one.
Its content is kept when the connection to the control plane is lost. After a reconnect, the proxy
subscribes to all entries with the versions that it knows, and gets what has changed since. Only an
answer for an entry changes it: no error, and nothing that is missing, makes a known entry unknown.

The number of entries that are followed is limited. If it is reached, the entry that has been unused
longest is dropped. If all are in use, a new one is not followed (`refused`). A refused entry that
is still in use is tried again (`retry`).
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from proxy.directory.channel.messages import (
    MOST_KEYS,
    ChannelError,
    Current,
    FromProxy,
    Goodbye,
    Message,
    Ping,
    Refused,
    Subscribe,
    Unavailable,
    Unsubscribe,
    Update,
    Welcome,
)

State = Literal["waiting", "known", "refused"]


def address_key(host: str) -> str:
    """The key of an IP address, in its canonical form."""
    return f"a/{host}"


def service_key(name: str) -> str:
    """The key of a service, given as "name.namespace"."""
    service, _, namespace = name.partition(".")
    return f"s/{namespace}/{service}"


@dataclass(slots=True, eq=False)
class FollowedEntry:
    """One entry. `waiting`: no answer yet. `known`: it has a content, which may be that the mesh
    does not have it. `users`: open connections that use it; `unused`: since when there are none.
    `withheld`: the replica cannot tell now whether the entry exists."""

    key: str
    state: State = "waiting"
    version: bytes = b""
    users: int = 0
    unused: float = 0.0
    sent: bool = False  # the control plane has the subscription
    withheld: bool = False
    refused_at: float = -math.inf  # by the control plane


class Subscriptions:
    """All entries of a proxy. `most`: how many are followed at once. Times are of the caller's
    clock, in seconds. `dropped` has the keys that were dropped; the caller clears it. `may_drop` is
    called with the key of an entry before it is dropped because it is unused. False: it stays."""

    def __init__(self, most: int, may_drop: Callable[[str], bool] = lambda _: True) -> None:
        self.entries: dict[str, FollowedEntry] = {}
        self.dropped: list[str] = []
        self.connected = False
        self._most = self._limit = most
        self._may_drop = may_drop
        self._unused: OrderedDict[str, FollowedEntry] = OrderedDict()
        self._add: dict[str, None] = {}
        self._remove: dict[str, None] = {}
        self._refused = 0

    # What the proxy uses

    def want(self, key: str) -> FollowedEntry:
        """Use an entry. The caller must `release` it."""
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = FollowedEntry(key)
            if len(self.entries) - self._refused > self._limit and not self._drop_unused(key):
                entry.state = "refused"
                self._refused += 1
            else:
                self._follow(entry)
        elif not entry.users:
            self._unused.pop(key, None)
        entry.users += 1
        return entry

    def release(self, entry: FollowedEntry, now: float) -> None:
        """A use of the entry has ended."""
        entry.users -= 1
        if not entry.users:
            if entry.state == "refused":
                self._drop(entry)
            else:
                entry.unused = now
                self._unused[entry.key] = entry

    def expire(self, before: float) -> None:
        """Drop the entries that have been unused since `before` or longer. Nothing is dropped while
        the control plane is unavailable."""
        while self.connected and self._unused:
            entry = next(iter(self._unused.values()))
            if entry.unused > before or not self._may_drop(entry.key):
                return
            self._drop(entry)

    def retry(self, now: float, after: float) -> None:
        """Follow refused entries, as far as there is room now: those that were refused here, and
        those that the control plane has refused at least `after` seconds ago."""
        if not self.connected:
            return
        for entry in list(self.entries.values()):
            if entry.sent or entry.key in self._add or entry.refused_at > now - after:
                continue
            if entry.state == "known":  # only a change was refused
                self._follow(entry)
                continue
            full = len(self.entries) - self._refused >= self._limit
            if full and not self._drop_unused(entry.key):
                return
            self._set(entry, "waiting")
            self._follow(entry)

    def _drop_unused(self, key: str) -> bool:
        entry = next(iter(self._unused.values()), None)
        if entry is None or entry.key == key or not self._may_drop(entry.key):
            return False
        self._drop(entry)
        return True

    def _drop(self, entry: FollowedEntry) -> None:
        key = entry.key
        del self.entries[key]
        self._unused.pop(key, None)
        self._add.pop(key, None)
        if entry.state == "refused":
            self._refused -= 1
        if entry.sent:
            self._remove[key] = None
        self.dropped.append(key)

    def _follow(self, entry: FollowedEntry) -> None:
        if entry.key in self._remove:  # the control plane still has the former subscription
            del self._remove[entry.key]
            entry.sent = True
        if self.connected:
            self._add[entry.key] = None

    # The connection

    def lost(self) -> None:
        """The connection has ended. What is known stays."""
        self.connected = False
        self._add.clear()
        self._remove.clear()
        for entry in self.entries.values():
            entry.sent = entry.withheld = False

    @property
    def unsent(self) -> bool:
        """Whether `take` has messages."""
        return bool(self._add or self._remove)

    def received(self, message: Message, now: float = 0.0) -> list[str]:
        """Apply a message. Returns the entries that have an answer now: a new content, a refusal,
        or that the replica does not know. Raises ChannelError."""
        if isinstance(message, Welcome):
            self._welcome(message)
        elif not self.connected and not isinstance(message, Goodbye):
            raise ChannelError(f"{type(message).__name__} before Welcome")
        elif isinstance(message, Update):
            entry = self.entries.get(message.key)
            if entry is not None and entry.sent:
                self._set(entry, "known")
                entry.withheld = False
                entry.version = message.version
                return [message.key]
        elif isinstance(message, Current):
            pass  # also the answer to an earlier subscription of an entry that was dropped since
        elif isinstance(message, Refused):
            refused = self._sent(message.keys)
            for entry in refused:
                entry.sent = False
                entry.refused_at = now
                if entry.state == "waiting":
                    self._set(entry, "refused")
            return [entry.key for entry in refused]
        elif isinstance(message, Unavailable):
            withheld = [entry for entry in self._sent(message.keys) if entry.state == "waiting"]
            for entry in withheld:
                entry.withheld = True
            return [entry.key for entry in withheld]
        elif not isinstance(message, Goodbye | Ping):
            raise ChannelError(f"{type(message).__name__} from the control plane")
        return []

    def _sent(self, keys: Iterable[str]) -> list[FollowedEntry]:
        found = (self.entries.get(key) for key in keys)
        return [entry for entry in found if entry is not None and entry.sent]

    def _set(self, entry: FollowedEntry, state: State) -> None:
        self._refused += (state == "refused") - (entry.state == "refused")
        entry.state = state

    def _welcome(self, message: Welcome) -> None:
        if self.connected:
            raise ChannelError("a second Welcome")
        self.connected = True
        self._limit = max(0, min(self._most, message.subscriptions))
        # Those in use first. Of the others, the ones used last.
        ordered = [
            *(entry for entry in self.entries.values() if entry.users),
            *reversed(self._unused.values()),
        ]
        for entry in ordered[: self._limit]:
            if entry.state == "refused":
                self._set(entry, "waiting")
            self._add[entry.key] = None
        for entry in ordered[self._limit :]:
            if not entry.users and self._may_drop(entry.key):
                self._drop(entry)
            elif entry.state == "waiting":
                self._set(entry, "refused")

    def take(self) -> list[FromProxy]:
        """The messages to send now."""
        messages: list[FromProxy] = [Unsubscribe(tuple(keys)) for keys in _parts(self._remove)]
        self._remove.clear()
        for keys in _parts(self._add):
            entries = [self.entries[key] for key in keys]
            messages.append(Subscribe(tuple((entry.key, entry.version) for entry in entries)))
            for entry in entries:
                entry.sent = True
        self._add.clear()
        return messages


def _parts(keys: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(keys)
    while part := list(itertools.islice(rest, MOST_KEYS)):
        yield part
