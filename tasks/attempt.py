"""The recipe by which every job runs: the child's half.

It promises: the function sees exactly the files of the last commit; what it leaves becomes the
next version together with its outcome, or not at all; a task that already has an outcome gets
that one again, and its function isn't called.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from billiard.process import current_process
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

from crashpoints import reach
from errors import DeadLettered, Fenced, Refused, StandAside, TryLater
from storage.directory import Attempt, Directory
from storage.log import Record
from storage.logs import OutputLog
from storage.worktree import WorkTree
from tasks.enclosure import enclosed
from tasks.output import RunLog
from tasks.progress import ProgressReport
from tasks.results import check_size, committed_as
from tasks.run import Run
from tasks.settings import Settings, current

if TYPE_CHECKING:
    from tasks.job import JobTask

logger = get_task_logger(__name__)

_LONGEST_PAUSE = 300.0
_STORAGE_PAUSE = 1.0


class GoesBack(Ignore):  # type: ignore[misc]
    """This attempt has no outcome; its claim returns to the front. For Celery's log no error."""


def attempt(task: JobTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run one attempt of a job. Returns its result; Celery's tracer does the rest."""
    assert task.definition is not None
    key = _key_of(task, args, kwargs)
    if key is None or not task.definition.directory:
        return _attempt_keyless(task, args, kwargs)

    settings = current()
    with _storage_waited_for(task):
        directory = Directory.open(_root(settings), key)
        reach("attempt:before-snapshot")
        earlier = directory.outcome_of(task.request.id)
        base = directory.head()
    if earlier is not None:
        return _outcome_again(task, earlier)
    with _storage_waited_for(task):
        mine = directory.begin(task.request.id, _claim_id(task), base)
    reach("attempt:after-snapshot")

    tree = WorkTree(settings.scratch, key, _claim_id(task))
    with (
        _removed(tree.release),
        _output(task) as output,
        _cancellation() as cancelled,
        _ended(task, mine, cancelled, output),
    ):
        tree.checkout(directory, base, directory.checkpoint_of(task.request.id, base))
        reach("attempt:after-checkout")
        run = _run(task, lambda: tree.path, base.n, cancelled, output)
        run._checkpoint = lambda: mine.checkpoint(tree, quota=settings.quota)
        run._locks = tree.locks
        result = _call(task, run, args, kwargs)
        _stop_if(cancelled, output)
        reach("attempt:after-body")
        record = _commit(task, run, mine, tree, result)
        reach("attempt:after-commit")
        _name_left_out(run, mine)

    if record.claim_id != mine.claim_id:
        return _outcome_again(task, record)
    committed_as(record.task_id, record.key, record.n)
    _after_commit(task, record.result)
    reach("attempt:after-after-commit")
    return record.result


def _attempt_keyless(task: JobTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A job without files of its own: an empty directory, no commit; at least once."""
    folder: list[Path] = []

    def make_folder() -> Path:
        # Only when it is asked for: for a small job it would cost more than the job.
        scratch = current().scratch
        scratch.mkdir(parents=True, exist_ok=True)
        folder.append(Path(tempfile.mkdtemp(prefix="keyless-", dir=scratch)))
        return folder[0]

    def remove_folder() -> None:
        for made in folder:
            shutil.rmtree(made, ignore_errors=True)

    with (
        _removed(remove_folder),
        _output(task) as output,
        _cancellation() as cancelled,
        _ended(task, None, cancelled, output),
    ):
        result = _call(task, _run(task, make_folder, 0, cancelled, output), args, kwargs)
        _stop_if(cancelled, output)
    _after_commit(task, result)
    return result


def _commit(task: JobTask, run: Run, mine: Attempt, tree: WorkTree, result: Any) -> Record:
    attempt, node, quota = _attempt_number(task), current().node, current().quota
    if run._complete is not None:
        result = functools.partial(run._complete, result)
    if run._version_to_commit is None:
        return mine.commit(tree, result, attempt=attempt, node=node, quota=quota)
    old = mine.directory.version(run._version_to_commit)
    return mine.commit_version(old, result, attempt=attempt, node=node)


@contextmanager
def _removed(remove: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    finally:
        remove()


@contextmanager
def _ended(
    task: JobTask, mine: Attempt | None, cancelled: threading.Event, output: OutputLog
) -> Iterator[None]:
    """What becomes of an attempt that doesn't commit: fenced, tried again, or a final failure."""
    try:
        yield
    except (Retry, Ignore, Reject):
        raise  # Celery's own ways to end without an outcome.
    except Fenced as fence:
        _run_again(task, fence)
    except Exception as error:
        _stop_if(cancelled, output)
        if _may_retry(task, error):
            _retry(task, error)
        if mine is not None:
            with _storage_waited_for(task):
                _conclude(task, mine, error)
        raise


@contextmanager
def _storage_waited_for(task: JobTask) -> Iterator[None]:
    """A keyed job's outcome is a log record: while none can be written, the job waits."""
    try:
        yield
    except (TryLater, StandAside) as trouble:
        time.sleep(_STORAGE_PAUSE)
        _run_again(task, trouble)


def _call(task: JobTask, run: Run, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    assert task.definition is not None
    _refuse_if_dead(task)
    with enclosed(run.claim_id, task.definition.memory_limit):
        result = task.definition.function(run, *args, **kwargs)
    if result is None or type(result) in (bool, int):
        return result
    # What can't be recorded must fail before the commit, not after it.
    encoded = task.backend.encode(result)
    check_size(encoded)
    return task.backend.decode(encoded)


def _conclude(task: JobTask, mine: Attempt, error: Exception) -> None:
    """Record a final failure, unless another attempt of this task has recorded its outcome."""
    outcome = task.backend.prepare_exception(error, serializer="json")
    record = mine.conclude("FAILURE", outcome, attempt=_attempt_number(task), node=current().node)
    if record.claim_id != mine.claim_id:
        # The tracer is told on the next delivery; here a failure is already on its way out.
        raise GoesBack(f"{task.request.id} has an outcome already")
    committed_as(record.task_id, record.key, record.n)


def _run_again(task: JobTask, reason: Exception) -> NoReturn:
    """No outcome, and back it goes, at no cost to its retries."""
    logger.warning("%s[%s] goes back: %s", task.name, task.request.id, reason)
    raise GoesBack(str(reason)) from None


def _outcome_again(task: JobTask, record: Record) -> Any:
    """This task has its outcome. Tell it again, so that links, chains and chords are sent."""
    logger.info("%s[%s]: has its outcome in version %d", task.name, task.request.id, record.n)
    committed_as(record.task_id, record.key, record.n)
    if record.state == "SUCCESS":
        _after_commit(task, record.result)
        return record.result
    if record.state == "REVOKED":
        task.backend.mark_as_revoked(task.request.id, "revoked", request=task.request)
        raise Ignore
    error = task.backend.exception_to_python(record.result)
    raise error if isinstance(error, Exception) else RuntimeError(str(record.result))


def _after_commit(task: JobTask, result: Any) -> None:
    assert task.definition is not None
    if task.definition.after_commit is None:
        return
    try:
        task.definition.after_commit(result)
    except Exception:
        # The outcome stands; a later run of the job may make up for it.
        logger.exception("%s[%s]: after_commit failed", task.name, task.request.id)


def _may_retry(task: JobTask, error: Exception) -> bool:
    """Not what can't succeed, not what had its time (as AWS Batch does), not beyond the limit."""
    if isinstance(error, (Refused, DeadLettered, SoftTimeLimitExceeded)):
        return False
    assert task.definition is not None
    return (task.request.retries or 0) < task.definition.retries


def _retry(task: JobTask, error: Exception) -> NoReturn:
    pause = min(_LONGEST_PAUSE, 2.0 ** (task.request.retries or 0))
    try:
        raise task.retry(exc=error, countdown=pause)
    except Reject as rejected:
        # The broker took no retry: the claim goes back instead, so the job isn't lost.
        raise GoesBack(str(rejected.reason)) from None


def _refuse_if_dead(task: JobTask) -> None:
    from tasks.job import refuse_if_dead

    refuse_if_dead(task.request)


def _key_of(task: JobTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The key that its lock was taken under; worked out only where no broker was involved."""
    assert task.definition is not None
    about = task.request.get("cohort") or {}
    key: str | None = about.get("key") or task.definition.key_of(args, kwargs)
    return key


def _claim_id(task: JobTask) -> str:
    # Called directly or eagerly there is no claim; the task id names the only attempt.
    return task.request.get("cohort_claim") or f"direct-{task.request.id}"


def _attempt_number(task: JobTask) -> int:
    return 1 + (task.request.retries or 0) + (task.request.get("cohort_lost") or 0)


def _root(settings: Settings) -> Path:
    if settings.root is None:
        raise Refused("COHORT_ROOT isn't set: a job with a key needs the shared folder")
    return settings.root


def _run(
    task: JobTask,
    place: Callable[[], Path],
    version: int,
    cancelled: threading.Event,
    output: OutputLog,
) -> Run:
    assert task.definition is not None
    timeout = task.definition.timeout
    report = ProgressReport(task)
    return Run(
        _place=place,
        version=version,
        task_id=task.request.id,
        claim_id=_claim_id(task),
        attempt=_attempt_number(task),
        node=current().node,
        deadline=None if timeout is None else datetime.now(UTC) + timedelta(seconds=timeout),
        _log=lambda: RunLog(task.name, output),
        _report=report,
        _is_cancelled=cancelled.is_set,
        output=output,
        _give_back=lambda: _hand_over(task),
    )


def _hand_over(task: JobTask) -> NoReturn:
    logger.info("%s[%s] goes back: handed over", task.name, task.request.id)
    raise GoesBack("handed over")


@contextmanager
def _output(task: JobTask) -> Iterator[OutputLog]:
    """What this attempt says. All of it can be read before its outcome is known."""
    try:
        output = OutputLog(current().root, task.request.id, _attempt_number(task), _claim_id(task))
    except Refused:
        output = OutputLog.nowhere()  # A task id of the producer's own that can name no folder.
    try:
        yield output
    finally:
        output.close()


def _name_left_out(run: Run, mine: Attempt) -> None:
    for entry in mine.left_out:
        run.log.warning("left out of the directory: %s of %s", entry.what, ascii(entry.path))


@contextmanager
def _cancellation() -> Iterator[threading.Event]:
    """Turn SIGTERM into a request, so that a run may end in its own time. Pool processes only."""
    cancelled = threading.Event()
    in_pool = getattr(current_process(), "index", None) is not None
    if not in_pool or threading.current_thread() is not threading.main_thread():
        yield cancelled
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: cancelled.set())
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_if(cancelled: threading.Event, output: OutputLog) -> None:
    """What a cancelled run did is discarded, as Celery's terminate does: by ending the process."""
    if cancelled.is_set():
        output.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
