"""Which build of the product is tested: as Python, or with the request path compiled (setup.py)."""

from __future__ import annotations

import pytest

from proxy.fastpath import h1_connection

COMPILED = h1_connection.__file__.endswith(".so")

# For a test that replaces a part of the product, which a compiled part does not allow.
interpreted = pytest.mark.skipif(COMPILED, reason="it replaces what is compiled")
