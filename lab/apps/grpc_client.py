"""An ordinary gRPC client (package grpcio). Its calls are run by lab.apps.client, as `grpc-kinds`,
`grpc-spread` ..."""

import hashlib
import json
import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc

from lab.apps.grpc_service import SERVICE

Result = dict[str, Any]
SIZE = 64 * 1024 * 1024
# Ignore proxy settings in the environment.
OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", SIZE),
    ("grpc.max_send_message_length", SIZE),
]


class Shop:
    """The server's calls, over one channel."""

    def __init__(self, host: str, port: int) -> None:
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.channel = grpc.insecure_channel(target, options=OPTIONS)

    def __getattr__(self, kind: str) -> Callable[[str], Any]:
        """`shop.unary_unary("Name")` and the other three kinds, as grpc.Channel has them."""
        make = getattr(self.channel, kind)
        return lambda method: make(f"/{SERVICE}/{method}")


def kinds(host: str, port: int, secret: str) -> Result:
    """All four kinds of calls."""
    shop, word = Shop(host, port), secret.encode()
    echoed = shop.unary_unary("Echo")(word, timeout=10)
    counted = list(shop.unary_stream("Count")(b"100", timeout=10))
    pieces = [word * 100] * 200
    summed = json.loads(shop.stream_unary("Sum")(iter(pieces), timeout=10))
    right = {
        "messages": len(pieces),
        "bytes": sum(map(len, pieces)),
        "sha256": hashlib.sha256(b"".join(pieces)).hexdigest(),
    }
    return {
        "unary": echoed == word,
        "server": counted == [b"%d" % (number + 1) for number in range(100)],
        "client": summed == right,
        "both": _in_turn(shop, word, 50),
    }


def _in_turn(shop: Shop, word: bytes, turns: int) -> bool:
    """A conversation: each message is sent after the answer to the previous one."""
    words: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    answers = shop.stream_stream("Chat")(iter(words.get, None), timeout=10)
    same = 0
    for number in range(turns):
        said = word + b" %d" % number
        words.put(said)
        same += next(answers) == said
    words.put(None)
    return same == turns and next(answers, None) is None


def spread(host: str, port: int, count: str) -> Result:
    """Unary calls over one channel, eight in flight at a time; counts the answers by server."""
    name = Shop(host, port).unary_unary("Name")
    answered: Counter[str] = Counter()
    waiting: list[Any] = []
    began = time.monotonic()
    for _ in range(int(count)):
        if len(waiting) == 8:
            answered[waiting.pop(0).result().decode()] += 1
        waiting.append(name.future(b"", timeout=20))
    answered.update(call.result().decode() for call in waiting)
    return {"answered": answered, "seconds": time.monotonic() - began}


def impatient(host: str, port: int, timeout: str) -> Result:
    """A call whose deadline passes, and one that the client cancels."""
    shop = Shop(host, port)
    began = time.monotonic()
    late = _status(lambda: list(shop.unary_stream("Wait")(b"deadline", timeout=float(timeout))))
    late["seconds"] = time.monotonic() - began
    call = shop.unary_stream("Wait")(b"cancelled")
    next(call)
    time.sleep(0.2)
    call.cancel()
    # the end of the process would cut the connection, which the server would also notice
    time.sleep(0.3)
    return {"deadline": late, "cancelled": call.code().name}


def _status(function: Callable[[], object]) -> Result:
    """How a call ended, and what a proxy reports about it."""
    try:
        function()
    except grpc.RpcError as error:
        metadata = dict([*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())])
        return {
            "code": error.code().name,
            "details": error.details(),
            "proxy-status": metadata.get("proxy-status", ""),
        }
    return {"code": "OK"}


def gone(host: str, port: int) -> Result:
    """One unary call, however it ends."""
    return _status(lambda: Shop(host, port).unary_unary("Name")(b"", timeout=10))


def _reporting_errors(call: Callable[..., Result]) -> Callable[..., Result]:
    def wrapped(*arguments: Any) -> Result:
        try:
            return call(*arguments)
        except grpc.RpcError as error:
            return {"error": f"{error.code().name}: {error.details()}"}

    return wrapped


CALLS: dict[str, Callable[..., Result]] = {
    f"grpc-{call.__name__}": _reporting_errors(call) for call in (kinds, spread, impatient, gone)
}
