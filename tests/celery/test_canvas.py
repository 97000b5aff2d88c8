"""Chapter *Canvas*: signatures, chains, map, starmap and chunks, replaced tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from celery import chain, chord, chunks, group, signature, xmap, xstarmap

from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Side, lines_of, remains, wait_for
from tests.celery.tasks_of_tests import add, mul, subtract

PATIENCE = 10


class TestSignatures:
    def test_by_name(self, side: Side) -> None:
        made = signature("tests.celery.tasks_of_tests.add", args=(2, 2), app=side.app)
        assert made.delay().get(timeout=PATIENCE) == 4

    def test_of_a_task(self, side: Side) -> None:
        made = add.signature((2, 2), countdown=0)
        assert (made.args, made.kwargs, made.options) == ((2, 2), {}, {"countdown": 0})
        assert made.delay().get(timeout=PATIENCE) == 4

    def test_calling_it_runs_it_here(self, side: Side) -> None:
        assert add.s(2, 2)() == 4

    def test_set_options(self, side: Side) -> None:
        made = tasks.request_of.s().set(shadow="other", task_id=f"set-{side.name}")
        assert made.delay().get(timeout=PATIENCE)["shadow"] == "other"

    def test_further_arguments_come_first(self, side: Side) -> None:
        assert subtract.s(10).delay(30).get(timeout=PATIENCE) == 20

    def test_newer_keywords_and_options_win(self, side: Side) -> None:
        made = tasks.echo.s(a=1, b=2)
        assert made.delay(b=3).get(timeout=PATIENCE) == [[], {"a": 1, "b": 3}]
        shadowed = tasks.request_of.s().set(shadow="one")
        found = shadowed.apply_async(shadow="two").get(timeout=PATIENCE)
        assert found["shadow"] == "two"

    def test_clone(self, side: Side) -> None:
        made = add.s(2)
        other = made.clone(args=(4,))
        assert (made.args, other.args) == ((2,), (4, 2))
        assert other.delay().get(timeout=PATIENCE) == 6

    def test_immutable(self, side: Side) -> None:
        assert add.signature((2, 2), immutable=True).delay(9).get(timeout=PATIENCE) == 4
        assert add.si(2, 2).delay(9).get(timeout=PATIENCE) == 4

    def test_it_can_be_sent_as_json(self, side: Side) -> None:
        stored = json.loads(json.dumps(add.s(2, 2)))
        assert signature(stored, app=side.app).delay().get(timeout=PATIENCE) == 4

    def test_a_task_may_get_one_as_an_argument(self, side: Side) -> None:
        result = tasks.call.delay(add.s(2, 2))
        inner = side.app.AsyncResult(result.get(timeout=PATIENCE))
        assert inner.get(timeout=PATIENCE) == 4

    def test_freeze_gives_the_result_beforehand(self, side: Side) -> None:
        made = add.s(2, 2)
        result = made.freeze()
        made.apply_async()
        assert result.get(timeout=PATIENCE) == 4

    def test_link_and_on_error(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "called"
        made = add.s(2, 2)
        made.link(tasks.note.s(path=str(path)))
        made.delay()
        wait_for(lambda: lines_of(path) == ["[4]"], "the callback")
        errors = tmp_path / "errors"
        result = tasks.fail.s().on_error(tasks.note_error.s(path=str(errors))).delay()
        wait_for(lambda: lines_of(errors) == [f"{result.id} ValueError as told"], "the errback")


class TestChains:
    def test_simple(self, side: Side) -> None:
        assert chain(add.s(2, 2), add.s(4), add.s(8))().get(timeout=PATIENCE) == 16

    def test_pipes(self, side: Side) -> None:
        assert (add.s(2, 2) | add.s(4) | add.s(8))().get(timeout=PATIENCE) == 16

    def test_partial(self, side: Side) -> None:
        assert (add.s(4) | mul.s(8)).delay(16).get(timeout=PATIENCE) == 160

    def test_combined(self, side: Side) -> None:
        one, two = (add.s(16) | mul.s(2)), (add.s(4) | mul.s(8))
        assert (one | two).delay(4).get(timeout=PATIENCE) == 352

    def test_immutable(self, side: Side) -> None:
        result = (add.si(2, 2) | add.si(4, 4) | add.si(8, 8))()
        assert result.get(timeout=PATIENCE) == 16
        assert result.parent.get(timeout=PATIENCE) == 8
        assert result.parent.parent.get(timeout=PATIENCE) == 4

    def test_its_id_is_that_of_its_last_task(self, side: Side) -> None:
        made = chain(add.s(1, 1), add.s(1).set(task_id=f"last-{side.name}"))
        result = made.apply_async()
        assert result.id == f"last-{side.name}"
        assert result.get(timeout=PATIENCE) == 3

    def test_children(self, side: Side) -> None:
        result = chain(add.s(4, 4), mul.s(8))()
        assert result.get(timeout=PATIENCE) == 64
        # What comes next is sent before its own outcome is known.
        assert result.parent.get(timeout=PATIENCE) == 8
        assert result.parent.children == [result]

    def test_all_know_their_root(self, side: Side) -> None:
        result = chain(add.s(1, 1), tasks.same.s(), tasks.request_of.s())()
        found = result.get(timeout=PATIENCE)
        assert found["root_id"] == result.parent.parent.id
        assert found["parent_id"] == result.parent.id

    def test_a_failure_ends_it(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "called"
        result = chain(add.s(1, 1), tasks.fail.s(), tasks.note.s(path=str(path)))()
        with pytest.raises(ValueError, match="as told"):
            result.get(timeout=PATIENCE)
        assert remains(lambda: not path.exists(), 0.3)
        # Also the state of what was never called, so that who waits for it hears of it.
        assert (result.state, result.parent.state) == ("FAILURE", "FAILURE")

    def test_link_error_of_a_chain(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        made = chain(add.s(1, 1), tasks.fail.s(), add.s(1))
        result = made.apply_async(link_error=tasks.note_error.s(path=str(path)))
        wait_for(lambda: lines_of(path), "the errback")
        assert lines_of(path) == [f"{result.parent.id} ValueError as told"]

    def test_a_countdown_in_the_middle(self, side: Side) -> None:
        assert chain(add.s(1, 1), add.s(1).set(countdown=0.5))().get(timeout=PATIENCE) == 3

    def test_a_retry_in_the_middle(self, side: Side) -> None:
        made = chain(add.s(1, 1), tasks.retry_until.s(), add.s(1))
        assert made().get(timeout=PATIENCE) == 3

    def test_long(self, side: Side) -> None:
        assert chain(add.s(0, 1), *[add.s(1)] * 29)().get(timeout=PATIENCE) == 30

    def test_options_of_the_whole_chain(self, side: Side) -> None:
        made = chain(add.s(1, 1), tasks.request_of.s())
        found = made.apply_async(headers={"x-mine": 1}).get(timeout=PATIENCE)
        assert found["headers"].get("x-mine") in (1, None)


class TestMaps:
    def test_map(self, side: Side) -> None:
        assert tasks.tsum.map([[1, 2], [3, 4]]).delay().get(timeout=PATIENCE) == [3, 7]
        assert isinstance(tasks.tsum.map([]), xmap)

    def test_starmap(self, side: Side) -> None:
        made = add.starmap(zip(range(5), range(5), strict=True))
        assert made.delay().get(timeout=PATIENCE) == [0, 2, 4, 6, 8]
        assert isinstance(made, xstarmap)

    def test_starmap_with_a_countdown(self, side: Side) -> None:
        assert add.starmap([(1, 1)]).apply_async(countdown=0.3).get(timeout=PATIENCE) == [2]

    def test_chunks(self, side: Side) -> None:
        made = add.chunks(zip(range(10), range(10), strict=True), 4)
        assert isinstance(made, chunks)
        result = made.apply_async()
        assert result.get(timeout=PATIENCE) == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]

    def test_chunks_as_a_group(self, side: Side) -> None:
        made = add.chunks([(n, n) for n in range(4)], 2).group()
        assert made.skew(start=0, stop=0.2, step=0.1)().get(timeout=PATIENCE) == [[0, 2], [4, 6]]


class TestReplace:
    def test_by_a_task(self, side: Side) -> None:
        result = tasks.replace_by_add.delay(2, 2)
        assert result.get(timeout=PATIENCE) == 4
        assert result.state == "SUCCESS"

    def test_by_a_chain(self, side: Side) -> None:
        assert tasks.replace_by_chain.delay(1).get(timeout=PATIENCE) == 20

    def test_by_a_group(self, side: Side) -> None:
        assert tasks.replace_by_group.delay([1, 2]).get(timeout=PATIENCE) == [2, 3]

    def test_in_a_chain(self, side: Side) -> None:
        made = chain(tasks.replace_by_add.s(1, 1), add.s(10))
        assert made().get(timeout=PATIENCE) == 12

    def test_in_a_group_and_in_a_chord(self, side: Side) -> None:
        header = [tasks.replace_by_add.s(1, 1), add.s(2, 2)]
        assert group(header)().get(timeout=PATIENCE) == [2, 4]
        assert chord(header)(tasks.tsum.s()).get(timeout=PATIENCE) == 6

    def test_its_callbacks_are_called(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "called"
        tasks.replace_by_add.apply_async((2, 2), link=tasks.note.s(path=str(path)))
        wait_for(lambda: lines_of(path) == ["[4]"], "the callback of what replaced it")
