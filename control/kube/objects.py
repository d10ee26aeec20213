"""The API objects, with only the fields that are needed here. Other fields are skipped while
decoding.

Go writes an empty list as null or leaves it out. So lists and maps are `| None`. Structs are
frozen, because several readers share one copy.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class Struct(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, rename="camel"):
    """The base of all structs: snake_case field names in Python, camelCase names in JSON."""


class OwnerReference(Struct, frozen=True):
    """The owner of an object."""

    kind: str
    name: str
    uid: str = ""
    api_version: str = ""
    controller: bool | None = None


class Meta(Struct, frozen=True):
    """metadata of an object."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: tuple[OwnerReference, ...] | None = None


class Object(Struct, frozen=True):
    """The fields of every object."""

    kind: str = ""
    api_version: str = ""
    metadata: Meta = Meta()


class PartialObjectMetadata(Object, frozen=True):
    """Any object of which only the metadata was requested."""


class ListMeta(Struct, frozen=True):
    """metadata of a list."""

    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class Page(msgspec.Struct, Generic[T], frozen=True):
    """A list, or one page of it."""

    items: list[T] | None
    kind: str = ""
    metadata: ListMeta = ListMeta()


class Cause(Struct, frozen=True):
    """One detail of a Status."""

    reason: str = ""
    message: str = ""


class StatusDetails(Struct, frozen=True):
    """details of a Status."""

    causes: tuple[Cause, ...] | None = None
    retry_after_seconds: int = 0


class Status(Struct, frozen=True):
    """The body of an error response."""

    kind: str = ""
    message: str = ""
    reason: str = ""
    code: int = 0
    details: StatusDetails | None = None


class WatchEvent(msgspec.Struct, frozen=True):
    """One line of a watch. `type` determines the kind of `object`."""

    type: str
    object: msgspec.Raw


# Services and their endpoints


class ServicePort(Struct, frozen=True):
    """A port of a Service."""

    port: int
    name: str | None = None
    protocol: str = "TCP"
    app_protocol: str | None = None
    target_port: int | str | None = None


class ServiceSpec(Struct, frozen=True):
    """spec of a Service."""

    type: str = "ClusterIP"
    ports: tuple[ServicePort, ...] | None = None
    cluster_ips: tuple[str, ...] | None = msgspec.field(default=None, name="clusterIPs")
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    selector: dict[str, str] | None = None
    internal_traffic_policy: str | None = None


class Service(Object, frozen=True):
    """A Service (v1)."""

    spec: ServiceSpec = ServiceSpec()


class ObjectReference(Struct, frozen=True):
    """A reference to another object."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""
    api_version: str = ""


class Conditions(Struct, frozen=True):
    """conditions of an endpoint. None means true for ready and serving, false for terminating."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Named(Struct, frozen=True):
    """A zone or a node in a hint."""

    name: str


class EndpointHints(Struct, frozen=True):
    """Which clients an endpoint is meant for."""

    for_zones: tuple[Named, ...] | None = None
    for_nodes: tuple[Named, ...] | None = None


class SliceEndpoint(Struct, frozen=True):
    """An endpoint of an EndpointSlice."""

    addresses: tuple[str, ...]
    conditions: Conditions | None = None
    hostname: str | None = None
    target_ref: ObjectReference | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None


class SlicePort(Struct, frozen=True):
    """A port of an EndpointSlice. `port` None: all ports."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSlice(Object, frozen=True):
    """An EndpointSlice (discovery.k8s.io/v1)."""

    address_type: str = ""
    endpoints: tuple[SliceEndpoint, ...] | None = None
    ports: tuple[SlicePort, ...] | None = None


# Pods and nodes


class PodSpec(Struct, frozen=True):
    """spec of a Pod."""

    service_account_name: str = ""
    node_name: str = ""
    host_network: bool = False


class PodIP(Struct, frozen=True):
    """One address of a Pod."""

    ip: str = ""


class PodStatus(Struct, frozen=True):
    """status of a Pod."""

    phase: str = ""
    pod_ips: tuple[PodIP, ...] | None = msgspec.field(default=None, name="podIPs")


class Pod(Object, frozen=True):
    """A Pod (v1)."""

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


# Objects that the control plane writes


class LeaseSpec(Struct, frozen=True):
    """spec of a Lease. Times are RFC 3339 with microseconds."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class Lease(Object, frozen=True):
    """A Lease (coordination.k8s.io/v1)."""

    spec: LeaseSpec = LeaseSpec()


class EventSeries(Struct, frozen=True):
    """How often an event has happened."""

    count: int
    last_observed_time: str


class Event(Object, frozen=True):
    """An Event (events.k8s.io/v1)."""

    event_time: str = ""
    type: str = ""
    reason: str = ""
    action: str = ""
    note: str = ""
    reporting_controller: str = ""
    reporting_instance: str = ""
    regarding: ObjectReference | None = None
    series: EventSeries | None = None


class UserInfo(Struct, frozen=True):
    """The user of a token."""

    username: str = ""
    uid: str = ""
    groups: tuple[str, ...] | None = None
    extra: dict[str, tuple[str, ...]] | None = None


class TokenReviewSpec(Struct, frozen=True):
    """spec of a TokenReview."""

    token: str = ""
    audiences: tuple[str, ...] | None = None


class TokenReviewStatus(Struct, frozen=True):
    """status of a TokenReview."""

    authenticated: bool = False
    user: UserInfo = UserInfo()
    audiences: tuple[str, ...] | None = None
    error: str = ""


class TokenReview(Object, frozen=True):
    """A TokenReview (authentication.k8s.io/v1)."""

    spec: TokenReviewSpec = TokenReviewSpec()
    status: TokenReviewStatus = TokenReviewStatus()


class ResourceAttributes(Struct, frozen=True):
    """An action on a resource. `name` or `namespace` "": all of them."""

    verb: str
    resource: str
    group: str = ""
    namespace: str = ""
    name: str = ""
    subresource: str = ""


class AccessReviewSpec(Struct, frozen=True):
    """spec of a SubjectAccessReview."""

    resource_attributes: ResourceAttributes | None = None
    user: str = ""
    groups: tuple[str, ...] | None = None
    uid: str = ""
    extra: dict[str, tuple[str, ...]] | None = None


class AccessReviewStatus(Struct, frozen=True):
    """status of a SubjectAccessReview."""

    allowed: bool = False
    denied: bool = False
    reason: str = ""
    evaluation_error: str = ""


class SubjectAccessReview(Object, frozen=True):
    """A SubjectAccessReview (authorization.k8s.io/v1)."""

    spec: AccessReviewSpec = AccessReviewSpec()
    status: AccessReviewStatus = AccessReviewStatus()
