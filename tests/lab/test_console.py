"""Output by rich: plain and stable where there is no terminal, coloured on one."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.rule import Rule
from rich.text import Text

from lab.console import WIDTH, console, print_table, put
from lab.report import Report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_plain_text_has_no_colours_and_no_spaces_at_the_end() -> None:
    out = io.StringIO()
    put(console(out), Text("held  ", "bold green"))
    put(console(out), "x" * 300)
    put(console(out), Rule("A", characters="-", align="left"))
    assert out.getvalue() == f"held\n{'x' * 300}\nA {'-' * (WIDTH - 2)}\n"


def test_what_looks_like_markup_is_printed_as_it_is() -> None:
    out = io.StringIO()
    put(console(out), "[bold]no[/] :smile: 127.0.0.1")
    assert out.getvalue() == "[bold]no[/] :smile: 127.0.0.1\n"


def test_a_terminal_gets_colours_unless_it_does_not_want_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = Terminal()
    put(console(out), Text("held", "green"))
    assert out.getvalue() == "\x1b[32mheld\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    put(console(out), Text("held", "green"))
    assert out.getvalue() == "held\n"


def test_a_table_aligns_figures_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["case", "us"], [["short", "1.5"], ["much longer", "100.25"]], title="Costs")
    assert capsys.readouterr().out == (
        "Costs\ncase             us\nshort           1.5\nmuch longer  100.25\n\n"
    )


def test_the_steps_of_the_demonstration_are_lines_in_plain_text() -> None:
    out = io.StringIO()
    report = Report(out=out)
    report.step("one")
    report.step("two")
    report.close()
    first, second = out.getvalue().splitlines()
    assert first.endswith(" s  one")
    assert second.endswith(" s  two")


def test_the_steps_of_the_demonstration_are_shown_with_their_time_on_a_terminal() -> None:
    out = Terminal()
    report = Report(out=out)
    report.step("one")
    report.step("two")
    report.section = "A section"
    report.prove("a proof", "it held", True)
    report.finish(1.0)
    report.close()
    text = out.getvalue()
    assert "✓ one 0:00:00" in "".join(Text.from_ansi(text).plain)
    assert "\x1b[32mok  \x1b[0m" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is shown again"


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_the_product_does_not_need_it(package: str) -> None:
    """The command line and the control plane start without what only the demonstration and perf
    use."""
    program = (
        f"import sys; sys.modules[{package!r}] = None; import proxy.cli, proxy.app, proxy.supervisor,"
        " control.command, control.app"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
