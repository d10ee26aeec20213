"""The directory changes, breaks and vanishes under load.

Rules: a change takes effect without a failed request. A broken file changes nothing and is reported
once, with its path."""

from __future__ import annotations

from typing import Any

import pytest

from lab.load import Load
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import WEB, Pair, counted, curl, eventually, logged, prepare, web_server

pytestmark = pytest.mark.lab

HELLO = b"hello from the shop"


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        pair = prepare(
            laboratory.lab,
            {WEB: "detect"},
            web={"log": {"access": False}},
            shop={"log": {"access": False}},
        )
        pair.service.traits["policy"] = {
            "balancing": {"decay": "1s"}
        }  # a pod that was suspended for a moment soon gets its share again
        other = pair.cluster.pod("other")
        pair.mesh.join(other)
        for pod in (pair.shop, other):
            await web_server(pod)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


async def reloads(sidecar: Sidecar, result: str = "ok") -> float:
    return await counted(sidecar, "isthmus_directory_reloads_total", result=result)


async def take(sidecar: Sidecar, document: dict[str, Any]) -> None:
    before = await reloads(sidecar)
    sidecar.write_directory(document)

    async def seen() -> bool:
        return await reloads(sidecar) > before

    await eventually(seen, "the directory is loaded")


def document(pair: Pair, *names: str) -> dict[str, Any]:
    """The directory with these pods behind the service `shop`."""
    made = pair.mesh.document()
    pods = [pair.cluster.pods[name] for name in names]
    endpoints = [
        {"address": host, "identity": str(pair.mesh.sidecars[pod.name].identity)}
        for pod in pods
        for host in (pod.ipv4, pod.ipv6)
    ]
    made["services"][0]["endpoints"] = endpoints
    return made


async def passed(pair: Pair, name: str) -> float:
    return await counted(
        pair.mesh.sidecars[name], "isthmus_responses_total", direction="inbound", status_class="2xx"
    )


async def test_an_endpoint_moves_under_load_without_a_failed_request(pair: Pair) -> None:
    async with Load(pair.web, pair.service.ipv4, WEB) as load:
        await load.more(100)
        assert await passed(pair, "other") == 0
        await take(pair.near, document(pair, "other"))
        await load.settle()
        moved = await passed(pair, "shop")
        await load.more(200)
        assert await passed(pair, "shop") == moved
        assert await passed(pair, "other") >= 200
        await take(pair.near, document(pair, "shop", "other"))
        await eventually(lambda: both_have_their_share(pair, load), "both pods have their share")
        await take(pair.near, pair.mesh.document())
        await load.more(100)
    assert load.bad == {}
    assert load.connections == 6  # clients keep their connections; each request is routed anew


async def both_have_their_share(pair: Pair, load: Load) -> bool:
    """Of the next three hundred. A pod that was slow just now, as on a busy machine, gets fewer
    requests for a while."""
    before = await passed(pair, "shop"), await passed(pair, "other")
    await load.more(300)
    after = await passed(pair, "shop"), await passed(pair, "other")
    return min(new - old for old, new in zip(before, after, strict=True)) > 60


@pytest.mark.real
async def test_a_service_without_endpoints_is_answered_503(pair: Pair) -> None:
    await take(pair.near, document(pair))
    seen = await curl(pair.web, f"http://shop:{WEB}/")
    assert (seen.status, seen.error) == (503, "destination_unavailable")
    await take(pair.near, pair.mesh.document())
    assert HELLO in (await curl(pair.web, f"http://shop:{WEB}/")).body


BROKEN = {
    "half a file": (b"services: [{name: 'half a", "directory.yaml"),
    "mistakes": (
        (
            b"services:\n- name: Shop\n  ports: [{port: 99999}]\n  endpoints: [{address: nowhere,"
            b" identity: bob}]\n"
        ),
        "services[0].endpoints[0].address",
    ),
    "not text": (b"\xff\xfe\x00", "directory.yaml"),
    "empty": (b"", "directory.yaml"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_file_keeps_the_old_directory_and_is_reported_once_with_its_path(
    pair: Pair, name: str
) -> None:
    data, words = BROKEN[name]
    good, errors = pair.near.directory_file.read_bytes(), await reloads(pair.near, "error")

    async def seen() -> bool:
        return await reloads(pair.near, "error") > errors

    async with Load(pair.web, pair.service.ipv4, WEB, clients=2) as load:
        pair.near.write(pair.near.directory_file, data)
        await eventually(seen, "the broken file is counted")
        await load.more(200)  # many reads later
        assert await reloads(pair.near, "error") == errors + 1
        pair.near.write(pair.near.directory_file, good)
        await load.more(50)
    assert load.bad == {}
    line = await logged(pair.near, words, level="error")
    assert str(pair.near.directory_file) in line["message"]
    await take(pair.near, document(pair, "shop", "other"))
    await take(pair.near, pair.mesh.document())


async def test_a_file_that_vanishes_changes_nothing(pair: Pair) -> None:
    good, errors = pair.near.directory_file.read_bytes(), await reloads(pair.near, "error")

    async def seen() -> bool:
        return await reloads(pair.near, "error") > errors

    async with Load(pair.web, pair.service.ipv4, WEB, clients=2) as load:
        pair.near.directory_file.unlink()
        await eventually(seen, "the missing file is counted")
        await load.more(100)
        pair.near.write(pair.near.directory_file, good)
    assert load.bad == {}
