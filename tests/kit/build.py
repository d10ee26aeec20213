"""Which build of the product is tested: as Python, or with the path of a request compiled
(setup.py)."""

from __future__ import annotations

import pytest

from proxy.fastpath import h1_connection

COMPILED = h1_connection.__file__.endswith(".so")

# For a test that puts something else in the place of a part of the product, which a compiled part
# does not allow.
interpreted = pytest.mark.skipif(COMPILED, reason="it replaces what is compiled")
