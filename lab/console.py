"""Output by rich: colours and progress on a terminal, plain text everywhere else.

Plain text has a fixed width and no spaces at the ends of lines, so documents and tests can contain
it. NO_COLOR and TERM=dumb switch colours off.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 100
# Wider than any table.
_WIDE = 400


def console(out: TextIO | None = None, width: int = WIDTH) -> Console:
    """A console that prints to `out` (None: standard output), at most `width` columns wide."""
    made = Console(file=out or sys.stdout, highlight=False, markup=False, emoji=False)
    made.width = min(width, made.width) if made.is_terminal else width
    return made


def wide_console() -> Console:
    """A console for standard output that wraps nothing."""
    made = console()
    made.width = _WIDE
    return made


def put(console: Console, what: RenderableType) -> None:
    """Print `what`. Text is not wrapped."""
    if console.is_terminal:
        console.print(what, soft_wrap=isinstance(what, str | Text))
        return
    with console.capture() as captured:
        console.print(what, soft_wrap=isinstance(what, str | Text))
    for line in captured.get().splitlines():
        print(line.rstrip(), file=console.file)
    console.file.flush()


def print_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    to: Console | None = None,
) -> None:
    """Print a table of figures to `to` (None: standard output): the first column to the left, the
    others to the right, and an empty line. No column is wrapped.
    """
    to = to or wide_console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if title:
        put(to, Text(title, "bold"))
    put(to, table)
    put(to, "")
