"""The few S3 operations that an export needs, on any endpoint that boto3 is configured for."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any

import boto3.session
import botocore.config

from errors import CohortError, Damaged, Refused
from tasks.exporting.reasons import s3_errors


@lru_cache(maxsize=2)
def _client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """A client of this process (connections don't survive a fork) and of this environment.

    Making one costs far more than a request: boto3 reads and compiles its models each time.
    """
    del process, environment
    config = botocore.config.Config(connect_timeout=10, read_timeout=60)
    return boto3.session.Session().client("s3", config=config)


class Bucket:
    """One bucket. Errors name it, and never the credentials."""

    def __init__(self, name: str) -> None:
        self.name = name
        with s3_errors(f"s3://{name}"):
            aws = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
            self._client = _client(os.getpid(), aws)

    def check(self) -> None:
        """Raise unless the bucket is there and these credentials reach it."""
        with s3_errors(f"s3://{self.name}"):
            self._client.head_bucket(Bucket=self.name)

    def keys(self, prefix: str) -> Iterator[str]:
        for page in self._pages("list_objects_v2", prefix):
            yield from (entry["Key"] for entry in page.get("Contents", ()))

    def folders(self, prefix: str) -> Iterator[str]:
        """What begins with `prefix`, up to and with the next slash."""
        for page in self._pages("list_objects_v2", prefix, Delimiter="/"):
            yield from (entry["Prefix"] for entry in page.get("CommonPrefixes", ()))

    def uploads(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Key and id of unfinished multipart uploads."""
        for page in self._pages("list_multipart_uploads", prefix):
            yield from ((entry["Key"], entry["UploadId"]) for entry in page.get("Uploads", ()))

    def _pages(self, operation: str, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        with s3_errors(f"s3://{self.name}/{prefix}"):
            pages = self._client.get_paginator(operation).paginate(
                Bucket=self.name, Prefix=prefix, **more
            )
            yield from pages

    def exists(self, key: str) -> bool:
        return next((found for found in self.keys(key) if found == key), None) is not None

    def get(self, key: str) -> bytes:
        with s3_errors(f"s3://{self.name}/{key}"):
            body = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        assert isinstance(body, bytes)
        return body

    def get_json(self, key: str) -> Any:
        try:
            return json.loads(self.get(key))
        except ValueError:
            pass
        raise Damaged(f"s3://{self.name}/{key} isn't JSON")

    def put(self, key: str, body: bytes) -> None:
        with s3_errors(f"s3://{self.name}/{key}"):
            self._client.put_object(Bucket=self.name, Key=key, Body=body)

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            some = [{"Key": key} for key in keys[start : start + 1000]]
            with s3_errors(f"s3://{self.name}"):
                answer = self._client.delete_objects(
                    Bucket=self.name, Delete={"Objects": some, "Quiet": True}
                )
            for error in answer.get("Errors", ()):
                raise Refused(f"s3://{self.name}/{error['Key']}: can't be deleted: {error['Code']}")

    def abort(self, key: str, upload_id: str) -> None:
        ended = suppress(self._client.exceptions.NoSuchUpload)
        with s3_errors(f"s3://{self.name}/{key}"), ended:
            self._client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)

    def open(self, key: str, part_size: int) -> Upload:
        return Upload(self._client, self.name, key, part_size)


class Upload(io.RawIOBase):
    """A file to write into: it becomes an object when it is closed, and never otherwise.

    At most two parts are in memory: one fills up while the other is on its way.
    """

    def __init__(self, client: Any, bucket: str, key: str, part_size: int) -> None:
        self._client = client
        self._target = {"Bucket": bucket, "Key": key}
        self._what = f"s3://{bucket}/{key}"
        self._part_size = part_size
        self._buffer = bytearray()
        self._parts: list[dict[str, Any]] = []
        self._upload_id: str | None = None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._sending: Future[dict[str, Any]] | None = None
        self._hash = hashlib.sha256()
        self._done = self._abandoned = False
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._abandoned:
            return len(view)  # the Parquet writer's farewell
        self._hash.update(view)
        self.bytes += len(view)
        self._buffer += view
        while len(self._buffer) >= self._part_size:
            part = bytes(self._buffer[: self._part_size])
            del self._buffer[: self._part_size]
            self._send(part)
        return len(view)

    def _send(self, part: bytes) -> None:
        with s3_errors(self._what):
            if self._upload_id is None:
                started = self._client.create_multipart_upload(**self._target)
                self._upload_id = str(started["UploadId"])
            self._wait()
            number = len(self._parts) + 1
            self._sending = self._sender.submit(self._send_now, part, number)

    def _send_now(self, part: bytes, number: int) -> dict[str, Any]:
        answer = self._client.upload_part(
            **self._target, UploadId=self._upload_id, PartNumber=number, Body=part
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _wait(self) -> None:
        if self._sending is not None:
            self._parts.append(self._sending.result())
            self._sending = None

    def finish(self) -> None:
        """Make it an object."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        if self._upload_id is None:
            with s3_errors(self._what):
                self._client.put_object(**self._target, Body=rest)
        else:
            if rest:
                self._send(rest)
            with s3_errors(self._what):
                self._wait()
                self._client.complete_multipart_upload(
                    **self._target,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": self._parts},
                )
        self._done = True
        self._sender.shutdown()

    def abandon(self) -> None:
        """Leave no object. What S3 can't be told now, the next run cleans up."""
        self._abandoned = True
        self._buffer.clear()
        self._sender.shutdown(wait=True)
        if self._upload_id is not None and not self._done:
            try:
                with s3_errors(self._what):
                    self._client.abort_multipart_upload(**self._target, UploadId=self._upload_id)
            except CohortError:
                pass
