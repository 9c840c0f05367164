"""What is wrong with a checkpoint, all of it in one error."""

from collections.abc import Sequence
from pathlib import Path

MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written.

    Attributes:
        findings: every problem found, one line each; the message lists the first 20.
    """

    def __init__(self, directory: str | Path, findings: Sequence[str]):
        self.findings = tuple(findings)
        problems = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
        lines = [f"{directory}: {problems}", *findings[:MAX_LISTED]]
        if len(findings) > MAX_LISTED:
            lines.append(f"and {len(findings) - MAX_LISTED} more")
        super().__init__("\n  ".join(lines))
