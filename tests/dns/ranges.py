"""Ranges of virtual addresses."""

from __future__ import annotations

import ipaddress

RANGES = (ipaddress.ip_network("240.0.0.0/4"), ipaddress.ip_network("fd69:7374:686d:7573::/64"))
