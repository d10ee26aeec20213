"""What one process holds, whatever flows it runs. Imported by app, supervisor and admin; dns takes its listeners.

listeners.py        the sockets, bound all together or not at all
acceptors.py        how many connections each listener may have
own_identity.py     the proxy's identity: loaded, watched, and what ends with a certificate
load_directory.py   the directory at the start
memory.py           the memory budget, by the container's limit
shutdown.py         in which order traffic ends
"""
