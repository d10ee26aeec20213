"""DNS for the pod: answers for names of other clusters, and forwarding of all other queries.

service.py             what the proxy runs: addresses and answers change together with the directory
server.py              the sockets: answers queries, or forwards them to the pod's resolver
answers.py             query -> response, as bytes, without I/O
zone.py                which names this proxy answers
virtual_addresses.py   the addresses that these names resolve to
"""
