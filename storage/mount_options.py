"""How the shared folder is mounted, and which of its options are fine, slow or dangerous.

The table is in `docs/filesystems.md` too, with the measurements behind it. An option that isn't in
it is fine: it neither lets a reader see old files nor a writer lose new ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from errors import Unavailable, WrongMount
from storage.finding import Finding, Verdict

LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs")
NFS = ("nfs", "nfs4")
EFS = re.compile(r"([a-z0-9-]+\.)?fs-[0-9a-f]+\.efs\.[a-z0-9-]+\.amazonaws\.com(\.cn)?:")

TYPES: Mapping[str, str] = {
    "tmpfs": "it lies in memory: a restart of the machine loses everything",
    "ramfs": "it lies in memory: a restart of the machine loses everything",
    "overlay": "it is a container's own layer and goes with the container",
    "vfat": "it has no hard links, and a commit is one",
    "exfat": "it has no hard links, and a commit is one",
    "cifs": "its client answers from caches that nobody revokes, and may have no hard links",
    "smb3": "its client answers from caches that nobody revokes, and may have no hard links",
    "9p": "it doesn't keep the promises of NFS about what another machine sees",
    "fuse.sshfs": "rename and link aren't exclusive there",
    "fuse.s3fs": "an object store has no exclusive link",
    "fuse.goofys": "an object store has no exclusive link",
    "fuse.mount-s3": "an object store has no exclusive link",
    "fuse.rclone": "an object store has no exclusive link",
}
"""Kinds of file system that are dangerous, and why."""


@dataclass(frozen=True)
class Mounted:
    """One line of /proc/self/mountinfo. Options without a value have the value ""."""

    point: str
    kind: str
    source: str
    options: Mapping[str, str]

    @property
    def is_nfs(self) -> bool:
        """Whether it is the kernel's NFS client."""
        return self.kind in NFS

    @property
    def is_efs(self) -> bool:
        """Whether the server's name is one of Amazon EFS."""
        return EFS.match(self.source) is not None


def find(root: Path, table: str | None = None) -> Mounted:
    """The mount that a folder lies on."""
    try:
        device = os.stat(root).st_dev
        text = table or Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise Unavailable(f"{error.filename}: {error.strerror}") from error
    number = f"{os.major(device)}:{os.minor(device)}"
    folder = os.path.realpath(root)
    lines = [line.split(" ") for line in text.splitlines()]
    above = [words for words in lines if len(words) > 6 and _is_below(folder, _name(words[4]))]
    if not above:
        raise Unavailable(f"{root}: /proc/self/mountinfo doesn't say what it is mounted from")
    # The longest path, then the latest: it hides those before it. btrfs numbers its subvolumes
    # by devices of their own, so the number only breaks ties.
    at = max(
        range(len(above)),
        key=lambda n: (len(_name(above[n][4])), above[n][2] == number, n),
    )
    return _parse(above[at])


def judge(mounted: Mounted) -> list[Finding]:
    """What is to be said about the kind of file system and each option that matters."""
    found = [_judge_kind(mounted)]
    for name, value in sorted(mounted.options.items()):
        rule = RULES.get(name)
        if rule is not None and (finding := rule(mounted, value)) is not None:
            shown = f"{name}={value}" if value else name
            found.append(Finding(f"option {shown}", *finding))
    if mounted.is_efs and "noresvport" not in mounted.options:
        found.append(
            Finding(
                "option noresvport",
                "slow",
                "missing: after a network break the client waits for its old port to be free",
                "mount with noresvport, as AWS advises for EFS",
            )
        )
    return found


def refuse(mounted: Mounted) -> None:
    """Refuse a mount on which one outcome can't be promised: `WrongMount`.

    Without close-to-open a listing may be as old as it likes, and a task's outcome is looked for
    in listings: two claims of one task could both commit.
    """
    if mounted.is_nfs and "nocto" in mounted.options:
        raise WrongMount(
            f"{mounted.point} is mounted with nocto: another node's files stay unseen. Leave the "
            "option out"
        )


def _judge_kind(mounted: Mounted) -> Finding:
    where = f"{mounted.kind} from {mounted.source} on {mounted.point}"
    if mounted.is_efs:
        return Finding("file system", "fine", f"Amazon EFS: {where}")
    if mounted.is_nfs:
        tunnel = mounted.source.startswith(("127.", "localhost:", "[::1]:"))
        hint = " (a tunnel, as amazon-efs-utils makes one for TLS)" if tunnel else ""
        return Finding("file system", "fine", f"NFS: {where}{hint}")
    if mounted.kind in LOCAL:
        return Finding(
            "file system",
            "fine",
            f"local: {where}",
            "only this machine sees it: for a fleet of one machine",
        )
    if mounted.kind in TYPES:
        return Finding(
            "file system",
            "dangerous",
            f"{where}: {TYPES[mounted.kind]}",
            "use EFS, another NFSv4.1 server, or a local disk for a fleet of one machine",
        )
    return Finding(
        "file system",
        "slow",
        f"{where}: Cohort was never proved on it",
        "run the examination on two nodes at once, with --with, before trusting it",
    )


# --- The table. A rule gives verdict, reason and what to do, or None where all is well ---

Judged = tuple[Verdict, str, str]
Rule = Callable[[Mounted, str], Judged | None]


def _always(verdict: Verdict, reason: str, advice: str) -> Rule:
    return lambda mounted, value: (verdict, reason, advice)


def _version(mounted: Mounted, value: str) -> Judged | None:
    if value.startswith("4.") and value != "4.0":
        return None
    if value.startswith("4"):
        return (
            "slow",
            "without sessions a call whose reply was lost is carried out twice; Cohort reads again "
            "to learn what happened",
            "mount with vers=4.1",
        )
    return (
        "dangerous",
        "no sessions and no open state: a repeated call may remove or replace what came after it",
        "mount with vers=4.1",
    )


def _cache_seconds(mounted: Mounted, value: str) -> Judged | None:
    seconds = _number(value)
    if seconds is None or 0 < seconds <= 60:
        return None
    if seconds == 0:
        return (
            "slow",
            "every look-up asks the server; Cohort needs none of that",
            "leave it out: the default is right",
        )
    return (
        "slow",
        "programs that look by themselves see other nodes' files that late; Cohort opens folders",
        "leave it out, or at most 60",
    )


def _lookupcache(mounted: Mounted, value: str) -> Judged | None:
    if value != "none":
        return (
            None  # all and pos: Cohort opens the folder before it believes that a name is missing
        )
    return "slow", "every look-up asks the server", "leave it out: the default is right"


def _transfer_size(mounted: Mounted, value: str) -> Judged | None:
    size = _number(value)
    if size is None or size >= 1 << 20:
        return None
    return (
        "slow",
        "large files take more round trips than needed",
        "ask for 1048576; if the server allows no more than this, leave it",
    )


def _patience(mounted: Mounted, value: str) -> Judged | None:
    tenths = _number(value)
    if tenths is None or tenths >= 150:
        return None
    return (
        "slow",
        "the client repeats calls that the server is still at",
        "timeo=600, as AWS advises; at least 150",
    )


def _connections(mounted: Mounted, value: str) -> Judged | None:
    if not mounted.is_efs or value == "1":
        return None
    return "slow", "EFS doesn't support several connections of a client", "leave nconnect out"


def _barrier(mounted: Mounted, value: str) -> Judged | None:
    return _NO_BARRIER if value == "0" else None


def _protocol(mounted: Mounted, value: str) -> Judged | None:
    if not value.startswith("udp"):
        return None
    return "dangerous", "over UDP fragments of two writes can be joined wrongly", "proto=tcp"


_SOFT = _always(
    "dangerous",
    "when the server is away for a while, calls fail of which nobody knows whether they were "
    "carried out, and data written by programs is dropped",
    "mount with hard",
)
_ASKS_ALWAYS = _always(
    "slow",
    "every write and look-up waits for the server; Cohort syncs what must be durable itself",
    "leave it out: the default is right",
)
_NO_BARRIER: Judged = (
    "dangerous",
    "a power cut loses what fsync said was durable",
    "leave it out: the default is right",
)
_LOCAL_LOCKS = _always(
    "fine",
    "file locks hold on this node only. Cohort uses none there; a program of yours that locks "
    "files in the shared folder itself isn't protected from other nodes",
    "",
)

RULES: Mapping[str, Rule] = {
    "ro": _always("dangerous", "nothing can be written", "mount it with rw"),
    "vers": _version,
    "soft": _SOFT,
    "softerr": _SOFT,
    "softreval": _always(
        "dangerous",
        "while the server is away the client shows old names and attributes as if they were true",
        "leave it out",
    ),
    "nocto": _always(
        "dangerous",
        "opening a file or folder doesn't ask the server: another node's files stay unseen and "
        "old contents are read",
        "leave nocto out",
    ),
    "noac": _ASKS_ALWAYS,
    "sync": _ASKS_ALWAYS,
    "dirsync": _ASKS_ALWAYS,
    "strictatime": _always("slow", "each read of a file is a write as well", "mount with relatime"),
    "actimeo": _cache_seconds,
    "acregmax": _cache_seconds,
    "acdirmax": _cache_seconds,
    "lookupcache": _lookupcache,
    "rsize": _transfer_size,
    "wsize": _transfer_size,
    "timeo": _patience,
    "nconnect": _connections,
    "proto": _protocol,
    "nolock": _LOCAL_LOCKS,
    "nobarrier": lambda mounted, value: _NO_BARRIER,
    "barrier": _barrier,
}


def _parse(words: list[str]) -> Mounted:
    at = words.index("-", 6)
    options: dict[str, str] = {}
    # The options of this mount and those of the file system: a read-only one of either counts.
    for word in [*words[5].split(","), *",".join(words[at + 3 :]).split(",")]:
        name, _, value = word.partition("=")
        options[name] = value
    return Mounted(_name(words[4]), words[at + 1], _name(words[at + 2]), options)


def _is_below(folder: str, point: str) -> bool:
    return folder == point or folder.startswith(point.rstrip("/") + "/")


def _name(word: str) -> str:
    """A path as mountinfo writes it: space, tab, newline and backslash as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def _number(value: str) -> int | None:
    return int(value) if value.isdecimal() else None
