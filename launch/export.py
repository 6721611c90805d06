"""Export: prove again what a finished run exported or, with --merge, write base plus adapter as a plain model.

python launch/export.py --run runs/taso-sst2
python launch/export.py --run runs/taso-sst2 --merge
"""

from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts


def _export(_: Interrupts) -> str:
    from taso_ds.runs.finished_arguments import EXPORT, parse_over_run

    config, finished = parse_over_run(verb=EXPORT, description=__doc__)
    from taso_ds.runs.finished import export_run
    from taso_ds.runs.join import join

    assert finished.run is not None
    join(config)
    return f"EXPORT {export_run(config, finished.run, merge=finished.merge)}"


def main() -> None:
    """Console entry point ``taso-export``."""
    run_script(_export, libraries_to_log=True)


if __name__ == "__main__":
    main()
