"""Joins, waits for a slow rank 0, speaks once and leaves; what is registered for the process's end still happens.

torchrun comm_worker.py
"""

import atexit
import datetime
import time

import torch
import torch.distributed as dist

from taso_ds.distributed import comm, environment, process_group

process_group.init()
atexit.register(lambda: print(f"rank {environment.rank()} ends", flush=False))
# Rank 0 takes longer, with a download or with tokens, than any collective may.
dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2), dist.group.WORLD)
comm.on_main(lambda: time.sleep(5))
comm.together(lambda: time.sleep(5) if comm.is_main() else None)
total = torch.ones(1)
comm.sum_everywhere(total)
print(f"rank {comm.rank()} counts {total.item():.0f}", flush=False)
process_group.leave()
raise AssertionError("a rank among several does not come back")
