"""One of several workers: the same proxy as ever, but for the administration listener, which is the supervisor's.

`python -m proxy.worker FD MEMORY` is started by the supervisor and by nobody else. FD is this end of a pair of sockets
(workers/protocol.py): by it comes what this worker is, and over it go the answers about how it is. MEMORY is shared with the other workers
(workers/connection_table.py). When the supervisor is gone, whoever runs the container thinks that the proxy is; so the worker behaves as if
it had been told to stop.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import msgspec
import trio

from proxy.app import App, start
from proxy.errors import StartError
from proxy.workers.connection_table import SharedConnectionTable
from proxy.workers.merged_metrics import reading
from proxy.workers.protocol import QUESTION, ProcessGone, State, WorkerInfo, read_start, receive, send


def main(descriptor: int, memory: int) -> int:
    """Be the worker at the other end of `descriptor`; returns the exit code."""
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    try:
        told = read_start(trio.run(_first, sock.dup()))
    except (ProcessGone, OSError, trio.BrokenResourceError):
        return 0  # nobody wants a worker any more

    async def beside(app: App) -> None:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as supervisor:
            await answer(app, supervisor)

    worker = WorkerInfo(told.number, told.secret, SharedConnectionTable(memory, told.number, told.secret))
    os.close(memory)
    try:
        return start(told.config, worker, beside)
    except StartError as error:
        sys.stderr.write(f"isthmus: {error}\n")
        return error.code


async def _first(sock: socket.socket) -> bytes:
    async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as supervisor:
        return await receive(supervisor)


async def answer(app: App, supervisor: trio.SocketStream) -> None:
    """Say how this worker is, whenever it is asked."""
    try:
        while questions := await supervisor.receive_some():
            for _ in range(bytes(questions).count(QUESTION)):
                app.observe()
                await send(supervisor, await trio.to_thread.run_sync(_state, app))
    except trio.BrokenResourceError:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _state(app: App) -> bytes:
    """How this worker is. Collecting takes milliseconds, which the data path should not stand still for."""
    return msgspec.msgpack.encode(State(app.not_ready(), reading(app.metrics.registry)))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
