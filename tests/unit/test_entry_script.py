"""The entry script: what it sets up, when it does so again, and what it says when it can't.

All but one test run it with a stand-in for Python's venv and pip, so that each takes a blink.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.processes import wait_until

PROJECT = Path(__file__).resolve().parents[2]

# The module behind `./cohort nodes` in these tests: it shows what reached it.
CLI = """
import os, sys
if "fail" in sys.argv: sys.exit(7)
if "hang" in sys.argv:
    print("hanging", flush=True)
    import signal; signal.pause()
print("cwd", os.getcwd())
print("arguments", sys.argv[1:])
print("home", os.environ.get("HOME"))
print("path", sys.path[0])
"""

# Python as the script sees it: real, but for venv and pip, which are quick and do as told.
PYTHON = """#!/bin/sh
case "$*" in
    *"print("*version_info*) [ ! -e "$STUB/version" ] || { cat "$STUB/version"; exit 0; } ;;
    *"< (3, 11)"*) [ ! -e "$STUB/version" ] || exit 1 ;;
    "-c import venv, ensurepip") [ ! -e "$STUB/no-venv" ] || exit 1 ;;
    "-m venv --clear "*)
        echo venv >>"$STUB/calls"
        rm -rf "$4"
        mkdir -p "$4/bin" "$4/site"
        [ ! -e "$STUB/venv-gate" ] || cat "$STUB/venv-gate"
        : >"$4/pyvenv.cfg"
        cp "$STUB/python" "$4/bin/python"
        exit 0 ;;
    "-m pip install "*)
        echo pip >>"$STUB/calls"
        [ ! -e "$STUB/pip-says" ] || { cat "$STUB/pip-says"; exit 1; }
        [ ! -e "$STUB/gate" ] || cat "$STUB/gate"
        exit 0 ;;
    *purelib*) echo "${0%/bin/python}/site"; exit 0 ;;
esac
exec "@PYTHON@" "$@"
"""


class Copy:
    """A copy of the entry script in a project of its own, with the stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project with spaces"
        self.stub = folder / "stub"
        self.stub.mkdir(parents=True)
        (self.root / "deploy").mkdir(parents=True)
        (self.root / "deploy" / "__init__.py").touch()
        (self.root / "deploy" / "cli.py").write_text(CLI)
        (self.root / "requirements.txt").write_text("one==1.0\n")
        shutil.copy(PROJECT / "cohort", self.root)
        python = self.stub / "python"
        python.write_text(PYTHON.replace("@PYTHON@", sys.executable))
        python.chmod(0o755)
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "STUB": str(self.stub),
            "COHORT_PYTHON": str(python),
        }

    @property
    def script(self) -> Path:
        return self.root / "cohort"

    @property
    def calls(self) -> list[str]:
        """What was asked of venv and pip since the last look."""
        log = self.stub / "calls"
        calls = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls

    def start(
        self, *words: str, script: Path | None = None, cwd: Path | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [script or self.script, *words],
            cwd=cwd,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, *words: str, script: Path | None = None, cwd: Path | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, script=script, cwd=cwd, **environ)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_without_a_command_it_shows_usage_and_sets_nothing_up(copy: Copy) -> None:
    for words in ([], ["--help"], ["-h"]):
        shown = copy.run(*words)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith("Usage: ./cohort COMMAND")
    assert copy.calls == []


def test_an_unknown_command_is_named_and_sets_nothing_up(copy: Copy) -> None:
    refused = copy.run("frobnicate")
    assert refused.returncode == 2
    assert "there is no command 'frobnicate'" in refused.stderr
    assert copy.calls == []


def test_the_first_use_sets_up_and_the_next_adds_nothing(copy: Copy) -> None:
    first = copy.run("nodes")
    assert first.returncode == 0, first.stderr
    assert "setting up" in first.stderr
    assert "1 packages" in first.stderr
    assert copy.calls == ["venv", "pip"]
    second = copy.run("nodes")
    assert (second.returncode, second.stderr, copy.calls) == (0, "", [])


def test_changed_requirements_are_installed_into_the_same_environment(copy: Copy) -> None:
    copy.run("nodes")
    assert copy.calls == ["venv", "pip"]
    (copy.root / "requirements.txt").write_text("one==2.0\n")
    assert "requirements.txt has changed" in copy.run("nodes").stderr
    assert copy.calls == ["pip"]
    assert copy.run("nodes").stderr == ""


def test_it_works_through_a_link_from_any_folder(copy: Copy, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    (elsewhere / "deploy").mkdir(parents=True)
    # Nothing in the caller's folder stands in for the project's modules.
    (elsewhere / "deploy" / "cli.py").write_text("raise SystemExit('the wrong module')")
    (elsewhere / "inner").symlink_to("../a project with spaces/cohort")
    (elsewhere / "link").symlink_to("inner")
    ran = copy.run("nodes", "two words", "", "*", script=elsewhere / "link", cwd=elsewhere)
    assert ran.returncode == 0, ran.stderr
    assert f"cwd {elsewhere}" in ran.stdout
    assert "arguments ['nodes', 'two words', '', '*']" in ran.stdout
    assert f"path {copy.root}" in ran.stdout
    assert (copy.root / ".venv").is_dir()


def test_it_works_from_the_path_and_for_a_relative_environment(copy: Copy, tmp_path: Path) -> None:
    path = f"{copy.root}:{os.environ['PATH']}"
    ran = copy.run("nodes", script=Path("cohort"), cwd=tmp_path, PATH=path, COHORT_VENV="my venv")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "my venv" / "cohort-home").is_file()
    assert not (copy.root / ".venv").exists()


def test_exit_codes_and_signals_are_the_commands_own(copy: Copy) -> None:
    copy.run("nodes")
    assert copy.run("nodes", "fail").returncode == 7
    hanging = copy.start("nodes", "hang")
    assert hanging.stdout is not None
    assert hanging.stdout.readline() == "hanging\n"
    hanging.send_signal(signal.SIGTERM)
    hanging.communicate(timeout=30)
    assert hanging.returncode == -signal.SIGTERM


def test_an_empty_home_is_no_home(copy: Copy) -> None:
    assert "home None" in copy.run("nodes", HOME="").stdout


def test_an_old_python_is_named_with_its_version(copy: Copy) -> None:
    (copy.stub / "version").write_text("3.9.2\n")
    refused = copy.run("nodes")
    assert refused.returncode == 1
    assert "Python 3.11 or later is needed" in refused.stderr
    assert f"{copy.stub}/python is 3.9.2" in refused.stderr
    assert copy.calls == []


def test_every_usual_name_is_tried_before_giving_up(copy: Copy) -> None:
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        stand_in = copy.stub / name
        stand_in.write_text("#!/bin/sh\nexit 127\n")
        stand_in.chmod(0o755)
    path = f"{copy.stub}:{os.environ['PATH']}"
    refused = copy.run("nodes", PATH=path, COHORT_PYTHON="")
    assert refused.returncode == 1
    assert "there is none here as python3.13 python3.12 python3.11 python3" in refused.stderr
    (copy.stub / "python3.12").unlink()
    (copy.stub / "python3.12").symlink_to("python")
    assert copy.run("nodes", PATH=path, COHORT_PYTHON="").returncode == 0


def test_an_absent_venv_module_is_told_with_the_remedy(copy: Copy) -> None:
    (copy.stub / "no-venv").touch()
    refused = copy.run("nodes")
    assert refused.returncode == 1
    assert "apt install python3-venv" in refused.stderr
    assert copy.calls == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("NewConnectionError: Temporary failure in name resolution", "can't be reached"),
    ],
)
def test_a_failed_installation_says_why_and_is_tried_again(
    copy: Copy, said: str, told: str
) -> None:
    (copy.stub / "pip-says").write_text(f"Collecting one\n{said}\n")
    for _ in range(2):
        failed = copy.run("nodes")
        assert failed.returncode == 1
        assert told in failed.stderr
        assert said in failed.stderr
        assert copy.calls == ["venv", "pip"]
    assert said in (copy.root / ".venv.log").read_text()
    (copy.stub / "pip-says").unlink()
    assert copy.run("nodes").returncode == 0


@pytest.mark.parametrize(("step", "gate"), [("venv", "venv-gate"), ("pip", "gate")])
def test_a_killed_set_up_is_made_anew(copy: Copy, step: str, gate: str) -> None:
    kill_at(copy, step, gate)
    again = copy.run("nodes")
    assert again.returncode == 0, again.stderr
    assert "setting up" in again.stderr
    assert copy.calls == ["venv", "pip"]


def test_a_killed_change_is_made_anew_also_when_it_is_taken_back(copy: Copy) -> None:
    assert copy.run("nodes").returncode == 0
    before = (copy.root / "requirements.txt").read_text()
    (copy.root / "requirements.txt").write_text("one==2.0\n")
    kill_at(copy, "pip", "gate")
    (copy.root / "requirements.txt").write_text(before)
    assert copy.run("nodes").returncode == 0
    assert copy.calls == ["venv", "pip"]


def kill_at(copy: Copy, step: str, gate: str) -> None:
    """Start a set-up and kill it, and all that it has started, in the middle of a step."""
    log = copy.stub / "calls"
    log.unlink(missing_ok=True)
    os.mkfifo(copy.stub / gate)
    killed = copy.start("nodes")
    wait_until(lambda: log.exists() and step in log.read_text())
    wait_until(lambda: step == "pip" or (copy.root / ".venv" / "site").exists())
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=30)
    (copy.stub / gate).unlink()
    log.unlink()


def test_of_two_first_uses_at_once_one_sets_up_and_one_waits(copy: Copy) -> None:
    gate = copy.stub / "gate"
    os.mkfifo(gate)
    first = copy.start("nodes")
    wait_until(
        lambda: (copy.stub / "calls").exists() and "pip" in (copy.stub / "calls").read_text()
    )
    second = copy.start("nodes")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    gate.write_text("")
    for process in (first, second):
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "arguments" in out
    assert copy.calls == ["venv", "pip"]


def test_a_moved_project_is_set_up_anew(copy: Copy) -> None:
    copy.run("nodes")
    assert copy.calls == ["venv", "pip"]
    copy.root = copy.root.rename(copy.root.with_name("moved"))
    moved = copy.run("nodes")
    assert moved.returncode == 0, moved.stderr
    assert f"path {copy.root}" in moved.stdout
    assert copy.calls == ["venv", "pip"]


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        ([], ["-n", "3", "--dist", "loadfile"]),
        (["--long", "-x"], ["-n", "3", "--dist", "loadfile", "-m", "not vm", "-x"]),
        (["--vm", "-x"], ["-m", "vm", "tests/vm", "-x"]),
        (["tests/unit", "-k", "a or b"], ["tests/unit", "-k", "a or b"]),
        (["-n0"], ["-n0"]),
    ],
)
def test_the_tests_run_in_the_project_three_at_a_time(
    copy: Copy, tmp_path: Path, words: list[str], passed: list[str]
) -> None:
    (copy.root / "pytest.py").write_text("import os, sys; print(os.getcwd(), sys.argv[1:])")
    ran = copy.run("test", *words, cwd=tmp_path)
    assert ran.stdout == f"{copy.root} {passed}\n"


@pytest.mark.parametrize("name", ["thesis", "pyvenv.cfg"])
def test_a_folder_that_the_script_did_not_make_is_left_alone(
    copy: Copy, tmp_path: Path, name: str
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / name).write_text("forty years")
    refused = copy.run("nodes", COHORT_VENV=str(precious))
    assert refused.returncode == 1
    assert f"{precious} is in the way" in refused.stderr
    assert (precious / name).read_text() == "forty years"
    assert copy.calls == []


def test_check_runs_every_check_and_fails_if_one_does(copy: Copy) -> None:
    copy.run("nodes")
    for tool in ("ruff", "mypy", "lint-imports"):
        stand_in = copy.root / ".venv" / "bin" / tool
        stand_in.write_text(f'#!/bin/sh\necho {tool} "$@"\ntest ! -e "$STUB/{tool} fails"\n')
        stand_in.chmod(0o755)
    passed = copy.run("check")
    assert passed.returncode == 0
    ran = [line for line in passed.stdout.splitlines() if not line.startswith("==")]
    assert ran == ["ruff check .", "ruff format --check .", "mypy", "lint-imports"]
    for tool in ("ruff", "mypy", "lint-imports"):
        mark = copy.stub / f"{tool} fails"
        mark.touch()
        failed = copy.run("check")
        assert failed.returncode == 1
        assert tool in failed.stderr
        assert failed.stdout == passed.stdout
        mark.unlink()


def test_a_real_set_up_installs_and_celery_finds_the_project_from_anywhere(
    copy: Copy, tmp_path: Path
) -> None:
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    (copy.root / "requirements.txt").write_text(f"{wheel.as_uri()}\n")
    (copy.root / "tasks.py").write_text("")
    first = copy.run("nodes", COHORT_PYTHON=sys.executable, PIP_NO_INDEX="1")
    assert first.returncode == 0, first.stderr
    python = copy.root / ".venv" / "bin" / "python"
    imported = subprocess.run(
        [python, "-c", "import tiny, tasks, deploy"], cwd=tmp_path, env=copy.environ
    )
    assert imported.returncode == 0
    before = time.monotonic()
    assert copy.run("nodes").stderr == ""
    assert time.monotonic() - before < 1
