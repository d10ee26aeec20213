"""The control plane: it watches a Kubernetes cluster and makes directory entries for proxies.
docs/control-plane.md describes the data flow and the contract.

kube/         the client of the Kubernetes API
discovery/    from the objects of the cluster to the entries for proxies
channel/      the directory for proxies

command.py    `isthmus control`
app.py        the process: builds the parts and runs them
config.py     all settings; each is declared beside the code that obeys it
admin.py      the admin listener
metrics.py    the metrics
contract.py   what discovery shares with the proxies
"""
