"""Widths of models whose layers differ, by hand."""

from collections.abc import Callable
from typing import Any

import pytest
from counted_models import counted

WIDTHS: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8,
}  # fmt: skip


def gemma4() -> Any:
    """Every sixth layer sees everything, with heads of 32 instead of 16."""
    from transformers import Gemma4TextConfig

    sizes: dict[str, Any] = {"global_head_dim": 32, "intermediate_size": 96, "num_kv_shared_layers": 0}
    return Gemma4TextConfig(**WIDTHS, **sizes)


def gemma3n() -> Any:
    """A feed-forward width for every layer: 96 in half of them, 128 in the others."""
    from transformers import Gemma3nTextConfig

    return Gemma3nTextConfig(
        **WIDTHS, intermediate_size=[96, 128] * 3, activation_sparsity_pattern=[0.0] * 6, num_kv_shared_layers=0
    )


@pytest.mark.parametrize(
    ("make", "attention", "key_value", "feed_forward"),
    [
        (gemma4, round(4 * (5 * 16 + 32) / 6), round(2 * (5 * 16 + 32) / 6), 96),
        (gemma3n, 4 * 16, 2 * 16, (96 + 128) / 2),
    ],
)
def test_layers_that_differ_count_as_average_ones(
    make: Callable[[], Any], attention: int, key_value: int, feed_forward: int
) -> None:
    shape = counted(make())
    assert (shape.attention, shape.key_value, shape.feed_forward) == (attention, key_value, feed_forward)
    assert shape.num_heads == 4
