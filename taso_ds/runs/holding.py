"""A run folder while a run has it: nobody else is in it, and crash reports go there."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from taso_ds.config import RunConfig
from taso_ds.distributed import comm
from taso_ds.errors import Unforeseen, UserError
from taso_ds.runs.folder import RUN
from taso_ds.runs.output_folder import take_folder


@contextmanager
def folder_of(config: RunConfig, *, goes_on: bool) -> Iterator[tuple[RunConfig, Path]]:
    """Yield the configuration with its run folder named, and that folder, which no other run has meanwhile.

    A folder in which nothing was written is removed at the end.

    Args:
        goes_on: whether the folder, if none is named, may be that of an unfinished run.
    """
    with ExitStack() as held:
        path = comm.on_main(lambda: take_folder(config, held, goes_on=goes_on))
        yield dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(path))), path


@contextmanager
def reports_in(path: Path) -> Iterator[None]:
    """Let the traceback of an error that nobody foresaw lie in the folder of the run that it ended.

    Before the run's record is there it lies elsewhere: without a record, a folder with files counts as somebody else's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise Unforeseen(path if (path / RUN).is_file() else None) from error
