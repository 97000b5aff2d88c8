"""The commit protocol as a small model, and a checker that looks at every state that it can reach.

Writers (runs, and conclusions for a dead child) take one step at a time, in any order. Any of them
may die before any step, by itself or with its machine, which takes along what wasn't fsynced. Views
are stale: a snapshot may be any earlier log, a listing any since the writer's own folder was made.
A reply to the link may be lost, with or without the link being made. A collector removes files.

What is here left out on purpose, to have few states: what is in a file (a version's content is the
list of runs that it came of), the hint, buckets, retries of reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

Mutation = Literal[
    "",
    "names are used again",
    "the link is a rename",
    "the base isn't checked",
    "the files aren't fsynced",
    "EEXIST isn't looked into",
    "the outcome isn't looked for",
    "the collector doesn't look at the base",
]
Phase = Literal[
    "waiting",  # not delivered yet
    "snapshot",  # knows its base
    "begun",  # has its folder
    "written",  # files and manifest, in memory
    "synced",  # files and manifest, durable
    "looked",  # the task has no outcome, as far as it can see
    "recorded",  # the record is durable; next is the link
    "unknown",  # the link was tried; the reply said nothing that can be trusted
    "done",  # told an outcome
    "fenced",  # told that it has none
    "dead",
]
ENDED = ("done", "fenced", "dead")


class Record(NamedTuple):
    task: str
    folder: str
    base: int
    content: tuple[str, ...]
    """What its writer meant the version to hold."""


class Files(NamedTuple):
    """What lies in an attempt's folder."""

    content: tuple[str, ...]
    state: Literal["volatile", "durable", "torn"]
    base: int


class Writer(NamedTuple):
    task: str
    name: str
    concludes: bool
    tries: int
    """How often it may be run again, fenced or dead: as a new claim, with a new folder."""
    phase: Phase = "waiting"
    base: int = 0
    mine: str = ""
    records_at_begin: frozenset[int] = frozenset()
    outcome: int = 0


class State(NamedTuple):
    log: tuple[Record, ...]
    folders: tuple[tuple[str, Files], ...]
    writers: tuple[Writer, ...]
    floor: int = 1
    """The oldest version that is kept."""


class Violation(Exception):
    """A reachable state that must not be. The message has the way to it."""


class Protocol(NamedTuple):
    """The transitions, with one of them wrong if a mutation is asked for."""

    mutation: Mutation = ""
    collects: bool = False

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        for i, writer in enumerate(state.writers):
            if writer.phase not in ENDED:
                if writer.phase != "waiting":
                    yield f"{writer.name} dies", _put(state, i, writer._replace(phase="dead"))
                    if writer.phase in ("written", "synced", "looked", "recorded", "unknown"):
                        yield f"{writer.name}'s machine dies", self._without_power(state, i)
                for what, new in self._step(state, i, writer):
                    yield f"{writer.name} {what}", new
            elif writer.phase in ("fenced", "dead") and writer.tries:
                again = writer._replace(phase="waiting", tries=writer.tries - 1, mine="")
                yield f"{writer.name} is delivered again", _put(state, i, again)
        if self.collects:
            yield from self._collected(state)

    def _step(self, state: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        if w.phase == "waiting":
            for base in range(len(state.log) + 1):
                yield (
                    f"reads version {base}",
                    _put(state, i, w._replace(phase="snapshot", base=base)),
                )
        elif w.phase == "snapshot":
            mine = w.task if self.mutation == "names are used again" else f"{w.name}{w.tries}"
            begun = w._replace(phase="begun", mine=mine, records_at_begin=_records(state, w.task))
            yield "makes its folder", _put(state, i, begun)
        elif w.phase == "begun":
            if w.concludes:
                yield "has no files", _put(state, i, w._replace(phase="synced"))
                return
            before = state.log[w.base - 1].content if w.base else ()
            made = Files((*before, w.mine), "volatile", w.base)
            yield "writes", _put(_stored(state, w.mine, made), i, w._replace(phase="written"))
        elif w.phase == "written":
            new = state
            if self.mutation != "the files aren't fsynced":
                files = dict(state.folders).get(w.mine)
                if files is not None and files.state == "volatile":
                    new = _stored(state, w.mine, files._replace(state="durable"))
            yield "fsyncs", _put(new, i, w._replace(phase="synced"))
        elif w.phase == "synced":
            yield from self._look(state, i, w)
        elif w.phase == "looked":
            yield "writes its record", _put(state, i, w._replace(phase="recorded"))
        elif w.phase == "recorded":
            yield from self._link(state, i, w)
        elif w.phase == "unknown":
            yield from self._read_who_won(state, i, w)

    def _look(self, state: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        # A cached listing shows at least what was there when its own folder was made.
        for seen in {w.records_at_begin, _records(state, w.task)}:
            if seen and self.mutation != "the outcome isn't looked for":
                done = w._replace(phase="done", outcome=min(seen))
                yield "finds the outcome", _put(state, i, done)
            else:
                yield "finds no outcome", _put(state, i, w._replace(phase="looked"))

    def _link(self, state: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        base = len(state.log) if self.mutation == "the base isn't checked" else w.base
        n = base + 1
        before = state.log[w.base - 1].content if w.base else ()
        content = before if w.concludes else (*before, w.mine)
        record = Record(w.task, w.mine if not w.concludes else "", base, content)
        unknown = _put(state, i, w._replace(phase="unknown", base=base))
        free = n > len(state.log)
        if free or self.mutation == "the link is a rename":
            log = (*state.log[: n - 1], record, *state.log[n:])
            linked = state._replace(log=log)
            yield f"links {n}", _put(linked, i, w._replace(phase="done", outcome=n))
            lost = w._replace(phase="unknown", base=base)
            if self.mutation == "EEXIST isn't looked into":
                lost = lost._replace(phase="fenced")
            yield f"links {n}, the reply is lost", _put(linked, i, lost)
            yield f"can't link {n}, the reply is lost", unknown
        elif self.mutation == "EEXIST isn't looked into":
            yield f"is told that {n} exists", _put(state, i, w._replace(phase="fenced"))
        else:
            yield f"is told that {n} exists", unknown

    def _read_who_won(self, state: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        n = w.base + 1
        if n > len(state.log):
            yield f"finds no {n}", _put(state, i, w._replace(phase="recorded"))
        elif state.log[n - 1].task == w.task:
            yield f"reads that {n} is its own", _put(state, i, w._replace(phase="done", outcome=n))
        else:
            yield f"reads that {n} is another's", _put(state, i, w._replace(phase="fenced"))

    def _without_power(self, state: State, i: int) -> State:
        w = state.writers[i]
        files = dict(state.folders).get(w.mine)
        if files is not None and files.state == "volatile":
            state = _stored(state, w.mine, files._replace(state="torn"))
        return _put(state, i, w._replace(phase="dead"))

    def _collected(self, state: State) -> Iterator[tuple[str, State]]:
        """The collector keeps the newest two versions of a log that it may see late."""
        for head in range(1, len(state.log) + 1):
            floor = max(state.floor, head - 1)
            needed = {name for record in state.log[floor - 1 : head] for name in record.content}
            for name, files in state.folders:
                decided = files.base < head or "base" in self.mutation
                if decided and name not in needed:
                    kept = tuple(pair for pair in state.folders if pair[0] != name)
                    yield f"{name} is collected", state._replace(folders=kept, floor=floor)


def _put(state: State, i: int, writer: Writer) -> State:
    if writer.phase in ("done", "fenced", "dead"):  # what nobody looks at makes no new states
        writer = writer._replace(records_at_begin=frozenset())
    return state._replace(writers=(*state.writers[:i], writer, *state.writers[i + 1 :]))


def _stored(state: State, name: str, files: Files) -> State:
    return state._replace(folders=tuple(sorted({**dict(state.folders), name: files}.items())))


def _records(state: State, task: str) -> frozenset[int]:
    return frozenset(n for n, record in enumerate(state.log, 1) if record.task == task)


def check(before: State | None, state: State) -> str:
    """What is wrong with a state, or with the step that led to it; nothing if all is well."""
    if before is not None and state.log[: len(before.log)] != before.log:
        return "a record that was committed has changed"
    tasks = [record.task for record in state.log]
    if len(set(tasks)) != len(tasks):
        return "a task has two outcomes"
    folders = dict(state.folders)
    content: tuple[str, ...] = ()
    for n, record in enumerate(state.log, 1):
        if record.base != n - 1:
            return f"record {n} stands on {record.base}"
        grown = (*content, record.folder) if record.folder else content
        if record.content != grown:
            return f"an update was lost: version {n} is {record.content} and not {grown}"
        content = record.content
        if n < state.floor:
            continue
        # A folder holds what its own run made of its base: enough to see it changed or gone.
        for at, name in enumerate(record.content):
            files = folders.get(name)
            if files is None or files.state == "torn" or files.content != record.content[: at + 1]:
                return f"version {n} names {name}, and there is {files}"
    for writer in state.writers:
        if writer.phase == "done":
            if writer.outcome > len(state.log) or tasks[writer.outcome - 1] != writer.task:
                return f"{writer.name} was told an outcome that isn't its own"
        elif writer.phase == "fenced" and writer.task in tasks:
            record = state.log[tasks.index(writer.task)]
            if record.folder == writer.mine:
                return f"{writer.name} was told that it lost, and it won"
    return ""


class Explored(NamedTuple):
    states: int
    steps: int
    longest_log: int


def explore(start: State, protocol: Protocol, at_most: int = 3_000_000) -> Explored:
    """Every reachable state, each once. `Violation` with the shortest way to the first bad one."""
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    level, steps, longest = [start], 0, 0
    while level:
        following: list[State] = []
        for state in level:
            for what, new in protocol.steps(state):
                steps += 1
                wrong = check(state, new)
                if wrong:
                    raise Violation("\n  ".join([wrong, *_way(came_from, state), what]))
                if new not in came_from:
                    came_from[new] = state, what
                    following.append(new)
                    longest = max(longest, len(new.log))
        level = following
        if len(came_from) > at_most:
            raise MemoryError(f"more than {at_most} states: the model isn't small any more")
    return Explored(len(came_from), steps, longest)


def _way(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    steps: list[str] = []
    while (link := came_from[state]) is not None:
        state, what = link
        steps.append(what)
    return steps[::-1]


def start(*writers: Writer) -> State:
    return State((), (), writers)
