"""The messages between the supervisor and a worker.

They use a pair of connected, unnamed sockets, so no other process can send on it. A message is its
length in four bytes, then that many bytes. The supervisor sends the first one (`Start`): everything
that must be the same in all workers. After that, each byte from the supervisor is a question, and
the worker answers with its `WorkerState`.

The socket also shows whether the other side runs: when one process has ended, the other one reads
the end of the stream.
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
_MOST = 64 * 1024 * 1024  # bytes per message; a state has some 100 KiB
QUESTION = b"?"


class ProcessGone(Exception):
    """The other process has ended, or sent an invalid message."""


class MessageStream(Protocol):
    """The methods of trio's SocketStream that are used here."""

    async def send_all(self, data: bytes) -> None: ...
    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray: ...


@dataclass(frozen=True, slots=True)
class Start:
    """The parameters of a worker. `config` is the worker's share of the configuration (see
    `share`), as read when the supervisor started; later changes of the file do not count. `secret`
    belongs to the loop guard: every worker recognises tokens that another one created.
    """

    number: int  # from 1
    config: Config
    secret: bytes


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Set in a proxy that is one of several workers. `connection_table`: the connections of all
    workers.
    """

    number: int
    secret: bytes
    connection_table: SharedConnectionTable


class WorkerState(msgspec.Struct):
    """A worker's state. `reasons`: why it should get no traffic; empty if it is ready."""

    reasons: list[str]
    reading: Reading


def share(config: Config) -> Config:
    """The configuration of one of `config.workers` workers. Limits of the whole proxy are divided
    and rounded up. The worker has no administration listener; the supervisor has it.
    """
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
            config.inbound,
            max_connections=part(config.inbound.max_connections),
            max_pending=max(2, part(config.inbound.max_pending)),
        ),
        gateway=replace(
            config.gateway,
            max_connections=part(config.gateway.max_connections),
            max_pending=max(2, part(config.gateway.max_pending)),
        ),
        pool=replace(
            pool,
            max_connections_per_endpoint=part(pool.max_connections_per_endpoint),
            max_idle_per_endpoint=part(pool.max_idle_per_endpoint),
        ),
        loops=replace(loops, max_self_calls=part(loops.max_self_calls)),
        dns=dns
        and replace(
            dns, max_in_flight=part(dns.max_in_flight), max_connections=part(dns.max_connections)
        ),
    )


def start_message(start: Start) -> bytes:
    """The first message to a worker."""
    return pickle.dumps(start)


def read_start(data: bytes) -> Start:
    """Decode the first message. Unpickling is safe: only the parent process can write to the
    unnamed pair.
    """
    start: Start = pickle.loads(data)  # noqa: S301  # from our parent, over an unnamed socket pair
    return start


async def send(pipe: MessageStream, data: bytes) -> None:
    """Send one message with its length. Raises what the pipe raises."""
    await pipe.send_all(_LENGTH.pack(len(data)) + data)


async def receive(pipe: MessageStream) -> bytes:
    """Receive the next message. Raises ProcessGone."""
    (length,) = _LENGTH.unpack(await _exactly(pipe, _LENGTH.size))
    if length > _MOST:
        raise ProcessGone(f"a message of {length} bytes")
    return await _exactly(pipe, length)


async def _exactly(pipe: MessageStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = await pipe.receive_some(min(size - len(data), 1 << 20))
        if not more:
            raise ProcessGone("the end of the stream")
        data += more
    return bytes(data)
