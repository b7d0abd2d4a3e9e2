"""Ranks: planning, plan, methods, transport and guards. Imports only from magi_sink_cp.kernels."""
