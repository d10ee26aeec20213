"""The two paths through whole proxies: what is passed on, counted, logged and traced does not
depend on the fast path.

    stage.py                      proxies, and all that they leave behind, without what chance and time put into it
    server.py, h2_server.py         a server whose behaviour is named by the request's target
    acts.py; h2_acts.py, h2_faults.py what a client does: plain things, odd ones, faults
    h2_ends.py                      either end of an HTTP/2 connection; those of HTTP/1.1 are bytes

A play is a list of acts, drawn from a seed. Its client and its server wait for each other where
order matters, so it has one outcome; it is run with the fast path off, with it on, and while that
hands over exchanges at any moment. Then everything is compared: of HTTP/1.1 each byte, of HTTP/2
the messages, and how streams and connections end.
"""
