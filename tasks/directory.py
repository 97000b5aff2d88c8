"""What is done to a job directory as a whole: as a job, so that it takes its turn behind the key's
lock and is a version with an outcome like any other.
"""

from __future__ import annotations

from typing import Any

from errors import Refused
from tasks.job import job
from tasks.run import Run


@job(key="{key}")
def restore(run: Run, key: str, version: int) -> dict[str, Any]:
    """Commit version `version` of the job directory `key` once more, as its newest.

    Version 0, before any, is the empty directory. Raises `Refused` for a version that isn't
    there, `SnapshotExpired` for one whose files were collected.
    """
    if type(version) is not int or version < 0:
        raise Refused(f"version: a number from 0 on, not {version!r}")
    if version > run.version:
        raise Refused(f"{key} has no version {version}; its newest is {run.version}")
    run.commit_version(version)
    return {"restored": version, "as": run.version + 1}
