"""The subcommands of `isthmus`. A module of a subcommand is imported only on demand.

check.py              `isthmus check`: runs the checks, and prints their results
checks.py             configuration, certificates, clock and directory
check_enrollment.py   a certificate from the control plane
check_workload_api.py an identity from a SPIFFE Workload API
check_redirection.py  the packet filter
check_names.py        DNS
check_peers.py        endpoints, and gateways of other clusters
directory.py          `isthmus directory`
identity.py           `isthmus identity`
intercept.py          `isthmus intercept`
terminal.py           colours
"""
