"""The settings of one process, read and checked once, at the door.

They come from a TOML file and from environment variables `COHORT_<NAME>`, which win. The
file is `$COHORT_SETTINGS`, else `./cohort.toml`, else `$XDG_CONFIG_HOME/cohort/cohort.toml`.
An unknown or malformed setting is a `SettingsError` that names it and what it accepts.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from errors import SettingsError

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SPANS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: object) -> int:
    """Bytes of a size such as `"2 GiB"` or `1024`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|B)?", str(value).strip())
    if match is None:
        raise ValueError('a size such as "512 MiB" or "2 GiB"')
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_span(value: object) -> float:
    """Seconds of a time span such as `"2h"`, `"90s"`, `"250ms"` or `30`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", str(value).strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError('a time span above zero such as "30s", "15m" or "2h"')
    return float(match[1]) * _SPANS[match[2] or "s"]


def _name(value: object) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", str(value)):
        raise ValueError(
            "1 to 63 letters, digits, '_', '.' or '-', beginning with a letter or digit"
        )
    return str(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,8}", str(value)):
        raise ValueError("a whole number of at least 1")
    return int(str(value))


def _whole(value: object) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
        raise ValueError("a whole number")
    return int(str(value))


def _labels(value: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError("names, separated by commas")
    return tuple(sorted({_name(str(name).strip()) for name in names if str(name).strip()}))


def _lease(value: object) -> float:
    span = parse_span(value)
    if span < 1:
        raise ValueError("a time span of at least 1s: it is renewed three times in its length")
    return span


def _folder(value: object) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("the path of a folder")
    return Path(value).expanduser().absolute()


def _redis(value: object) -> str:
    if not isinstance(value, str) or not re.match(r"(rediss?|redis\+socket)://", value):
        raise ValueError("a URL that begins with redis:// or rediss://")
    return value


def _modules(value: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError("module names, separated by commas")
    stripped = tuple(str(name).strip() for name in names if str(name).strip())
    if not all(re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) for name in stripped):
        raise ValueError("module names such as jobs.nightly, separated by commas")
    return stripped


def _sources(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(url, str) and "://" in url for url in value.values()
    ):
        raise ValueError('a table [sources] of name = "dialect://..." lines')
    return {_name(name): url for name, url in value.items()}


def _exports(value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not all(
        isinstance(entry, dict) and "table" in entry for entry in value
    ):
        raise ValueError("tables [[exports]], each with the arguments of tasks.export:export")
    return tuple(value)


def _default_cpus() -> int:
    return os.cpu_count() or 1


def _default_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _default_scratch() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cohort"


def _default_node() -> str:
    # A host's name may hold what a node's can't.
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().split(".")[0]).strip("-") or "node"


def _default_state() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cohort"


def _setting(parse: Callable[[Any], Any], default: Any = None, factory: Any = None) -> Any:
    if factory is not None:
        return field(default_factory=factory, metadata={"parse": parse})
    return field(default=default, metadata={"parse": parse})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set. Sizes are bytes, time spans are seconds."""

    root: Path | None = _setting(_folder)
    """The shared folder (EFS) with job directories and outcomes. Workers need it."""
    redis: str = field(default="redis://127.0.0.1:6379/0", metadata={"parse": _redis}, repr=False)
    node: str = _setting(_name, factory=_default_node)
    """This machine's name in the fleet."""
    cpus: int = _setting(_count, factory=_default_cpus)
    memory: int = _setting(parse_size, factory=_default_memory)
    gpus: int = _setting(_whole, 0)
    labels: tuple[str, ...] = _setting(_labels, ())
    """What this node may be asked for by name, such as `ssd`."""
    scratch: Path = _setting(_folder, factory=_default_scratch)
    """The node's own disk, for work trees."""
    state: Path = _setting(_folder, factory=_default_state)
    """Where beat keeps its schedule file."""
    trees_keep: float = _setting(parse_span, 7 * 86400.0)
    """How long a work tree that nobody uses stays on the node's disk."""
    scratch_free: int = _setting(parse_size, 2 * 2**30)
    """Bytes of that disk to keep free: the trees that were used least lately go for it."""
    quota: int | None = _setting(parse_size)
    """Bytes that one job directory may hold; a run that leaves more is refused."""
    lease: float = _setting(_lease, 15.0)
    """How long a silent node keeps its claims."""
    reserve_after: float = _setting(parse_span, 30.0)
    """After so long a job that fits no node at once gets one kept free for it."""
    unknown_grace: float = _setting(parse_span, 60.0)
    """How long a task that no node knows is offered again before it is dead-lettered."""
    deliveries: int = _setting(_count, 5)
    """How often a job may be lost with its node or process before it is dead-lettered."""
    stop_grace: float = _setting(parse_span, 10.0)
    """What a cancelled run is given before it is killed."""
    soft_shutdown: float = _setting(parse_span, 0.0)
    """What running jobs are given at a SIGQUIT before they are given back. 0: nothing."""
    results_expire: float = _setting(parse_span, 86400.0)
    results_in_redis: float = _setting(parse_span, 300.0)
    """How long an outcome stays in Redis; later it is read from the shared folder."""
    journal_keep: float = _setting(parse_span, 7 * 86400.0)
    """How long a job can be found again that Redis has lost, from when it was noted."""
    ids_remembered: float = _setting(parse_span, 600.0)
    """How long the same task id, submitted again, is the same job."""
    jobs: tuple[str, ...] = _setting(_modules, ())
    """Modules with jobs, beside those in `tasks/`."""
    sources: Mapping[str, str] = field(
        default_factory=dict, metadata={"parse": _sources}, repr=False
    )
    """Databases by name, as SQLAlchemy URLs. Only the name ever travels."""
    exports: tuple[Mapping[str, Any], ...] = _setting(_exports, ())
    """What beat exports every day: the arguments of `tasks.export:export`."""

    @classmethod
    def read(cls, environ: Mapping[str, str], file: Path | None = None) -> Settings:
        """Settings from the file and the environment, which wins."""
        given: dict[str, tuple[str, object]] = {}
        path = file or _settings_file(environ)
        if path is not None:
            for name, value in _parse_file(path).items():
                given[name] = (f"{name} in {path}", value)
        for variable, value in environ.items():
            if variable.startswith("COHORT_") and variable not in _NOT_SETTINGS:
                given[variable.removeprefix("COHORT_").lower()] = (variable, value)
        known = {f.name: f for f in fields(cls)}
        values = {}
        for name, (where, value) in given.items():
            if name not in known:
                raise SettingsError(
                    f"{where}: there is no such setting; there are {', '.join(sorted(known))}"
                )
            if name in ("sources", "exports") and where.startswith("COHORT_"):
                raise SettingsError(f"{where}: set {name} in the settings file, as a table")
            try:
                values[name] = known[name].metadata["parse"](value)
            except (ValueError, OverflowError) as error:
                # The value isn't shown: it may hold a password.
                raise SettingsError(f"{where}: expected {error}") from None
        return cls(**values)


# Variables of the entry script and of tests, which aren't settings of a process.
_NOT_SETTINGS = frozenset(
    {"COHORT_SETTINGS", "COHORT_VENV", "COHORT_PYTHON", "COHORT_CRASH", "COHORT_TEST_FUSE"}
)


def _settings_file(environ: Mapping[str, str]) -> Path | None:
    named = environ.get("COHORT_SETTINGS")
    if named:
        return Path(named)
    config = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for path in (Path("cohort.toml"), config / "cohort" / "cohort.toml"):
        if path.is_file():
            return path
    return None


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"COHORT_SETTINGS: {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # The parser's message gives line and column, never the text of the line.
        raise SettingsError(f"{path}: not a TOML file: {error}") from None


@cache
def current() -> Settings:
    """This process's settings."""
    return Settings.read(os.environ)
