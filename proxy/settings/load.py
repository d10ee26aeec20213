"""Loads the settings of a program from its file and the environment, checks them as a whole, and
freezes them.

The sources are one YAML file and the environment, which takes precedence (sources.py). All mistakes
are reported together, each with its path; then the contradictions between settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from proxy.settings.declare import Section
from proxy.settings.decode import decode
from proxy.settings.document import Mistakes, Plain
from proxy.settings.sources import PREFIX, ConfigError, override, read_file, readable

S = TypeVar("S", bound=Section)
Values = dict[str, Plain]
Environment = Mapping[str, str]


def _ours(name: str) -> bool:
    return name.startswith(PREFIX)


def _no_defaults(values: Values, environ: Environment) -> None:
    """The program takes nothing from other variables."""


@dataclass(frozen=True, slots=True)
class Loader(Generic[S]):
    """How a program gets its settings.

    `struct` declares them. `check` adds the mistakes that only a comparison of settings shows.
    `reads` says which environment variables the program reads. `defaults` takes from them what the
    file does not set. A variable whose name starts with `shared` belongs to other programs too: if
    its value is not UTF-8, it is ignored.
    """

    struct: type[S]
    check: Callable[[S, Mistakes], None]
    reads: Callable[[str], bool] = _ours
    defaults: Callable[[Values, Environment], None] = _no_defaults
    shared: str = ""

    def load(self, path: Path | None, environ: Environment, settle: float) -> S:
        """The settings from the file at `path` (None: the one in ISTHMUS_CONFIG, if any) and the
        environment.

        A file modified within the last `settle` seconds must give the same result in two reads,
        that far apart (files.read_settled). Raises ConfigError with all mistakes, including an
        unreadable file.
        """
        mistakes = Mistakes()
        environ = readable(environ, self.reads, mistakes, self.shared)
        if path is None and (named := environ.get(f"{PREFIX}CONFIG")):
            path = Path(named)
        source = str(path) if path is not None else "the environment"
        values = read_file(path, source, settle) if path is not None else {}
        self.defaults(values, environ)
        override(values, environ, self.struct, mistakes)
        found = decode(values, self.struct, "", mistakes)
        if found is not None:
            self.check(found, mistakes)
        if found is None or mistakes:
            raise ConfigError(source, mistakes.found())
        return found
