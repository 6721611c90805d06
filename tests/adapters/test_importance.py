"""The gradient from hooks is autograd's, and the scores made from it."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from taso_ds.adapters.choices import SCORES
from taso_ds.adapters.importance import importance, needs_gradient, score_matrix, tap_gradient, weight_gradient
from taso_ds.adapters.targets import find_targets

BATCH = tiny_models.token_batch()


def new_falcon() -> Any:
    return tiny_models.falcon(new=True)


def backward_from_embeddings(model: Any) -> None:
    """Backward through a frozen model: the embeddings want a gradient, no weight has to."""
    inputs = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_(True)
    model(inputs_embeds=inputs, attention_mask=BATCH["attention_mask"], labels=BATCH["labels"]).loss.backward()


def tapped_gradients(model: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The summed gradient of every target of a frozen model as the hooks deliver it, and the number of deliveries."""
    sums: dict[str, Tensor] = {}
    deliveries: dict[str, int] = {}

    def deliver_to(name: str) -> Callable[[Tensor, Tensor], None]:
        def deliver(inputs: Tensor, grad_output: Tensor) -> None:
            sums[name] = sums.get(name, 0) + weight_gradient(inputs, grad_output)
            deliveries[name] = deliveries.get(name, 0) + 1

        return deliver

    handles = [tap_gradient(module, deliver_to(name)) for name, module in find_targets(model).linears.items()]
    backward_from_embeddings(model)
    for handle in handles:
        handle.remove()
    return sums, deliveries


def autograd_gradients(model: Any) -> dict[str, Tensor]:
    """``weight.grad`` of every target as (out_features, in_features)."""
    model.requires_grad_(True)
    backward_from_embeddings(model)
    found = {}
    for name, target in find_targets(model).items():
        grad: Any = target.parameter.grad
        found[name] = grad.t() if target.shape.transposed else grad
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2, tiny_models.falcon, new_falcon])
def test_the_tapped_gradient_is_autograds(make: Callable[[], Any], checkpointing: bool) -> None:
    reference = autograd_gradients(make())
    model = make().requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # blocks checkpoint in training mode only; their dropouts stay in eval mode
                assert module.gradient_checkpointing
    forwards: list[int] = []
    counter = next(iter(find_targets(model).linears.values())).register_forward_hook(lambda *_: forwards.append(1))
    sums, deliveries = tapped_gradients(model)
    counter.remove()
    assert len(forwards) == (2 if checkpointing else 1)
    assert set(sums) == set(reference)
    assert set(deliveries.values()) == {1}  # recomputation does not deliver a second time
    for name, gradient in sums.items():
        assert gradient.shape == reference[name].shape
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6 * float(reference[name].abs().max()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_tap_changes_no_output_and_removes_itself() -> None:
    model = tiny_models.llama()
    before = model(BATCH["input_ids"]).logits
    calls: list[int] = []
    handles = [
        tap_gradient(module, lambda _x, _g: calls.append(1))
        for module in find_targets(model, ["q_proj"]).linears.values()
    ]
    assert torch.equal(model(BATCH["input_ids"]).logits, before)
    for handle in handles:
        handle.remove()
    backward_from_embeddings(model)
    assert calls == []


def test_weight_gradient_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])  # (tokens, in)
    g = torch.tensor([[3.0, 0.0], [1.0, -2.0]])  # (tokens, out)
    # g[0] outer x[0] = [[3, 6, 0], [0, 0, 0]]; g[1] outer x[1] = [[0, 1, -1], [0, -2, 2]]
    assert weight_gradient(x, g).tolist() == [[3.0, 7.0, -1.0], [0.0, -2.0, 2.0]]
    assert weight_gradient(x, g.bfloat16()).dtype == torch.bfloat16  # x is cast to g's dtype


WEIGHT = torch.tensor([[2.0, -3.0], [0.5, 0.0]])
GRADIENT = torch.tensor([[-1.0, -2.0], [4.0, 7.0]])


def test_importance_by_hand() -> None:
    assert importance(WEIGHT, GRADIENT).tolist() == [[2.0, 6.0], [2.0, 0.0]]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("importance", [[2.0, 6.0], [2.0, 0.0]]),
        ("magnitude", [[2.0, 3.0], [0.5, 0.0]]),
        ("gradient", [[1.0, 2.0], [4.0, 7.0]]),
    ],
)
def test_scores_by_hand(score: str, expected: list[list[float]]) -> None:
    for dtype in (torch.float32, torch.bfloat16):  # these numbers are exact in both
        found = score_matrix(score, weight=WEIGHT.to(dtype), grad=GRADIENT.clone(), shape=(2, 2), seed=0)
        assert found.dtype == torch.float32
        assert found.tolist() == expected


def test_a_bf16_weight_is_multiplied_in_fp32() -> None:
    # 1.0078125 = 1 + 2^-7 is a bf16 number; times 1 + 2^-10 is no bf16 number, and must not be rounded to one.
    weight, grad = torch.tensor([[1.0078125]], dtype=torch.bfloat16), torch.tensor([[1.0 + 2.0**-10]])
    expected = (1.0 + 2.0**-7) * (1.0 + 2.0**-10)
    assert importance(weight, grad).item() == expected
    assert score_matrix("importance", weight=weight, grad=grad, shape=(1, 1), seed=0).item() == expected


def test_random_scores_follow_the_seed_and_need_nothing_else() -> None:
    def draw(seed: int) -> Tensor:
        torch.rand(3)  # the global generator does not matter
        return score_matrix("random", weight=None, grad=None, shape=(4, 5), seed=seed)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert draw(1).shape == (4, 5)
    assert draw(1).min() >= 0


def test_which_scores_need_a_gradient() -> None:
    assert [score for score in SCORES if needs_gradient(score)] == ["importance", "gradient"]
