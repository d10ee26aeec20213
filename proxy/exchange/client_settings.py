"""The timeouts of an exchange with an endpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Timeouts for the server, in seconds."""

    response_timeout: float = 300.0  # from the end of the request to the response head
    stream_timeout: float = 3600.0  # between two pieces of a body, in either direction
