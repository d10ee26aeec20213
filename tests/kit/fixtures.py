"""A trust root, and two workloads of it, as fixtures. A conftest.py imports them for its tests."""

from __future__ import annotations

import pytest

from proxy.identity import issue
from tests.kit.workloads import DOMAIN, workload


@pytest.fixture(scope="module")
def root():
    return issue.make_root(DOMAIN)


@pytest.fixture
def cart(tmp_path, root):
    return workload(tmp_path, "cart", root)


@pytest.fixture
def checkout(tmp_path, root):
    return workload(tmp_path, "checkout", root)
