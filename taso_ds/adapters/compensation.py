"""Learning-rate compensation for the pruned share ρ: ``lr = lr_base · √(1 / (1 − ρ))`` (method section 4)."""

import math

from taso_ds.errors import UserError

RHO_NAMES = ("mask", "parameters", "off")


def parse_rho(rho: str | float) -> str | float:
    """Return ``mask``, ``parameters``, ``off`` or a number in [0, 1).

    Raises:
        UserError: for anything else.
    """
    if rho in RHO_NAMES:
        return rho
    try:
        number = float(rho)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < 1.0:
        raise UserError(f"rho: {rho!r} is neither one of {', '.join(RHO_NAMES)} nor a number in [0, 1)")
    return number


def pruned_share(rho: str | float, *, core_fraction: float, num_trainable: int, num_dense: int) -> float:
    """Return ρ.

    ``mask`` (our default; the paper does not say which ρ it uses) is the share of rows and columns outside the region,
    ``1 − p``. ``parameters`` is the share of the dense branches' entries that is pruned.

    Args:
        rho: what ``parse_rho`` returned.
        core_fraction: ``p``.
        num_trainable: parameters of the adapter.
        num_dense: entries of its dense pairs.

    Raises:
        UserError: p is so small that ρ is 1, and the learning rate infinite.
    """
    if rho == "mask":
        if 1.0 - core_fraction == 1.0:
            raise UserError(
                f"core_fraction: {core_fraction} cannot be told from 0: keep a share of the rows, like 0.01"
            )
        return 1.0 - core_fraction
    if rho == "parameters":
        return 1.0 - num_trainable / num_dense
    return 0.0 if rho == "off" else float(rho)


def learning_rate_factor(rho: float) -> float:
    """Return ``√(1 / (1 − ρ))``."""
    return math.sqrt(1.0 / (1.0 - rho))
