"""The resource: who owns a pod and what its service is called, by labels and by name; changes at
run time; problems are reported once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tracing.resource import About, Resource
from tracing.workload import owner, service

REPLICA = {"pod-template-hash": "7d4b9c6f5d"}
SET = {
    "statefulset.kubernetes.io/pod-name": "db-0",
    "controller-revision-hash": "db-5f6d",
    "apps.kubernetes.io/pod-index": "0",
}
DEPLOYMENT = {"k8s.deployment.name": "web", "k8s.replicaset.name": "web-7d4b9c6f5d"}


@pytest.mark.parametrize(
    ("name", "labels", "found"),
    [
        ("web-7d4b9c6f5d-x2x9k", REPLICA, DEPLOYMENT),
        (
            "a-b-c-7d4b9c6f5d-x2x9k",
            REPLICA,
            {"k8s.deployment.name": "a-b-c", "k8s.replicaset.name": "a-b-c-7d4b9c6f5d"},
        ),
        ("renamed", REPLICA, {}),
        ("db-0", SET, {"k8s.statefulset.name": "db"}),
        ("agent-8kq2z", {"controller-revision-hash": "6b5f"}, {"k8s.daemonset.name": "agent"}),
        (
            "report-28371960-k4m2c",
            {"job-name": "report-28371960"},
            {"k8s.job.name": "report-28371960", "k8s.cronjob.name": "report"},
        ),
        ("once-k4m2c", {"batch.kubernetes.io/job-name": "once"}, {"k8s.job.name": "once"}),
        ("web-7d4b9c6f5d-x2x9k", {}, DEPLOYMENT),
        ("db-12", {"app": "db"}, {"k8s.statefulset.name": "db"}),
        ("web", {}, {}),
        ("web-1a2b3c4d5e-aaaaa", {}, {}),  # the generated parts have no vowels
        ("", {}, {}),
    ],
)
def test_the_owner_is_read_from_labels_or_from_the_name(
    name: str, labels: dict[str, str], found: dict[str, str]
) -> None:
    assert owner(name, labels) == found


INSTANCE = {
    "k8s.pod.label.app.kubernetes.io/instance": "release",
    "k8s.pod.label.app.kubernetes.io/version": "3",
}


@pytest.mark.parametrize(
    ("attributes", "labels", "name"),
    [
        (
            {"k8s.pod.annotation.resource.opentelemetry.io/service.name": "said", **DEPLOYMENT},
            True,
            "said",
        ),
        ({**INSTANCE, **DEPLOYMENT}, True, "release"),
        ({**INSTANCE, **DEPLOYMENT}, False, "web"),
        ({"k8s.statefulset.name": "db", "k8s.pod.name": "db-0"}, False, "db"),
        ({"k8s.job.name": "r-1", "k8s.cronjob.name": "r"}, False, "r"),
        ({"k8s.pod.name": "bare", "k8s.container.name": "isthmus"}, False, "bare"),
        ({}, False, "unknown_service:isthmus"),
    ],
)
def test_the_service_is_named_in_the_order_of_the_conventions(
    attributes: dict[str, str], labels: bool, name: str
) -> None:
    assert service(attributes, labels=labels)["service.name"] == name


def attributes(**about: Any) -> dict[str, str | int]:
    environ = {
        "POD_NAME": "web-7d4b9c6f5d-x2x9k",
        "POD_NAMESPACE": "shop",
        "NODE_NAME": "n1",
        "POD_UID": "u",
        "POD_IP": "10.0.0.1",
    }
    return dict(Resource(About(environ, **about), print).attributes())


def test_everything_that_the_downward_api_says_is_there() -> None:
    found = attributes(cluster="east", version="9")
    expected = {
        "k8s.pod.name": "web-7d4b9c6f5d-x2x9k", "k8s.namespace.name": "shop", "k8s.node.name": "n1", "k8s.pod.uid": "u",
        "k8s.pod.ip": "10.0.0.1", "k8s.cluster.name": "east", "service.name": "web", "service.namespace": "shop",
        "service.instance.id": "shop.web-7d4b9c6f5d-x2x9k", "telemetry.distro.name": "isthmus", "telemetry.distro.version": "9",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert {
        "host.name",
        "host.arch",
        "process.pid",
        "process.executable.name",
        "process.runtime.version",
    } <= set(found)


def test_what_was_configured_wins_over_what_was_found() -> None:
    found = attributes(
        given={"k8s.node.name": "mine", "team": "a", "service.name": "b"}, service_name="c"
    )
    assert (found["k8s.node.name"], found["team"], found["service.name"]) == ("mine", "a", "c")


def test_labels_that_change_are_seen_and_what_cannot_be_read_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    resource = Resource(About({"POD_NAME": "a"}, directory=tmp_path), said.append)
    first = resource.attributes()
    assert resource.attributes() is first
    assert len(said) == 1
    assert "labels: No such file" in said[0]
    (tmp_path / "annotations").write_text('resource.opentelemetry.io/service.name="said"\nnote="x"')
    (tmp_path / "labels").write_text('app="one"')
    second = resource.attributes()
    assert (
        second["k8s.pod.label.app"],
        second["service.name"],
        second["k8s.pod.annotation.note"],
    ) == ("one", "said", "x")
    assert not [name for name in second if "resource.opentelemetry.io" in name]
    # as Kubernetes does it: new files behind a link that is renamed
    (tmp_path / "new").write_text('app="two"')
    (tmp_path / "new").rename(tmp_path / "labels")
    assert resource.attributes()["k8s.pod.label.app"] == "two"
    (tmp_path / "labels").write_bytes(b"\xff\xfe rubbish")
    assert "k8s.pod.label.app" not in resource.attributes()
    (tmp_path / "annotations").touch()
    resource.attributes()
    assert len(said) == 2
