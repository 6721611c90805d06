"""The table of docs/models.md, made of the rows that ``support.py`` found, and read back for the tests."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from families import GROUPS

# cell: heading of its column
COLUMNS = {
    "fp32": "fp32", "bf16": "bf16", "score": "score", "zero3": "ZeRO-3", "checkpointing": "checkpointing",
    "nf4": "NF4", "experts": "experts", "proof": "proof", "merge": "merge",
}  # fmt: skip
_START, _END = "<!-- made by benchmarks/support.py -->", "<!-- end -->"


def marks(row: Mapping[str, Any]) -> list[str]:
    """Return one row's cells as they stand in the table; a dash where there is nothing to try."""
    found = row["cells"]
    return [("yes" if found[cell] is None else "no") if cell in found else "–" for cell in COLUMNS]


def render(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tables of all groups, each with why what is no is no."""
    parts = []
    for title, families in GROUPS.items():
        known = [family.name for family in families if family.name in rows]
        parts += [f"### {title}", "", f"| family | {' | '.join(COLUMNS.values())} | adapted |"]
        parts += ["|---" * (len(COLUMNS) + 2) + "|"]
        parts += [_line(name, rows[name]) for name in known]
        parts += ["", *(line for name in known for line in _reasons(name, rows[name])), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


def _line(name: str, row: Mapping[str, Any]) -> str:
    linears = " ".join(f"`{linear}`" for linear in row["linears"]) or "–"
    return f"| {name} | {' | '.join(marks(row))} | {linears} |"


def _reasons(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per reason, with all cells it holds for."""
    cells_of: dict[str, list[str]] = {}
    for cell, why in row["cells"].items():
        if why is not None:
            cells_of.setdefault(why, []).append(COLUMNS.get(cell, f"--method {cell}"))
    for why, cells in cells_of.items():
        yield f"- {name}, {', '.join(cells)}: {why}"
    if "lora" in row["cells"] and row["cells"]["lora"] is None:
        yield f"- {name}: `--method lora` trains it through the same loop"


def put_into(file: Path, table: str) -> None:
    """Replace the table in a file, which marks where it stands."""
    before, _, rest = file.read_text(encoding="utf-8").partition(_START)
    _, _, after = rest.partition(_END)
    file.write_text(f"{before}{_START}\n\n{table}\n{_END}{after}", encoding="utf-8")


def read_marks(file: Path) -> dict[str, list[str]]:
    """Return the cells of every family in a file that ``put_into`` wrote."""
    table = file.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| family")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: found[: len(COLUMNS)] for name, *found in cells}
