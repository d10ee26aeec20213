"""The developer tools agree with each other: the hooks of pre-commit are the linters of `make
lint`, and trio is limited to the minor version that the event loop was tested with."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
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
        tool = " ".join([match[1], *words[:1]]) if match[1] in ("ruff", "python") else match[1]
        found[tool] = {word for word in words if word not in (".", "--check", "--force-exclude")}
    return found


def test_the_hooks_of_pre_commit_are_the_linters_of_make_lint() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    lint = makefile[makefile.index("\nlint:") :].split("\n\n")[0]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    hooks = "\n".join(hook["entry"] for hook in local["hooks"])
    assert len(commands(hooks)) == 4
    assert commands(hooks) == commands(lint)


ASYNC = """\
import subprocess
import trio


async def f() -> None:
    with trio.move_on_after(1):
        pass
    trio.sleep(1)
    subprocess.run(["true"])
    while True:
        await trio.sleep(0)
    try:
        await trio.sleep(1)
    finally:
        await trio.sleep(1)  %s


async def g():
    async with trio.open_nursery():
        yield
"""


def flake8_async(*command: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command, "bad.py", "waived.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return done.stdout.splitlines()


def test_our_way_to_run_flake8_async_finds_what_its_command_finds(tmp_path: Path) -> None:
    """Also when it remembers files without a finding, and one of them changes."""
    script = ROOT / "scripts" / "flake8-async"
    found = re.search(r"^RULES = (.*)$", script.read_text(), re.MULTILINE)
    assert found is not None
    rules: list[str] = ast.literal_eval(found[1])
    (tmp_path / "bad.py").write_text(ASYNC % "")
    (tmp_path / "waived.py").write_text("async def f() -> None: ...\n")
    first = flake8_async(str(script), folder=tmp_path)
    (tmp_path / "waived.py").write_text(ASYNC % "# noqa: ASYNC102")
    second = flake8_async(str(script), folder=tmp_path)
    assert second == flake8_async("-m", "flake8_async", *rules, folder=tmp_path)
    codes = [line.split()[1] for line in first]
    assert {"ASYNC100", "ASYNC101", "ASYNC102", "ASYNC105"} <= set(codes)
    assert [line.split()[1] for line in second] == [
        *codes,
        *(code for code in codes if code != "ASYNC102"),
    ]


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
