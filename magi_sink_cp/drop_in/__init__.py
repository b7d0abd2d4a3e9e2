"""FlashAttention's functions with a ``sink`` argument: one module for each generation of its interface."""
