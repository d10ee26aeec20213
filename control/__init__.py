"""The control plane: it watches a Kubernetes cluster and makes directory entries for proxies.
docs/control-plane.md describes the data flow and the contract.
"""
