"""Real programs under their supervisor: how they end, and that nothing of them stays."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from errors import CohortError, Refused
from tasks.program import Ended, Program
from tests.processes import marked, wait_until


def run(*argv: str, folder: Path, **environ: str) -> tuple[bytes, Ended]:
    with Program(argv, folder, {**os.environ, **environ}, 5.0) as program:
        output = b"".join(program.output())
        return output, program.ended()


def shell(script: str, folder: Path, **environ: str) -> tuple[bytes, Ended]:
    return run("sh", "-c", script, folder=folder, **environ)


def test_output_status_and_what_it_took(tmp_path: Path) -> None:
    script = "pwd; echo to-err >&2; head -c 30000000 /dev/zero | tail -c 1 >/dev/null; exit 7"
    output, ended = shell(script, tmp_path)
    assert output.decode().splitlines() == [str(tmp_path), "to-err"]
    assert (ended.exit_status, ended.signal, ended.is_success) == (7, None, False)
    assert ended.elapsed > 0
    burnt = run(
        sys.executable,
        "-c",
        "import time; b = bytearray(60 << 20)\nwhile time.process_time() < 0.3: pass",
        folder=tmp_path,
    )[1]
    assert burnt.is_success
    assert burnt.user_seconds + burnt.system_seconds >= 0.3
    assert 60 << 20 < burnt.most_memory < 200 << 20


def test_a_signal_that_ends_it_is_named(tmp_path: Path) -> None:
    ended = shell("kill -SEGV $$", tmp_path)[1]
    assert (ended.exit_status, ended.signal) == (None, "SIGSEGV")


def test_it_reads_nothing_and_ignores_no_signal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # As a pool process has it.
    try:
        output, _ = shell("cat; grep -E 'Sig(Ign|Blk)' /proc/self/status", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    sets = [int(line.split()[1], 16) for line in output.decode().splitlines()]
    # 32 and 33 belong to the C library.
    assert [found & ~(0b11 << 31) for found in sets] == [0, 0]


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("no-such-program", "no-such-program: there is no such program"),
        ("./plain", r"\./plain: it isn't executable"),
        ("./data", r"\./data: it is no program"),
        ("./folder", r"\./folder: it isn't executable"),
    ],
)
def test_what_can_t_be_started_is_named(tmp_path: Path, program: str, told: str) -> None:
    (tmp_path / "plain").touch(0o644)
    (tmp_path / "data").write_bytes(b"\0\1\2\3")
    (tmp_path / "data").chmod(0o755)
    (tmp_path / "folder").mkdir()
    with pytest.raises(Refused, match=told):
        run(program, folder=tmp_path)


def test_too_many_arguments_are_told(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="echo: its arguments and environment are too long"):
        run("echo", "x" * (3 << 20), folder=tmp_path)


def test_arguments_in_any_bytes(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xc3\xa4 two words")
    output, _ = run("printf", "%s", odd, folder=tmp_path)
    assert os.fsdecode(output) == odd


def test_what_it_leaves_behind_is_ended_daemons_too(tmp_path: Path) -> None:
    """One child in its group, one in a session of its own, one that ignores being asked."""
    script = """
        sleep 1000 &
        setsid sleep 1000 &
        (trap '' TERM; touch deaf; while :; do sleep 0.05; done) &
        while [ ! -e deaf ]; do sleep 0.01; done
        echo done
    """
    output, ended = shell(script, tmp_path, TEST_MARK=str(tmp_path))
    assert (output, ended.exit_status) == (b"done\n", 0)
    assert marked(str(tmp_path)) == set()


def test_what_it_leaves_behind_may_tidy_up(tmp_path: Path) -> None:
    script = """
        (trap 'echo tidied; exit' TERM; touch there; while :; do sleep 0.02; done) &
        while [ ! -e there ]; do sleep 0.01; done
    """
    output, ended = shell(script, tmp_path)
    assert ended.is_success
    assert output.endswith(b"tidied\n")


def test_asked_to_end_it_may_tidy_up(tmp_path: Path) -> None:
    script = "trap 'echo tidied; exit 3' TERM; echo ready; while :; do sleep 0.02; done"
    with Program(["sh", "-c", script], tmp_path, os.environ, 30) as program:
        output = b""
        for data in program.output():
            output += data
            if b"ready" in output:
                program.end()
        # The shell may add that its `sleep` was "Terminated".
        assert output.startswith(b"ready\n")
        assert output.endswith(b"tidied\n")
        assert program.ended().exit_status == 3


def test_one_that_won_t_end_is_killed_after_its_grace(tmp_path: Path) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.02; done"
    begun = time.monotonic()
    with Program(["sh", "-c", script], tmp_path, os.environ, 0.5) as program:
        for data in program.output():
            if data:
                program.end()
        assert program.ended().signal == "SIGKILL"
    assert 0.5 <= time.monotonic() - begun < 10


def test_it_dies_with_the_process_that_holds_it(tmp_path: Path) -> None:
    """Also what has a session of its own: a killed attempt must not write on."""
    holder = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from tasks.program import Program
        script = "setsid sleep 1000 & touch ready; trap '' TERM; while :; do sleep 0.05; done"
        with Program(["sh", "-c", script], Path(sys.argv[1]), os.environ, 30) as program:
            for data in program.output(): pass
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        env={
            **os.environ,
            "TEST_MARK": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
    )
    wait_until((tmp_path / "ready").exists)
    process.kill()
    process.wait()
    wait_until(lambda: not marked(str(tmp_path)), 10)


def test_its_tree_stays_locked_until_nothing_of_it_can_write_there(tmp_path: Path) -> None:
    """Else another run could take the tree between the holder's death and the program's."""
    holder = textwrap.dedent("""
        import fcntl, os, sys
        from pathlib import Path
        from tasks.program import Program
        lock = os.open("lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = "ls /proc/self/fd >fds; echo $PPID >new; mv new supervisor; exec sleep 1000"
        with Program(["sh", "-c", script], Path("."), os.environ, 30, [lock]) as program:
            for data in program.output(): pass
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", holder],
        cwd=tmp_path,
        env={
            **os.environ,
            "TEST_MARK": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
    )
    wait_until((tmp_path / "supervisor").exists)
    supervisor = int((tmp_path / "supervisor").read_text())
    # The three of any program, and the folder that ls lists.
    assert (tmp_path / "fds").read_text().split() == ["0", "1", "2", "3"]
    os.kill(supervisor, signal.SIGSTOP)  # As slow as it can be.
    process.kill()
    process.wait()
    with (tmp_path / "lock").open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(supervisor, signal.SIGCONT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert marked(str(tmp_path)) <= {supervisor}


def test_a_killed_supervisor_is_no_success(tmp_path: Path) -> None:
    script = "while [ ! -e go ]; do sleep 0.01; done; kill -9 $PPID; sleep 1000"
    environ = {**os.environ, "TEST_MARK": str(tmp_path)}
    with Program(["sh", "-c", script], tmp_path, environ, 1) as program:
        (tmp_path / "go").touch()
        for _ in program.output():
            pass
        with pytest.raises(CohortError, match="supervisor was killed"):
            program.ended()
    wait_until(lambda: not marked(str(tmp_path)), 10)
