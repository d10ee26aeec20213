"""Pure parts of the server: selectors, merge patches, server-side apply.

Apply is reduced to what a small server needs: every leaf of an object has owners, maps are merged,
lists are leaves. A leaf that its manager leaves out and no other manager owns is removed. A leaf
with a different value and another owner is a conflict, unless forced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lab.kube_api.store import Json, Problem

Path = tuple[str, ...]

_IN = re.compile(r"\s*([^\s!=()]+)\s+(in|notin)\s+\(([^)]*)\)\s*\Z")
_OWNERS = "x-owners"  # stored next to the object's own keys, never shown to clients


def matches_labels(selector: str, labels: dict[str, str]) -> bool:
    """Whether all requirements of a label selector hold."""
    for part in re.split(r",(?![^(]*\))", selector) if selector else ():
        if found := _IN.match(part):
            values = {value.strip() for value in found[3].split(",")}
            good = (labels.get(found[1]) in values) == (found[2] == "in")
        elif "!=" in part:
            name, _, value = part.partition("!=")
            good = labels.get(name.strip()) != value.strip()
        elif "=" in part:
            name, _, value = part.replace("==", "=").partition("=")
            good = labels.get(name.strip()) == value.strip()
        else:
            good = (part.strip().lstrip("!") in labels) != part.strip().startswith("!")
        if not good:
            return False
    return True


_FIELDS = {"metadata.name", "metadata.namespace", "spec.nodeName", "status.phase", "type", "reason"}


def check_fields(selector: str) -> None:
    """Raises Problem if objects cannot be selected by these fields."""
    for part in selector.split(",") if selector else ():
        path = part.partition("=")[0].rstrip("!")
        if path not in _FIELDS:
            raise Problem(400, "BadRequest", f'field label not supported: "{path}"')


def matches_fields(selector: str, item: Json) -> bool:
    """Whether all requirements of a field selector hold."""
    for part in selector.split(",") if selector else ():
        name, _, value = part.replace("==", "=").partition("=")
        negated = name.endswith("!")
        path = name.rstrip("!")
        found: Any = item
        for step in path.split("."):
            found = (found or {}).get(step, "")
        if (found == value) == negated:
            return False
    return True


def merge(into: Any, patch: Any) -> Any:
    """Merge a patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    made = dict(into) if isinstance(into, dict) else {}
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = merge(made.get(name), value)
    return made


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every path of an object that ends at something other than a map, or at an empty one."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from leaves(part, (*path, name))
    else:
        yield path, value


_IDENTITY = {("kind",), ("apiVersion",), ("metadata", "name"), ("metadata", "namespace")}


def apply(item: Json, wanted: Json, manager: str, *, force: bool) -> Json:
    """The object after an apply. Raises Problem 409."""
    owners: dict[Path, set[str]] = {
        path: set(names) for path, names in item.get(_OWNERS, {}).items()
    }
    new = {path: value for path, value in leaves(wanted) if path not in _IDENTITY}
    have = dict(leaves({name: value for name, value in item.items() if name != _OWNERS}))
    conflicts = [
        path
        for path, value in new.items()
        if owners.get(path, set()) - {manager} and have.get(path) != value
    ]
    if conflicts and not force:
        others = sorted({name for path in conflicts for name in owners[path]} - {manager})
        text = (
            f"Apply failed with {len(conflicts)} conflict: conflicts with"
            f" {', '.join(map(repr, others))}"
        )
        raise Problem(
            409, "Conflict", text, causes=[{"reason": "FieldManagerConflict", "message": text}]
        )
    for path in conflicts:
        owners[path] = set()
    for path in [path for path, names in owners.items() if manager in names and path not in new]:
        owners[path].discard(manager)
        if not owners[path]:
            del owners[path]
            _remove(item, path)
    for path, value in new.items():
        owners.setdefault(path, set()).add(manager)
        _set(item, path, value)
    item[_OWNERS] = owners
    return item


def without_owners(item: Json) -> Json:
    """An object as clients see it, without its field owners."""
    return {name: value for name, value in item.items() if name != _OWNERS}


def _set(item: Json, path: Path, value: Any) -> None:
    for step in path[:-1]:
        item = item.setdefault(step, {})
    item[path[-1]] = value


def _remove(item: Json, path: Path) -> None:
    for step in path[:-1]:
        item = item.get(step, {})
    item.pop(path[-1], None)
