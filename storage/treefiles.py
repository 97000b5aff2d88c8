"""The regular files of a tree and their identities, folder by folder as the look packs them.

Of 100,000 files a run touches three. A folder in which nothing differs is told by one comparison
of bytes, and is neither taken apart nor put together again, here or in a file.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import overload

from storage.look import COLUMNS, Identity, Packed, packed, unpacked

_LENGTH, _CTIME = 1, 3


class Files:
    """Path to identity. It doesn't change: who holds it may share folders of it with another."""

    def __init__(self, folders: dict[str, Packed] | None = None):
        self.folders: dict[str, Packed] = folders or {}
        """Without those that hold no file."""
        self._unpacked: dict[str, dict[str, Identity]] = {}

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self.folders.values()) // (8 * COLUMNS)

    def __iter__(self) -> Iterator[str]:
        for folder in self.folders:
            yield from _inside(folder, self._names(folder))

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self.get(path) is not None

    def __getitem__(self, path: str) -> Identity:
        folder, _, name = path.rpartition("/")
        return self._names(folder)[name]

    @overload
    def get(self, path: str) -> Identity | None: ...
    @overload
    def get(self, path: str, default: Identity) -> Identity: ...
    def get(self, path: str, default: Identity | None = None) -> Identity | None:
        folder, _, name = path.rpartition("/")
        return self._names(folder).get(name, default)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Files) and not any(self.since(other))

    __hash__ = None  # type: ignore[assignment]

    def since(self, before: "Files") -> tuple[set[str], set[str]]:
        """The paths that are new here or differ, and those that are gone."""
        differing: set[str] = set()
        gone: set[str] = set()
        for folder, here in self.folders.items():
            if here == before.folders.get(folder):
                continue
            now, then = self._names(folder), before._names(folder)
            differing.update(_inside(folder, (n for n, what in now.items() if then.get(n) != what)))
            gone.update(_inside(folder, then.keys() - now.keys()))
        for folder in before.folders.keys() - self.folders.keys():
            gone.update(_inside(folder, before._names(folder)))
        return differing, gone

    def changed(self, differing: Mapping[str, Identity | None]) -> "Files":
        """These, with others in their places; None: gone."""
        by_folder: dict[str, dict[str, Identity | None]] = {}
        for path, identity in differing.items():
            folder, _, name = path.rpartition("/")
            by_folder.setdefault(folder, {})[name] = identity
        folders = dict(self.folders)
        for folder, names in by_folder.items():
            # In their order, which is that in which the kernel names them.
            new = {**self._names(folder), **names}
            left = {name: what for name, what in new.items() if what is not None}
            folders.pop(folder, None)
            if left:
                folders[folder] = packed(left, [n for what in left.values() for n in what])
        return Files(folders)

    def length(self) -> int:
        """Of all files."""
        return sum(sum(column) for column in self._columns(_LENGTH))

    def newest(self) -> int:
        """The newest ctime."""
        return max((max(column) for column in self._columns(_CTIME)), default=0)

    def _columns(self, number: int) -> Iterator["array[int]"]:
        for _, numbers in self.folders.values():
            yield array("q", numbers)[number::COLUMNS]

    def _names(self, folder: str) -> dict[str, Identity]:
        found = self._unpacked.get(folder)
        if found is None:
            here = self.folders.get(folder)
            found = self._unpacked[folder] = unpacked(here) if here else {}
        return found


def _inside(folder: str, names: Iterable[str]) -> Iterator[str]:
    return (f"{folder}/{name}" for name in names) if folder else iter(names)
