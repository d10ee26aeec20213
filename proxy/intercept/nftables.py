"""Interception: the nftables ruleset that brings a pod's TCP traffic to the proxy without the application knowing.

General theory of operation.  One table of the family `inet` (IPv4 and IPv6 together) holds two chains of the type `nat`, through
which the kernel sends the first packet of a connection only; what they decide holds for the connection's whole life.

* `output` sees what the pod's own programs send.  It sends every new TCP connection to the outbound port, except: the proxy's
  own (recognised by its user id or by a packet mark; without this exemption the proxy would be its own client for ever),
  what stays inside the pod (leaves through `lo`), link-local IPv6 (below), and what the settings skip.
* `prerouting` sees what arrives from outside.  It sends every new TCP connection for an address of the pod to the inbound port,
  except the admin port and what the settings skip.  A connection straight to the inbound port arrives there too: its original
  destination is then the proxy itself, which is how the proxy recognises a loop.

Where the connection was going is not lost: the proxy asks the kernel (SO_ORIGINAL_DST, and IP6T_SO_ORIGINAL_DST for IPv6).

Only a first SYN is redirected.  Connection tracking begins when the first NAT chain is installed and would take the next packet
of an already open connection for the first one of a new connection; without the test of the flags a running pod would lose its
connections at that moment.

That test alone would be a hole.  A peer can send a bare ACK before its SYN: connection tracking takes it for a connection that was
open (nf_conntrack_tcp_loose), NAT decides to do nothing, and the SYN that follows from the same port belongs to that "connection" and
is not redirected.  (Most such ACKs are answered by a reset, which ends it; one with a TCP-MD5 signature that nobody expects is not,
RFC 2385.)  A program of the pod can leave past the outbound proxy in the same way, if somebody outside sends it the ACK.  So two
chains of the type `filter`, through which every packet goes, stand behind the redirection:

* `guard_input` refuses each SYN from outside that has not come out of the redirection at the inbound port, but for the same exceptions.
* `guard_output` refuses each SYN that would leave the pod, but for the same exceptions: a redirected one goes to a local address.

They look at the packet, after NAT, and never ask connection tracking: whatever it believes (a stray entry, a packet it calls invalid,
a `notrack` of somebody else), a SYN that was not redirected opens nothing.  Packets other than SYN pass, because they open nothing:
a listener answers them by a reset.  (But for the answer to a SYN cookie, and none is made for a SYN that has not been let through.)
What the kernel cannot read as far as the flags, such as fragments within fragments, does not match the exceptions and is dropped.

They refuse by a reset rather than silently.  An honest client that runs into this (its port has a stale entry) knows at once and can
try again from another port, and newer kernels mark the entry as closed, so that it is gone in ten seconds rather than five minutes; a
dropped SYN would be repeated for two minutes, each time in vain.  A reset tells an attacker no more than a closed port does.

Link-local IPv6 (fe80::/10): an address without its interface cannot be dialled, and SO_ORIGINAL_DST does not tell the interface.
Outbound it is therefore left alone.  Inbound it is not, or each neighbour on the link could reach the application without the proxy:
such a connection arrives at the proxy and fails there.

DNS, if that is switched on: questions of the pod's programs to the pod's own resolvers, over UDP and TCP, go to the proxy, and questions to
anybody else do not. A datagram that was redirected does not say where it was going (proxy/config/resolv_conf.py), and a program that asks a
resolver of its own choice, as resolvers do, has its reasons. So there is a rule for each resolver, with a port for its datagrams. These
rules stand before the one for the loopback interface, because a pod's resolver may live there, and before what the settings skip: those
are about connections. A datagram that leaves for a resolver all the same, on a flow that connection tracking knew before the rules
came, is refused by `guard_output`: the program is told at once, and asks again. So it is as long as the proxy does not run: the kernel
answers for it that nobody listens, and no program has to wait.

The whole ruleset is one nft transaction which begins with `add table` and `delete table`: it replaces what was there, does not
fail when nothing was there, and at no time is there half a ruleset.  But for DNS, what is not TCP is never touched.
"""

import dataclasses
import ipaddress
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TABLE = "isthmus"
SYSTEM_PATH = ":/usr/sbin:/sbin"  # where nft lives; an ordinary user's PATH often lacks them
NFT_TIMEOUT = 20.0  # seconds; a transaction takes milliseconds, but the kernel may have to load modules first

# -100 is what nft calls dstnat; in the output hook the name is known only to newer versions.  0 comes after it: ports are those after NAT.
_NAT = "type nat hook {} priority -100; policy accept;"
_FILTER = "type filter hook {} priority 0; policy accept;"
_FIRST_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
_FIRST_SYN_ONLY = (
    "# Only a first SYN opens a connection; open ones are left alone.",
    "meta l4proto != tcp return",
    "tcp flags & (fin | syn | rst | ack) != syn return",
)
_REFUSE = "meta l4proto tcp counter reject with tcp reset"

PortSpec = int | str
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InterceptError(Exception):
    """The rules could not be installed or removed; the message says why and what to do."""


class SettingsInvalid(InterceptError, ValueError):
    """The settings are wrong; `mistakes` names all of them."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = tuple(mistakes)


class Captured(NamedTuple):
    """A resolver whose questions are captured: its address and port, and the port of the proxy that datagrams for it go to."""

    host: str
    port: int
    datagrams: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InterceptSettings:
    """What the ruleset says.

    `uid` and `mark` are two ways to exempt the proxy's own connections; at least one is needed, both may be given.
    Ports are numbers or inclusive ranges ("4000-4010"); subnets are in CIDR notation, a bare address is itself.
    A direction whose port is None is not redirected.  `redirect_*_ports`, when not empty, narrow the redirection down to these ports;
    skipped ports still win.  `dns_port` is where TCP connections to the `resolvers` go; None: DNS is left alone.
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
    """A port or an inclusive range as (first, last); raises ValueError with the reason."""
    text = str(spec).strip()
    first, dash, last = text.partition("-")
    if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
        raise ValueError(f"{text!r} is neither a port nor a range like 4000-4010")
    low = int(first)
    high = int(last) if dash else low
    if not 1 <= low <= 65535 or not 1 <= high <= 65535:
        raise ValueError(f"{text!r} is outside 1-65535")
    if low > high:
        raise ValueError(f"{text!r} ends before it begins")
    return low, high


def parse_subnet(text: str) -> Network:
    """A subnet in CIDR notation, or an address; raises ValueError with the reason (also when host bits are set)."""
    try:
        return ipaddress.ip_network(text.strip(), strict=True)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a subnet like 10.0.0.0/8 or fd00::/8: {error}") from None


def check(settings: InterceptSettings) -> list[str]:
    """All mistakes in the settings, each with the name of its field; empty when there is none."""
    mistakes: list[str] = []
    named = ((name, getattr(settings, name)) for name in ("outbound_port", "inbound_port", "admin_port", "dns_port"))
    listeners = {name: port for name, port in named if port is not None}
    mistakes += [f"{name}: {port} is not a port (1-65535)" for name, port in listeners.items() if not 1 <= port <= 65535]
    if len(set(listeners.values())) < len(listeners):
        mistakes.append(f"{', '.join(listeners)}: must differ from each other, but are {', '.join(map(str, listeners.values()))}")
    if settings.uid is None and settings.mark is None:
        mistakes.append("uid, mark: one of them is needed, or the proxy's own connections would be redirected to the proxy")
    if settings.uid is not None and not 0 <= settings.uid < 2**32 - 1:
        mistakes.append(f"uid: {settings.uid} is not a user id")
    if settings.mark is not None and not 1 <= settings.mark < 2**32:
        mistakes.append(f"mark: {settings.mark} is not a packet mark (1-4294967295; 0 is what every unmarked packet has)")
    if settings.dns_port is not None and settings.outbound_port is None:
        mistakes.append("dns_port: names lead to the outbound port, but there is none")
    for host, *used in settings.resolvers:
        if not _is_address(host) or not all(1 <= port <= 65535 for port in used):
            mistakes.append(f"resolvers: {host!r}, {used}: expected an IP address, its port, and a port of the proxy")
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
    """Ports and ranges in order, without overlaps: an interval set refuses elements that overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(map(parse_ports, specs)):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return [str(low) if low == high else f"{low}-{high}" for low, high in merged]


def _set(name: str, kind: str, elements: Sequence[str]) -> list[str]:
    """The lines of a named interval set; none when it would be empty."""
    if not elements:
        return []
    return [f"\tset {name} {{", f"\t\ttype {kind}", "\t\tflags interval", f"\t\telements = {{ {', '.join(elements)} }}", "\t}", ""]


def _networks(subnets: Iterable[str], version: int) -> list[str]:
    networks = [network for network in map(parse_subnet, subnets) if network.version == version]
    return [str(network) for network in ipaddress.collapse_addresses(networks)]  # type: ignore[type-var]  # one family each


def _direction(settings: InterceptSettings, direction: str) -> tuple[list[str], list[str]]:
    """The sets of one direction and the rules that use them."""
    side = "daddr" if direction == "outbound" else "saddr"
    ports = merge_ports(getattr(settings, f"skip_{direction}_ports"))
    only = merge_ports(getattr(settings, f"redirect_{direction}_ports"))
    subnets = getattr(settings, f"skip_{direction}_subnets")
    sets = _set(f"skip_{direction}_ports", "inet_service", ports) + _set(f"redirect_{direction}_ports", "inet_service", only)
    rules = [f"tcp dport @skip_{direction}_ports return"] if ports else []
    for version, family in ((4, "ip"), (6, "ip6")):
        networks = _networks(subnets, version)
        name = f"skip_{direction}_subnets{version}"
        sets += _set(name, f"ipv{version}_addr", networks)
        rules += [f"{family} {side} @{name} return"] if networks else []
    rules += [f"tcp dport != @redirect_{direction}_ports return"] if only else []
    return sets, rules


def render(settings: InterceptSettings) -> str:
    """The ruleset as text for `nft -f -`: pure, the same settings give the same text.  Raises SettingsInvalid."""
    if mistakes := check(settings):
        raise SettingsInvalid(mistakes)
    chains: list[str] = []
    if settings.outbound_port is not None:
        chains += _outbound(settings, settings.outbound_port)
    if settings.inbound_port is not None:
        chains += _inbound(settings, settings.inbound_port)
    return "\n".join([f"add table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{", *chains[:-1], "}", ""])


def _outbound(settings: InterceptSettings, port: int) -> list[str]:
    sets, skips = _direction(settings, "outbound")
    own = [f"meta skuid {settings.uid} return"] if settings.uid is not None else []
    own += [f"meta mark {settings.mark:#010x} return"] if settings.mark is not None else []
    skips = ["# Link-local: the proxy could not dial it.", "ip6 daddr fe80::/10 return", *skips]
    questions, left = _dns(settings)
    redirect = ["# The proxy's own.", *own, *questions, "# What stays inside the pod.", 'oifname "lo" return', *_FIRST_SYN_ONLY, *skips]
    guard = ["# The proxy's own.", *own, "# What stays inside the pod, and so all that was redirected.", "fib daddr type local return"]
    guard += left
    return [
        *sets,
        "\t# What the pod's programs send goes to the outbound port.",
        *_chain("output", _NAT.format("output"), [*redirect, f"meta l4proto tcp redirect to :{port}"]),
        "\t# A new connection that left the pod without it, by whatever trick, would go past the mesh.",
        *_chain("guard_output", _FILTER.format("output"), [*guard, *_FIRST_SYN_ONLY, *skips, _REFUSE]),
    ]


def _dns(settings: InterceptSettings) -> tuple[list[str], list[str]]:
    """The rules that capture questions to the pod's resolvers, and those that refuse datagrams which left uncaptured."""
    if settings.dns_port is None or not settings.resolvers:
        return [], []
    capture, refuse = ["# Questions to the pod's resolvers."], ["# Questions that were not redirected."]
    for host, port, datagrams in settings.resolvers:
        to = f"{'ip6' if ':' in host else 'ip'} daddr {host}"
        capture.append(f"{to} udp dport {port} redirect to :{datagrams}")
        capture.append(f"{to} tcp dport {port} {_FIRST_SYN} redirect to :{settings.dns_port}")
        refuse.append(f"{to} udp dport {port} counter reject")
    return capture, refuse


def _inbound(settings: InterceptSettings, port: int) -> list[str]:
    sets, skips = _direction(settings, "inbound")
    admin = f"tcp dport {settings.admin_port} return"
    redirect = ['iifname "lo" return', "fib daddr type != local return", *_FIRST_SYN_ONLY, admin, *skips]
    guard = ['iifname "lo" return', *_FIRST_SYN_ONLY, "# What was redirected.", f"tcp dport {port} return", admin, *skips]
    unreadable = ["# All else is not readable: fragments within fragments, for instance.", "counter drop"]
    return [
        *sets,
        "\t# What arrives from outside goes to the inbound port.",
        *_chain("prerouting", _NAT.format("prerouting"), [*redirect, f"meta l4proto tcp redirect to :{port}"]),
        "\t# A new connection that arrived without it, by whatever trick, would reach the application without the proxy's judgement.",
        *_chain("guard_input", _FILTER.format("input"), [*guard, _REFUSE, *unreadable]),
    ]


def _chain(name: str, kind: str, rules: Sequence[str]) -> list[str]:
    return [f"\tchain {name} {{", f"\t\t{kind}", *(f"\t\t{rule}" for rule in rules), "\t}", ""]


def render_removal() -> str:
    """The transaction that takes the table away, also when it is not there."""
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\n"


def apply(settings: InterceptSettings) -> None:
    """Install the ruleset in the network namespace of this process, replacing an earlier one.  Raises InterceptError."""
    run_nft(render(settings))


def remove() -> None:
    """Take the ruleset away; nothing is left.  Raises InterceptError, but not when there was none."""
    run_nft(render_removal())


def run_nft(script: str) -> None:
    """Give one transaction to the kernel by the program nft.  Raises InterceptError in words."""
    nft = shutil.which("nft", path=os.environ.get("PATH", os.defpath) + SYSTEM_PATH)
    if nft is None:
        raise InterceptError("the program nft is not installed (the package is called nftables on Debian, Fedora and Alpine)")
    try:
        done = subprocess.run([nft, "-f", "-"], input=script, capture_output=True, text=True, timeout=NFT_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise InterceptError(f"nft did not finish within {NFT_TIMEOUT:g} s") from None
    except OSError as error:
        raise InterceptError(f"{nft} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        raise InterceptError(explain(done.stderr))


def explain(stderr: str) -> str:
    """What nft wrote to its standard error, as one line that says what to do."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    first = next((line for line in lines if "Error" in line), lines[0] if lines else "no reason given")
    if "Operation not permitted" in stderr or "must be root" in stderr:
        return f"the kernel does not let this process change its rules: it needs the capability NET_ADMIN (nft: {first})"
    if any(text in stderr for text in ("Protocol not supported", "Operation not supported", "No such file or directory", "address family")):
        needed = "nftables with NAT, fib lookups and reject (modules nft_chain_nat, nft_redir, nft_fib_inet, nft_reject_inet)"
        return f"the kernel lacks what the rules need: {needed} (nft: {first})"
    return f"nft refused the rules: {first}"
