"""The compact adapter against dense factors times masks, against PEFT's LoRA, and its structural properties."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.func import functional_call
from trained_adapters import losses_of_steps

from taso_ds.adapters.adapter import ADAPTER_MODULE, TasoAdapter, merge_into
from taso_ds.adapters.selection import CoreRegion, share
from taso_ds.adapters.structure import STRUCTURES, count_dense, count_parameters
from taso_ds.adapters.targets import find_targets, matrix_shape

BATCH = tiny_models.token_batch()
BODY = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}


def is_transposed(module: nn.Module) -> bool:
    shape = matrix_shape(module)
    assert shape is not None
    return shape.transposed


def random_regions(model: nn.Module, p: float, *, targets: list[str] | None = None) -> dict[str, CoreRegion]:
    generator = torch.Generator().manual_seed(7)
    regions = {}
    for name, shape in find_targets(model, targets).shapes.items():
        regions[name] = CoreRegion(
            torch.randperm(shape.out_features, generator=generator)[: share(p, shape.out_features)].sort().values,
            torch.randperm(shape.in_features, generator=generator)[: share(p, shape.in_features)].sort().values,
            shape.out_features,
            shape.in_features,
        )
    return regions


def make_adapter(
    regions: Mapping[str, CoreRegion],
    *,
    structure: str = "union",
    rank: int = 1,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
) -> TasoAdapter:
    """An adapter; ``trained`` gives every kept entry a random value, for B = 0 would hide most mistakes."""
    adapter = TasoAdapter(regions, structure=structure, rank=rank, scaling=scaling, seed=3, dtype=dtype)
    if trained:
        with torch.no_grad():
            adapter.flat.copy_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(5)))
    return adapter


def kept_entries(adapter: TasoAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """The masks of A and B of every matrix, written from method section 3 and not from ``dense_positions``."""
    masks = {}
    for name, region in adapter.regions.items():
        rank, branches = adapter.rank, len(STRUCTURES[adapter.structure])
        mask_a = torch.zeros(branches * rank, region.in_features, dtype=torch.bool)
        mask_b = torch.zeros(region.out_features, branches * rank, dtype=torch.bool)
        if adapter.structure == "union":  # (B1 ⊙ m_row) A1 + B2 (A2 ⊙ m_col)
            mask_a[:rank], mask_b[:, rank:] = True, True
            mask_b[region.rows, :rank] = True
            mask_a[rank:, region.cols] = True
        else:  # (B ⊙ m_row)(A ⊙ m_col)
            mask_a[:, region.cols], mask_b[region.rows] = True, True
        masks[name] = (mask_a, mask_b)
    return masks


class DenseTimesMask:
    """The reference: whole A and B are parameters, masked in every forward, and added to the weights themselves."""

    def __init__(self, model: nn.Module, adapter: TasoAdapter) -> None:
        self.model, self.scaling = model, adapter.scaling
        self.masks = kept_entries(adapter)
        self.A, self.B = {}, {}
        for name, pair in adapter.factors(adapter().detach()).items():
            mask_a, mask_b = self.masks[name]
            # What is masked away is anything but zero: it must not matter.
            self.A[name] = torch.where(mask_a, pair.A, torch.full_like(pair.A, 0.3)).requires_grad_(True)
            self.B[name] = torch.where(mask_b, pair.B, torch.full_like(pair.B, -0.2)).requires_grad_(True)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.A.values(), *self.B.values()]

    def __call__(self, **inputs: Tensor) -> Any:
        weights = {}
        for name, (mask_a, mask_b) in self.masks.items():
            module: Any = self.model.get_submodule(name)
            delta = self.scaling * ((self.B[name] * mask_b) @ (self.A[name] * mask_a))
            weights[f"{name}.weight"] = module.weight + (delta.t() if is_transposed(module) else delta)
        return functional_call(self.model, weights, kwargs=inputs)

    def kept(self, values: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        """``values`` of the kept entries of every matrix: those of A, then those of B."""
        found = {}
        for name, (mask_a, mask_b) in self.masks.items():
            a, b = values(self.A[name]), values(self.B[name])
            assert a is not None
            assert b is not None
            found[name] = torch.cat([a[mask_a], b[mask_b]]).detach()
        return found


def kept_of(adapter: TasoAdapter, flat: Tensor | None) -> dict[str, Tensor]:
    """The same of a compact adapter, ``flat`` being its parameter or its gradient."""
    assert flat is not None
    dense = torch.zeros(adapter.num_dense, dtype=flat.dtype).index_copy(0, adapter.positions, flat.detach())
    masks = kept_entries(adapter)
    return {
        name: torch.cat([pair.A[masks[name][0]], pair.B[masks[name][1]]])
        for name, pair in adapter.factors(dense).items()
    }


def new_falcon() -> Any:
    return tiny_models.falcon(new=True)


# Linears, transposed linears, a body that is not called, results that are changed in place, a block called three times.
FAMILIES = [tiny_models.llama, tiny_models.gpt2, tiny_models.opt, tiny_models.falcon, new_falcon, tiny_models.albert]


def in_double(make: Callable[[], Any]) -> Any:
    return make().double().requires_grad_(False)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("structure", list(STRUCTURES))
@pytest.mark.parametrize("make", FAMILIES)
def test_trains_exactly_like_dense_factors_times_masks(make: Callable[[], Any], structure: str, rank: int) -> None:
    """Three AdamW steps with weight decay and clipping: same loss, gradients, norm and values of the kept entries.

    In fp64 the two may differ by rounding only, some 1e-15 per operation.
    """
    regions = random_regions(make(), 0.25)
    adapter = make_adapter(regions, structure=structure, rank=rank, scaling=1.7, dtype=torch.float64)
    reference = DenseTimesMask(in_double(make), adapter)
    model = in_double(make)
    adapter.attach(model)
    settings: Any = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([adapter.flat], **settings)
    dense_optimizer = torch.optim.AdamW(reference.parameters, **settings)
    losses = []
    for step in range(3):
        batch = tiny_models.token_batch(seed=step)
        loss, dense_loss = model(**batch).loss, reference(**batch).loss
        optimizer.zero_grad()
        dense_optimizer.zero_grad()
        loss.backward()
        dense_loss.backward()
        torch.testing.assert_close(loss, dense_loss, rtol=1e-12, atol=0)
        compact, dense = kept_of(adapter, adapter.flat.grad), reference.kept(lambda value: value.grad)
        for name in regions:
            torch.testing.assert_close(compact[name], dense[name], rtol=1e-9, atol=1e-14)
            assert compact[name].abs().max() > 0
        # The gradient of what is masked away is zero, so the norms over compact and over dense parameters agree.
        norm = torch.nn.utils.clip_grad_norm_([adapter.flat], 0.05)
        dense_norm = torch.nn.utils.clip_grad_norm_(reference.parameters, 0.05)
        torch.testing.assert_close(norm, dense_norm, rtol=1e-10, atol=0)
        assert norm > 0.05  # clipping does something
        optimizer.step()
        dense_optimizer.step()
        after = reference.kept(lambda value: value)
        for name, values in kept_of(adapter, adapter.flat).items():
            torch.testing.assert_close(values, after[name], rtol=1e-9, atol=1e-12)
        losses.append(loss.item())
    assert losses[2] != losses[0]


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_the_delta_is_exactly_zero_outside_its_region(structure: str) -> None:
    regions = random_regions(tiny_models.llama(), 0.2)
    for dtype in (torch.float32, torch.bfloat16):
        adapter = make_adapter(regions, structure=structure, rank=2, dtype=dtype)
        for name, region in regions.items():
            row = torch.zeros(region.out_features, 1, dtype=torch.bool)
            col = torch.zeros(1, region.in_features, dtype=torch.bool)
            row[region.rows], col[:, region.cols] = True, True
            inside = row | col if structure == "union" else row & col
            delta = adapter.delta_weight(name)
            assert delta.shape == (region.out_features, region.in_features)
            assert delta.dtype == torch.float32
            assert (delta[~inside] == 0).all()
            assert (delta[inside] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", list(STRUCTURES))
@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2, tiny_models.bert])
def test_the_output_is_bitwise_unchanged_at_the_start(
    make: Callable[[], Any], structure: str, dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    before = model(**BODY).logits
    adapter = make_adapter(random_regions(model, 0.3), structure=structure, dtype=dtype, trained=False)
    adapter.attach(model)
    assert torch.equal(model(**BODY).logits, before)
    assert model(**BODY).logits.requires_grad


def test_starts_as_lora_does() -> None:
    """A is Kaiming-uniform(a = √5) drawn on the full shape and then indexed; B is zero."""
    regions = random_regions(tiny_models.llama(), 0.3)
    whole = {
        name: CoreRegion(
            torch.arange(region.out_features),
            torch.arange(region.in_features),
            region.out_features,
            region.in_features,
        )
        for name, region in regions.items()
    }
    few = make_adapter(regions, structure="intersection", rank=2, trained=False)
    full = make_adapter(whole, structure="intersection", rank=2, trained=False)
    some, every = few.factors(few().detach()), full.factors(full().detach())
    for name, region in regions.items():
        assert torch.equal(some[name].A[:, region.cols], every[name].A[:, region.cols])
        bound = math.sqrt(6.0 / ((1.0 + 5.0) * region.in_features))
        assert every[name].A.abs().max() <= bound
        assert not every[name].B.any()
    for width in {region.in_features for region in regions.values()}:
        draws = torch.cat([every[name].A.flatten() for name in regions if regions[name].in_features == width])
        draws = draws * math.sqrt(width)  # uniform on [-1, 1]: mean 0, deviation 1/√3 = 0.577
        assert draws.abs().max() > 0.95
        assert abs(float(draws.mean())) < 4 * 0.577 / math.sqrt(len(draws))
        assert abs(float(draws.std()) - 0.577) < 0.06


def test_is_deterministic_and_follows_its_seed() -> None:
    regions = random_regions(tiny_models.llama(), 0.3)

    def flat(seed: int) -> Tensor:
        torch.rand(1)
        return TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=seed, dtype=torch.float32).flat

    assert torch.equal(flat(0), flat(0))
    assert not torch.equal(flat(0), flat(1))


# The full region is LoRA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("structure", "lora_rank"), [("intersection", 3), ("union", 6)])
def test_the_full_region_is_pefts_lora(make: Callable[[], Any], structure: str, lora_rank: int) -> None:
    """With every row and column, rank 3: ``intersection`` is LoRA of rank 3 and ``union`` is LoRA of rank 6."""
    from peft import LoraConfig, get_peft_model

    model = make().requires_grad_(False)
    adapter = make_adapter(random_regions(model, 1.0), structure=structure, rank=3, scaling=0.5)
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=0.5 * lora_rank,  # type: ignore[arg-type]  # any number does
        target_modules=list(adapter.regions),
        fan_in_fan_out=make is tiny_models.gpt2,
    )
    lora: Any = get_peft_model(copy.deepcopy(model), config).eval()
    parameters = dict(lora.named_parameters())
    pairs = adapter.factors(adapter().detach())
    sides = {
        f"base_model.model.{name}.lora_{side}.default.weight": getattr(pair, side)
        for name, pair in pairs.items()
        for side in ("A", "B")
    }
    with torch.no_grad():
        for name, value in sides.items():
            parameters[name].copy_(value)
    assert sum(value.numel() for value in sides.values()) == adapter.flat.numel() == adapter.num_dense
    adapter.attach(model)
    ours, theirs = model(**BATCH), lora(**BATCH)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    assert adapter.flat.grad is not None
    gradients = adapter.factors(torch.zeros(adapter.num_dense).index_copy(0, adapter.positions, adapter.flat.grad))
    for name, pair in gradients.items():
        for side in ("A", "B"):
            expected = parameters[f"base_model.model.{name}.lora_{side}.default.weight"].grad
            assert expected is not None
            torch.testing.assert_close(getattr(pair, side), expected, rtol=1e-3, atol=1e-5)


# Merging, attaching, detaching ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*FAMILIES, tiny_models.bert])
@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_merged_weights_compute_the_same(make: Callable[[], Any], structure: str) -> None:
    model = make()
    base = model(**BODY).logits
    adapter = make_adapter(random_regions(model, 0.3), structure=structure, rank=2, scaling=1.5)
    merged = copy.deepcopy(model)
    for name in adapter.regions:
        module: Any = merged.get_submodule(name)
        module.weight.data = merge_into(
            module.weight.data, adapter.delta_weight(name), transposed=is_transposed(module)
        )
    adapter.attach(model)
    torch.testing.assert_close(merged(**BODY).logits, model(**BODY).logits, rtol=1e-4, atol=1e-4)
    assert (merged(**BODY).logits - base).abs().max() > 0.01


def test_merging_rounds_once() -> None:
    # bf16 keeps 8 bits: after 1 comes 1 + 2^-7, after 2^-8 comes 2^-8 + 2^-15. So 1 + (2^-8 + 2^-17) lies just above
    # the middle of its neighbours, while the delta alone rounds to 2^-8, which leaves a tie that goes to the even 1.
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    delta = torch.tensor([[2.0**-8 + 2.0**-17]])
    assert merge_into(weight, delta, transposed=False).item() == 1.0 + 2.0**-7
    assert (weight + delta.bfloat16()).item() == 1.0  # what rounding twice would give


def test_attach_and_detach_leave_the_model_as_it_was() -> None:
    model = tiny_models.llama()
    names, before = [name for name, _ in model.named_parameters()], model(**BODY).logits
    state = copy.deepcopy(model.state_dict())
    adapter = make_adapter(random_regions(model, 0.3))
    adapter.attach(model)
    assert [name for name, _ in model.named_parameters()] == [*names, f"{ADAPTER_MODULE}.flat"]
    assert not torch.equal(model(**BODY).logits, before)
    assert "logits_to_keep" in inspect.signature(model.forward).parameters  # it still says what it can be asked for
    adapter.detach(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(**BODY).logits, before)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    adapter.attach(model)  # and again
    assert not torch.equal(model(**BODY).logits, before)


def test_only_the_flat_parameter_learns() -> None:
    model = tiny_models.llama().requires_grad_(False)
    adapter = make_adapter(random_regions(model, 0.2))
    adapter.attach(model)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == [f"{ADAPTER_MODULE}.flat"]
    model(**BATCH).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is not None] == [f"{ADAPTER_MODULE}.flat"]
    assert adapter.flat.numel() == sum(
        count_parameters(
            "union", out_features=region.out_features, in_features=region.in_features, rank=1, core_fraction=0.2
        )
        for region in adapter.regions.values()
    )
    assert adapter.num_dense == sum(
        count_dense("union", out_features=region.out_features, in_features=region.in_features, rank=1)
        for region in adapter.regions.values()
    )


def test_learns() -> None:
    model = tiny_models.llama().requires_grad_(False)
    adapter = make_adapter(random_regions(model, 0.2), trained=False)
    adapter.attach(model)
    losses = losses_of_steps(model, adapter, BATCH)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2], ids=["linear", "conv1d"])
def test_gradient_checkpointing_changes_nothing(make: Callable[[], Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make().requires_grad_(False)
        adapter = make_adapter(random_regions(model, 0.3), rank=2)
        adapter.attach(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.training = True
        forwards: list[int] = []
        next(iter(find_targets(model).linears.values())).register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        loss = model(**BATCH).loss
        loss.backward()
        assert len(forwards) == (2 if checkpointing else 1)
        assert adapter.flat.grad is not None
        gradients.append((loss.item(), adapter.flat.grad))
    assert gradients[0][0] == gradients[1][0]
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-5, atol=1e-7)


def test_a_new_forward_sees_new_values_and_generation_works() -> None:
    model = tiny_models.llama().requires_grad_(False)
    adapter = make_adapter(random_regions(model, 0.3))
    adapter.attach(model)
    first = model(**BODY).logits
    with torch.no_grad():
        adapter.flat.mul_(2.0)
    assert not torch.equal(model(**BODY).logits, first)
    prompt = BATCH["input_ids"][:1, :5]
    with torch.no_grad():
        cached = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        plain = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_a_region_of_another_shape_is_not_attached() -> None:
    model = tiny_models.llama()
    regions = random_regions(model, 0.3, targets=["q_proj"])
    name = next(iter(regions))
    wrong = {name: CoreRegion(torch.tensor([0]), torch.tensor([0]), out_features=5, in_features=5)}
    with pytest.raises(AssertionError):
        make_adapter(wrong).attach(model)
