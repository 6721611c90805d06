"""Files that are damaged, hostile or of another kind: one line that names the file, exit code 2, nothing written.

Every case makes its file in the current folder and runs the real ``main()``; weights are never loaded.
"""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import call_main
from mistakes import GOOD, assert_one_line, refused, unchanged
from safetensors.torch import load_file, save_file
from sample_rows import write_splits

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with core regions and an adapter."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*GOOD.format(llama=llama_folder).split(), *write_splits(folder, 8, 8)]
    call_main("train", [*flags, "--output_dir", folder / "run"]).succeeded()
    return folder / "run"


# Weights --------------------------------------------------------------------------------------------------------------


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and its data."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lying(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Return what changes the header's entry of the last tensor, and nothing else."""

    def damage(content: bytes) -> bytes:
        header, data = header_of(content)
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        change(max(tensors, key=lambda entry: entry["data_offsets"][0]))
        return with_header(header, data)

    return damage


def move(by: int) -> Callable[[dict[str, Any]], object]:
    return lambda entry: entry.update(data_offsets=[offset + by for offset in entry["data_offsets"]])


DAMAGED_WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "corrupt header": lambda content: content[:8] + b"#" * 40 + content[48:],
    "header longer than the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "header of absurd length": lambda content: struct.pack("<Q", 1 << 62) + content[8:],
    "empty": lambda _: b"",
    "offsets beyond the file": lying(move(1 << 40)),
    "overlapping offsets": lying(move(-16)),
    "offsets below zero": lying(move(-(1 << 40))),
    "another dtype": lying(lambda entry: entry.update(dtype="F64")),
    "an unknown dtype": lying(lambda entry: entry.update(dtype="F33")),
    "another shape": lying(lambda entry: entry.update(shape=[1 << 40, 1 << 40])),
    "shape below zero": lying(lambda entry: entry.update(shape=[-1, 2])),
}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", DAMAGED_WEIGHTS)
def test_damaged_weights(name: str, stage: int, llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    shutil.copytree(llama_folder, desk / "model")
    file = desk / "model" / "model.safetensors"
    file.write_bytes(DAMAGED_WEIGHTS[name](file.read_bytes()))
    flags = f"--model_name_or_path model --ds_config zero{stage}.json"
    refused(flags, "model_name_or_path", "model.safetensors", "copy it again", llama=llama_folder)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{{"weight_map": {{"{name}": "model-00002.safetensors"}}}}', ("model-00002.safetensors", "download it")),
        ('{{"weight_map": {{"{name}": "../outside.safetensors"}}}}', ("'../outside.safetensors'", "not a file of its")),
        ('{{"weight_map": {{"{name}": "sub/../../outside.safetensors"}}}}', ("not a file of its folder",)),
        ('{{"weight_map": {{"{name}": "{outside}"}}}}', ("outside.safetensors", "not a file of its folder")),
        ('{{"weight_map": {{"{name}": ".."}}}}', ("'..'", "not a file of its folder")),
        ('{{"weight_map": {{"{name}": ""}}}}', ("not a file of its folder",)),
        ('{{"weight_map": {{"{name}": "a.safetensors", "{name}": "b.safetensors"}}}}', ("twice",)),
        ('{{"weight_map": {{"{name}": [1]}}}}', ("missing",)),
        ('{{"weight_map": 3}}', ("not a checkpoint index",)),
        ("[]", ("not a checkpoint index",)),
        ("{{", ("not valid JSON",)),
    ],
)
def test_a_damaged_index(
    index: str, words: tuple[str, ...], stage: int, llama_folder: Path, desk: Path, forbid_weights: None
) -> None:
    """A file outside the folder is there, and whole: it is not read all the same."""
    shutil.copytree(llama_folder, desk / "model")
    outside = desk / "outside.safetensors"
    (desk / "model" / "model.safetensors").rename(outside)
    name = next(iter(load_file(outside)))
    (desk / "model" / "model.safetensors.index.json").write_text(index.format(name=name, outside=outside))
    flags = f"--model_name_or_path model --ds_config zero{stage}.json"
    refused(flags, "model_name_or_path", "model.safetensors.index.json", *words, llama=llama_folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model_type": "llama", "hidden_size": 32, "hidden_size": 64}', ("'hidden_size' twice",)),
        (b"\xff\xfe", ("cannot load", "UTF-8")),
        (b"[" * 100_000, ("not readable JSON",)),
        (b"[]", ("cannot load",)),
        (b'{"model_type": "llama", "hidden_size": "wide"}', ("cannot load",)),
    ],
)
def test_a_damaged_config(
    content: bytes, words: tuple[str, ...], llama_folder: Path, desk: Path, forbid_weights: None
) -> None:
    shutil.copytree(llama_folder, desk / "model")
    (desk / "model" / "config.json").write_bytes(content)
    refused("--model_name_or_path model", "model_name_or_path", "model", *words, llama=llama_folder)


# Region files and adapters --------------------------------------------------------------------------------------------


class Foreign:
    """What a pickle of somebody else's would make."""


def flip(content: bytes, place: float) -> bytes:
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


DAMAGED_TENSORS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-100],
    "a bit of the header": lambda content: flip(content, 100 / len(content)),
    "a bit of the middle": lambda content: flip(content, 0.7),
    "a bit of the last number": lambda content: flip(content, 1 - 1 / len(content)),
    "text": lambda _: b"core regions",
    "a pickle": lambda _: pickle.dumps(Foreign()),
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("name", DAMAGED_TENSORS)
def test_damaged_regions(name: str, run: Path, llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    whole = (run / "core_regions.safetensors").read_bytes()
    (desk / "r.safetensors").write_bytes(DAMAGED_TENSORS[name](whole))
    refused("--core_regions r.safetensors", "r.safetensors: ", llama=llama_folder)


def test_an_adapter_for_regions(run: Path, llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    file = run / "adapter" / "taso_adapter.safetensors"
    words = "not a taso_core_regions file (its kind is 'taso_adapter')"
    refused(f"--core_regions {file}", words, llama=llama_folder)


@pytest.mark.parametrize("name", [*DAMAGED_TENSORS, "core regions"])
@pytest.mark.parametrize("script", ["evaluate", "export"])
def test_a_damaged_adapter(name: str, script: str, run: Path, desk: Path, forbid_weights: None) -> None:
    shutil.copytree(run, desk / "run")
    file = desk / "run" / "adapter" / "taso_adapter.safetensors"
    if name == "core regions":
        shutil.copy(run / "core_regions.safetensors", file)
    else:
        file.write_bytes(DAMAGED_TENSORS[name](file.read_bytes()))
    with unchanged(desk):
        assert_one_line(call_main(script, ["--run", "run"]), "adapter/taso_adapter.safetensors: ")


def test_an_adapter_whose_checksum_was_made_for_other_numbers(run: Path, desk: Path, forbid_weights: None) -> None:
    """Without its checksum a file counts as made by another program, and only what makes no sense is refused."""
    shutil.copytree(run, desk / "run")
    file = desk / "run" / "adapter" / "taso_adapter.safetensors"
    header, _ = header_of(file.read_bytes())
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "checksum"}
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".rows"))
    save_file(tensors | {name: tensors[name] + 10**6}, file, metadata=metadata)
    assert_one_line(call_main("evaluate", ["--run", "run"]), "taso_adapter.safetensors", "indices do not ascend within")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learing_rate": 1e-3}, ("'learing_rate'", "nearest: 'learning_rate'")),
        ({"rank": "two"}, ("rank is 'two', not a whole number",)),
        ({"rank": [1]}, ("rank is [1], not a whole number",)),
        ({"target_modules": {"a": 1}}, ("target_modules", "a list of texts")),
        ({"learning_rate": None}, ("learning_rate is None, not a number",)),
        ({"core_fraction": 2.0}, ("core_fraction: 2.0", "(0, 1]")),
    ],
)
def test_a_run_that_records_nonsense(
    change: dict[str, object], words: tuple[str, ...], run: Path, desk: Path, forbid_weights: None
) -> None:
    record = json.loads((run / "run.json").read_text())
    (desk / "run").mkdir()
    (desk / "run" / "run.json").write_text(json.dumps(record | {"config": record["config"] | change}))
    assert_one_line(call_main("evaluate", ["--run", "run"]), *words)


def test_a_run_that_records_a_value_twice(desk: Path) -> None:
    (desk / "run.json").write_text('{"config": {"rank": 1, "rank": 2}}')
    assert_one_line(call_main("evaluate", ["--run", "."]), "run.json", "the key 'rank' twice")


# Text -----------------------------------------------------------------------------------------------------------------

ROW = b'{"prompt": "a:", "completion": " b"}\n'
BOMB = "rank: &a [1]\nalpha: &b [*a, *a, *a]\nseed: [*b, *b, *b]"
TEXTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "JSON binary": ("ds.json", b"\xff\xfe{\x00", ("cannot read ds.json",)),
    "JSON nested": ("ds.json", b'{"a":' * 100_000, ("not readable JSON", "recursion")),
    "JSON digits": ("ds.json", b'{"steps_per_print": ' + b"9" * 5000 + b"}", ("not readable JSON", "4300")),
    "JSON huge number": ("ds.json", b'{"zero_optimization": {"stage": 3, "sub_group_size": 1e400}}',
                         ("sub_group_size",)),
    "JSON big integer": ("ds.json", b'{"zero_optimization": {"stage": 3, "sub_group_size": 1' + b"0" * 400 + b"}}",
                         ("sub_group_size",)),
    "JSON surrogate": ("ds.json", b'{"\\ud800": 1}', ("half a surrogate pair",)),
    "JSON long key": ("ds.json", b'{"' + b"k" * 1_000_000 + b'": 1}', ("unknown key",)),
    "JSON nested twice": ("ds.json", b'{"bf16": {"enabled": true, "enabled": false}}', ("'enabled' twice",)),
    "rows binary": ("rows.jsonl", bytes(range(256)), ("rows.jsonl: not UTF-8",)),
    "rows in UTF-16": ("rows.jsonl", ROW.decode().encode("utf-16"), ("rows.jsonl: not UTF-8",)),
    "rows nested": ("rows.jsonl", ROW + b"[" * 100_000, ("rows.jsonl:2", "not readable JSON")),
    "rows digits": ("rows.jsonl", ROW + b'{"prompt": ' + b"9" * 5000 + b"}", ("rows.jsonl:2", "4300")),
    "rows surrogate": ("rows.jsonl", ROW + b'{"prompt": "\\uD800", "completion": "b"}', ("rows.jsonl:2", "surrogate")),
    "rows key twice": ("rows.jsonl", b'{"prompt": "a", "prompt": "b", "completion": "c"}', ("rows.jsonl:1", "twice")),
    "rows one long line": ("rows.jsonl", b'{"prompt": "' + b"a" * 1_000_000, ("rows.jsonl:1", "not valid JSON")),
    "rows one long name": ("rows.jsonl", b'{"' + b"a" * 1_000_000 + b'": 1}', ("row 1", "'completion'")),
    "rows one long number": ("rows.jsonl", b'{"prompt": [' + b"1," * 400_000 + b'1], "completion": "c"}', ("row 1",)),
    "rows right to left": ("rows.jsonl", '"\u202eevil"'.encode(), ("rows.jsonl:1", "JSON object", "\\u202e")),
    "rows escape codes": ("rows.jsonl", b'{"prompt": 1, "completion": "c", "\\u001b[2J": 1}', ("row 1",)),
    "YAML bomb": ("run.yaml", BOMB.encode(), ("run.yaml", "the alias *a", "write the value")),
    "YAML merge bomb": ("run.yaml", b"rank: &a {k: 1}\nseed: {<<: [*a, *a]}", ("run.yaml", "the alias *a")),
    "YAML key twice": ("run.yaml", b"seed: 1\nseed: 2", ("run.yaml", "'seed' twice")),
    "YAML nested": ("run.yaml", b"rank: " + b"[" * 100_000, ("run.yaml nests values",)),
    "YAML tag": ("run.yaml", b"rank: !!python/object/apply:os.system [touch owned]", ("run.yaml", "python/object")),
    "YAML bad tag": ("run.yaml", b"rank: !!bool x", ("run.yaml: not readable YAML",)),
    "YAML digits": ("run.yaml", b"rank: " + b"9" * 5000, ("run.yaml: rank is", "not a whole number")),
    "YAML binary": ("run.yaml", bytes(range(256)), ("cannot read run.yaml",)),
    "YAML control": ("run.yaml", b"rank: \x01", ("run.yaml: not readable YAML",)),
    "YAML null character": ("run.yaml", b'train_file: "a\\0b"', ("train_file", "null characters")),
    "YAML surrogate": ("run.yaml", b'output_dir: "\\uD800"', ("output_dir",)),
    "YAML long text": ("run.yaml", b"eval_file: " + b"x" * 1_000_000, ("eval_file", "255 bytes")),
    "YAML two documents": ("run.yaml", b"rank: 1\n---\nrank: 2", ("run.yaml: not readable YAML", "another document")),
    "YAML number": ("run.yaml", b"3", ("run.yaml", "not a mapping")),
    "YAML empty": ("run.yaml", b"", ("run.yaml is empty",)),
    "YAML mapping for a text": ("run.yaml", b"task: {a: b}", ("task is {'a': 'b'}, not a text",)),
    "YAML in YAML": ("run.yaml", b"config: other.yaml", ("run.yaml", "another configuration file")),
}  # fmt: skip
FLAG_OF = {"ds.json": "--ds_config", "rows.jsonl": "--train_file", "run.yaml": "--config"}
NOT_ON_TOP = ("--output_dir run", "--eval_file eval.jsonl")  # flags of GOOD that a configuration could not override


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_text(name: str, llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    file, content, words = TEXTS[name]
    (desk / file).write_bytes(content)
    good = GOOD
    if file == "run.yaml":
        for flag in NOT_ON_TOP:
            good = good.replace(flag, "")
        good = good.replace("--task completion", "").replace("--train_file train.jsonl", "")
    with unchanged(desk):
        finished = call_main("train", [*good.format(llama=llama_folder).split(), FLAG_OF[file], file])
    assert_one_line(finished, *words)
    assert finished.errors[0].isprintable()  # nothing that moves the cursor or turns the text around
    assert finished.err.splitlines() == finished.errors


def test_debug_shows_where_a_file_was_read(llama_folder: Path, desk: Path) -> None:
    (desk / "ds.json").write_bytes(b'{"a":' * 100_000)
    finished = call_main("train", [*GOOD.format(llama=llama_folder).split(), "--ds_config", "ds.json", "--debug"])
    assert (finished.code, len(finished.errors)) == (2, 1)
    for word in ("Traceback", "RecursionError", "UserError: ds_config: ds.json: not readable JSON"):
        assert word in finished.err


def test_unusual_rows_are_no_mistake(llama_folder: Path, desk: Path) -> None:
    """Null characters, text from right to left, whole surrogate pairs and a row of a megabyte train like any other."""
    rows = [
        {"prompt": "a\0b", "completion": "\u202eright to left"},
        {"prompt": "\U0001f600", "completion": " b"},
        {"prompt": "x" * 1_000_000, "completion": " c"},
        {"prompt": "d", "completion": "y" * 1_000_000},
    ]
    (desk / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*GOOD.format(llama=llama_folder).split(), "--train_file", "rows.jsonl", "--max_steps", "1"]
    call_main("train", flags).succeeded()


def test_a_saved_data_set_that_is_damaged(llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    (desk / "data" / "train").mkdir(parents=True)
    (desk / "data" / "train" / "state.json").write_text("{}")
    good = GOOD.replace("--train_file train.jsonl", "").format(llama=llama_folder)
    finished = call_main("train", [*good.split(), "--data_dir", "data"])
    assert_one_line(finished, "--data_dir", "data/train", "not a readable saved data set")
