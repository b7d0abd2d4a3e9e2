"""Attention on one device: backends behind one protocol, the merge and dsink kernels, the fp64 reference.

Nothing here knows of ranks. The public functions are in :mod:`magi_sink_cp`.
"""
