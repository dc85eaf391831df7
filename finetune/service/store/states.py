"""The kinds of jobs, their states, and which state may follow which.

::

    queued -> running -> succeeded
                |   \\-> failed
                |    \\-> retrying -> running ...     after a crash; the run goes on from its last checkpoint
                \\-> cancelling -> cancelled

What a job does within ``running`` (reading, training, exporting) is its progress, and no state.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Kind(StrEnum):
    """What a job does: train, or check an uploaded data set."""

    RUN = "run"
    CHECK = "check"


class State(StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended; ``resume`` may queue it again."""
        return self in TERMINAL


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
WAITING = frozenset({State.QUEUED, State.RETRYING})
"""States from which a job is started."""
ACTIVE = frozenset({State.RUNNING, State.CANCELLING})
"""States in which a job has a process."""
RESUMABLE = frozenset({State.FAILED, State.CANCELLED})

TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.RETRYING, State.CANCELLING}),
    State.RETRYING: frozenset({State.RUNNING, State.CANCELLED}),
    # A job may end by itself before it hears that it is to be cancelled. One whose server was lost is
    # cancelled when that is noticed: nothing is left to stop.
    State.CANCELLING: frozenset({State.CANCELLED, State.SUCCEEDED, State.FAILED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}
"""The states that may follow each one."""


def sources_of(state: State) -> frozenset[State]:
    """Return the states that this one may follow."""
    return frozenset(before for before, after in TRANSITIONS.items() if state in after)
