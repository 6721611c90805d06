"""A finding: one row of the doctor's table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: what was looked at.
        status: ``ok``; ``warn``, a job may suffer; ``fail``, a job would break.
        found: what was there.
        remedy: what to do about it, in one line; empty when all is well.
    """

    check: str
    status: str
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.status == OK) == (not self.remedy), self


def ok(check: str, found: str) -> Finding:
    return Finding(check, OK, found)


def warn(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, WARN, found, remedy)


def fail(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, FAIL, found, remedy)


def has_failed(findings: Sequence[Finding]) -> bool:
    return any(finding.status == FAIL for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """Return one line per finding, and the counts."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        lines.append(f"{finding.status:<6}{finding.check:<{width}}  {finding.found}{remedy}")
    return "\n".join([*lines, "", "doctor: " + ", ".join(f"{n} {status}" for status, n in _counts(findings).items())])


def as_json(findings: Sequence[Finding]) -> dict[str, object]:
    """Return the same as a JSON object."""
    return {
        "passed": not has_failed(findings),
        "counts": _counts(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    return {status: sum(finding.status == status for finding in findings) for status in (OK, WARN, FAIL)}
