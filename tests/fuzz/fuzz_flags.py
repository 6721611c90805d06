"""Call every script with any flags until one of them does anything but its work or refuse in one line.

python tests/fuzz/fuzz_flags.py 20000
python tests/fuzz/fuzz_flags.py 1 --first 4711      # that call alone, again

Prints each call that went wrong and how, then the number of calls. The same seed makes the same calls.
"""

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support"), str(Path(__file__).resolve().parents[1] / "e2e")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def main() -> None:
    from any_flags import attempt, faults, make_desk

    from taso_ds.distributed import process_group

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, help="calls to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    arguments = parser.parse_args()
    process_group.leave = lambda: None  # all calls are made in this process
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="taso_flags_") as place:
        os.chdir(place)
        make_desk(Path(place))
        for number in range(arguments.first, arguments.first + arguments.number):
            tried = attempt(arguments.seed, number)
            try:
                found = faults(Path(place), tried)
            except Exception:
                found = [traceback.format_exc()]
            if found:
                wrong += 1
                print(f"call {number} of seed {arguments.seed}: {tried}", *found, "", sep="\n", flush=True)
        os.chdir("/")
    print(f"flags: {arguments.number} calls, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
