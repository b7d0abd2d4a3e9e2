"""The attention kernels: one file per source, and the registry that chooses among them."""
