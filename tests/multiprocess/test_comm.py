"""How ranks join and leave."""

from pathlib import Path

import pytest
from launching import free_port, run_ranks

from taso_ds.distributed.process_group import SHARED_MEMORY

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


def test_ranks_wait_for_a_slow_one_leave_nothing_behind_and_end_well() -> None:
    port = free_port()
    done = run_ranks(Path(__file__).with_name("comm_worker.py"), 2, port=port)
    for said in ("rank 0 counts 2", "rank 0 ends", "rank 1 counts 2", "rank 1 ends"):
        assert done.out.count(said) == 1, done.out  # lines of two ranks may run into one another
    assert list(SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*")) == []
