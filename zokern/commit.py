"""Which commit this zokern was built from, or lies in."""

import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
# Written by setup.py into wheels and source distributions; a checkout has none.
WRITTEN = FOLDER / "COMMIT"


def commit() -> str | None:
    """A short hash, with ``-dirty`` where files differed from it; None where nobody knows."""
    if WRITTEN.is_file():
        return WRITTEN.read_text().strip() or None
    return describe(FOLDER.parent)


def describe(root: Path) -> str | None:
    """The commit that is checked out in the folder ``root``, if it is a repository."""
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
