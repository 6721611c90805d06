"""The hostfile of the ``deepspeed`` launcher, read by the launcher's own rules."""

from taso_ds.errors import UserError, dangling, reason


def read_hostfile(path: str) -> dict[str, int]:
    """Return the number of slots by host.

    Raises:
        UserError: the launcher would not take the file. (It only warns when there is none, and runs on one node.)
    """
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        hosts = fetch_hostfile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"hostfile: {path}: {reason(error)}") from error
    if hosts is None:
        raise UserError(f"hostfile: {path}: {dangling(path) or 'no such file'}")
    return dict(hosts)
