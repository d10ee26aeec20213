"""A gRPC server (package grpcio), without generated code: messages are bytes, as they are for any
gRPC server below its generated part.

Name    unary                    the name of the server, from its command line
Echo    unary                    the request
Count   server streaming         b"3" -> b"1", b"2", b"3"
Sum     client streaming         how many messages and bytes came, and the SHA-256 of all, as JSON
Chat    bidirectional streaming  each message comes back at once
Flood   server streaming         b"COUNT SIZE" -> that many messages of that many bytes
Wait    server streaming         one message, then nothing until the call ends; prints how it ended
Fail    unary                    b"NUMBER words" -> that status, with binary details in the trailers
Sleep   unary                    after b"SECONDS"; says nothing
Trail   unary                    with trailing metadata of b"SIZE" bytes, in fields of 1000
Tell    unary                    the caller's metadata, as JSON; x- ones also as the answer's
"""

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

SERVICE = "isthmus.lab.Shop"
_SIZE = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
]
_CALLS = 64  # at the same time; each has a thread
Context = Any  # grpc.ServicerContext; the package has no types


class Shop:
    """The calls."""

    def __init__(self, name: str) -> None:
        self._name = name

    def unary_name(self, _: bytes, context: Context) -> bytes:
        context.set_trailing_metadata([("x-served-by", self._name)])
        return self._name.encode()

    def unary_echo(self, request: bytes, _: Context) -> bytes:
        return request

    def serving_count(self, request: bytes, _: Context) -> Iterator[bytes]:
        return (b"%d" % (number + 1) for number in range(int(request)))

    def taking_sum(self, requests: Iterator[bytes], _: Context) -> bytes:
        digest, count, size = hashlib.sha256(), 0, 0
        for request in requests:
            digest.update(request)
            count, size = count + 1, size + len(request)
        return json.dumps({"messages": count, "bytes": size, "sha256": digest.hexdigest()}).encode()

    def both_chat(self, requests: Iterator[bytes], _: Context) -> Iterator[bytes]:
        yield from requests

    def serving_flood(self, request: bytes, _: Context) -> Iterator[bytes]:
        count, size = map(int, request.split())
        block = bytes(range(256)) * (size // 256 + 1)
        return (block[:size] for _ in range(count))

    def serving_wait(self, request: bytes, context: Context) -> Iterator[bytes]:
        began, over, left = time.monotonic(), threading.Event(), context.time_remaining()
        word = request.decode()
        log(f"{word}: {f'{left:.2f} s left' if left is not None and left < 1e6 else 'no deadline'}")
        context.add_callback(over.set)
        yield self._name.encode()
        over.wait()
        log(f"{word}: over after {time.monotonic() - began:.2f} s, active: {context.is_active()}")

    def unary_fail(self, request: bytes, context: Context) -> bytes:
        number, _, words = request.decode().partition(" ")
        context.set_trailing_metadata([("x-details-bin", bytes(range(256))), ("x-kind", "a test")])
        code = next(code for code in grpc.StatusCode if code.value[0] == int(number))
        context.abort(code, words)
        raise AssertionError("abort raises")

    def unary_sleep(self, request: bytes, _: Context) -> bytes:
        time.sleep(float(request))
        return b""

    def unary_trail(self, request: bytes, context: Context) -> bytes:
        context.set_trailing_metadata(
            [(f"x-{number}", "v" * 1000) for number in range(int(request) // 1000)]
        )
        return b""

    def unary_tell(self, _: bytes, context: Context) -> bytes:
        metadata = list(context.invocation_metadata())
        own = [(key, value) for key, value in metadata if key.startswith("x-")]
        context.send_initial_metadata(own)
        context.set_trailing_metadata(own)
        return json.dumps(
            [(key, value.hex() if isinstance(value, bytes) else value) for key, value in metadata]
        ).encode()


_KINDS = {
    "unary": grpc.unary_unary_rpc_method_handler,
    "serving": grpc.unary_stream_rpc_method_handler,
    "taking": grpc.stream_unary_rpc_method_handler,
    "both": grpc.stream_stream_rpc_method_handler,
}


def log(words: str) -> None:
    """Print one line for the reader of the server's output."""
    print(words, flush=True)


def handlers(shop: Shop) -> dict[str, Any]:
    """Method name -> grpcio's handler, by the names of the methods above."""
    names = (name for name in dir(shop) if not name.startswith("__") and "_" in name[1:])
    kinds = ((name, *name.partition("_")[::2]) for name in names)
    return {
        what.capitalize(): _KINDS[kind](getattr(shop, name))
        for name, kind, what in kinds
        if kind in _KINDS
    }


def main(port: int, name: str) -> None:
    """Serve until SIGTERM; then what is under way has a second to finish."""
    server = grpc.server(
        futures.ThreadPoolExecutor(_CALLS), options=[*_SIZE, ("grpc.so_reuseport", 0)]
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, handlers(Shop(name))),)
    )
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: server.stop(1))
    server.wait_for_termination()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
