"""Versions: what is installed passes, what is too old, too new, missing or known to break is named with its reason."""

import re
from importlib import metadata, resources

import pytest

from taso_ds.doctor import versions
from taso_ds.doctor.finding import FAIL, OK, WARN, Finding
from taso_ds.doctor.versions import KNOWN_BAD, PACKAGES, KnownBad, check_versions, constraints


@pytest.fixture
def _tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the tested versions are installed, whatever this machine has."""
    known = constraints()
    monkeypatch.setattr(metadata, "version", lambda name: known[name])


def with_version(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> Finding:
    """Return what is said of a package that is installed in this version; None is not installed."""
    before = metadata.version

    def fake(name: str) -> str:
        if name != package:
            return before(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    (found,) = [finding for finding in check_versions() if finding.check == package]
    return found


@pytest.mark.usefixtures("_tested")
def test_the_constraints_pass() -> None:
    found = check_versions()
    assert [finding.check for finding in found] == ["python", *PACKAGES]
    assert {finding.status for finding in found} == {OK}
    assert all("as tested" in finding.found for finding in found[1:])


@pytest.mark.usefixtures("_tested")
@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_a_range_and_a_tested_version(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    old = with_version(monkeypatch, package, "0.0.1")
    assert old.status == FAIL
    assert old.remedy == f"pip install {package}=={constraints()[package]}"
    assert re.search(r"supported (<[\d.]+,)?>=", old.found)
    monkeypatch.undo()
    new = with_version(monkeypatch, package, "9999.0")
    is_bounded = "supported <" in old.found
    assert new.status == (FAIL if is_bounded else WARN)
    assert ("supported <" if is_bounded else "newer than the tested") in new.found
    monkeypatch.undo()
    missing = with_version(monkeypatch, package, None)
    assert (missing.status, missing.found) == (FAIL, "not installed")
    assert re.match(rf"pip install '{package}(<[\d.]+,)?>=", missing.remedy)


@pytest.mark.usefixtures("_tested")
def test_between_the_bound_and_the_tested_version_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_version(monkeypatch, "torch", "2.9.1+cu128")
    assert (found.status, found.found) == (OK, f"2.9.1+cu128, tested {constraints()['torch']}")


@pytest.mark.usefixtures("_tested")
@pytest.mark.parametrize(
    ("package", "version", "source"),
    [
        ("deepspeed", "0.19.2", "DeepSpeed#8072"),
        ("transformers", "4.57.1", "transformers#41416"),
        ("peft", "0.13", "PEFT"),
        ("bitsandbytes", "0.43.2", "PEFT"),
    ],
)
def test_known_bad_versions_say_why(monkeypatch: pytest.MonkeyPatch, package: str, version: str, source: str) -> None:
    (bad,) = [bad for bad in KNOWN_BAD if bad.package == package]
    found = with_version(monkeypatch, package, version)
    assert found.status == FAIL
    assert bad.why in found.found
    assert f"with {bad.beside} " in found.found
    assert source in found.found


@pytest.mark.usefixtures("_tested")
def test_a_bad_pair_needs_both(monkeypatch: pytest.MonkeyPatch) -> None:
    before = metadata.version

    def fake(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return before(name)

    tested = constraints()["deepspeed"]
    pair = KnownBad("deepspeed", f"=={tested}", "peft", "they do not go together", "nowhere")
    monkeypatch.setattr(versions, "KNOWN_BAD", (pair,))
    assert with_version(monkeypatch, "deepspeed", tested).status == FAIL
    monkeypatch.setattr(metadata, "version", fake)
    assert with_version(monkeypatch, "deepspeed", tested).status == OK
    monkeypatch.undo()


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_versions()[0].status == OK
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.9.18")
    found = check_versions()[0]
    assert found.status == FAIL
    assert "3.9.18, outside" in found.found


@pytest.mark.usefixtures("_tested")
def test_a_checkout_that_nobody_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", unknown)
    monkeypatch.setattr(metadata, "requires", unknown)
    python, *packages = check_versions()
    assert (python.status, python.remedy) == (FAIL, "pip install .")
    assert {finding.status for finding in packages} == {OK}


def test_constraints_are_those_of_the_file() -> None:
    lines = (resources.files("taso_ds") / "constraints.txt").read_text().splitlines()
    assert f"torch=={constraints()['torch']}" in lines
    assert set(PACKAGES) <= set(constraints())
