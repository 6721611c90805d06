"""How the base is scored."""

from dataclasses import dataclass

from taso_ds.adapters.choices import REDUCTIONS, SCORES
from taso_ds.flags.flag import SCHEDULE, arg, require, require_one_of

IMPORTANCE_WEIGHTS = ("loaded", "original")


@dataclass(frozen=True)
class CalibrationArguments:
    """Core regions: how the base is scored and cut. Method sections 1 and 2."""

    calibration_samples: int = arg(128, "Training rows that are scored.", unit="rows")
    calibration_batch_size: int | None = arg(
        None, "Rows per scoring micro-batch; default: the training micro-batch.", unit="rows"
    )
    calibration_reduction: str = arg("signed_mean", "signed_mean over all tokens, or per_batch_abs.")
    importance: str = arg("importance", "Score: importance |W·g|, magnitude |W|, gradient |g|, or random.")
    element_fraction: float = arg(0.05, "Share of a matrix's elements that are core (the paper's k).", unit="share")
    core_fraction: float = arg(
        0.10, "Share of rows and of columns in the core region (the paper's p).", unit="share", first=True
    )
    calibration_passes: int = arg(
        1,
        "Score in this many groups of matrices: less memory, more passes over the rows.",
        effect=SCHEDULE,
        unit="passes",
        planned=True,
    )
    calibration_offload: str = arg(
        "none", "cpu: gradient sums in host memory; none: on the device.", effect=SCHEDULE, planned=True
    )
    importance_weights: str = arg("loaded", "W of the score: loaded (dequantized) or, if quantized here, original.")
    core_regions: str | None = arg(None, "Reuse this core_regions.safetensors instead of scoring.", path=True)

    def __post_init__(self) -> None:
        require_one_of("calibration_reduction", self.calibration_reduction, REDUCTIONS)
        require_one_of("importance", self.importance, SCORES)
        require_one_of("calibration_offload", self.calibration_offload, ("none", "cpu"))
        require(self.calibration_passes > 0, "calibration_passes", self.calibration_passes, "a positive number")
        require_one_of("importance_weights", self.importance_weights, IMPORTANCE_WEIGHTS)
        for name in ("element_fraction", "core_fraction"):
            value = getattr(self, name)
            require(0.0 < value <= 1.0, name, value, "in (0, 1]")
        require(self.calibration_samples > 0, "calibration_samples", self.calibration_samples, "a positive number")
        size = self.calibration_batch_size
        require(size is None or size > 0, "calibration_batch_size", size, "a positive number of rows")


# Flags that say how core regions are scored. With --core_regions the file says it, and these do not.
SCORING = (
    "calibration_samples",
    "calibration_batch_size",
    "calibration_reduction",
    "calibration_passes",
    "calibration_offload",
    "importance",
    "importance_weights",
)
