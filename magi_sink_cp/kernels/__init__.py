"""One device: attention backends, and our own merge, dsink and accumulate kernels.

Nothing here knows of ranks.
"""
