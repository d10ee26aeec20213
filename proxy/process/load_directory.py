"""The source of the directory, as the configuration asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.config.schema import Config
from proxy.directory import DirectoryError
from proxy.directory.channel.connector import Connector
from proxy.directory.channel.messages import Hello
from proxy.directory.channel.source import ControlSource
from proxy.directory.former_identities import FormerIdentities
from proxy.directory.source import NoSource, Source
from proxy.directory.watcher import Acceptance, DirectorySource
from proxy.errors import StartError
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.process.own_identity import OwnIdentity


def load_directory(
    config: Config, own: OwnIdentity, dial: Callable[[Address], Awaitable[SocketStream]]
) -> Source:
    """The source. A file is read once here; `dial` opens connections to the control plane later.
    Raises StartError."""
    section = config.directory
    if section is None:
        return NoSource()
    if section.control is not None and own.current is not None:
        return ControlSource(
            section.control,
            Hello(config.pod.node, config.pod.zone, config.pod.name),
            Connector(own.current, dial, own.expiries),
            FormerIdentities(section.remember, section.max_remembered),
        )
    if section.file is None:
        raise StartError("directory: expected either `file` or `control`", 64)
    rules = Acceptance(
        section.settle,
        section.require_end,
        section.max_loss,
        section.remember,
        section.max_remembered,
        section.poll_interval,
    )
    try:
        return DirectorySource(section.file, rules)
    except DirectoryError as error:
        raise StartError(str(error), 64) from error
