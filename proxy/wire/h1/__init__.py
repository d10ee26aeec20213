"""HTTP/1: one connection, as client or server.

connection.py    the state of a connection: bytes in, heads and bodies out, and back
fast_head.py     a fast parser for common heads, which declines all others
strict_head.py   the declined heads: ambiguous ones are refused, h11 parses the rest
head_faults.py   error messages that explain what is wrong with a refused head
body.py          the framing of bodies, and their readers and writers
"""
