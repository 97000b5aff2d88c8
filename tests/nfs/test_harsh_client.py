"""Storage on a client that is worse than any known one, and on a mount with `nocto`."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import Fenced
from storage import durable
from storage.directory import Directory
from tests.nfs.conftest import Pair
from tests.nfs.script import Settings
from tests.storage_kit import contents, run, write


def test_a_directory_that_another_node_made_is_there(pair: Pair) -> None:
    """After mkdir said EEXIST, the name is looked at, and the client may say it is missing."""
    pair.a.script(settings=Settings(believes_after_eexist=True))
    assert not (pair.on_a / "d").exists()
    (pair.on_b / "d").mkdir()
    assert durable.make_directory(pair.on_a / "d") is False


def test_with_old_listings_the_head_is_found_by_name(pair: Pair, tmp_path: Path) -> None:
    for node in (pair.a, pair.b):
        node.script(settings=Settings(stale_listings=True))
    on_a = Directory.open(pair.on_a, "k")
    for n in range(1, 7):
        root = pair.on_a if n % 2 else pair.on_b
        run(root, tmp_path, f"t{n}", write(f"f{n}", str(n)))
        assert on_a.head().n == n
        assert Directory.open(pair.on_b, "k").head().n == n
    assert len(contents(on_a.head())) == 6


def test_with_old_listings_a_task_has_one_outcome(pair: Pair, tmp_path: Path) -> None:
    for node in (pair.a, pair.b):
        node.script(settings=Settings(stale_listings=True))
    directory = Directory.open(pair.on_a, "k")
    base = directory.head()
    assert directory.outcome_of("t") is None
    first = run(pair.on_b, tmp_path, "t", write("a", "1"), claim_id="A")
    assert run(pair.on_a, tmp_path, "t", write("a", "2"), claim_id="B", base=base) == first
    with pytest.raises(Fenced):
        run(pair.on_a, tmp_path, "other", write("a", "3"), base=base)
    assert [r.task_id for r in Directory.open(pair.on_b, "k").versions()] == ["t"]


@pytest.mark.xfail(strict=True, reason="one outcome rests on close-to-open: not with `nocto`")
@pytest.mark.parametrize("late", [True, False])
def test_with_old_listings_a_task_has_one_outcome_whatever_came_later(
    late: bool, pair: Pair, tmp_path: Path
) -> None:
    """Its own folder in runs/<task id> renews that listing; the other claim's may be old."""
    for node in (pair.a, pair.b):
        node.script(settings=Settings(stale_listings=True))
    other = Directory.open(pair.on_b, "k")
    begun = other.begin("t", "A", other.head())
    directory = Directory.open(pair.on_a, "k")
    assert directory.outcome_of("t") is None  # the listing of A's folder is known now
    first = begun.conclude("FAILURE", "boom", attempt=1, node="n")
    if late:
        run(pair.on_b, tmp_path, "other", write("a", "1"))
    assert run(pair.on_a, tmp_path, "t", write("a", "2"), claim_id="B") == first
