"""Job directories read from outside of a run: in a notebook, a report, another program."""

from __future__ import annotations

from pathlib import Path

from errors import Refused
from storage import directory
from storage.version import Version
from tasks.settings import current


class Directory:
    """The directory of a job, by its key. It is only read here: what writes is a job."""

    @staticmethod
    def open(key: str, version: int | None = None, *, root: Path | None = None) -> Version:
        """Version `version` of a job's directory, or its newest, from the shared folder `root`
        (COHORT_ROOT): `Directory.open("daily-load").read("report.csv")`.

        Raises `Refused` for a key or version that isn't there, `SnapshotExpired` for a version
        whose files were collected, when they are read.
        """
        root = root or current().root
        if root is None:
            raise Refused("COHORT_ROOT isn't set: job directories are on the shared folder")
        found = directory.Directory(root, key)
        if not found.path.is_dir():
            raise Refused(f"there is no job directory {key!r} in {root}")
        newest = found.head()
        if version is None or version == newest.n:
            return newest
        if not 0 <= version <= newest.n:
            raise Refused(f"{key} has no version {version}; its newest is {newest.n}")
        return found.version(version)
