"""The steps of `isthmus demo`: pods with sidecars, four intruders, a second cluster, and what each
step proved.

The steps start programs and observe; the findings go into a Report (lab/report.py). Identities,
ciphers and groups are read from the proxies' logs and from the wire, never from the demonstration's
own configuration.
"""

import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from lab import clusters_story
from lab.calls import FORGETFUL, calls, grpc_server
from lab.capture import Capture
from lab.circle import circle
from lab.cluster import Lab
from lab.clusters_story import World
from lab.mesh import Mesh
from lab.pod import Pod
from lab.process import LabError
from lab.report import Report, latency_line, megabytes
from lab.sandbox import outside_pid, rootless
from lab.sidecar import Authority, Sidecar
from lab.stage import GRPC, HTTP, MAIL, PLAIN, SECRET, SOCKET, Stage, error_type, why
from lab.traced import traced
from lab.traces import TraceCollector
from proxy.identity.spiffe import SpiffeId

REQUESTS = 400  # per side, for the latency
MEMORY_ALLOWED = 5 * 1024 * 1024  # bytes by which a sidecar may grow during a large body
# so that gRPC connections end, and are logged, in time
SHORT_LIVED = {"idle_timeout": "1s", "ping_interval": "1s"}
LOG_PATIENCE = 30.0  # seconds; a pooled connection is closed and logged after 3 s without a request
STORY_TIMEOUT = 300.0  # seconds; it takes about forty, more on a busy machine


def tell(*, size: int, keep: bool) -> int:
    """Run the demonstration; returns the exit code of `isthmus demo`."""
    report = Report()
    try:
        return trio.run(_tell, report, size, keep)
    except LabError as error:
        report.broke(str(error))
    except KeyboardInterrupt:
        report.close()
        report.say("\nstopped; nothing is left behind")
        return 0 if report.held else 1
    finally:
        report.close()
    return 1


async def _tell(report: Report, size: int, keep: bool) -> int:
    began = time.monotonic()
    async with Lab() as lab:
        with trio.move_on_after(STORY_TIMEOUT) as limit:
            stage, world = await build(lab, report, size)
            steps: tuple[tuple[str, Callable[[Stage], Awaitable[None]]], ...] = (
                ("ordinary programs communicate, an eavesdropper captures the wire", traffic),
                ("two clusters forward a request to each other", circle),
                ("large bodies are streamed", large_bodies),
                ("intruders try", intruders),
                ("latency is measured, with and without the mesh in turn", latency),
                ("reading the proxies' logs", who_was_who),
            )
            for title, step in steps:
                report.step(title)
                await step(stage)
            for title, chapter in clusters_story.STEPS:
                report.step(title)
                await chapter(world)
            report.step("one request is traced through all proxies")
            await traced(stage)
        if limit.cancelled_caught:
            report.broke(f"the demonstration did not end within {STORY_TIMEOUT:g} s")
        report.finish(time.monotonic() - began)
        if keep and not limit.cancelled_caught:
            explain_how_to_enter(stage)
            await trio.sleep_forever()
    return 0 if report.held else 1


async def build(lab: Lab, report: Report, size: int) -> tuple[Stage, World]:
    """Clusters, pods, programs, sidecars."""
    report.step(
        "building two clusters of pods"
        f" ({'as an ordinary user, rootless' if rootless() else 'as root'})"
    )
    west = lab.cluster("west")
    mesh = Mesh(west)
    web, shop, annex, stranger = (west.pod(name) for name in ("web", "shop", "annex", "stranger"))
    guest, forger = west.pod("guest"), west.pod("forger")
    stage = Stage(lab, west, mesh, report, web, shop, annex, stranger, size)
    only_web = [str(mesh.authority.identity("web"))]
    skip = {"skip_inbound_ports": [PLAIN], "skip_outbound_ports": [PLAIN]}
    collector = await TraceCollector.start(west)
    stage.collectors.append(collector)
    tracing = collector.settings()
    mesh.join(
        web, "web", intercept=skip, http2=SHORT_LIVED, tracing=tracing, **clusters_story.CLIENT
    )
    mesh.join(
        shop,
        "shop",
        intercept=skip,
        tracing=tracing,
        inbound={"require_identity": True, "allow": {str(HTTP): only_web}},
    )
    mesh.join(annex, "shop")
    mesh.join(guest, "guest")
    # the right name, signed by a root that the shop does not trust
    mesh.join(forger, "web", authority=Authority())
    mesh.service("shop", [shop], {HTTP: "detect", SOCKET: "detect", MAIL: "opaque"})
    mesh.service("stock", [shop, annex], {GRPC: "detect"}, policy=FORGETFUL)
    west.name_host("shop.plain", shop.ipv4)
    stage.sidecars = mesh.sidecars
    world = await clusters_story.build(stage)
    report.step("starting web, WebSocket, mail and gRPC servers")
    await servers(stage)
    await clusters_story.servers(world)
    report.step(
        "issuing certificates, installing the rules, starting the sidecars and the gateways"
    )
    await world.clusters.start()
    return stage, world


async def servers(stage: Stage) -> None:
    """Start the servers."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: stage.server(stage.shop, "web", "::", str(HTTP), port=HTTP))
        nursery.start_soon(
            lambda: stage.server(stage.shop, "web-plain", "::", str(PLAIN), port=PLAIN)
        )
        nursery.start_soon(lambda: stage.server(stage.shop, "chat", str(SOCKET), port=SOCKET))
        nursery.start_soon(lambda: stage.server(stage.shop, "mail", str(MAIL), port=MAIL))
        nursery.start_soon(grpc_server, stage, stage.shop)
        nursery.start_soon(grpc_server, stage, stage.annex)


async def traffic(stage: Stage) -> None:
    """HTTP, WebSocket, SMTP and gRPC, all with the secret in them, while the link of `web` is
    captured.
    """
    report = stage.report
    report.section = "Ordinary programs, through two sidecars: `web` calls `shop`"
    async with Capture(stage.web) as wire:
        answer = await stage.client(stage.web, "get", "shop", HTTP, SECRET)
        held = (
            answer.get("status") == 200
            and answer.get("same") is True
            and SECRET in answer.get("body", "")
        )
        report.prove(
            "HTTP/1.1",
            f"http.client -> http.server, 3 requests on one connection {why(answer, held)}",
            held,
        )
        if shutil.which("curl"):
            done = await stage.web.run(
                ["curl", "-sS", "-m", "10", "-H", f"X-Secret: {SECRET}", f"http://shop:{HTTP}/"]
            )
            held = SECRET in done.text
            report.prove(
                "curl", f"curl -> http.server {'' if held else done.stderr.decode()[:60]}", held
            )
        answer = await stage.client(stage.web, "websocket", "shop", SOCKET, SECRET)
        held = answer.get("echoed") == 50 and answer.get("large") is True
        report.prove("WebSocket", f"50 messages and one of 1 MiB, echoed {why(answer, held)}", held)
        answer = await stage.client(stage.web, "mail", "shop", MAIL, SECRET)
        held = answer.get("refused") == 0 and "error" not in answer
        greeting = (
            f"greeted after {answer.get('greeting_seconds', 0) * 1000:.1f} ms" if held else ""
        )
        report.prove(
            "SMTP",
            f"smtplib -> aiosmtpd, the server speaks first, {greeting} {why(answer, held)}",
            held,
        )
        stage.report.step(
            "gRPC calls of all kinds, balanced over two pods, with deadlines, and without servers"
        )
        await calls(stage)
        control = await stage.client(
            stage.web, "get", "shop.plain", PLAIN, "visible-without-the-mesh"
        )
    on_the_wire(stage, wire, control)


def on_the_wire(stage: Stage, wire: Capture, control: dict[str, Any]) -> None:
    """What the eavesdropper saw."""
    report = stage.report
    report.section = "A listener on the link of `web`"
    verdict = wire.verdict(HTTP, SOCKET, MAIL, GRPC)
    facts = [fact for fact in verdict.facts if fact.version]
    stage.server_names = {
        port: {fact.server_name for fact in wire.verdict(port).facts}
        for port in (HTTP, SOCKET, MAIL, GRPC)
    }
    detail = (
        f"{verdict.flows} connections, {sum(fact.records for fact in facts)} records: TLS 1.3 from"
        " the first byte to the last"
    )
    report.prove(
        "on the wire",
        detail if verdict.ok else "; ".join(verdict.problems) or "no connection was seen",
        verdict.ok,
    )
    terms = {
        "cipher": {fact.cipher for fact in facts},
        "key exchange": {fact.group for fact in facts if "only" not in fact.group},
    }
    for label, values in terms.items():
        report.prove(
            label,
            f"{', '.join(sorted(values)) or 'none'} (read from the hellos on the wire)",
            bool(values),
        )
    hidden = not wire.contains(SECRET.encode())
    seen = wire.contains(b"visible-without-the-mesh")
    report.prove(
        "no clear text",
        (
            "the secret that all clients sent is not in the capture"
            if hidden
            else "the secret IS on the wire"
        ),
        hidden,
    )
    detail = (
        "the same capture shows clear text that was sent without the mesh"
        if seen
        else f"the capture is empty: {control}"
    )
    report.prove("capture works", detail, seen)
    wire.write_pcap(stage.lab.directory / "wire.pcap")


async def large_bodies(stage: Stage) -> None:
    """A large body each way; the sidecars must not grow."""
    report, size = stage.report, stage.size
    report.section = "Large bodies, and the cost of the mesh"
    proxies = [stage.sidecars[name].running() for name in ("web", "shop")]
    before = [proxy.rss() for proxy in proxies]
    for what, key, expected in (("download", "bytes", size), ("upload", "right", True)):
        answer = await stage.client(stage.web, what, "shop", HTTP, str(size))
        held = answer.get("status") == 200 and answer.get(key) == expected
        speed = f"{size / 2**20 / answer['seconds']:.0f} MiB/s" if held else ""
        report.prove(
            f"large {what}",
            f"{size // 2**20} MiB, chunked, unchanged, {speed} {why(answer, held)}",
            held,
        )
    growth = [proxy.rss() - old for proxy, old in zip(proxies, before, strict=True)]
    pairs = zip(("web", "shop"), before, growth, strict=True)
    detail = ", ".join(
        f"{name} {megabytes(old)} {grown / 2**20:+.1f}" for name, old, grown in pairs
    )
    report.prove(
        "memory",
        f"of the sidecars before and after, in MiB: {detail}",
        max(growth) < MEMORY_ALLOWED,
    )


async def intruders(stage: Stage) -> None:
    """Unauthorised clients are not served."""
    stage.report.section = "Intruders"
    address = stage.shop.ipv4
    answer = await stage.client(stage.stranger, "get", address, HTTP, SECRET)
    refused(stage, "clear text", "a pod without a sidecar", answer, stage.stranger)
    forged = Authority()
    certificate, key = (
        stage.stranger.directory / "forged.pem",
        stage.stranger.directory / "forged.key",
    )
    issued = forged.issue(forged.identity("web"))
    certificate.write_bytes(issued.certificate_pem)
    key.write_bytes(issued.key_pem)
    server_name = stage.mesh.authority.identity("shop").sni
    answer = await stage.client(
        stage.stranger, "forged", address, HTTP, server_name, str(certificate), str(key)
    )
    refused(
        stage, "forged certificate", "TLS as `web`, signed by another root", answer, stage.stranger
    )
    forger, guest = (stage.west.pods[name] for name in ("forger", "guest"))
    answer = await stage.client(forger, "get", "shop", HTTP, SECRET)
    refused(stage, "another trust root", "a sidecar that trusts another root", answer, forger)
    answer = await stage.client(guest, "get", "shop", HTTP, SECRET)
    refused(
        stage, "not on the list", "a member of the mesh that is not allowed here", answer, guest
    )


def refused(stage: Stage, label: str, who: str, answer: dict[str, Any], pod: Pod) -> None:
    """The proof holds if the intruder saw an error or a rejecting status, and nothing of the
    shop."""
    status = answer.get("status", 0)
    held = "hello from the shop" not in answer.get("body", "") and (
        status in (403, 502, 503) or "error" in answer
    )
    saw = (
        f"{status} {error_type(answer.get('proxy-status', ''))}"
        if status
        else answer.get("error", "")
    )
    stage.report.prove(label, f"{who}: {saw}{_reason(stage, pod)}", held)


def _reason(stage: Stage, pod: Pod) -> str:
    """What the shop's sidecar logged about a peer."""
    hosts = (f"{pod.ipv4}:", f"[{pod.ipv6}]:")
    for line in reversed(stage.sidecars["shop"].logged()):
        words = line.get("error") or line.get("words") or ""
        if words and str(line.get("peer", "")).startswith(hosts):
            return f'; the log of `shop` says: "{words}"'
    return ""


async def who_was_who(stage: Stage) -> None:
    """Which identities communicated, as the proxy at the other end verified them."""
    report = stage.report
    report.section = "Identities, as the proxies verified and logged them"
    web, shop = (str(stage.mesh.authority.identity(name)) for name in ("web", "shop"))
    for name, port in (("HTTP/1.1", HTTP), ("WebSocket", SOCKET), ("SMTP", MAIL), ("gRPC", GRPC)):
        inbound = await logged(stage.sidecars["shop"], "inbound", port, stage.web)
        callers = {str(line.get("identity", "none")) for line in inbound}
        held = callers == {web} and all(line.get("tls") == "TLSv1.3" for line in inbound)
        terms = {
            f"{line.get('tls')}, {line.get('cipher')}, {line.get('group')}" for line in inbound
        }
        who = " and ".join(sorted(callers)) or "none"
        report.prove(
            f"{name}: from",
            f"{who}, verified by the sidecar of `shop` ({'; '.join(sorted(terms))})",
            held,
        )
        outbound = await logged(stage.sidecars["web"], "outbound", port, stage.web)
        callees = {
            str(value)
            for line in outbound
            for key, value in line.items()
            if key.endswith("identity")
        }
        detail = f"{' and '.join(sorted(callees))}, verified by the sidecar of `web`"
        if outbound and not callees:
            # The outbound log does not name the server: use the wire and the other end's log.
            callees, requested = (
                own_identity(stage.sidecars["shop"]),
                stage.server_names.get(port, set()),
            )
            detail = (
                f"{' and '.join(sorted(callees)) or 'none'}, requested on the wire as"
                f" {' and '.join(sorted(requested)) or 'nothing'}"
            )
            if requested != {SpiffeId.parse(each).sni for each in callees}:
                callees = set()
        report.prove(f"{name}: to", detail, callees == {shop})


def own_identity(sidecar: Sidecar) -> set[str]:
    """The proxy's own identity, from its log."""
    lines = [str(line.get("message", "")) for line in sidecar.logged()]
    return {
        line.removeprefix("identity: ").partition(",")[0]
        for line in lines
        if line.startswith("identity: ")
    }


async def logged(sidecar: Sidecar, direction: str, port: int, peer: Pod) -> list[dict[str, Any]]:
    """A proxy's log lines of finished connections from a pod to a port. Waits for one, since a
    pooled connection stays open for a while.
    """
    found: list[dict[str, Any]] = []
    hosts = (f"{peer.ipv4}:", f"[{peer.ipv6}]:")
    with trio.move_on_after(LOG_PATIENCE):
        while True:
            found = [
                line
                for line in sidecar.logged()
                if line.get("direction") == direction
                and line.get("message") == "connection"
                and str(line.get("destination", "")).endswith(f":{port}")
                and str(line.get("peer", "")).startswith(hosts)
            ]
            if found:
                break
            await trio.sleep(0.1)
    return found


async def latency(stage: Stage) -> None:
    """The latency cost, measured on the same two pods in turn."""
    stage.report.section = "Large bodies, and the cost of the mesh"
    answer = await stage.client(
        stage.web, "latency", stage.shop.ipv4, HTTP, str(PLAIN), str(REQUESTS)
    )
    meshed, plain = answer.get(str(HTTP), []), answer.get(str(PLAIN), [])
    held = len(meshed) == len(plain) == REQUESTS
    stage.report.prove("latency", latency_line(meshed, plain) if held else why(answer, held), held)


def explain_how_to_enter(stage: Stage) -> None:
    """Print how to use the running mesh."""
    pid, say = outside_pid(), stage.report.say
    if pid is None:
        return
    say("The pods keep running until you press Ctrl-C. In another terminal, as the same user:")
    say()
    for name in ("web", "shop", "annex", "stranger"):
        say(f"  {name:<9} {stage.west.pods[name].enter_command(pid)}")
    say(f"""
and there, for example:
  in web        curl -v http://shop:{HTTP}/            through both sidecars
                curl -v http://shop.plain:{PLAIN}/      without them
                {sys.executable} -m lab.apps.client grpc-spread stock {GRPC} 600
                                                     gRPC calls of one connection, on two pods
                curl http://localhost:4191/metrics   what the sidecar counts
                nft list table inet isthmus          the interception rules
                tcpdump -ni eth0 -X                  what an eavesdropper on the wire sees
  in stranger   curl -v http://{stage.shop.ipv4}:{HTTP}/      a pod without an identity is refused
  anywhere      ls {stage.lab.directory}/west/*/sidecar   configuration, certificates, directory
                tcpdump -nr {stage.lab.directory}/wire.pcap     the capture""")
