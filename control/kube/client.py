"""Requests to the API server.

Every request has limits: for the time to connect, the time to the response head, the total time and
the bytes of the response. Failed requests are retried where that is safe: always for requests that
can be repeated, such as reads and applies. Other requests are retried only if the server reports
that it has done nothing (429). Retry-After is obeyed up to `api.max_retry_after`. If the server
asks for more, the caller gets the error.

A few connections for requests are kept open. Each watch has a connection of its own.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import urlencode

import msgspec
import trio

from control.kube import objects
from control.kube.access import FRESH, Access
from control.kube.api_errors import InvalidAnswer, KubeError, Refused, TooLarge, Unreachable
from control.kube.backoff import Backoff, BackoffRules
from control.kube.http import ApiConnection, Head, Request, keep_alive
from control.kube.objects import Page, Status
from control.kube.resources import Resource, decode
from proxy.settings.declare import Section, number, octets, seconds

T = TypeVar("T", bound=objects.Object)

# Characters that are kept of a server's message.
_MAX_MESSAGE = 500
# Statuses of a server, or of a load balancer in front of it, that cannot answer now.
_PASSING = frozenset({500, 502, 503, 504})

_AGENT = ("User-Agent", "isthmus")
_JSON = ("Content-Type", "application/json")
_status = msgspec.json.Decoder(Status)


class ClientLimits(Section, frozen=True):
    """Requests to the API server."""

    connect_timeout: Annotated[
        float, seconds(0.1, 300, "maximum time for a connection and its TLS handshake")
    ] = 10.0
    response_timeout: Annotated[
        float, seconds(0.1, 600, "maximum time from a request to the head of its response")
    ] = 30.0
    request_timeout: Annotated[
        float,
        seconds(
            0.1, 3600, "maximum time for one attempt of a request, with its wait for a connection"
        ),
    ] = 60.0
    max_response_bytes: Annotated[
        int,
        octets(
            64 * 2**10,
            2**30,
            "maximum size of a response; above: a list is requested in smaller pages, and any"
            " other request fails",
        ),
    ] = 32 * 1024 * 1024
    max_head_bytes: Annotated[
        int, octets(4 * 2**10, 2**20, "maximum size of the head of a response")
    ] = 32 * 1024
    max_error_bytes: Annotated[
        int,
        octets(
            2**10, 2**20, "maximum size of an error response; above: only its status code is used"
        ),
    ] = 64 * 1024
    max_attempts: Annotated[
        int,
        number(
            1, 100, "maximum attempts of a request that can safely be repeated; lists have one each"
        ),
    ] = 4
    max_retry_after: Annotated[
        float,
        seconds(
            0,
            3600,
            "maximum `Retry-After` that a request obeys; above: it fails. The delay between two"
            " attempts is at most half of it, without jitter",
        ),
    ] = 30.0
    max_connections: Annotated[
        int,
        number(
            1,
            1000,
            "maximum concurrent requests; others wait. Each watch has a connection in addition",
        ),
    ] = 8
    max_idle_connections: Annotated[int, number(0, 1000, "maximum idle connections")] = 2
    idle_timeout: Annotated[
        float, seconds(0, 3600, "maximum time that an idle connection is kept")
    ] = 30.0
    credentials_interval: Annotated[
        float,
        seconds(
            1,
            3600,
            "time between two reads of the files with the token and the certificates; after a 401"
            " the token is read at once",
        ),
    ] = FRESH


@dataclass(frozen=True, slots=True)
class Selection:
    """A selection of objects: by namespace ("": all), label selector and field selector."""

    namespace: str = ""
    labels: str = ""
    fields: str = ""

    def query(self) -> dict[str, str]:
        """The selectors as query parameters."""
        given = {"labelSelector": self.labels, "fieldSelector": self.fields}
        return {name: value for name, value in given.items() if value}


Dial = Callable[[Access], Awaitable[trio.abc.Stream]]


async def connect(access: Access) -> trio.abc.Stream:
    """Connect to the API server, with TLS if `access` has trust. Raises OSError, Unreachable,
    AccessError.
    """
    tcp = await trio.open_tcp_stream(access.host, access.port)
    keep_alive(tcp)
    if access.trust is None:
        return tcp
    done = False
    try:
        name = access.server_name or access.host
        secured = trio.SSLStream(
            tcp, access.trust.context(), server_hostname=name, https_compatible=True
        )
        await secured.do_handshake()
        done = True
    except trio.BrokenResourceError as error:
        raise Unreachable(
            f"TLS handshake failed with {access.authority}: {error.__cause__ or error}"
        ) from error
    finally:
        if not done:
            await trio.aclose_forcefully(tcp)
    return secured


class WatchResponse:
    """The response to a watch. An async context manager that owns the connection."""

    def __init__(self, connection: ApiConnection, head: Head) -> None:
        self._connection = connection
        self.head = head

    async def read(self) -> bytes:
        """The next part of the body; b"" is the end. Raises Unreachable, InvalidAnswer."""
        return await self._connection.read()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._connection.aclose()


class Client:
    """A client of one API server. `requests` counts requests, `refusals` error responses."""

    def __init__(
        self,
        access: Access,
        limits: ClientLimits | None = None,
        dial: Dial = connect,
        chance: random.Random | None = None,
    ) -> None:
        self.access = access
        self.limits = limits or ClientLimits()
        self.requests = 0
        self.refusals = 0
        self._dial = dial
        self._chance = chance
        self._slots = trio.CapacityLimiter(self.limits.max_connections)
        self._idle: list[tuple[ApiConnection, float]] = []

    # Objects

    async def get(self, resource: Resource[T], namespace: str, name: str) -> T:
        """Get one object. Raises KubeError; Refused with 404 if it does not exist."""
        request = Request(
            "GET",
            self._target(resource.path(namespace, name)),
            [("Accept", resource.accept(listed=False))],
        )
        return resource.one(await self.call(request))

    async def page(
        self,
        resource: Resource[T],
        selection: Selection,
        query: Mapping[str, str],
        *,
        attempts: int = 0,
    ) -> Page[T]:
        """Get a page of a list. `query` has `limit`, `continue` and the like. Raises KubeError."""
        target = self._target(resource.path(selection.namespace), {**selection.query(), **query})
        request = Request("GET", target, [("Accept", resource.accept(listed=True))])
        return resource.page(await self.call(request, attempts=attempts))

    async def create(
        self, resource: Resource[T], item: T, namespace: str = "", *, stored: bool = True
    ) -> T:
        """Create an object and return it as stored. `stored` False: the object is a review, which
        the server answers but does not store. Raises KubeError.
        """
        request = Request(
            "POST", self._target(resource.path(namespace)), [_JSON], self._body(resource, item)
        )
        return resource.one(await self.call(request, repeat=not stored), stored=stored)

    async def apply(
        self, resource: Resource[T], item: Mapping[str, Any], manager: str, *, force: bool = True
    ) -> T:
        """Server-side apply: own exactly the fields of `item`, which must have apiVersion, kind and
        metadata. `force` takes over fields that another manager owns; without it they cause a 409.
        Raises KubeError.
        """
        meta = item["metadata"]
        path = resource.path(meta.get("namespace", ""), meta["name"])
        target = self._target(
            path, {"fieldManager": manager, "force": "true" if force else "false"}
        )
        headers = [("Content-Type", "application/apply-patch+yaml")]  # JSON is YAML
        return resource.one(
            await self.call(Request("PATCH", target, headers, msgspec.json.encode(item)))
        )

    async def patch(
        self,
        resource: Resource[T],
        item: T,
        changes: Mapping[str, Any],
        subresource: str = "",
        *,
        attempts: int = 0,
    ) -> T:
        """Merge `changes` (RFC 7386) into a stored object or its `subresource`, such as its status.

        If `changes` has the resourceVersion of `item`, and the object has changed since, Refused
        with 409 is raised. Objects are never replaced as a whole: the structs lack some fields,
        which would be lost. Raises KubeError.
        """
        target = self._target(
            resource.path(item.metadata.namespace, item.metadata.name, subresource)
        )
        headers = [("Content-Type", "application/merge-patch+json")]
        return resource.one(
            await self.call(
                Request("PATCH", target, headers, msgspec.json.encode(changes)), attempts=attempts
            )
        )

    async def delete(self, resource: Resource[T], item: T) -> None:
        """Delete this object, by uid, so never another one with the same name. It is not an error
        if it does not exist any more. Raises KubeError.
        """
        target = self._target(resource.path(item.metadata.namespace, item.metadata.name))
        body = msgspec.json.encode({"preconditions": {"uid": item.metadata.uid}})
        try:
            await self.call(Request("DELETE", target, [_JSON], body))
        except Refused as error:
            if error.code != 404:
                raise

    async def watch(
        self, resource: Resource[T], selection: Selection, query: Mapping[str, str]
    ) -> WatchResponse:
        """Start a watch. The caller closes the result. Raises KubeError."""
        target = self._target(
            resource.path(selection.namespace), {**selection.query(), **query, "watch": "1"}
        )
        return await self.open(Request("GET", target, [("Accept", resource.accept(listed=False))]))

    def _target(self, path: str, query: Mapping[str, str] | None = None) -> str:
        return (
            f"{self.access.prefix}{path}?{urlencode(query)}" if query else self.access.prefix + path
        )

    def _body(self, resource: Resource[T], item: T) -> bytes:
        return msgspec.json.encode(
            msgspec.structs.replace(item, kind=resource.kind, api_version=resource.api)
        )

    # Requests

    async def call(self, request: Request, *, repeat: bool = True, attempts: int = 0) -> bytes:
        """Send a request and return the response body, with retries.

        `repeat`: the request can safely be sent twice. `attempts` 0: the number in the limits.
        Raises KubeError.
        """
        backoff = Backoff(BackoffRules(max_delay=self.limits.max_retry_after / 2), self._chance)
        left = attempts or self.limits.max_attempts
        while True:
            left -= 1
            try:
                return await self._attempt(request)
            except KubeError as error:
                wait = backoff.failed(trio.current_time())
                retry_after = error.retry_after if isinstance(error, Refused) else None
                if (
                    left <= 0
                    or not _again(error, repeat=repeat)
                    or (retry_after or 0) > self.limits.max_retry_after
                ):
                    raise
                await trio.sleep(max(wait, retry_after or 0.0))

    async def open(self, request: Request) -> WatchResponse:
        """Send a request on a new connection and return once the response head has come. The caller
        closes the result. Raises KubeError.
        """
        for last in (False, True):
            connection = await self._connect()
            reusable = False
            try:
                head = await self._head(connection, request)
                if head.status < 400:
                    reusable = True
                    return WatchResponse(connection, head)
                refused = await self._refusal(connection, head)
            finally:
                if not reusable:
                    await connection.aclose()
            if refused.code != 401 or last or not self._forget_token():
                raise refused
        raise AssertionError("unreachable")

    async def _attempt(self, request: Request) -> bytes:
        with trio.move_on_after(self.limits.request_timeout):
            async with self._slots:
                try:
                    return await self._exchange(request)
                except Refused as error:
                    if error.code != 401 or not self._forget_token():
                        raise
                return await self._exchange(request)  # with the token that was just read again
        raise Unreachable(
            f"no complete response within {self.limits.request_timeout:g} s (api.request_timeout)"
        )

    async def _exchange(self, request: Request) -> bytes:
        while (connection := await self._take()) is not None:
            try:
                return await self._on(connection, request)
            except Unreachable:
                # The server closed this idle connection. Only idempotent requests are sent again:
                # the server may already have read a POST.
                if connection.response_started or request.method not in ("GET", "PUT", "DELETE"):
                    raise
        return await self._on(await self._connect(), request)

    async def _on(self, connection: ApiConnection, request: Request) -> bytes:
        reusable = False
        try:
            head = await self._head(connection, request)
            if head.status >= 400:
                refused = await self._refusal(connection, head)
                reusable = connection.reuse()
                raise refused
            body = await _whole(connection, self.limits.max_response_bytes)
            reusable = connection.reuse()
            return body
        finally:
            if reusable and len(self._idle) < self.limits.max_idle_connections:
                self._idle.append((connection, trio.current_time()))
            else:
                await connection.aclose()

    async def _head(self, connection: ApiConnection, request: Request) -> Head:
        token = self.access.token
        fields = (
            [("Authorization", f"Bearer {token.current().decode('latin-1').strip()}")]
            if token is not None
            else []
        )
        self.requests += 1
        with trio.move_on_after(self.limits.response_timeout):
            head = await connection.request(request, _AGENT, *fields)
            if head.status >= 400:
                self.refusals += 1
            elif head.status >= 300:
                raise InvalidAnswer(f"{head.status}: redirects are not followed")
            return head
        raise Unreachable(
            f"no response within {self.limits.response_timeout:g} s (api.response_timeout)"
        )

    async def _refusal(self, connection: ApiConnection, head: Head) -> Refused:
        try:
            with trio.move_on_after(self.limits.response_timeout):
                return refusal(
                    await _whole(connection, self.limits.max_error_bytes),
                    head.status,
                    head.headers.get("retry-after", ""),
                )
        except KubeError:
            pass  # the status is enough
        return refusal(b"", head.status, head.headers.get("retry-after", ""))

    async def _connect(self) -> ApiConnection:
        with trio.move_on_after(self.limits.connect_timeout):
            try:
                stream = await self._dial(self.access)
                return ApiConnection(stream, self.access.authority, self.limits.max_head_bytes)
            except OSError as error:
                raise Unreachable(f"cannot connect to {self.access.authority}: {error}") from error
        raise Unreachable(
            f"no connection to {self.access.authority} within {self.limits.connect_timeout:g} s"
            " (api.connect_timeout)"
        )

    async def _take(self) -> ApiConnection | None:
        while self._idle:
            connection, since = self._idle.pop()
            if trio.current_time() - since <= self.limits.idle_timeout and connection.is_quiet():
                return connection
            await connection.aclose()
        return None

    def _forget_token(self) -> bool:
        return self.access.token is not None and self.access.token.forget()

    async def aclose(self) -> None:
        """Close the idle connections."""
        idle, self._idle = self._idle, []
        for connection, _ in idle:
            await connection.aclose()


def refusal(body: bytes | msgspec.Raw, code: int, retry_after: str = "") -> Refused:
    """Make a Refused from the Status in an error response or in an ERROR event."""
    try:
        status = decode(_status, body)
    except InvalidAnswer:
        status = Status()
    details = status.details
    seconds = (
        float(details.retry_after_seconds)
        if details is not None and details.retry_after_seconds > 0
        else None
    )
    if retry_after.isascii() and retry_after.isdigit() and len(retry_after) <= 9:
        seconds = float(retry_after)
    causes = frozenset(
        cause.reason for cause in (details.causes if details is not None else None) or ()
    )
    return Refused(
        code or status.code,
        status.reason,
        status.message[:_MAX_MESSAGE],
        retry_after=seconds,
        causes=causes,
    )


def _again(error: KubeError, *, repeat: bool) -> bool:
    """Whether another attempt is safe and may help."""
    if isinstance(error, Refused):
        return error.code == 429 or (repeat and error.code in _PASSING)
    return repeat and isinstance(error, Unreachable)


async def _whole(connection: ApiConnection, most: int) -> bytes:
    parts, size = [], 0
    while piece := await connection.read():
        size += len(piece)
        if size > most:
            raise TooLarge(f"the response is larger than {most} bytes (api.max_response_bytes)")
        parts.append(piece)
    return b"".join(parts)
