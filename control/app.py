"""The control plane process: discovery and an admin listener in one trio loop.

    run
    ├── signals         stops on SIGTERM or SIGINT
    ├── admin           /live, /ready, /metrics
    ├── discovery       in every replica
    └── election        one replica leads; it writes events about services that have a problem

The process is stateless. A replica reads everything again when it starts, and is then ready.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from control.admin import Admin
from control.discovery.catalog import Changes
from control.discovery.discovery import Discovery
from control.kube.client import Client
from control.kube.leases import Election
from control.kube.objects import ObjectReference
from control.kube.recorder import Recorder, Said
from control.kube.resources import Key
from control.metrics import render

_log = logging.getLogger("isthmus.control")

CONTROLLER = "isthmus.dev/control"
LEASE = "isthmus-control"


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """`namespace`: where the lease is. `identity`: the unique name of this replica. `admin`: host
    and port of the admin listener; None: no listener.
    """

    trust_domain: str = "cluster.local"
    namespace: str = "isthmus"
    identity: str = "control"
    admin: tuple[str, int] | None = ("::", 4191)


class Control:
    """One replica. Owns `client`."""

    def __init__(self, config: ControlConfig, client: Client) -> None:
        """Raises SpiffeIdError if the trust domain is not valid."""
        self.config = config
        self.client = client
        self.discovery = Discovery(client, config.trust_domain, self._tell)
        self.election = Election(client, (config.namespace, LEASE), config.identity)
        self.recorder = Recorder(client, CONTROLLER, config.identity)
        self._said: dict[Key, tuple[str, ...]] = {}

    async def run(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Run until SIGTERM or SIGINT, then release the lease. Owns `listeners`."""
        admin = Admin(
            self.not_ready,
            lambda: render(self.discovery, self.election, self.recorder, self.client),
        )
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(admin.serve, listeners)
                    nursery.start_soon(self.discovery.run)
                    nursery.start_soon(self._take_part)
                    async for number in signals:
                        _log.info("ending, by %s", signal.Signals(number).name)
                        break
                    nursery.cancel_scope.cancel()
        finally:
            await self.client.aclose()

    async def _take_part(self) -> None:
        # A leader without data has nothing to report.
        await self.discovery.ready.wait()
        await self.election.run(self._lead)

    async def _lead(self) -> None:
        self._said.clear()
        self._say()
        await self.recorder.run()

    def not_ready(self) -> str:
        """Why this replica is not ready; "": it is ready."""
        missing = [
            reflector for reflector in self.discovery.reflectors if not reflector.synced.is_set()
        ]
        return "; ".join(
            f"{reflector.resource.plural}: {reflector.error or 'being listed'}"
            for reflector in missing
        )

    def _tell(self, changes: Changes) -> None:
        _log.debug(
            "%d services and %d addresses have changed", len(changes.services), len(changes.pods)
        )
        if self.election.leading:
            self._say()

    def _say(self) -> None:
        """Write events about new problems."""
        problems = self.discovery.catalog.problems
        for key, found in problems.items():
            entry = self.discovery.catalog.services.get(key)
            for problem in found if entry is not None else ():
                if problem not in self._said.get(key, ()):
                    about = ObjectReference(
                        "Service", key[0], key[1], entry.uid if entry is not None else "", "v1"
                    )
                    self.recorder.say(
                        Said(about, "EndpointNotUsed", problem, "Discover", warning=True)
                    )
        self._said = dict(problems)
