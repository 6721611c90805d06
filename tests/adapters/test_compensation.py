"""The learning-rate compensation ``√(1 / (1 − ρ))`` by hand."""

import math

import pytest

from taso_ds.adapters.compensation import learning_rate_factor, parse_rho, pruned_share
from taso_ds.errors import UserError


def rho_of(rho: str | float, *, p: float = 0.1, trainable: int = 55, dense: int = 100) -> float:
    return pruned_share(parse_rho(rho), core_fraction=p, num_trainable=trainable, num_dense=dense)


def test_mask_at_a_tenth_is_the_root_of_ten() -> None:
    assert rho_of("mask") == pytest.approx(0.9)
    assert learning_rate_factor(rho_of("mask")) == pytest.approx(math.sqrt(10.0))
    assert learning_rate_factor(rho_of("mask")) == pytest.approx(3.1623, abs=5e-5)
    assert learning_rate_factor(rho_of("mask", p=0.25)) == pytest.approx(2.0)  # √(1 / 0.25)


def test_parameters_is_the_pruned_share_of_the_dense_branches() -> None:
    # A union of n = out + in keeps (1 + p) n of the 2 n entries of its two branches: 0.55 at p = 0.1.
    assert rho_of("parameters") == pytest.approx(0.45)
    assert learning_rate_factor(rho_of("parameters")) == pytest.approx(1.0 / math.sqrt(0.55))  # 1.3484
    # Qwen2.5-3B (test_counts.py), where tenths are floored: 2,057,544 of 2 · 1,870,848.
    rho = rho_of("parameters", trainable=2_057_544, dense=2 * 1_870_848)
    assert rho == pytest.approx(0.4501, abs=5e-5)
    assert learning_rate_factor(rho) == pytest.approx(1.3485, abs=5e-5)
    # An intersection keeps p n of n: as much as the mask says.
    assert rho_of("parameters", trainable=10, dense=100) == pytest.approx(rho_of("mask"))


def test_nothing_pruned_needs_no_compensation() -> None:
    assert learning_rate_factor(rho_of("mask", p=1.0)) == 1.0
    assert learning_rate_factor(rho_of("parameters", trainable=7, dense=7)) == 1.0
    assert learning_rate_factor(rho_of("off")) == 1.0
    assert rho_of("off") == 0.0


@pytest.mark.parametrize(("rho", "factor"), [("0.75", 2.0), (0.0, 1.0), ("0", 1.0), (0.99, 10.0), ("1e-1", 1.0541)])
def test_a_number_is_taken_as_it_is(rho: str | float, factor: float) -> None:
    assert rho_of(rho) == float(rho)
    assert learning_rate_factor(rho_of(rho)) == pytest.approx(factor, abs=5e-5)


@pytest.mark.parametrize("rho", ["1", "1.5", "-0.1", "nan", "inf", "Mask", "none", "", -1e-9, 1.0])
def test_what_is_no_share_is_refused(rho: str | float) -> None:
    with pytest.raises(UserError, match=r"rho: .* is neither one of mask, parameters, off nor a number in \[0, 1\)"):
        parse_rho(rho)
