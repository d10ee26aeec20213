"""Laboratory tests run inside the sandbox only: `python -m lab.sandbox -- pytest`, which `make
test` does."""

from collections.abc import AsyncIterator

import pytest

from lab.cluster import Cluster, Lab
from lab.sandbox import inside
from tests.lab.intercepted import a, b, close_accepted

__all__ = ["a", "b", "close_accepted"]  # fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if inside():
        return
    skip = pytest.mark.skip(
        reason="not in the sandbox: run `make test`, or `python -m lab.sandbox -- pytest`"
    )
    for item in items:
        if item.get_closest_marker("lab"):
            item.add_marker(skip)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with Lab() as lab:
        yield lab


@pytest.fixture
async def west(lab: Lab) -> Cluster:
    return lab.cluster("west")
