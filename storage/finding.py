"""What an examination of the shared folder says: one thing, how good it is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["fine", "slow", "dangerous"]


@dataclass(frozen=True)
class Finding:
    """`slow`: right, but slower or later than it could be. `dangerous`: files may be lost."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


def worst(findings: list[Finding]) -> Verdict:
    """The verdict on all of them."""
    verdicts = {finding.verdict for finding in findings}
    return "dangerous" if "dangerous" in verdicts else "slow" if "slow" in verdicts else "fine"
