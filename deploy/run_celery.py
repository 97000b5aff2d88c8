"""`celery -A tasks ...`, with our `tasks` also where the caller's folder has a tasks.py.

The caller's folder comes last on the path: COHORT_JOBS may name modules in it, and nothing in
it stands in for a module of ours or of a library.
"""

from __future__ import annotations

import os
import sys

from errors import CohortError


def main() -> None:
    """Hand the arguments to Celery, under its own name."""
    sys.path.append(os.getcwd())
    try:
        import tasks  # noqa: F401  # before Celery looks for it in the caller's folder
    except CohortError as error:
        sys.exit(f"cohort: {error}")
    from celery.__main__ import main as celery

    sys.argv[1:1] = ["-A", "tasks"]
    celery()


if __name__ == "__main__":
    main()
