"""What crosses the network in a training step, for each ZeRO stage: the frozen base's weights, and everything else.

python benchmarks/traffic.py

Four ranks of this machine act as two nodes of two. Every collective of a step is seen where DeepSpeed hands it to
torch, and counted as the bytes that each rank's data take to ranks of the other node, each sent straight to where it is
used: a gather sends the rank's part to every rank, a reduction each rank its part, an all-reduce both. (A ring or a
tree passes on what it gets; the ratios between stages stay.) The last line is one JSON object.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ranks
import torch.distributed as dist
from torch import Tensor, nn

NODES, RANKS_PER_NODE = 2, 2
WAYS = {
    "stage 1": "zero1.json",
    "stage 2": "zero2.json",
    "stage 3": "zero3.json",
    "stage 3, hpZ": "zero3_hpz.json",
}
BASE, REST = "base", "rest"


class Traffic:
    """Bytes this rank sends to the other node, of the base's weights and of the rest."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._base_share = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what goes through ``torch.distributed``."""
        kept = {name: getattr(dist, name) for name in _PARTS}
        for name, send in kept.items():
            setattr(dist, name, self._counted(send, _PARTS[name]))
        try:
            yield
        finally:
            for name, send in kept.items():
                setattr(dist, name, send)

    def know_base(self, model: nn.Module) -> None:
        """Look at which parameters ZeRO-3 gathers together."""
        for parameter in model.parameters():
            if hasattr(parameter, "all_gather_coalesced"):
                parameter.all_gather_coalesced = self._gathering(parameter.all_gather_coalesced)

    def _gathering(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        def gather_known(parameters: Sequence[Any], *arguments: Any, **options: Any) -> Any:
            frozen = sum(value.ds_numel for value in parameters if not value.requires_grad)
            self._base_share = frozen / sum(value.ds_numel for value in parameters)
            try:
                return gather(parameters, *arguments, **options)
            finally:
                self._base_share = 0.0

        return gather_known

    def _counted(self, send: Callable[..., Any], part: Callable[..., float]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            group = options.get("group") or next((x for x in arguments if isinstance(x, dist.ProcessGroup)), None)
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            here = dist.get_rank() // RANKS_PER_NODE
            others = sum(member // RANKS_PER_NODE != here for member in members)
            size = others * part(arguments, options, len(members))
            self.sent[BASE] += round(size * self._base_share)
            self.sent[REST] += round(size * (1.0 - self._base_share))
            return send(*arguments, **options)

        return counted


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _argument(arguments: Sequence[Any], options: dict[str, Any], number: int, *names: str) -> Any:
    """Return an argument that was given by position or by one of its names."""
    given = [options[name] for name in names if name in options]
    return given[0] if given else arguments[number]


# Bytes that one rank sends to each other rank of the group.
_PARTS: dict[str, Callable[[Sequence[Any], dict[str, Any], int], float]] = {
    "all_gather_into_tensor": lambda a, o, n: _bytes(_argument(a, o, 1, "input_tensor")),
    "all_gather": lambda a, o, n: _bytes(_argument(a, o, 1, "tensor")),
    "all_reduce": lambda a, o, n: 2 * _bytes(_argument(a, o, 0, "tensor")) / n,
    "reduce": lambda a, o, n: _bytes(_argument(a, o, 0, "tensor")) / n,
    "reduce_scatter_tensor": lambda a, o, n: _bytes(_argument(a, o, 1, "input", "input_tensor")) / n,
    "broadcast": lambda a, o, n: _bytes(_argument(a, o, 0, "tensor")) / n,
}


def work(ds_config: str) -> dict[str, int]:
    """Take three steps and return what a rank sends in the last, on average over the ranks."""
    local_rank = int(os.environ["RANK"]) % RANKS_PER_NODE
    os.environ.update(LOCAL_WORLD_SIZE=str(RANKS_PER_NODE), LOCAL_RANK=str(local_rank), GLOO_SOCKET_IFNAME="lo")
    from worker import make_job, make_trainer

    from taso_ds.distributed import comm

    traffic = Traffic()
    with traffic.counting():
        flags = ["--ds_config", ds_config, "--per_device_train_batch_size", "1", "--max_seq_length", "64"]
        trainer = make_trainer(make_job([*flags, "--calibration_samples", "4", "--max_train_samples", "64"]), 3)
        traffic.know_base(trainer.engine.module)
        for step in range(3):
            traffic.sent.clear()
            trainer.step(step)
        sent = comm.gather_objects(dict(traffic.sent))
    return {kind: round(sum(one.get(kind, 0) for one in sent) / len(sent)) for kind in (BASE, REST)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("--result", Path), ("--way", str), ("--local_rank", int)):  # set on the ranks
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result is not None:
        found = work(arguments.way)
        from taso_ds.distributed import comm, process_group

        if comm.is_main():
            arguments.result.write_text(json.dumps(found))
        process_group.leave()
        return
    table = {}
    print(f"{'to the other node, per rank and step':<38}{'base':>14}{'all else':>14}")
    for way, ds_config in WAYS.items():
        table[way] = ranks.launch(Path(__file__), ["--way", ds_config], count=NODES * RANKS_PER_NODE)
        print(f"{way:<38}{table[way][BASE] / 1e6:>11.3f} MB{table[way][REST] / 1e6:>11.3f} MB", flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
