"""Runs rules.py, the rules of the API, against the in-memory server."""

from tests.control.rules import *  # noqa: F403  # the tests are all there
