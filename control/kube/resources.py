"""The API path of each kind of object, and how responses are decoded.

A response is accepted only if its kind is the requested one. A list of pods in response to a
request for services is a fault, even if it decodes.
"""

from __future__ import annotations

from typing import Generic, TypeVar
from urllib.parse import quote

import msgspec

from control.kube import objects
from control.kube.api_errors import InvalidAnswer
from control.kube.objects import Page

T = TypeVar("T", bound=objects.Object)
D = TypeVar("D")

Key = tuple[str, str]
"""Namespace ("" for what has none) and name."""

_JSON = "application/json"
_PARTIAL = "application/json;as={kind};g=meta.k8s.io;v=v1"
_METADATA = "PartialObjectMetadata"


class Resource(Generic[T]):
    """A kind of objects, such as `Resource("discovery.k8s.io/v1", "endpointslices",
    EndpointSlice)`. The core group is "v1".

    With the type PartialObjectMetadata, only metadata is requested, and `kind` is that type's name.
    """

    def __init__(self, api: str, plural: str, type_: type[T], *, namespaced: bool = True) -> None:
        self.api = api
        self.plural = plural
        self.namespaced = namespaced
        self.metadata_only = type_ is objects.PartialObjectMetadata
        self.kind = type_.__name__
        self._prefix = f"/api/{api}" if "/" not in api else f"/apis/{api}"
        self._one: msgspec.json.Decoder[T] = msgspec.json.Decoder(type_)
        self._page: msgspec.json.Decoder[Page[T]] = msgspec.json.Decoder(Page[type_])  # type: ignore[valid-type]  # a type at run time

    def __repr__(self) -> str:
        return f"<{self.plural}.{self.api}>"

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The path of one object, or without `name` of all objects (in `namespace`)."""
        where = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
        parts = [self._prefix + where, self.plural, quote(name, safe=""), subresource]
        return "/".join(part for part in parts if part)

    def accept(self, *, listed: bool) -> str:
        """The value of the Accept field."""
        if not self.metadata_only:
            return _JSON
        return _PARTIAL.format(kind=_METADATA + "List" if listed else _METADATA)

    def one(self, data: bytes | msgspec.Raw, *, stored: bool = True) -> T:
        """Decode an object. An object that is not stored (a review) has no name. Raises
        InvalidAnswer.
        """
        found = decode(self._one, data)
        if found.kind != self.kind:
            raise InvalidAnswer(f"expected {self.kind}, found {found.kind!r}")
        return self.check(found) if stored else found

    def page(self, data: bytes) -> Page[T]:
        """Decode a page of a list. Raises InvalidAnswer."""
        found = decode(self._page, data)
        if found.kind != f"{self.kind}List":
            raise InvalidAnswer(f"expected {self.kind}List, found {found.kind!r}")
        for item in found.items or ():
            self.check(item)
        return found

    def check(self, found: T) -> T:
        """Check an object. In a list its kind may be missing, but not its name. Raises
        InvalidAnswer.
        """
        meta = found.metadata
        if (
            not meta.name
            or bool(meta.namespace) != self.namespaced
            or found.kind not in ("", self.kind)
        ):
            raise InvalidAnswer(
                f"an object of kind {found.kind!r} among {self.plural}: name {meta.name!r},"
                f" namespace {meta.namespace!r}"
            )
        return found


def decode(decoder: msgspec.json.Decoder[D], data: bytes | msgspec.Raw) -> D:
    """Decode JSON. Raises InvalidAnswer."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAnswer(f"the answer cannot be read: {error}") from error


def key_of(found: objects.Object) -> Key:
    """Namespace and name: unique among objects of one kind."""
    return found.metadata.namespace, found.metadata.name


SERVICES = Resource("v1", "services", objects.Service)
SLICES = Resource("discovery.k8s.io/v1", "endpointslices", objects.EndpointSlice)
PODS = Resource("v1", "pods", objects.Pod)
NODES = Resource("v1", "nodes", objects.PartialObjectMetadata, namespaced=False)
NAMESPACES = Resource("v1", "namespaces", objects.PartialObjectMetadata, namespaced=False)
LEASES = Resource("coordination.k8s.io/v1", "leases", objects.Lease)
EVENTS = Resource("events.k8s.io/v1", "events", objects.Event)
TOKEN_REVIEWS = Resource(
    "authentication.k8s.io/v1", "tokenreviews", objects.TokenReview, namespaced=False
)
ACCESS_REVIEWS = Resource(
    "authorization.k8s.io/v1", "subjectaccessreviews", objects.SubjectAccessReview, namespaced=False
)
