"""The guests' file system, an initramfs: busybox, kernel modules, this Python, pytest, our code."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from tests.vm.packages import Parts

PROJECT = Path(__file__).resolve().parents[2]
MODULES = ("virtio_pci", "virtio_net", "nfsv4")
DISTRIBUTIONS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
_NOT_FROM_PYTHON = re.compile(
    r"/(test|tests|idlelib|tkinter|lib2to3|ensurepip|turtledemo|site-packages|dist-packages|"
    r"pydoc_data|config-[^/]*)(/|$)|\.opt-[12]\.pyc$|\.a$"
)
_NOT_FROM_US = re.compile(r"\.pyc$")
_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /nocto
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
for module in {modules}; do /bin/busybox modprobe $module; done
/bin/busybox hostname "$guest"
/bin/busybox ip link set lo up
/bin/busybox ip address add 10.0.2.15/24 dev eth0
/bin/busybox ip link set eth0 up
export PATH=/bin PYTHONHOME={home} PYTHONPATH=/cohort:/site LD_LIBRARY_PATH={libraries} HOME=/tmp
{python} -B -m tests.vm.agent
/bin/busybox poweroff -f
"""


def build(parts: Parts, to: Path) -> None:
    """Write the initramfs."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, Path | bytes] = {"bin/busybox": parts.root / "bin/busybox"}
    for applet in ("sh", "true", "false", "cat", "ls", "mount"):
        files[f"bin/{applet}"] = parts.root / "bin/busybox"
    _add(files, stdlib, str(stdlib), _NOT_FROM_PYTHON)
    files[python] = Path(python)
    libraries = _libraries([Path(python), *stdlib.glob("lib-dynload/*.so")])
    for library in libraries:
        files[library] = Path(library)
    for name in DISTRIBUTIONS:
        for file in metadata.files(name) or ():
            path = Path(str(file.locate()))
            if not str(file).startswith("..") and path.is_file():
                files[f"site/{file}"] = path
    for folder in ("storage", "tests"):
        _add(files, PROJECT / folder, f"cohort/{folder}", _NOT_FROM_US)
    for path in PROJECT.glob("*.py"):
        files[f"cohort/{path.name}"] = path
    files["cohort/vm.ini"] = (
        b"[pytest]\naddopts = --import-mode=importlib\nmarkers =\n    long: x\n"
    )
    release = parts.modules.name
    for name in _with_dependencies(parts, MODULES):
        files[f"lib/modules/{release}/{name}"] = parts.modules / name
    for path in parts.modules.glob("modules.dep*"):
        files[f"lib/modules/{release}/{path.name}"] = path
    init = _INIT.format(
        modules=" ".join(MODULES),
        home=sys.base_prefix,
        libraries=":".join(sorted({os.path.dirname(library) for library in libraries})),
        python=python,
    )
    files["init"] = init.encode()
    with to.open("wb") as archive:
        _write(archive, {name.lstrip("/"): path for name, path in files.items()})


def _add(files: dict[str, Path | bytes], folder: Path, at: str, left_out: re.Pattern[str]) -> None:
    for path in folder.rglob("*"):
        inside = f"/{path.relative_to(folder)}"
        if path.is_file() and not left_out.search(inside):
            files[f"{at}{inside}"] = path


def _libraries(programs: list[Path]) -> list[str]:
    """The shared libraries that these need, by the names under which they are looked for."""
    ended = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, check=False
    )
    return sorted(set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", ended.stdout, re.MULTILINE)))


def _with_dependencies(parts: Parts, names: tuple[str, ...]) -> set[str]:
    """Module files, relative to the modules' folder, whose list of dependencies is made here."""
    kmod = parts.root / "bin/kmod"
    subprocess.run(
        ["depmod", "-b", str(parts.root), parts.modules.name],
        executable=kmod if kmod.exists() else None,
        env=parts.environ,
        check=True,
    )
    needs = dict(
        line.split(":", 1) for line in (parts.modules / "modules.dep").read_text().splitlines()
    )
    by_name = {Path(path).name.partition(".ko")[0].replace("-", "_"): path for path in needs}
    found: set[str] = set()
    for name in names:
        if name in by_name:  # else it is built into the kernel
            found |= {by_name[name], *needs[by_name[name]].split()}
    return found


def _write(archive: BinaryIO, files: dict[str, Path | bytes]) -> None:
    """A cpio archive as the kernel reads it ("newc")."""
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    number = 0
    for name in sorted(folders):
        number += 1
        _entry(archive, number, name, stat.S_IFDIR | 0o755, 0, b"")
    for name, source in sorted(files.items()):
        number += 1
        data = source if isinstance(source, bytes) else source.read_bytes()
        # The times as they are: compiled modules are believed by their source's time.
        time = 0 if isinstance(source, bytes) else int(source.stat().st_mtime)
        _entry(archive, number, name, stat.S_IFREG | 0o755, time, data)
    _entry(archive, 0, "TRAILER!!!", 0, 0, b"")


def _entry(archive: BinaryIO, number: int, name: str, mode: int, time: int, data: bytes) -> None:
    fields = (number, mode, 0, 0, 1, time, len(data), 0, 0, 0, 0, len(name.encode()) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    archive.write(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))
