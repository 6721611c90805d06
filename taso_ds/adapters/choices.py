"""What a user can choose of the method, as data: flags name the choices before torch is loaded."""

from dataclasses import dataclass

SCORES = ("importance", "magnitude", "gradient", "random")
REDUCTIONS = ("signed_mean", "per_batch_abs")


@dataclass(frozen=True)
class Branch:
    """One pair ``B A``: whether ``B`` is limited to the core rows and ``A`` to the core columns."""

    core_rows: bool
    core_cols: bool


STRUCTURES: dict[str, tuple[Branch, ...]] = {
    # whole core rows, plus whole core columns: the only reading that gives the published parameter count
    "union": (Branch(core_rows=True, core_cols=False), Branch(core_rows=False, core_cols=True)),
    # only the core rows × core columns block
    "intersection": (Branch(core_rows=True, core_cols=True),),
}
