"""Leader election: the replica that holds a Lease does what must happen once.

The holder renews the lease every `retry_interval` seconds. Another replica takes the lease when it
has not changed for the duration that the holder has written into it. That replica measures the time
with its own clock. The times in the lease are only for people. The holder stops leading when it has
not renewed for `renew_timeout` seconds, which is shorter than the duration. So two replicas never
lead at the same time, if their clocks run at about the same speed. The numbers and the use of the
fields are those of client-go.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import trio

from control.kube.api_errors import KubeError, Refused
from control.kube.client import Client
from control.kube.error_log import ErrorLog
from control.kube.objects import Lease, LeaseSpec, Meta
from control.kube.resources import LEASES
from proxy.settings.declare import Section, described, seconds

_log = logging.getLogger("isthmus.control")


class LeaseRules(Section, frozen=True):
    """The Lease of the leader."""

    name: Annotated[
        str, described("name of the Lease; replicas with the same name form a group")
    ] = "isthmus-control"
    # Whole seconds in the API.
    duration: Annotated[
        float,
        seconds(
            2,
            3600,
            "time after its last renewal in which no other replica takes the lease; whole seconds",
        ),
    ] = 15.0
    renew_timeout: Annotated[
        float,
        seconds(
            1,
            3600,
            "time without a renewal after which the leader stops leading; less than `duration`",
        ),
    ] = 10.0
    retry_interval: Annotated[
        float,
        seconds(0.1, 600, "time between two renewals, and between two attempts to get the lease"),
    ] = 2.0
    release_timeout: Annotated[
        float, seconds(0, 60, "maximum time to release the lease when the process ends")
    ] = 2.0


class Election:
    """Takes part in the election for one lease. `identity` must be unique among the replicas."""

    def __init__(
        self, client: Client, name: tuple[str, str], identity: str, rules: LeaseRules | None = None
    ) -> None:
        """`name`: namespace and name of the lease."""
        self.leading = False
        self.identity = identity
        self.terms = 0  # how often this replica was elected
        self._client = client
        self._namespace, self._name = name
        self._rules = rules or LeaseRules()
        # The version of the lease, and when this replica first saw it.
        self._seen: tuple[str, float] = ("", 0.0)
        self._errors = ErrorLog(f"the lease {self._namespace}/{self._name}")
        self._renewed = 0.0

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Run `lead` whenever this replica is the leader. Cancel it when leadership is lost.

        Returns when `lead` returns. The lease is released then, and also on cancellation.
        """
        while True:
            held = await self._acquire()
            self.leading, self.terms = True, self.terms + 1
            _log.info(
                "%s is the leader: it holds the lease %s/%s",
                self.identity,
                self._namespace,
                self._name,
            )
            done = False
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._renew, held, nursery.cancel_scope)
                    await lead()
                    done = True
                    nursery.cancel_scope.cancel()
            finally:
                self.leading = False
                with trio.move_on_after(self._rules.release_timeout, shield=True):
                    await self._release()
            if done:
                return
            _log.warning(
                "no longer the leader: the lease %s/%s was lost or could not be renewed",
                self._namespace,
                self._name,
            )

    async def _acquire(self) -> Lease:
        while True:
            requested_at = trio.current_time()
            try:
                taken = await self._take()
            except KubeError as error:
                taken = None
                if not isinstance(error, Refused) or error.code != 409:
                    self._errors.failed(str(error))
            else:
                self._errors.works()
            if taken is not None:
                self._renewed = requested_at
                return taken
            await trio.sleep(self._rules.retry_interval)

    async def _take(self) -> Lease | None:
        """Take the lease. Returns None if another replica holds it."""
        try:
            found = await self._client.get(LEASES, self._namespace, self._name)
        except Refused as error:
            if error.code != 404:
                raise
            new = Lease(
                metadata=Meta(name=self._name, namespace=self._namespace),
                spec=self._spec(LeaseSpec()),
            )
            return await self._client.create(LEASES, new, self._namespace)
        now, version = trio.current_time(), found.metadata.resource_version
        if version != self._seen[0]:
            self._seen = version, now
        spec = found.spec
        if spec.holder_identity not in ("", None, self.identity) and now - self._seen[1] <= (
            spec.lease_duration_seconds or 0
        ):
            return None
        return await self._store(found, self._spec(spec))

    async def _store(self, found: Lease, spec: LeaseSpec) -> Lease:
        """Write the lease. Raises Refused with 409 if it has changed since `found` was read."""
        changes = {
            "metadata": {"resourceVersion": found.metadata.resource_version},
            "spec": msgspec.to_builtins(spec),
        }
        # One attempt only: the next renewal comes soon.
        return await self._client.patch(LEASES, found, changes, attempts=1)

    async def _renew(self, held: Lease, scope: trio.CancelScope) -> None:
        """Renew the lease regularly. Cancels `scope` when that has failed for too long."""
        rules = self._rules
        while True:
            await trio.sleep(rules.retry_interval)
            requested_at = trio.current_time()
            # A request that hangs must leave time for another attempt.
            limit = min(self._renewed + rules.renew_timeout, requested_at + rules.renew_timeout / 2)
            with trio.move_on_at(limit):
                try:
                    held = await self._store(held, self._spec(held.spec))
                    self._renewed = requested_at
                    self._errors.works()
                except KubeError as error:
                    self._errors.failed(str(error))
                    if isinstance(error, Refused) and error.code == 409:
                        held = await self._changed(held, scope)
            if trio.current_time() >= self._renewed + rules.renew_timeout:
                scope.cancel()

    async def _changed(self, held: Lease, scope: trio.CancelScope) -> Lease:
        """The lease was changed by another client. If only a label or the like has changed, this
        replica still holds it; else cancel `scope`.
        """
        try:
            found = await self._client.get(LEASES, self._namespace, self._name)
        except KubeError:
            return held
        if found.spec.holder_identity != self.identity:
            scope.cancel()
        return found

    def _spec(self, before: LeaseSpec) -> LeaseSpec:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        ours = before.holder_identity == self.identity
        turns = (before.lease_transitions or 0) + (not ours and before.holder_identity is not None)
        acquired = before.acquire_time if ours else now
        return LeaseSpec(self.identity, int(self._rules.duration), acquired, now, turns)

    async def _release(self) -> None:
        """Release the lease, if this replica still holds it, so that another one can take it at
        once.
        """
        try:
            found = await self._client.get(LEASES, self._namespace, self._name)
            if found.spec.holder_identity == self.identity:
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
                spec = msgspec.structs.replace(
                    found.spec, holder_identity="", lease_duration_seconds=1, renew_time=now
                )
                await self._store(found, spec)
        except KubeError as error:
            self._errors.failed(str(error))
