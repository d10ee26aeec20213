"""What a stream does at the end of a burst: it lets other tasks and other busy streams run.

A scheduler pass runs each runnable task. A thousand uploads that always have data are a thousand
runnable tasks. If each of them reads 64 KiB, a pass takes 0.4 s, and all other requests wait that
long. So busy streams take steps of the `Pacer`, like starts and ends of streams do, and a pass has
as many steps as fit into 10 ms. A server's TLS handshake takes one too. A stream that waits for
its socket between reads, for example of a client with small requests, never ends a burst and takes
no step.
"""

from __future__ import annotations

from typing import Final

from trio.lowlevel import RunVar, checkpoint

from proxy.net.pacing import Pacer

# The pacer of this trio run. Without one, a stream only makes a checkpoint.
PACER: Final[RunVar[Pacer | None]] = RunVar("isthmus.pacer", None)


async def let_others_run() -> None:
    """Make a checkpoint. If the steps of this pass are used up, wait for a turn."""
    pacer = PACER.get()
    if pacer is None or pacer.now():
        await checkpoint()
    else:
        await pacer.turn()


async def take_step() -> None:
    """Take a step of the `Pacer` before expensive work, such as a TLS handshake. Waits only if the
    steps of this pass are used up."""
    pacer = PACER.get()
    if pacer is not None:
        await pacer.turn()
