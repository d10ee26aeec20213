"""What these tests say about exchanges holds on both paths: every test in this directory runs on
the ordinary path and on the fast one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.hop import FAST


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.module.__name__.endswith(("both_paths", "test_detect", "test_upstream_head")):
        metafunc.parametrize("path_taken", ["ordinary", "fast"], indirect=True)


@pytest.fixture(autouse=True)
def path_taken(request: pytest.FixtureRequest) -> Iterator[None]:
    token = FAST.set(getattr(request, "param", "ordinary") == "fast")
    yield
    FAST.reset(token)
