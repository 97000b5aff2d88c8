"""One NFS client: what it knows, how a call is made, what the script does to it, and the trace."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import mfusepy

from tests.nfs.beliefs import Beliefs, Inode, inode_of
from tests.nfs.disk import Disk
from tests.nfs.script import Rule, Script, Settings, fail_with, from_json, to_json

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="Client")
# A call that waits for the test can't be interrupted, nor its process killed: a test that fails or
# forgets must not hang for ever.
MOST_PATIENCE = 20.0
Entry = tuple[str, dict[str, int], int]


@dataclass
class Handle:
    path: str
    real_fd: int
    inode: Inode
    can_write: bool
    seen_size: int
    """What the server said when it was opened: what others append later isn't seen."""


@dataclass
class Opened:
    """A file that somebody on this node has open."""

    handles: int = 0
    dirty: list[tuple[int, bytes]] = field(default_factory=list)
    remove_at_close: str = ""


def call(
    op: str, *, path_at: int = 0, locked: bool = True
) -> Callable[[Callable[Concatenate[C, P], R]], Callable[Concatenate[C, P], R]]:
    """A call from the kernel: the script has its say before and after, and it is traced."""

    def wrap(
        method: Callable[Concatenate[C, P], R],
    ) -> Callable[Concatenate[C, P], R]:
        @functools.wraps(method)
        def run(self: C, *args: P.args, **kwargs: P.kwargs) -> R:
            def make() -> R:
                return method(self, *args, **kwargs)

            of = args[path_at] if args[path_at] is not None else args[-1]
            other = args[1 - path_at] if path_at < 2 and len(args) > 1 else None
            return self.run(op, of, other, make, locked=locked)

        return run  # type: ignore[return-value]  # mypy thinks of `self` as a keyword

    return wrap


class Client:
    """One node's NFS client, without the calls themselves: those are in adversary.py."""

    def __init__(self, backing: str, trace: str):
        self.backing = backing
        self.script = Script()
        self.beliefs = Beliefs()
        self.disk = Disk()
        self._handles: dict[int, Handle] = {}
        self._opened: dict[Inode, Opened] = {}
        self._listings: dict[int, tuple[str, list[Entry]]] = {}
        self._last = 0
        self._calls = 0
        self._lock = threading.RLock()
        self._awake = threading.Event()
        self._awake.set()
        self._holding: list[threading.Event] = []
        self._tearing: Rule | None = None
        self._trace = open(trace, "w", buffering=1 << 16)  # noqa: SIM115  # as long as the mount

    # How a call is made.

    def run(self, op: str, of: Any, other: Any, make: Callable[[], R], *, locked: bool) -> R:
        pid = mfusepy.fuse_get_context()[2]
        path = self._path_of(op, of)
        self._awake.wait(MOST_PATIENCE)
        with self._lock:
            rules = self.script.meant_for(op, path, pid)
        result: Any = None
        try:
            for rule in rules:
                self._before(rule, path, pid)
            if locked:
                with self._lock:
                    result = make()
            else:
                result = make()
            for rule in rules:
                self._after(rule, op, path, pid, result)
        except OSError as error:
            self._note(op, path, other, pid, errno.errorcode[error.errno or 0], rules)
            raise
        except BaseException as error:
            self._note(op, path, other, pid, repr(error), rules)
            raise
        self._note(op, path, other, pid, result, rules)
        return result  # type: ignore[no-any-return]

    def _path_of(self, op: str, of: Any) -> str:
        if isinstance(of, str):
            return of
        if op in ("readdir", "releasedir", "fsyncdir"):
            return self._listings[of][0]
        return self._handles[of].path

    def _before(self, rule: Rule, path: str, pid: int) -> None:
        if rule.do == "delay":
            time.sleep(rule.seconds)
        elif rule.do == "hold":
            released = threading.Event()
            self._holding.append(released)
            released.wait(MOST_PATIENCE)
        elif rule.do == "fail":
            raise fail_with(rule.error, path)
        elif rule.do == "torn":
            self._tearing = rule
        elif rule.do in ("kill", "power"):
            os.kill(pid, signal.SIGKILL)
            if rule.do == "power":
                with self._lock:
                    self.lose_power()
            raise fail_with(errno.EINTR, path)

    def _after(self, rule: Rule, op: str, path: str, pid: int, result: Any) -> None:
        if rule.do == "kill_after":
            os.kill(pid, signal.SIGKILL)
        elif rule.do == "lose_reply":
            if op in ("create", "open"):
                self.close_handle(result)
            raise fail_with(rule.error, path)

    def _note(
        self, op: str, path: str, other: Any, pid: int, result: Any, rules: list[Rule]
    ) -> None:
        if isinstance(result, (bytes, list)):
            result = len(result)
        elif not isinstance(result, (str, int)):
            result = 0
        line = {"op": op, "path": path, "pid": pid, "result": result}
        if isinstance(other, str):
            line["to"] = other
        if rules:
            line["script"] = "+".join(rule.do for rule in rules)
        with self._lock:
            self._calls += 1
            line |= {"n": self._calls, "time": round(time.time(), 6)}
            self._trace.write(json.dumps(line) + "\n")

    # What the test asks for, through the control socket.

    def answer(self, request: dict[str, Any]) -> Any:
        what = request["do"]
        if what == "wake":
            self._awake.set()
            return None
        if what == "pause":
            self._awake.clear()
            return None
        if what == "held":
            return len(self._holding)
        if what == "release":
            while self._holding:
                self._holding.pop().set()
            return None
        with self._lock:
            if what == "script":
                if request["settings"] is not None:
                    self.script.settings = Settings(**request["settings"])
                self.script.rules = from_json(request["rules"])
            elif what == "forget":
                self.beliefs.forget_all()
            elif what == "power":
                self.lose_power()
            elif what == "trace":
                self._trace.flush()
                return self._calls
            elif what != "rules":
                raise ValueError(f"there is no command {what!r}")
            return [to_json(rule) for rule in self.script.rules]

    def lose_power(self) -> None:
        """This machine is gone and back: what was only in its memory never was."""
        for opened in self._opened.values():
            opened.dirty.clear()
        if self.script.settings.is_disk:
            self.disk.lose_power(self.script.settings.seed)
        self.beliefs.forget_all()

    # The parts.

    @property
    def _cache_seconds(self) -> float:
        return self.script.settings.cache_seconds

    def _real(self, path: str) -> str:
        return self.backing + path.rstrip("/")

    def _plain(self, status: os.stat_result) -> dict[str, int]:
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
        plain = {name: getattr(status, name) for name in names}
        for name in ("st_atime", "st_mtime", "st_ctime"):
            plain[name] = getattr(status, f"{name}_ns")
        opened = self._opened.get(inode_of(status))
        if opened is not None and opened.dirty:
            ends = [at + len(data) for at, data in opened.dirty]
            plain["st_size"] = max(status.st_size, *ends)
        return plain

    def _learn(self, path: str, status: os.stat_result) -> None:
        with suppress(OSError):
            self.beliefs.learn(path, self._real(path), status, self._cache_seconds)

    @contextmanager
    def _told_of(self, path: str) -> Iterator[None]:
        """The server is asked for a name to be made; by "it exists" the client learns as well."""
        try:
            yield
        except FileExistsError:
            if not self.script.settings.believes_after_eexist:
                self.beliefs.forget_name(path)
            raise

    def _made(self, path: str) -> None:
        self._learn(path, os.lstat(self._real(path)))
        self._touched_directory_of(path)
        if self.script.settings.is_disk:
            self.disk.made(self._real(path))

    def _removed(self, path: str) -> None:
        self.beliefs.learn_missing(path, self._cache_seconds)
        self._touched_directory_of(path)

    def _touched_directory_of(self, path: str) -> None:
        directory = os.path.dirname(path)
        self.beliefs.forget_listing(directory)
        with suppress(OSError):
            self.beliefs.forget_attributes(inode_of(os.lstat(self._real(directory))))

    def _changed(self, path: str) -> int:
        self._learn(path, os.lstat(self._real(path)))
        return 0

    def _before_removal(self, real: str) -> None:
        if self.script.settings.is_disk:
            self.disk.before_removal(real)

    def _silly_rename(self, path: str) -> bool:
        """What a client does when a file goes that it has open: it keeps it as .nfs..."""
        status = os.lstat(self._real(path))
        opened = self._opened.get(inode_of(status))
        if opened is None or stat.S_ISDIR(status.st_mode):
            return False
        self._last += 1
        hidden = os.path.join(os.path.dirname(path), f".nfs{os.getpid():08x}{self._last:08x}")
        os.rename(self._real(path), self._real(hidden))
        opened.remove_at_close = self._real(hidden)
        return True

    def _new_handle(self, path: str, real_fd: int) -> int:
        status = os.fstat(real_fd)
        can_write = fcntl.fcntl(real_fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        handle = Handle(path, real_fd, inode_of(status), can_write, status.st_size)
        self._last += 1
        self._handles[self._last] = handle
        self._opened.setdefault(inode_of(status), Opened()).handles += 1
        return self._last

    def close_handle(self, fh: int) -> None:
        handle = self._handles[fh]
        with self._lock:
            opened = self._opened[handle.inode]
            opened.handles -= 1
            os.close(handle.real_fd)
            if not opened.handles:
                del self._opened[handle.inode]
                if opened.remove_at_close:
                    with suppress(OSError):
                        os.unlink(opened.remove_at_close)

    def _alive(self, fh: int) -> Handle:
        handle = self._handles[fh]
        if os.fstat(handle.real_fd).st_nlink == 0:
            raise fail_with(errno.ESTALE, handle.path)
        return handle

    def _write_back(self, inode: Inode, real_fd: int, path: str) -> None:
        """What is dirty goes to the server: a call of its own for the script, named store."""
        with self._lock:
            opened = self._opened.get(inode)
            if opened is None or not opened.dirty:
                return
            dirty, opened.dirty = opened.dirty, []
        self.run("store", path, None, lambda: self._store(real_fd, dirty), locked=True)

    def _store(self, real_fd: int, dirty: list[tuple[int, bytes]]) -> int:
        torn, self._tearing = self._tearing, None
        if self.script.settings.is_disk:
            self.disk.before_write(real_fd)
        length = sum(len(data) for _, data in dirty)
        room = length if torn is None else torn.bytes
        for at, data in dirty:
            os.pwrite(real_fd, data[:room], at)
            room = max(0, room - len(data))
        self.beliefs.forget_attributes(inode_of(os.fstat(real_fd)))
        if torn is not None:
            raise OSError(torn.error, os.strerror(torn.error))
        return length
