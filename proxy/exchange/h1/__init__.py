"""HTTP/1 connections.

server.py         one downstream connection: requests in, responses out
request_body.py   the body of a request, read on demand
pool.py           the pool of connections to endpoints
"""
