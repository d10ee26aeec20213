"""A small client of the Kubernetes API, on h11, trio and msgspec.

    access.py           the API server's address, trust and credentials: of a pod, or of a
                        kubeconfig
    http.py             one HTTP/1.1 connection
    client.py           requests: limits, timeouts, retries; get, list, create, patch, apply, delete
    objects.py          the API objects, with the fields that are needed
    resources.py        the API path of each kind of object, and how responses are decoded
    api_errors.py       what can go wrong with a request
    reflector.py        list and watch: a local copy that no fault empties
    watching.py         the lines of a watch
    backoff.py          how long to wait before the next attempt
    error_log.py        logs a repeated error once
    leader_election.py  which replica is the leader, by a Lease
    event_recorder.py   events
    reviews.py          token and access reviews

No existing client library runs on trio and handles a 410. The rules are those of the API's
documentation ("Efficient detection of changes") and of client-go's reflector.
"""
