"""What is taken from inside transformers is still needed, and still does what it is taken for."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from taso_ds.models import transformers_fixes
from taso_ds.models.load_sharded import LoadReport

PACKAGE = Path(transformers_fixes.__file__).parents[1]
FIXES = [
    value
    for _, value in inspect.getmembers(transformers_fixes, inspect.isfunction)
    if value.__module__ == transformers_fixes.__name__
]
# Modules that transformers documents, or whose names its users import.
PUBLIC = {"hf_argparser", "utils", "models", "integrations"}


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.__name__)
def test_each_says_when_and_where_and_has_a_test(fix: Any) -> None:
    assert "Seen in: transformers 5." in fix.__doc__
    assert "Upstream: " in fix.__doc__
    assert f"test_{fix.__name__}" in globals()


def test_no_other_module_reaches_inside() -> None:
    used = {
        (path.name, module)
        for path in PACKAGE.rglob("*.py")
        for module in re.findall(r"^ *(?:from|import) transformers\.(\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert {name for name, module in used if module not in PUBLIC} == {"transformers_fixes.py"}


def config() -> LlamaConfig:
    return tiny_models.llama().config


def test_skip_initialization() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    with transformers_fixes.skip_initialization():
        LlamaForCausalLM(config()).init_weights()
    skipped = torch.random.get_rng_state()
    LlamaForCausalLM(config()).init_weights()
    assert torch.equal(before, skipped)
    assert not torch.equal(before, torch.random.get_rng_state())


def test_compute_buffers(tmp_path: Path) -> None:
    gptj = GPTJConfig(vocab_size=256, n_positions=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    GPTJForCausalLM(gptj).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    built = AutoModelForCausalLM.from_config(gptj, dtype=torch.bfloat16)
    expected = dict(loaded.named_buffers())
    assert any(not torch.equal(value, expected[name]) for name, value in built.named_buffers())
    transformers_fixes.compute_buffers(built)
    assert all(torch.equal(value, expected[name]) for name, value in built.named_buffers())


def test_initial_value() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
    torch.manual_seed(3)
    value = transformers_fixes.initial_value(model, "model.layers.1.mlp.up_proj.weight")
    assert 0.5 < float(value.std()) / model.config.initializer_range < 2.0
    assert torch.equal(transformers_fixes.initial_value(model, "model.norm.weight"), torch.ones(32))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_forgive_known_differences() -> None:
    class Forgiving(LlamaForCausalLM):
        _keys_to_ignore_on_load_unexpected = [r"\.old$"]  # noqa: RUF012

    report = LoadReport(missing_keys={"model.norm.weight"}, unexpected_keys={"a.old", "a.new"})
    transformers_fixes.forgive_known_differences(Forgiving(config()), report)
    assert (report.missing_keys, report.unexpected_keys) == ({"model.norm.weight"}, {"a.new"})


def test_converted_names() -> None:
    model = tiny_models.llama()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = transformers_fixes.converted_names(model, names, ["up_proj"])
    assert set(names) - set(found) == {name for name in names if "up_proj" in name}
    assert "lm_head" in set(names) - set(transformers_fixes.converted_names(model, names, None))


def test_converters_of() -> None:
    assert not transformers_fixes.converters_of(tiny_models.llama())
    rules = transformers_fixes.converters_of(tiny_models.mixtral())
    assert any("experts" in pattern for rule in rules for pattern in rule.target_patterns)


def test_rearrangements() -> None:
    assert not transformers_fixes.rearrangements(tiny_models.llama())
    assert transformers_fixes.rearrangements(tiny_models.mixtral())


def test_stacks_modules() -> None:
    assert any(map(transformers_fixes.stacks_modules, transformers_fixes.rearrangements(tiny_models.mixtral())))
    assert not transformers_fixes.stacks_modules(object())


def test_puts_experts_end_to_end() -> None:
    rules = transformers_fixes.converters_of(tiny_models.mixtral())
    assert all(transformers_fixes.puts_experts_end_to_end(rule) for rule in rules)


def test_translated_keys(tmp_path: Path) -> None:
    """The names of a checkpoint that transformers itself loads completely."""
    model = tiny_models.mixtral()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = transformers_fixes.translated_keys(model, stored)
    assert {name for name, _ in found.values()} <= set(model.state_dict())
    assert any(pattern is not None for _, pattern in found.values())
