"""Interception: the rules that bring a pod's connections to the proxy.

nftables.py   the ruleset as text, from settings; pure
"""
