"""The tables of docs/reliability.md: new tables replace those between the marks, and a row reports
what did not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.reliability import __main__ as program
from perf.reliability import report
from perf.reliability.report import Row, table, write

MARKED = "before\n<!-- floods: written by `make soak` -->\nold\n<!-- end of floods -->\nbehind\n"


def test_a_table_replaces_the_text_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "reliability.md"
    document.write_text(MARKED)
    monkeypatch.setattr(report, "DOCUMENT", document)
    write({"floods": "| a \\1 |\n"})
    assert document.read_text() == MARKED.replace("old\n", "| a \\1 |\n")


def test_a_table_without_a_place_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "reliability.md"
    document.write_text(MARKED)
    monkeypatch.setattr(report, "DOCUMENT", document)
    with pytest.raises(ValueError, match="faults"):
        write({"faults": "| a |\n"})
    assert document.read_text() == MARKED


def test_the_document_has_a_place_for_each_table() -> None:
    text = report.DOCUMENT.read_text("utf-8")
    for name in ("machine", "floods", "faults"):
        assert text.count(f"<!-- {name}: written by `make soak` -->\n") == 1
        assert text.count(f"<!-- end of {name} -->") == 1


def test_a_row_says_whether_it_held() -> None:
    good, bad = (
        Row("floods", "a", ("title", "1")),
        Row("floods", "b", ("other", "2"), ("too slow", "killed")),
    )
    assert good.held
    assert not bad.held
    lines = table(("flood", "n", ""), [good, bad]).splitlines()
    assert lines == [
        "| flood | n |  |",
        "| --- | --- | --- |",
        "| title | 1 | passed |",
        "| other | 2 | failed: too slow; killed |",
    ]
    assert bad.text().plain.startswith("FAIL b")
    assert "too slow; killed" in bad.text().plain


def test_a_half_can_be_measured_and_written_alone() -> None:
    assert program.chosen("faults") == program.FAULTS
    assert program.chosen("") == program.FLOODS | program.FAULTS
    assert program.chosen("faults,churn") == program.FAULTS | {"churn"}
    rows = [Row("faults", name, (name, "rule", "measured")) for name in sorted(program.FAULTS)]
    assert list(program.texts(rows)) == ["faults"]
    assert program.texts(rows[1:]) == {}
    assert list(program.texts([*rows, Row("floods", "churn", ("churn",))])) == ["faults"]


@pytest.mark.parametrize(
    "wrong", [["--only", "flods"], ["--only", "churn,sidecar-killed", "--write"]]
)
def test_a_wrong_name_and_a_part_that_cannot_be_written_are_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(wrong)
    assert (
        "flods" if "flods" in wrong else "--write needs a whole table"
    ) in capsys.readouterr().err
