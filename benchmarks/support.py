"""What works for which family of models: every cell of the table in docs/models.md, tried on a tiny random model.

python benchmarks/support.py --write docs/models.md
python benchmarks/support.py --families llama,opt

Rows are kept in ``--folder`` as they are found, beside the output of what failed, so an interrupted table goes on;
families that are named are tried again. The exit code says nothing about the cells.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from families import FAMILIES, build
from support_table import put_into, render

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))  # the ranks that fork

from forked import ForkServer
from support_trial import try_family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="only these, again; default: all that have no row yet")
    parser.add_argument("--folder", type=Path, default=Path(".cache/support"), help="where rows are kept")
    parser.add_argument("--jobs", type=int, default=2, help="families at the same time")
    parser.add_argument("--write", type=Path, help="put the table into this file")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    by_name = {family.name: family for family in FAMILIES}
    file_of = {name: arguments.folder / f"{name}.json" for name in by_name}
    names = [name for name in arguments.families.split(",") if name]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        parser.error(f"no family {unknown[0]!r}; there are {', '.join(by_name)}")
    waiting = iter(names) if names else (name for name in by_name if not file_of[name].is_file())

    def work() -> None:
        with ForkServer() as server:
            for name in waiting:
                row = try_family(server, by_name[name], arguments.folder)
                file_of[name].write_text(json.dumps(row, indent=1))
                found = row["cells"].items()
                print(
                    f"{name}: " + ", ".join(f"{cell} {'yes' if why is None else 'NO'}" for cell, why in found),
                    flush=True,
                )

    build(FAMILIES[0], device="meta")  # transformers loads its names when they are asked for, by one thread at a time
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(work) for _ in range(arguments.jobs)]:
            done.result()
    if arguments.write:
        rows = {name: json.loads(file.read_text()) for name, file in file_of.items() if file.is_file()}
        put_into(arguments.write, render(rows))


if __name__ == "__main__":
    main()
