"""The settings of what a running proxy reads again when it changes: its identity and the directory,
each from files or the control plane."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from proxy.settings.declare import Section, described, number, octets, ratio, seconds
from proxy.settings.units import Network

_HOUR, _DAY, _WEEK = 3600, 86400, 7 * 86400


# A new pod waits for its certificate, so its attempts follow each other quickly. A renewal has half
# of a lifetime, and the proxies of a whole cluster may be waiting for the control plane.
class EnrollmentConfig(Section, frozen=True):
    """With `source: control`: the control plane, which certifies the proxy's key for a service
    account token."""

    address: Annotated[
        str,
        described("host:port of the control plane's issuing listener", 259),
    ]
    identity: Annotated[str, described("SPIFFE ID that the control plane must have", 2048)]
    token: Annotated[
        Path,
        described(
            "file with a service account token for the audience `isthmus.dev/identity`; read again"
            " for each request"
        ),
    ]
    timeout: Annotated[
        float, seconds(0.1, 300, "maximum time for one request, with resolving and connecting")
    ] = 10.0
    min_pause: Annotated[
        float,
        seconds(0.01, _HOUR, "pause after a failed request; doubled, and varied at random"),
    ] = 0.5
    max_first_pause: Annotated[
        float, seconds(0.01, _HOUR, "longest pause while there is no valid certificate")
    ] = 5.0
    max_pause: Annotated[
        float, seconds(0.01, _DAY, "longest pause while the old certificate is valid")
    ] = 120.0


# An agent is on the same node, so pauses are short. gRPC's own limit of a message is 4 MiB.
class WorkloadApiConfig(Section, frozen=True):
    """With `source: spiffe`: the SPIFFE Workload API that brings certificate, key and trust
    roots."""

    socket: Annotated[
        str | None,
        described(
            "address of the Workload API, `unix:///path`; without it,"
            " `SPIFFE_ENDPOINT_SOCKET` has it",
            120,
        ),
    ] = None
    timeout: Annotated[
        float,
        seconds(0.1, 300, "maximum time until the first message, and for each later one to arrive"),
    ] = 10.0
    max_message: Annotated[
        int, octets(16 * 1024, 64 * 1024 * 1024, "longest message of the Workload API")
    ] = 4 * 1024 * 1024
    min_pause: Annotated[
        float,
        seconds(0.01, _HOUR, "pause after a failure; doubled, and varied at random"),
    ] = 0.5
    max_pause: Annotated[float, seconds(0.01, _HOUR, "longest pause between two attempts")] = 10.0


class IdentityConfig(Section, frozen=True):
    """The proxy's certificate and its trust roots. Without this section the proxy uses clear text,
    not mutual TLS.
    """

    source: Annotated[
        Literal["files", "control", "spiffe"],
        described(
            "where the certificate comes from: files, the control plane, or a SPIFFE Workload API"
        ),
    ] = "files"
    certificate: Annotated[
        Path | None,
        described("PEM file with the certificate and its intermediates; with `source: files`"),
    ] = None
    key: Annotated[
        Path | None,
        described("PEM file with the private key of the certificate; with `source: files`"),
    ] = None
    roots: Annotated[
        tuple[Path, ...],
        described(
            "PEM files with the trust roots; each may contain several; not with `source: spiffe`",
            64,
        ),
    ] = ()
    control: EnrollmentConfig | None = None
    spiffe: WorkloadApiConfig | None = None
    revoked: Annotated[
        Path | None,
        described(
            "file with peers that are refused although their certificates are valid: in each line"
            " a SPIFFE ID or `serial:` and the number of a certificate; see identity.md"
        ),
    ] = None
    reload_interval: Annotated[
        float, seconds(0.05, _HOUR, "interval between checks of the files for changes")
    ] = 10.0
    settle: Annotated[
        float,
        seconds(
            0,
            60,
            "interval between two reads of changed files, which must agree; 0: one read is"
            " sufficient",
        ),
    ] = 0.5
    session_lifetime: Annotated[
        float, seconds(0, _DAY, "maximum age of a TLS session for resumption; 0: no resumption")
    ] = 3600.0
    end_with_certificate: Annotated[
        bool,
        described(
            "whether the proxy closes a connection when a certificate that it depends on expires"
        ),
    ] = True
    expiry_grace: Annotated[
        float,
        seconds(0, _DAY, "maximum time for requests that are in progress on such a connection"),
    ] = 10.0


# An application's first connection to a service may wait as long as a slow DNS lookup. A service
# with 10,000 endpoints has about 600 KiB.
class ControlPlaneConfig(Section, frozen=True):
    """The control plane as the source of the directory: see directory-channel.md."""

    address: Annotated[
        str,
        described("host:port of the control plane; a name with several addresses is allowed", 259),
    ]
    identity: Annotated[str, described("SPIFFE ID that the control plane must have", 2048)]
    networks: Annotated[
        tuple[Network, ...],
        described(
            "networks of the cluster: without an answer, connections to addresses in them fail, and"
            " others go to their original destination; empty: the control plane reports them; until"
            " then, private networks (RFC 1918, RFC 6598, RFC 4193)",
            256,
        ),
    ] = ()
    first_use_timeout: Annotated[
        float, seconds(0, 60, "how long a first connection or request waits for the entry")
    ] = 3.0
    unused: Annotated[
        float,
        seconds(1, _DAY, "how long an entry that no connection uses stays subscribed"),
    ] = 300.0
    max_subscriptions: Annotated[
        int, number(16, 1_000_000, "maximum entries that are followed", "entries")
    ] = 4096
    max_message: Annotated[
        int, octets(64 * 1024, 1024 * 1024 * 1024, "longest message of the control plane")
    ] = 8 * 1024 * 1024
    connect_timeout: Annotated[
        float,
        seconds(0.1, 60, "maximum time for resolving, connecting, TLS and the first message"),
    ] = 5.0
    write_timeout: Annotated[float, seconds(0.1, 300, "maximum time for sending a message")] = 10.0
    min_pause: Annotated[
        float,
        seconds(
            0.01, _HOUR, "pause before the second attempt to connect; doubled, and varied at random"
        ),
    ] = 0.5
    max_pause: Annotated[float, seconds(0.01, _HOUR, "longest pause between two attempts")] = 10.0


# Writing a file of 6 MB takes tens of milliseconds. Half a second also covers a writer that waits
# for the CPU. An operator notices an error in the log within ten minutes. The address of a removed
# pod is rarely reused sooner.
class DirectoryConfig(Section, frozen=True):
    """The source of the directory: either a file that lists the services, or the control plane.
    Without this section, connections go to their original destination in clear text.
    """

    file: Annotated[Path | None, described("path of the directory file")] = None
    control: ControlPlaneConfig | None = None
    poll_interval: Annotated[
        float, seconds(0.05, _HOUR, "interval between checks of the file for changes")
    ] = 1.0
    settle: Annotated[
        float,
        seconds(
            0,
            60,
            "interval between two reads of a changed file, which must agree; 0: one read is"
            " sufficient",
        ),
    ] = 0.5
    require_end: Annotated[
        bool,
        described("whether the file must end with the line `...`; this detects a truncated file"),
    ] = False
    max_loss: Annotated[
        float,
        ratio(
            0,
            1,
            "fraction of the services with identities; the proxy rejects a changed file that"
            " removes this fraction or more",
        ),
    ] = 0.5
    remember: Annotated[
        float,
        seconds(
            0,
            _WEEK,
            "how long the proxy sends no clear text to an address that had an identity; 0: clear"
            " text is allowed at once",
        ),
    ] = 600.0
    max_remembered: Annotated[
        int,
        number(
            1,
            10_000_000,
            "maximum addresses that are remembered for this; the proxy rejects a changed file that"
            " would exceed it",
            "addresses",
        ),
    ] = 65536
