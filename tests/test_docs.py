"""The documents are true as far as a machine can check. The tables of errors and metrics have the
same rows as the code. Links have targets. Examples of configurations are valid. Pictures and
manifests can be parsed. No document names a path of the machine that it was written on."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from control.app import ControlConfig
from control.config import Settings
from perf import pair
from proxy import directory, errors
from proxy.config import load as config
from proxy.config.schema import Config
from proxy.directory.clusters import GATEWAY_PORT
from proxy.enrollment.messages import AUDIENCE
from proxy.errors import ErrorAnswer
from proxy.intercept.nftables import InterceptSettings
from proxy.settings.units import GrpcCode
from proxy.telemetry import metrics
from tests.kit.documents import ROOT, table

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PICTURES = sorted((ROOT / "docs").rglob("*.svg"))
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").rglob("*.yaml"))
EXAMPLES = sorted((ROOT / "deploy").rglob("*.yaml"))
MODULES = [
    file
    for folder in ("control", "lab", "loopguard", "perf", "proxy", "tests", "tracing")
    for file in (ROOT / folder).rglob("*.py")
] + [ROOT / "setup.py"]
PACKAGING = [ROOT / "Dockerfile", ROOT / ".dockerignore"]

# Home directories, temporary ones, and the usual places of checkouts on builders.
_MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|workspace|tmp|builds)/[\w.-]+")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MODULE = re.compile(r"(?<![\w./*-])(?:\.\./)*((?:[\w.-]+/)*\w+\.py)\b")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def answers() -> Iterator[ErrorAnswer]:
    """Every row that errors.describe can return."""
    yield from errors.TABLE.values()
    yield from errors._CONNECT.values()
    yield from errors._TLS.values()
    yield from (errors._CONNECT_OTHER, errors._TLS_OTHER, errors.INTERNAL)


def families() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, type, labels) of each metric of this project, as a scraper sees it."""
    for family in metrics.Metrics().families.declared:
        yield family.name, family.kind, family.labels


def anchors(path: Path) -> set[str]:
    """The anchors of the document, for the part of a link after #: its headings, as they become
    anchors."""
    found = set()
    text = _FENCE.sub("", path.read_text("utf-8"))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        found.add("".join(kept).replace(" ", "-"))
    return found


def fenced(path: Path, language: str) -> Iterator[str]:
    return (text for kind, text in _FENCE.findall(path.read_text("utf-8")) if kind == language)


def documents_of(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def manifests(kind: str) -> Iterator[dict[str, Any]]:
    return (
        document
        for path in MANIFESTS
        for document in documents_of(path)
        if document["kind"] == kind
    )


def test_there_are_documents_to_check() -> None:
    assert len(DOCUMENTS) > 15
    assert PICTURES
    assert MANIFESTS


def test_the_page_of_errors_has_every_row_of_the_code_and_no_other() -> None:
    documented = [(row[0], row[1], row[2], row[3]) for row in table("errors.md", "errors")]
    real = {
        (
            str(answer.status),
            GrpcCode(answer.grpc_status).name.upper(),
            answer.proxy_status,
            answer.reason,
        )
        for answer in answers()
    }
    assert set(documented) == real
    assert len(documented) == len(set(documented)), "a row occurs twice"


def test_each_row_of_the_errors_page_has_a_meaning_and_a_remedy() -> None:
    assert all(len(row) == 6 and all(row) for row in table("errors.md", "errors"))


def test_the_page_of_metrics_has_every_family_with_its_type_and_labels_and_no_other() -> None:
    rows = table("metrics.md", "metrics")
    documented = {
        (
            row[0],
            row[1],
            () if row[2] == "none" else tuple(label.strip(" `") for label in row[2].split(",")),
        )
        for row in rows
    }
    assert documented == set(families())


def test_metrics_that_documents_name_exist() -> None:
    known = {family for family, _, _ in families()}
    known |= {
        f"{family}{end}"
        for family, kind, _ in families()
        if kind == "histogram"
        for end in ("_bucket", "_sum", "_count")
    }
    wrong = [
        f"{name(path)}: {found}"
        for path in DOCUMENTS
        # tests/control/test_app.py checks those of the control plane.
        for found in re.findall(r"\bisthmus_(?!control_)[a-z_]+\b", path.read_text("utf-8"))
        if found not in known
    ]
    assert not wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for link in _LINK.findall(_FENCE.sub("", path.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists():
            wrong.append(f"{link}: there is no such file")
        elif anchor and anchor not in anchors(file):
            wrong.append(f"{link}: there is no such heading")
    assert not wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_modules_that_documents_name_exist(path: Path) -> None:
    """A name may omit the first folders: net/relay.py, or test_relay.py beside another test."""
    parts = [file.relative_to(ROOT).parts for file in MODULES]
    known = {"/".join(part[start:]) for part in parts for start in range(len(part))}
    named = set(_MODULE.findall(_FENCE.sub("", path.read_text("utf-8"))))
    assert not named - known


def test_packages_describe_their_modules() -> None:
    """The docstring of a package has each of its modules and no other."""
    wrong = []
    for package in ("control", "loopguard", "proxy", "tracing"):
        for path in (ROOT / package).rglob("__init__.py"):
            described = re.findall(r"^ *(\w+\.py)(?: |$)", path.read_text("utf-8"), re.MULTILINE)
            found = {module.name for module in path.parent.glob("*.py")} - {"__init__.py"}
            if len(described) != len(set(described)) or set(described) != found:
                wrong.append(f"{name(path)}: {sorted(found.symmetric_difference(described))}")
    assert not wrong


@pytest.mark.parametrize("path", [*DOCUMENTS, *PICTURES, *EXAMPLES, *PACKAGING], ids=name)
def test_no_place_on_a_builders_machine_is_named(path: Path) -> None:
    assert not _MACHINE.findall(path.read_text("utf-8"))


@pytest.mark.parametrize("path", PICTURES, ids=name)
def test_pictures_are_well_formed_and_have_a_text_description(path: Path) -> None:
    picture = ET.fromstring(path.read_text("utf-8"))  # noqa: S314  # our own file
    space = "{http://www.w3.org/2000/svg}"
    assert picture.tag == f"{space}svg"
    assert all((picture.findtext(f"{space}{part}") or "").strip() for part in ("title", "desc"))


def test_the_configurations_of_the_quickstart_are_good(tmp_path: Path) -> None:
    seen = []
    for text in fenced(ROOT / "docs" / "quickstart.md", "yaml"):
        file = tmp_path / text.splitlines()[0].removeprefix("# ")
        file.write_text(text)
        seen.append(file.name)
        if file.name == "directory.yaml":
            assert directory.parse(text, file.name).services
        else:
            config.load(file, {})
    assert sorted(seen) == ["back.yaml", "directory.yaml", "front.yaml"]


def test_the_directories_that_documents_show_are_good() -> None:
    shown = [
        (path, text)
        for path in DOCUMENTS
        for text in fenced(path, "yaml")
        if "directory.yaml" in text.splitlines()[0]
    ]
    assert len(shown) >= 4
    for path, text in shown:
        assert directory.parse(text, name(path)) is not None


def test_the_configuration_of_the_manifests_is_good(tmp_path: Path) -> None:
    found = next(
        found for found in manifests("ConfigMap") if found["metadata"]["name"] == "isthmus"
    )
    (tmp_path / "isthmus.yaml").write_text(str(found["data"]["isthmus.yaml"]))
    loaded = config.load(tmp_path / "isthmus.yaml", {})
    assert loaded.directory is not None
    assert loaded.directory.control is not None
    (service,) = (
        one for one in manifests("Service") if one["metadata"]["name"] == "isthmus-control"
    )
    ports: list[dict[str, Any]] = service["spec"]["ports"]
    account = deployment("isthmus-control")["serviceAccountName"]
    assert loaded.identity is not None
    for name, control in (
        ("directory", loaded.directory.control),
        ("issuing", loaded.identity.control),
    ):
        (port,) = (one["port"] for one in ports if one["name"] == name)
        assert control is not None
        assert control.address == f"isthmus-control.isthmus.svc:{port}"
        assert control.identity == f"spiffe://cluster.local/ns/isthmus/sa/{account}"


def test_the_pod_of_the_manifests_has_the_token_and_the_roots_of_its_configuration() -> None:
    (found,) = manifests("Pod")
    spec: dict[str, list[dict[str, Any]]] = found["spec"]
    (settings,) = (
        yaml.safe_load(one["data"]["isthmus.yaml"])["identity"]
        for one in manifests("ConfigMap")
        if one["metadata"]["name"] == "isthmus"
    )
    volumes = {one["name"]: one for one in spec["volumes"]}
    (source,) = volumes["token"]["projected"]["sources"]
    token = source["serviceAccountToken"]
    assert token["audience"] == AUDIENCE
    mounts = {one["name"]: one["mountPath"] for one in spec["initContainers"][1]["volumeMounts"]}
    assert settings["control"]["token"] == f"{mounts['token']}/{token['path']}"
    assert settings["roots"] == [f"{mounts['roots']}/roots.pem"]
    (control,) = deployment("isthmus-control")["containers"]
    mounted = {one["name"]: one["mountPath"] for one in control["volumeMounts"]}
    assert f"--issuer={mounted['issuer']}" in control["args"]
    assert f"--roots={mounted['roots']}/roots.pem" in control["args"]


def test_the_pod_of_the_manifests_fits_the_proxy() -> None:
    (found,) = manifests("Pod")
    intercept, sidecar = found["spec"]["initContainers"]
    settings = InterceptSettings()
    assert sidecar["securityContext"]["runAsUser"] == settings.uid
    assert {port["containerPort"] for port in sidecar["ports"]} == {settings.admin_port}
    assert intercept["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert {variable["name"] for variable in sidecar["env"]} == {
        *config.DOWNWARD.values(),
        "POD_IPS",
        "CONTAINER_NAME",
    }


def test_the_gateway_of_the_manifests_fits_the_proxy() -> None:
    pod = deployment("gateway")
    (gateway,) = pod["containers"]
    assert gateway["args"][:2] == ["run", "--gateway"]
    assert {port["containerPort"] for port in gateway["ports"]} == {
        GATEWAY_PORT,
        InterceptSettings().admin_port,
    }
    assert {variable["name"] for variable in gateway["env"]} == {
        *config.DOWNWARD.values(),
        "POD_IPS",
        "CONTAINER_NAME",
    }
    assert pod["terminationGracePeriodSeconds"] > Config().shutdown.grace
    assert {mount["name"] for mount in gateway["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_the_control_plane_of_the_manifests_fits_its_settings() -> None:
    pod, settings = deployment("isthmus-control"), Settings()
    (control,) = pod["containers"]
    assert control["args"][0] == "control"
    _, port = ControlConfig().admin or ("", 0)
    assert [found["containerPort"] for found in control["ports"]] == [4190, port, 4192]
    assert pod["terminationGracePeriodSeconds"] > settings.lease.release_timeout
    (role,) = (
        found for found in manifests("Role") if found["metadata"]["name"] == "isthmus-control"
    )
    rules: list[dict[str, Any]] = role["rules"]
    assert [rule["resourceNames"] for rule in rules if "resourceNames" in rule] == [
        [settings.lease.name]
    ]


def deployment(called: str) -> dict[str, Any]:
    """The pod of a Deployment."""
    (found,) = (one for one in manifests("Deployment") if one["metadata"]["name"] == called)
    pod: dict[str, Any] = found["spec"]["template"]["spec"]
    return pod


def test_the_image_runs_as_the_user_that_the_redirection_exempts() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == [
        f"{InterceptSettings().uid}:{InterceptSettings().uid}"
    ]


def test_proxies_are_measured_with_the_allocator_of_the_image() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    (allocator,) = re.findall(r"^ENV .*\bPYTHONMALLOC=(\S+)", text, re.MULTILINE)
    assert allocator == pair.IMAGE_ENVIRONMENT["PYTHONMALLOC"]


def test_the_base_of_the_image_is_pinned_by_digest() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    (pinned,) = re.findall(r"^ARG PYTHON=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"3\.\d+-slim-trixie@sha256:[0-9a-f]{64}", pinned)
    assert {line.split()[1] for line in text.splitlines() if line.startswith("FROM ")} == {
        "python:${PYTHON}"
    }


@pytest.mark.parametrize(
    ("said", "code", "pinned"),
    [("sha256:" + "ab" * 32, 0, "sha256:" + "ab" * 32), ("sha256:abc", 1, None), ("", 1, None)],
    ids=["a digest", "half of one", "nothing"],
)
def test_the_base_is_pinned_to_the_digest_of_the_registry(
    tmp_path: Path, said: str, code: int, pinned: str | None
) -> None:
    file = tmp_path / "Dockerfile"
    before = (ROOT / "Dockerfile").read_text("utf-8")
    file.write_text(before)
    registry = tmp_path / "registry"
    registry.write_text(f'#!/bin/sh\n[ "$1" = python:3.13-slim-trixie ] && echo {said}\n')
    registry.chmod(0o755)
    environ = {"PATH": "/usr/bin:/bin", "PIN_BASE_INSPECT": str(registry)}
    done = subprocess.run(
        [ROOT / "scripts" / "pin-base", file],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    after = (
        re.sub(r"^(ARG PYTHON=[^@]*@).*$", rf"\g<1>{pinned}", before, flags=re.MULTILINE)
        if pinned
        else before
    )
    assert file.read_text() == after


def test_the_image_is_built_of_files_that_are_there_and_that_the_builder_gets() -> None:
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", "")
    copied = {
        source
        for line in text.splitlines()
        if line.startswith("COPY ") and "--from=" not in line
        for source in shlex.split(line)[1:-1]
    }
    assert copied == allowed
    assert all((ROOT / path).exists() for path in allowed)
    assert not {"lab", "tests"} & allowed


def test_without_the_laboratory_the_demonstration_says_so_in_one_line() -> None:
    without = (
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name: None if name =="
        " 'lab' else find(name)"
    )
    program = f"{without}\nimport sys; from proxy import cli; sys.exit(cli.main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 69
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "checkout" in done.stderr
