"""The rooms of the house and who may enter which: the imports of every module against one table."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted([*(ROOT / "taso_ds").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

# room -> rooms it may import, besides itself. A room is a sub-package of taso_ds, a module beside them, or launch.
_GROUND = {"errors", "files", "flags"}
_ONE_THING = {"adapters", "data", "distributed", "models", "objectives", "scoring", "training", "methods"}
ALLOWED: dict[str, set[str]] = {
    "taso_ds": set(),
    "errors": set(),
    "console": {"errors"},
    "files": {"errors"},
    "flags": {"console", "errors", "files"},
    "crash_report": {"flags"},
    "interrupts": {"console", "errors"},
    "slurm_ranks": {"errors"},
    "adapters": {"errors", "files"},
    "data": _GROUND,
    "distributed": {"console", "errors", "files", "slurm_ranks"},
    "models": _GROUND | {"console", "adapters", "distributed"},
    "reports": {"errors", "files", "adapters"},
    "objectives": _GROUND | {"console", "data", "models", "distributed", "adapters"},
    "scoring": _GROUND | {"console", "adapters", "data", "distributed", "models", "objectives"},
    "training": _GROUND
    | {"console", "interrupts", "adapters", "data", "distributed", "models", "objectives", "reports"},
    "methods": _GROUND | {"adapters", "data", "distributed", "models", "scoring", "training"},
    "config": {"errors", "flags", "data", "models", "scoring", "training", "methods"},
    "defaults": {"errors", "flags", "config", "data", "training"},
    "job": _GROUND | _ONE_THING | {"config"},
    # shapes in, bytes and seconds out: it counts adapters and matrices, and must not see ranks, flags or files
    "planning.numbers": {"errors", "adapters"},
    "planning": _GROUND | _ONE_THING | {"config", "defaults", "job", "planning.numbers"},
    "runs": _GROUND | _ONE_THING | {"config", "console", "defaults", "interrupts", "job", "planning", "reports"},
    # looks at the machine, and counts the planned run; nothing that runs a job may depend on it
    "doctor": _GROUND | {"config", "distributed", "job", "models", "planning", "runs"},
    "batch_script": {"errors", "flags", "config", "training"},
    "entry": {"errors", "interrupts", "console", "crash_report", "flags", "slurm_ranks"},
    "launch": _GROUND
    | {"config", "data", "defaults", "distributed", "runs", "planning", "doctor"}
    | {"batch_script", "entry", "interrupts", "taso_ds"},
    # the one command in front of all scripts
    "__main__": {"errors", "entry", "flags", "launch", "taso_ds"},
}
# What holds a whole run's flags, or all that follows from them, stays above the rooms that do one thing.
NAMES_OF_RUNS = {"RunConfig", "Job"}
KNOW_RUNS = {"config", "defaults", "job", "planning", "runs", "doctor", "batch_script", "launch"}
LARGEST_SHARE = 0.15  # of the package, that one room may hold
# The method runs wherever torch does.
ADAPTERS_NEED = {"torch", "safetensors"}


@dataclass(frozen=True)
class Import:
    """One imported name, and whether the import happens when the module is loaded."""

    name: str
    at_load: bool
    line: int


def imports_of(source: str) -> list[Import]:
    """Return every import of a module; ``from a import b`` counts as ``a.b``, which may be a module."""
    found: list[Import] = []

    def walk(node: ast.AST, at_load: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, at_load, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            found.extend(Import(f"{node.module}.{alias.name}", at_load, node.lineno) for alias in node.names)
        inside = at_load and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(ast.parse(source), at_load=True)
    return found


def room_of_file(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "launch":
        return "launch"
    return room_of_parts(parts[1:])


def room_of_parts(parts: Sequence[str]) -> str:
    """Return the innermost room that the names below ``taso_ds`` lead to."""
    inner = ".".join(parts[:2])
    return inner if inner in ALLOWED else parts[0] if parts and parts[0] in ALLOWED else "taso_ds"


def room_of_import(name: str) -> str | None:
    """Return the room an imported name lives in; None for other packages."""
    first, _, rest = name.partition(".")
    if first == "launch":
        return "launch"
    if first != "taso_ds":
        return None
    return room_of_parts(rest.split("."))


def breaches(room: str, source: str) -> list[str]:
    """Return what a module of ``room`` imports and may not."""
    found = []
    for used in imports_of(source):
        top = used.name.partition(".")[0]
        other = room_of_import(used.name)
        if other is not None and other != room and other not in ALLOWED[room]:
            found.append(f"line {used.line}: {room} imports {other}")
        if top == "deepspeed" and (room != "distributed" or used.at_load):
            found.append(f"line {used.line}: deepspeed is imported only in taso_ds/distributed, inside functions")
        own = other is not None or top in sys.stdlib_module_names
        name = used.name.rpartition(".")[2]
        if name in NAMES_OF_RUNS and room not in KNOW_RUNS:
            found.append(f"line {used.line}: {room} knows {name}")
        if room == "adapters" and used.at_load and not own and top not in ADAPTERS_NEED:
            found.append(f"line {used.line}: adapters loads {top}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_stays_in_its_room(path: Path) -> None:
    room = room_of_file(path)
    assert room in ALLOWED, f"{room} is a new room: say in ALLOWED what it may import"
    assert not breaches(room, path.read_text(encoding="utf-8"))


def test_no_room_holds_most_of_the_house() -> None:
    lines: Counter[str] = Counter()
    for path in MODULES:
        lines[room_of_file(path).partition(".")[0]] += len(path.read_text(encoding="utf-8").splitlines())
    room, most = lines.most_common(1)[0]
    assert most <= LARGEST_SHARE * lines.total(), f"{room} holds {most} of {lines.total()} lines"


def test_every_room_is_there() -> None:
    assert {room_of_file(path) for path in MODULES} == set(ALLOWED)


@pytest.mark.parametrize(
    ("room", "source", "breach"),
    [
        ("adapters", "from taso_ds.distributed import comm", "adapters imports distributed"),
        ("adapters", "from taso_ds import data", "adapters imports data"),
        ("adapters", "import numpy", "adapters loads numpy"),
        ("data", "def f():\n    import taso_ds.config", "data imports config"),
        ("distributed", "from taso_ds.training.trainer import Trainer", "distributed imports training"),
        ("distributed", "class A:\n    import deepspeed", "inside functions"),
        ("training", "def f():\n    from deepspeed import zero", "only in taso_ds/distributed"),
        ("training", "from taso_ds.launch import train", "training imports launch"),
        ("training", "import launch.train", "training imports launch"),
        ("errors", "import taso_ds", "errors imports taso_ds"),
        ("methods", "def f():\n    from taso_ds.scoring.x import RunConfig", "methods knows RunConfig"),
        ("runs", "from taso_ds.config import RunConfig", None),
        ("adapters", "import math, torch\nfrom taso_ds.errors import UserError\ndef f():\n    import peft", None),
        ("distributed", "def f():\n    import deepspeed", None),
    ],
)
def test_a_breach_is_seen(room: str, source: str, breach: str | None) -> None:
    found = breaches(room, source)
    assert len(found) == (breach is not None)
    assert breach is None or breach in found[0]


def loaded_after(statement: str) -> set[str]:
    """Return the top-level packages that are loaded once a fresh interpreter has run ``statement``."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_light() -> None:
    assert not {"deepspeed", "transformers", "torch"} & loaded_after("import taso_ds")


def test_reading_a_ds_config_needs_no_deepspeed_and_no_torch() -> None:
    statement = "from taso_ds.distributed.ds_config import read_ds_config; read_ds_config('zero3.json')"
    assert not {"deepspeed", "transformers", "torch"} & loaded_after(statement)


def test_no_module_loads_deepspeed() -> None:
    """Not even through another package: a dry run works where DeepSpeed is not installed."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    modules = [name.removesuffix(".__init__") for name in names]
    statement = "import " + ", ".join(f"taso_ds.{name}" if name.startswith("launch") else name for name in modules)
    assert "deepspeed" not in loaded_after(statement)
