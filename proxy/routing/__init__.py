"""From a request to an endpoint. Imported by flows.

router.py              address or authority -> target: splits and failover
remote_gateways.py     the gateways of other clusters, and which of them answer
dispatch.py            target -> endpoint, and another one if the first fails
retries.py             what an attempt says about its endpoint, and whether there is another
endpoint_wait.py       waiting for an endpoint when all are broken
request_overrides.py   limits that a request sets for itself by header
"""
