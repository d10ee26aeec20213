"""Verdicts have colours on a terminal, and only there."""

from __future__ import annotations

import io
import sys

import pytest

from proxy.commands.terminal import verdict


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_a_file_gets_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict("FAILED", 8) == "FAILED  "


def test_a_terminal_gets_the_word_in_its_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    assert verdict("FAILED", 8) == "\x1b[31mFAILED\x1b[0m  "
    assert verdict("ok", 2) == "\x1b[32mok\x1b[0m"
    assert verdict("skipped", 8) == "skipped "


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_the_user_can_switch_colours_off(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    assert verdict("WARNING", 7) == "WARNING"
