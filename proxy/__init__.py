"""The proxy: sidecar of a pod, and gateway of a cluster.

docs/ARCHITECTURE.md describes the packages.

The modules of this level start and hold the process:

cli.py               the command line
app.py               builds everything, and runs it
supervisor.py        starts several processes, which are one proxy to the outside
worker.py            one of these processes
admin.py             the admin listener

Every package may import these three, which import no other package or only net/ and wire/:

errors.py            the errors of a running proxy, and how each is reported
files.py             reads files that may be replaced at any time
metric_families.py   declares and counts metrics
"""
