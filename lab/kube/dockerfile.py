"""Dockerfiles and ignore files, read: text in, steps out. Pure; images.py runs the steps.

The part of the language that this project's Dockerfiles use:
https://docs.docker.com/reference/dockerfile/. An instruction or an option that is not known here is
an error that names its line, so an image is never built with a step left out.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

INSTRUCTIONS = (
    "FROM",
    "ARG",
    "ENV",
    "WORKDIR",
    "RUN",
    "COPY",
    "LABEL",
    "USER",
    "EXPOSE",
    "STOPSIGNAL",
    "ENTRYPOINT",
    "CMD",
)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class DockerfileError(Exception):
    """A Dockerfile that is not understood. The message has the line's number."""


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction: its name in capitals, what follows it with continuation lines joined, and
    the number of its first line."""

    name: str
    text: str
    line: int


@dataclass(slots=True)
class Stage:
    """What follows one FROM. `base` has its variables replaced; `name` is that of AS, or None."""

    base: str
    name: str | None
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Copy:
    """COPY: `sources` into `target`, of the build's context, or of the stage `stage`."""

    sources: tuple[str, ...]
    target: str
    stage: str | None


def steps(text: str) -> Iterator[Step]:
    """The instructions of a Dockerfile. Raises DockerfileError for one that is not known."""
    pending, first = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):  # also between the lines of one instruction
            continue
        first = first if pending else number
        if line.endswith("\\"):
            pending += line[:-1].rstrip() + " "
            continue
        name, _, rest = (pending + line).partition(" ")
        pending = ""
        if name.upper() not in INSTRUCTIONS:
            raise DockerfileError(f"line {first}: {name} is not supported here")
        yield Step(name.upper(), rest.strip(), first)
    if pending:
        raise DockerfileError(f"line {first}: the last line continues")


def stages(text: str, arguments: Mapping[str, str] | None = None) -> list[Stage]:
    """The stages of a Dockerfile, the last one being the image. `arguments` replace the defaults of
    ARG. Raises DockerfileError."""
    found: list[Stage] = []
    values: dict[str, str] = {}
    for step in steps(text):
        if step.name == "FROM":
            match = re.fullmatch(r"(\S+)(?: [Aa][Ss] (\S+))?", step.text)
            if match is None:
                raise DockerfileError(f"line {step.line}: FROM {step.text} is not supported here")
            found.append(Stage(expand(match[1], values, step), match[2]))
        elif step.name == "ARG":
            if found:
                raise DockerfileError(f"line {step.line}: ARG within a stage is not supported here")
            name, _, default = step.text.partition("=")
            values[name] = (arguments or {}).get(name, default)
        elif not found:
            raise DockerfileError(f"line {step.line}: {step.name} before the first FROM")
        else:
            found[-1].steps.append(step)
    if not found:
        raise DockerfileError("there is no FROM")
    return found


def expand(text: str, values: Mapping[str, str], step: Step) -> str:
    """`$NAME` and `${NAME}` replaced. Raises DockerfileError for a variable without a value."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise DockerfileError(f"line {step.line}: {name} has no value")
        return values[name]

    return _VARIABLE.sub(value, text)


def pairs(step: Step, values: Mapping[str, str]) -> dict[str, str]:
    """The NAME=VALUE pairs of ENV and LABEL."""
    found = {}
    for word in shlex.split(step.text):
        name, equals, value = word.partition("=")
        if not equals:
            raise DockerfileError(f"line {step.line}: {step.name} needs NAME=VALUE, not {word}")
        found[name] = expand(value, values, step)
    return found


def copied(step: Step) -> Copy:
    """What a COPY asks for."""
    words = shlex.split(step.text)
    stage = None
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        if name != "--from":
            raise DockerfileError(f"line {step.line}: COPY {name} is not supported here")
        stage = value
    if len(words) < 2:
        raise DockerfileError(f"line {step.line}: COPY needs a source and a target")
    if any(character in word for word in words for character in "*?[$"):
        raise DockerfileError(
            f"line {step.line}: COPY with patterns or variables is not supported here"
        )
    return Copy(tuple(words[:-1]), words[-1], stage)


def arguments(step: Step) -> list[str]:
    """The list of ENTRYPOINT, CMD or RUN: of its JSON form as it is, of its shell form a call of
    the shell."""
    if step.text.startswith("["):
        try:
            words = json.loads(step.text)
        except ValueError as error:
            raise DockerfileError(f"line {step.line}: {step.name}: {error}") from error
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DockerfileError(f"line {step.line}: {step.name} needs a list of texts")
        return words
    return ["/bin/sh", "-c", step.text]


class Ignore:
    """A .dockerignore: which paths of the context, relative to it, do not go to the build. The last
    pattern that matches decides."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        for raw in text.splitlines():
            line = raw.strip()
            if line and not line.startswith("#"):
                self._rules.append(
                    (
                        not line.startswith("!"),
                        re.compile(_pattern(line.removeprefix("!").strip("/"))),
                    )
                )

    def __call__(self, path: str) -> bool:
        """Whether `path` is left out. A pattern that matches a directory matches all in it."""
        out = False
        for leaves_out, pattern in self._rules:
            if pattern.match(path):
                out = leaves_out
        return out


def _pattern(text: str) -> str:
    parts: Sequence[str] = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    translated = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(translated.get(part, re.escape(part)) for part in parts) + r"(?:/|\Z)"
