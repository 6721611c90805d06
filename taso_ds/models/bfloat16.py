"""Whether a model computes in bfloat16. One forward tells, on tensors that have shapes and dtypes but no values.

Most families do. Some code of transformers mixes dtypes, or asks for a transform that exists only in float32. A run
would learn that in its first forward, long after the weights were loaded.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from taso_ds.errors import UserError
from taso_ds.models.model_class import model_class
from taso_ds.models.spec import BaseSpec
from taso_ds.models.transformers_fixes import skip_initialization

_TOKENS = 16  # enough for models that shorten sequences on the way (Funnel)


def check_bfloat16(base: BaseSpec) -> None:
    """Refuse bfloat16 for a model whose forward runs in float32 only.

    A model that runs in neither dtype passes: its forward asks for values, which these tensors do not have.
    """
    if not base.arguments.bf16:
        return
    why = _what_ends_it(base, torch.bfloat16)
    if why is not None and _what_ends_it(base, torch.float32) is None:
        raise UserError(
            f"bf16: {type(base.meta).__name__} ({base.config.model_type}) does not compute in bfloat16 in this version"
            f" of transformers ({' '.join(str(why).split())[:200]}); pass --no_bf16"
        )


def _what_ends_it(base: BaseSpec, dtype: torch.dtype) -> Exception | None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with _silence(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), skip_initialization():
        try:
            model = model_class(head=base.head).from_config(
                copy.deepcopy(base.config), dtype=dtype, trust_remote_code=base.arguments.trust_remote_code
            )
            model.eval()(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64))
        except Exception as error:  # a forward may raise anything; float32 tells whether the dtype is why
            return error
    return None


@contextmanager
def _silence() -> Iterator[None]:
    """Show nothing of what torch and transformers log and warn meanwhile: this model is not the one that is used."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
