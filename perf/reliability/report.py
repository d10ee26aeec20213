"""The tables: on the terminal as they come, and in docs/reliability.md between its marks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
_MARKED = "<!-- {name}: written by `make soak` -->\n{text}<!-- end of {name} -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. `faults`: what did not hold, in words."""

    table: str
    name: str
    cells: tuple[str, ...]
    faults: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        return not self.faults

    def text(self) -> Text:
        """For the terminal."""
        mark = Text("ok  ", "green") if self.held else Text("FAIL", "bold red")
        text = Text.assemble(mark, f" {self.name:<16} {' | '.join(self.cells[1:])}")
        if self.faults:
            text.append(f"\n     {'; '.join(self.faults)}")
        if self.notes:
            notes = ", ".join(f"{name} {number}" for name, number in self.notes.items())
            text.append(f"\n     {notes}")
        return text


def table(head: tuple[str, ...], rows: Iterable[Row]) -> str:
    """A table in Markdown. Its last column says whether the row passed."""
    lines = [head, ("---",) * len(head)]
    lines += [
        (*row.cells, "passed" if row.held else f"failed: {'; '.join(row.faults)}") for row in rows
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(tables: Mapping[str, str]) -> None:
    """Replace what stands between the marks of each table in docs/reliability.md. Raises ValueError
    if a mark is missing."""
    document = DOCUMENT.read_text("utf-8")
    for name, text in tables.items():
        pattern = re.escape(_MARKED.format(name=name, text="\0")).replace("\0", ".*?")
        replacement = _MARKED.format(name=name, text=text).replace("\\", "\\\\")
        document, found = re.subn(pattern, replacement, document, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"docs/reliability.md has no place for the table {name}")
    DOCUMENT.write_text(document, "utf-8")
