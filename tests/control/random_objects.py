"""Random objects of Kubernetes (hypothesis)."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.control.cluster import (
    Json,
    endpoint,
    identity,
    node,
    pod,
    port,
    service,
    slice_of,
)

SPACES = st.sampled_from(["shop", "evil"])


NAMES = st.sampled_from(["a", "b"])


HOSTS = st.sampled_from(["10.1.0.1", "10.1.0.2", "fd00::1", "10.96.0.1", "203.0.113.7"])


TIMES = st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"])


UIDS = st.sampled_from(["1", "2"])


NODES = st.sampled_from(["node-1", "node-2", ""])


@st.composite
def services(draw: st.DrawFn) -> Json:
    identities = st.sampled_from(
        [
            {},
            {"isthmus.dev/endpoint-identity": str(identity("x"))},
            {"isthmus.dev/endpoint-identity": "?"},
        ]
    )
    about = {"annotations": draw(identities), "creationTimestamp": draw(TIMES), "uid": draw(UIDS)}
    ports = draw(st.sampled_from([[port(80, "http")], [port(80, "http"), port(81, "more")], []]))
    made = service(
        draw(NAMES),
        draw(st.sampled_from(["10.96.0.1", "10.96.0.2", "None"])),
        namespace=draw(SPACES),
        metadata=about,
    )
    made["spec"]["ports"] = ports
    made["spec"]["type"] = draw(
        st.sampled_from(["ClusterIP", "ClusterIP", "ClusterIP", "ExternalName"])
    )
    return made


@st.composite
def endpoints(draw: st.DrawFn) -> Json:
    made = endpoint(draw(HOSTS), nodeName=draw(NODES), zone=draw(st.sampled_from(["", "z"])))
    if draw(st.booleans()):
        made["targetRef"] = {
            "kind": "Pod",
            "namespace": draw(SPACES),
            "name": draw(NAMES),
            "uid": draw(st.sampled_from(["", "1", "2"])),
        }
    made["conditions"]["ready"] = draw(st.booleans())
    return made


@st.composite
def slices(draw: st.DrawFn) -> Json:
    ports = [port(8080, "http"), port(8081, "more")][: draw(st.integers(0, 2))]
    found = draw(st.lists(endpoints(), max_size=3))
    name, space, version = (
        draw(st.sampled_from(["s1", "s2"])),
        draw(SPACES),
        str(draw(st.integers(1, 3))),
    )
    return slice_of(draw(NAMES), *found, name=name, namespace=space, ports=ports, version=version)


@st.composite
def pods(draw: st.DrawFn) -> Json:
    about = {"creationTimestamp": draw(TIMES), "uid": draw(UIDS)}
    made = pod(
        draw(NAMES), *draw(st.lists(HOSTS, max_size=2, unique=True)), namespace=draw(SPACES), meshed=draw(st.booleans()), metadata=about,
        nodeName=draw(NODES), hostNetwork=draw(st.integers(0, 4)) == 0,
    )  # fmt: skip
    made["status"]["phase"] = draw(st.sampled_from(["Running", "Running", "Failed"]))
    return made


ITEMS = st.one_of(
    services(),
    slices(),
    pods(),
    st.builds(node, st.sampled_from(["node-1", "node-2"]), st.sampled_from(["x", "y"])),
)


def kind(item: Json) -> str:
    return next((name for name in ("addressType", "status", "spec") if name in item), "node")
