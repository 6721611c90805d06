"""What is known of bfloat16 before anything is loaded; the refusals are in tests/e2e/test_models.py."""

import logging
from typing import Any

import pytest
import torch
from families import FAMILIES, build

from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.bfloat16 import check_bfloat16
from taso_ds.models.spec import BaseSpec


def check(name: str, **flags: Any) -> None:
    (family,) = (entry for entry in FAMILIES if entry.name == name)
    model = build(family, device="meta")
    check_bfloat16(BaseSpec(ModelArguments(**flags), name, model.config, head=family.kind == "encoder"))


@pytest.mark.parametrize("name", ["llama", "funnel", "rwkv", "mixtral", "jetmoe"])
def test_what_computes_is_left_alone(name: str) -> None:
    """The last one decides by values how it goes on, which nobody knows here."""
    check(name)


def test_float32_is_not_asked_about() -> None:
    check("fnet", bf16=False)


def test_nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=r"bf16: FNetForSequenceClassification \(fnet\) does not compute in bfloat16"):
        check("fnet")
    assert caplog.records == []
    assert logging.root.manager.disable == logging.NOTSET
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.ones(1) + 1) is torch.Tensor
