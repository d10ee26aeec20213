"""The composition root: it reads certificates and the directory, binds the sockets, builds the
flows, and runs them.

It is the only module that knows all others. The start follows the dependencies. The identity comes
first: if one is configured, no socket is bound without it. The directory comes next, and then the
sockets, which are bound early and served late. Then the tasks start:

    run
    ├── admin                    probes and metrics, in a separate thread, from the start to the end
    ├── own.watch                gets new certificates and roots without a restart; the tasks below
    │                            start when there is a certificate
    ├── directory.run            keeps the directory current, from its file or the control plane
    ├── sweep                    closes old idle connections, and drops old cache entries
    ├── liveness                 keeps TCP_USER_TIMEOUT from ending connections of slow readers
    ├── disconnects              detects clients that disconnect before their response
    ├── remote_gateways.watch    resolves and probes the gateways of other clusters
    ├── pacer                    limits how many streams and connections start in one scheduler pass
    ├── dns                      answers DNS queries, if `dns` is configured
    ├── fast path                if `fast_path` is on; its event loop runs in trio's idle wait
    ├── pools.serve (twice)      HTTP/2 connections to servers, which many exchanges share
    └── serve                    the flows; ends at SIGTERM, and drains first
        ├── inbound, or gateway  one task for each connection
        └── outbound             one task for each connection

The stop runs in the reverse order. process/shutdown.py defines the order in which the traffic ends.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from loopguard import OwnListeners
from proxy.admin import Admin, AdminCallbacks
from proxy.balancing.balancer import Balancer
from proxy.config.schema import Config
from proxy.config.schema_traffic import GatewayConfig, InboundConfig, OutboundConfig
from proxy.directory import DirectoryError, Endpoint
from proxy.directory.channel.source import ControlSource
from proxy.directory.watcher import IdentityLoss
from proxy.dns.service import DnsService, pod_resolvers
from proxy.exchange.server_settings import Drain
from proxy.fastpath.event_loop import EventLoopClock
from proxy.fastpath.fast_path import FastPath
from proxy.flows.gateway import gateway
from proxy.flows.inbound import inbound
from proxy.flows.loop_guard import LoopGuard
from proxy.flows.outbound import outbound
from proxy.flows.runtime import FlowSettings, Runtime
from proxy.flows.upstreams import Pools, application_pools, endpoint_pools
from proxy.identity.identity import Identity
from proxy.net.accept import Acceptor, Connection
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.disconnects import Disconnects
from proxy.net.fairness import PACER
from proxy.net.interfaces import local_addresses
from proxy.net.liveness import Liveness
from proxy.net.socket_stream import SocketStream
from proxy.process.acceptors import acceptor, bounds_of, report
from proxy.process.listeners import listen
from proxy.process.load_directory import load_directory
from proxy.process.memory import MemoryWatch, collect_seldom, limit_of_container
from proxy.process.own_identity import OwnIdentity
from proxy.process.shutdown import drain
from proxy.routing.dispatch import Dispatcher
from proxy.routing.remote_gateways import RemoteGateways
from proxy.routing.router import Router
from proxy.telemetry.log import configure
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.records import Recorder
from proxy.telemetry.tracing_setup import OFF, FlowTracing, build
from proxy.wire.h1 import fast_head
from proxy.wire.sniff import Protocol
from proxy.workers.protocol import WorkerInfo

_log = logging.getLogger("isthmus")

_SWEEP = 0.5
_SELDOM = 20  # one in this many sweeps also does the rarely needed work


Beside = Callable[["App"], Awaitable[None]]
Handler = Callable[[Connection], Awaitable[None]]


def start(config: Config, worker: WorkerInfo | None = None, beside: Beside | None = None) -> int:
    """Run a proxy until a signal stops it; returns the exit code. Raises StartError.

    `worker`: set if this process is one of several workers. `beside`: a task that runs as long as
    the proxy.
    """
    _allow_descriptors()
    metrics = Metrics()
    close_logs = configure(
        config.log,
        on_drop=metrics.count_dropped_logs,
        worker=worker.number if worker is not None else None,
    )
    spans = OFF
    try:
        spans = build(config, metrics, os.environ)
        trio.run(App(config, metrics, spans, worker).run, beside, clock=EventLoopClock())
    finally:
        spans.close()
        close_logs()
    return 0


def _allow_descriptors() -> None:
    """Raise the limit of open descriptors to the hard limit. The usual soft limit of 1024 exists
    for programs that use select(), and each relayed connection needs two descriptors.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the soft limit stays, and `acceptor` adapts to it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class App:
    """One proxy. The constructor reads the files and binds the sockets; it raises StartError. `run`
    serves.
    """

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        spans: FlowTracing = OFF,
        worker: WorkerInfo | None = None,
    ) -> None:
        self.config, self.spans, self.metrics = config, spans, metrics
        self.drain = Drain(disconnects=Disconnects().open())
        settings = FlowSettings.of(config, self.drain.pacer)
        self.memory = MemoryWatch(
            config, limit_of_container(), settings.downstream.streams, metrics
        )
        self.recorder = Recorder(
            metrics, access=config.log.access, tracing=spans.flows(), budget=self.memory.budget
        )
        self.own = OwnIdentity(config, metrics, self._dial)
        self.source = load_directory(config, self.own, self._dial)
        resolvers = pod_resolvers(config)
        self.liveness = Liveness(config.tcp.user_timeout, config.tcp.keepalive)
        self.listeners = listen(config, self.liveness, resolvers)
        # stored now: during shutdown the listeners are already closed
        self._ports = self.listeners.ports()
        loops = LoopGuard(config, self._own(), metrics, worker)
        balancer = Balancer(trio.current_time, zone=config.pod.zone)
        timeout = config.tcp.connect_timeout
        dialer = Dialer(config.mark, timeout, self.liveness, loops.check_dial, loops.connections)
        self.names = None if resolvers is None else DnsService(config, resolvers, dialer, metrics)
        self.runtime = Runtime(
            config=config,
            settings=settings,
            loops=loops,
            identity=self.own.current,
            directory=self.source,
            balancer=balancer,
            router=self._router(balancer),
            dispatcher=Dispatcher(balancer, metrics, settings.client),
            dialer=dialer,
            former=self.source.former,
            recorder=self.recorder,
            spans=spans,
            drain=self.drain,
            expiries=self.own.expiries,
            fast_path=(
                FastPath(self.drain, settings.plain_server.idle_timeout, config.tcp.idle_timeout)
                if config.fast_path
                else None
            ),
        )
        self._publish()
        self.outbound_pools: Pools[Endpoint] = endpoint_pools(
            self.runtime, "gateway" if config.gateway.enabled else "outbound"
        )
        self.remote_gateways = RemoteGateways(
            self.runtime.directory,
            config.clusters,
            self.outbound_pools.leases(Protocol.HTTP1),
            self.metrics,
        )
        self.runtime.router.remote_gateways = self.remote_gateways
        self.inbound_pools: Pools[Address] = application_pools(self.runtime)
        reserved = _RESERVED + (
            config.dns.max_in_flight + 2 * config.dns.max_connections
            if config.dns is not None
            else 0
        )
        self.inbound = self._incoming_acceptor(reserved)
        self.outbound = self._acceptor(
            "outbound", outbound(self.runtime, self.outbound_pools), config.outbound, reserved
        )

    def _router(self, balancer: Balancer) -> Router:
        config = self.config
        networks = config.outbound.authority_networks
        return Router(
            self.source, balancer, self.metrics, config.pod.namespace, config.clusters.settle,
            trio.current_time, networks=networks
        )  # fmt: skip

    def _incoming_acceptor(self, reserved: int) -> Acceptor:
        """The acceptor of traffic from outside: inbound for a sidecar, gateway for a cluster's
        gateway.
        """
        config = self.config
        if config.gateway.enabled:
            self.metrics.add_direction("gateway")
            return self._acceptor(
                "gateway", gateway(self.runtime, self.outbound_pools), config.gateway, reserved
            )
        return self._acceptor(
            "inbound", inbound(self.runtime, self.inbound_pools), config.inbound, reserved
        )

    def _acceptor(
        self,
        name: str,
        handler: Handler,
        config: InboundConfig | GatewayConfig | OutboundConfig,
        reserved: int,
    ) -> Acceptor:
        made = acceptor(
            name,
            handler,
            bounds_of(config, mutual=self.identity is not None),
            self.metrics,
            reserved,
        )
        made.on_accept = self.liveness.watch
        return made

    async def run(self, beside: Beside | None = None) -> None:
        """Serve until SIGTERM or SIGINT, then drain. `beside` runs during all of it."""
        status = AdminCallbacks(list, self.not_ready, self.metrics.render, self._refresh)
        try:
            await self._run(
                Admin(self.config.admin, self.listeners.admin, status, self.metrics), beside
            )
        finally:
            self._close_pools()

    async def _run(self, admin: Admin, beside: Beside | None) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(admin.run)
                nursery.start_soon(self.own.watch)
                if beside is not None:
                    nursery.start_soon(beside, self)
                stop = signals.__aiter__().__anext__
                if await self._identified(stop):
                    await self._start(nursery, stop)
                else:
                    nursery.cancel_scope.cancel()

    async def _start(self, nursery: trio.Nursery, stop: Callable[[], Awaitable[int]]) -> None:
        """Start everything that needs a certificate."""
        nursery.start_soon(self.source.run, self._directory_changed)
        nursery.start_soon(self._sweep)
        nursery.start_soon(self.liveness.run)
        nursery.start_soon(self.drain.disconnects.run)
        nursery.start_soon(self.remote_gateways.watch)
        PACER.set(self.drain.pacer)
        nursery.start_soon(self.drain.pacer.run)
        if self.names is not None:
            nursery.start_soon(self.names.serve, self.listeners, report)
        if self.runtime.fast_path is not None:
            await self.runtime.fast_path.open()
            nursery.start_soon(self.runtime.fast_path.run)
        nursery.start_soon(self.outbound_pools.serve)
        nursery.start_soon(self.inbound_pools.serve)
        nursery.start_soon(self._serve_until, stop, nursery.cancel_scope)
        self._log_start()

    async def _identified(self, stop: Callable[[], Awaitable[int]]) -> bool:
        """Wait for the first certificate: without it no flow starts. False: `stop` returned
        first.
        """
        if self.own.known.is_set():
            return True
        _log.info("waiting for the first certificate")
        try:
            async with trio.open_nursery() as nursery:

                async def until_stop() -> None:
                    await stop()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_stop)
                await self.own.known.wait()
                nursery.cancel_scope.cancel()
        finally:
            if not self.own.known.is_set():
                self.listeners.close()
        return self.own.known.is_set()

    async def _serve_until(
        self, stop: Callable[[], Awaitable[int]], everything: trio.CancelScope
    ) -> None:
        """Serve the traffic until `stop` returns, then drain. A second `stop` ends the drain at
        once.
        """
        async with trio.open_nursery() as flows:
            flows.start_soon(self.inbound.serve, self.listeners.inbound)
            flows.start_soon(self.outbound.serve, self.listeners.outbound)
            await stop()
            _log.info("stopping: open connections have %g s to finish", self.config.shutdown.grace)
            flows.start_soon(self._hurry, stop, everything)
            await drain(
                self.inbound, self.outbound, self.drain, self.inbound_pools, self.config.shutdown
            )
            self._close_pools()
            flows.cancel_scope.cancel()
        everything.cancel()

    @staticmethod
    async def _hurry(stop: Callable[[], Awaitable[int]], everything: trio.CancelScope) -> None:
        await stop()
        everything.cancel()

    def _close_pools(self) -> None:
        self.outbound_pools.close()
        self.inbound_pools.close()

    # Background tasks

    def _directory_changed(self, error: DirectoryError | None) -> None:
        if self.source.asks:  # the answer for one or more entries
            self.runtime.dispatcher.changed()
            self._publish()
            return
        self.metrics.count_directory_reload(
            "ok" if error is None else "refused" if isinstance(error, IdentityLoss) else "error"
        )
        if error is None:
            self.runtime.dispatcher.changed()
            self._publish()
            _log.info(
                "new directory in use: %d services", len(self.runtime.directory.current.services)
            )
        else:
            _log.error("cannot use the changed directory, keeping the old one: %s", error)

    def _publish(self) -> None:
        if self.names is not None:
            self.runtime.router.virtual = self.names.virtual
            self.names.publish(self.runtime.directory.current)

    def _own(self) -> OwnListeners:
        """The proxy's own addresses for the loop guard: the configured ones and those of the
        network interfaces.
        """
        configured = frozenset(map(str, self.config.pod.addresses))
        return OwnListeners(self._ports, configured | local_addresses())

    async def _sweep(self) -> None:
        """Remove what has expired, about twice a second. Every `_SELDOM` sweeps also refresh the
        local addresses and clear caches.
        """
        for turn in itertools.count(1):
            await trio.sleep(_SWEEP)
            try:
                await self._sweep_once(seldom=turn % _SELDOM == 0)
            # error boundary: a bug in one part must not end the process
            except Exception as error:
                _log.error("internal error in a sweep", exc_info=error)

    async def _sweep_once(self, *, seldom: bool) -> None:
        self.own.expiries.close_expired()
        await self.memory.check()
        if seldom:
            fast_head.forget()
            self.runtime.loops.listeners = self._own()
            if self.names is not None:
                self.names.sweep()
            self.runtime.balancer.sweep()
            self.source.former.sweep(trio.current_time())
        self.outbound_pools.sweep()
        self.inbound_pools.sweep()

    async def _dial(self, address: Address) -> SocketStream:
        return await self.runtime.dialer.dial(address)

    @property
    def identity(self) -> Identity | None:
        return self.own.current

    # For the administration listener

    def not_ready(self) -> list[str]:
        reasons = []
        if self.drain.draining:
            reasons.append("shutting down")
        if (problem := self.own.not_ready()) is not None:
            reasons.append(problem)
        if (problem := self.source.not_ready()) is not None:
            reasons.append(problem)
        return reasons

    def observe(self) -> None:
        """Set the gauges to their current values."""
        used = [pool.counts() for pool in (self.outbound_pools, self.inbound_pools)]
        self.metrics.pool("active").set(sum(active for active, _ in used))
        self.metrics.pool("idle").set(sum(idle for _, idle in used))
        self.metrics.endpoints.set_open_breakers(
            (service, str(address), state)
            for service, address, state in self.runtime.balancer.broken()
        )
        self.memory.observe()
        if self.runtime.fast_path is not None:
            self.metrics.set_fast_path_exchanges(*self.runtime.fast_path.counts())
        if self.names is not None:
            self.names.observe()
        self.metrics.former_identities.at().set(len(self.source.former))
        self.metrics.directory.observe_losses(self.source.former.losses)
        if isinstance(self.source, ControlSource):
            self.metrics.directory.observe(self.source)
        self.metrics.set_waiting_spans(self.spans.waiting())
        self.metrics.self_calls_waiting.at().set(self.runtime.loops.waiting)

    def render(self) -> bytes:
        """Collect the metrics and render them. Call it in the main thread only."""
        self.observe()
        return self.metrics.render()

    def _refresh(self, done: Callable[[], None]) -> None:
        try:
            self.observe()
        finally:
            done()

    def _log_start(self) -> None:
        # Objects created so far live as long as the process. After freeze() the garbage collector
        # skips them.
        gc.collect()
        gc.freeze()
        collect_seldom()
        listeners = self.listeners
        sides = {
            "outbound": listeners.outbound,
            "gateway" if self.config.gateway.enabled else "inbound": listeners.inbound,
        }
        for name, sockets in {**sides, "admin": listeners.admin, "names": listeners.names}.items():
            for sock in sockets:
                _log.info("%s: %s", name, Address.of(sock.getsockname()))
        if self.identity is None:
            _log.warning("no identity is configured: all traffic is clear text")
        else:
            _log.info(
                "identity: %s, valid until %s",
                self.identity.id,
                self.identity.not_after.isoformat(),
            )


# Descriptors for the listeners, files, the pools' idle connections and the administration listener.
_RESERVED = 128
