"""How ranks join and leave."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment, finish, free_port

from taso_ds.distributed.comm import SHARED_MEMORY

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


def test_ranks_wait_for_a_slow_one_leave_nothing_behind_and_end_well() -> None:
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    process = subprocess.Popen(
        [*command, str(Path(__file__).with_name("comm_worker.py"))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    done = finish(process).succeeded()
    for said in ("rank 0 counts 2", "rank 0 ends", "rank 1 counts 2", "rank 1 ends"):
        assert done.out.count(said) == 1, done.out  # lines of two ranks may run into one another
    assert list(SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*")) == []
