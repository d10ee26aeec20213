"""From the cluster's objects to the directory.

    marks.py      labels and annotations, and what they mean
    facts.py      what is kept of each object: API objects -> facts
    entries.py    what proxies are told: services, their ports and endpoints; pods
    judge.py      whom an endpoint's address belongs to, and so who is expected there
    resolve.py    a service and its slices -> its entry
    catalog.py    all facts, and the entries that a change of them changes
    views.py      an entry as it is seen from a node and a zone
    document.py   entries -> the document of a directory file
    discovery.py  reflectors -> catalog -> whoever wants to know

All but the last are pure and synchronous: the same facts give the same entries, in whichever order
they came.
"""
