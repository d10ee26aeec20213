"""One watch of the server: which events it sends, in which order, and when it ends."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from typing import Protocol

import h11
import trio

from lab.kube_api.requests import ApiRequest, Behaviour, selected, view
from lab.kube_api.store import Json, Kind, Problem, Record, Store

BOOKMARKS = 60.0  # seconds between two bookmarks


class Send(Protocol):
    """Sends HTTP events."""

    def __call__(self, *events: h11.Event) -> Awaitable[None]: ...


class Watch:
    """One watch."""

    def __init__(
        self, store: Store, behaviour: Behaviour, request: ApiRequest, of: tuple[Kind, str]
    ) -> None:
        """`of`: the kind of objects, and their namespace ("": all)."""
        self._request = request
        self._store = store
        self._behaviour = behaviour
        self._kind, self._namespace = of
        self._bookmarks = request.query.get("allowWatchBookmarks") in ("1", "true")

    async def run(self, send: Send) -> None:
        """Send the response until it ends. Raises Problem before the response has started."""
        self._send = send
        query, store = self._request.query, self._store
        streaming = (
            query.get("sendInitialEvents") == "true" and self._behaviour.streaming != "unknown"
        )
        if streaming and self._behaviour.streaming == "refused":
            raise Problem(
                422,
                "Invalid",
                "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the"
                " gate is on",
            )
        if streaming and query.get("resourceVersionMatch") != "NotOlderThan":
            raise Problem(
                422,
                "Invalid",
                "resourceVersionMatch: Forbidden: sendInitialEvents requires setting"
                " resourceVersionMatch",
            )
        if (
            "resourceVersionMatch" in query
            and not streaming
            and self._behaviour.streaming != "unknown"
        ):
            raise Problem(
                422,
                "Invalid",
                "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch",
            )
        version = int(query.get("resourceVersion", "") or 0)
        if version and self._behaviour.gone == "status":
            store.check_version(version)
        headers = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
        await self._send(h11.Response(status_code=200, headers=headers))
        with trio.move_on_after(float(query.get("timeoutSeconds", "1800"))):
            await self._follow(version, streaming=streaming)
        if self._behaviour.mute:
            await trio.sleep_forever()
        await self._send(h11.EndOfMessage())

    async def _follow(self, version: int, *, streaming: bool) -> None:
        store = self._store
        if not version:
            version = store.version
            for item in store.sorted(self._kind, self._namespace):
                if selected(item, self._request.query):
                    await self._event("ADDED", view(item, self._request))
            if streaming:
                await self._bookmark(version, {"k8s.io/initial-events-end": "true"})
        due = trio.current_time() + BOOKMARKS
        while True:
            try:
                records = list(store.since(version))
            except Problem as problem:
                await self._event("ERROR", problem.body)
                return
            for record in records:
                version = record.version
                await self._record(record)
            if trio.current_time() >= due:
                due = trio.current_time() + BOOKMARKS
                if self._bookmarks and store.version >= version:
                    await self._bookmark(max(version, store.version))
            with trio.move_on_at(due):
                await store.wait()

    async def _record(self, record: Record) -> None:
        if record.kind != self._kind:
            return
        one = record.new or record.old or {}
        if self._namespace and one["metadata"].get("namespace") != self._namespace:
            return
        before = record.old is not None and selected(record.old, self._request.query)
        now = record.new is not None and selected(record.new, self._request.query)
        if not before and not now:
            return
        name = "MODIFIED" if before and now else "ADDED" if now else "DELETED"
        item = (record.new if now else record.old) or {}
        if name == "DELETED":  # with the version of the deletion
            item = {
                **item,
                "metadata": {**item["metadata"], "resourceVersion": str(record.version)},
            }
        await self._event(name, view(item, self._request))

    async def _bookmark(self, version: int, annotations: Json | None = None) -> None:
        partial = "PartialObjectMetadata" in self._request.accept
        name, api = (
            ("PartialObjectMetadata", "meta.k8s.io/v1")
            if partial
            else (self._kind.name, self._kind.api)
        )
        meta: Json = {"resourceVersion": str(version), "creationTimestamp": None}
        if annotations:
            meta["annotations"] = annotations
        await self._event("BOOKMARK", {"kind": name, "apiVersion": api, "metadata": meta})

    async def _event(self, name: str, item: Json) -> None:
        if self._behaviour.mute:
            await trio.sleep_forever()
        await self._send(h11.Data(data=json.dumps({"type": name, "object": item}).encode() + b"\n"))
