"""What tests need of a real API server: see tests/control/stage.py."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
import trio

from control.kube import objects
from control.kube.api_errors import Refused
from control.kube.http import Request
from control.kube.resources import Resource
from tests.control.stage import CONFIG_MAPS, Stage


class Namespace(objects.Object, frozen=True):
    """v1."""


class Node(objects.Object, frozen=True):
    """v1."""


class ServiceAccount(objects.Object, frozen=True):
    """v1."""


class Role(objects.Object, frozen=True):
    """rbac.authorization.k8s.io/v1."""


class RoleBinding(objects.Object, frozen=True):
    """rbac.authorization.k8s.io/v1."""


NAMESPACES = Resource("v1", "namespaces", Namespace, namespaced=False)
REAL_NODES = Resource("v1", "nodes", Node, namespaced=False)
ACCOUNTS = Resource("v1", "serviceaccounts", ServiceAccount)
RBAC = "rbac.authorization.k8s.io/v1"
ROLES, BINDINGS = Resource(RBAC, "roles", Role), Resource(RBAC, "rolebindings", RoleBinding)


@dataclass
class RealStage(Stage):
    async def old_version(self) -> str:
        """The first version. A server that was started with its data has only later ones; a new
        server has all of them."""
        query = {"resourceVersion": "1", "timeoutSeconds": "5"}
        try:
            async with await self.client.watch(CONFIG_MAPS, self.here, query) as answer:
                if b'"type":"ERROR"' not in await answer.read():
                    pytest.skip(
                        "this API server remembers everything: it was started with an empty store"
                    )
        except Refused:
            pass  # at once: the test says whether it is a 410
        return "1"

    async def token(self, audience: str) -> tuple[str, str]:
        path = ACCOUNTS.path(self.namespace, "default", "token")
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [audience]},
        }
        request = Request(
            "POST", path, [("Content-Type", "application/json")], msgspec.json.encode(body)
        )
        answer = msgspec.json.decode(await self.client.call(request))
        return answer["status"]["token"], f"system:serviceaccount:{self.namespace}:default"

    async def grant(self, user: str) -> None:
        group = "rbac.authorization.k8s.io"
        meta = {"name": "reader", "namespace": self.namespace}
        rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]
        await self.client.apply(
            ROLES, {"apiVersion": RBAC, "kind": "Role", "metadata": meta, "rules": rules}, "tests"
        )
        binding = {
            "roleRef": {"apiGroup": group, "kind": "Role", "name": "reader"},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
        }
        await self.client.apply(
            BINDINGS,
            {"apiVersion": RBAC, "kind": "RoleBinding", "metadata": meta, **binding},
            "tests",
        )

    async def account_is_there(self) -> None:
        """Wait for the account. A controller makes it, and pods need it."""
        with trio.fail_after(60):
            while True:
                try:
                    await self.client.get(ACCOUNTS, self.namespace, "default")
                except Refused:
                    await trio.sleep(0.1)
                else:
                    return
