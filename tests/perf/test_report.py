"""The tables and plots of a run: medians, ranges and ratios are those of its samples, and a plot
shows the figures of the table."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from lab.console import wide_console
from perf import report
from perf.plot import bars
from perf.tables import Range, costs, markdown, rows, show

SVG = "{http://www.w3.org/2000/svg}"


def sample(peer: str, work: str, cost: float, rate: float = 1000.0) -> dict[str, Any]:
    """`cost`: of one hop. The two hops of a sample differ."""
    return {
        "work": work,
        "peer": peer,
        "outbound": cost - 5,
        "inbound": cost + 5,
        "rate": rate,
        "resident_kib": 60 * 1024,
        "latency": {"p50": 90.0, "p99": 200.0} if work == "c1-1k" else {},
        "facts": {},
    }


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "machine": {"cpu": "one of them"},
        "rounds": 3,
        "seconds": 2.0,
        "left_out": [],
        "works": [
            {"name": "c1-1k", "title": "one connection", "unit": "request", "kind": "http1"},
            {"name": "tcp-bulk", "title": "bulk", "unit": "MiB", "kind": "tcp"},
            {"name": "idle", "title": "not measured", "unit": "request", "kind": "http1"},
        ],
        "samples": [
            *(sample("isthmus", "c1-1k", cost) for cost in (40, 30, 32)),
            *(sample("envoy", "c1-1k", cost) for cost in (64, 60, 65)),
            *(sample("isthmus", "tcp-bulk", cost) for cost in (700,)),
        ],
    }


def test_costs_are_the_median_and_the_range_of_the_rounds(document: dict[str, Any]) -> None:
    assert costs(document, "c1-1k") == {"isthmus": Range(30, 32, 40), "envoy": Range(60, 64, 65)}
    assert costs(document, "idle") == {}


def test_a_row_has_the_range_and_the_ratio(document: dict[str, Any]) -> None:
    head, lines = rows(document, "c1-1k")
    assert head == [
        "proxy",
        "CPU us per request and hop",
        "(lowest - highest)",
        "isthmus takes",
        "requests/s",
        "p50 us",
        "p99 us",
        "RSS MiB",
    ]
    assert lines == [
        ["isthmus", "32", "(30 - 40)", "", "1000", "90", "200", "60"],
        ["envoy", "64", "(60 - 65)", "0.50 x", "1000", "90", "200", "60"],
    ]


def test_the_markdown_has_each_measured_work_as_a_table(document: dict[str, Any]) -> None:
    text = markdown(document)
    assert text.startswith("- cpu: one of them\n- rounds: 3 of 2 s, interleaved\n")
    assert "#### one connection\n\n| proxy | CPU us per request and hop |" in text
    assert "\n| envoy | 64 | (60 - 65) | 0.50 x | 1000 | 90 | 200 | 60 |\n" in text
    assert "| isthmus | 700 | (700 - 700) |  | 1000 | 60 |" in text
    assert "not measured" not in text


def test_the_table_outside_a_terminal_is_plain(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    show(document, ["c1-1k"], wide_console())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one connection (c1-1k)"
    assert [line.split()[0] for line in lines[1:4]] == ["proxy", "isthmus", "envoy"]
    assert len({len(line) for line in lines[1:4]}) == 1, "the last column is right-aligned"
    assert lines[4:] == [""]
    assert "\x1b" not in "".join(lines)


def words(picture: ET.Element) -> str:
    return picture.findtext(f"{SVG}desc") or ""


def test_a_plot_has_each_bar_with_its_value_and_range() -> None:
    groups = {"a & b": {"isthmus": Range(30, 32, 40), "other": Range(60, 64, 65)}}
    text = bars("CPU <µs>", groups)
    picture = ET.fromstring(text)  # noqa: S314  # written by this test
    assert picture.tag == f"{SVG}svg"
    assert picture.findtext(f"{SVG}title") == "CPU <µs>"
    assert words(picture) == "a & b: isthmus 32 (30 to 40), other 64 (60 to 65)"
    shown = [element.text for element in picture.iter(f"{SVG}text")]
    for expected in ("CPU <µs>", "a & b", "isthmus", "other", "32", "64"):
        assert expected in shown, shown


def test_equal_figures_make_an_equal_file() -> None:
    groups = {"a": {"isthmus": Range(30, 32, 40)}}
    assert bars("CPU", groups) == bars("CPU", groups)
    assert bars("CPU", groups) != bars("CPU", {"a": {"isthmus": Range(30, 32, 41)}})


def test_the_report_writes_the_plots_of_what_was_measured(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, folder = tmp_path / "result.json", tmp_path / "images"
    result.write_text(json.dumps(document))
    folder.mkdir()
    report.main([str(result)])
    assert capsys.readouterr().out == markdown(document) + "\n"
    assert list(folder.iterdir()) == []
    report.main([str(result), str(folder)])
    assert {path.name for path in folder.iterdir()} == {"cpu-http1.svg", "cpu-bulk.svg"}
    picture = ET.fromstring((folder / "cpu-bulk.svg").read_text("utf-8"))  # noqa: S314  # written by this test
    assert words(picture) == "bulk: isthmus 700 (700 to 700)"
