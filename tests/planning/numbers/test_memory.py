"""The formulas against what they stand for: tensors autograd saves, published counts, limiting cases."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from counted_models import counted, llama
from torch import Tensor, nn

from taso_ds.adapters.targets import MatrixShape, find_targets
from taso_ds.models import quantized_linear
from taso_ds.objectives import chunked_loss
from taso_ds.planning.numbers import memory
from taso_ds.planning.numbers.devices import get_device
from taso_ds.planning.numbers.memory import (
    activation_bytes,
    export_usage,
    load_usage,
    loss_bytes,
    phase_usage,
    saved_per_token,
    score_usage,
    train_usage,
)
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.strategy import Limits, Strategy, Workload
from taso_ds.planning.numbers.weights import gathered_bytes, kept_gathered, resident_weights, weight_bytes


def test_constants_that_it_shares_with_the_code_it_counts() -> None:
    assert memory.LOSS_CHUNK_BYTES == chunked_loss.CHUNK_BYTES
    assert memory.QUANTIZING_CHUNK == quantized_linear.QUANTIZING_CHUNK


def saved_bytes(config: object, *, tokens: int) -> int:
    """Bytes of all tensors that a forward through adapted blocks saves, each storage once, weights left out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False).eval()
    left_out = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def adapt(inner: nn.Module, shape: MatrixShape) -> None:
        A = nn.Parameter(torch.ones(1, shape.in_features, dtype=torch.bfloat16))
        B = nn.Parameter(torch.ones(shape.out_features, 1, dtype=torch.bfloat16))
        left_out.update(value.untyped_storage().data_ptr() for value in (A, B))
        kept.append((A, B))

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            hidden = args[0].flatten(0, -2) @ A.t()
            return torch.addmm(output.flatten(0, -2), hidden, B.t()).view_as(output)

        inner.register_forward_hook(hook)

    kept: list[tuple[nn.Parameter, nn.Parameter]] = []
    for target in find_targets(model).values():
        assert isinstance(target.matrix, nn.Module)
        adapt(target.matrix, target.shape)
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 320, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_what_autograd_saves(kv_heads: int) -> None:
    tokens = 128
    one, two = (saved_bytes(llama(layers=layers, kv_heads=kv_heads), tokens=tokens) for layers in (1, 2))
    predicted = saved_per_token(counted(llama(kv_heads=kv_heads)), 2)
    # Not in the formula: 7 adapters' rank-1 outputs and 2 norms' fp32 scales, 2 · 7 + 4 · 2 = 22 bytes a token.
    assert (two - one) / tokens == pytest.approx(predicted + 22, rel=0.005)


def test_activations_of_an_ungated_layer_norm_model() -> None:
    from transformers import GPT2Config

    config = [
        GPT2Config(
            vocab_size=320, n_embd=64, n_layer=layers, n_head=4, activation_function="gelu", bos_token_id=1,
            eos_token_id=2,
        )
        for layers in (1, 2)
    ]  # fmt: skip
    measured = (saved_bytes(config[1], tokens=128) - saved_bytes(config[0], tokens=128)) / 128
    # Queries and keys are copied out of the fused projection, which stays for the values: 2 · 2 · 64 bytes a token.
    # Besides, as above: norms' means and scales and 4 adapters' rank-1 outputs, 2 · 4 + 2 · 4.
    assert measured == pytest.approx(saved_per_token(counted(config[0]), 2) + 256 + 16, rel=0.015)


def test_counts_of_llama_2_7b() -> None:
    from transformers import LlamaConfig

    shape = counted(LlamaConfig(tie_word_embeddings=False))  # the defaults are Llama 2 7B
    assert shape.parameters == 6_738_415_616  # as published
    assert len(shape.blocks) == 32
    # 4 h² + 3 h f per block, and all of it is adapted
    assert shape.targets == shape.quantized == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert shape.active == shape.parameters - 2 * 32_000 * 4096 - 4096  # without embeddings and the last norm
    assert not shape.is_tied
    assert counted(llama(tied=True)).is_tied


def test_experts_count_by_what_a_token_visits() -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    shape = counted(config)
    expert = 3 * 64 * 96
    assert shape.experts == 2 * 8 * expert
    assert shape.active == sum(shape.blocks) - 2 * 6 * expert
    assert shape.feed_forward == 2 * 96


def test_nf4_is_half_a_byte_and_its_scales() -> None:
    shape = counted(llama())
    weights = weight_bytes(shape, Strategy(3, bits=4))
    assert weights.partitioned == shape.quantized / 2 + 2 * (shape.parameters - shape.quantized)
    assert 8 * weights.replicated / shape.quantized == pytest.approx(0.127, abs=1e-3)  # bits, as QLoRA has it


def test_partitions_of_a_stage() -> None:
    shape, work = counted(llama()), Workload(nodes=2, gpus_per_node=4)
    whole = 2 * shape.parameters
    assert resident_weights(shape, Strategy(2), work) == whole
    assert resident_weights(shape, Strategy(3), work) == whole / 8
    assert resident_weights(shape, Strategy(3, hpz=True), work) == whole / 8 + whole / 4


def test_what_stays_gathered_is_bounded_by_the_reuse_distance() -> None:
    shape = counted(llama())
    assert kept_gathered(shape, Strategy(3)) == 2 * (shape.parameters - shape.embedding)
    limited = Strategy(3, limits=Limits(max_reuse_distance=6000))
    assert kept_gathered(shape, limited) == 2 * 3000
    assert kept_gathered(shape, replace(limited, gradient_checkpointing=True)) == 2 * 2000
    # four NF4 weights are one stored element: the same bytes stay
    assert kept_gathered(shape, replace(limited, bits=4)) == 2 * 3000


def test_fetching_ahead_fills_the_live_parameters() -> None:
    shape, work = counted(llama()), Workload(gpus_per_node=2)

    def gathered(**limits: int) -> float:
        strategy = Strategy(3, limits=Limits(prefetch_bucket=100, **limits))
        return gathered_bytes(shape, strategy, work, recorded=True)

    largest = 2 * shape.largest_tensor
    live = shape.largest_tensor + 5000
    assert gathered(max_live_parameters=0, max_reuse_distance=0) == largest
    assert gathered(max_live_parameters=live, max_reuse_distance=0) == 2 * (live + 200)
    assert gathered(max_live_parameters=live, max_reuse_distance=2 * live + 2000) == 2 * (live + 1200)


def test_checkpointing_saves_activations_and_ranks_share_accumulators() -> None:
    shape, device = counted(llama(layers=8)), get_device("cpu")
    work = Workload(gpus_per_node=2, max_seq_length=64, micro_batch_size=2, calibration_batch_size=2)
    plain, checkpointed = Strategy(3), Strategy(3, gradient_checkpointing=True)
    assert activation_bytes(shape, checkpointed, work, rows=2) < activation_bytes(shape, plain, work, rows=2) / 4
    two = score_usage(shape, plain, work, device).device["accumulators"]
    four = score_usage(shape, plain, replace(work, nodes=2), device).device["accumulators"]
    assert two == 2 * four == 2 * shape.targets


def test_offloaded_weights_are_on_the_host() -> None:
    shape, work = counted(llama()), Workload(gpus_per_node=4)
    usage = train_usage(shape, Strategy(3, place="cpu"), work, get_device("a100-80"))
    assert "weights" not in usage.device
    assert usage.host["weights"] == 2 * shape.parameters  # four quarters
    whole = phase_usage(shape, Strategy(2), work, get_device("a100-80"))["load"]
    assert whole.host["checkpoint"] == 4 * 2 * shape.parameters  # every rank reads everything


def test_a_proof_maps_a_base_that_is_stored_as_it_is_used() -> None:
    work, device = Workload(gpus_per_node=2), get_device("a100-80")
    for dtype, bytes_each in (("bfloat16", 0), ("float32", 2)):
        config: Any = llama()
        config.dtype = dtype
        shape = counted(config)
        assert export_usage(shape, Strategy(3), work, device).host.get("proof", 0.0) == bytes_each * shape.parameters


def test_the_loss_takes_one_chunk_whatever_the_batch() -> None:
    from transformers import LlamaConfig

    shape = counted(LlamaConfig(tie_word_embeddings=False))
    one, two = (loss_bytes(shape, Workload(max_seq_length=2048), rows=rows) for rows in (1, 2))
    chunk = 64 * 2**20 // (4 * 32_000)  # positions; each 8 bytes per word, and two bf16 states of every position
    assert one == chunk * 32_000 * 8 + 2 * 2 * 2048 * 4096
    assert two - one == 2 * 2 * 2048 * 4096


def test_scoring_in_passes_and_from_one_micro_batch() -> None:
    shape, device = counted(llama()), get_device("a100-80")
    work = Workload(gpus_per_node=2, calibration_samples=32)
    whole = score_usage(shape, Strategy(3), work, device).device["accumulators"]
    in_passes = score_usage(shape, Strategy(3), replace(work, calibration_passes=4), device)
    assert in_passes.device["accumulators"] == whole / 4
    on_host = score_usage(shape, Strategy(3), replace(work, calibration_offload=True), device)
    assert on_host.host["accumulators"] == 2 * whole  # two ranks
    single = score_usage(shape, Strategy(3), replace(work, calibration_samples=8), device)
    assert single.device["accumulators"] == 4 * shape.largest_target


def test_int8_is_a_byte_and_a_number_per_row() -> None:
    """As ``distributed/quantized.py`` stores it."""
    from taso_ds.models.quantized_linear import Int8, QuantizedLinear

    shape = counted(llama())
    weights = weight_bytes(shape, Strategy(3, bits=8))
    assert weights.partitioned == shape.quantized + 2 * (shape.parameters - shape.quantized)
    # per block q, k, v, o and down have 64 rows, gate and up 160
    assert weights.replicated == 4 * 2 * (5 * 64 + 2 * 160)
    linear = QuantizedLinear(64, 160, bias=None, format=Int8(6.0), storage=torch.bfloat16)
    assert linear.num_bytes == 64 * 160
    assert weight_bytes(shape, Strategy(3)).total > weights.total > weight_bytes(shape, Strategy(3, bits=4)).total


def test_scales_that_are_not_quantized_take_an_eighth_more() -> None:
    shape = replace(counted(llama()), double_quantized=False)
    assert weight_bytes(shape, Strategy(0, bits=4)).replicated == shape.quantized * 4 / 64


def test_nvme_holds_the_weights_and_the_host_its_buffers() -> None:
    shape, work, device = counted(llama()), Workload(gpus_per_node=2), get_device("a100-80")
    limits = Limits(prefetch_bucket=0, nvme_buffer=1000, nvme_buffers=5)
    usage = train_usage(shape, Strategy(3, place="nvme", limits=limits), work, device)
    assert "weights" not in {**usage.device, **usage.host}
    assert usage.host["nvme buffers"] == 2 * 2 * 5000
    # nothing is fetched ahead: what stays for backward, and the tensor in use
    limits = replace(limits, max_reuse_distance=2000)
    gathered = gathered_bytes(shape, Strategy(3, place="nvme", limits=limits), work, recorded=True)
    assert gathered == 2 * (1000 + shape.largest_tensor)


def test_a_single_rank_gathers_what_is_elsewhere() -> None:
    shape, work = counted(llama()), Workload()
    assert gathered_bytes(shape, Strategy(3), work, recorded=True) == 0.0
    assert gathered_bytes(shape, Strategy(3, place="cpu"), work, recorded=True) > 0.0


def merging() -> ModelShape:
    shape = counted(llama())
    return replace(shape, reads_whole=True, merged=10_000, largest_merged=5_000, stored_dtype="bfloat16")


def test_a_checkpoint_that_is_merged_is_whole_somewhere_while_it_loads() -> None:
    """16 bits: mapped by rank 0. Quantized: on every rank's device, before it is partitioned."""
    shape, work, device = merging(), Workload(gpus_per_node=4), get_device("a100-80")
    plain = load_usage(shape, Strategy(3), work, device)
    assert plain.mapped == 2 * shape.parameters
    assert plain.host == {"merging": 2 * 5_000}
    assert plain.device["gathered"] == 2 * shape.largest_tensor
    quantized = load_usage(shape, Strategy(3, bits=4), work, device)
    assert quantized.device["whole model"] == weight_bytes(shape, Strategy(3, bits=4)).total
    assert quantized.device["merging"] == 2 * 5_000
    own = load_usage(replace(shape, reads_whole=False, merged=0, largest_merged=0), Strategy(3, bits=4), work, device)
    assert own.device_bytes < quantized.device_bytes
    assert export_usage(shape, Strategy(3), work, device).host["proof"] == 2 * 10_000  # made anew; the rest is mapped


def test_training_everything_keeps_no_second_parameters() -> None:
    """``--method full``: at stage 3 all 16 bytes are partitioned, beside the weights; stage 1 has whole gradients."""
    base = counted(llama())
    shape = replace(base, trainable=base.parameters, trains_base=True)
    work, device = Workload(gpus_per_node=4), get_device("a100-80")
    number = shape.parameters
    assert shape.frozen == 0
    for stage, expected in ((3, 16 * number / 4), (2, 16 * number / 4), (1, 16 * number / 4 + 2 * number)):
        assert train_usage(shape, Strategy(stage), work, device).device["trained"] == expected
    adapter = train_usage(base, Strategy(3), work, device).device["trained"]
    assert adapter == 2 * 1000 + 16 * 1000 / 4


def test_files_in_the_runs_dtype_are_mapped_below_stage_3() -> None:
    """Others are converted whole in the host memory of every rank."""
    work, device = Workload(gpus_per_node=8), get_device("a100-80")
    shape = replace(counted(llama()), stored_dtype="bfloat16")
    assert load_usage(shape, Strategy(1), work, device).host == {}
    assert load_usage(shape, Strategy(1), work, device).mapped == 2 * shape.parameters
    other = replace(shape, stored_dtype="float16")
    assert load_usage(other, Strategy(1), work, device).host == {"checkpoint": 8 * 2 * shape.parameters}
    assert load_usage(shape, Strategy(1), replace(work, bf16=False), device).host["checkpoint"] > 0


def test_a_mixture_of_experts_is_gathered_as_a_whole() -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8,
    )  # fmt: skip
    shape = counted(config)
    # eight experts of three matrices, and the router, beside which the largest parameter is two of the three
    assert shape.largest_block == 8 * 3 * 64 * 160 + 8 * 64
    assert shape.largest_tensor == 8 * 2 * 64 * 160
    gathered = gathered_bytes(shape, Strategy(3), Workload(gpus_per_node=2), recorded=False)
    assert gathered == 2 * 2 * shape.largest_block


def test_a_model_without_attention_is_counted() -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2)
    shape = counted(config)
    assert train_usage(shape, Strategy(1), Workload(), get_device("a100-80")).device["activations"] > 0
