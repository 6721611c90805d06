"""Doctor: what on this machine would break a job, told before it is queued. Takes the job's own flags.

python launch/doctor.py
python launch/doctor.py --hostfile hostfile --model_name_or_path Qwen/Qwen2.5-7B-Instruct --output_dir /shared/runs/qwen
"""

import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts


def _doctor(_: Interrupts) -> NoReturn:
    from taso_ds.doctor.arguments import parse_doctor
    from taso_ds.doctor.finding import as_json, has_failed, table

    arguments, flags = parse_doctor(description=__doc__)
    from taso_ds.doctor.examine import examine

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    warnings.filterwarnings("ignore", category=UserWarning, module="_distutils_hack")  # of DeepSpeed's probes
    with contextlib.redirect_stdout(sys.stderr):  # libraries talk while they load; stdout is for the findings
        findings = examine(arguments, flags)
    report = json.dumps(as_json(findings), indent=1, ensure_ascii=False) + "\n"
    if arguments.json == "-":
        print(report, end="", flush=True)
    else:
        if arguments.json is not None:
            _write(Path(arguments.json), report)
        print(table(findings), flush=True)
    # Not a return: the usual way out needs torch, and that may be what is broken.
    sys.exit(1 if has_failed(findings) else 0)


def _write(path: Path, text: str) -> None:
    from taso_ds.errors import UserError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"json: cannot write {path}: {error.strerror}") from error


def main() -> None:
    """Console entry point ``taso-doctor``."""
    run_script(_doctor)


if __name__ == "__main__":
    main()
