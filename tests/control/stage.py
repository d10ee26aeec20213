"""What tests of the client need of an API server, in memory or real.

A stage has a namespace that the test may fill. `Reports` keeps what a reflector reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import trio

from control.kube import objects
from control.kube.client import Client, Selection
from control.kube.objects import Meta, Service, ServicePort, ServiceSpec
from control.kube.reflector import Reflector
from control.kube.resources import SERVICES, Key, Resource
from lab.kube_api.server import ApiServer

T = TypeVar("T")


class ConfigMap(objects.Object, frozen=True):
    """v1."""

    data: dict[str, str] | None = None


CONFIG_MAPS = Resource("v1", "configmaps", ConfigMap)
METADATA = Resource("v1", "configmaps", objects.PartialObjectMetadata)


@dataclass
class Stage:
    """An API server. Objects that a test makes go into `namespace`."""

    client: Client
    namespace: str

    @property
    def here(self) -> Selection:
        return Selection(self.namespace)

    async def config_map(
        self, name: str, labels: dict[str, str] | None = None, **data: str
    ) -> ConfigMap:
        return await self.client.create(
            CONFIG_MAPS, ConfigMap(metadata=self.meta(name, labels), data=data), self.namespace
        )

    async def service(self, name: str) -> Service:
        made = Service(metadata=self.meta(name), spec=ServiceSpec(ports=(ServicePort(80, "http"),)))
        return await self.client.create(SERVICES, made, self.namespace)

    def meta(self, name: str, labels: dict[str, str] | None = None) -> Meta:
        return Meta(name=name, namespace=self.namespace, labels=labels)

    async def old_version(self) -> str:
        """A version from which nothing can be watched any more."""
        return "1"

    async def token(self, audience: str) -> tuple[str, str]:
        """A token for `audience`, and the name of its user."""
        raise NotImplementedError

    async def grant(self, user: str) -> None:
        """From now on `user` may get config maps in the namespace, and nothing else."""
        raise NotImplementedError


@dataclass
class FakeStage(Stage):
    server: ApiServer

    async def old_version(self) -> str:
        self.server.store.compact()
        return str(self.server.store.version - 1)

    async def token(self, audience: str) -> tuple[str, str]:
        user = f"system:serviceaccount:{self.namespace}:someone"
        self.server.behaviour.tokens["secret"] = {
            "user": {"username": user},
            "audiences": [audience],
        }
        self.server.behaviour.tokens[""] = {}  # the tests' own requests have none
        return "secret", user

    async def grant(self, user: str) -> None:
        def allowed(spec: dict[str, Any]) -> bool:
            wish = spec["resourceAttributes"]
            return spec["user"] == user and (
                wish["verb"],
                wish["resource"],
                wish.get("namespace"),
            ) == ("get", "configmaps", self.namespace)

        self.server.behaviour.allowed = allowed


class Reports(Generic[T]):
    """The reports of a reflector, and the current state by them."""

    def __init__(self) -> None:
        self.log: list[tuple[Key, T | None]] = []
        self.now: dict[Key, T] = {}
        self._more = trio.Event()

    def __call__(self, key: Key, item: T | None) -> None:
        self.log.append((key, item))
        if item is None:
            del self.now[key]
        else:
            self.now[key] = item
        self._more.set()
        self._more = trio.Event()

    async def until(self, done: Callable[[dict[Key, T]], bool]) -> None:
        """Wait until `done` is true for the current state."""
        with trio.fail_after(1000):
            while not done(self.now):
                await self._more.wait()


def data(item: ConfigMap) -> dict[str, str]:
    return item.data or {}


def follow(stage: Stage, reports: Reports[dict[str, str]]) -> Reflector[ConfigMap, dict[str, str]]:
    """A reflector of the namespace's config maps, which keeps their data."""
    return Reflector(stage.client, CONFIG_MAPS, data, reports, stage.here)
