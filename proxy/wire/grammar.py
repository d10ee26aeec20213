"""The grammar that HTTP/1 and HTTP/2 share (RFC 9110 §5): one definition for all readers.

These are parts of regular expressions without capturing groups. A reader may accept less than
these, but never more. Otherwise one proxy could accept a head in one HTTP version, and the next
proxy would refuse it in the other version.
"""

from __future__ import annotations

# RFC 9110 §5.6.2.
TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]++"

# RFC 9110 §5.5: visible ASCII and obs-text, with spaces and tabs between them. White space at the
# ends belongs to the line, not to the value (RFC 9112 §5), and HTTP/2 forbids it (RFC 9113 §8.2.1).
FIELD_VALUE = rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?"
# The simple case: ASCII, and not empty. Possessive: a value that does not match fails in one pass.
PLAIN_VALUE = rb"[!-~][ -~\t]*+(?<![ \t])"
# Forbidden in values, reason phrases and targets. nginx, Envoy, Node and Go also answer 400.
CONTROL = rb"[\x00-\x08\x0a-\x1f\x7f]"

# A character of a request target. A client must not send the fragment (RFC 9112 §3.2). Non-ASCII
# characters must be percent-encoded (RFC 3986 §2.1). We refuse both: a proxy should not repair a
# request target (RFC 9112 §3.2), because the next one may repair it in another way.
TARGET_CHAR = rb'[!"$-~]'
