"""Everything that the demo needs, in a folder of its own: three nodes, Redis, S3, a database.

It shares nothing with the settings, credentials and fleets of the user who starts it, and nothing
of it outlives the process that holds it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from broker import server
from deploy.demonstration.database import Database
from deploy.fleet import START_TIMEOUT, Fleet, free_port
from deploy.parts import Part
from errors import Refused

NODES = 3
SOURCE = "ny"
BUCKET = "cohort-demo"
TO = f"s3://{BUCKET}/lake"
LEASE = "3s"
_OURS = ("COHORT_VENV", "COHORT_PYTHON")


class World:
    """The parts of the demo. `start` them, and `end` them whatever happens."""

    def __init__(self, shared: Path | None, *, flower: bool = False) -> None:
        # Named here and made later, so that `remove` always knows what to remove.
        name = f"cohort-demo-{secrets.token_hex(4)}"
        self.home = Path(tempfile.gettempdir()).absolute() / name
        self.root = shared.absolute() / name if shared is not None else self.home / "shared"
        self.s3_url = f"http://127.0.0.1:{free_port()}"
        self._s3: Part | None = None
        self._s3_client: Any = None
        self._isolate(os.environ)
        self.fleet = Fleet(self.home, nodes=NODES, root=self.root, cpus=(1,), flower=flower)
        self.redis = server.connect(self.fleet.redis_url)

    def _isolate(self, environ: MutableMapping[str, str]) -> None:
        """Settings and credentials of the demo's own, for this process and all that it starts."""
        for name in list(environ):
            if name.startswith(("AWS_", "COHORT_")) and name not in _OURS:
                del environ[name]
        self.settings = self.home / "cohort.toml"
        direct = [environ.get("NO_PROXY") or environ.get("no_proxy") or "", "127.0.0.1"]
        environ["NO_PROXY"] = environ["no_proxy"] = ",".join(filter(None, direct))
        environ.update(
            COHORT_SETTINGS=str(self.settings),
            COHORT_LEASE=LEASE,
            AWS_ENDPOINT_URL=self.s3_url,
            AWS_ACCESS_KEY_ID="demo",
            AWS_SECRET_ACCESS_KEY="demo",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
            AWS_CONFIG_FILE=os.devnull,
            AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        )

    def start(self) -> None:
        """Start every part, and make the bucket and the database without its rows."""
        for folder in (self.home, self.root):
            try:
                folder.mkdir(mode=0o700)
            except OSError as error:
                raise Refused(f"{folder.parent}: {error.strerror}") from None
        host, _, port = self.s3_url.removeprefix("http://").partition(":")
        self._s3 = Part(
            "s3",
            [sys.executable, "-P", "-m", "moto.server", "-H", host, "-p", port],
            # Large objects go through temporary files: into the folder that is removed.
            {**os.environ, "TMPDIR": str(self.home)},
            self.home / "logs" / "s3.log",
        )
        self.database = Database(self.home / "flights.db")
        # A string of TOML and one of JSON are written alike.
        self.settings.write_text(f'[sources]\n{SOURCE} = "{self.database.url}"\n', "utf-8")
        self.fleet.start()
        # The producer's half of the fleet's settings, before `tasks` is first imported.
        os.environ.update(
            {
                name: value
                for name, value in self.fleet.environ.items()
                if name.startswith("COHORT_")
            }
        )
        self._s3.wait_until(self._make_bucket, START_TIMEOUT, "answering")

    def _make_bucket(self) -> bool:
        import boto3.session
        import botocore.config
        from botocore.exceptions import BotoCoreError

        if self._s3_client is None:
            quickly = botocore.config.Config(connect_timeout=2, retries={"max_attempts": 0})
            self._s3_client = boto3.session.Session().client("s3", config=quickly)
        try:
            self._s3_client.create_bucket(Bucket=BUCKET)
        except BotoCoreError:
            return False
        return True

    def check(self) -> None:
        """Raise if a part has ended that should be running."""
        parts = [*self.fleet.parts, *filter(None, [self._s3])]
        for part in parts:
            if not part.is_running and part.name not in self.dead:
                part.wait_until(lambda: False, 0, "the end of the demo")

    dead: frozenset[str] = frozenset()
    """Nodes that the story has killed and not started again."""

    @property
    def has_logs(self) -> bool:
        """Whether anything was started that may have said why it failed."""
        return (self.home / "logs").exists()

    def end(self) -> None:
        """End every part at once."""
        self.fleet.kill()
        if self._s3 is not None:
            self._s3.kill()

    def remove(self) -> None:
        """Remove all that was written."""
        for folder in {self.home, self.root}:
            shutil.rmtree(folder, ignore_errors=True)
