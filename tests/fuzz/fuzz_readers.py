"""Throw mutated files at every reader until one raises anything but a ``UserError``; needs the extra ``fuzz``.

python tests/fuzz/fuzz_readers.py "core regions" -runs=100000 -max_total_time=60
python tests/fuzz/fuzz_readers.py all -runs=10000

The first argument names a reader of ``tests/support/readers.py``, or all of them one after the other; the others are
libFuzzer's. What it finds is written to ``crash-…`` in the current folder: turn it into a test first.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
with atheris.instrument_imports(include=["taso_ds"]):
    import taso_ds.adapters.peft_format
    import taso_ds.adapters.region_file
    import taso_ds.config
    import taso_ds.data.records
    import taso_ds.data.tasks
    import taso_ds.distributed.ds_config
    import taso_ds.files.safetensors_ranges
    import taso_ds.flags.flag
    import taso_ds.runs.resume  # noqa: F401

from readers import READERS, read_bytes, valid_files


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("all", *READERS):
        sys.exit(f"usage: fuzz_readers.py {{all|{'|'.join(READERS)}}} [libFuzzer flags]")
    if sys.argv[1] == "all":  # libFuzzer ends its process
        for name in READERS:
            print(f"fuzzing: {name}", flush=True)
            subprocess.run([sys.executable, __file__, name, *sys.argv[2:]], check=True)
        return
    reader = READERS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory(prefix="taso_fuzz_") as place:
        folder, corpus = Path(place) / "files", Path(place) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        for number, content in enumerate(valid_files(reader, folder)):
            (corpus / str(number)).write_bytes(content)
        atheris.Setup([*sys.argv, str(corpus)], lambda content: read_bytes(reader, folder, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
