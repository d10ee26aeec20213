"""The sources of settings: one YAML file and environment variables.

`ISTHMUS_OUTBOUND__DETECT_TIMEOUT=5s` is the setting `outbound.detect_timeout`,
`ISTHMUS_CLUSTER=east` the setting `cluster`. A variable overrides the same setting in the file.
Values are written as in the file. The functions work for any struct of settings.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from proxy import files
from proxy.settings.declare import fields, is_struct
from proxy.settings.document import DocumentError, Mistakes, Plain, closest, describe
from proxy.settings.document import load as load_document

PREFIX = "ISTHMUS_"
# Seconds, for `isthmus run`: a truncated file can be valid and ask for less.
SETTLE = 0.5
# Large enough for every setting and an allow-list of ten thousand identities.
MOST_BYTES = 4 * 1024 * 1024
# The variables that Kubernetes sets in each container for each Service of the namespace
# (`enableServiceLinks`), as `name=value`. A Service may have any name, so the value must also match
# what Kubernetes writes.
_SERVICE_LINK = re.compile(
    r"[A-Z](?:[A-Z0-9_]*[A-Z0-9])?_"
    r"(?:SERVICE_HOST=[0-9A-Fa-f.:]+"
    r"|SERVICE_PORT(?:_[A-Z0-9_]+)?=[0-9]+"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP))?=(?:tcp|udp|sctp)://[^/\s]+:[0-9]+"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)_(?:PROTO=(?:tcp|udp|sctp)|PORT=[0-9]+|ADDR=[0-9A-Fa-f.:]+))"
)


class ConfigError(DocumentError):
    """The configuration is invalid. `.mistakes` has one line per mistake, with its path."""


def read_file(path: Path, source: str, settle: float) -> dict[str, Plain]:
    """The top-level mapping of the file; `source` names it in errors. `settle`: see
    Loader.load (load.py). Raises ConfigError.
    """

    def read() -> tuple[str, bytes]:
        text = files.read_text(path, MOST_BYTES)
        return text, text.encode()

    try:
        values = load_document(files.read_settled(read, [path], settle)[0], source)
    except files.FileUnusable as error:
        raise ConfigError(source, [error.reason]) from error
    except DocumentError as error:
        raise ConfigError(source, error.mistakes) from error
    if not isinstance(values, dict | None):
        raise ConfigError(source, [f"expected a mapping of sections, found {describe(values)}"])
    return values or {}


def readable(
    environ: Mapping[str, str],
    wanted: Callable[[str], bool],
    mistakes: Mistakes,
    shared: str = "",
) -> dict[str, str]:
    """The variables whose names are `wanted`, without those that Kubernetes sets for Services.

    A value that is not UTF-8 is a mistake and left out. It is only left out if other programs use
    the variable too (its name starts with `shared`), so it does not prevent the start.
    """
    found = {}
    for name, text in sorted(environ.items()):
        if wanted(name) and not _SERVICE_LINK.fullmatch(f"{name}={text}"):
            try:
                f"{name}{text}".encode()
            except UnicodeEncodeError:
                if not shared or not name.startswith(shared):
                    mistakes.add(name.encode("ascii", "backslashreplace").decode(), "not UTF-8")
            else:
                found[name] = text
    return found


def override(
    values: dict[str, Plain],
    environ: Mapping[str, str],
    struct: type[msgspec.Struct],
    mistakes: Mistakes,
) -> None:
    """Apply ISTHMUS_<SECTION>__<FIELD> over the file's values."""
    known = {variable(section, field): (section, field) for section, field in _names(struct)}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name == f"{PREFIX}CONFIG":
            continue
        if name not in known:
            # A variable without `__` may belong to another program, unless it looks like a typo.
            near = closest(
                name.removeprefix(PREFIX), (other.removeprefix(PREFIX) for other in known)
            )
            if "__" in name or near:
                mistakes.add(name, f"no such setting{near.replace(chr(39), chr(39) + PREFIX, 1)}")
            continue
        section, field = known[name]
        try:
            value = load_document(text, name)
        except DocumentError as error:
            mistakes.add(name, "; ".join(error.mistakes))
            continue
        place = values
        if section:
            if not isinstance(values.get(section), dict):
                values[section] = {}
            place = typing.cast("dict[str, Plain]", values[section])
        place[field] = value


def variable(section: str, field: str) -> str:
    """The environment variable of a setting; `section` is "" for top-level settings."""
    return PREFIX + (f"{section}__{field}" if section else field).upper()


def _names(struct: type[msgspec.Struct]) -> Iterator[tuple[str, str]]:
    for name, _, form in fields(struct):
        if is_struct(form.type):
            yield from ((name, field) for field, _, _ in fields(form.type))
        else:
            yield "", name
