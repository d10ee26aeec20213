"""Which endpoint of a service gets the next request. It knows endpoints and time, and nothing of HTTP.

balancer.py          the endpoint sets of all services; the choice of two
endpoint_set.py      the endpoints of one service: load, failures, warm-up
weighted.py          weights and zones, laid out for drawing
ewma.py              peak EWMA of latency
circuit_breaker.py   closed, open, probation
retry_budget.py      how many retries a service gets
wait_queue.py        requests that wait for an endpoint, in order
"""
