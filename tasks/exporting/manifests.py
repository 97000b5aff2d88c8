"""Which objects count, and which may go.

A manifest names the objects of one committed run. It is in the commit record first and appears
under `_manifest/` after the commit; what no manifest names doesn't exist for a reader.

A run that started from version b may remove only folders `v<k>-...` with k <= b that no manifest
names: version k is decided, so whoever wrote there can't commit any more. What is under b + 1
and above may belong to a run that is alive, and may commit before this one.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from errors import Damaged, Refused
from tasks.exporting.bucket import Bucket
from tasks.exporting.request import Request, table_folder

FORMAT = 1


def folder_of(request: Request, version: int, task_id: str, claim_id: str) -> str:
    """Where a run that is to become `version` puts its objects."""
    return f"{request.prefix}v{version:08d}-{_safe(task_id)}-{_safe(claim_id)}/"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def manifest_key(prefix: str, version: int) -> str:
    return f"{prefix}_manifest/v{version:08d}.json"


def published_versions(bucket: Bucket, prefix: str) -> list[int]:
    """The versions that have a manifest, ascending."""
    found = (
        re.fullmatch(r"v(\d{8,})\.json", key.removeprefix(f"{prefix}_manifest/"))
        for key in bucket.keys(f"{prefix}_manifest/")
    )
    return sorted(int(match[1]) for match in found if match)


def read_manifest(bucket: Bucket, prefix: str, version: int) -> dict[str, Any]:
    key = manifest_key(prefix, version)
    manifest = bucket.get_json(key)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Damaged(f"s3://{bucket.name}/{key} isn't a manifest of format {FORMAT}")
    return manifest


def publish(manifest: Mapping[str, Any]) -> None:
    """Write the manifest where readers look, unless it is there already."""
    name, prefix = table_folder(manifest["to"], manifest["table"])
    bucket = Bucket(name)
    key = manifest_key(prefix, manifest["version"])
    body = json.dumps(manifest, indent=1, sort_keys=True).encode()
    if not bucket.exists(key):
        bucket.put(key, body)
    elif bucket.get(key) != body:
        raise Refused(
            f"s3://{name}/{key} is the manifest of another export: two exports must not share "
            "a prefix and a table name"
        )


def check_lineage(
    bucket: Bucket, request: Request, version: int, last: Mapping[str, Any] | None
) -> None:
    """Refuse to work where another export's manifests are, or those of a later run than ours."""
    versions = published_versions(bucket, request.prefix)
    known = 0 if last is None else int(last["version"])
    if not versions or versions[-1] <= known:
        return
    where = f"{request.where}/_manifest/v{versions[-1]:08d}.json"
    if last is None:
        raise Refused(
            f"{where} exists, but this job's directory (version {version}) has no export in it: "
            "another export or an earlier job directory wrote there. Choose another to="
        )
    raise Refused(
        f"{where} is newer than the last export in this job's directory (version {known}): a later "
        "run, or another job with the same to= and table, has published"
    )


def clean_up(bucket: Bucket, request: Request, version: int) -> list[str]:
    """Remove what runs left that can't commit any more; returns the keys. See above for which."""
    decided = re.compile(re.escape(request.prefix) + r"v(\d{8,})-[^/]+/")
    folders: dict[int, list[str]] = defaultdict(list)
    for folder in bucket.folders(f"{request.prefix}v"):
        match = decided.fullmatch(folder)
        if match and int(match[1]) <= version:
            folders[int(match[1])].append(folder)
    published = set(published_versions(bucket, request.prefix))
    doomed: list[str] = []
    for number, found in folders.items():
        named = set()
        if number in published:
            if len(found) == 1:
                continue  # the manifest's own: saves reading every manifest on every run
            named = {
                entry["key"] for entry in read_manifest(bucket, request.prefix, number)["objects"]
            }
        doomed += [key for folder in found for key in bucket.keys(folder) if key not in named]
    bucket.delete(doomed)
    for key, upload_id in list(bucket.uploads(f"{request.prefix}v")):
        match = decided.match(key)
        if match and int(match[1]) <= version:
            bucket.abort(key, upload_id)
            doomed.append(key)
    return doomed
