"""The commit of this checkout, for records of what was run."""

import shutil
import subprocess

from mone_common.commands import ROOT


def commit() -> str | None:
    """The commit of this checkout, with -dirty if it was changed; None if this is not a checkout or git is missing.

    For code that `launch.slurm` copied to a run folder: the commit of the original checkout.
    """
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text().strip()
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return git.stdout.strip() or None
