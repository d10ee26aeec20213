"""What attacks, floods and faults do to a sidecar, measured beside a well-behaved member of the mesh.

    make soak                                       everything, and the table of docs/reliability.md
    python -m perf.reliability --only NAME,...      parts of it

The test bed is a cluster of lab/ in a sandbox: its own network namespaces, its own processes. No packet leaves it. The sidecar under
attack runs as the image has it (compiled, on AWS-LC) in a memory cgroup of 256 MiB. The attackers are pods without a sidecar. The member
is a pod with a sidecar that sends requests all the time; each of its requests is counted and timed. A prober asks /live and /ready of the
attacked sidecar as a kubelet does: a new connection each time.

Every load has a limit in connections and in time.
"""
