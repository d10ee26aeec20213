"""Runs the reflectors of services, slices, pods and nodes, and reports changes of the catalog.

Pods are read whole, not as metadata. Identities are derived from a pod's service account and
addresses. Metadata holds only what the pod's owner can write. The API server leaves out pods that
have ended.

No change is reported before all four lists are complete: an endpoint whose pod is unknown would be
missing. Afterwards, changes are collected until none has come for `settle_time` seconds, for at
most `max_delay` seconds, and are reported together. A fault of the API server never removes
anything: see reflector.py.

While a list or watch fails, new objects are missing. So what is not known may exist, and
`is_current` is false. It is true again when all watches have worked for long enough to report what
they have missed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import trio

from control.discovery.catalog import Catalog, Changes
from control.discovery.facts import node_zone, pod_fact, service_fact, slice_fact
from control.kube.backoff import BackoffRules
from control.kube.client import Client, Selection
from control.kube.reflector import Reflector, WatchRules
from control.kube.resources import NODES, PODS, SERVICES, SLICES, Key
from proxy.settings.declare import Section, seconds

_log = logging.getLogger("isthmus.control")

T = TypeVar("T")

# Seconds between two checks whether all watches work, and seconds, in addition to `max_delay`, in
# which a watch that works again gets what it has missed.
_CHECK = 0.25
_CATCH_UP = 0.5

RUNNING = Selection(fields="status.phase!=Succeeded,status.phase!=Failed")


class DiscoveryRules(Section, frozen=True):
    """Changes of the directory."""

    settle_time: Annotated[
        float, seconds(0, 10, "changes are reported when none has come for this time")
    ] = 0.05
    max_delay: Annotated[float, seconds(0, 60, "maximum time until changes are reported")] = 0.5
    max_outage: Annotated[
        float,
        seconds(
            0, 3600, "how long lists and watches may fail until the replica reports: not ready"
        ),
    ] = 60.0


@dataclass(frozen=True, slots=True)
class Watching:
    """How objects are listed and watched."""

    rules: WatchRules = field(default_factory=WatchRules)
    backoff: BackoffRules = field(default_factory=BackoffRules)


class Discovery:
    """Keeps `catalog` up to date. Calls `on_changes` with each set of changes. The first set has
    everything. `on_changes` must not block.
    """

    def __init__(
        self,
        client: Client,
        catalog: Catalog,
        on_changes: Callable[[Changes], None],
        rules: DiscoveryRules | None = None,
        watching: Watching | None = None,
    ) -> None:
        self.catalog = catalog
        self.ready = trio.Event()  # set after the first report, which has everything
        self.on_current: Callable[[], None] = lambda: None  # `is_current` is true again
        self.on_flush: Callable[[], None] = lambda: None  # after each, also without changes
        self._on_changes = on_changes
        self._rules = rules or DiscoveryRules()
        self._stale = trio.Event()
        self._said_current = True  # since `is_current` was false
        self.reflectors: Sequence[Reflector[Any, Any]] = (
            Reflector(client, NODES, node_zone, self._observer(self._node)),
            Reflector(client, PODS, pod_fact, self._observer(catalog.pod), RUNNING),
            Reflector(client, SERVICES, service_fact, self._observer(catalog.service)),
            Reflector(client, SLICES, slice_fact, self._observer(catalog.slice)),
        )
        watching = watching or Watching()
        for reflector in self.reflectors:
            reflector.rules, reflector.backoff = watching.rules, watching.backoff

    def _observer(self, put: Callable[[Key, T | None], None]) -> Callable[[Key, T | None], None]:
        def observe(key: Key, fact: T | None) -> None:
            put(key, fact)
            self._stale.set()

        return observe

    def _node(self, key: Key, zone: str | None) -> None:
        self.catalog.node(key[1], zone)

    def is_current(self) -> bool:
        """Whether what is not known does not exist."""
        caught_up = trio.current_time() - self._rules.max_delay - _CATCH_UP
        current = all(
            reflector.failing_since is None and reflector.works_since <= caught_up
            for reflector in self.reflectors
        )
        self._said_current = self._said_current and current
        return current

    def outage(self) -> str:
        """What has failed for longer than `max_outage`, as text for people; "": nothing."""
        limit = trio.current_time() - self._rules.max_outage
        return "; ".join(
            f"{reflector.resource.plural}: {reflector.error}"
            for reflector in self.reflectors
            if reflector.failing_since is not None and reflector.failing_since <= limit
        )

    async def _watch_outages(self) -> None:
        while True:
            await trio.sleep(_CHECK)
            if self.is_current() and not self._said_current:
                self._said_current = True
                self.on_current()

    async def run(self) -> None:
        """Run until cancelled."""
        async with trio.open_nursery() as nursery:
            for reflector in self.reflectors:
                nursery.start_soon(reflector.run)
            for reflector in self.reflectors:
                await reflector.synced.wait()
            self._flush()
            self.ready.set()
            catalog = self.catalog
            _log.info(
                "discovery is complete: %d services, %d addresses of pods with a sidecar",
                len(catalog.services),
                catalog.meshed,
            )
            nursery.start_soon(self._watch_outages)
            while True:
                await self._stale.wait()
                await self._settle()
                self._flush()

    async def _settle(self) -> None:
        """Wait until no change has come for `settle_time` seconds, for at most `max_delay`
        seconds."""
        with trio.move_on_after(self._rules.max_delay):
            while self._stale.is_set():
                self._stale = trio.Event()
                await trio.sleep(self._rules.settle_time)

    def _flush(self) -> None:
        self._stale = trio.Event()
        changes = self.catalog.flush()
        if changes:
            self._on_changes(changes)
        self.on_flush()
