"""Cohort's errors: one small tree whose branches tell the caller what to do.

`Refused`     the caller asked for something that can't be: change the request.
`TryLater`    nothing is wrong with the request; what it needs is away or full.
`StandAside`  another run or node has taken over: stop, touch nothing.
`Damaged`     something on disk isn't what was written there: a person must look.
"""


class CohortError(Exception):
    """The root of everything that Cohort raises on purpose."""


class Refused(CohortError):
    """The request itself is wrong. Trying it again unchanged can't help."""


class SettingsError(Refused):
    """A setting is unknown or malformed; the message names it and what it accepts."""


class InvalidKey(Refused):
    """A job key that can't name a directory."""


class SnapshotExpired(Refused):
    """A version whose files garbage collection has removed: it is older than the retention."""


class OverQuota(Refused):
    """A directory would hold more bytes than it may; the last version is untouched."""


class TryLater(CohortError):
    """Something that the request needs is away or full; a later try may succeed."""


class Unavailable(TryLater):
    """A database, an object store, the broker or the shared folder doesn't answer."""


class BrokerFull(TryLater):
    """Redis is at its memory limit and takes no new jobs."""


class StandAside(CohortError):
    """Somebody else is in charge now; this process must stop what it was doing."""


class Fenced(StandAside):
    """Another run committed on the version that this run started from."""


class Expelled(StandAside):
    """This node's lease ended and its claims went back to the queues."""


class Damaged(CohortError):
    """A record, manifest or stored file isn't what was written; nothing is repaired by guessing."""


class WrongMount(Refused):
    """The shared folder is missing, read-only, full or not the one that the other nodes use."""


class DeadLettered(CohortError):
    """A job was delivered too often without an end: its node or process died each time."""


class MemoryExceeded(CohortError):
    """A job took more memory than its definition allows, and was ended. It isn't tried again."""
