"""How settings are declared: as the annotated fields of frozen structs.

The annotation of a field is the only source of its meaning. `Annotated[float, seconds(0.1, 60,
"...")]` has the unit, the limits and the description. decode.py checks values by it, and
reference.py makes the JSON schema and the tables of the documents from it, so they always agree.
The default is the field's.
"""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

import msgspec


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A group of settings."""


def seconds(low: float, high: float, text: str) -> msgspec.Meta:
    """A duration in seconds, written "10s", "500ms", "1h"; 0 needs no unit."""
    return msgspec.Meta(ge=low, le=high, description=text, extra={"unit": "duration"})


def octets(low: int, high: int, text: str) -> msgspec.Meta:
    """A size in bytes, written "64KiB", "1MiB", or as a plain number of bytes."""
    return msgspec.Meta(ge=low, le=high, description=text, extra={"unit": "size"})


def number(low: int, high: int, text: str, unit: str = "number") -> msgspec.Meta:
    """A whole number. `unit`: what it counts, for the documentation."""
    return msgspec.Meta(ge=low, le=high, description=text, extra={"unit": unit})


def ratio(low: float, high: float, text: str) -> msgspec.Meta:
    """A number that may have a fraction."""
    return msgspec.Meta(ge=low, le=high, description=text, extra={"unit": "ratio"})


def described(text: str, most: int | None = None) -> msgspec.Meta:
    """A setting's description. `most`: the maximum number of elements (list, mapping) or characters
    (text).
    """
    return msgspec.Meta(description=text, extra={"most": most} if most else {})


@dataclass(frozen=True, slots=True)
class Shape:
    """The parts of a field's annotation: the bare type, whether None is allowed, and the limits."""

    type: Any
    optional: bool
    meta: msgspec.Meta

    @property
    def unit(self) -> str | None:
        return (self.meta.extra or {}).get("unit")

    @property
    def most(self) -> int | None:
        return (self.meta.extra or {}).get("most")


def shape(annotation: Any) -> Shape:
    """Remove `Annotated` and `| None` from an annotation."""
    meta, optional = msgspec.Meta(), False
    while True:
        if get_origin(annotation) is typing.Annotated:
            annotation, *notes = get_args(annotation)
            meta = next(note for note in notes if isinstance(note, msgspec.Meta))
        elif get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(
            annotation
        ):
            optional = True
            # `X | Y` cannot be written for the parts of a tuple
            annotation = Union[  # noqa: UP007
                tuple(part for part in get_args(annotation) if part is not type(None))
            ]
        else:
            return Shape(annotation, optional, meta)


def is_struct(kind: Any) -> bool:
    """Whether a type is a section or a part of one."""
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


@functools.cache  # a directory may have ten thousand policies
def fields(struct: type[msgspec.Struct]) -> tuple[tuple[str, Any, Shape], ...]:
    """(name, default, shape) of every field. The default is msgspec.NODEFAULT for required
    fields."""
    hints = typing.get_type_hints(struct, include_extras=True)
    found = []
    for info in msgspec.structs.fields(struct):
        default = (
            info.default if info.default_factory is msgspec.NODEFAULT else info.default_factory()
        )
        found.append((info.name, default, shape(hints[info.name])))
    return tuple(found)
