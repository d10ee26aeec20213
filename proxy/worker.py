"""One of several workers: a complete proxy without the administration listener, which the
supervisor has.

Only the supervisor starts `python -m proxy.worker FD MEMORY`. FD is this process's end of a socket
pair (workers/protocol.py): the worker receives its `Start` from it and sends its states to it.
MEMORY is shared with the other workers (workers/connection_table.py). If the supervisor is gone,
the container counts as ended, so the worker shuts down as on SIGTERM.
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
from proxy.workers.protocol import (
    QUESTION,
    ProcessGone,
    WorkerInfo,
    WorkerState,
    read_start,
    receive,
    send,
)


def main(descriptor: int, memory: int) -> int:
    """Run the worker at the other end of `descriptor`; returns the exit code."""
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    try:
        start_message = read_start(trio.run(_first, sock.dup()))
    except (ProcessGone, OSError, trio.BrokenResourceError):
        return 0  # the supervisor is gone

    async def beside(app: App) -> None:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as supervisor:
            await answer(app, supervisor)

    worker = WorkerInfo(
        start_message.number,
        start_message.secret,
        SharedConnectionTable(memory, start_message.number, start_message.secret),
    )
    os.close(memory)
    try:
        return start(start_message.config, worker, beside)
    except StartError as error:
        sys.stderr.write(f"isthmus: {error}\n")
        return error.code


async def _first(sock: socket.socket) -> bytes:
    async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as supervisor:
        return await receive(supervisor)


async def answer(app: App, supervisor: trio.SocketStream) -> None:
    """Send this worker's state whenever the supervisor asks."""
    try:
        while questions := await supervisor.receive_some():
            for _ in range(bytes(questions).count(QUESTION)):
                app.observe()
                await send(supervisor, await trio.to_thread.run_sync(_state, app))
    except trio.BrokenResourceError:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _state(app: App) -> bytes:
    """This worker's state, encoded. Collecting takes milliseconds, so it must not run on the data
    path's thread.
    """
    return msgspec.msgpack.encode(WorkerState(app.not_ready(), reading(app.metrics.registry)))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
