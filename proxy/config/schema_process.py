"""The settings of the process: its pod, the admin listener, the log, and the shutdown."""

from __future__ import annotations

from typing import Annotated, Literal

from proxy.net.address import Address
from proxy.settings.declare import Section, described, number, seconds
from proxy.settings.units import IP

_HOUR = 3600


class PodConfig(Section, frozen=True):
    """The identity of this pod. In Kubernetes, all values come from the downward API."""

    name: Annotated[str, described("name of the pod; from POD_NAME")] = ""
    namespace: Annotated[str, described("namespace of the pod; from POD_NAMESPACE")] = "default"
    uid: Annotated[str, described("unique id of the pod; from POD_UID")] = ""
    ip: Annotated[IP | None, described("primary IP address of the pod; from POD_IP")] = None
    node: Annotated[str, described("node that the pod runs on; from NODE_NAME")] = ""
    zone: Annotated[
        str, described("zone of the node; endpoints in this zone are preferred; from POD_ZONE", 63)
    ] = ""
    service_account: Annotated[
        str, described("service account of the pod; from SERVICE_ACCOUNT")
    ] = "default"
    addresses: Annotated[
        tuple[IP, ...],
        described(
            "all IP addresses of the pod; from POD_IPS; empty: read from the network interfaces", 64
        ),
    ] = ()


# A probe arrives every few seconds and times out after one second. Prometheus scrapes about every
# 15 s and keeps its connection. stall_timeout is longer than any load should stop the event loop,
# and shorter than the 30 s in which three probes fail.
class AdminConfig(Section, frozen=True):
    """Probes and metrics."""

    listen: Annotated[
        tuple[Address, ...],
        described("listen addresses for /live, /ready and /metrics; empty: disabled", 16),
    ] = (
        Address("0.0.0.0", 4191),
        Address("::", 4191),
    )
    max_connections: Annotated[
        int,
        number(
            1,
            10_000,
            "maximum open connections; above: the proxy closes the connection with the longest idle"
            " time",
        ),
    ] = 64
    max_per_source: Annotated[
        int,
        number(
            1,
            10_000,
            "maximum open connections from one address; above: the proxy closes one from that"
            " address",
        ),
    ] = 16
    request_timeout: Annotated[
        float,
        seconds(
            0.05, 60, "maximum time from accepting a connection to the end of its first request"
        ),
    ] = 2.0
    idle_timeout: Annotated[
        float, seconds(1, _HOUR, "maximum idle time of a connection between requests")
    ] = 60.0
    metrics_max_age: Annotated[
        float,
        seconds(0, 60, "how long the proxy serves the same rendered metrics text to all clients"),
    ] = 1.0
    stall_timeout: Annotated[
        float,
        seconds(
            1,
            _HOUR,
            "maximum time without progress of the event loop or of a worker; above: not live",
        ),
    ] = 15.0


class LogConfig(Section, frozen=True):
    """The log, which is written to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        described("minimum level of the lines that are written"),
    ] = "info"
    format: Annotated[Literal["text", "json"], described("format of the lines")] = "text"
    access: Annotated[bool, described("whether the proxy logs each request")] = False
    query: Annotated[bool, described("whether these lines include query strings")] = False
    queue: Annotated[
        int,
        number(
            16,
            1_000_000,
            "maximum lines that wait to be written; more are dropped and counted",
            "lines",
        ),
    ] = 8192


# Kubernetes kills a pod 30 s after SIGTERM. The minimum is for an application that gets SIGTERM
# together with the proxy and opens its last connections after a pause. A native sidecar gets
# SIGTERM after the application has ended, and does not need it.
class ShutdownConfig(Section, frozen=True):
    """Graceful shutdown."""

    grace: Annotated[
        float, seconds(0, _HOUR, "maximum time that open connections may continue after SIGTERM")
    ] = 25.0
    outbound_minimum: Annotated[
        float,
        seconds(
            0,
            _HOUR,
            "minimum time in which the application may open connections after SIGTERM; limited by"
            " `shutdown.grace`",
        ),
    ] = 3.0
