"""A Kubernetes API server in memory, for tests and measurements. It follows the rules of list,
watch and write, and injects faults on request.

    store.py     objects, versions, history, compaction
    changes.py   selectors, patches, server-side apply
    requests.py  requests, the server's behaviour, faults
    watches.py   one watch
    server.py    the HTTP side

It has no controllers: only written objects exist. tests/control/rules.py compares it with a real
API server: the same tests run against both.
"""
