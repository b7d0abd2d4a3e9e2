"""The registered operators ``torch.ops.magi_sink_cp.*``, each with its fake and its autograd."""
