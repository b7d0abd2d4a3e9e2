"""Attention with sinks where people already train.

Each module needs the package that it is named after.
"""
