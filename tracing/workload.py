"""The workload of a pod and the name of its service, by Kubernetes' labels and the pod's name.

    Deployment   web-7d4b9c6f5d-x2x9k   label pod-template-hash: 7d4b9c6f5d; its ReplicaSet is
                                        web-7d4b9c6f5d
    StatefulSet  db-0                   labels statefulset.kubernetes.io/pod-name,
                                        apps.kubernetes.io/pod-index
    DaemonSet    agent-8kq2z            label controller-revision-hash, and none of a StatefulSet's
    Job          report-28371960-k4m2c  label batch.kubernetes.io/job-name (before 1.27: job-name);
                                        of a CronJob if its name ends in minutes

Without labels, only the name is used. The alphabet of generated suffixes (no vowels, none of 0, 1,
3) makes mistakes rare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# k8s.io/apimachinery, util/rand: alphanums.
_SAFE = "[bcdfghjklmnpqrstvwxz2456789]"
_REPLICA = re.compile(rf"(.+)-({_SAFE}{{6,10}})-{_SAFE}{{5}}")
_GENERATED = re.compile(rf"(.+)-{_SAFE}{{5}}")
_ORDINAL = re.compile(r"(.+)-[0-9]+")
# The name of a CronJob's Job ends with its due minute since 1970: eight digits until the year 2160.
_SCHEDULED = re.compile(r"(.+)-[0-9]{8}")

ANNOTATION = "resource.opentelemetry.io/"


def owner(name: str, labels: Mapping[str, str]) -> dict[str, str]:
    """The attributes of the workload that owns the pod `name`. Empty if it is unknown."""
    template = labels.get("pod-template-hash", "")
    if template:
        base, found, _ = name.rpartition(f"-{template}-")
        return (
            {"k8s.deployment.name": base, "k8s.replicaset.name": f"{base}-{template}"}
            if found and base
            else {}
        )
    if "statefulset.kubernetes.io/pod-name" in labels or "apps.kubernetes.io/pod-index" in labels:
        return _named("k8s.statefulset.name", _ORDINAL, name)
    job = labels.get("batch.kubernetes.io/job-name") or labels.get("job-name")
    if job:
        return {"k8s.job.name": job} | _named("k8s.cronjob.name", _SCHEDULED, job)
    if "controller-revision-hash" in labels:
        return _named("k8s.daemonset.name", _GENERATED, name)
    if match := _REPLICA.fullmatch(name):
        return {"k8s.deployment.name": match[1], "k8s.replicaset.name": f"{match[1]}-{match[2]}"}
    return _named("k8s.statefulset.name", _ORDINAL, name)


def _named(attribute: str, pattern: re.Pattern[str], name: str) -> dict[str, str]:
    match = pattern.fullmatch(name)
    return {attribute: match[1]} if match else {}


# The default service name: OpenTelemetry's order for Kubernetes (semantic conventions, "Specify
# resource attributes using Kubernetes annotations").
_OWNERS = (
    "k8s.deployment.name", "k8s.replicaset.name", "k8s.statefulset.name", "k8s.daemonset.name",
    "k8s.cronjob.name", "k8s.job.name", "k8s.pod.name", "k8s.container.name",
)  # fmt: skip


def service(attributes: Mapping[str, str], *, labels: bool) -> dict[str, str]:
    """The service.* attributes that follow from those of the pod and its owner.

    `labels`: use the well-known labels. Off by default, because charts give the same labels to all
    their parts.
    """

    def label(name: str) -> str:
        return attributes.get(f"k8s.pod.label.app.kubernetes.io/{name}", "") if labels else ""

    def first(*values: str) -> str:
        return next((value for value in values if value), "")

    namespace = attributes.get("k8s.namespace.name", "")
    parts = [
        attributes.get(key, "")
        for key in ("k8s.namespace.name", "k8s.pod.name", "k8s.container.name")
    ]
    found = {
        "service.name": (
            first(label("instance"), label("name"), *(attributes.get(key, "") for key in _OWNERS))
            or "unknown_service:isthmus"
        ),
        "service.namespace": namespace,
        "service.version": label("version"),
        "service.instance.id": ".".join(part for part in parts if part) if parts[1] else "",
    }
    annotated = f"k8s.pod.annotation.{ANNOTATION}"
    found |= {
        key.removeprefix(annotated): value
        for key, value in attributes.items()
        if key.startswith(annotated)
    }
    return {key: value for key, value in found.items() if value}
