"""Settings: read once, at the door; what is wrong is named, and no secret is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from errors import SettingsError
from tasks.settings import Settings, parse_size, parse_span

SECRET = "hush-hush"


def write(folder: Path, text: str) -> Path:
    """A settings file."""
    path = folder / "cohort.toml"
    path.write_text(text)
    return path


def read(environ: Mapping[str, str], path: Path | None = None) -> Settings:
    """Settings of nothing but these."""
    return Settings.read({"XDG_CONFIG_HOME": "/nowhere", "HOME": "/nowhere", **environ}, path)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings file of the developer's is read."""
    monkeypatch.chdir(tmp_path)


def test_nothing_has_to_be_set() -> None:
    settings = read({})
    assert settings.redis == "redis://127.0.0.1:6379/0"
    assert settings.root is None
    assert settings.cpus >= 1
    assert settings.memory > 1 << 20


def test_they_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read({}).cpus = 3  # type: ignore[misc]


class TestWhereTheyComeFrom:
    def test_the_environment(self, tmp_path: Path) -> None:
        settings = read(
            {
                "COHORT_ROOT": str(tmp_path),
                "COHORT_REDIS": "rediss://host:1/2",
                "COHORT_NODE": "node-1",
                "COHORT_CPUS": "3",
                "COHORT_MEMORY": "1.5 GiB",
                "COHORT_LEASE": "2500ms",
                "COHORT_DELIVERIES": "5",
                "COHORT_RESULTS_EXPIRE": "2d",
                "COHORT_JOBS": "jobs.nightly, jobs.hourly,",
            }
        )
        assert settings.root == tmp_path
        assert settings.redis == "rediss://host:1/2"
        assert settings.node == "node-1"
        assert (settings.cpus, settings.memory) == (3, 3 << 29)
        assert (settings.lease, settings.deliveries) == (2.5, 5)
        assert settings.results_expire == 172_800
        assert settings.jobs == ("jobs.nightly", "jobs.hourly")

    def test_the_file(self, tmp_path: Path) -> None:
        path = write(
            tmp_path,
            'cpus = 2\nlease = 30\njobs = ["a.b"]\n[sources]\nshop = "sqlite:///shop.db"\n'
            '[[exports]]\ntable = "orders"\nsource = "shop"\n',
        )
        settings = read({}, path)
        assert (settings.cpus, settings.lease, settings.jobs) == (2, 30.0, ("a.b",))
        assert settings.sources == {"shop": "sqlite:///shop.db"}
        assert settings.exports == ({"table": "orders", "source": "shop"},)

    def test_the_environment_wins(self, tmp_path: Path) -> None:
        path = write(tmp_path, 'cpus = 2\nnode = "of-the-file"\n')
        settings = read({"COHORT_CPUS": "4"}, path)
        assert (settings.cpus, settings.node) == (4, "of-the-file")

    def test_the_environment_wins_over_what_is_wrong_in_the_file(self, tmp_path: Path) -> None:
        assert read({"COHORT_CPUS": "4"}, write(tmp_path, "cpus = 0\n")).cpus == 4

    def test_the_named_file_comes_before_the_one_that_lies_here(self, tmp_path: Path) -> None:
        write(tmp_path, "cpus = 2\n")
        named = tmp_path / "other.toml"
        named.write_text("cpus = 5\n")
        assert read({}).cpus == 2
        assert read({"COHORT_SETTINGS": str(named)}).cpus == 5

    def test_the_one_that_lies_here_comes_before_the_users(self, tmp_path: Path) -> None:
        users = tmp_path / "config" / "cohort"
        users.mkdir(parents=True)
        write(users, "cpus = 7\n")
        environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
        assert read(environ).cpus == 7
        write(tmp_path, "cpus = 2\n")
        assert read(environ).cpus == 2

    def test_variables_of_others_are_theirs(self) -> None:
        read({"COHORTS": "x", "MY_COHORT_CPUS": "x", "COHORT_VENV": "x", "COHORT_PYTHON": "x"})


class TestWhatIsWrongIsNamed:
    def test_an_unknown_variable(self) -> None:
        with pytest.raises(SettingsError, match=r"^COHORT_CPU: .*no such setting.*\bcpus\b"):
            read({"COHORT_CPU": "3"})

    def test_an_unknown_setting_of_the_file(self, tmp_path: Path) -> None:
        path = write(tmp_path, "cpu = 3\n")
        with pytest.raises(SettingsError) as raised:
            read({}, path)
        assert str(raised.value).startswith(f"cpu in {path}: there is no such setting")

    @pytest.mark.parametrize(
        ("name", "value", "accepted"),
        [
            ("cpus", "0", "whole number"),
            ("cpus", "two", "whole number"),
            ("cpus", "", "whole number"),
            ("cpus", "1.5", "whole number"),
            ("deliveries", "-1", "whole number"),
            ("memory", "lots", "GiB"),
            ("memory", "2 GB", "GiB"),
            ("memory", "-2 GiB", "GiB"),
            ("lease", "0", "above zero"),
            ("lease", "-5s", "above zero"),
            ("lease", "15 minutes", "15m"),
            ("lease", "nan", "above zero"),
            ("stop_grace", "soon", "30s"),
            ("results_expire", "", "above zero"),
            ("redis", "localhost:6379", "redis://"),
            ("redis", "http://localhost", "redis://"),
            ("node", "a/b", "letters"),
            ("node", "..", "letters"),
            ("node", "n" * 64, "letters"),
            ("node", "", "letters"),
            ("root", "", "folder"),
            ("jobs", "a b", "module names"),
            ("jobs", "a..b", "module names"),
            ("jobs", "a;import os", "module names"),
        ],
    )
    def test_a_malformed_variable(self, name: str, value: str, accepted: str) -> None:
        variable = f"COHORT_{name.upper()}"
        with pytest.raises(SettingsError) as raised:
            read({variable: value})
        assert str(raised.value).startswith(f"{variable}: expected ")
        assert accepted in str(raised.value)

    @pytest.mark.parametrize(
        ("line", "name"),
        [
            ("cpus = true", "cpus"),
            ("cpus = [1]", "cpus"),
            ("redis = 6379", "redis"),
            ("root = 7", "root"),
            ("jobs = 7", "jobs"),
            ('sources = "sqlite://"', "sources"),
            ("[sources]\nshop = 7", "sources"),
            ('[sources]\nshop = "no URL"', "sources"),
            ('[sources]\n"a/b" = "sqlite://"', "sources"),
            ('exports = "orders"', "exports"),
            ('[[exports]]\nsource = "shop"', "exports"),
        ],
    )
    def test_a_malformed_line_of_the_file(self, tmp_path: Path, line: str, name: str) -> None:
        path = write(tmp_path, line + "\n")
        with pytest.raises(SettingsError) as raised:
            read({}, path)
        assert str(raised.value).startswith(f"{name} in {path}: expected ")

    @pytest.mark.parametrize("name", ["sources", "exports"])
    def test_tables_belong_into_the_file(self, name: str) -> None:
        with pytest.raises(SettingsError, match=f"^COHORT_{name.upper()}: .*settings file"):
            read({f"COHORT_{name.upper()}": "x"})

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"COHORT_SETTINGS: .*missing\.toml: No such file"):
            read({"COHORT_SETTINGS": str(tmp_path / "missing.toml")})

    def test_a_file_that_is_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="directory"):
            read({"COHORT_SETTINGS": str(tmp_path)})

    @pytest.mark.parametrize("content", [b"cpus = = 2", b"\xff\xfe", b"[sources", b"cpus = 1\x00"])
    def test_a_file_that_is_no_toml(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bad.toml"
        path.write_bytes(content)
        with pytest.raises(SettingsError, match=r"bad\.toml: not a TOML file"):
            read({}, path)


class TestNoSecretIsShown:
    @pytest.mark.parametrize(
        "text",
        [
            f'[sources]\nshop = 7\nother = "postgresql://me:{SECRET}@db/shop"',
            f'[sources]\n"sh/op" = "postgresql://me:{SECRET}@db/shop"',
            f'[sources]\nshop = "{SECRET}"',
            f'redis = "http://:{SECRET}@host"',
            f'[sources]\nshop = "postgresql://me:{SECRET}@db/shop',
            f"[sources]\nshop = postgresql://me:{SECRET}@db/shop",
            f'redis = "redis://:{SECRET}@host"\nredis = "redis://:{SECRET}@host"',
        ],
    )
    def test_in_an_error(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(SettingsError) as raised:
            read({}, write(tmp_path, text))
        error: BaseException | None = raised.value
        assert SECRET not in str(error)
        # A traceback shows causes; what is suppressed it doesn't.
        assert raised.value.__suppress_context__

    def test_in_an_error_of_the_environment(self) -> None:
        with pytest.raises(SettingsError) as raised:
            read({"COHORT_REDIS": f"http://:{SECRET}@host"})
        assert SECRET not in str(raised.value)

    def test_of_a_source_in_a_representation(self, tmp_path: Path) -> None:
        path = write(tmp_path, f'[sources]\nshop = "postgresql://me:{SECRET}@db/shop"\n')
        settings = read({}, path)
        assert SECRET in settings.sources["shop"]
        assert SECRET not in repr(settings)

    def test_of_redis_in_a_representation(self) -> None:
        settings = read({"COHORT_REDIS": f"redis://:{SECRET}@host:1/0"})
        assert SECRET not in repr(settings)


class TestSizesAndSpans:
    @pytest.mark.parametrize(
        ("text", "size"),
        [("0", 0), (7, 7), ("7 B", 7), ("1KiB", 1024), (" 1.5 MiB ", 3 << 19), ("2 TiB", 2 << 40)],
    )
    def test_sizes(self, text: object, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "GiB", "1 gib", "1e3", "0x10", "1 GiB 2", None, True])
    def test_no_sizes(self, text: object) -> None:
        with pytest.raises(ValueError, match="a size such as"):
            parse_size(text)

    @pytest.mark.parametrize(
        ("text", "span"),
        [("1", 1), (2.5, 2.5), ("250ms", 0.25), ("90 s", 90), ("15m", 900), ("2h", 7200)],
    )
    def test_spans(self, text: object, span: float) -> None:
        assert parse_span(text) == span

    @pytest.mark.parametrize("text", ["", "0", "0.0h", "h", "-1s", "1 week", "inf", None, True])
    def test_no_spans(self, text: object) -> None:
        with pytest.raises(ValueError, match="a time span above zero"):
            parse_span(text)

    def test_a_size_beyond_all_measure(self) -> None:
        with pytest.raises(SettingsError, match="COHORT_MEMORY"):
            read({"COHORT_MEMORY": "9" * 400})


class TestWhatANodeCanLiveWith:
    def test_a_lease_too_short_to_be_renewed(self) -> None:
        with pytest.raises(SettingsError, match=r"COHORT_LEASE: expected .* at least 1s"):
            read({"COHORT_LEASE": "100ms"})

    @pytest.mark.parametrize(("host", "node"), [("my_host.example", "my-host"), ("-", "node")])
    def test_a_host_name_that_is_no_node_name(
        self, host: str, node: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("socket.gethostname", lambda: host)
        assert read({}).node == node
