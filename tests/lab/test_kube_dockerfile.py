"""Dockerfiles are read as Docker reads them, and unknown syntax is refused: an image is never built
with a step left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.kube import dockerfile
from lab.kube.dockerfile import Copy, DockerfileError, Ignore, Step

ROOT = Path(__file__).parent.parent.parent
FILES = sorted([ROOT / "Dockerfile", *(ROOT / "lab" / "kube" / "docker").rglob("*Dockerfile")])


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_own_files_are_understood(file: Path) -> None:
    for stage in dockerfile.stages(file.read_text()):
        for step in stage.steps:
            if step.name == "COPY":
                assert dockerfile.copied(step).sources
            elif step.name in ("ENTRYPOINT", "CMD", "RUN"):
                assert dockerfile.arguments(step)
            elif step.name in ("ENV", "LABEL"):
                assert dockerfile.pairs(step, {"PATH": "/bin"})


def test_every_line_of_the_image_belongs_to_a_step() -> None:
    """All words of the file outside of comments are in a step, in the same order."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("#")]
    expected = " ".join(lines).replace("\\", " ").split()
    assert [
        word for step in dockerfile.steps(text) for word in (step.name, *step.text.split())
    ] == expected


def test_the_image_has_two_stages_of_one_pinned_base() -> None:
    stages = dockerfile.stages((ROOT / "Dockerfile").read_text())
    assert [stage.name for stage in stages] == ["build", None]
    assert len({stage.base for stage in stages}) == 1
    assert stages[0].base.startswith("python:3.13-slim-trixie@sha256:")


def test_a_comment_within_an_instruction_is_not_part_of_it() -> None:
    text = "FROM a\nRUN one \\\n    # why\n\n    && two\nCMD x\n"
    assert list(dockerfile.steps(text)) == [
        Step("FROM", "a", 1),
        Step("RUN", "one && two", 2),
        Step("CMD", "x", 6),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("FROM a\nADD x y", 2),
        ("FROM a\nHEALTHCHECK NONE", 2),
        ('FROM a\n\nSHELL ["bash"]', 3),
        ("FROM --platform=linux/amd64 a", 1),
        ("FROM ${NOWHERE}", 1),
        ("RUN x", 1),
        ("FROM a\nARG x=1", 2),
        ("FROM a\nRUN x \\", 2),
    ],
)
def test_unknown_instructions_are_refused_with_their_line(text: str, line: int) -> None:
    with pytest.raises(DockerfileError, match=f"line {line}: "):
        dockerfile.stages(text)


def test_a_file_without_from_is_refused() -> None:
    with pytest.raises(DockerfileError, match="no FROM"):
        dockerfile.stages("# nothing\n")


@pytest.mark.parametrize("text", ["--chown=1:1 a b", "a", "*.py b", "$HOME/a b"])
def test_a_copy_that_would_mean_something_else_is_refused(text: str) -> None:
    with pytest.raises(DockerfileError, match="line 7: COPY"):
        dockerfile.copied(Step("COPY", text, 7))


def test_copies() -> None:
    assert dockerfile.copied(Step("COPY", "a b/c d/", 1)) == Copy(("a", "b/c"), "d/", None)
    assert dockerfile.copied(Step("COPY", "--from=build /a /b", 1)) == Copy(("/a",), "/b", "build")


def test_arguments_replace_the_defaults() -> None:
    text = "ARG BASE=one\nFROM ${BASE}:x AS first\nFROM first\n"
    assert [stage.base for stage in dockerfile.stages(text)] == ["one:x", "first"]
    assert [stage.base for stage in dockerfile.stages(text, {"BASE": "two"})] == ["two:x", "first"]


def test_the_shell_form_calls_the_shell_and_the_list_does_not() -> None:
    assert dockerfile.arguments(Step("RUN", "a && b", 1)) == ["/bin/sh", "-c", "a && b"]
    assert dockerfile.arguments(Step("CMD", '["a", "b c"]', 1)) == ["a", "b c"]
    with pytest.raises(DockerfileError, match="line 3"):
        dockerfile.arguments(Step("CMD", "[a]", 3))


def test_variables_are_those_set_before() -> None:
    step = Step("ENV", 'PATH=/opt/bin:$PATH A="x y"', 1)
    assert dockerfile.pairs(step, {"PATH": "/bin"}) == {"PATH": "/opt/bin:/bin", "A": "x y"}


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("README.md", False),
        ("proxy", False),
        ("proxy/net/tls.py", False),
        ("proxy/__pycache__", True),
        ("proxy/net/__pycache__/tls.cpython-313.pyc", True),
        ("tests/conftest.py", True),
        ("requirements", True),
        ("requirements/run.txt", False),
        ("requirements/dev.txt", True),
        ("scripts/aws-lc", False),
        ("scripts/pin-base", True),
        (".git/config", True),
    ],
)
def test_our_ignore_file_keeps_the_files_of_the_image(path: str, out: bool) -> None:
    assert Ignore((ROOT / ".dockerignore").read_text())(path) is out


@given(st.lists(st.sampled_from(["a", "b.py", "c"]), min_size=1, max_size=4).map("/".join))
def test_the_last_pattern_that_matches_decides(path: str) -> None:
    assert Ignore("*\n")(path)
    assert not Ignore("*\n!*\n")(path)
    assert Ignore("**/b.py\n")(path) is ("b.py" in path.split("/"))
    assert Ignore("a/?\n")(path) is path.startswith(("a/a", "a/c"))
