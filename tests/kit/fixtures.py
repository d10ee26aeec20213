"""A trust root, and two workloads of it, as fixtures. A conftest.py imports them for its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.identity import issue
from proxy.identity.issue import Issued
from tests.kit.workloads import DOMAIN, Workload, workload


@pytest.fixture(scope="module")
def root() -> Issued:
    return issue.make_root(DOMAIN)


@pytest.fixture
def cart(tmp_path: Path, root: Issued) -> Workload:
    return workload(tmp_path, "cart", root)


@pytest.fixture
def checkout(tmp_path: Path, root: Issued) -> Workload:
    return workload(tmp_path, "checkout", root)
