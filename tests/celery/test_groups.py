"""Chapter *Canvas*: groups and chords."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import GroupResult, result_from_tuple

from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Gate, Side, lines_of, remains, wait_for
from tests.celery.tasks_of_tests import add, mul

PATIENCE = 10


class TestGroups:
    def test_simple(self, side: Side) -> None:
        result = group(add.s(i, i) for i in range(10))()
        assert isinstance(result, GroupResult)
        assert result.get(timeout=PATIENCE) == [2 * i for i in range(10)]

    def test_what_it_can_be_asked(self, side: Side, gate: Gate) -> None:
        result = group(add.s(2, 2), tasks.hold.s(*gate.args("held")))()
        gate.wait("held")
        wait_for(lambda: result.completed_count() == 1, "one of two")
        assert (result.ready(), result.waiting(), result.successful()) == (False, True, False)
        gate.open("held")
        assert result.get(timeout=PATIENCE) == [4, "held"]
        assert (result.ready(), result.waiting(), result.successful()) == (True, False, True)
        assert (result.failed(), result.completed_count(), len(result)) == (False, 2, 2)

    def test_a_failure_in_it(self, side: Side) -> None:
        result = group(add.s(2, 2), tasks.fail.s())()
        with pytest.raises(ValueError, match="as told"):
            result.get(timeout=PATIENCE)
        assert (result.failed(), result.successful()) == (True, False)
        first, second = result.get(timeout=PATIENCE, propagate=False)
        assert first == 4
        assert isinstance(second, ValueError)

    @pytest.mark.parametrize("way", ["join", "join_native", "iterate", "iter_native", "results"])
    def test_ways_to_gather(self, side: Side, way: str) -> None:
        result = group(add.s(i, i) for i in range(5))()
        if way == "results":
            found = [one.get(timeout=PATIENCE) for one in result]
        elif way == "iterate":
            wait_for(result.ready, "all of it")
            found = [one.result for one in result.results]
        elif way == "iter_native":
            ids = [one.id for one in result]
            native = dict(result.iter_native(timeout=PATIENCE))
            found = [native[one]["result"] for one in ids]
        else:
            found = getattr(result, way)(timeout=PATIENCE)
        assert found == [0, 2, 4, 6, 8]

    def test_callback_for_each(self, side: Side) -> None:
        got: list[object] = []
        result = group(add.s(i, i) for i in range(3))()
        result.join(timeout=PATIENCE, callback=lambda _, value: got.append(value))
        assert got == [0, 2, 4]

    def test_on_message(self, side: Side) -> None:
        seen: set[str] = set()
        result = group(add.s(i, i) for i in range(3)).apply_async(countdown=0.3)
        result.get(timeout=PATIENCE, on_message=lambda body: seen.add(body["status"]))
        assert "SUCCESS" in seen

    def test_revoke(self, side: Side) -> None:
        result = group(add.s(i, i) for i in range(3)).apply_async(countdown=1)
        result.revoke()
        for one in result:
            with pytest.raises(TaskRevokedError):
                one.get(timeout=PATIENCE)

    def test_save_and_restore(self, side: Side) -> None:
        result = group(add.s(i, i) for i in range(3))()
        result.save()
        restored = GroupResult.restore(result.id, app=side.app)
        assert restored == result
        assert restored.get(timeout=PATIENCE) == [0, 2, 4]
        restored.delete()
        assert GroupResult.restore(result.id, app=side.app) is None

    def test_forget(self, side: Side) -> None:
        result = group(add.s(i, i) for i in range(3))()
        result.get(timeout=PATIENCE)
        result.forget()
        assert [side.client.exists(f"celery-task-meta-{one.id}") for one in result] == [0] * 3

    def test_as_tuple_and_back(self, side: Side) -> None:
        result = group(add.s(i, i) for i in range(3))()
        stored = json.loads(json.dumps(result.as_tuple()))
        assert result_from_tuple(stored, app=side.app).get(timeout=PATIENCE) == [0, 2, 4]

    def test_nested(self, side: Side) -> None:
        result = group(add.s(1, 1), group(add.s(2, 2), group(add.s(3, 3), add.s(4, 4))))()
        assert result.get(timeout=PATIENCE) == [2, 4, 6, 8]

    def test_empty(self, side: Side) -> None:
        assert group([])().get(timeout=PATIENCE) == []

    def test_of_chains(self, side: Side) -> None:
        result = group(chain(add.s(i, i), add.s(1)) for i in range(3))()
        assert result.get(timeout=PATIENCE) == [1, 3, 5]

    def test_partial_arguments_go_to_each(self, side: Side) -> None:
        result = group(add.s(1), add.s(2)).delay(10)
        assert result.get(timeout=PATIENCE) == [11, 12]

    def test_in_a_chain_the_result_goes_to_each(self, side: Side) -> None:
        result = chain(add.s(1, 1), group(add.s(1), mul.s(10)))()
        assert result.get(timeout=PATIENCE) == [3, 20]

    def test_a_link_is_called_by_the_first(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "called"
        made = group(add.s(2, 2), add.s(4, 4))
        made.link(tasks.note.s(path=str(path)))
        assert made().get(timeout=PATIENCE) == [4, 8]
        # It gets no result, neither the group's nor the task's.
        wait_for(lambda: lines_of(path) == ["[]"], "the callback")
        assert remains(lambda: lines_of(path) == ["[]"], 0.3)

    def test_an_errback_for_each_that_fails(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        made = group(tasks.fail.s(), tasks.fail.s())
        made.link_error(tasks.note_error.s(path=str(path)))
        result = made()
        wait_for(lambda: len(lines_of(path)) == 2, "two errbacks")
        assert {line.split()[0] for line in lines_of(path)} == {one.id for one in result}

    def test_one_of_one_is_unrolled_in_a_chain(self, side: Side) -> None:
        assert chain(group(add.s(1, 1)), add.s(2))().get(timeout=PATIENCE) == 4

    def test_all_know_their_group(self, side: Side) -> None:
        result = group(tasks.request_of.s(), tasks.request_of.s())()
        assert [found["group"] for found in result.get(timeout=PATIENCE)] == [result.id] * 2

    def test_the_workers_run_them_at_the_same_time(self, side: Side, gate: Gate) -> None:
        result = group(tasks.hold.s(*gate.args(str(number))) for number in range(4))()
        for number in range(4):
            gate.wait(str(number))
        gate.open(*(str(number) for number in range(4)))
        assert result.get(timeout=PATIENCE) == ["held"] * 4


class TestChords:
    def test_simple(self, side: Side) -> None:
        result = chord(add.s(i, i) for i in range(10))(tasks.tsum.s())
        assert result.get(timeout=PATIENCE) == 90

    def test_a_header_of_one(self, side: Side) -> None:
        assert chord([add.s(2, 2)])(tasks.tsum.s()).get(timeout=PATIENCE) == 4

    def test_an_immutable_body(self, side: Side) -> None:
        result = chord([add.s(1, 1), add.s(2, 2)], add.si(20, 22)).apply_async()
        assert result.get(timeout=PATIENCE) == 42

    def test_the_parent_is_the_header(self, side: Side) -> None:
        result = chord([add.s(1, 1), add.s(2, 2)])(tasks.tsum.s())
        assert result.get(timeout=PATIENCE) == 6
        assert result.parent.get(timeout=PATIENCE) == [2, 4]

    def test_the_results_are_in_the_order_of_the_header(self, side: Side) -> None:
        header = [tasks.sleep.s((3 - number) / 10) for number in range(3)]
        result = chord(header)(tasks.same.s())
        assert result.get(timeout=PATIENCE) == [0.3, 0.2, 0.1]

    def test_a_group_and_then_a_task(self, side: Side) -> None:
        result = (group(add.s(i, i) for i in range(10)) | tasks.tsum.s())()
        assert result.get(timeout=PATIENCE) == 90

    def test_in_a_chain(self, side: Side) -> None:
        made = chain(add.s(1, 1), group(add.s(1), add.s(2)), tasks.tsum.s(), add.s(100))
        assert made().get(timeout=PATIENCE) == 107

    def test_after_a_chord(self, side: Side) -> None:
        made = chord([add.s(1, 1), add.s(2, 2)], tasks.tsum.s()) | mul.s(10)
        assert made().get(timeout=PATIENCE) == 60

    def test_a_group_after_a_group(self, side: Side) -> None:
        made = group(add.s(1, 1), add.s(2, 2)) | group(tasks.tsum.s(), tasks.tsum.s())
        assert made().get(timeout=PATIENCE) == [6, 6]

    def test_chords_in_a_header(self, side: Side) -> None:
        inner = chord([add.s(1, 1), add.s(2, 2)], tasks.tsum.s())
        assert chord([inner, add.s(3, 3)])(tasks.tsum.s()).get(timeout=PATIENCE) == 12

    def test_chains_in_a_header(self, side: Side) -> None:
        header = [chain(add.s(i, i), add.s(1)) for i in range(3)]
        assert chord(header)(tasks.tsum.s()).get(timeout=PATIENCE) == 9

    def test_groups_in_a_header(self, side: Side) -> None:
        header = [chain(add.s(n, 0), group(add.s(1), add.s(2))) for n in range(3)]
        result = chord(header)(tasks.same.s())
        assert result.get(timeout=PATIENCE) == [[n + 1, n + 2] for n in range(3)]

    def test_a_chain_as_the_body(self, side: Side) -> None:
        made = chord([add.s(1, 1), add.s(2, 2)], chain(tasks.tsum.s(), mul.s(7)))
        assert made().get(timeout=PATIENCE) == 42

    def test_retries_in_the_header(self, side: Side) -> None:
        result = chord([tasks.retry_until.s(1), add.s(1, 1)])(tasks.tsum.s())
        assert result.get(timeout=PATIENCE) == 3

    def test_a_failure_in_the_header(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "called"
        result = chord([add.s(1, 1), tasks.fail.s()])(tasks.note.s(path=str(path)))
        # Following its parents, `get` raises the header's own error, if it hears of that first.
        with pytest.raises(ChordError, match=r"raised ValueError\('as told'\)"):
            result.get(timeout=PATIENCE, follow_parents=False)
        with pytest.raises((ChordError, ValueError), match="as told"):
            result.get(timeout=PATIENCE)
        assert result.state == "FAILURE"
        assert remains(lambda: not path.exists(), 0.3)

    def test_on_error_of_the_body(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        body = tasks.tsum.s().on_error(tasks.note_error.s(path=str(path)))
        result = chord([add.s(1, 1), tasks.fail.s()])(body)
        wait_for(lambda: lines_of(path), "the errback")
        (line,) = lines_of(path)
        assert line.startswith(f"{result.id} ChordError")

    def test_link_error_of_the_chord(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        made = chord([add.s(1, 1), tasks.fail.s()], tasks.tsum.s())
        made.link_error(tasks.note_error.s(path=str(path)))
        made.apply_async()
        wait_for(lambda: any("ChordError" in line for line in lines_of(path)), "the errback")

    def test_link_error_on_the_header_if_allowed(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        side.app.conf.task_allow_error_cb_on_chord_header = True
        try:
            made = chord([tasks.fail.s(), tasks.fail.s()], tasks.tsum.s())
            made.link_error(tasks.note_error.s(path=str(path)))
            made.apply_async()
        finally:
            side.app.conf.task_allow_error_cb_on_chord_header = False
        wait_for(lambda: len(lines_of(path)) >= 3, "an errback for each, and for the body")
        assert sum("ValueError" in line for line in lines_of(path)) >= 2

    def test_a_failing_body(self, side: Side) -> None:
        result = chord([add.s(1, 1), add.s(2, 2)])(tasks.fail.s())
        with pytest.raises(ValueError, match="as told"):
            result.get(timeout=PATIENCE)

    def test_add_to_chord(self, side: Side) -> None:
        result = chord([tasks.add_to_chord.s(1), add.s(2, 2)])(tasks.tsum.s())
        assert result.get(timeout=PATIENCE) == 1 + 101 + 4

    def test_redis_needs_no_unlocking_task(self, side: Side) -> None:
        before = side.inspect().stats()[side.main]["total"]
        assert chord([add.s(1, 1), add.s(2, 2)])(tasks.tsum.s()).get(timeout=PATIENCE) == 6
        after = side.inspect().stats()[side.main]["total"]
        assert after.get("celery.chord_unlock", 0) == before.get("celery.chord_unlock", 0) == 0

    def test_nothing_of_it_stays_in_redis_for_ever(self, side: Side) -> None:
        result = chord([add.s(1, 1), add.s(2, 2)])(tasks.tsum.s())
        result.get(timeout=PATIENCE)
        left = side.client.keys(f"*{result.parent.id}.*")
        # (-2: it has gone meanwhile; -1: it stays.)
        assert all(side.client.ttl(name) in (-2, *range(86401)) for name in left)

    def test_larger_than_a_worker(self, side: Side) -> None:
        result = chord(add.s(i, i) for i in range(100))(tasks.tsum.s())
        assert result.get(timeout=20) == 9900


class TestLargeChords:
    """Of more parts than run at once: ours hands several to a process."""

    MANY = 40

    def many(self) -> list[Any]:
        return [add.s(number, 0) for number in range(self.MANY)]

    def test_all_sorts_in_the_header(self, side: Side) -> None:
        header = [
            *self.many(),
            tasks.retry_until.s(1),
            tasks.add_to_chord.s(1),
            chain(add.s(1, 1), add.s(1)),
            chord([add.s(1, 1), add.s(2, 2)], tasks.tsum.s()),
        ]
        made = chord(header, chain(tasks.tsum.s(), mul.s(10)))
        assert made().get(timeout=PATIENCE) == (780 + 1 + 1 + 101 + 3 + 6) * 10

    def test_groups_in_the_header(self, side: Side) -> None:
        header = [chain(add.s(n, 0), group([add.s(m) for m in range(40)])) for n in range(2)]
        result = chord(header)(tasks.same.s())
        assert result.get(timeout=PATIENCE) == [[*range(40)], [*range(1, 41)]]

    def test_the_body_is_a_child_of_the_header(self, side: Side) -> None:
        result = chord(self.many())(tasks.request_of.s())
        found = result.get(timeout=PATIENCE)
        header = {one.id for one in result.parent.results}
        assert found["parent_id"] in header
        assert found["root_id"] in header

    def test_a_failure(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        body = tasks.tsum.s().on_error(tasks.note_error.s(path=str(path)))
        result = chord([*self.many(), tasks.fail.s(), *self.many()])(body)
        with pytest.raises(ChordError, match=r"raised ValueError\('as told'\)"):
            result.get(timeout=PATIENCE, follow_parents=False)
        wait_for(lambda: lines_of(path), "the errback")
        (line,) = lines_of(path)
        assert line.startswith(f"{result.id} ChordError")
