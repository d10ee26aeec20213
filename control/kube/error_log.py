"""Logs a repeated error once."""

from __future__ import annotations

import logging

_log = logging.getLogger("isthmus.control")


class ErrorLog:
    """The errors of one activity, such as the watch of one kind of objects. `what` begins each
    message. An error is logged as a warning when it differs from the last one, else at the level
    debug.
    """

    __slots__ = ("_last", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._last = ""

    def failed(self, error: str) -> None:
        """Log a failure."""
        level = logging.DEBUG if error == self._last else logging.WARNING
        _log.log(level, "%s: %s", self._what, error)
        self._last = error

    def works(self) -> None:
        """Log, after a failure, that the activity works again."""
        if self._last:
            _log.info("%s: works again", self._what)
            self._last = ""
