"""The arguments of an export, checked before anything is opened."""

from __future__ import annotations

from typing import Any

import pytest

from errors import Refused
from tasks.exporting.request import checked


def request(**arguments: Any) -> Any:
    given: dict[str, Any] = {"table": "t", "source": "main", "to": "s3://lake/raw", **arguments}
    return checked(**given)


def test_a_request_names_its_folder() -> None:
    assert request(to="s3://lake/a/b/", table="public.t").prefix == "a/b/public.t/"
    assert request(to="s3://lake").prefix == "t/"
    assert request(query="  SELECT 1 ; ").query == "SELECT 1"
    assert request(mode="incremental", column="a", primary_key="id").primary_key == ("id",)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"to": "lake/raw"}, "to='lake/raw'"),
        ({"to": "s3://L/raw"}, "to='s3://L/raw'"),
        ({"to": "s3://lake/a//b"}, "empty part"),
        ({"to": "s3://lake/../b"}, r"'\.\.'"),
        ({"table": "a/b"}, "table='a/b'"),
        ({"table": ".."}, "dots"),
        ({"table": ""}, "table=''"),
        ({"table": "a\x00"}, "table="),
        ({"table": "x" * 300}, "at most 200"),
        ({"mode": "delta"}, "mode='delta': expected one of full, incremental"),
        ({"mode": "incremental"}, "needs column="),
        ({"column": "at"}, "belong to mode="),
        ({"lookback": "5m"}, "belong to mode="),
        ({"mode": "incremental", "column": "a", "lookback": "soon"}, "lookback='soon'"),
        ({"mode": "incremental", "column": "a", "lookback": -1}, "lookback=-1"),
        ({"mode": "incremental", "column": "a", "primary_key": []}, r"primary_key=\[\]"),
        ({"on_schema_change": "drop"}, "on_schema_change='drop'"),
        ({"compression": "rar"}, "compression='rar'"),
        ({"rows_per_file": 0}, "rows_per_file=0"),
        ({"rows_per_file": True}, "rows_per_file=True"),
        ({"part_size": 1024}, "part_size=1024"),
        ({"query": " ; "}, "query=: it is empty"),
        ({"patience": "forever"}, "patience='forever'"),
    ],
)
def test_what_cant_be(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        request(**arguments)
