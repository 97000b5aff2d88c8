"""What an NFS client may see late, and how late: names, listings, files that were replaced.

It is known and allowed for everywhere in `storage/`, as long as opening a folder helps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from storage.finding import Finding
from storage.halves import Side

PATIENCE = 40.0
"""How long, in seconds, a name or content that another node should see is waited for."""


class Late:
    """What a client may see late: a name that it looked up too early, a file that was replaced."""

    def __init__(self, here: Side, there: Side) -> None:
        self._here, self._there = here, there
        # Folders that nobody opens: opening one makes its names fresh.
        for name in ("late", "opened", "listed", "renamed"):
            here.do("make_folder", name=name)
        there.do("list", name="listed")
        for name in ("late/name", "opened/name"):
            there.do("see", name=name)
        here.do("create", name="renamed/file", text="old")
        here.do("create", name="renamed/new", text="new")
        there.do("read", name="renamed/file")
        # The old file lives on under another name, as in a rename over one that is in use.
        here.do("link", name="renamed/file", to="renamed/kept")
        for name in ("late/name", "opened/name", "listed/name"):
            here.do("create", name=name, text="here")
        here.do("rename", name="renamed/new", to="renamed/file")
        self._since = time.monotonic()
        self._opened = there.do("appears", name="opened/name")
        self._listed = there.do("list", name="listed") == ["name"]

    def findings(self, patience: float) -> Iterator[Finding]:
        """Wait until both are seen, or for so long."""
        seen = read = None
        while True:
            passed = time.monotonic() - self._since
            if seen is None and self._there.do("see", name="late/name"):
                seen = passed
            if read is None and self._there.do("read", name="renamed/file") == "new":
                read = passed
            if (seen is not None and read is not None) or passed > patience:
                break
            time.sleep(0.2)
        yield self._of_the_listing()
        yield self._of_the_name(seen, patience)
        yield self._of_the_rename(read, patience)

    def _of_the_listing(self) -> Finding:
        if self._listed:
            return Finding("a folder listed before", "fine", "lists a new name at once")
        return Finding(
            "a folder listed before",
            "dangerous",
            f"{self._there.name} doesn't list a name that was made since",
            "is it mounted with nocto? Outcomes of other nodes would stay unseen",
        )

    def _of_the_name(self, seen: float | None, patience: float) -> Finding:
        what = "a name looked up too early"
        if not self._opened:
            return Finding(
                what,
                "dangerous",
                f"{self._there.name} doesn't see it even after opening its folder",
                "is it mounted with nocto? Commits of other nodes would stay unseen",
            )
        after = f"only after {seen:.1f} s" if seen is not None else f"not within {patience:.0f} s"
        if seen is not None and seen < 1:
            after = "at once too"
        return Finding(what, "fine", f"seen at once when its folder is opened, else {after}")

    def _of_the_rename(self, read: float | None, patience: float) -> Finding:
        what = "a file replaced by rename"
        if read is None:
            return Finding(
                what,
                "slow",
                f"the old one is still read after {patience:.0f} s",
                "Cohort never reuses a name; programs that work in the shared folder must not",
            )
        if read < 1:
            return Finding(what, "fine", "the new one is read at once")
        return Finding(
            what, "fine", f"the old one is read for {read:.1f} s; Cohort never reuses a name"
        )
