"""The rules of the API, held by the server in memory: see rules.py."""

from tests.control.rules import *  # noqa: F403
