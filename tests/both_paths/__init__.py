"""The two paths through whole proxies: what is forwarded, counted, logged and traced does not depend
on the fast path.

    stage.py                            proxies, and all results of a play without random values and times
    server.py, h2_server.py             a server whose behaviour the request's target selects
    acts.py, h2_acts.py, h2_faults.py   what a client does: plain acts, unusual ones, faults
    h2_ends.py                          either end of an HTTP/2 connection; those of HTTP/1.1 are bytes

A play is a list of acts, drawn from a seed. Its client and its server wait for each other where
order matters, so it has one result. It runs with the fast path off, with it on, and while the fast
path hands over exchanges at any moment. Then everything is compared: of HTTP/1.1 each byte, of
HTTP/2 the messages, and how streams and connections end.
"""
