"""What the demo shows while it works: a bar for each job on a terminal, lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Screen:
    """Lines and, on a terminal, bars. Use it as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._told: dict[str, object] = {}
        self._progress = Progress(
            TextColumn("      {task.description:<18}"),
            BarColumn(30),
            TextColumn("{task.fields[rows]:>18} {task.fields[where]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        # For a reader in a pipe, too, a line is there when it is true.
        self._console.file.flush()

    def show(self, job: str, title: str, where: str, done: float, total: float | None) -> None:
        """How far a job is, and on which node."""
        rows = "" if total is None else f"{done:,.0f} of {total:,.0f}"
        if self._console.is_terminal:
            if job not in self._bars:
                self._bars[job] = self._progress.add_task(title, rows="", where="")
            self._progress.update(
                self._bars[job],
                total=total,
                completed=done,
                rows=rows,
                where=where,
            )
            return
        # Without a terminal a line for each node, and one for each half.
        told = (where, bool(total) and done * 2 >= (total or 0))
        if where and self._told.get(job) != told:
            self._told[job] = told
            self.say(f"      {title:<18} {where:<8} {rows}{' rows' if rows else ''}".rstrip())

    def end(self, job: str) -> None:
        """The job has ended: its bar goes."""
        if job in self._bars:
            self._progress.remove_task(self._bars.pop(job))
