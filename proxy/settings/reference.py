"""Describes the configuration from its types: as a JSON schema for editors and checks, and as
Markdown tables.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin

import msgspec

from proxy.settings.declare import Shape, fields, is_struct, shape
from proxy.settings.decode import kind, limits, show
from proxy.settings.units import LEAVES, GrpcCode, PortSwitch, StatusRange


def schema(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema (2020-12) of a struct as written in the file: durations, sizes and addresses
    are text.
    """
    properties = {}
    required = []
    for name, default, form in fields(struct):
        node = _node(form)
        if default is msgspec.NODEFAULT:
            required.append(name)
        elif not is_struct(form.type):
            node["default"] = _written(default, form)
        properties[name] = node
    found: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    if required:
        found["required"] = required
    if struct.__doc__:
        found["description"] = inspect.getdoc(struct)
    return found


def _written(default: object, form: Shape) -> Any:
    if isinstance(default, StatusRange | GrpcCode):
        return str(default) if isinstance(default, StatusRange) else default.name
    if isinstance(default, tuple) and get_origin(form.type) is tuple:
        element = shape(get_args(form.type)[0])
        return [_written(item, element) for item in default]
    if default is None or isinstance(default, dict):
        return default
    if isinstance(default, bool | int | float) and form.unit not in ("duration", "size"):
        return default
    if isinstance(default, PortSwitch):
        return default.default
    text = show(default, form)
    return 0 if text == "0" else text


def _node(form: Shape) -> dict[str, Any]:
    node = dict(_type(form))
    if form.optional and "type" in node:
        node["type"] = [node["type"], "null"]
    elif form.optional and "anyOf" in node:
        node["anyOf"] = [*node["anyOf"], {"type": "null"}]
    if form.meta.description:
        node["description"] = form.meta.description + (
            f" ({limits(form)})" if form.unit in ("duration", "size") else ""
        )
    return node


def _type(form: Shape) -> dict[str, Any]:
    if is_struct(form.type):
        return schema(form.type)
    most = form.most
    if get_origin(form.type) is tuple:
        return {"type": "array", "items": _node(shape(get_args(form.type)[0]))} | (
            {"maxItems": most} if most else {}
        )
    if get_origin(form.type) is dict:
        return {"type": "object", "additionalProperties": _node(shape(get_args(form.type)[1]))} | (
            {"maxProperties": most} if most else {}
        )
    if get_origin(form.type) is Literal:
        return {"type": "string", "enum": list(get_args(form.type))}
    if form.type is bool:
        return {"type": "boolean"}
    if form.type is PortSwitch:
        return {
            "anyOf": [
                {"type": "boolean"},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "object"},
            ]
        }
    if form.unit == "duration":
        return {
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]+([.][0-9]+)?(ms|s|m|h|d)$"},
                {"const": 0},
            ]
        }
    if form.unit == "size":
        return {
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)?$"},
                {"type": "integer", "minimum": 0},
            ]
        }
    if form.unit == "ratio":
        return {"type": "number", "minimum": form.meta.ge, "maximum": form.meta.le}
    if form.type in (StatusRange, GrpcCode):
        return {"type": ["string", "integer"]}
    if form.type in LEAVES:
        return {"type": "string"} | ({"maxLength": most} if most else {})
    return {"type": "integer", "minimum": form.meta.ge, "maximum": form.meta.le}


def tables(struct: type[msgspec.Struct], section: str = "") -> str:
    """Markdown: one table for the settings of `struct` itself, and one per section."""
    rows, below = [], []
    for name, default, form in fields(struct):
        if is_struct(form.type):
            below.append(tables(form.type, f"{section}.{name}" if section else name))
            continue
        given = "required" if default is msgspec.NODEFAULT else f"`{show(default, form)}`"
        label = f"{section}.{name}" if section else name
        rows.append(
            f"| `{label}` | {form.meta.description} | {kind(form)} | {given} |"
            f" {limits(form) or '-'} |"
        )
    words = inspect.getdoc(struct) if section else "Settings of the whole proxy."
    title = f"### {section or 'Top level'}\n\n{words}\n\n"
    head = (
        "| Setting | Meaning | Unit or kind | Default | Limit |\n| --- | --- | --- | --- | --- |\n"
    )
    return "\n".join([title + head + "\n".join(rows) + "\n", *below])
