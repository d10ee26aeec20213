"""Which functions of the product are called, in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The calls of this thread in the block, each as `path:qualified.name`, the path relative to
    the checkout. A resumed coroutine counts as a call again."""
    calls: list[str] = []
    names: dict[object, str | None] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in names:
            path = Path(code.co_filename)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in {
                "proxy",
                "loopguard",
                "tracing",
            }
            names[code] = f"{path.relative_to(ROOT)}:{code.co_qualname}" if inside else None
        if (name := names[code]) is not None:
            calls.append(name)

    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)
