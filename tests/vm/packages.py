"""QEMU, a kernel and an NFS server from Debian packages, unpacked beside the system, not into it.

Nothing is installed: no service starts, no boot loader changes. A second run finds it all there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

WANTED = (
    "qemu-system-x86",
    "seabios",
    "linux-image-cloud-amd64",
    "busybox-static",
    "nfs-ganesha",
    "nfs-ganesha-vfs",
)


class CantHave(Exception):
    """What is missing for these tests here, and how to get it."""


@dataclass(frozen=True)
class Parts:
    """Where the unpacked parts lie."""

    root: Path

    @property
    def environ(self) -> dict[str, str]:
        """Finds the libraries that came with the programs."""
        folders = [
            *self.root.glob("lib/x86_64-linux-gnu"),
            *self.root.glob("usr/lib/x86_64-linux-gnu"),
            self.root / "usr/lib/ganesha",
            self.root / "usr/lib/x86_64-linux-gnu/libnfsidmap",
        ]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(map(str, folders)),
            "QEMU_MODULE_DIR": str(self.root / "usr/lib/x86_64-linux-gnu/qemu"),
        }

    @property
    def kernel(self) -> Path:
        """The kernel to boot."""
        return next(self.root.glob("boot/vmlinuz-*"))

    @property
    def modules(self) -> Path:
        """Its modules."""
        return next(self.root.glob("lib/modules/*"))


def ready() -> Parts:
    """The parts, fetched on first use; `CantHave` says why not."""
    if os.geteuid() != 0:
        raise CantHave("the NFS server of these tests (nfs-ganesha) needs root")
    if shutil.which("apt-get") is None or os.uname().machine != "x86_64":
        raise CantHave("these tests unpack Debian packages for x86-64; there is no apt-get here")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cohort-vm"
    root, new = cache / "root", cache / "new"
    if root.is_dir():
        return Parts(root)
    archives = cache / "archives"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    _apt("update", "-qq")
    _apt(
        *("install", "-qq", "-y", "--no-install-recommends", "--download-only", "--reinstall"),
        *("-o", f"Dir::Cache::archives={archives}", "-o", "Debug::NoLocking=1"),
        *WANTED,
    )
    shutil.rmtree(new, ignore_errors=True)
    for package in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(new)], check=True)
    missing = [
        name
        for name in ("usr/bin/qemu-system-x86_64", "usr/bin/ganesha.nfsd", "bin/busybox")
        if not (new / name).exists()
    ]
    if missing:
        raise CantHave(f"Debian's packages brought no {', '.join(missing)}")
    new.rename(root)  # last: what was interrupted is begun anew
    shutil.rmtree(archives)
    return Parts(root)


def _apt(*words: str) -> None:
    ended = subprocess.run(
        ["apt-get", *words],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise CantHave(f"apt-get {words[0]} failed: {ended.stderr.strip().splitlines()[-1:]}")
