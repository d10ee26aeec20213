"""Sockets: the only room that touches file descriptors. It knows streams, TLS and relays, and nothing of HTTP."""
