"""DNS for the pod: answers for names of other clusters, and forwarding of everything else.

service.py             what a proxy runs: addresses and answers change together with the directory
server.py              sockets: questions in, answers out, or on to the pod's resolver
answers.py             question -> answer, as bytes; pure
zone.py                which names are ours
virtual_addresses.py   the addresses that these names resolve to
"""
