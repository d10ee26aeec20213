"""The image that ships, built by the steps of its Dockerfile: its metadata, and what runs in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.kube import dockerfile
from lab.kube.catalogue import ISTHMUS
from lab.kube.cluster import Cluster
from tests.kube.kit import inside

ROOT = Path(__file__).parent.parent.parent

POD = f"""
apiVersion: v1
kind: Pod
metadata: {{name: image}}
spec:
  containers:
    - name: isthmus
      image: {ISTHMUS}
      command: [sleep, "3600"]
      securityContext: {{runAsNonRoot: true, readOnlyRootFilesystem: true, allowPrivilegeEscalation: false}}
"""
# A program in the image reports which library does TLS, and which modules of the list in
# pyproject.toml are not compiled.
ASKED = """
import importlib, json, os, sys
from OpenSSL import SSL
modules = json.loads(sys.argv[1])
python = [name for name in modules if not importlib.import_module(name).__file__.endswith(".so")]
tls = SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()
print(json.dumps({"tls": tls, "python": python, "uid": os.getuid(), "path": os.environ["PATH"]}))
"""


def compiled_modules() -> list[str]:
    import tomllib

    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["isthmus"]["compiled"]
    return [file.removesuffix(".py").replace("/", ".") for file in files]


async def test_what_runs_in_the_image_is_compiled_and_on_aws_lc(
    west: Cluster, namespace: str
) -> None:
    await west.apply(POD, namespace)
    await west.wait("--namespace", namespace, "pod/image", "--for=condition=Ready")
    modules = json.dumps(compiled_modules())
    found = json.loads(
        await inside(west, namespace, "pod/image", "/opt/isthmus/bin/python", "-c", ASKED, modules)
    )
    assert len(compiled_modules()) > 40
    assert found["python"] == []
    assert "AWS-LC" in found["tls"]
    assert found["uid"] == 2102
    assert found["path"].startswith("/opt/isthmus/bin:")
    assert "usage: isthmus" in await inside(west, namespace, "pod/image", "isthmus", "--help")
    assert "nftables" in await inside(west, namespace, "pod/image", "nft", "--version")
    # The compilers have stayed in their stage.
    for program in ("gcc", "cargo", "cmake"):
        assert "not found" in await inside(
            west, namespace, "pod/image", "sh", "-c", f"{program} --version", check=False
        )


@pytest.mark.own_cluster
async def test_the_images_configuration_is_that_of_the_dockerfile(west: Cluster) -> None:
    steps = {
        step.name: step for step in dockerfile.stages((ROOT / "Dockerfile").read_text())[-1].steps
    }
    config = json.loads((await west.enter("crictl", "inspecti", ISTHMUS)).stdout)["info"][
        "imageSpec"
    ]["config"]
    assert config["User"] == steps["USER"].text
    assert config["StopSignal"] == steps["STOPSIGNAL"].text
    assert config["WorkingDir"] == steps["WORKDIR"].text
    assert config["Entrypoint"] == dockerfile.arguments(steps["ENTRYPOINT"]) == ["isthmus"]
    assert config["Cmd"] == dockerfile.arguments(steps["CMD"]) == ["run"]
    assert set(config["ExposedPorts"]) == {f"{port}/tcp" for port in steps["EXPOSE"].text.split()}
    assert config["Labels"] == dockerfile.pairs(steps["LABEL"], {})
