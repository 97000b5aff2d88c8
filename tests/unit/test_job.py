"""`@job`: what is wrong with a definition or a key is said before anything is sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import Task
from celery.local import PromiseProxy

from errors import CohortError, InvalidKey, Refused
from tasks import Run, app, job
from tasks.job import JobTask, qualities_of_message
from tasks.submitting import Submitter

USUAL = f"1 {512 << 20} 0"
WITH_FILES = f"{USUAL} prefork"


@job(key="export-{table}-{mode}")
def keyed(run: Run, table: str, mode: str = "full", *, limit: int = 0) -> None:
    """A job with a default in its key."""


@job
def keyless(run: Run, number: int = 0) -> None:
    """A job without a key."""


@job(key="only-one")
def single(run: Run) -> None:
    """A job whose key is always the same."""


@job(key="n-{n:04d}", cpus=2, memory="1.5 GiB", retries=4, timeout="2m", queue="large")
def tuned(run: Run, n: int) -> None:
    """A job with everything set."""


@job(key="k-{n}", gpus=1, labels=["ssd", "arch=arm64", "ssd"], conflict="skip", directory=False)
def picky(run: Run, n: int) -> None:
    """A job with what only some nodes have."""


def wrong(run: Run) -> None:
    """A function that is never to become a job."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been sent: the options with which Celery was called."""
    calls: list[dict[str, Any]] = []

    def send(self: Any, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> None:
        calls.append({"args": args, "kwargs": kwargs, **options})

    monkeypatch.setattr(Task, "apply_async", send)
    monkeypatch.setattr(Submitter, "submit", lambda *arguments: None)
    return calls


class TestDefinition:
    def test_it_is_a_celery_task_of_the_app(self) -> None:
        assert isinstance(keyed, JobTask)
        assert app.tasks[keyed.name] == keyed
        assert keyed.__doc__ == "A job with a default in its key."

    def test_what_it_was_told(self) -> None:
        definition = tuned.definition
        assert definition is not None
        assert (definition.cpus, definition.memory) == (2, 3 << 29)
        assert (definition.retries, definition.timeout) == (4, 120.0)
        assert tuned.max_retries == 4
        assert tuned.soft_time_limit == 120.0
        assert tuned.time_limit > 120.0
        assert tuned.queue == "large"

    def test_what_it_was_not_told(self) -> None:
        definition = keyless.definition
        assert definition is not None
        assert (definition.key, definition.retries, definition.timeout) == (None, 0, None)
        assert keyless.max_retries == 0
        assert keyless.time_limit is None
        assert (definition.gpus, definition.labels) == (0, ())
        assert (definition.conflict, definition.directory) == ("wait", True)
        assert definition.about == {"needs": f"1 {512 << 20} 0"}

    def test_what_the_broker_is_told(self) -> None:
        assert tuned.definition is not None
        assert tuned.definition.about == {"needs": f"2 {3 << 29} 0 prefork"}
        assert picky.definition is not None
        assert picky.definition.directory is False
        assert picky.definition.about == {
            "needs": f"1 {512 << 20} 1 arch=arm64,ssd",
            "conflict": "skip",
        }

    @pytest.mark.parametrize(
        "key", ["x-{tabel}", "{}", "{0}", "{run}", "{table.name}", "{table[0]}"]
    )
    def test_a_key_that_names_no_argument(self, key: str) -> None:
        with pytest.raises(InvalidKey) as raised:

            @job(key=key)
            def wrong(run: Run, table: str, mode: str) -> None: ...

        assert "wrong" in str(raised.value)
        assert repr(key) in str(raised.value)
        assert "table, mode" in str(raised.value)

    def test_a_key_over_no_arguments(self) -> None:
        with pytest.raises(InvalidKey, match="its arguments are none"):

            @job(key="x-{table}")
            def wrong(run: Run) -> None: ...

    @pytest.mark.parametrize("key", ["x-{", "x-}", "{table", "{table:{width}}"])
    def test_a_key_that_is_no_template(self, key: str) -> None:
        with pytest.raises(InvalidKey, match="wrong"):

            @job(key=key)
            def wrong(run: Run, table: str) -> None: ...

    def test_without_a_run(self) -> None:
        with pytest.raises(Refused, match=r"wrong: its first parameter must be the run"):

            @job
            def wrong() -> None: ...

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("cpus", 0),
            ("cpus", -1),
            ("cpus", 1.5),
            ("cpus", "2"),
            ("cpus", None),
            ("retries", -1),
            ("retries", "3"),
            ("retries", None),
            ("cpus", True),
            ("gpus", -1),
            ("gpus", True),
            ("gpus", 0.5),
        ],
    )
    def test_numbers_that_are_none(self, option: str, value: Any) -> None:
        with pytest.raises(Refused, match=f"wrong: {option} must be a whole number"):
            job(**{option: value})(wrong)

    @pytest.mark.parametrize("value", ["lots", "2 GB", -1, None, "", "1e9"])
    def test_memory_that_is_none(self, value: Any) -> None:
        with pytest.raises(Refused, match=r"wrong: memory.*a size such as"):

            @job(memory=value)
            def wrong(run: Run) -> None: ...

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"labels": "ssd"}, "labels must be a list"),
            ({"labels": None}, "labels must be a list"),
            ({"labels": ["ssd", ""]}, "label '' is none"),
            ({"labels": ["a,b"]}, "label 'a,b' is none"),
            ({"labels": [1]}, "label 1 is none"),
            ({"labels": ["gr\u00f6\u00dfe"]}, "is none"),
            ({"labels": ["x" * 64]}, "is none"),
            ({"key": "k", "conflict": "queue"}, "conflict must be one of wait, skip, replace"),
            ({"key": "k", "conflict": None}, "conflict must be one of"),
            ({"key": "k", "directory": 0}, "directory must be True or False"),
            ({"conflict": "skip"}, "conflict='skip' is about a key"),
            ({"directory": False}, "directory=False is about a key"),
        ],
    )
    def test_options_that_are_none(self, options: dict[str, Any], says: str) -> None:
        with pytest.raises(Refused, match=f"wrong: .*{says}"):
            job(**options)(wrong)

    @pytest.mark.parametrize("value", ["soon", "0s", 0, -5, "", "1 week", "inf"])
    def test_a_timeout_that_is_none(self, value: Any) -> None:
        with pytest.raises(Refused, match=r"wrong: .*timeout.*a time span"):

            @job(timeout=value)
            def wrong(run: Run) -> None: ...


class TestKeyOfASubmission:
    @pytest.mark.parametrize(
        ("submit", "key"),
        [
            (lambda: keyed.delay("customers"), "export-customers-full"),
            (lambda: keyed.delay("customers", "delta"), "export-customers-delta"),
            (lambda: keyed.delay(mode="delta", table="t"), "export-t-delta"),
            (lambda: keyed.delay("t", limit=3), "export-t-full"),
            (lambda: keyed.apply_async(("t",), {"mode": "x"}), "export-t-x"),
            (lambda: keyed.apply_async(kwargs={"table": "t"}), "export-t-full"),
            (lambda: keyed.s("t").apply_async(), "export-t-full"),
            (lambda: keyed.si("t", "m").delay(), "export-t-m"),
            (lambda: single.delay(), "only-one"),
            (lambda: tuned.delay(7), "n-0007"),
            (lambda: keyed.delay("größe 大"), "export-größe 大-full"),
        ],
    )
    def test_it_is_in_the_header(
        self, sent: list[dict[str, Any]], submit: Callable[[], Any], key: str
    ) -> None:
        submit()
        (about,) = [call["headers"]["cohort"] for call in sent]
        assert about["key"] == key

    def test_a_keyless_job_says_so(self, sent: list[dict[str, Any]]) -> None:
        keyless.delay(1)
        assert sent[0]["headers"] == {"cohort": {"needs": USUAL}}

    def test_needs_travel_with_the_key(self, sent: list[dict[str, Any]]) -> None:
        tuned.delay(7)
        picky.delay(1)
        assert [call["headers"]["cohort"] for call in sent] == [
            {"key": "n-0007", "needs": f"2 {3 << 29} 0 prefork"},
            {"key": "k-1", "needs": f"1 {512 << 20} 1 arch=arm64,ssd", "conflict": "skip"},
        ]

    def test_other_headers_stay(self, sent: list[dict[str, Any]]) -> None:
        headers = {"mine": 1}
        keyed.apply_async(("t",), headers=headers)
        assert sent[0]["headers"] == {
            "mine": 1,
            "cohort": {"key": "export-t-full", "needs": WITH_FILES},
        }
        assert headers == {"mine": 1}

    def test_nobody_writes_the_header_but_us(self, sent: list[dict[str, Any]]) -> None:
        keyed.apply_async(("t",), headers={"cohort": {"key": "another"}})
        assert sent[0]["headers"]["cohort"] == {"key": "export-t-full", "needs": WITH_FILES}

    @pytest.mark.parametrize(
        "table", ["a/b", "..", "x\0y", "x\ny", "n" * 300, "\ud800", "../../etc/passwd"]
    )
    def test_a_key_that_can_name_no_directory_is_refused(
        self, sent: list[dict[str, Any]], table: str
    ) -> None:
        with pytest.raises(InvalidKey, match="job key"):
            keyed.delay(table)
        assert sent == []

    @pytest.mark.parametrize(
        ("args", "kwargs"), [((), {}), (("a", "b", "c"), {}), (("a",), {"tabel": "b"})]
    )
    def test_arguments_that_do_not_fit_are_refused(
        self, sent: list[dict[str, Any]], args: Any, kwargs: Any
    ) -> None:
        with pytest.raises(TypeError, match="keyed"):
            keyed.apply_async(args, kwargs)
        assert sent == []

    def test_an_argument_that_does_not_fit_its_format_is_refused(
        self, sent: list[dict[str, Any]]
    ) -> None:
        with pytest.raises(CohortError, match="tuned"):
            tuned.delay("seven")
        assert sent == []


class TestKeyOfAStockMessage:
    def message(self, task: str, args: Any, kwargs: Any) -> dict[str, Any]:
        body = json.dumps([args, kwargs, {}]).encode()
        return {
            "headers": {"id": "t", "task": task},
            "properties": {"body_encoding": "base64"},
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "body": base64.b64encode(body).decode(),
        }

    def test_it_is_the_one_that_we_would_have_sent(self) -> None:
        message = self.message(keyed.name, ["customers"], {"mode": "delta"})
        assert qualities_of_message(app, message).key == "export-customers-delta"

    def test_a_body_without_encoding(self) -> None:
        message = self.message(keyed.name, [], {})
        message["body"] = json.dumps([["t"], {}, {}])
        message["properties"] = {}
        assert qualities_of_message(app, message).key == "export-t-full"

    @pytest.mark.parametrize(
        "change",
        [
            {"headers": {"id": "t", "task": "nobody.knows"}},
            {"headers": {"id": "t"}},
            {"headers": {"id": "t", "task": None}},
            {"headers": {"id": "t", "task": keyless.name}},
            {"body": "not base64!"},
            {"body": None},
            {"body": base64.b64encode(b"[1]").decode()},
            {"content-type": "application/x-python-serialize"},
            {"content-type": None},
        ],
    )
    def test_what_has_no_key_or_cannot_be_read(self, change: dict[str, Any]) -> None:
        message = {**self.message(keyed.name, ["t"], {}), **change}
        assert qualities_of_message(app, message).key == ""

    def test_a_key_that_can_name_no_directory_is_none(self) -> None:
        # Its attempt fails with the reason.
        assert qualities_of_message(app, self.message(keyed.name, ["a/b"], {})).key == ""


def test_a_job_is_whole_when_it_is_decorated() -> None:
    """Celery would make it at its first use, where a second thread may find it half made."""

    @job(name="tests.unit.whole")
    def whole(run: Run) -> None: ...

    assert type(whole) is not PromiseProxy
