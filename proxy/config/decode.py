"""Typed settings: decodes plain values into frozen structs, with all mistakes, and describes the
structs.

msgspec's own conversion stops at the first mistake. A user who fixes a file wants all of them. So
the walk here goes through structs and fields, records every mistake with its path, and lets msgspec
build the structs if there are none.

The type of a field is the only source of its meaning: `Annotated[float, seconds(0.1, 60, "...")]`
has unit, limits and description. The checks, the JSON schema and the tables in the documentation
are made from it, so they always agree.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from proxy.config.document import Mistakes, Plain, child, describe, mapping, unknown_keys
from proxy.config.units import (
    LEAVES,
    parse_duration,
    parse_port,
    parse_size,
    show_duration,
    show_size,
)


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


def decode(value: Plain, struct: type[msgspec.Struct], path: str, mistakes: Mistakes) -> Any:
    """Decode a mapping into a `struct`. Returns None, after adding at least one mistake, if
    something is wrong.
    """
    given = mapping({} if value is None else value, path, mistakes)
    if given is None:
        return None
    found: dict[str, object] = {}
    known = fields(struct)
    unknown_keys(given, (name for name, _, _ in known), path, mistakes)
    for name, default, form in known:
        if name in given:
            found[name] = _decode(given[name], form, child(path, name), mistakes)
        elif default is msgspec.NODEFAULT:
            mistakes.add(child(path, name), "must be given")
    return None if mistakes else struct(**found)


def _decode(value: Plain, form: Shape, path: str, mistakes: Mistakes) -> object:
    if value is None and form.optional:
        return None
    if is_struct(form.type):
        return decode(value, form.type, path, mistakes)
    if get_origin(form.type) is tuple:
        return _decode_list(value, form, path, mistakes)
    if get_origin(form.type) is dict:
        return _decode_ports(value, form, path, mistakes)
    try:
        return leaf(value, form)
    except ValueError as error:
        mistakes.add(path, str(error))
        return None


def _decode_list(value: Plain, form: Shape, path: str, mistakes: Mistakes) -> object:
    if not isinstance(value, list):
        mistakes.add(path, f"expected a list, found {describe(value)}")
        return ()
    if form.most is not None and len(value) > form.most:
        mistakes.add(path, f"at most {form.most} elements, found {len(value)}")
    element = shape(get_args(form.type)[0])
    return tuple(
        _decode(item, element, f"{path}[{index}]", mistakes) for index, item in enumerate(value)
    )


def _decode_ports(value: Plain, form: Shape, path: str, mistakes: Mistakes) -> object:
    given = mapping(value, path, mistakes) or {}
    if form.most is not None and len(given) > form.most:
        mistakes.add(path, f"at most {form.most} ports, found {len(given)}")
    element = shape(get_args(form.type)[1])
    found: dict[int, object] = {}
    for key, item in given.items():
        try:
            found[parse_port(key)] = _decode(item, element, child(path, key), mistakes)
        except ValueError as error:
            mistakes.add(child(path, key), str(error))
    return found


def leaf(value: Plain, form: Shape) -> object:
    """Decode one value. Raises ValueError with the expected form, the value found, and the
    limits."""
    if get_origin(form.type) is Literal:
        if value in (choices := get_args(form.type)) and isinstance(value, str):
            return value
        raise ValueError(f"expected one of {', '.join(choices)}; found {describe(value)}")
    if form.type in LEAVES:
        result = LEAVES[form.type][0](value)
        if isinstance(result, str) and len(result) > (form.most or 253):
            raise ValueError(f"at most {form.most or 253} characters, found {len(result)}")
        return result
    if form.type is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"expected true or false, found {describe(value)}")
    return _bounded(value, form)


def _bounded(value: Plain, form: Shape) -> float:
    amount: float
    if form.unit == "duration":
        amount = parse_duration(value)
    elif form.unit == "size":
        amount = parse_size(value)
    elif form.unit == "ratio":
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise ValueError(f"expected a number such as 0.2, found {describe(value)}")
        amount = float(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        amount = value
    else:
        raise ValueError(f"expected a whole number, found {describe(value)}")
    low, high = form.meta.ge, form.meta.le
    if (low is not None and amount < low) or (high is not None and amount > high):
        raise ValueError(f"must be {limits(form)}, found {describe(value)}")
    return amount


def show(value: object, form: Shape) -> str:
    """A value in the file's notation."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case tuple() if get_origin(form.type) is tuple:
            return (
                "[" + ", ".join(show(item, shape(get_args(form.type)[0])) for item in value) + "]"
            )
        case dict():
            return "{}"
        case int() | float() if form.unit == "duration":
            return show_duration(value)
        case int() if form.unit == "size":
            return show_size(value)
        case int() | float() if form.unit == "ratio":
            return f"{value:g}"
    return LEAVES[form.type][2](value) if form.type in LEAVES else str(value)


def limits(form: Shape) -> str:
    """The limits of a setting as text; "" if only its type limits it."""
    if form.meta.ge is not None and form.meta.le is not None:
        return f"from {show(form.meta.ge, form)} to {show(form.meta.le, form)}"
    if get_origin(form.type) is Literal:
        return ", ".join(get_args(form.type))
    return f"at most {form.most}" if form.most else ""


def kind(form: Shape) -> str:
    """The unit or kind of a setting as text."""
    if get_origin(form.type) is tuple:
        return f"list of {kind(shape(get_args(form.type)[0]))}"
    if get_origin(form.type) is dict:
        return f"port: {kind(shape(get_args(form.type)[1]))}"
    if get_origin(form.type) is Literal:
        return "word"
    if form.type in LEAVES:
        return LEAVES[form.type][1]
    return "true or false" if form.type is bool else form.unit or "number"
