"""``taso VERB``: one command in front of the launch scripts, also as ``python -m taso_ds``."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import taso_ds
from taso_ds.entry import USER_ERROR
from taso_ds.errors import nearest
from taso_ds.flags.verbs import VERBS, as_started


def main() -> None:
    """Console entry point ``taso``."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        print(_help())
    elif word == "--version":
        print(f"taso_ds {taso_ds.__version__}")
    elif word in VERBS:
        program = Path(sys.argv[0]).with_name(f"taso {word}")
        sys.argv = [str(program), *sys.argv[2:]]
        _script(word).main()
    else:
        print(f"error: {word!r} is no verb{nearest(word, VERBS)}; taso --help lists them", file=sys.stderr)
        sys.exit(USER_ERROR)


def _script(verb: str) -> ModuleType:
    return importlib.import_module(f"taso_ds.launch.{verb}")


def _help() -> str:
    lines = ["usage: taso VERB [flags]", ""]
    for verb in VERBS:
        first = str(_script(verb).__doc__).partition("\n")[0].partition(": ")[2]
        lines.append(f"  {verb:<10} {first}")
    many = as_started("deepspeed launch/train.py")
    return "\n".join([*lines, "", f"taso VERB --help shows a verb's flags. On many devices: {many} [flags]"])


if __name__ == "__main__":
    main()
