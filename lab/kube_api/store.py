"""The server's objects as plain JSON. Each change has its own version; the history can be
compacted.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import trio

Json = dict[str, Any]
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of objects. `status`: its status is written separately. `generation`: counts changes
    of spec.
    """

    api: str
    plural: str
    name: str
    namespaced: bool = True
    status: bool = False
    generation: bool = False


KINDS = {
    (kind.api, kind.plural): kind
    for kind in (
        Kind("v1", "services", "Service", status=True),
        Kind("v1", "pods", "Pod", status=True),
        Kind("v1", "nodes", "Node", namespaced=False, status=True),
        Kind("v1", "namespaces", "Namespace", namespaced=False, status=True),
        Kind("v1", "configmaps", "ConfigMap"),
        Kind("v1", "secrets", "Secret"),
        Kind("discovery.k8s.io/v1", "endpointslices", "EndpointSlice", generation=True),
        Kind("coordination.k8s.io/v1", "leases", "Lease"),
        Kind("events.k8s.io/v1", "events", "Event"),
    )
}


class Problem(Exception):  # a response, so its name has no Error suffix
    """An error response of the server."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        } | ({"details": details} if details else {})


@dataclass(frozen=True, slots=True)
class Record:
    """One change. `old` is None for a created object, `new` is None for a deleted one."""

    version: int
    kind: Kind
    old: Json | None
    new: Json | None


class Store:
    """The objects. All of it is synchronous; `wait` waits for the next change."""

    def __init__(self, version: int = 100) -> None:
        self.version = version
        self.compacted = version
        self.objects: dict[Kind, dict[Key, Json]] = {kind: {} for kind in KINDS.values()}
        self.history: list[Record] = []
        self._changed = trio.Event()

    async def wait(self) -> None:
        """Wait for a change, or a compaction."""
        await self._changed.wait()

    def wake(self) -> None:
        """Wake all waiters."""
        self._changed.set()
        self._changed = trio.Event()

    # Reading

    def get(self, kind: Kind, key: Key) -> Json:
        """Get an object. Raises Problem 404."""
        found = self.objects[kind].get(key)
        if found is None:
            raise Problem(404, "NotFound", f'{kind.plural} "{key[1]}" not found')
        return found

    def sorted(self, kind: Kind, namespace: str) -> list[Json]:
        """All objects of a kind (in `namespace`; "": in all), sorted by key."""
        return [
            item for key, item in sorted(self.objects[kind].items()) if namespace in ("", key[0])
        ]

    def since(self, version: int) -> Iterator[Record]:
        """The changes after `version`. Raises Problem 410."""
        self.check_version(version)
        return (record for record in self.history if record.version > version)

    def check_version(self, version: int) -> None:
        """Raises Problem 410 if `version` is older than the history."""
        if version < self.compacted:
            raise Problem(410, "Expired", f"too old resource version: {version} ({self.compacted})")

    # Writing

    def create(self, kind: Kind, namespace: str, item: Json) -> Json:
        """Store a new object. Raises Problem."""
        item = copy.deepcopy(item)
        meta = item.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
        if not meta.get("name"):
            raise Problem(
                422,
                "Invalid",
                f'{kind.name} "" is invalid: metadata.name: Required value: name or generateName is'
                " required",
            )
        if kind.namespaced and meta.setdefault("namespace", namespace) != namespace:
            raise Problem(
                400,
                "BadRequest",
                "the namespace of the provided object does not match the namespace sent on the"
                " request",
            )
        key = (namespace, meta["name"])
        if key in self.objects[kind]:
            raise Problem(409, "AlreadyExists", f'{kind.plural} "{key[1]}" already exists')
        if kind.namespaced and not self._has_namespace(namespace):
            raise Problem(404, "NotFound", f'namespaces "{namespace}" not found')
        meta.pop("resourceVersion", None)
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if kind.generation:
            meta["generation"] = 1
        return self._store(kind, key, item)

    def update(
        self, kind: Kind, key: Key, change: Callable[[Json], Json], *, status: bool = False
    ) -> Json:
        """Store what `change` returns for the object. Raises Problem."""
        old = self.get(kind, key)
        new = change(copy.deepcopy(old))
        meta = new.setdefault("metadata", {})
        wanted = meta.get("resourceVersion")
        if wanted not in (None, "", old["metadata"]["resourceVersion"]):
            text = (
                "the object has been modified; please apply your changes to the latest version and"
                " try again"
            )
            raise Problem(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {kind.plural} "{key[1]}": {text}',
            )
        for name in ("uid", "creationTimestamp", "name", "namespace", "generation"):
            if name in old["metadata"]:
                meta[name] = old["metadata"][name]
        if kind.status:
            kept = old if status else new
            other = new if status else old
            new = {
                **{
                    name: value
                    for name, value in kept.items()
                    if name not in ("metadata", "status")
                },
                "metadata": meta,
            }
            if "status" in other:
                new["status"] = other["status"]
        meta["resourceVersion"] = old["metadata"]["resourceVersion"]
        if new == old:
            return old
        if kind.generation and without_metadata(new) != without_metadata(old):
            meta["generation"] += 1
        return self._store(kind, key, new)

    def delete(self, kind: Kind, key: Key, uid: str = "") -> Json:
        """Delete an object. `uid`, if given, must be the object's. Raises Problem."""
        old = self.get(kind, key)
        if uid and old["metadata"]["uid"] != uid:
            raise Problem(
                409,
                "Conflict",
                f"Precondition failed: UID in precondition: {uid}, UID in object meta:"
                f" {old['metadata']['uid']}",
            )
        del self.objects[kind][key]
        self._record(kind, old, None)
        return old

    def _has_namespace(self, namespace: str) -> bool:
        namespaces = self.objects[KINDS["v1", "namespaces"]]
        return not namespaces or ("", namespace) in namespaces

    def _store(self, kind: Kind, key: Key, item: Json) -> Json:
        old = self.objects[kind].get(key)
        item = {"kind": kind.name, "apiVersion": kind.api, **item}
        item["metadata"] = {**item["metadata"], "resourceVersion": str(self.version + 1)}
        self.objects[kind][key] = item
        self._record(kind, old, item)
        return item

    def _record(self, kind: Kind, old: Json | None, new: Json | None) -> None:
        self.version += 1
        self.history.append(Record(self.version, kind, old, new))
        self.wake()

    # Faults

    def compact(self) -> None:
        """Drop the history: after that, a watch from an older version must list again."""
        self.compacted = self.version
        self.history.clear()
        self.wake()

    def backup(self) -> tuple[int, dict[Kind, dict[Key, Json]]]:
        """The version and all objects, for `restore`."""
        return self.version, {kind: dict(items) for kind, items in self.objects.items()}

    def restore(self, backup: tuple[int, dict[Kind, dict[Key, Json]]]) -> None:
        """Restore a backup, with its version."""
        self.version, objects = backup
        self.objects = {kind: dict(items) for kind, items in objects.items()}
        self.compacted = self.version
        self.history.clear()
        self.wake()


def without_metadata(item: Json) -> Json:
    """The parts whose changes `generation` counts."""
    return {name: value for name, value in item.items() if name != "metadata"}
