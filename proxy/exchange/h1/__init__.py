"""HTTP/1 connections.

server.py         one downstream connection: requests in, responses out
request_body.py   a request on it, read as it is wanted
pool.py           the connections kept to endpoints
"""
