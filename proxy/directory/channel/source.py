"""The control plane as the source of the directory: one mutual-TLS connection, and what it tells.

The connection is opened again whenever it ends. The pauses grow and are varied at random, so that
the proxies of a cluster do not return at the same moment. What is known stays in use meanwhile
(subscriptions.py), and unused entries are kept too. So a control plane that is unavailable matters
only to the first use of an address or name.

`current` is replaced after each answer. An address is in use while a connection to it is open
(`holding`), so requests on an open connection never wait, and cost nothing here.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import ClassVar

import trio

from proxy.config.schema_files import ControlPlaneConfig
from proxy.directory.channel.assembly import Assembly
from proxy.directory.channel.connector import Connector, close
from proxy.directory.channel.messages import (
    ChannelError,
    Frames,
    FromControl,
    Goodbye,
    Hello,
    Ping,
    Unavailable,
    Update,
    Welcome,
    frame,
    from_control,
)
from proxy.directory.channel.pauses import Pauses
from proxy.directory.channel.subscriptions import (
    FollowedEntry,
    Subscriptions,
    address_key,
    service_key,
)
from proxy.directory.channel.views import Content, decode
from proxy.directory.former_identities import FormerIdentities
from proxy.directory.service_names import ServiceNames, split_authority
from proxy.directory.snapshot import Directory
from proxy.directory.source import Report
from proxy.identity.identity import PeerRefused
from proxy.net.address import Address
from proxy.net.exceptions import NetError, TLSFailed
from proxy.net.tls.handshake import TLSStream
from proxy.settings.units import Network

_log = logging.getLogger("isthmus.directory")

# Used until the control plane has reported the networks of the cluster.
PRIVATE: tuple[Network, ...] = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)
# Heartbeats that may be missing before the connection counts as dead.
SILENCE = 3
# The shortest and longest interval (seconds) between heartbeats that is accepted.
_HEARTBEATS = 0.05, 300.0
# Seconds between two looks for unused entries.
_SWEEP = 5.0
_MOST_NETWORKS = 256
# Seconds until an entry that the control plane has refused is asked for again.
_RETRY = 30.0


class ChannelEnded(Exception):
    """The control plane has closed the connection, or no longer answers."""


class ControlSource:
    """See proxy/directory/source.py. Attributes for metrics: `connects` by result, `updates`,
    `unanswered`, `since` (Unix time of the connection) and `last_message` (trio's time
    of the last message)."""

    asks: ClassVar[bool] = True

    def __init__(
        self,
        settings: ControlPlaneConfig,
        hello: Hello,
        connector: Connector,
        former: FormerIdentities,
    ) -> None:
        self.settings = settings
        self.former = former
        self.subscriptions = Subscriptions(settings.max_subscriptions, self._may_drop)
        self.connects: Counter[str] = Counter()
        self.updates = self.unanswered = 0
        self.since: float | None = None
        self.last_message: float | None = None
        self.replica = ""
        self.chance = random.Random()  # noqa: S311  # spreads reconnects
        self._reached = False
        self._why = "connecting"
        self._hello = hello
        self._connector = connector
        self._networks: tuple[Network, ...] = settings.networks or PRIVATE
        self._assembly = Assembly()
        self._dropping = 0  # addresses with an identity in entries that are about to be dropped
        self._postponed: dict[str, Content | None] = {}
        self._peer: Address | None = None  # of the last connection
        self._avoid: Address | None = None  # for the next one
        self._pauses = Pauses(settings, self.chance)
        self._full = False  # `former` has no room, and the log says so
        self._heartbeat = _HEARTBEATS[1]
        self._wake = trio.Event()  # the writer has something to send
        self._answers: dict[str, trio.Event] = {}  # by key
        self._report: Report = lambda _: None
        self._frames = Frames(settings.max_message)

    # For the flows

    @property
    def current(self) -> Directory:
        """See Source."""
        return self._assembly.current

    def holding(self, original: Address) -> _Held:
        """See Source."""
        return _Held(self, original.host)

    def inside(self, host: str) -> bool:
        """See Source."""
        literal = ipaddress.ip_address(host)
        return any(literal in network for network in self._networks)

    async def learn(self, original: Address) -> None:
        """See Source."""
        host, requested = original.host, self._assembly.requested
        if host in requested.hosts:
            inside = self.inside(host)
            await self._answer(address_key(host), inside=inside)
            if not inside:
                requested.hosts.discard(host)
        if host in requested.unidentified:
            await self._identified(host)

    async def learn_name(self, authority: bytes, namespace: str) -> None:
        """See Source."""
        parts = split_authority(authority)
        name = (
            ServiceNames[object](self._assembly.domain).local(parts[0], namespace)
            if parts
            else None
        )
        if name is None or name in self._assembly.requested.names:
            return
        key = service_key(name)
        entry = self.use(key)
        try:
            await self._answer(key, inside=True)
        finally:
            self.release(entry)

    async def _answer(self, key: str, *, inside: bool) -> None:
        """Wait until the entry is known. Outside the cluster, only while there is a connection to a
        replica that can tell."""
        entry = self.subscriptions.entries.get(key)
        if entry is None:
            return
        with trio.move_on_after(self.settings.first_use_timeout):
            while entry.state == "waiting" and (
                inside or (self.subscriptions.connected and not entry.withheld)
            ):
                await self._answers.setdefault(key, trio.Event()).wait()
        if entry.state != "known":
            self.unanswered += 1

    async def _identified(self, host: str) -> None:
        """Wait until the identity at an address is known, if the control plane expects it soon."""
        pending, key = self._assembly.pending, address_key(host)
        with trio.move_on_after(self.settings.first_use_timeout):
            while host in pending:
                await self._answers.setdefault(key, trio.Event()).wait()
        if host in self._assembly.requested.unidentified:
            self.unanswered += 1

    def use(self, key: str) -> FollowedEntry:
        """Use an entry; `release` ends the use."""
        entry = self.subscriptions.want(key)
        self._tidy()
        if self.subscriptions.unsent:
            self._wake.set()
        return entry

    def await_host(self, host: str) -> None:
        """The host's entry is in use, and may be unknown."""
        self._assembly.requested.hosts.add(host)

    def release(self, entry: FollowedEntry) -> None:
        """End a use."""
        self.subscriptions.release(entry, trio.current_time())
        self._tidy()

    def _tidy(self) -> None:
        """Entries that were dropped leave the snapshot."""
        dropped = self.subscriptions.dropped
        if dropped:
            self.former.note(self._assembly.drop(dropped), trio.current_time())
            self._dropping = 0
            for key in dropped:
                self._postponed.pop(key, None)
                self._answered(key)
            dropped.clear()
            if self.subscriptions.unsent:
                self._wake.set()

    def _may_drop(self, key: str) -> bool:
        """Whether an unused entry may be dropped: its identities must be remembered."""
        count = self._assembly.identity_count(key)
        if count and not self.former.room(self._dropping + count, trio.current_time()):
            self._log_full()
            return False
        self._dropping += count
        return True

    def _log_full(self) -> None:
        if not self._full:
            self._full = True
            _log.error(
                "entries whose endpoints lose their identities stay in use: more than %d addresses"
                " would be remembered (directory.max_remembered)",
                self.former.most,
            )

    def _answered(self, key: str) -> None:
        event = self._answers.pop(key, None)
        if event is not None:
            event.set()

    def states(self) -> Mapping[str, int]:
        """The number of entries by state."""
        found = Counter({"waiting": 0, "known": 0, "refused": 0})
        found.update(entry.state for entry in self.subscriptions.entries.values())
        return found

    def not_ready(self) -> str | None:
        """See Source."""
        if self._reached:
            return None
        return f"the directory has never been reached: {self._why}"

    # The connection

    async def run(self, report: Report) -> None:
        """See Source."""
        self._report = report
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            while True:
                await self._connect_once()
                wait = self._pauses.next(worked=self.since is not None)
                self.since = None
                _log.warning(
                    "no connection to the control plane at %s: %s; %d entries stay in use; next"
                    " attempt in %.1f s",
                    self.settings.address,
                    self._why,
                    len(self.subscriptions.entries),
                    wait,
                )
                await self._pauses.wait(wait)

    def doubt(self) -> None:
        """See Source."""
        if not self.subscriptions.connected:
            self._pauses.hurry()

    async def _sweep(self) -> None:
        requested = self._assembly.requested
        while True:
            await trio.sleep(min(_SWEEP, self.settings.unused / 2))
            for name in requested.used:
                if name in requested.names:
                    self.release(self.use(service_key(name)))
            requested.used.clear()
            now = trio.current_time()
            self.subscriptions.expire(now - self.settings.unused)
            self.subscriptions.retry(now, _RETRY)
            self._tidy()
            if self.subscriptions.unsent:
                self._wake.set()
            self._use({})

    async def probe(self, timeout: float) -> str:
        """Connect once, exchange greetings and close, within `timeout` seconds. Returns the replica
        that answered. Raises ChannelError, with the reason. Not while `run` runs."""
        stream: TLSStream | None = None
        try:
            with trio.fail_after(timeout):
                stream = await self._connector.open(self.settings, self.chance)
                await self._greet(stream)
        except trio.TooSlowError:
            raise ChannelError(f"no answer within {timeout:g} s") from None
        except (TLSFailed, PeerRefused, NetError, ChannelEnded, OSError, UnicodeError) as error:
            raise ChannelError(str(error) or type(error).__name__) from error
        finally:
            self._lost()
            if stream is not None:
                close(stream)
        return self.replica

    async def _connect_once(self) -> None:
        """Open a connection and use it until it ends. `_why` is the reason."""
        stream: TLSStream | None = None
        result = "unreachable"
        try:
            with trio.fail_after(self.settings.connect_timeout):
                stream = await self._connector.open(self.settings, self.chance, self._avoid)
                result, self._avoid = "protocol", None
                await self._greet(stream)
            result = "ok"
            self.connects[result] += 1
            await self._talk(stream)
        except trio.TooSlowError:
            self._why = f"no answer within {self.settings.connect_timeout:g} s"
            result = "timeout" if result != "ok" else result
        except (TLSFailed, PeerRefused) as error:
            self._why = str(error)
            result = "tls" if result != "ok" else result
        except (NetError, ChannelError, ChannelEnded, OSError, UnicodeError) as error:
            self._why = str(error) or type(error).__name__
        finally:
            if result != "ok":
                self.connects[result] += 1
            self._lost()
            if stream is not None:
                close(stream)

    async def _greet(self, stream: TLSStream) -> None:
        self._frames = Frames(self.settings.max_message)
        await stream.send_all(frame(self._hello))
        while not self.subscriptions.connected:
            await self._receive(stream)
        self.since, self._reached, self._peer = time.time(), True, stream.peer
        _log.info(
            "connected to the control plane at %s, replica %s: %d entries",
            stream.peer,
            self.replica,
            len(self.subscriptions.entries),
        )

    async def _talk(self, stream: TLSStream) -> None:
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            nursery.start_soon(self._until_failure, scope, self._write, stream)
            await self._until_failure(scope, self._read, stream)

    async def _until_failure(
        self,
        scope: trio.CancelScope,
        half: Callable[[TLSStream], Awaitable[None]],
        stream: TLSStream,
    ) -> None:
        try:
            await half(stream)
        except (NetError, ChannelError, ChannelEnded) as error:
            if not scope.cancel_called:
                self._why = str(error)
            scope.cancel()

    async def _read(self, stream: TLSStream) -> None:
        limit = SILENCE * self._heartbeat
        while True:
            with trio.move_on_after(limit):
                await self._receive(stream)
                continue
            raise ChannelEnded(f"no message for {limit:g} s")

    async def _write(self, stream: TLSStream) -> None:
        while True:
            with trio.move_on_after(self._heartbeat):
                await self._wake.wait()
            self._wake = trio.Event()
            messages = self.subscriptions.take() or [Ping()]
            with trio.move_on_after(self.settings.write_timeout):
                await stream.send_all(b"".join(map(frame, messages)))
                continue
            raise ChannelEnded(
                f"the control plane has read nothing for {self.settings.write_timeout:g} s"
            )

    async def _receive(self, stream: TLSStream) -> None:
        """Receive and apply some messages."""
        data = await stream.receive_some()
        if not data:
            raise ChannelEnded("the control plane has closed the connection")
        self.last_message = trio.current_time()
        contents: dict[str, Content | None] = {}
        try:
            for part in self._frames.feed(data):
                self._apply(from_control(part), contents)
        finally:
            # What was valid before a mistake counts: its version is noted already.
            self._use(contents)

    def _apply(self, message: FromControl, contents: dict[str, Content | None]) -> None:
        # Decoded first: a content that cannot be used must not count as known.
        view = decode(message.content) if isinstance(message, Update) else None
        for key in self.subscriptions.received(message, trio.current_time()):
            self._answered(key)
            if isinstance(message, Unavailable):
                self._leave_replica()
            if isinstance(message, Update):
                self.updates += 1
                contents[key] = view
        if isinstance(message, Welcome):
            self._welcome(message)
        elif isinstance(message, Goodbye):
            raise ChannelEnded(f"the control plane has closed the connection: {message.reason}")

    def _leave_replica(self) -> None:
        """The replica does not have current data. Another one may have. Raises ChannelEnded, but
        not often: all may be cut off."""
        if self._pauses.may_leave():
            self._avoid = self._peer
            raise ChannelEnded(f"replica {self.replica} is cut off from the API server")

    def _welcome(self, message: Welcome) -> None:
        low, high = _HEARTBEATS
        self._heartbeat = max(low, min(high, message.heartbeat))  # also of NaN
        self.replica = message.replica
        try:
            announced = tuple(map(ipaddress.ip_network, message.networks[:_MOST_NETWORKS]))
        except ValueError as error:
            raise ChannelError(f"Welcome has an invalid network: {error}") from None
        self._networks = self.settings.networks or announced or PRIVATE
        self._assembly.rename(message.domain)
        self._tidy()
        self._wake.set()

    def _use(self, contents: dict[str, Content | None]) -> None:
        """Use these contents, and those that were postponed."""
        contents = self._postponed | contents
        if not contents:
            return
        now = trio.current_time()
        self._postponed = {}
        losing = 0
        for key, count in self._assembly.losing(contents).items():
            if self.former.room(losing + count, now):
                losing += count
            else:
                self._postponed[key] = contents.pop(key)
        if self._postponed:
            self._log_full()
        else:
            self._full = False
        if not contents:
            return
        losses = self._assembly.apply(contents)
        for host in losses.plain:
            self.former.release(host, meshed=False)
        for host in losses.meshed:
            self.former.release(host, meshed=True)
        self.former.take(self.current, losses.former, now, losses.services)
        self._report(None)

    def _lost(self) -> None:
        self.subscriptions.lost()
        for key in list(self._answers):
            self._answered(key)


class _Held:
    """The context manager that ControlSource.holding returns."""

    __slots__ = ("_entry", "_host", "_source")

    def __init__(self, source: ControlSource, host: str) -> None:
        self._source = source
        self._host = host
        self._entry: FollowedEntry | None = None

    def __enter__(self) -> None:
        self._entry = self._source.use(address_key(self._host))
        if self._entry.state != "known":
            self._source.await_host(self._host)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entry is not None:
            self._source.release(self._entry)
