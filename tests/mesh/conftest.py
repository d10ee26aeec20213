"""A trust root, and two workloads of it, for the tests of this room that begin with those."""

from __future__ import annotations

import pytest

from proxy.mesh import certificates
from tests.mesh.workloads import DOMAIN, workload


@pytest.fixture(scope="module")
def root():
    return certificates.make_root(DOMAIN)


@pytest.fixture
def cart(tmp_path, root):
    return workload(tmp_path, "cart", root)


@pytest.fixture
def checkout(tmp_path, root):
    return workload(tmp_path, "checkout", root)
