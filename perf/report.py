"""Tables and plots of a run (perf/__main__.py): for the terminal, and for docs/performance.md.

python -m perf.report RESULT.json            the tables, as Markdown
python -m perf.report RESULT.json FOLDER     and the plots, as SVG, into FOLDER
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perf.plot import bars

OURS = "isthmus"


def middle(values: Iterable[float]) -> float:
    return statistics.median(values)


def _of(document: dict[str, Any], work: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for each in document["samples"]:
        if each["work"] == work:
            found.setdefault(each["peer"], []).append(each)
    return found


def _hop(each: dict[str, Any]) -> float:
    """CPU of one hop: the average of the two."""
    return float(each["outbound"] + each["inbound"]) / 2


def rows(document: dict[str, Any], work: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of one work."""
    unit = next(each["unit"] for each in document["works"] if each["name"] == work)
    peers = _of(document, work)
    ours = middle(map(_hop, peers[OURS])) if OURS in peers else None
    facts = sorted(
        {name for samples in peers.values() for each in samples for name in each["facts"]}
    )
    quantiles = list(
        dict.fromkeys(
            name for samples in peers.values() for each in samples for name in each["latency"]
        )
    )
    head = [
        "proxy",
        f"CPU us per {unit} and hop",
        "(lowest - highest)",
        f"{OURS} takes",
        f"{'MiB' if unit == 'MiB' else unit + 's'}/s",
    ]
    head += [*(f"{name} us" for name in quantiles), "RSS MiB", *facts]
    lines = []
    for name, samples in peers.items():
        costs = [_hop(each) for each in samples]
        ratio = "" if ours is None or name == OURS else f"{ours / middle(costs):.2f} x"
        lines.append(
            [
                name,
                f"{middle(costs):.0f}",
                f"({min(costs):.0f} - {max(costs):.0f})",
                ratio,
                f"{middle(each['rate'] for each in samples):.0f}",
                *(
                    f"{middle(each['latency'].get(quantile, 0) for each in samples):.0f}"
                    for quantile in quantiles
                ),
                f"{middle(each['resident_kib'] for each in samples) / 1024:.0f}",
                *(
                    f"{middle(each['facts'].get(fact, 0) for each in samples):.1f}"
                    for fact in facts
                ),
            ]
        )
    return head, lines


def table(document: dict[str, Any], names: list[str]) -> str:
    """The tables for the terminal."""
    parts = []
    for work in document["works"]:
        if work["name"] in names:
            head, lines = rows(document, work["name"])
            widths = [
                max(len(line[column]) for line in [head, *lines]) for column in range(len(head))
            ]
            text = [f"{work['title']} ({work['name']})"]
            text += [
                "  "
                + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
                for line in [head, *lines]
            ]
            parts.append("\n".join(text) + "\n")
    return "\n".join(parts)


def markdown(document: dict[str, Any]) -> str:
    parts = []
    for work in document["works"]:
        if not _of(document, work["name"]):
            continue
        head, lines = rows(document, work["name"])
        body = [f"| {' | '.join(line)} |" for line in lines]
        rule = " | ".join(["---"] + ["---:"] * (len(head) - 1))
        parts.append(
            "\n".join(
                [f"#### {work['title']}", "", f"| {' | '.join(head)} |", f"| {rule} |", *body, ""]
            )
        )
    facts = "\n".join(f"- {name}: {value}" for name, value in document["machine"].items())
    return (
        f"{facts}\n- rounds: {document['rounds']} of {document['seconds']:g} s, interleaved\n\n"
        + "\n".join(parts)
    )


PLOTS = {
    "cpu-http1": (
        "CPU per request and hop, HTTP/1.1 (us)",
        ("c1-1k", "c16-1k", "c256-1k", "c16-100", "c16-16k"),
    ),
    "cpu-http2": ("CPU per request and hop, HTTP/2 (us)", ("h2-16x8",)),
    "cpu-bulk": ("CPU per MiB and hop (us)", ("h2-bulk", "tcp-bulk")),
    "cpu-connections": ("CPU per new connection and hop (us)", ("new-resumed", "new-full")),
}


def plots(document: dict[str, Any], folder: Path) -> None:
    titles = {work["name"]: work["title"] for work in document["works"]}
    for name, (title, works) in PLOTS.items():
        groups = {}
        for work in works:
            if found := _of(document, work):
                groups[titles[work]] = {
                    peer: middle(map(_hop, samples)) for peer, samples in found.items()
                }
        if groups:
            (folder / f"{name}.svg").write_text(bars(title, groups), "utf-8")


def main() -> None:
    document = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    print(markdown(document))
    if len(sys.argv) > 2:
        plots(document, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
