"""The server's HTTP side, its watches and its faults.

Each connection is a task. `ApiServer.dial` opens an in-memory connection, so that a test can use
trio's MockClock. `serve` answers on any stream.
"""

from __future__ import annotations

import base64
import json
from collections import deque
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import h11
import trio
import trio.testing

from lab.kube_api.changes import apply, check_fields, merge, without_owners
from lab.kube_api.requests import ApiRequest, Behaviour, Fault, refuse, selected, view
from lab.kube_api.store import KINDS, Json, Key, Kind, Problem, Store
from lab.kube_api.watches import Watch

__all__ = ["ApiServer", "Behaviour", "Fault", "refuse"]


class ApiServer:
    """The server. `log` has the target of each request; `faults` apply to the next requests."""

    def __init__(self, nursery: trio.Nursery, store: Store | None = None) -> None:
        """`nursery` has a task for each connection that `dial` makes."""
        self.store = store or Store()
        self.behaviour = Behaviour()
        self.faults: deque[Fault] = deque()
        self.log: list[tuple[str, str]] = []
        self._nursery = nursery
        self._scopes: set[trio.CancelScope] = set()
        self._pages: dict[str, tuple[int, list[Json]]] = {}

    async def dial(self, _: object) -> trio.abc.Stream:
        """A connection in memory."""
        await trio.lowlevel.checkpoint()
        if self.behaviour.down:
            raise ConnectionRefusedError("the server is down")
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self.serve, theirs)
        return ours

    def cut(self) -> None:
        """Break all connections."""
        for scope in list(self._scopes):
            scope.cancel()

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._scopes)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until it ends. Closes `stream`."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await _Connection(self, stream).run()
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
                pass
            finally:
                self._scopes.discard(scope)
                await trio.aclose_forcefully(stream)

    # Answers

    def answer(self, request: ApiRequest) -> Json:
        """Answer a request that is not a watch. Raises Problem."""
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        if parts[0] == "api":
            api, rest = parts[1], parts[2:]
        else:
            api, rest = "/".join(parts[1:3]), parts[3:]
        if api in ("authentication.k8s.io/v1", "authorization.k8s.io/v1"):
            return self._review(rest[0], json.loads(request.body))
        kind, namespace, name, subresource = self._found(api, rest)
        if name:
            return self._one(request, kind, (namespace, name), subresource)
        if request.method == "POST":
            return without_owners(self.store.create(kind, namespace, json.loads(request.body)))
        if request.method != "GET":
            raise Problem(
                405,
                "MethodNotAllowed",
                "the server does not allow this method on the requested resource",
            )
        return self._list(request, kind, namespace)

    def _found(self, api: str, rest: list[str]) -> tuple[Kind, str, str, str]:
        namespace = ""
        if rest and rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind = KINDS.get((api, rest[0])) if rest else None
        if kind is None:
            raise Problem(404, "NotFound", "the server could not find the requested resource")
        if kind.plural in self.behaviour.forbidden:
            raise Problem(403, "Forbidden", f"{kind.plural} is forbidden: no rights")
        return kind, namespace, rest[1] if len(rest) > 1 else "", rest[2] if len(rest) > 2 else ""

    def watched(self, request: ApiRequest) -> tuple[Kind, str]:
        """Kind and namespace of a watch. Raises Problem."""
        parts = request.path.strip("/").split("/")
        api, rest = (
            (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        )
        kind, namespace, _, _ = self._found(api, rest)
        return kind, namespace

    def _one(self, request: ApiRequest, kind: Kind, key: Key, subresource: str) -> Json:
        if request.method == "GET":
            return view(self.store.get(kind, key), request)
        body: Json = json.loads(request.body or b"{}")
        status = subresource == "status"
        if request.method == "PUT":
            return without_owners(
                self.store.update(
                    kind,
                    key,
                    lambda old: {**body, "x-owners": old.get("x-owners", {})},
                    status=status,
                )
            )
        if request.method == "DELETE":
            return without_owners(
                self.store.delete(kind, key, body.get("preconditions", {}).get("uid", ""))
            )
        if request.kind == "application/merge-patch+json":
            return without_owners(
                self.store.update(kind, key, lambda old: merge(old, body), status=status)
            )
        if request.kind == "application/apply-patch+yaml":
            manager, force = (
                request.query.get("fieldManager", ""),
                request.query.get("force") == "true",
            )
            if not manager:
                raise Problem(
                    422, "Invalid", "fieldManager: Required value: is required for apply patch"
                )
            if key not in self.store.objects[kind]:
                return without_owners(
                    self.store.create(kind, key[0], apply(dict(body), body, manager, force=force))
                )
            return without_owners(
                self.store.update(
                    kind, key, lambda old: apply(old, body, manager, force=force), status=status
                )
            )
        raise Problem(415, "UnsupportedMediaType", f"unsupported: {request.kind}")

    def _list(self, request: ApiRequest, kind: Kind, namespace: str) -> Json:
        query, store = request.query, self.store
        if "sendInitialEvents" in query:
            raise Problem(
                422,
                "Invalid",
                "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for list",
            )
        check_fields(query.get("fieldSelector", ""))
        version = int(query.get("resourceVersion", "") or 0)
        if version > store.version:
            causes = [
                {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
            ]
            text = f"Timeout: Too large resource version: {version}, current: {store.version}"
            raise Problem(504, "Timeout", text, causes=causes, retryAfterSeconds=1)
        at, items, start = store.version, [], 0
        if "continue" in query:
            token = json.loads(base64.urlsafe_b64decode(query["continue"]))
            at, start = token["v"], token["at"]
            if at < store.compacted or token["id"] not in self._pages:
                raise Problem(
                    410,
                    "Expired",
                    "The provided continue parameter is too old to display a consistent list"
                    " result.",
                )
            items = self._pages[token["id"]][1]
            page_id = token["id"]
        else:
            items = [item for item in store.sorted(kind, namespace) if selected(item, query)]
            page_id = str(len(self._pages))
        limit = int(query.get("limit", "0")) or len(items) or 1
        meta: Json = {"resourceVersion": str(at)}
        if start + limit < len(items):
            self._pages[page_id] = (at, items)
            token = json.dumps({"v": at, "at": start + limit, "id": page_id}).encode()
            meta |= {
                "continue": base64.urlsafe_b64encode(token).decode(),
                "remainingItemCount": len(items) - start - limit,
            }
        partial = "PartialObjectMetadata" in request.accept
        name, api = (
            ("PartialObjectMetadata", "meta.k8s.io/v1") if partial else (kind.name, kind.api)
        )
        views = [view(item, request) for item in items[start : start + limit]]
        if not partial:
            views = [
                {name: value for name, value in item.items() if name not in ("kind", "apiVersion")}
                for item in views
            ]
        return {"kind": f"{name}List", "apiVersion": api, "metadata": meta, "items": views}

    def _review(self, plural: str, body: Json) -> Json:
        spec = body["spec"]
        if plural == "subjectaccessreviews":
            return {**body, "status": {"allowed": bool(self.behaviour.allowed(spec))}}
        if plural != "tokenreviews":
            raise Problem(404, "NotFound", "the server could not find the requested resource")
        found = self.behaviour.tokens.get(spec.get("token", ""))
        wanted = set(spec.get("audiences") or ["https://kubernetes.default.svc"])
        given = wanted & set((found or {}).get("audiences", ["https://kubernetes.default.svc"]))
        if found is None or not given:
            return {**body, "status": {"user": {}, "error": "invalid bearer token"}}
        return {
            **body,
            "status": {"authenticated": True, "user": found["user"], "audiences": sorted(given)},
        }


class _Connection:
    def __init__(self, server: ApiServer, stream: trio.abc.Stream) -> None:
        self._server = server
        self._stream = stream
        self._http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        while True:
            request = await self._request()
            if request is None:
                return
            self._server.log.append((request.method, request.target))
            if await self._fault(request):
                return
            try:
                self._authenticate(request)
                if request.query.get("watch") in ("1", "true"):
                    server = self._server
                    await Watch(
                        server.store, server.behaviour, request, server.watched(request)
                    ).run(self._send)
                    return
                await self._answer(200, self._server.answer(request))
            except Problem as problem:
                await self._answer(problem.code, problem.body)
            if self._http.our_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _fault(self, request: ApiRequest) -> bool:
        faults = self._server.faults
        fault = next((fault for fault in faults if fault.only in request.target), None)
        if fault is None:
            return False
        faults.remove(fault)
        if fault.hang:
            await trio.sleep_forever()
        if fault.after is not None:
            whole = json.dumps(self._server.answer(request)).encode()
            head = (
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(whole)
            )
            await self._stream.send_all(head + whole[: fault.after])
        elif fault.raw:
            await self._stream.send_all(fault.raw)
        return True

    def _authenticate(self, request: ApiRequest) -> None:
        tokens = self._server.behaviour.tokens
        if tokens and request.token not in tokens:
            raise Problem(401, "Unauthorized", "Unauthorized")

    async def _request(self) -> ApiRequest | None:
        head: h11.Request | None = None
        body = b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(bytes(await self._stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                break
            else:
                return None
        fields = {name.decode(): value.decode() for name, value in head.headers}
        target = head.target.decode()
        url = urlsplit(target)
        query = {
            name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()
        }
        token = fields.get("authorization", "").removeprefix("Bearer ")
        return ApiRequest(
            head.method.decode(),
            target,
            url.path,
            query,
            fields.get("accept", ""),
            fields.get("content-type", ""),
            token,
            body,
        )

    async def _answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
        await self._send(
            h11.Response(status_code=code, headers=headers), h11.Data(data=data), h11.EndOfMessage()
        )

    async def _send(self, *events: h11.Event) -> None:
        await self._stream.send_all(b"".join(self._http.send(event) or b"" for event in events))
