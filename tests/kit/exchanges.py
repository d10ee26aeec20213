"""Exchanges for tests of code that inspects them without running them."""

from __future__ import annotations

from typing import Any, cast

from proxy.exchange.exchange import ConnectionInfo, Exchange, Whole
from proxy.exchange.h1.server import Http1Exchange, Http1Server
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.wire.messages import RequestHead


def unanswered(head: RequestHead, facts: ConnectionInfo) -> Exchange:
    """An exchange without a response: its server has no connection."""
    server = Http1Server(cast("Any", None), facts, ServerSettings(), Drain())
    return Http1Exchange(server, head, Whole(), now=0.0)
