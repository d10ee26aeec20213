"""From a request to an endpoint. Used by the flows.

router.py              address or authority -> target: splits and failover
remote_gateways.py     the gateways of other clusters, and which of them answer
dispatch.py            target -> endpoint, and another endpoint if the first one fails
endpoint_choice.py     the endpoint of each attempt, for both paths and for opaque connections
attempt.py             one attempt, and what its outcome says about the endpoint
retries.py             the attempts of one exchange, and whether another one follows
endpoint_wait.py       the wait for an endpoint while all circuit breakers are open
request_overrides.py   limits that a request sets for itself by header
"""
