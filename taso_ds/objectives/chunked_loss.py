"""The language model's loss without the logits of a whole micro-batch: at a vocabulary of 150k, one takes 0.6 MB.

With hidden states ``h (positions, hidden_size)``, logits ``z = logits_of(h)`` and targets ``t``, the loss is
``Σ_n logsumexp(z_n) − z_n[t_n]`` in fp32, and its gradient is ``(softmax(z_n) − onehot(t_n)) · ∂z_n/∂h_n``. The output
layer is frozen, so backward needs only ``∂loss/∂h``, which is no larger than ``h``. The forward computes both, chunk by
chunk. No logits are kept or computed again.

The chunks run inside the one call of the output layer that a forward makes anyway. ZeRO-3 gathers the weight for that
call, once on every rank, whatever number of chunks the rank's data make. Backward does not gather it.
"""

import logging
from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from taso_ds.data.encode import IGNORED
from taso_ds.objectives.batches import Batch
from taso_ds.objectives.loss import lm_loss_sum
from taso_ds.objectives.output_layer import finish_logits, output_layer, text_config, why_not_in_chunks

log = logging.getLogger(__name__)

# Bytes of one chunk's fp32 logits. That is little beside any model with a large vocabulary, and still a hundred rows of
# a matrix product at 150k. Two to four tensors of this size are alive at a time.
CHUNK_BYTES = 64 << 20


class LanguageModelLoss:
    """The loss summed over supervised tokens, and their number: in chunks where the model allows it, else at once.

    The first batch decides which of the two it is, alike on every rank.

    Args:
        adapted: names of the matrices that an adapter or scoring hooks into.
    """

    def __init__(self, adapted: Collection[str] = ()) -> None:
        self._adapted = adapted
        self._in_chunks: bool | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if self._in_chunks is None:
            device = batch["input_ids"].device
            reason = why_not_in_chunks(getattr(model, "module", model), self._adapted, device=device)
            self._in_chunks = reason is None
            if reason is not None:
                log.info("loss: the logits of a whole micro-batch at once, because %s", reason)
        return chunked_loss_sum(model, batch) if self._in_chunks else lm_loss_sum(model, batch)


def chunked_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the fp32 loss summed over the batch's supervised tokens, and their number.

    Args:
        model: a model whose output layer is frozen (``why_not_in_chunks`` is None), or an engine around it.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``(batch, tokens)``.
    """
    module = getattr(model, "module", model)
    layer, config = output_layer(module), text_config(module)
    assert isinstance(layer, nn.Linear)
    assert not any(parameter.requires_grad for parameter in layer.parameters()), "its gradient would be lost"
    rows = max(1, CHUNK_BYTES // (4 * layer.out_features))
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORED
    losses: list[Tensor] = []

    def compute(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = args[0]  # (batch, tokens, hidden_size)
        losses.append(
            _SummedCrossEntropy.apply(
                hidden[:, :-1][supervised],
                targets[supervised],
                lambda chunk: finish_logits(layer.forward(chunk), config),
                rows,
            )
        )
        return (hidden[:, :0].detach(),)  # nothing is left for the layer's own forward

    # The loss becomes the model's output before DeepSpeed's hooks see it: they expect backward to start there.
    handles = [
        layer.register_forward_pre_hook(compute),
        module.register_forward_hook(lambda *_: losses[0], prepend=True),
    ]
    try:
        loss = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(losses) == 1, "the output layer ran more than once"
    return loss, int(supervised.sum())


class _Context(Protocol):
    """What torch hands from a function's forward to its backward."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over positions, whose gradient is ready when the loss is."""

    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], rows: int
    ) -> Tensor:
        differentiated = ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden if differentiated else hidden[:0])
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            part, slope = _of_chunk(hidden[chunk], targets[chunk], logits_of, differentiated=differentiated)
            loss += part
            if slope is not None:
                gradient[chunk] = slope
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def _of_chunk(
    hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], *, differentiated: bool
) -> tuple[Tensor, Tensor | None]:
    """Return one chunk's loss and, if asked for, its gradient with respect to ``hidden (rows, hidden_size)``."""
    with torch.set_grad_enabled(differentiated):
        leaf = hidden.detach().requires_grad_(differentiated)
        logits = logits_of(leaf)  # (rows, vocabulary), the model's dtype
    log_probabilities = logits.detach().log_softmax(-1, dtype=torch.float32)
    column = targets[:, None]
    loss = -log_probabilities.gather(1, column).sum()
    if not differentiated:
        return loss, None
    slope = log_probabilities.exp_()  # in place: softmax − onehot
    slope.scatter_add_(1, column, torch.full_like(column, -1, dtype=slope.dtype))
    (gradient,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
    return loss, gradient
