"""Decodes plain values into frozen structs, with all mistakes.

msgspec's own conversion stops at the first mistake. A user who fixes a file wants all of them. So
the walk here goes through structs and fields (declare.py), records every mistake with its path, and
lets msgspec build the structs if there are none.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar, get_args, get_origin

import msgspec

from proxy.settings.declare import Shape, fields, is_struct, shape
from proxy.settings.document import Mistakes, Plain, child, describe, mapping, unknown_keys
from proxy.settings.units import (
    LEAVES,
    parse_duration,
    parse_port,
    parse_size,
    show_duration,
    show_size,
)

S = TypeVar("S", bound=msgspec.Struct)


def decode(value: Plain, struct: type[S], path: str, mistakes: Mistakes) -> S | None:
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
