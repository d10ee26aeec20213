"""Interception: the nftables ruleset that redirects a pod's TCP traffic to the proxy, transparently
for programs.

How it works. One table of the family `inet` (IPv4 and IPv6) holds two chains of the type `nat`. The
kernel sends only the first packet of a connection through them; the decision holds for the whole
connection.

- `output` sees what the pod's own programs send. It redirects every new TCP connection to the
  outbound port. There are four exceptions: the proxy's own connections, connections inside the pod
  (they leave through `lo`), link-local IPv6 (below), and what the settings skip. The proxy's own
  connections are recognised by user id or packet mark. Without this exception the proxy would
  connect to itself forever.
- `prerouting` sees what arrives from outside. It redirects every new TCP connection to an address
of the pod to the inbound port, except the admin port and what the settings skip. A direct
connection to the inbound port arrives there too: its original destination is then the proxy itself,
and by that the proxy recognises a loop.

The original destination is not lost: the proxy asks the kernel (SO_ORIGINAL_DST, for IPv6
IP6T_SO_ORIGINAL_DST).

Only a first SYN is redirected. Connection tracking starts when the first NAT chain is installed. It
would take the next packet of an already open connection for the first packet of a new one. Without
the check of the flags, a running pod would lose its connections at that moment.

That check alone would leave a hole. A peer can send a bare ACK before its SYN. Connection tracking
takes it for an open connection (nf_conntrack_tcp_loose), and NAT decides to do nothing. The SYN
that follows from the same port belongs to that "connection" and is not redirected. (Most such ACKs
are answered with a reset, which ends the entry. An ACK with an unexpected TCP-MD5 signature is not,
RFC 2385.) In the same way, a program in the pod can bypass the outbound proxy if a host outside
sends it the ACK. So two chains of the type `filter`, through which every packet passes, follow the
redirection:

- `guard_input` rejects each SYN from outside that was not redirected to the inbound port, with the
same exceptions.
- `guard_output` rejects each SYN that would leave the pod, with the same exceptions: a redirected
one goes to a local address.

They check the packet after NAT and never ask connection tracking. Whatever its state (a stray
entry, a packet it calls invalid, a foreign `notrack` rule), a SYN that was not redirected opens
nothing. Packets other than SYN pass, because they open nothing: a listener answers them with a
reset. (The exception is the answer to a SYN cookie, but no cookie is made for a SYN that did not
pass.) Packets whose flags the kernel cannot read, such as fragments within fragments, do not match
the exceptions and are dropped.

The chains reject with a reset instead of dropping silently. An honest client that runs into this
(its port has a stale entry) learns it at once and can retry from another port. Newer kernels also
mark the entry as closed, so that it is gone in ten seconds instead of five minutes. A dropped SYN
would be retransmitted for two minutes without success. A reset tells an attacker no more than a
closed port does.

Link-local IPv6 (fe80::/10): such an address cannot be dialled without its interface, and
SO_ORIGINAL_DST does not give the interface. So outbound it is not redirected. Inbound it is,
because otherwise each neighbour on the link could reach the application without the proxy: such a
connection arrives at the proxy and fails there.

DNS, if enabled: queries of the pod's programs to the pod's own resolvers, over UDP and TCP, go to
the proxy. Queries to other resolvers do not: a redirected datagram does not carry its destination
(proxy/config/resolv_conf.py), and a program that chooses its own resolver has its reasons. So there
is one rule per resolver, with its own port for datagrams. These rules come before the rule for the
loopback interface, because a pod's resolver may be there, and before the skip settings, which are
about connections. A datagram can still leave for a resolver, on a flow that connection tracking
knew before the rules were installed. `guard_output` rejects it: the program learns it at once and
asks again. While the proxy does not run, the kernel rejects redirected datagrams (port
unreachable), so no program has to wait.

The whole ruleset is one nft transaction that starts with `add table` and `delete table`. So it
replaces an existing table, does not fail without one, and never leaves a partial ruleset. Except
for DNS, only TCP is affected.
"""

import dataclasses
import ipaddress
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TABLE = "isthmus"
# directories of nft; they are often missing in an ordinary user's PATH
SYSTEM_PATH = ":/usr/sbin:/sbin"
NFT_TIMEOUT = (
    20.0  # seconds; a transaction takes milliseconds, but the kernel may have to load modules first
)

# -100 is nft's dstnat; newer versions only know that name in the output hook. 0 runs after it and
# sees the ports after NAT.
_NAT = "type nat hook {} priority -100; policy accept;"
_FILTER = "type filter hook {} priority 0; policy accept;"
_FIRST_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
_FIRST_SYN_ONLY = (
    "# Only a first SYN opens a connection; open connections are not touched.",
    "meta l4proto != tcp return",
    "tcp flags & (fin | syn | rst | ack) != syn return",
)
_REFUSE = "meta l4proto tcp counter reject with tcp reset"

PortSpec = int | str
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InterceptError(Exception):
    """The rules could not be installed or removed; the message gives the reason and the remedy."""


class SettingsInvalid(InterceptError, ValueError):
    """The settings are invalid; `mistakes` lists all problems."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = tuple(mistakes)


class Captured(NamedTuple):
    """A resolver whose queries are captured: its address and port, and the proxy's port for its
    datagrams.
    """

    host: str
    port: int
    datagrams: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InterceptSettings:
    """The input of the ruleset.

    `uid` and `mark` are two ways to exempt the proxy's own connections; at least one is required.
    Ports are numbers or inclusive ranges ("4000-4010"). Subnets are in CIDR notation; a bare
    address is a subnet of one. A direction whose port is None is not redirected. A non-empty
    `redirect_*_ports` limits the redirection to these ports; skipped ports still win. `dns_port` is
    the proxy's port for TCP connections to the `resolvers`; None: DNS is not redirected.
    """

    outbound_port: int | None = 4140
    inbound_port: int | None = 4143
    admin_port: int = 4191
    dns_port: int | None = None
    resolvers: tuple[Captured, ...] = ()
    uid: int | None = 2102
    mark: int | None = None
    skip_outbound_ports: tuple[PortSpec, ...] = ()
    skip_inbound_ports: tuple[PortSpec, ...] = ()
    skip_outbound_subnets: tuple[str, ...] = ()
    skip_inbound_subnets: tuple[str, ...] = ()
    redirect_outbound_ports: tuple[PortSpec, ...] = ()
    redirect_inbound_ports: tuple[PortSpec, ...] = ()


def parse_ports(spec: PortSpec) -> tuple[int, int]:
    """A port or an inclusive range as (first, last). Raises ValueError with the reason."""
    text = str(spec).strip()
    first, dash, last = text.partition("-")
    if not (first.isascii() and first.isdigit()) or (
        dash and not (last.isascii() and last.isdigit())
    ):
        raise ValueError(f"{text!r} is neither a port nor a range like 4000-4010")
    low = int(first)
    high = int(last) if dash else low
    if not 1 <= low <= 65535 or not 1 <= high <= 65535:
        raise ValueError(f"{text!r} is outside 1-65535")
    if low > high:
        raise ValueError(f"{text!r} ends before it begins")
    return low, high


def parse_subnet(text: str) -> Network:
    """A subnet in CIDR notation, or an address. Raises ValueError with the reason, also if host
    bits are set.
    """
    try:
        return ipaddress.ip_network(text.strip(), strict=True)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a subnet like 10.0.0.0/8 or fd00::/8: {error}") from None


def check(settings: InterceptSettings) -> list[str]:
    """All mistakes in the settings, each with its field name; empty if there are none."""
    mistakes: list[str] = []
    named = (
        (name, getattr(settings, name))
        for name in ("outbound_port", "inbound_port", "admin_port", "dns_port")
    )
    listeners = {name: port for name, port in named if port is not None}
    mistakes += [
        f"{name}: {port} is not a port (1-65535)"
        for name, port in listeners.items()
        if not 1 <= port <= 65535
    ]
    if len(set(listeners.values())) < len(listeners):
        mistakes.append(
            f"{', '.join(listeners)}: must differ from each other, but are"
            f" {', '.join(map(str, listeners.values()))}"
        )
    if settings.uid is None and settings.mark is None:
        mistakes.append(
            "uid, mark: one of them is needed, otherwise the proxy's own connections would be"
            " redirected to itself"
        )
    if settings.uid is not None and not 0 <= settings.uid < 2**32 - 1:
        mistakes.append(f"uid: {settings.uid} is not a user id")
    if settings.mark is not None and not 1 <= settings.mark < 2**32:
        mistakes.append(
            f"mark: {settings.mark} is not a packet mark (1-4294967295; 0 means unmarked)"
        )
    if settings.dns_port is not None and settings.outbound_port is None:
        mistakes.append("dns_port: DNS answers lead to the outbound port, but there is none")
    for host, *used in settings.resolvers:
        if not _is_address(host) or not all(1 <= port <= 65535 for port in used):
            mistakes.append(
                f"resolvers: {host!r}, {used}: expected an IP address, its port, and a port of the"
                " proxy"
            )
    for field in dataclasses.fields(settings):
        if not field.name.startswith(("skip_", "redirect_")):
            continue
        for item in getattr(settings, field.name):
            try:
                parse_subnet(item) if field.name.endswith("_subnets") else parse_ports(item)
            except ValueError as error:
                mistakes.append(f"{field.name}: {error}")
    return mistakes


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def merge_ports(specs: Iterable[PortSpec]) -> list[str]:
    """Ports and ranges in order, with overlaps merged: an nft interval set rejects overlapping
    elements.
    """
    merged: list[tuple[int, int]] = []
    for low, high in sorted(map(parse_ports, specs)):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return [str(low) if low == high else f"{low}-{high}" for low, high in merged]


def _set(name: str, kind: str, elements: Sequence[str]) -> list[str]:
    """The lines of a named interval set; empty if it has no elements."""
    if not elements:
        return []
    return [
        f"\tset {name} {{",
        f"\t\ttype {kind}",
        "\t\tflags interval",
        f"\t\telements = {{ {', '.join(elements)} }}",
        "\t}",
        "",
    ]


def _networks(subnets: Iterable[str], version: int) -> list[str]:
    networks = [network for network in map(parse_subnet, subnets) if network.version == version]
    return [str(network) for network in ipaddress.collapse_addresses(networks)]  # type: ignore[type-var]  # one family each


def _direction(settings: InterceptSettings, direction: str) -> tuple[list[str], list[str]]:
    """The sets of one direction and the rules that use them."""
    side = "daddr" if direction == "outbound" else "saddr"
    ports = merge_ports(getattr(settings, f"skip_{direction}_ports"))
    only = merge_ports(getattr(settings, f"redirect_{direction}_ports"))
    subnets = getattr(settings, f"skip_{direction}_subnets")
    sets = _set(f"skip_{direction}_ports", "inet_service", ports) + _set(
        f"redirect_{direction}_ports", "inet_service", only
    )
    rules = [f"tcp dport @skip_{direction}_ports return"] if ports else []
    for version, family in ((4, "ip"), (6, "ip6")):
        networks = _networks(subnets, version)
        name = f"skip_{direction}_subnets{version}"
        sets += _set(name, f"ipv{version}_addr", networks)
        rules += [f"{family} {side} @{name} return"] if networks else []
    rules += [f"tcp dport != @redirect_{direction}_ports return"] if only else []
    return sets, rules


def render(settings: InterceptSettings) -> str:
    """The ruleset as text for `nft -f -`. Pure: same settings, same text. Raises
    SettingsInvalid."""
    if mistakes := check(settings):
        raise SettingsInvalid(mistakes)
    chains: list[str] = []
    if settings.outbound_port is not None:
        chains += _outbound(settings, settings.outbound_port)
    if settings.inbound_port is not None:
        chains += _inbound(settings, settings.inbound_port)
    return "\n".join(
        [
            f"add table inet {TABLE}",
            f"delete table inet {TABLE}",
            f"table inet {TABLE} {{",
            *chains[:-1],
            "}",
            "",
        ]
    )


def _outbound(settings: InterceptSettings, port: int) -> list[str]:
    sets, skips = _direction(settings, "outbound")
    own = [f"meta skuid {settings.uid} return"] if settings.uid is not None else []
    own += [f"meta mark {settings.mark:#010x} return"] if settings.mark is not None else []
    skips = ["# Link-local: the proxy could not dial it.", "ip6 daddr fe80::/10 return", *skips]
    questions, left = _dns(settings)
    redirect = [
        "# The proxy's own connections.",
        *own,
        *questions,
        "# Traffic inside the pod.",
        'oifname "lo" return',
        *_FIRST_SYN_ONLY,
        *skips,
    ]
    guard = [
        "# The proxy's own connections.",
        *own,
        "# Traffic inside the pod, which includes all redirected traffic.",
        "fib daddr type local return",
    ]
    guard += left
    return [
        *sets,
        "\t# Connections of the pod's programs go to the outbound port.",
        *_chain(
            "output", _NAT.format("output"), [*redirect, f"meta l4proto tcp redirect to :{port}"]
        ),
        "\t# A new connection that is not redirected would leave the pod without the mesh.",
        *_chain(
            "guard_output", _FILTER.format("output"), [*guard, *_FIRST_SYN_ONLY, *skips, _REFUSE]
        ),
    ]


def _dns(settings: InterceptSettings) -> tuple[list[str], list[str]]:
    """The rules that capture queries to the pod's resolvers, and the rules that reject datagrams
    left uncaptured.
    """
    if settings.dns_port is None or not settings.resolvers:
        return [], []
    capture, refuse = ["# Queries to the pod's resolvers."], ["# Queries that were not redirected."]
    for host, port, datagrams in settings.resolvers:
        to = f"{'ip6' if ':' in host else 'ip'} daddr {host}"
        capture.append(f"{to} udp dport {port} redirect to :{datagrams}")
        capture.append(f"{to} tcp dport {port} {_FIRST_SYN} redirect to :{settings.dns_port}")
        refuse.append(f"{to} udp dport {port} counter reject")
    return capture, refuse


def _inbound(settings: InterceptSettings, port: int) -> list[str]:
    sets, skips = _direction(settings, "inbound")
    admin = f"tcp dport {settings.admin_port} return"
    redirect = [
        'iifname "lo" return',
        "fib daddr type != local return",
        *_FIRST_SYN_ONLY,
        admin,
        *skips,
    ]
    guard = [
        'iifname "lo" return',
        *_FIRST_SYN_ONLY,
        "# Redirected traffic.",
        f"tcp dport {port} return",
        admin,
        *skips,
    ]
    unreadable = [
        "# Everything else is unreadable, such as fragments within fragments.",
        "counter drop",
    ]
    return [
        *sets,
        "\t# Connections from outside go to the inbound port.",
        *_chain(
            "prerouting",
            _NAT.format("prerouting"),
            [*redirect, f"meta l4proto tcp redirect to :{port}"],
        ),
        (
            "\t# A new connection that is not redirected would reach the application without the"
            " proxy's checks."
        ),
        *_chain("guard_input", _FILTER.format("input"), [*guard, _REFUSE, *unreadable]),
    ]


def _chain(name: str, kind: str, rules: Sequence[str]) -> list[str]:
    return [f"\tchain {name} {{", f"\t\t{kind}", *(f"\t\t{rule}" for rule in rules), "\t}", ""]


def render_removal() -> str:
    """The transaction that removes the table. It does not fail without one."""
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\n"


def apply(settings: InterceptSettings) -> None:
    """Install the ruleset in this process's network namespace, replacing an earlier one. Raises
    InterceptError.
    """
    run_nft(render(settings))


def remove() -> None:
    """Remove the ruleset. Raises InterceptError, but not if there is no ruleset."""
    run_nft(render_removal())


def run_nft(script: str) -> None:
    """Apply one transaction with the program nft. Raises InterceptError."""
    nft = shutil.which("nft", path=os.environ.get("PATH", os.defpath) + SYSTEM_PATH)
    if nft is None:
        raise InterceptError(
            "the program nft is not installed (package nftables on Debian, Fedora and Alpine)"
        )
    try:
        done = subprocess.run(
            [nft, "-f", "-"],
            input=script,
            capture_output=True,
            text=True,
            timeout=NFT_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InterceptError(f"nft did not finish within {NFT_TIMEOUT:g} s") from None
    except OSError as error:
        raise InterceptError(f"{nft} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        raise InterceptError(explain(done.stderr))


def explain(stderr: str) -> str:
    """nft's standard error as one line that says what to do."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    first = next(
        (line for line in lines if "Error" in line), lines[0] if lines else "no reason given"
    )
    if "Operation not permitted" in stderr or "must be root" in stderr:
        return (
            "this process may not change the kernel's rules: it needs the capability NET_ADMIN"
            f" (nft: {first})"
        )
    if any(
        text in stderr
        for text in (
            "Protocol not supported",
            "Operation not supported",
            "No such file or directory",
            "address family",
        )
    ):
        needed = (
            "nftables with NAT, fib lookups and reject (modules nft_chain_nat, nft_redir,"
            " nft_fib_inet, nft_reject_inet)"
        )
        return f"the kernel lacks features that the rules need: {needed} (nft: {first})"
    return f"nft rejected the rules: {first}"
