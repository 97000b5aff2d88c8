"""An NFS server on this machine and two guests whose kernels mount its export.

    with lab(parts, folder) as (one, two):
        one.python("-m", "pytest", ...)
        one.do("link", ...)                 # a step of `storage.halves`

The guests are emulated in software, so they need no rights and no KVM, and some patience.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Lock, Thread
from typing import Any

from tests.vm import image
from tests.vm.packages import CantHave, Parts

BOOT_SECONDS = 180.0
# They end with the tests, however these end; and others on the machine go first.
_LEASHED = ("setpriv", "--pdeathsig", "KILL", "nice", "-n", "10")

_GANESHA = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1;
  Plugins_Dir = "{parts}/usr/lib/x86_64-linux-gnu/ganesha";
  Enable_NLM = false; Enable_RQUOTA = false; }}
NFSv4 {{ Minor_Versions = 0,1,2; RecoveryBackend = fs; RecoveryRoot = "{home}/recovery";
  Graceless = true; }}
EXPORT {{ Export_Id = 1; Path = "{home}/export"; Pseudo = "/cohort"; Access_Type = RW;
  Squash = No_Root_Squash; SecType = sys; FSAL {{ Name = VFS; }} }}
LOG {{ Default_Log_Level = EVENT; }}
"""


class Guest:
    """One guest: a node whose shared folder is /mnt."""

    def __init__(self, name: str, connection: socket.socket, export: Path) -> None:
        self.name = name
        self.export = export
        self.folder = ""
        self.root = "/mnt"
        self._connection = connection
        self._lock = Lock()
        self._waiting: dict[int, Queue[dict[str, Any]]] = {}
        self._next = 0
        Thread(target=self._listen, daemon=True).start()

    def python(self, *words: str, timeout: float = 300.0) -> tuple[int, str]:
        """Run Python in the guest; exit status and output."""
        ended = self._ask("run", timeout + 30, words=words, timeout=timeout)
        return ended["status"], ended["output"]

    def do(self, step: str, **arguments: Any) -> Any:
        """A step of an examination in `folder`."""
        asked = {
            "root": self.root,
            "folder": self.folder,
            "name": self.name,
            "step": step,
            "arguments": arguments,
        }
        return self._ask("step", 60, **asked)

    def _ask(self, what: str, patience: float, **arguments: Any) -> Any:
        with self._lock:
            self._next += 1
            number, answers = self._next, Queue[dict[str, Any]]()
            self._waiting[number] = answers
            request = {"id": number, "what": what, "arguments": arguments}
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        answer = answers.get(timeout=patience)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["answer"]

    def _listen(self) -> None:
        with self._connection.makefile("r") as lines:
            for line in lines:
                answer = json.loads(line)
                self._waiting.pop(answer["id"]).put(answer)


@dataclass
class Lab:
    """What runs: for a test that says how long it all took."""

    guests: list[Guest]
    boot_seconds: float


@contextmanager
def lab(parts: Parts, home: Path, count: int = 2) -> Iterator[Lab]:
    """The server and the guests, ready; all of it is gone afterwards."""
    for folder in ("export", "recovery"):
        (home / folder).mkdir(parents=True)
    image.build(parts, home / "initramfs")
    with ExitStack() as stack:
        nfs = _free_port()
        stack.enter_context(_server(parts, home, nfs))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        began = time.monotonic()
        processes = []
        for n in range(1, count + 1):
            agent = listener.getsockname()[1]
            process = stack.enter_context(_guest(parts, home, f"guest-{n}", agent, nfs))
            processes.append(process)
        guests = []
        for _ in processes:
            connection = _accept(listener, processes, home)
            stack.enter_context(connection)
            with connection.makefile("r") as lines:
                name = json.loads(lines.readline())["guest"]
            guests.append(Guest(name, connection, home / "export"))
        guests.sort(key=lambda guest: guest.name)
        yield Lab(guests, time.monotonic() - began)


@contextmanager
def _server(parts: Parts, home: Path, port: int) -> Iterator[None]:
    config = home / "ganesha.conf"
    config.write_text(_GANESHA.format(port=port, parts=parts.root, home=home))
    program = parts.root / "usr/bin/ganesha.nfsd"
    words = ["-F", "-f", str(config), "-L", str(home / "ganesha.log"), "-p", str(home / "pid")]
    with _process([str(program), *words], parts, home / "ganesha.out") as process:
        ends = time.monotonic() + 30
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > ends:
                log = home / "ganesha.log"
                tail = log.read_text()[-2000:] if log.exists() else ""
                raise CantHave(f"nfs-ganesha doesn't run here: {tail}")
            time.sleep(0.05)
        yield


@contextmanager
def _guest(
    parts: Parts, home: Path, name: str, agent: int, nfs: int
) -> Iterator[subprocess.Popen[bytes]]:
    share = parts.root / "usr/share"
    append = f"console=ttyS0 quiet panic=-1 guest={name} agent={agent} nfs={nfs}"
    words = [
        *(str(parts.root / "usr/bin/qemu-system-x86_64"), "-M", "pc", "-accel", "tcg"),
        *("-cpu", "max", "-m", "1024", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-vga", "none", "-L", str(share / "qemu"), "-L", str(share / "seabios")),
        *("-serial", f"file:{home / name}.log"),
        *("-kernel", str(parts.kernel), "-initrd", str(home / "initramfs"), "-append", append),
        *("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="),
    ]
    with _process(words, parts, home / f"{name}.out") as process:
        yield process


@contextmanager
def _process(words: list[str], parts: Parts, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_LEASHED, *words],
            env=parts.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _accept(
    listener: socket.socket, processes: list[subprocess.Popen[bytes]], home: Path
) -> socket.socket:
    ends = time.monotonic() + BOOT_SECONDS
    listener.settimeout(0.5)
    while time.monotonic() < ends and all(process.poll() is None for process in processes):
        try:
            return listener.accept()[0]
        except TimeoutError:
            continue
    logs = [path.read_text(errors="replace")[-3000:] for path in sorted(home.glob("guest-*.*"))]
    raise RuntimeError("a guest didn't come up:\n" + "\n".join(logs))


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


__all__ = ["CantHave", "Guest", "Lab", "lab"]
