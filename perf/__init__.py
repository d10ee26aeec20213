"""Measures what a hop costs. Each file answers one question; each prints baseline, result and ratio
from one run.
"""
