"""Proving the shared folder before a node works on it: there, writable, exclusive, the same one.

    <root>/cohort.json                      which fleet this folder belongs to
    <root>/nodes/<node>-<incarnation>       a nonce, for the other nodes to see

A node that starts on an empty local folder, because the mount failed at boot, would decide alone
who commits. So a starting node leaves a nonce and looks for those of the nodes that are alive.
"""

import json
import os
import secrets
import stat
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from errors import Damaged, Unavailable, WrongMount
from storage import durable
from storage.keys import check_name

LEAST_BYTES = 16 << 20
LEAST_INODES = 100


@dataclass(frozen=True)
class Mount:
    """A shared folder that passed. Two nodes with one `fleet_id` see the same folder or a copy."""

    root: Path
    fleet_id: str


def prove(root: Path, node: str) -> Mount:
    """Check the shared folder, and name its fleet on first use. `WrongMount` says what is wrong."""
    check_name("node", node)
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise WrongMount(f"shared folder {root}: it isn't a directory")
        space = os.statvfs(root)
    except FileNotFoundError:
        raise WrongMount(f"shared folder {root}: it doesn't exist") from None
    except OSError as error:
        raise WrongMount(f"shared folder {root}: {error.strerror}") from error
    free = space.f_bavail * space.f_frsize
    if free < LEAST_BYTES:
        raise WrongMount(f"shared folder {root}: it is full ({free >> 10} KiB free)")
    # Some file systems count no inodes and say 0 of 0.
    if space.f_files and space.f_favail < LEAST_INODES:
        raise WrongMount(f"shared folder {root}: it is full ({space.f_favail} inodes free)")
    try:
        durable.make_directory(root / "nodes")
        _prove_exclusive_link(root, node)
        return Mount(root, _fleet_id(root))
    except (Unavailable, OSError) as error:
        raise WrongMount(f"shared folder {root}: it can't be written: {error}") from error


def leave_nonce(root: Path, node: str, incarnation: str) -> str:
    """Write this incarnation's nonce for others to see; publish it beside the node's lease."""
    nonce = secrets.token_hex(16)
    durable.create(_nonce_path(root, node, incarnation), nonce.encode())
    return nonce


def sees_nonce(root: Path, node: str, incarnation: str, nonce: str) -> bool:
    """Whether this node sees what that one wrote. False: it has another folder mounted."""
    path = _nonce_path(root, node, incarnation)
    durable.reopen(path.parent)
    return durable.read(path) == nonce.encode()


def _nonce_path(root: Path, node: str, incarnation: str) -> Path:
    name = f"{check_name('node', node)}-{check_name('incarnation', incarnation)}"
    return root / "nodes" / name


def _prove_exclusive_link(root: Path, node: str) -> None:
    """The one thing that the commit log is built on."""
    mark = f".probe-{node}-{secrets.token_hex(8)}"
    first, second, name = (root / "nodes" / f"{mark}-{n}" for n in (1, 2, 3))
    try:
        durable.create(first, b"first")
        durable.create(second, b"second")
        took = durable.link_or_fail(first, name)
        if not took or durable.link_or_fail(second, name) or durable.read(name) != b"first":
            raise WrongMount(
                f"shared folder {root}: link() isn't exclusive there, so nothing can be committed"
            )
    finally:
        for path in (first, second, name):
            with suppress(OSError):
                os.unlink(path)


def _fleet_id(root: Path) -> str:
    path = root / "cohort.json"
    data = durable.read(path)
    if data is None:
        # By a link, as a commit is: of two nodes that start at once, one names the fleet.
        proposal = root / "nodes" / f".fleet-{secrets.token_hex(8)}"
        body = {"format": 1, "fleet": str(uuid.uuid4())}
        durable.create(proposal, json.dumps(body).encode() + b"\n")
        try:
            durable.link_or_fail(proposal, path)
        finally:
            with suppress(OSError):
                os.unlink(proposal)
        data = durable.read(path)
    return _parse_fleet(data or b"", path)


def _parse_fleet(data: bytes, path: Path) -> str:
    try:
        body = json.loads(data)
        if body["format"] != 1:
            raise Damaged(f"{path}: format {body['format']!r} isn't known here")
        return str(uuid.UUID(body["fleet"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Damaged(f"{path}: it should name the fleet and doesn't") from None
