"""Loading the directory at the start, as the configuration asks."""

from __future__ import annotations

from proxy.config.load import Config
from proxy.directory import DirectoryError
from proxy.directory.watcher import Acceptance, DirectorySource
from proxy.errors import StartError


def load_directory(config: Config) -> DirectorySource | None:
    """The directory, read once; None if none is configured. Raises StartError."""
    section = config.directory
    if section is None:
        return None
    rules = Acceptance(
        section.settle,
        section.require_end,
        section.max_loss,
        section.remember,
        section.max_remembered,
    )
    try:
        return DirectorySource(section.file, rules)
    except DirectoryError as error:
        raise StartError(str(error), 64) from error
