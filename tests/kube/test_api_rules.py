"""The rules of the API, held by a real API server: the one of KUBECONFIG. See
tests/control/rules.py."""

from tests.control.rules import *  # noqa: F403  # the tests are all there
