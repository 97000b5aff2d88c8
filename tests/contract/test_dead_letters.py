"""Dead letters: what of them is retried, as what, and what can only be dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker import deadletters, keys
from broker.deadletters import RETRY_OF, DeadLetter, retry_of
from errors import Refused
from tests.broker_kit import QUEUE, Broker, list_of, message

NODE = "n:1"


def bury(broker: Broker, task: str, reason: str = "it kills its node", **about: Any) -> DeadLetter:
    """A job that has become a dead letter."""
    broker.put(task, about.pop("key", None), **about)
    claim_id, _ = broker.take(NODE)
    assert broker.scripts.bury(NODE, claim_id, reason) == "finished"
    return letter_of(broker, task)


def letter_of(broker: Broker, name: str) -> DeadLetter:
    letter = deadletters.find(broker.client, name)
    assert letter is not None
    return letter


@pytest.fixture(autouse=True)
def node(broker: Broker) -> None:
    broker.join(NODE)


class TestRetry:
    def test_it_is_a_new_task_of_the_old_ones_message(self, broker: Broker) -> None:
        old: dict[str, Any] = {
            "root_id": "t",
            "parent_id": "p",
            "retries": 2,
            "group": "g",
            "group_index": 0,
            "expires": "2020-01-01T00:00:00+00:00",
            "cohort_unknown": 1,
            "argsrepr": "()",
        }
        letter = bury(broker, "t", key="k", priority=3, **old)
        before = json.loads(letter.payload)
        retry = retry_of(letter)
        broker.client.delete(keys.BELL)
        assert retry.put(broker.scripts)
        assert not broker.client.exists(keys.DEAD)
        assert broker.client.llen(keys.BELL) == 1
        (raw,) = broker.client.lrange(list_of(QUEUE, 3), 0, -1)
        after = json.loads(raw)
        assert retry.task_id != "t"
        assert after["headers"] == {
            "id": retry.task_id,
            RETRY_OF: "t",
            "root_id": retry.task_id,
            "parent_id": "p",
            "retries": 2,
            "argsrepr": "()",
            "task": "tests.job",
            "cohort": {"key": "k"},
        }
        assert after["body"] == before["body"]
        assert after["properties"]["correlation_id"] == retry.task_id
        assert after["properties"]["priority"] == 3
        assert after["properties"]["delivery_tag"] != before["properties"]["delivery_tag"]
        assert broker.drain(NODE) == [retry.task_id]

    def test_the_root_of_a_chain_stays_its_root(self, broker: Broker) -> None:
        retry = retry_of(bury(broker, "t", root_id="r"))
        assert json.loads(retry.message)["headers"]["root_id"] == "r"

    def test_two_who_retry_it_put_one_task(self, broker: Broker) -> None:
        letter = bury(broker, "t")
        first, second = retry_of(letter), retry_of(letter_of(broker, "t"))
        assert first.task_id == second.task_id
        assert (first.put(broker.scripts), second.put(broker.scripts)) == (True, False)
        assert broker.client.llen(QUEUE) == 1

    def test_the_letter_of_another_death_is_left_alone(self, broker: Broker) -> None:
        retry = retry_of(bury(broker, "t"))
        broker.client.delete(keys.DEAD)
        bury(broker, "t", "for another reason")
        assert not retry.put(broker.scripts)
        assert letter_of(broker, "t").reason == "for another reason"

    @pytest.mark.parametrize("payload", [b"\xff garbage", b"[]", b'{"headers": 1}', b""])
    def test_what_is_no_tasks_message_can_only_be_shown_and_dropped(
        self, broker: Broker, payload: bytes
    ) -> None:
        broker.client.lpush(QUEUE, payload)
        assert broker.ask(NODE)[1] == "nothing"
        (letter,) = deadletters.each(broker.client)
        assert letter.name.startswith("element-")
        assert (letter.message, letter.task, letter.payload) == (None, "", payload)
        with pytest.raises(Refused, match=f"{letter.name} isn't a task's message"):
            retry_of(letter)
        assert deadletters.drop(broker.client, [letter]) == 1
        assert not broker.client.exists(keys.DEAD)

    def test_what_only_redis_takes_for_a_message_is_none(self, broker: Broker) -> None:
        text = message("t").replace('"priority": 0', '"priority": 0x10')
        broker.client.hset(keys.DEAD, "t", b'{"reason":"r","time":"1"}\0' + text.encode())
        assert letter_of(broker, "t").message is None


def test_dropping_says_how_many_were_there(broker: Broker) -> None:
    letters = [bury(broker, f"t{number}") for number in range(3)]
    broker.client.hdel(keys.DEAD, "t1")
    assert deadletters.drop(broker.client, letters) == 2
    assert not broker.client.exists(keys.DEAD)
