"""Chapters *Calling Tasks* and *Canvas*: what a result can be asked."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from celery import chain, states
from celery.exceptions import TaskRevokedError, TimeoutError
from celery.result import AsyncResult, allow_join_result, result_from_tuple

from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Gate, Side, remains, wait_for
from tests.celery.tasks_of_tests import add

PATIENCE = 10


class TestStates:
    def test_from_pending_to_success(self, caller: Side, gate: Gate) -> None:
        result = tasks.hold.apply_async(gate.args("held"), countdown=0.3)
        assert (result.state, result.ready(), result.result) == ("PENDING", False, None)
        gate.wait("held")
        wait_for(lambda: result.state == "STARTED", "the state STARTED")
        assert result.info["pid"] == int(gate.runs("held")[0])
        assert result.info["hostname"] == caller.main
        gate.open("held")
        assert result.get(timeout=PATIENCE) == "held"
        assert (result.state, result.status) == ("SUCCESS", "SUCCESS")
        assert (result.ready(), result.successful(), result.failed()) == (True, True, False)
        assert result.maybe_throw() == "held"

    def test_failure(self, caller: Side) -> None:
        result = tasks.fail.delay(message="this went wrong")
        with pytest.raises(ValueError, match="this went wrong"):
            result.get(timeout=PATIENCE)
        assert (result.state, result.failed(), result.successful()) == ("FAILURE", True, False)
        assert isinstance(result.result, ValueError)
        assert "raise ValueError(message)" in result.traceback
        with pytest.raises(ValueError, match="this went wrong"):
            result.maybe_throw()

    def test_without_propagation_the_error_is_returned(self, caller: Side) -> None:
        error = tasks.fail.delay().get(timeout=PATIENCE, propagate=False)
        assert isinstance(error, ValueError)
        assert str(error) == "as told"

    def test_an_error_that_cannot_be_pickled(self, caller: Side) -> None:
        with pytest.raises(Exception, match=r"StrangeError.*of the worker's own"):
            tasks.fail_strangely.delay().get(timeout=PATIENCE)

    def test_custom_states(self, caller: Side) -> None:
        result = tasks.report_progress.delay([7])
        assert result.get(timeout=PATIENCE) == "hello world"
        assert result.state == "SUCCESS"

    def test_a_custom_state_can_be_read(self, caller: Side, gate: Gate) -> None:
        result = tasks.progress_and_hold.delay(*gate.args("held"))
        wait_for(lambda: result.state == "PROGRESS", "the custom state")
        assert result.info == {"progress": 7}
        gate.open("held")
        result.get(timeout=PATIENCE)

    def test_retries_are_a_state(self, caller: Side) -> None:
        result = tasks.retry_until.delay(1, countdown=1)
        wait_for(lambda: result.state == "RETRY", "the state RETRY")
        assert isinstance(result.info, ValueError)
        assert result.get(timeout=PATIENCE) == 1
        assert result.retries == 1

    def test_autoretry(self, caller: Side) -> None:
        assert tasks.retry_by_itself.delay(2).get(timeout=PATIENCE) == 2

    def test_more_failures_than_retries(self, caller: Side) -> None:
        with pytest.raises(ValueError, match="not yet"):
            tasks.retry_until.delay(99).get(timeout=PATIENCE)
        with pytest.raises(KeyError):
            tasks.retry_by_itself.delay(99).get(timeout=PATIENCE)

    def test_ignore_leaves_no_outcome(self, caller: Side) -> None:
        result = tasks.ignored.delay()
        assert add.delay(1, 1).get(timeout=PATIENCE) == 2
        assert remains(lambda: not result.ready(), 0.3)

    def test_reject(self, caller: Side) -> None:
        result = tasks.rejected.delay()
        wait_for(result.ready, "it to be rejected", PATIENCE)
        assert (result.state, type(result.result).__name__) == ("FAILURE", "Reject")

    def test_reject_and_requeue(self, caller: Side, tmp_path: Path) -> None:
        result = tasks.requeued.delay(str(tmp_path / "once"))
        assert result.get(timeout=PATIENCE) == "again"


class TestWaiting:
    def test_timeout(self, side: Side, gate: Gate) -> None:
        result = tasks.hold.delay(*gate.args("held"))
        with pytest.raises(TimeoutError):
            result.get(timeout=0.2)
        gate.open("held")
        assert result.get(timeout=PATIENCE) == "held"

    def test_wait_is_get(self, side: Side) -> None:
        assert add.delay(2, 2).wait(timeout=PATIENCE) == 4

    def test_get_again(self, side: Side) -> None:
        result = add.delay(2, 2)
        assert [result.get(timeout=PATIENCE) for _ in range(3)] == [4] * 3

    def test_interval_and_callbacks(self, side: Side) -> None:
        got: list[object] = []
        result = tasks.sleep.delay(0.5)
        result.get(timeout=PATIENCE, interval=0.1, callback=lambda *told: got.append(told))
        assert got == [(result.id, 0.5)]

    def test_then_with_a_promise(self, side: Side) -> None:
        got: list[AsyncResult] = []
        result = tasks.sleep.delay(0.3)
        result.then(got.append)
        assert result.get(timeout=PATIENCE) == 0.3
        assert [promised.id for promised in got] == [result.id]

    def test_a_task_may_not_wait_for_another(self, side: Side) -> None:
        with pytest.raises(RuntimeError, match="within a task"):
            tasks.wait_for_another.delay(False).get(timeout=PATIENCE)

    def test_unless_it_says_so(self, side: Side) -> None:
        assert tasks.wait_for_another.delay(True).get(timeout=PATIENCE) == 2
        with allow_join_result():
            assert add.delay(1, 1).get(timeout=PATIENCE) == 2

    def test_another_process_reads_it(self, side: Side) -> None:
        result = add.delay(2, 2)
        other = AsyncResult(result.id, app=side.app)
        assert other.get(timeout=PATIENCE) == 4
        assert other == result

    def test_many_waiters(self, side: Side) -> None:
        results = [add.delay(number, number) for number in range(50)]
        assert [result.get(timeout=PATIENCE) for result in reversed(results)] == [
            2 * number for number in reversed(range(50))
        ]

    def test_nobody_knows_it(self, side: Side) -> None:
        result = AsyncResult("no-such-task", app=side.app)
        assert (result.state, result.result, result.ready()) == ("PENDING", None, False)


class TestAttributes:
    def test_extended(self, caller: Side) -> None:
        result = tasks.same.apply_async((1,), kwargs={}, queue="celery")
        result.get(timeout=PATIENCE)
        assert result.name == "tests.celery.tasks_of_tests.same"
        assert (result.args, result.kwargs) == ([1], {})
        assert (result.worker, result.queue) == (caller.main, "celery")
        assert result.retries == 0
        assert result.date_done is not None
        assert result.date_done.tzinfo is not None

    def test_extended_after_a_failure(self, caller: Side) -> None:
        result = tasks.fail.delay(message="x")
        result.get(timeout=PATIENCE, propagate=False)
        assert result.name == "tests.celery.tasks_of_tests.fail"
        assert result.kwargs == {"message": "x"}
        assert result.worker == caller.main

    def test_what_redis_holds_is_celerys_own_form(self, caller: Side) -> None:
        result = add.delay(2, 2)
        result.get(timeout=PATIENCE)
        meta = json.loads(caller.client.get(f"celery-task-meta-{result.id}"))
        assert (meta["status"], meta["result"], meta["task_id"]) == ("SUCCESS", 4, result.id)
        assert meta.keys() == {
            *("status", "result", "traceback", "children", "date_done", "task_id", "name", "args"),
            *("kwargs", "worker", "retries", "queue"),
        }

    def test_forget(self, caller: Side) -> None:
        result = add.delay(2, 2)
        assert result.get(timeout=PATIENCE) == 4
        result.forget()
        assert AsyncResult(result.id, app=caller.app).state == states.PENDING
        assert not caller.client.exists(f"celery-task-meta-{result.id}")

    def test_it_expires(self, caller: Side) -> None:
        result = add.delay(2, 2)
        result.get(timeout=PATIENCE)
        assert 0 < caller.client.ttl(f"celery-task-meta-{result.id}") <= 86400

    @pytest.mark.long
    def test_later_it_is_read_from_the_shared_folder(self, caller: Side) -> None:
        environ = {"COHORT_RESULTS_IN_REDIS": "500ms"}
        with caller.worker("brief", "-c", "1", environ=environ if caller.is_ours else {}):
            result = add.apply_async((2, 2), queue="brief")
            assert result.get(timeout=PATIENCE) == 4
            if caller.is_ours:
                name = f"celery-task-meta-{result.id}"
                wait_for(lambda: not caller.client.exists(name), "it to leave Redis")
            again = AsyncResult(result.id, app=caller.app)
            # A stock producer knows nothing of the shared folder.
            assert again.state == ("PENDING" if caller.name == "stock producer" else "SUCCESS")

    def test_as_tuple_and_back(self, caller: Side) -> None:
        result = chain(add.s(1, 1), add.s(1)).delay()
        stored = json.loads(json.dumps(result.as_tuple()))
        again = result_from_tuple(stored, app=caller.app)
        assert again.get(timeout=PATIENCE) == 3
        assert again.parent.get(timeout=PATIENCE) == 2
        assert again.id == result.id

    def test_as_list(self, caller: Side) -> None:
        result = chain(add.s(1, 1), add.s(1)).delay()
        assert result.as_list() == [result.id, result.parent.id]
        result.get(timeout=PATIENCE)

    def test_parent(self, caller: Side) -> None:
        result = chain(add.s(1, 1), add.s(1), add.s(1)).delay()
        assert result.get(timeout=PATIENCE) == 4
        assert result.parent.get(timeout=PATIENCE) == 3
        assert result.parent.parent.get(timeout=PATIENCE) == 2
        assert result.parent.parent.parent is None

    def test_collect(self, caller: Side) -> None:
        result = tasks.spawn.delay(2)
        result.get(timeout=PATIENCE)
        for child in result.children:
            child.get(timeout=PATIENCE)
        found = list(result.collect())
        assert [value for _, value in found] == [result.result, 0, 2]

    def test_collect_of_an_unfinished_graph(self, caller: Side, gate: Gate) -> None:
        from celery.exceptions import IncompleteStream

        result = tasks.hold.delay(*gate.args("held"))
        with pytest.raises(IncompleteStream):
            list(result.iterdeps())
        assert list(result.iterdeps(intermediate=True)) == [(None, result)]
        gate.open("held")
        result.get(timeout=PATIENCE)

    def test_graph(self, caller: Side) -> None:
        result = chain(add.s(1, 1), add.s(1)).delay()
        assert result.get(timeout=PATIENCE) == 3
        # What comes next is sent before its own outcome is known.
        assert result.parent.get(timeout=PATIENCE) == 2
        graph = result.parent.graph
        assert {node.id for node in graph} == {result.id, result.parent.id}
        dot = io.StringIO()
        graph.to_dot(dot)
        assert result.id in dot.getvalue()


class TestRevoking:
    def test_before_it_runs(self, side: Side) -> None:
        result = add.apply_async((2, 2), countdown=1.5)
        result.revoke()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
        assert result.state == "REVOKED"

    def test_while_it_runs(self, side: Side, gate: Gate) -> None:
        result = tasks.hold.delay(*gate.args("held"))
        gate.wait("held")
        result.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
        assert remains(lambda: len(gate.runs("held")) == 1, 0.3)

    def test_without_terminate_it_runs_on(self, side: Side, gate: Gate) -> None:
        result = tasks.hold.delay(*gate.args("held"))
        gate.wait("held")
        result.revoke(wait=True, timeout=2)
        gate.open("held")
        wait_for(lambda: gate.runs("held"), "its end")
        assert add.delay(2, 2).get(timeout=PATIENCE) == 4
