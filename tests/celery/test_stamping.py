"""Chapter *Canvas*: stamping."""

from __future__ import annotations

from typing import Any

from celery import chain, chord, group
from celery.canvas import Signature, StampingVisitor

from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Side, wait_for
from tests.celery.tasks_of_tests import add

PATIENCE = 10


class Monitoring(StampingVisitor):  # type: ignore[misc]
    """Stamps every signature with an id, as the manual's example does."""

    def __init__(self, word: str, **callbacks: str) -> None:
        self.word = word
        self.callbacks = callbacks
        self.seen: list[str] = []

    def on_signature(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        self.seen.append(sig.task.rpartition(".")[2])
        return {"monitoring": self.word, "stamped_headers": ["monitoring"]}

    def on_group_start(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        self.seen.append("group")
        return super().on_group_start(sig, **headers)  # type: ignore[no-any-return]

    def on_chain_start(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        self.seen.append("chain")
        return super().on_chain_start(sig, **headers)  # type: ignore[no-any-return]

    def on_callback(self, callback: Signature, **headers: Any) -> dict[str, Any]:
        return dict(self.callbacks)


def stamps_of(found: dict[str, Any]) -> dict[str, Any]:
    """What a task sees of its stamps."""
    return {name: found["stamps"][name] for name in found["stamped_headers"] or ()}


def test_stamp_of_a_signature(side: Side) -> None:
    made = tasks.request_of.s()
    made.stamp(customer="acme", area=7)
    found = made.apply_async().get(timeout=PATIENCE)
    assert stamps_of(found) == {"customer": "acme", "area": 7}


def test_without_stamps(side: Side) -> None:
    found = tasks.request_of.delay().get(timeout=PATIENCE)
    assert stamps_of(found) == {}


def test_a_visitor_stamps_all_of_a_canvas(side: Side) -> None:
    made = chain(add.s(1, 1), group(tasks.request_of.s(), tasks.request_of.s()))
    visitor = Monitoring("all")
    made.stamp(visitor=visitor)
    for found in made.apply_async().get(timeout=PATIENCE):
        assert stamps_of(found) == {"monitoring": "all"}
    assert {"chain", "group", "add", "request_of"} <= set(visitor.seen)


def test_a_chord_with_its_body(side: Side) -> None:
    made = chord([tasks.request_of.s(), tasks.request_of.s()], tasks.same.s())
    made.stamp(visitor=Monitoring("chord"))
    for found in made.apply_async().get(timeout=PATIENCE):
        assert stamps_of(found) == {"monitoring": "chord"}


def test_callbacks_are_stamped_by_the_visitor(side: Side) -> None:
    made = tasks.same.s(1)
    made.link(tasks.request_of.s())
    made.stamp(visitor=Monitoring("main", on_callback="yes"))
    result = made.apply_async()
    result.get(timeout=PATIENCE)
    (child,) = wait_for(lambda: result.children, "the callback")
    found = child.get(timeout=PATIENCE)
    assert stamps_of(found)["on_callback"] == "yes"


def test_a_retry_keeps_its_stamps(side: Side) -> None:
    made = tasks.retry_and_tell.s()
    made.stamp(customer="acme")
    assert made.apply_async().get(timeout=PATIENCE) == [1, {"customer": "acme"}]


def test_stamps_are_in_the_result(side: Side) -> None:
    made = tasks.same.s(1)
    made.stamp(customer="acme")
    result = made.apply_async()
    result.get(timeout=PATIENCE)
    meta = side.app.backend.get_task_meta(result.id)
    assert meta["stamped_headers"] == ["customer"]
    assert meta["customer"] == "acme"
