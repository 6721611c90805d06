"""How ranks join and leave."""

import atexit
import datetime
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import ForkServer, address_of

from taso_ds.distributed import comm, environment, process_group
from taso_ds.distributed.process_group import SHARED_MEMORY

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


def wait_and_leave() -> None:
    """Wait for a slow rank 0, speak once and leave; what is registered for the process's end still happens."""
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


def test_ranks_wait_for_a_slow_one_leave_nothing_behind_and_end_well(fork_server: ForkServer, tmp_path: Path) -> None:
    answer = fork_server.run([], tmp_path, function=address_of(wait_and_leave))
    assert answer["codes"] == [0, 0]
    for rank in range(2):
        lines = (tmp_path / f"rank{rank}.out").read_text().splitlines()
        said = [line for line in lines if "built successfully" not in line]  # of DeepSpeed, where it had to compile
        assert said == [f"rank {rank} counts 2", f"rank {rank} ends"]
    assert list(SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{answer['port']}_*")) == []
