"""What a task keeps for its own next attempt: its tree in the middle of the work.

    <root>/jobs/<key>/runs/<task id>/checkpoint-<n>/data-<base>-<i>, manifest-<base>, sealed-<base>

A checkpoint is stored like a commit, and counts once the file `sealed-<base>` is there and whole;
that is written last. It is differences to the version that the attempt read: when another version
has become the head, it is of no use and is never looked at again.
"""

from dataclasses import asdict
from pathlib import Path

from errors import Damaged
from storage import durable, sealed
from storage.listing import Listing
from storage.log import Reference

FORMAT = 1
PREFIX = "checkpoint-"


def make_folder(task: Path) -> tuple[int, Path]:
    """A folder of its own under the next free number: a late attempt may be making one, too."""
    number = max(_numbers(task), default=0) + 1
    while not durable.make_directory(task / f"{PREFIX}{number}"):
        number += 1
    return number, task / f"{PREFIX}{number}"


def seal(folder: Path, base: int, listing: Listing) -> None:
    """From here on the checkpoint exists."""
    assert listing.reference is not None
    body = {"base": base, "manifest": asdict(listing.reference)}
    # First the names of what it refers to, then its own.
    durable.sync_directory(folder)
    durable.create(folder / f"sealed-{base}", sealed.seal("checkpoint", FORMAT, body))


def newest(directory: Path, task: Path, base: int) -> Listing | None:
    """The task's last whole checkpoint on this base; None if it has none.

    A half written one belongs to an attempt that died; one that is damaged costs work and nothing
    else, so the one before it is taken.
    """
    for number in sorted(_numbers(task), reverse=True):
        path = task / f"{PREFIX}{number}" / f"sealed-{base}"
        data = durable.read(path)
        if data is None:
            continue
        try:
            body = sealed.unseal(data, "checkpoint", FORMAT, path)
            if body["base"] != base:
                continue
            return Listing.read(directory, Reference(**body["manifest"]))
        except (Damaged, TypeError, KeyError):
            continue
    return None


def _numbers(task: Path) -> list[int]:
    names = (entry.name for entry in durable.entries(task))
    return [
        int(number)
        for name in names
        if name.startswith(PREFIX) and (number := name.removeprefix(PREFIX)).isdecimal()
    ]
