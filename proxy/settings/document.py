"""Reads YAML documents into plain values; reports every mistake with its place.

The code reads the parser's events instead of using PyYAML's constructor, for three reasons. The
constructor silently keeps the last of two equal keys, which is always a mistake in a configuration.
It follows YAML 1.1, in which `no` is a boolean and `22:30` a number; in the core schema of YAML 1.2
(section 10.3.2), used here, both are text. And it takes three times as long, which matters for a
directory of many thousand services.

Anchors, aliases and tags are rejected: these files do not need them, and an alias can expand a
kilobyte to a gigabyte.

Paths look like `services[3].ports[0].port`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import yaml

Plain: TypeAlias = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None

# More than a screenful does not help, and a wrong file often has ten thousand mistakes.
SHOWN = 50
# The deepest valid document has five levels. The limit protects the interpreter's stack from a
# hostile one.
DEEPEST = 32

_WORDS: Mapping[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INT = re.compile(r"[-+]?[0-9]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NUMERIC_START = frozenset("0123456789+-.")


class Mistakes:
    """The mistakes found in one document, each with its path; false if empty. Keeps `SHOWN`, counts
    the others.
    """

    def __init__(self) -> None:
        self._found: list[str] = []
        self._more = 0

    def add(self, path: str, message: str) -> None:
        if len(self._found) < SHOWN:
            self._found.append(f"{path}: {message}" if path else message)
        else:
            self._more += 1

    def __bool__(self) -> bool:
        return bool(self._found)

    def found(self) -> tuple[str, ...]:
        """One line per mistake, in the order of the document."""
        return (*self._found, f"and {self._more} more") if self._more else tuple(self._found)


class DocumentError(Exception):
    """The text is not a document of the expected kind. `.mistakes` has one line per mistake, with
    its path.
    """

    def __init__(self, source: str, mistakes: Iterable[str]) -> None:
        self.source = source
        self.mistakes = tuple(mistakes)
        super().__init__(f"{source}: " + "; ".join(self.mistakes))


def child(path: str, key: str) -> str:
    """The path of a key below `path`."""
    return f"{path}.{key}" if path else key


def closest(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` if a known word is similar, else ""."""
    near = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def describe(value: Plain) -> str:
    """A value as shown in a mistake: short, on one line."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case bool():
            return "true" if value else "false"
        case _:
            text = repr(value)
            return text if len(text) <= 60 else f"{text[:57]}..."


def mapping(value: Plain, path: str, mistakes: Mistakes) -> dict[str, Plain] | None:
    """`value` if it is a mapping; otherwise adds a mistake and returns None."""
    if isinstance(value, dict):
        return value
    mistakes.add(path, f"expected a mapping, found {describe(value)}")
    return None


def sequence(value: Plain, path: str, mistakes: Mistakes) -> list[Plain]:
    """`value` if it is a list, [] for None; otherwise adds a mistake and returns []."""
    if isinstance(value, list):
        return value
    if value is not None:
        mistakes.add(path, f"expected a list, found {describe(value)}")
    return []


def unknown_keys(
    value: Mapping[str, Plain], known: Iterable[str], path: str, mistakes: Mistakes
) -> None:
    """Add a mistake for every unknown key, with the most similar known key."""
    names = tuple(known)
    for key in value:
        if key not in names:
            mistakes.add(child(path, key), f"unknown key{closest(key, names)}")


def scalar(text: str) -> bool | int | float | str | None:
    """The value of a plain (unquoted) scalar in YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in _NUMERIC_START and len(text) < 40:
        if _INT.match(text):
            return int(text)
        if _HEX.match(text):
            return int(text, 16)
        if _FLOAT.match(text):
            return float(text)
    return text


def load(text: str, source: str) -> Plain:
    """The value of the one document in `text`; None if it is empty.

    Raises DocumentError for invalid YAML (with line and column), repeated keys, anchors, aliases
    and tags.
    """
    try:
        reader = _Reader(text)
        value = reader.document()
    except yaml.YAMLError as error:
        raise DocumentError(source, [_syntax(error)]) from error
    except UnicodeEncodeError as error:
        raise DocumentError(source, [f"not Unicode text at character {error.start}"]) from error
    if reader.mistakes:
        raise DocumentError(source, reader.mistakes.found())
    return value


def _syntax(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = " ".join(
        str(part)
        for part in (getattr(error, "context", None), getattr(error, "problem", None))
        if part
    )
    what = what or str(error).splitlines()[0]
    return (
        f"line {mark.line + 1}, column {mark.column + 1}: not YAML: {what}"
        if mark
        else f"not YAML: {what}"
    )


class _Reader:
    """Builds plain values from the parser's events. Uses libyaml if PyYAML has it, which is four
    times as fast.
    """

    def __init__(self, text: str) -> None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        self._next: Callable[[], Any] = loader.get_event
        self.mistakes = Mistakes()

    def document(self) -> Plain:
        self._next()  # the start of the stream
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value(self._next(), "", 0)
        self._next()  # the end of the document
        if not isinstance(event := self._next(), yaml.StreamEndEvent):
            self.mistakes.add(
                f"line {event.start_mark.line + 1}", "a second document in the same file"
            )
        return value

    def _value(self, event: Any, path: str, depth: int) -> Plain:
        kind = type(event)
        if kind is yaml.AliasEvent:
            self._refuse(event, path, "aliases (*name) are not supported: write the value out")
            return None
        if event.anchor is not None or (event.tag is not None and kind is not yaml.ScalarEvent):
            self._refuse(event, path, "anchors (&name) and tags (!name) are not supported")
        if kind is yaml.ScalarEvent:
            if event.tag is not None and event.tag != "!":
                self._refuse(event, path, "tags (!name) are not supported")
            # implicit[0]: the scalar has no quotes, so its form decides its type
            return scalar(event.value) if event.implicit[0] else str(event.value)
        if depth >= DEEPEST:
            raise yaml.MarkedYAMLError(
                None, None, f"nested more than {DEEPEST} levels deep", event.start_mark
            )
        return (
            self._list(path, depth + 1)
            if kind is yaml.SequenceStartEvent
            else self._dict(path, depth + 1)
        )

    def _list(self, path: str, depth: int) -> list[Plain]:
        values: list[Plain] = []
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            values.append(self._value(event, f"{path}[{len(values)}]", depth))
        return values

    def _dict(self, path: str, depth: int) -> dict[str, Plain]:
        values: dict[str, Plain] = {}
        while type(event := self._next()) is not yaml.MappingEndEvent:
            if type(event) is not yaml.ScalarEvent:
                raise yaml.MarkedYAMLError(
                    None, None, "a key must be a single word", event.start_mark
                )
            key = event.value
            if key in values:
                self._refuse(event, child(path, key), "the same key twice")
            values[key] = self._value(self._next(), f"{path}.{key}" if path else key, depth)
        return values

    def _refuse(self, event: Any, path: str, message: str) -> None:
        self.mistakes.add(path, f"{message} (line {event.start_mark.line + 1})")
