"""Fixtures for all plays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.fastpath import eligibility, fast_path
from tests.both_paths.stage import Cast, Theatre


@pytest.fixture
def made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Theatre]:
    monkeypatch.setattr("proxy.flows.loop_guard.token_bytes", bytes)  # the same tokens each time
    monkeypatch.setattr(
        eligibility, "REST", 0
    )  # the fast path is tried again and again, although many acts are not plain
    monkeypatch.setattr(fast_path, "PATIENCE", 0.1)
    caplog.set_level(logging.INFO, "isthmus")

    def make(cast: Cast, **settings: Any) -> Theatre:
        return Theatre(tmp_path, caplog, cast, settings)

    return make
