"""The proxy: sidecar of a pod, and gateway of a cluster. docs/ARCHITECTURE.md says how it is laid
out.

The modules of this level start and hold the process: cli, app (which builds everything), supervisor
and worker (several processes as one proxy) and admin. errors and files know nothing of the rest;
every package may import them.
"""
