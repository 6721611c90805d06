"""Installed versions against the range the project supports, the versions its tests ran with, and known bad ones.

The range is ``pyproject.toml``'s, read from the installed metadata; the tested versions are ``constraints.txt``, which
is part of the package and also what ``make setup`` installs.
"""

import platform
import re
from dataclasses import dataclass
from importlib import metadata, resources

from taso_ds.doctor.finding import Finding, fail, ok, warn

PROJECT = "taso_ds"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "safetensors")


@dataclass(frozen=True)
class KnownBad:
    """Versions that are known to break together with another installed package.

    Attributes:
        versions: a version specifier of ``package``.
        beside: the other package.
        source: where it is described.
    """

    package: str
    versions: str
    beside: str
    why: str
    source: str


_GUIDE = "PEFT's DeepSpeed guide"
KNOWN_BAD = (
    KnownBad(
        "deepspeed", "==0.19.2", "peft", "ZeRO-3 stops at the first step when adapters and base differ in dtype",
        "DeepSpeed#8072",
    ),
    KnownBad("transformers", "<5.0", "deepspeed", "adapters trained at ZeRO-3 are saved empty", "transformers#41416"),
    KnownBad("peft", "<=0.13", "bitsandbytes", "a quantized base needs a newer one at ZeRO-3", _GUIDE),
    KnownBad("bitsandbytes", "<0.43.3", "deepspeed", "a 4-bit base needs a newer one at ZeRO-3", _GUIDE),
)  # fmt: skip


def check_versions() -> list[Finding]:
    """Return one finding for Python and one for each package the runs depend on."""
    required, tested = _required(), constraints()
    found = [_check_python()]
    for package in PACKAGES:
        version = installed(package)
        wanted = f"pip install '{required.get(package, package)}'"
        if version is None:
            found.append(fail(package, "not installed", wanted))
        else:
            found.append(_judge(package, version, required.get(package, package), tested.get(package)))
    return found


def installed(package: str) -> str | None:
    """Return the installed version of a package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def constraints() -> dict[str, str]:
    """Return ``constraints.txt`` as versions by package."""
    text = (resources.files(PROJECT) / "constraints.txt").read_text(encoding="utf-8")
    return dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))


def _required() -> dict[str, str]:
    """Return the requirement of each package the project depends on, extras left out."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:  # run from a checkout that nobody installed
        return {}
    return {re.split(r"[^\w.-]", line)[0]: line for line in lines if ";" not in line}


def _check_python() -> Finding:
    version = platform.python_version()
    try:
        wanted = metadata.metadata(PROJECT)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return fail("python", f"{version}, and {PROJECT} is not installed", "pip install .")
    try:
        if not _within(version, wanted):
            return fail("python", f"{version}, outside {wanted}", f"use Python {wanted}")
    except ImportError as error:  # packaging comes with nearly every package below: none of them is there
        return fail("python", f"{version}, not compared with {wanted}: {error}", "pip install .")
    return ok("python", f"{version}, within {wanted}")


def _judge(package: str, version: str, requirement: str, tested: str | None) -> Finding:
    reasons = [
        f"with {bad.beside} {installed(bad.beside)}: {bad.why} ({bad.source})"
        for bad in KNOWN_BAD
        if bad.package == package and installed(bad.beside) and _within(version, bad.versions)
    ]
    specifier = requirement.removeprefix(package)
    remedy = f"pip install {package}=={tested}" if tested else f"pip install '{requirement}'"
    if reasons or not _within(version, specifier):
        return fail(package, "; ".join([f"{version}, supported {specifier or 'any'}", *reasons]), remedy)
    if tested is None:
        return ok(package, version)
    if not _within(version, f"<={tested}"):
        return warn(package, f"{version}, newer than the tested {tested}", f"if a run breaks: {remedy}")
    return ok(
        package, f"{version}, tested {tested}" if version.partition("+")[0] != tested else f"{version}, as tested"
    )


def _within(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)
