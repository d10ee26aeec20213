"""Selects the endpoint of a service for the next request. It handles endpoints and time, not HTTP.

balancer.py          the endpoint sets of all services; power of two choices
endpoint_set.py      the endpoints of one service: load, failures, slow start
weighted.py          weights and zones, prepared for the draw
ewma.py              peak EWMA of response times
circuit_breaker.py   closed, open, half-open
retry_budget.py      how many retries a service gets
wait_queue.py        the queue of requests that wait for an endpoint
"""
