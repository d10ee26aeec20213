"""The grammar that HTTP/1 and HTTP/2 share (RFC 9110 §5): one definition for all readers of heads and trailers.

These are parts of regular expressions without capturing groups. A reader may accept less than they do, and never more. So a head that
passes one proxy by one version is not refused by the next one in another version.
"""

from __future__ import annotations

# RFC 9110 §5.6.2.
TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]++"

# RFC 9110 §5.5: visible ASCII and obs-text, with blanks and tabs between them. A value has no white space at its ends: that belongs to
# the line (RFC 9112 §5), and HTTP/2 forbids it (RFC 9113 §8.2.1).
FIELD_VALUE = rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?"
# The part of it that needs no judgement: ASCII, and not empty. Possessive: a value that does not fit fails in one pass.
PLAIN_VALUE = rb"[!-~][ -~\t]*+(?<![ \t])"
# What no value, reason phrase or target may have. nginx, Envoy, Node and Go answer such a request with 400, too.
CONTROL = rb"[\x00-\x08\x0a-\x1f\x7f]"

# A character of a request target. The fragment stays with the client (RFC 9112 §3.2), and what is not ASCII has to be percent-encoded
# (RFC 3986 §2.1). We refuse both: a proxy should not repair a request target (RFC 9112 §3.2), because the next one may do it otherwise.
TARGET_CHAR = rb'[!"$-~]'
