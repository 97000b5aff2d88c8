"""What went wrong with a database or with S3, as one of Cohort's errors, and patience with it.

Drivers put connection strings into their messages. Nothing leaves this module before every
secret of the source's URL is gone from it, and no error keeps the driver's own as its cause.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import Logger
from typing import NoReturn, TypeVar
from urllib.parse import quote, quote_plus

import botocore.exceptions
import sqlalchemy as sa

from errors import CohortError, Refused, StandAside, Unavailable

T = TypeVar("T")

# Of PostgreSQL's SQLSTATE classes, those that the request itself must change for.
_REQUEST_CLASSES = ("0A", "22", "25", "28", "3D", "3F", "42")
_HOPELESS = re.compile(
    r"authentication failed|no pg_hba\.conf entry|no password supplied|does not exist|"
    r"no such (table|column|function)|syntax error|not a database|readonly database|"
    r"one statement at a time|invalid (dsn|connection option|URI)|permission denied for|"
    r"could not decode to utf-8",
    re.IGNORECASE,
)


class Secrets:
    """The secrets of one database URL; removes them from texts."""

    def __init__(self, url: sa.URL) -> None:
        plain = [str(url.password)] if url.password else []
        for name, value in url.query.items():
            if re.search(r"pass|secret|token|key", name, re.IGNORECASE):
                plain += [value] if isinstance(value, str) else list(value)
        forms = {form for word in plain for form in (word, quote(word, safe=""), quote_plus(word))}
        # Longest first, so that a short secret inside a longer one leaves nothing behind.
        self._words = sorted((form for form in forms if form), key=len, reverse=True)

    def hidden(self, text: str) -> str:
        for word in self._words:
            text = text.replace(word, "***")
        return text


@contextmanager
def database_errors(source: str, secrets: Secrets) -> Iterator[None]:
    """Turns what a driver raises into `Refused` or `Unavailable`, naming the source."""
    try:
        yield
    except (CohortError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        if not _is_from_a_driver(error):
            raise
        _raise_alone(_translated(source, error, secrets))


def _raise_alone(error: CohortError) -> NoReturn:
    """Raise it without the driver's error, which may hold a secret, as its cause or context."""
    try:
        raise error from None
    finally:
        error.__context__ = None


def _is_from_a_driver(error: Exception) -> bool:
    if isinstance(error, sa.exc.SQLAlchemyError):
        return True
    modules = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
    known = {"sqlite3", "psycopg", "adbc_driver_manager", "pyarrow"}
    return bool(modules & known) or isinstance(error, (OSError, ImportError))


def _translated(source: str, error: Exception, secrets: Secrets) -> CohortError:
    if isinstance(error, sa.exc.DBAPIError) and isinstance(error.orig, Exception):
        error = error.orig
    reason = secrets.hidden(first_lines(str(error)))
    state = getattr(error, "sqlstate", None)
    if isinstance(error, (ImportError, sa.exc.NoSuchModuleError)):
        return Refused(f"source {source!r}: its database driver isn't installed: {reason}")
    if isinstance(state, str) and len(state) == 5:
        refused = state.startswith(_REQUEST_CLASSES)
    else:
        refused = bool(_HOPELESS.search(reason)) or isinstance(error, sa.exc.ArgumentError)
    if refused:
        return Refused(f"source {source!r}: {reason}")
    return Unavailable(f"source {source!r}: the database doesn't answer as it should: {reason}")


def first_lines(text: str) -> str:
    """A driver's message without the statement and the hints that follow it."""
    text = re.split(r"\n\s*(?:LINE \d+:|\[SQL:|Query was:|Is the server|\()|\n\n", text)[0]
    return " ".join(text.split())[:500]


@contextmanager
def s3_errors(what: str) -> Iterator[None]:
    """Turns what boto3 raises into `Refused` or `Unavailable`, saying what was being done."""
    try:
        yield
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError) as error:
        _raise_alone(_translated_s3(what, error))


_S3_REFUSED = {
    "404": "there is no such bucket",
    "NoSuchBucket": "there is no such bucket",
    "403": "access is denied to these credentials",
    "AccessDenied": "access is denied to these credentials",
    "301": "the bucket is in another region than the one configured",
    "PermanentRedirect": "the bucket is in another region than the one configured",
    "InvalidAccessKeyId": "the access key is unknown",
    "SignatureDoesNotMatch": "the secret key doesn't fit the access key",
    "ExpiredToken": "the credentials have expired",
}


def _translated_s3(what: str, error: Exception) -> CohortError:
    if isinstance(error, botocore.exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _S3_REFUSED:
            return Refused(f"{what}: {_S3_REFUSED[code]}")
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        kind = Refused if 400 <= status < 500 and status not in (408, 409, 429) else Unavailable
        return kind(f"{what}: S3 answered {code} ({status})")
    configuration = (
        botocore.exceptions.NoCredentialsError,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.ProfileNotFound,
        botocore.exceptions.NoRegionError,
        botocore.exceptions.ParamValidationError,
    )
    if isinstance(error, configuration):
        return Refused(f"{what}: {first_lines(str(error))}")
    return Unavailable(f"{what}: S3 doesn't answer: {first_lines(str(error))}")


def patiently(
    action: Callable[[], T], patience: float, log: Logger, cancelled: Callable[[], bool]
) -> T:
    """`action()`, again and again while it is `Unavailable`, for about `patience` seconds."""
    end = time.monotonic() + patience
    pause, tries = 0.25, 0
    while True:
        tries += 1
        try:
            return action()
        except Unavailable as error:
            reason = str(error)
        left = end - time.monotonic()
        if left <= 0 or cancelled():
            raise Unavailable(f"{reason} (tried {tries} times in {patience:g} s)")
        log.warning("%s; trying again", reason)
        time.sleep(min(left, pause * random.uniform(0.75, 1.25)))
        pause = min(pause * 2, 10.0)


def stop_if(cancelled: bool) -> None:
    if cancelled:
        raise StandAside("the run was cancelled; nothing was published")
