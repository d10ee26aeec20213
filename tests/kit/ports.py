"""Ports for programs that have to be told one.

A port from the range from which the kernel serves whoever asks for none in particular
(net.ipv4.ip_local_port_range) may be gone a moment after it was found to be free: the other worker
of pytest-xdist makes connections, too. Ports from below that range nobody gets by chance, and each
worker has some of its own.
"""

from __future__ import annotations

import os
import socket
from itertools import chain

_FIRST, _SHARE, _WORKERS = 10_000, 2_000, 10
_worker = int("0" + os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")) % _WORKERS
_begin = _FIRST + _worker * _SHARE
_offset = os.getpid() % _SHARE  # so that another run on the same machine most likely finds others
_candidates = chain(range(_begin + _offset, _begin + _SHARE), range(_begin, _begin + _offset))


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` on which nobody listens. No two calls of a process give the same."""
    for port in _candidates:
        with socket.socket() as sock:
            try:
                sock.bind((host, port))
            except OSError:
                continue
        return port
    raise AssertionError("all ports have been given out")
