"""The directory from the control plane: what a proxy needs, when it needs it.

    messages.py        the messages of the channel, and their frames
    views.py           the content of an entry, as both ends encode it
    subscriptions.py   what the proxy has asked for and knows: a state machine without I/O
    assembly.py        the known entries as a snapshot of the directory
    identities.py      which addresses have an identity in the known entries, and which lose it
    connector.py       opens the connections to the control plane
    pauses.py          when the proxy connects again
    source.py          the connection to the control plane, and the interface to the flows

docs/directory-channel.md describes the protocol. The control plane's end is control/channel.
"""
