"""A base before its weights: every answer is worked out once, and the same matrices are found in a loaded model."""

import ast
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

from taso_ds.adapters.targets import MatrixShape, find_targets
from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.spec import BaseSpec, read_spec

PACKAGE = Path(__file__).resolve().parents[2] / "taso_ds"


def spec_of(folder: Path, **options: bool) -> BaseSpec:
    return read_spec(ModelArguments(model_name_or_path=str(folder), **options), str(folder))  # type: ignore[arg-type]


def test_what_is_asked_twice_is_worked_out_once(llama_folder: Path) -> None:
    base = spec_of(llama_folder, load_in_4bit=True)
    assert (base.source, base.name, base.head) == (str(llama_folder), str(llama_folder), False)
    assert base.meta is base.meta
    assert base.quantization is base.quantization
    assert base.quantization is not None
    assert base.quantization.dtype == base.dtype == torch.bfloat16
    assert base.head_parameters == {}
    assert all(value.is_meta for value in base.meta.parameters())


def test_the_number_of_labels_is_the_heads_alone(llama_folder: Path, bert_folder: Path) -> None:
    for folder, head in ((llama_folder, "classification"), (bert_folder, "auto")):
        base = read_spec(ModelArguments(model_name_or_path=str(folder), head=head), str(folder), num_labels=7)
        assert base.head
        assert [value.shape[0] for value in base.head_parameters.values()][-1] == 7
    arguments = ModelArguments(model_name_or_path=str(llama_folder))
    base = read_spec(arguments, str(llama_folder), num_labels=7)
    assert base.config.num_labels != 7


def test_padding_is_known_before_anything_is_built(llama_folder: Path) -> None:
    base = spec_of(llama_folder)
    base.pad_with(5)
    assert base.meta.config.pad_token_id == 5
    with pytest.raises(AssertionError):
        base.pad_with(6)


def test_a_damaged_config_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}')
    with pytest.raises(UserError, match="model_type"):
        spec_of(tmp_path)


def test_targets_are_found_again_in_another_copy() -> None:
    """A linear that was replaced may be stored another way round; its shape is asked for again."""
    with torch.device("meta"):
        model = tiny_models.gpt2()
    targets, copy = find_targets(model), tiny_models.gpt2()
    name = next(iter(targets))
    copy.set_submodule(name, nn.Linear(32, 96))
    found = targets.within(copy)
    assert list(found) == list(targets)
    assert targets[name].shape == MatrixShape(96, 32, transposed=True)
    assert found[name].shape == MatrixShape(96, 32)
    assert found[name].parameter is copy.get_submodule(name).weight
    assert (targets.any_transposed, targets.some([name]).numel, targets.some([name]).edges) == (True, 96 * 32, 96 + 32)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("quantization_of", "models/spec.py"), ("wants_head", "models/spec.py"), ("load_config", "models/spec.py")],
)
def test_one_place_asks(asked: str, answered: str) -> None:
    calls = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == asked
    }
    assert calls - {"models/model_class.py"} == {answered}
