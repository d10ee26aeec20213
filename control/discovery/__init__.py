"""Discovery: makes directory entries from the cluster's objects.

    metadata.py            labels and annotations, and what they mean
    facts.py               API objects -> facts: the fields that discovery needs
    entries.py             the entries for proxies: services with ports and endpoints, pods, and
                           addresses whose identity is unknown
    judge.py               which identity is expected at an endpoint's address
    resolve.py             a service and its slices -> its entry
    index.py               keys by their addresses
    pod_networks.py        the networks in which nothing but pods and services has addresses
    catalog.py             all facts; recomputes the entries that a changed fact affects
    usable_endpoints.py    which endpoints of an entry a client may use, by its node and zone
    directory_document.py  entries -> the document of a directory file
    discovery.py           reflectors -> catalog -> a callback with the changes

All modules but the last are pure and synchronous. The same facts give the same entries, in any
order of arrival.
"""
