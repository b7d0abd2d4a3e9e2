"""What is computed and sent where, as pure functions over ints.

Files here import nothing of the package but each other, and neither torch nor torch.distributed.
Schedules for 1,024 ranks are built and tested on a laptop.
"""
