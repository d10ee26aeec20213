"""HTTP/1: one connection in either role.

connection.py    bytes in, heads and bodies out, and back
fast_head.py     the strict recogniser of common heads
strict_head.py   the heads that the recogniser declines: refused where they are ambiguous, otherwise h11's to decide
head_faults.py   what is wrong with a head that was refused, in words
body.py          how a body is delimited, and its readers and writers
"""
