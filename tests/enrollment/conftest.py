"""The control plane's end, with an API server in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from lab.kube_api.server import ApiServer
from tests.kit.issuing import Issuing


@pytest.fixture
async def issuing(tmp_path: Path, nursery: trio.Nursery) -> Issuing:
    return Issuing(tmp_path, ApiServer(nursery))
