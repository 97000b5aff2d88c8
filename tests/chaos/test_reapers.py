"""Two nodes that reap at once: each claim of the dead goes back, and goes back once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker_kit import Broker
from tests.fleets import wait_for
from tests.redis_server import RedisServer, running_redis

PROJECT = Path(__file__).parents[2]
CLAIMS = 450  # one script returns at most 200
DEAD = ("dead-1:aaaa", "dead-2:bbbb")

REAPER = """
import sys, time
from pathlib import Path
from broker import server
from broker.scripts import Scripts
from scheduler.reaper import Reaper

url, ready, go = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
reaper = Reaper(Scripts(server.connect(url)), lease=0.3, pace=1.0)
while not reaper.watch():
    time.sleep(0.01)
ready.touch()
while not go.exists():
    time.sleep(0.001)
print(reaper.run_once())
"""


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


def test_what_the_dead_held_goes_back_once(redis_server: RedisServer, tmp_path: Path) -> None:
    with redis_server.connect() as client:
        broker = Broker(client)
        for member in DEAD:
            broker.scripts.register(
                member, 3600, '{"cpus": 1, "memory": 1, "host": "h", "pid": 1, "nonce": "n"}'
            )
        for number in range(CLAIMS):
            # One in three has a lock, and a second job of that key waits for it.
            key = f"k{number}" if number % 3 == 0 else None
            broker.put(f"t{number}", key)
            broker.take(DEAD[number % 2])
            if key is not None:
                broker.put(f"behind-{number}", key)
        for member in DEAD:
            broker.expire(member)
        go = tmp_path / "go"
        ready = [tmp_path / f"ready-{number}" for number in range(2)]
        reapers = [
            subprocess.Popen(
                [sys.executable, "-c", REAPER, redis_server.url, str(path), str(go)],
                cwd=PROJECT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for path in ready
        ]
        try:
            wait_for(lambda: all(path.exists() for path in ready), "both to have watched")
            go.touch()
            returned = [int(reaper.communicate(timeout=30)[0]) for reaper in reapers]
        finally:
            for reaper in reapers:
                reaper.kill()
                reaper.wait()
        assert sum(returned) == CLAIMS, returned
        assert not broker.audit().leases
        assert {broker.lost(f"t{number}") for number in range(CLAIMS)} == {1}
        broker.join("alive:cccc")
        ran = broker.drain("alive:cccc")
        behind = {f"behind-{number}" for number in range(0, CLAIMS, 3)}
        assert len(ran) == len(set(ran)) == CLAIMS + len(behind)
        assert set(ran) == {f"t{number}" for number in range(CLAIMS)} | behind
        broker.scripts.leave("alive:cccc")
        broker.audit()
