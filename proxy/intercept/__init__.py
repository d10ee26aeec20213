"""Interception: the rules that redirect a pod's connections to the proxy.

nftables.py   the ruleset as text, from settings, and its installation
"""
