"""The directory for proxies: each follows the entries that it uses.

    views.py     entries of discovery as contents (proxy/directory/channel/views.py), computed once
                 for all proxies that see the same
    session.py   what one proxy follows, and what it has to be sent: a state machine without I/O
    server.py    the connections

docs/directory-channel.md describes the protocol. The proxy's end is proxy/directory/channel.
"""
