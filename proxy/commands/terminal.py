"""Colours in the output of the commands: for the verdicts only, and on a terminal only.

rich, which the demonstration uses, is no dependency of the proxy.
"""

import os
import sys

_COLOURS = {"ok": 32, "WARNING": 33, "FAILED": 31}


def verdict(word: str, width: int) -> str:
    """`word`, padded to `width`, and in its colour if standard output is a terminal. NO_COLOR
    (https://no-color.org) and TERM=dumb switch colours off.
    """
    padded = f"{word:<{width}}"
    if word not in _COLOURS or not _in_colours():
        return padded
    return f"\x1b[{_COLOURS[word]}m{word}\x1b[0m{padded[len(word) :]}"


def _in_colours() -> bool:
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
