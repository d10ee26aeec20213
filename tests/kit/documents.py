"""Tables in the documents."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def table(document: str, what: str) -> list[list[str]]:
    """The rows of the table between the marks `what`, without its head and without backquotes."""
    text = (ROOT / "docs" / document).read_text("utf-8")
    inner = text.split(f"<!-- {what} -->")[1].split(f"<!-- /{what} -->")[0].strip()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inner.splitlines()]
    return [[cell.strip("`") for cell in row] for row in rows[2:]]
