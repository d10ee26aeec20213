"""The client of the Kubernetes API: thin, on h11, trio and msgspec.

    access.py      where the API server is, whom to trust, who we are: in a pod, or by a kubeconfig
    http.py        one HTTP/1.1 connection
    client.py      requests: limits, time limits, retries; get, list, create, patch, apply, delete
    objects.py     the objects, with the fields that are needed; resources.py: where each kind of them is found
    reflector.py   list and watch: a local copy that is never emptied by a fault; watching.py: the lines of a watch
    backoff.py     how long to wait before the next attempt
    leases.py      leader election
    recorder.py    events
    reviews.py     token and access reviews

No client library of the ecosystem runs on trio and survives a 410 (the rules are those of the API's
documentation, "Efficient detection of changes", and of client-go's reflector).
"""
