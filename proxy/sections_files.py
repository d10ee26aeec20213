"""The settings of files that a running proxy watches; proxy/sections.py has all others, and says how settings are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from proxy.settings import Section, described, number, ratio, seconds

_HOUR, _DAY, _WEEK = 3600, 86400, 7 * 86400


class IdentityConfig(Section, frozen=True):
    """The proxy's certificate and what it trusts. Without this section there is no mutual TLS, only clear text."""

    certificate: Annotated[Path, described("file with the certificate, and its intermediates, in PEM")]
    key: Annotated[Path, described("file with the certificate's private key in PEM")]
    roots: Annotated[tuple[Path, ...], described("files with the trust roots in PEM, several in each if need be", 64)]
    reload_interval: Annotated[float, seconds(0.05, _HOUR, "how often the files are looked at for a change")] = 10.0
    settle: Annotated[float, seconds(0, 60, "how far apart two reads of changed files are that have to agree; 0: one is enough")] = 0.5
    session_lifetime: Annotated[float, seconds(0, _DAY, "how long a TLS session may be resumed; 0: never")] = 3600.0
    end_with_certificate: Annotated[bool, described("whether connections end when a certificate that they rest on ends")] = True
    expiry_grace: Annotated[float, seconds(0, _DAY, "how long what is under way in such a connection may take")] = 10.0


# Writing a file of 6 MB takes tens of milliseconds; half a second also covers a writer that waits for its processor. An operator notices
# an error of the log within ten minutes, and an address that a pod has left is seldom given to another one sooner.
class DirectoryConfig(Section, frozen=True):
    """The file that says which services there are. Without this section connections go where they were addressed, in clear text."""

    file: Annotated[Path, described("the directory file")]
    poll_interval: Annotated[float, seconds(0.05, _HOUR, "how often the file is looked at for a change")] = 1.0
    settle: Annotated[float, seconds(0, 60, "how far apart two reads of a changed file are that have to agree; 0: one is enough")] = 0.5
    require_end: Annotated[bool, described("whether the file must end with the line `...`, which no part of it does")] = False
    max_loss: Annotated[
        float, ratio(0, 1, "a changed file is refused from which this part, or more, of the services with identities is gone")
    ] = 0.5
    remember: Annotated[
        float, seconds(0, _WEEK, "how long there is no clear text to an address that had an identity; 0: there is at once")
    ] = 600.0
    max_remembered: Annotated[
        int, number(1, 10_000_000, "addresses that are remembered so; a changed file that would exceed it is refused", "addresses")
    ] = 65536
