"""Real Kubernetes clusters for tests, on one machine, without Docker and without a registry.

    python -m lab.kube build                  programs and images, once (`make kube`)
    python -m lab.kube run -- COMMAND         a command that can start clusters (`make test-kube`)
    python -m lab.kube run --clusters west,east -- bash        with clusters that run already

What is built:

    programs.py     Kubernetes, etcd, CoreDNS, crictl and helm, from source by the Go module proxy
                    (go/: the lists of modules, and the main packages that are ours)
    dockerfile.py   the steps of a Dockerfile
    base.py layers.py images.py archive.py imagestore.py catalogue.py     images by these steps

What runs:

    guard.py        a run: a sandbox, and the removal of what a sandbox leaves
    cluster.py      the tests' interface: start, kubectl, enter, stop and start a component, aclose
    network.py pki.py cgroups.py components.py node.py      the parts of a node
"""
