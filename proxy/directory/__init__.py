"""The directory: the services, their endpoints and identities, and the gateways of other clusters.

snapshot.py            the immutable snapshot, and its lookups
reader.py              YAML document -> snapshot, or all its mistakes
values.py              single values of the document
clusters.py            the section `clusters`: other clusters and their gateways
splits.py              splits and failovers of services
policy.py              how clients use the endpoints of a service
service_names.py       the names that an application may use, and the service that each one means
json_schema.py         the JSON schema of the document
source.py              the interface of a source, which is the file or the control plane
watcher.py             reads the file again when it changes, and replaces the snapshot
channel/               asks the control plane for what the proxy uses
downgrades.py          what a new snapshot would send in clear text instead of mutual TLS
former_identities.py   addresses that recently had an identity
"""

from proxy.directory.downgrades import Downgrades, Former, compare
from proxy.directory.json_schema import directory_schema
from proxy.directory.reader import DirectoryError, parse
from proxy.directory.snapshot import (
    UNANSWERED,
    UNIDENTIFIED,
    Backend,
    Cluster,
    Directory,
    Endpoint,
    Gateway,
    Hint,
    Plan,
    Port,
    Remote,
    Requested,
    Service,
    Target,
    itself,
    normalised,
)

__all__ = [
    "UNANSWERED",
    "UNIDENTIFIED",
    "Backend",
    "Cluster",
    "Directory",
    "DirectoryError",
    "Downgrades",
    "Endpoint",
    "Former",
    "Gateway",
    "Hint",
    "Plan",
    "Port",
    "Remote",
    "Requested",
    "Service",
    "Target",
    "compare",
    "directory_schema",
    "itself",
    "normalised",
    "parse",
]
