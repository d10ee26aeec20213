"""A SPIFFE Workload API of the tests: a gRPC server by grpcio on a Unix socket, and the messages of
its protocol, made by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from proxy.identity.issue import Issued, issue, make_root
from proxy.identity.spiffe import SpiffeId

DOMAIN = "cluster.local"
WEB = SpiffeId(DOMAIN, "shop", "web")
SVIDS, BUNDLES = "FetchX509SVID", "FetchX509Bundles"


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def svid(root: Issued, leaf: Issued | None = None, name: SpiffeId = WEB, hint: str = "") -> bytes:
    """A message X509SVID: a new certificate of `root`, or `leaf`."""
    leaf = leaf or issue(root, name)
    key = leaf.key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return (
        field(1, str(name).encode())
        + field(2, der(leaf.certificate))
        + field(3, key)
        + field(4, der(root.certificate))
        + (field(5, hint.encode()) if hint else b"")
    )


def svids(*found: bytes, federated: Mapping[str, bytes] | None = None) -> bytes:
    """A message X509SVIDResponse."""
    return b"".join(field(1, one) for one in found) + _map(3, federated or {})


def bundles(found: Mapping[str, bytes]) -> bytes:
    """A message X509BundlesResponse."""
    return _map(2, found)


def _map(number: int, entries: Mapping[str, bytes]) -> bytes:
    return b"".join(
        field(number, field(1, name.encode()) + field(2, value)) for name, value in entries.items()
    )


Answer = bytes | tuple[grpc.StatusCode, str] | None


class WorkloadApi:
    """The agent. `answers` has what each call gets now: a message, a status that ends it, or None
    for nothing. `answer` replaces one, and sends it in the calls that are open.

    `asked`: (method, metadata) of each call.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "agent.sock"
        self.root = make_root(DOMAIN)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers: dict[str, Answer] = {SVIDS: svids(svid(self.root)), BUNDLES: None}
        self._versions = {SVIDS: 0, BUNDLES: 0}
        self._changed = threading.Condition()
        self._server: Any = None
        self._ending = False

    @property
    def address(self) -> str:
        return f"unix://{self.path}"

    def count(self, method: str = SVIDS) -> int:
        """How often `method` was called."""
        return sum(asked == method for asked, _ in self.asked)

    def answer(self, answer: Answer, method: str = SVIDS) -> None:
        with self._changed:
            self._answers[method] = answer
            self._versions[method] += 1
            self._changed.notify_all()

    def start(self) -> None:
        self._ending = False
        self._server = grpc.server(ThreadPoolExecutor(8))
        handlers = {
            name: grpc.unary_stream_rpc_method_handler(self._method(name))
            for name in (SVIDS, BUNDLES)
        }
        generic = grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            self._server.stop(None).wait()
            self._server = None

    def _method(self, name: str) -> Any:
        def call(request: bytes, context: Any) -> Iterator[bytes]:
            metadata = dict(context.invocation_metadata())
            self.asked.append((name, metadata))
            if request or metadata.get("workload.spiffe.io") != "true":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
            context.add_callback(self._wake)
            seen = -1
            while (found := self._next(name, seen, context)) is not None:
                seen, answer = found
                if isinstance(answer, tuple):
                    context.abort(*answer)
                if isinstance(answer, bytes):
                    yield answer

        return call

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _next(self, name: str, seen: int, context: Any) -> tuple[int, Answer] | None:
        """Wait for an answer after version `seen`; None at the end of the call."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ending or self._versions[name] != seen or not context.is_active()
            )
            if self._ending or not context.is_active():
                return None
            return self._versions[name], self._answers[name]
