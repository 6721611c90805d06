"""A folder from somebody else runs no code, secrets stay where they are, and files lie where and as they should."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Finished, call_main
from mistakes import GOOD, assert_one_line, contents, unchanged
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def model(llama_folder: Path, desk: Path) -> Path:
    """A model of one's own, to be tampered with."""
    return shutil.copytree(llama_folder, desk / "model")


@pytest.fixture
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What foreign code makes, if it runs."""
    return tmp_path_factory.mktemp("trap") / "sprung"


def train(model: Path, *flags: str | Path) -> Finished:
    return call_main("train", [*GOOD.format(llama=model).split(), *flags])


# Pickles --------------------------------------------------------------------------------------------------------------

PICKLES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def plant(folder: Path, trap: Path) -> None:
    """Write pickles, in the plain format and in torch's, under every name a library would look for."""
    import torch

    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps({"weight": Trap(trap)}))
    torch.save({"weight": Trap(trap)}, folder / "consolidated.pth")


def test_the_trap_works(trap: Path, tmp_path: Path) -> None:
    plant(tmp_path, trap)
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert trap.is_dir()


@pytest.mark.parametrize("stage", [0, 3])
def test_pickled_weights_are_not_unpickled(stage: int, model: Path, desk: Path, trap: Path) -> None:
    plant(model, trap)
    (model / "model.safetensors").unlink()
    with unchanged(desk):
        assert_one_line(train(model, "--ds_config", f"zero{stage}.json"), "model_name_or_path", "cannot load")
    assert not trap.exists()


def test_an_index_of_pickles_leads_nowhere(model: Path, desk: Path, trap: Path, forbid_weights: None) -> None:
    plant(desk, trap)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../pytorch_model.bin"}}')
    assert_one_line(train(model), "pytorch_model.bin.index.json", "not a file of its folder")


def test_pickles_beside_weights_and_adapters_are_ignored(model: Path, desk: Path, trap: Path) -> None:
    plant(model, trap)
    train(model).succeeded()
    for folder in ("run", "run/adapter"):
        plant(desk / folder, trap)
    call_main("evaluate", ["--run", "run"]).succeeded()
    assert not trap.exists()
    (desk / "run" / "adapter" / "adapter_model.safetensors").unlink()  # so that peft looks at the pickle
    assert_one_line(call_main("export", ["--run", "run"]), "does not open with peft")
    (desk / "run" / "adapter" / "taso_adapter.safetensors").unlink()
    assert_one_line(call_main("evaluate", ["--run", "run"]), "taso_adapter.safetensors: no such file")
    assert not trap.exists()


# Code that comes with a model -----------------------------------------------------------------------------------------


def bring_code(model: Path, trap: Path, *, model_type: str | None) -> None:
    """Let configuration, model and tokenizer name code of the folder's own."""
    (model / "foreign.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"Path({str(trap)!r}).mkdir(exist_ok=True)\n"
        f"class Config(LlamaConfig):\n    model_type = {model_type or 'llama'!r}\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    config["model_type"] = model_type or config["model_type"]
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "foreign.Tokenizer"]}
    if model_type is not None:
        tokenizer["tokenizer_class"] = "ForeignTokenizer"
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture
def modules_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where transformers copies such code before it imports it."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr(hub, "HF_MODULES_CACHE", folder)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("script", ["train", "calibrate", "plan"])
def test_code_of_an_unknown_model_is_refused(script: str, model: Path, desk: Path, trap: Path) -> None:
    bring_code(model, trap, model_type="foreign")
    with unchanged(desk):
        for flags in ([], ["--dry_run"]):
            finished = call_main(script, [*GOOD.format(llama=model).split(), *flags])
        assert_one_line(finished, "model_name_or_path", "--trust_remote_code")
    assert not trap.exists()


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("stage", [0, 3])
def test_code_of_a_known_model_is_not_run(stage: int, model: Path, desk: Path, trap: Path) -> None:
    bring_code(model, trap, model_type=None)
    proof = ["--verify_export"] if stage == 3 else []  # in a fresh process
    train(model, "--ds_config", f"zero{stage}.json", *proof).succeeded()
    assert not trap.exists()


@pytest.mark.usefixtures("modules_cache")
def test_code_is_run_when_asked_for(model: Path, desk: Path, trap: Path) -> None:
    bring_code(model, trap, model_type=None)
    train(model, "--trust_remote_code").succeeded()
    assert trap.exists()


# Secrets --------------------------------------------------------------------------------------------------------------

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MY_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "SERVICE_SECRET")


def test_secrets_of_the_environment_are_written_and_said_nowhere(
    llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, f"canary-{name.lower()}")
    ds_config = desk.with_name("monitored.json")  # beside what is searched
    ds_config.write_text('{"comet": {"enabled": false, "api_key": "canary-comet"}}')
    said = [train(llama_folder, "--ds_config", ds_config).succeeded()]
    said.append(call_main("evaluate", ["--run", "run"]).succeeded())
    said.append(train(llama_folder, "--model_name_or_path", "nobody/nothing", "--output_dir", "other"))  # asks the Hub
    said.append(train(llama_folder, "--ds_config", ds_config, "--dry_run", "--output_dir", "other").succeeded())
    files = {path: content for path, content in contents(desk).items() if content is not None}
    assert desk / "run" / "run.json" in files
    assert not [path for path, content in files.items() if b"canary" in content]
    assert "canary" not in "".join(finished.out + finished.err for finished in said) + caplog.text


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_are_made_with_the_users_umask(umask: int, llama_folder: Path, desk: Path) -> None:
    """safetensors' own files are for their owner alone."""
    train(llama_folder, "--output_dir", "deep/run").succeeded()
    train(llama_folder, "--output_dir", "deep/full", "--method", "full").succeeded()
    call_main("export", ["--run", "deep/run", "--merge"]).succeeded()
    call_main("plan", [*GOOD.format(llama=llama_folder).split(), "--json", "deep/p.json", "--plot", "deep/p.png"])
    made = [desk / "deep", *(desk / "deep").rglob("*")]
    names = {path.name for path in made}
    assert names >= {"core_regions.safetensors", "adapter_model.safetensors", "model.safetensors", "p.json", "p.png"}
    for path in made:
        whole = 0o777 if path.is_dir() else 0o666
        assert oct(path.stat().st_mode & 0o777) == oct(whole & ~umask), path


def test_names_inside_a_model_lead_nowhere(model: Path, desk: Path) -> None:
    """A chat template's name becomes a file's name when a whole model is saved."""
    file = model / "tokenizer_config.json"
    templates = [{"name": "default", "template": "x"}, {"name": "../../../outside", "template": "x"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
    before = {path for path in contents(desk.parent) if desk / "run" not in path.parents}
    assert_one_line(train(model, "--method", "full"), "model: cannot save the tokenizer", "outside")
    after = {path for path in contents(desk.parent) if desk / "run" not in path.parents}
    assert after - before == {desk / "run"}
    assert not (desk / "run" / "model").exists()
    assert not [path for path in (desk / "run").rglob("*") if path.name.startswith(".")]


def test_a_link_in_the_run_folder_is_replaced_not_followed(llama_folder: Path, desk: Path) -> None:
    train(llama_folder).succeeded()
    (desk / "precious").mkdir()
    (desk / "precious" / "thesis.tex").write_text("...")
    shutil.rmtree(desk / "run" / "adapter")
    (desk / "run" / "adapter").symlink_to(desk / "precious")
    train(llama_folder, "--overwrite_output_dir").succeeded()
    assert (desk / "precious" / "thesis.tex").read_text() == "..."
    assert not (desk / "run" / "adapter").is_symlink()
    assert load_file(desk / "run" / "adapter" / "adapter_model.safetensors")
