"""`run.log`: a logger whose messages are in the worker's log, and in what `./cohort logs` shows."""

from __future__ import annotations

import logging
import time

from celery.utils.log import get_task_logger

from storage.logs import OutputLog


class RunLog(logging.Logger):
    """The logger of one run, so that runs at the same time don't hear each other's messages.

    The worker's log gets what its own level lets through, the run's output all from INFO on.
    """

    def __init__(self, task_name: str, output: OutputLog) -> None:
        super().__init__(task_name, logging.INFO)
        self.parent = get_task_logger(task_name)
        self._handler = _ToOutput(output)

    def isEnabledFor(self, level: int) -> bool:
        """Whether anybody hears it."""
        assert self.parent is not None
        return level >= self.level or self.parent.isEnabledFor(level)

    def callHandlers(self, record: logging.LogRecord) -> None:
        """Tell both."""
        assert self.parent is not None
        if record.levelno >= self.level:
            self._handler.handle(record)
        if self.parent.isEnabledFor(record.levelno):
            self.parent.callHandlers(record)


_LINE = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
_LINE.converter = time.gmtime


class _ToOutput(logging.Handler):
    def __init__(self, output: OutputLog) -> None:
        super().__init__()
        self._output = output
        self.formatter = _LINE

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record) + "\n"
            self._output.write(text.encode("utf-8", errors="backslashreplace"))
        except Exception:
            self.handleError(record)
