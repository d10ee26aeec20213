"""The directory: which services there are, where their endpoints are, who they are, and how other clusters are reached.

snapshot.py            what is known, immutable, and the look-ups
reader.py              a YAML document -> a snapshot, or all its mistakes; with values.py, clusters.py and splits.py
policy.py              how a service's endpoints are used
service_names.py       the names that an application may write, and which service each means
json_schema.py         the document's JSON schema
watcher.py             reads the file again when it changes, and swaps the snapshot
downgrades.py          what a new snapshot would send in clear text that the old one does not
former_identities.py   addresses that had an identity lately
"""

from proxy.directory.downgrades import Former, Losses, compare
from proxy.directory.json_schema import directory_schema
from proxy.directory.reader import DirectoryError, parse
from proxy.directory.snapshot import (
    Backend,
    Cluster,
    Directory,
    Endpoint,
    Gateway,
    Hint,
    Plan,
    Port,
    Remote,
    Service,
    Target,
    itself,
    normalised,
)

__all__ = [
    "Backend",
    "Cluster",
    "Directory",
    "DirectoryError",
    "Endpoint",
    "Former",
    "Gateway",
    "Hint",
    "Losses",
    "Plan",
    "Port",
    "Remote",
    "Service",
    "Target",
    "compare",
    "directory_schema",
    "itself",
    "normalised",
    "parse",
]
