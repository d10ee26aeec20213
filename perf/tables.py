"""The tables of a run (perf/__main__.py): for the terminal, and for docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.console import Console

from lab.console import print_table

OURS = "isthmus"


class Range(NamedTuple):
    """The figures of some rounds."""

    lowest: float
    middle: float  # the median
    highest: float


def middle(values: Iterable[float]) -> float:
    return statistics.median(values)


def costs(document: dict[str, Any], work: str) -> dict[str, Range]:
    """The CPU time of one hop in microseconds, by peer."""
    found = {}
    for peer, samples in _of(document, work).items():
        hops = [_hop(each) for each in samples]
        found[peer] = Range(min(hops), middle(hops), max(hops))
    return found


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
    peers, ranges = _of(document, work), costs(document, work)
    ours = ranges[OURS].middle if OURS in peers else None
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
        cost = ranges[name]
        ratio = "" if ours is None or name == OURS else f"{ours / cost.middle:.2f} x"
        lines.append(
            [
                name,
                f"{cost.middle:.0f}",
                f"({cost.lowest:.0f} - {cost.highest:.0f})",
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


def show(document: dict[str, Any], names: list[str], to: Console) -> None:
    """Print the tables of these works."""
    for work in document["works"]:
        if work["name"] in names:
            head, lines = rows(document, work["name"])
            print_table(head, lines, title=f"{work['title']} ({work['name']})", to=to)


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
