"""The fixtures of these tests."""

from tests.kit.fixtures import cart, checkout, root

__all__ = ["cart", "checkout", "root"]
