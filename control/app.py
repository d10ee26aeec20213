"""The control plane process: discovery, the directory for proxies and an admin listener in one trio
loop.

    run
    ├── signals         stops on SIGTERM or SIGINT
    ├── admin           /live, /ready, /metrics
    ├── discovery       in every replica
    ├── channel         the directory for proxies, in every replica, when discovery is complete
    ├── issuing         certificates for proxies, in every replica, if there is an issuer
    ├── issuer          loads a changed issuer or trust roots
    ├── credentials     gets the control plane's own certificate, and renews it
    └── election        one replica leads; it writes events about services that have a problem

The process is stateless. A replica reads everything again when it starts, and is then ready.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import trio

from control.admin import Admin
from control.channel.server import Announcement, Channel
from control.config import Settings
from control.contract import SpiffeId
from control.discovery.catalog import Catalog, Changes
from control.discovery.discovery import Discovery, Watching
from control.identity.authority import Authority, World
from control.identity.issuer import Issuer
from control.identity.own import OwnCredentials
from control.identity.service import IssuingService
from control.kube.client import Client
from control.kube.event_recorder import EventContent, EventRecorder
from control.kube.leader_election import Election
from control.kube.objects import ObjectReference
from control.kube.resources import Key
from control.metrics import Metrics, Parts
from proxy.directory.channel.messages import ALPN
from proxy.enrollment.messages import ALPN as ISSUING_ALPN
from proxy.enrollment.messages import SKEW
from proxy.identity.identity import Identity, MaterialFiles, TLSSettings
from proxy.identity.issue import Validity
from proxy.identity.source import CredentialSource, FileSource, report_expiry
from proxy.net.address import Address

_log = logging.getLogger("isthmus.control")

CONTROLLER = "isthmus.dev/control"
# Seconds between two reads of changed ones, which must agree.
SETTLE = 0.5


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """The listener for proxies. `files`: the control plane's own certificate, key and trust roots;
    None: the issuer makes the certificate. `listen`: host and port. `networks`: of the cluster, as
    CIDR. `domain`: of the cluster."""

    files: MaterialFiles | None
    listen: tuple[str, int] = ("::", 4190)
    networks: tuple[str, ...] = ()
    domain: str = "cluster.local"


@dataclass(frozen=True, slots=True)
class IssuingConfig:
    """The issuer of certificates for proxies. `directory`: a mounted Secret with its certificate
    and key. `roots`: the trust roots. `account`: the service account of the control plane.
    `listen`: host and port."""

    directory: Path
    roots: tuple[Path, ...]
    account: str = "isthmus-control"
    listen: tuple[str, int] = ("::", 4192)


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """`namespace`: where the lease is. `identity`: the unique name of this replica. `admin`: host
    and port of the admin listener; None: no listener. `channel`: the listener for proxies; None:
    no listener. `issuing`: certificates for proxies; None: none. It needs `channel`. `settings`:
    limits, waits and queues.
    """

    trust_domain: str = "cluster.local"
    namespace: str = "isthmus"
    identity: str = "control"
    admin: tuple[str, int] | None = ("::", 4191)
    channel: ChannelConfig | None = None
    issuing: IssuingConfig | None = None
    settings: Settings = field(default_factory=Settings)


class Control:
    """One replica. Owns `client`."""

    def __init__(self, config: ControlConfig, client: Client) -> None:
        """Raises SpiffeIdError if the trust domain is not valid, MaterialError if the certificate,
        key and roots of the channel are not."""
        self.config = config
        self.client = client
        settings = config.settings
        networks = config.channel.networks if config.channel is not None else ()
        catalog = Catalog(config.trust_domain, networks)
        watching = Watching(settings.watch, settings.backoff)
        self.discovery = Discovery(client, catalog, self._on_changes, settings.discovery, watching)
        lease = config.namespace, settings.lease.name
        self.election = Election(client, lease, config.identity, settings.lease)
        self.recorder = EventRecorder(client, CONTROLLER, config.identity, settings.events)
        self.identity: Identity | None = None
        self.channel: Channel | None = None
        self.issuing: IssuingService | None = None
        self.identified = trio.Event()  # the own certificate is there
        if config.channel is not None:
            opened = frozenset((ISSUING_ALPN,)) if config.issuing is not None else frozenset()
            self.identity = Identity(
                config.channel.files,
                TLSSettings(
                    session_lifetime=0.0,
                    own_domain=config.trust_domain,
                    settle=SETTLE,
                    protocols=frozenset((ALPN,)),
                    open_protocols=opened,
                ),
            )
            if self.identity.known:
                self.identified.set()
            self.channel = Channel(
                self.discovery.catalog,
                self.identity,
                settings.channel,
                Announcement(config.identity, config.channel.networks, config.channel.domain),
            )
            self.channel.views.is_current = self.discovery.is_current
            self.discovery.on_current = self.channel.views.answer_withheld
            self.discovery.on_flush = self.channel.views.answer_settled
            if config.issuing is not None:
                self.issuing = self._issuing(config.issuing, self.identity)
        self._reported: dict[Key, tuple[str, ...]] = {}

    def _issuing(self, config: IssuingConfig, identity: Identity) -> IssuingService:
        """Raises SpiffeIdError."""
        settings, catalog = self.config.settings, self.discovery.catalog
        self.own_name = SpiffeId(self.config.trust_domain, self.config.namespace, config.account)
        issuer = Issuer(config.directory, config.roots, self.own_name)
        issuer.read()

        def uid_of(pod: Key) -> str | None:
            known = catalog.pod_of(pod)
            return known.uid if known is not None else None

        # Refusals are reported by the replica that refuses, and not by the leader.
        recorder = EventRecorder(self.client, CONTROLLER, self.config.identity, settings.events)
        world = World(self.client, recorder, uid_of)
        authority = Authority(self.config.trust_domain, issuer, settings.issuing, world)
        return IssuingService(authority, identity)

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        channel_listeners: Sequence[socket.socket] = (),
        issuing_listeners: Sequence[socket.socket] = (),
    ) -> None:
        """Run until SIGTERM or SIGINT, then release the lease. Owns the listeners of the admin
        pages, of the channel and of issuing."""
        parts = Parts(
            self.discovery, self.election, self.recorder, self.client, self.channel, self.issuing
        )
        admin = Admin(self.not_ready, Metrics(parts).render, self.config.settings.admin)
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(admin.serve, listeners)
                    nursery.start_soon(self.discovery.run)
                    nursery.start_soon(self._take_part)
                    nursery.start_soon(self._serve_proxies, channel_listeners)
                    nursery.start_soon(self._watch_identity)
                    nursery.start_soon(self._serve_issuing, issuing_listeners)
                    async for number in signals:
                        _log.info("received %s: shutting down", signal.Signals(number).name)
                        break
                    nursery.cancel_scope.cancel()
        finally:
            await self.client.aclose()

    async def _take_part(self) -> None:
        # A leader without data has nothing to report.
        await self.discovery.ready.wait()
        await self.election.run(self._lead)

    async def _serve_proxies(self, listeners: Sequence[socket.socket]) -> None:
        if self.channel is None:
            return
        for listener in listeners:
            _log.info("proxies connect to %s", Address.of(listener.getsockname()))
        # Before that, an entry that is missing would be taken for one that does not exist. The
        # kernel keeps connections of proxies until then.
        await self.discovery.ready.wait()
        await self.identified.wait()
        await self.channel.serve(listeners)

    async def _serve_issuing(self, listeners: Sequence[socket.socket]) -> None:
        if self.issuing is None:
            return
        for listener in listeners:
            _log.info("certificates are issued at %s", Address.of(listener.getsockname()))
        authority = self.issuing.authority
        async with trio.open_nursery() as nursery:
            nursery.start_soon(authority.issuer.watch, self.config.settings.channel.reload_interval)
            nursery.start_soon(authority.recorder.run)
            await self.identified.wait()
            await self.issuing.serve(listeners)

    async def _watch_identity(self) -> None:
        if self.identity is None:
            return
        interval = self.config.settings.channel.reload_interval
        async with trio.open_nursery() as nursery:
            nursery.start_soon(report_expiry, self.identity, interval, self._warn)
            await self._source(interval).run(self.identity, self._renewed, self._broken)

    def _source(self, interval: float) -> CredentialSource:
        """Where the control plane's own certificate comes from."""
        if self.issuing is None or (self.identity is not None and self.identity.files is not None):
            return FileSource(interval)
        lifetime = timedelta(seconds=self.config.settings.issuing.lifetime)
        issuer = self.issuing.authority.issuer
        return OwnCredentials(issuer, self.own_name, Validity(lifetime, SKEW))

    def _renewed(self, identity: Identity) -> None:
        self.identified.set()
        _log.info(
            "new certificate or trust roots in use: valid until %s", identity.not_after.isoformat()
        )
        if self.channel is not None:
            self.channel.check_trust()

    def _broken(self, error: Exception) -> None:
        _log.error("cannot use the changed certificate, key or roots: %s", error)

    def _warn(self, words: str) -> None:
        _log.warning("%s", words)

    async def _lead(self) -> None:
        self._reported.clear()
        self._report_problems()
        await self.recorder.run()

    def not_ready(self) -> str:
        """Why this replica is not ready; "": it is ready."""
        missing = [
            reflector for reflector in self.discovery.reflectors if not reflector.synced.is_set()
        ]
        reasons = [
            f"{reflector.resource.plural}: {reflector.error or 'the list is not complete yet'}"
            for reflector in missing
        ]
        if not missing and (outage := self.discovery.outage()):
            reasons.append(outage)
        if self.issuing is not None and not self.identified.is_set():
            reasons.append(f"no own certificate: {self.issuing.authority.issuer.problem}")
        return "; ".join(reasons)

    def _on_changes(self, changes: Changes) -> None:
        _log.debug(
            "changed: %d services, %d addresses of pods", len(changes.services), len(changes.pods)
        )
        if self.channel is not None:
            self.channel.changed(changes)
        if self.election.leading:
            self._report_problems()

    def _report_problems(self) -> None:
        """Write events about new problems."""
        problems = self.discovery.catalog.problems
        for key, found in problems.items():
            entry = self.discovery.catalog.services.get(key)
            for problem in found if entry is not None else ():
                if problem not in self._reported.get(key, ()):
                    about = ObjectReference(
                        "Service", key[0], key[1], entry.uid if entry is not None else "", "v1"
                    )
                    self.recorder.record(
                        EventContent(about, "EndpointNotUsed", problem, "Discover", warning=True)
                    )
        self._reported = dict(problems)
