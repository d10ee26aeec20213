"""What a worker is told when it is started, and what it says when it is asked: the words between supervisor and worker.

Between them is a pair of connected sockets that has no name, so nobody else can speak on it. Each message is its length, in four bytes, and
that many bytes. The first is the supervisor's: everything that must be the same in all workers of one proxy (`Start`). Then each byte of
the supervisor's is a question, and the answer to all of them is the same: how the worker is (`State`).

The socket also says who is alive. A supervisor whose worker has ended reads the end of it, and so does a worker whose supervisor has.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Protocol

import msgspec

from proxy.config.schema import Config
from proxy.workers.connection_table import SharedConnectionTable
from proxy.workers.merged_metrics import Reading

_LENGTH = struct.Struct("!I")
_MOST = 64 * 1024 * 1024  # bytes of a message; a state has some 100 KiB
QUESTION = b"?"


class ProcessGone(Exception):
    """The other end of the pair has ended, or speaks something else."""


class Pipe(Protocol):
    """What trio's SocketStream is to us."""

    async def send_all(self, data: bytes) -> None: ...
    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray: ...


@dataclass(frozen=True, slots=True)
class Start:
    """What a worker is made of. `config` is the worker's own share (`share`), as it was read when the supervisor was started: what the file
    says now does not count. `secret` is of the loop guard: a token that one worker has made is known to all."""

    number: int  # from 1
    config: Config
    secret: bytes


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a proxy is as one of several workers. `connection_table`: the connections of all of them."""

    number: int
    secret: bytes
    connection_table: SharedConnectionTable


class State(msgspec.Struct):
    """How a worker is. `reasons`: why no traffic should come; none: it is ready."""

    reasons: list[str]
    reading: Reading


def share(config: Config) -> Config:
    """The configuration of one of `config.workers`: what bounds the whole proxy is divided, rounded up. The administration listener is the
    supervisor's."""
    workers = config.workers

    def part(whole: int) -> int:
        return -(-whole // workers)

    replace = msgspec.structs.replace
    pool, loops, dns = config.pool, config.loops, config.dns
    return replace(
        config,
        admin=replace(config.admin, listen=()),
        outbound=replace(config.outbound, max_connections=part(config.outbound.max_connections)),
        inbound=replace(
            config.inbound, max_connections=part(config.inbound.max_connections), max_pending=max(2, part(config.inbound.max_pending))
        ),
        gateway=replace(
            config.gateway, max_connections=part(config.gateway.max_connections), max_pending=max(2, part(config.gateway.max_pending))
        ),
        pool=replace(
            pool,
            max_connections_per_endpoint=part(pool.max_connections_per_endpoint),
            max_idle_per_endpoint=part(pool.max_idle_per_endpoint),
        ),
        loops=replace(loops, max_self_calls=part(loops.max_self_calls)),
        dns=dns and replace(dns, max_in_flight=part(dns.max_in_flight), max_connections=part(dns.max_connections)),
    )


def start_message(start: Start) -> bytes:
    """The first message to a worker."""
    return pickle.dumps(start)


def read_start(data: bytes) -> Start:
    """The supervisor is the parent of this process, and the pair has no name: nobody else can have made these bytes."""
    start: Start = pickle.loads(data)  # noqa: S301  # from our own parent, over a pair that has no name
    return start


async def send(pipe: Pipe, data: bytes) -> None:
    """One message, with its length before it. Raises what the pipe raises."""
    await pipe.send_all(_LENGTH.pack(len(data)) + data)


async def receive(pipe: Pipe) -> bytes:
    """The next message. Raises ProcessGone."""
    (length,) = _LENGTH.unpack(await _exactly(pipe, _LENGTH.size))
    if length > _MOST:
        raise ProcessGone(f"a message of {length} bytes")
    return await _exactly(pipe, length)


async def _exactly(pipe: Pipe, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = await pipe.receive_some(min(size - len(data), 1 << 20))
        if not more:
            raise ProcessGone("the end of the stream")
        data += more
    return bytes(data)
