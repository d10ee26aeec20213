"""A Kubernetes API server in memory, for tests and measurements: it keeps the rules of list, watch and write, and has
faults when it is told to.

    store.py     objects, versions, history, compaction
    changes.py   selectors, patches, server-side apply
    requests.py  what is asked, what the server is like, what goes wrong
    watches.py   one watch
    server.py    HTTP, in front of that

It has no controllers: what is not written is not there. tests/control/rules.py holds it against a real API server: the same tests run
against both.
"""
