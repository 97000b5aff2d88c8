"""The commands as a user types them: real processes, their output in bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping


class Terminal:
    """Runs commands of the entry script in one environment."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def start(self, *words: str, **environ: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.cli", *words],
            env={**self._environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: str, **environ: str) -> tuple[int, bytes, str]:
        process = self.start(*words, **environ)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, out, err.decode()
