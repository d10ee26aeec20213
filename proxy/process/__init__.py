"""What each process needs, whichever flows it runs. Imported by app, supervisor and admin; dns
imports listeners.

    listeners.py        the sockets, bound all together or not at all
    acceptors.py        connection limits of each listener
    own_identity.py     the proxy's identity, and the end of connections with their certificates
    load_directory.py   the directory at the start
    memory.py           the memory budget, from the container's limit
    shutdown.py         the order in which traffic ends
"""
