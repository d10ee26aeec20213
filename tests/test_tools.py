"""The developer tools agree with each other: the hooks of pre-commit are the linters of `make
lint`, and trio is limited to the minor version that the event loop was tested with."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def commands(text: str) -> dict[str, set[str]]:
    """Tool -> its options, of each command of .venv/bin or $(BIN) in `text`."""
    found: dict[str, set[str]] = {}
    for match in re.finditer(
        r"(?:\.venv/bin|\$\(BIN\))/([a-z0-9-]+)((?: .*)?)$", text, re.MULTILINE
    ):
        words = shlex.split(match[2])
        tool = " ".join([match[1], *words[:1]]) if match[1] == "ruff" else match[1]
        found[tool] = {word for word in words if word not in (".", "--check", "--force-exclude")}
    return found


def test_the_hooks_of_pre_commit_are_the_linters_of_make_lint() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    lint = makefile[makefile.index("\nlint:") :].split("\n\n")[0]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    hooks = "\n".join(hook["entry"] for hook in local["hooks"])
    assert len(commands(hooks)) == 4
    assert commands(hooks) == commands(lint)


def test_trio_stays_below_its_next_minor_version() -> None:
    """The event loop relies on the order of trio's calls, which trio does not document."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (trio,) = [line for line in project["dependencies"] if line.startswith("trio")]
    found = re.fullmatch(r"trio>=0\.(\d+),<0\.(\d+)", trio)
    assert found is not None
    lower, upper = found.groups()
    assert int(upper) == int(lower) + 1
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        assert re.findall(r"^trio==0\.(\d+)\.", lock.read_text("utf-8"), re.MULTILINE) == [lower]
