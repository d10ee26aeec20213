"""What attacks, floods and faults do to a sidecar, as a well-behaved member of the mesh sees it.

    make soak                                       everything, and the table of docs/reliability.md
    python -m perf.reliability --only NAME,...      parts of it

The test bed is a cluster of lab/ in a sandbox, with its own network namespaces and processes. No
packet leaves it. The attacked sidecar runs as in the image (compiled, on AWS-LC) in a memory cgroup
of 256 MiB. The attackers are pods without a sidecar. The member is a pod with a sidecar that sends
requests all the time; each is counted and timed. A prober asks /live and /ready of the attacked
sidecar like a kubelet: with a new connection each time.

Every load is limited in connections and in time.
"""
