"""Reflectors of services, slices, pods and nodes; the catalog; and whoever wants to know what has
changed.

Pods are read whole, and not as metadata: the service account of a pod and its addresses are what
identities are derived from, and of these metadata says nothing that its owner could not have
written. Pods that have ended are left out by the server.

Nothing is told before all four lists are complete: without its pod an endpoint would be no
endpoint. After that changes are collected for a moment (`settle`), and for no longer than `delay`,
and told together. What API servers do is no reason to take anything back: see reflector.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from control.discovery.catalog import Catalog, Changes
from control.discovery.facts import node_zone, pod_fact, service_fact, slice_fact
from control.kube.client import Client, Selection
from control.kube.reflector import Reflector
from control.kube.resources import NODES, PODS, SERVICES, SLICES, Key

_log = logging.getLogger("isthmus.control")

RUNNING = Selection(fields="status.phase!=Succeeded,status.phase!=Failed")


@dataclass(frozen=True, slots=True)
class DiscoveryRules:
    """In seconds: quiet that is waited for, and the longest wait for it."""

    settle: float = 0.05
    delay: float = 0.5


class Discovery:
    """Keeps a catalog up to date. `tell` is called with each set of changes, and must not wait; the
    first has everything."""

    def __init__(
        self,
        client: Client,
        trust_domain: str,
        tell: Callable[[Changes], None],
        rules: DiscoveryRules | None = None,
    ) -> None:
        self.catalog = Catalog(trust_domain)
        self.ready = trio.Event()  # everything was told once
        self._tell = tell
        self._rules = rules or DiscoveryRules()
        self._stale = trio.Event()
        catalog = self.catalog
        self.reflectors: Sequence[Reflector[Any, Any]] = (
            Reflector(
                client, NODES, node_zone, self._heard(lambda key, zone: catalog.node(key[1], zone))
            ),
            Reflector(client, PODS, pod_fact, self._heard(catalog.pod), RUNNING),
            Reflector(client, SERVICES, service_fact, self._heard(catalog.service)),
            Reflector(client, SLICES, slice_fact, self._heard(catalog.slice)),
        )

    def _heard(self, put: Callable[[Key, Any], None]) -> Callable[[Key, Any], None]:
        def heard(key: Key, fact: Any) -> None:
            put(key, fact)
            self._stale.set()

        return heard

    async def run(self) -> None:
        """Discover, until cancelled."""
        async with trio.open_nursery() as nursery:
            for reflector in self.reflectors:
                nursery.start_soon(reflector.run)
            for reflector in self.reflectors:
                await reflector.synced.wait()
            self._flush()
            self.ready.set()
            catalog = self.catalog
            _log.info(
                "discovery is complete: %d services, %d meshed addresses",
                len(catalog.services),
                len(catalog.pods),
            )
            while True:
                await self._stale.wait()
                await self._settle()
                self._flush()

    async def _settle(self) -> None:
        """Wait until nothing has come for a moment."""
        with trio.move_on_after(self._rules.delay):
            while self._stale.is_set():
                self._stale = trio.Event()
                await trio.sleep(self._rules.settle)

    def _flush(self) -> None:
        self._stale = trio.Event()
        changes = self.catalog.flush()
        if changes:
            self._tell(changes)
