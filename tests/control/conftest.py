"""An in-memory API server and a client of it. Time is trio's MockClock, which jumps when all tasks
wait.
"""

from __future__ import annotations

import random

import pytest
import trio
from trio.abc import Clock
from trio.testing import MockClock

from control.kube.access import Access
from control.kube.client import Client
from lab.kube_api.server import ApiServer
from tests.control.stage import FakeStage

AT = Access("api.test", 6443, None)


@pytest.fixture
def clock() -> Clock:
    """Every test must request it. Otherwise its time is the machine's."""
    return MockClock(autojump_threshold=0)


@pytest.fixture
async def server(nursery: trio.Nursery) -> ApiServer:
    return ApiServer(nursery)


@pytest.fixture
def client(server: ApiServer) -> Client:
    return Client(AT, dial=server.dial, chance=random.Random(1))


@pytest.fixture
def stage(server: ApiServer, client: Client) -> FakeStage:
    return FakeStage(client, "default", server)
