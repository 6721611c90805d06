"""The task head beside an adapter: what PEFT calls it in a file, and how it comes back into a model."""

from collections.abc import Mapping

from torch import Tensor, nn

from taso_ds.distributed import zero


def task_type(*, head: bool) -> str:
    """Return PEFT's name of what the model is for."""
    return "SEQ_CLS" if head else "CAUSAL_LM"


def head_modules(model: nn.Module, head_parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return PEFT's ``modules_to_save`` for the head: top modules (``score``, ``classifier``), and a pooler below.

    PEFT takes every module whose path ends in such a name. Where that would take another module too, the name is the
    whole path within PEFT's model.
    """
    parts = {name: name.partition(".pooler.") for name in head_parameters}
    tops = {f"{body}.pooler" if pooler else name.split(".", 1)[0] for name, (body, pooler, _) in parts.items()}
    others = [path for path, _ in model.named_modules() if path not in tops]
    return sorted(
        name if not any(path.endswith(name) for path in others) else f"base_model.model.{name}" for name in tops
    )


def load_head(model: nn.Module, head_tensors: Mapping[str, Tensor]) -> None:
    """Put a trained head into the model, which may be partitioned, in the model's dtype. A collective."""
    for name, tensor in head_tensors.items():
        zero.assign(model.get_parameter(name), tensor)
