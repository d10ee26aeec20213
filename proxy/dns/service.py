"""The DNS service of the pod for names of other clusters: the address table, and the server.

    each new directory -> virtual addresses   what `c.east` resolves to, and what a connection to
                                              that address means (flows/outbound.py)
                       -> answers             the responses to queries (server.py)

Both change in one step. So no response contains an unknown address, or comes from an old
directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from proxy.config.resolv_conf import Resolvers
from proxy.config.schema import Config
from proxy.config.schema_clusters import DnsConfig
from proxy.directory import Directory
from proxy.dns.answers import Answers
from proxy.dns.server import DnsServer
from proxy.dns.virtual_addresses import VirtualAddresses
from proxy.dns.zone import Zone
from proxy.errors import StartError
from proxy.net.accept import Acceptor, Connection
from proxy.net.dial import Dialer
from proxy.process.acceptors import admission
from proxy.process.listeners import Listeners
from proxy.settings.document import DocumentError
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus.dns")


def pod_resolvers(config: Config) -> Resolvers | None:
    """The pod's own resolvers. None if DNS is not configured. Raises StartError."""
    if config.dns is None:
        return None
    try:
        return Resolvers.of(config.dns)
    except DocumentError as error:
        raise StartError(str(error), 64) from error


class DnsService:
    """Built by app.py if the section `dns` is configured."""

    def __init__(
        self, config: Config, resolvers: Resolvers, dialer: Dialer, metrics: Metrics
    ) -> None:
        settings = config.dns or DnsConfig()
        self.virtual = VirtualAddresses(
            settings.ranges, settings.max_names, settings.quarantine, time.monotonic
        )
        self._settings = settings
        self._namespace = config.pod.namespace
        self._search = resolvers.search
        self._metrics = metrics
        self._directory = Directory()
        self._without = 0  # services without an address, because the limit is reached
        self.resolver = DnsServer(settings, resolvers.upstreams, self._answers(), dialer, metrics)
        _log.info(
            "answering DNS queries; the pod's resolvers: %s",
            ", ".join(map(str, resolvers.upstreams)),
        )

    def publish(self, directory: Directory) -> None:
        """Use this directory from now on."""
        self._directory = directory
        self.resolver.answers = self._answers()
        if self._without:
            words = (
                "%d services of other clusters have no address: the limit is %d (dns.max_names,"
                " dns.ranges)"
            )
            _log.error(words, self._without, self.virtual.capacity)

    def sweep(self) -> None:
        """End expired quarantines. Services without an address may get one then."""
        self.virtual.sweep()
        if self._without:
            self.resolver.answers = self._answers()

    def _answers(self) -> Answers:
        zone = Zone(self._directory, self._namespace, self._search)
        self._without = self.virtual.publish(zone.names)
        return Answers(zone, self.virtual, self._settings.ttl)

    def observe(self) -> None:
        """Update the gauges."""
        self._metrics.set_virtual_addresses(*self.virtual.counts)
        self._metrics.dns_in_flight.at().set(self.resolver.in_flight)

    async def serve(
        self, listeners: Listeners, on_error: Callable[[Connection, BaseException], None]
    ) -> None:
        """Answer queries until cancelled. Owns and closes the DNS sockets."""
        acceptor = Acceptor(
            self.resolver.converse, limit=self._settings.max_connections, on_error=on_error
        )
        admission("names", acceptor.slots, self._metrics)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.resolver.serve, listeners.datagrams)
            nursery.start_soon(acceptor.serve, listeners.names)
