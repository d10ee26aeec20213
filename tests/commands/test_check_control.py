"""`isthmus check` with a directory from the control plane: it connects as the proxy does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.commands.checks import Result, check_control
from proxy.config.schema import Config
from tests.commands.probed import configuration
from tests.kit.channel import CONTROL, DOMAIN, LOOPBACK, WEB, Workshop, until
from tests.kit.ports import free_port


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    yield made
    made.close()


def settings(folder: Path, port: int, **more: str) -> Config:
    control = {"address": f"{LOOPBACK}:{port}", "identity": str(CONTROL), **more}
    identity = {
        "certificate": str(folder / "certificate.pem"),
        "key": str(folder / "key.pem"),
        "roots": [str(folder / "roots.pem")],
    }
    config: Config = configuration(
        folder, trust_domain=DOMAIN, identity=identity, directory={"control": control}
    )
    return config


async def checked(workshop: Workshop, config: Config) -> Result:
    (result,) = await check_control(config, workshop.identity(WEB), 3.0)
    assert result.name == "directory"
    return result


async def test_a_replica_that_answers_is_named(workshop: Workshop) -> None:
    async with workshop.control() as (channel, port):
        result = await checked(workshop, settings(workshop.folder, port))
        assert (result.status, result.what) == (
            "ok",
            f"the control plane at {LOOPBACK}:{port} answers, replica replica",
        )
        await until(lambda: not channel.connections, "the connection is closed")


async def test_a_port_without_a_server_is_a_failure(workshop: Workshop) -> None:
    port = free_port()
    result = await checked(workshop, settings(workshop.folder, port))
    assert result.status == "failed"
    assert f"{LOOPBACK}:{port} cannot be used" in result.what
    assert "refused" in result.what
    assert "directory.control" in result.remedy


async def test_a_server_with_another_identity_is_a_failure_that_names_both(
    workshop: Workshop,
) -> None:
    async def serve(stream: object) -> None:
        raise AssertionError(f"{stream} was accepted")

    async with workshop.impostor(serve, WEB) as port:
        result = await checked(workshop, settings(workshop.folder, port))
    assert result.status == "failed"
    assert str(WEB) in result.what
    assert str(CONTROL) in result.what


async def test_without_a_certificate_it_is_not_tried(tmp_path: Path) -> None:
    (result,) = await check_control(settings(tmp_path, 1), None, 3.0)
    assert result.status == "skipped"


async def test_a_directory_from_a_file_is_not_its_business(tmp_path: Path) -> None:
    config = configuration(tmp_path, directory={"file": str(tmp_path / "directory.yaml")})
    assert await check_control(config, None, 3.0) == []


async def test_a_name_that_no_resolver_takes_is_a_failure_and_no_crash(workshop: Workshop) -> None:
    """Its encoding for DNS raises UnicodeError, which is no OSError."""
    config = settings(workshop.folder, 1, address=f"{'a' * 64}.example:4190")
    result = await checked(workshop, config)
    assert result.status == "failed"
