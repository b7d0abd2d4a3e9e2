"""FlashAttention's functions with a ``sink`` argument.

One module for each generation of its interface.
"""
