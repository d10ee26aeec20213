"""Ports for programs that need one as an argument.

A port from the kernel's ephemeral range (net.ipv4.ip_local_port_range) may be taken a moment after
it was found to be free: the other workers of pytest-xdist open connections, too. No program gets a
port below that range by chance, and each worker has its own part of them."""

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
    """A TCP port of `host` without a listener. No two calls of a process return the same port."""
    for port in _candidates:
        with socket.socket() as sock:
            try:
                sock.bind((host, port))
            except OSError:
                continue
        return port
    raise AssertionError("all ports have been given out")
