"""Joins, speaks once and leaves; what is registered for the process's end still happens. torchrun comm_worker.py"""

import atexit

import torch

from taso_ds.distributed import comm

comm.init()
atexit.register(lambda: print(f"rank {comm.launched_rank()} ends", flush=False))
total = torch.ones(1)
comm.sum_everywhere(total)
print(f"rank {comm.rank()} counts {total.item():.0f}", flush=False)
comm.leave()
raise AssertionError("a rank among several does not come back")
