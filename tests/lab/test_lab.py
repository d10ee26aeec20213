"""Clusters, pods, programs, faults and captures.

Rules: everything is real. Every test gets its own laboratory, and checks after its end that nothing
is left."""

from pathlib import Path

import pytest
import trio

from lab import faults
from lab.capture import Capture
from lab.cluster import Cluster, Lab
from lab.pod import APP, OPERATOR, SIDECAR, User
from lab.process import LabError, Process
from lab.sandbox import rootless

pytestmark = pytest.mark.lab

ECHO = """
import socketserver, sys
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("version", [4, 6])
async def test_pods_of_a_cluster_reach_each_other_by_address_and_name(
    west: Cluster, version: int
) -> None:
    a, b = west.pod("a"), west.pod("b")
    listener = await b.listen(80, version)
    stream = await a.connect(b.address(version), 80)
    accepted = await listener.accept()
    await accepted.send_all(b"hello")
    assert await stream.receive_some() == b"hello"
    await accepted.aclose()
    found = await a.run_python(
        "import socket; print(sorted({entry[4][0] for entry in socket.getaddrinfo('b', 80)}))"
    )
    assert found.text.strip() == str(sorted([b.ipv4, b.ipv6]))


@pytest.mark.skipif(rootless(), reason="one user id only")
@pytest.mark.parametrize(
    ("user", "uid"), [(APP, 65534), (SIDECAR, 2102), (User(uid=1234), 1234), (OPERATOR, 0)]
)
async def test_programs_run_as_the_right_user(west: Cluster, user: User, uid: int) -> None:
    done = await west.pod("a").run(["id", "-u"], user=user)
    assert done.text.strip() == str(uid)


async def test_a_program_that_refuses_root_runs_as_another_user(west: Cluster) -> None:
    done = await west.pod("a").run(["id", "-u"], user=User(never_root=True))
    assert done.text.strip() != "0"


async def test_a_program_that_ends_before_it_listens_is_an_error_with_its_output(
    west: Cluster,
) -> None:
    with pytest.raises(
        LabError,
        match=(
            r"a/broken ended \(return code 3\) before it listened on port 80(.|\n)*the last words"
        ),
    ):
        await west.pod("a").start("broken", ["sh", "-c", "echo the last words; exit 3"], port=80)


async def test_a_program_that_never_gets_ready_is_an_error_after_its_deadline(
    west: Cluster,
) -> None:
    sleeper = await west.pod("a").start("sleeper", ["sleep", "60"])
    with pytest.raises(LabError, match=r"did not listen on port 80 within 0\.1 s"):
        await west.pods["a"].wait_port(sleeper, 80, timeout=0.1)
    with pytest.raises(LabError, match=r"did not write a line with 'ready' within 0\.1 s"):
        await sleeper.wait_line("ready", timeout=0.1)


async def test_output_is_kept_in_a_file_and_its_end_in_memory(west: Cluster) -> None:
    noisy = await west.pod("a").start("noisy", ["sh", "-c", "seq 1 5000; echo done"])
    assert await noisy.wait_line("done") == "done"
    assert noisy.output.count == 5001
    assert len(noisy.output.lines) < 5001
    assert (await trio.Path(noisy.output.path).read_text()).startswith("1\n2\n")


async def test_restart_kill_and_pause(west: Cluster) -> None:
    a, b = west.pod("a"), west.pod("b")
    echo = await b.python("echo", ECHO, "80", port=80)
    stream = await a.connect(b.ipv4, 80)
    with faults.paused(echo):
        await stream.send_all(b"anybody there?")
        with trio.move_on_after(0.1) as silence:
            await stream.receive_some()
        assert silence.cancelled_caught
    with trio.fail_after(30):
        assert await stream.receive_some() == b"anybody there?"
    echo.kill()
    assert await echo.wait() == -9
    with pytest.raises(OSError):
        await a.connect(b.ipv4, 80)
    assert (await b.restart(echo, port=80)).alive
    await a.connect(b.ipv4, 80)


async def test_a_cut_link_loses_packets_until_it_is_mended(west: Cluster) -> None:
    a, b = west.pod("a"), west.pod("b")
    await b.python("echo", ECHO, "80", port=80)
    stream = await a.connect(b.ipv4, 80)
    with faults.link_cut(b):
        await stream.send_all(b"hello")
        with trio.move_on_after(0.2) as silence:
            await stream.receive_some()
        assert silence.cancelled_caught
    with trio.fail_after(60):
        assert await stream.receive_some() == b"hello"


async def test_a_capture_sees_clear_text_and_reports_that_it_is_not_tls(
    west: Cluster, tmp_path: Path
) -> None:
    a, b = west.pod("a"), west.pod("b")
    await b.python("echo", ECHO, "80", port=80)
    async with Capture(a) as wire:
        stream = await a.connect(b.ipv4, 80)
        await stream.send_all(b"a needle in the hay")
        assert await stream.receive_some() == b"a needle in the hay"
        await stream.aclose()
    assert wire.contains(b"needle")
    assert not wire.contains(b"something else")
    verdict = wire.verdict(80)
    assert verdict.flows == 1
    assert "not TLS" in verdict.problems[0]
    wire.write_pcap(tmp_path / "wire.pcap")
    assert (await trio.Path(tmp_path / "wire.pcap").stat()).st_size > wire.kept_bytes


async def test_an_empty_or_lossy_capture_proves_nothing(west: Cluster) -> None:
    a, b = west.pod("a"), west.pod("b")
    async with Capture(a) as nothing:
        pass
    assert not nothing.verdict().ok
    await b.listen(80)
    async with Capture(a, max_bytes=100) as small:
        await a.connect(b.ipv4, 80)
    assert small.dropped > 0
    assert not small.verdict(80).ok
    assert "lost" in small.verdict(80).problems[0]


async def test_two_laboratories_in_one_sandbox_do_not_meet(lab: Lab, west: Cluster) -> None:
    west.pod("a")
    async with Lab() as second:
        other = second.cluster("west").pod("a")
        assert other.netns != west.pods["a"].netns


async def test_nothing_is_left_when_a_laboratory_ends(lab: Lab) -> None:
    def traces() -> set[str]:
        return {
            str(path)
            for directory in ("/run/netns", "/run/isthmus-lab")
            for path in Path(directory).iterdir()
        }

    async def fail() -> None:
        async with Lab() as doomed:
            pod = doomed.cluster("doomed").pod("a")
            sleepers.append(await pod.start("stubborn", ["sleep", "600"]))
            assert traces() != before
            raise ZeroDivisionError

    sleepers: list[Process] = []
    before = traces()
    with pytest.raises(ZeroDivisionError):
        await fail()
    assert traces() == before
    assert not sleepers[0].alive
