"""Draw the rooms of the package and what each stands on, from the imports, into docs/architecture.md.

python benchmarks/house.py --write docs/architecture.md
"""

import argparse
import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_START, _END = "<!-- made by benchmarks/house.py -->", "<!-- end -->"
# Modules beside the rooms that are drawn as one: how a program starts and ends, and what starts it.
_TOGETHER = {"crash_report": "entry", "__main__": "launch", "batch_script": "launch"}
_EVERYWHERE = frozenset({"errors"})  # every room stands on it: an arrow from each would say nothing


def rooms() -> dict[str, set[str]]:
    """Return the rooms with those that each imports."""
    found: dict[str, set[str]] = {}
    for file in sorted([*(ROOT / "taso_ds").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
        room = _room(file.relative_to(ROOT).with_suffix("").parts)
        if room is not None:
            found.setdefault(room, set()).update(_imported(file.read_text(encoding="utf-8")) - {room})
    return {room: {other for other in others if other in found} for room, others in found.items()}


def _room(parts: tuple[str, ...]) -> str | None:
    """Return the room of a module, given as the parts of its name; None where it is not drawn."""
    if parts[0] == "launch" or parts[:2] == ("taso_ds", "launch"):
        return "launch"
    name = parts[1] if len(parts) > 1 else ""
    if parts[0] != "taso_ds" or name in ("", "__init__") or name in _EVERYWHERE:
        return None
    if parts[1:3] == ("planning", "numbers"):
        return "planning/numbers"
    return _TOGETHER.get(name, name)


def _imported(source: str) -> set[str]:
    names = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return {room for name in names if (room := _room(tuple(name.split(".")))) is not None}


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out what another arrow leads to anyway: the drawing shows on what each room stands directly.

    Raises:
        CycleError: rooms stand on one another.
    """
    below: dict[str, set[str]] = {}
    for room in TopologicalSorter(graph).static_order():
        below[room] = set().union(graph[room], *(below[other] for other in graph[room]))
    return {
        room: {other for other in others if not any(other in below[third] for third in others - {other})}
        for room, others in graph.items()
    }


def draw() -> str:
    """Return the drawing as a Mermaid graph."""
    lines = [
        f"  {room.replace('/', '_')}[{room}] --> {other.replace('/', '_')}[{other}]"
        for room, others in sorted(reduced(rooms()).items())
        for other in sorted(others)
    ]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def put_into(text: str) -> str:
    """Return the page with the drawing in its place."""
    before, _, rest = text.partition(_START)
    return f"{before}{_START}\n\n{draw()}\n\n{_END}{rest.partition(_END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="PAGE")
    page = parser.parse_args().write
    page.write_text(put_into(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
