"""With which code does a training process end, and what does a job script make of it?"""

from __future__ import annotations

FINISHED = 0
FAILED = 1  # an error that was told; the same command would fail again
MISTAKE = 2  # a command line that cannot be right, as argparse has it
DIVERGED = 65  # as EX_DATAERR: the guard has rewound as often as it may; the evidence is in OUT
PREEMPTED = 75  # as EX_TEMPFAIL: a signal asked for it, or checkpoints' or data's place fails; start it again
LOST = 76  # as EX_PROTOCOL: a rank died or hung; the same command goes on from the last checkpoint
INTERRUPTED = 130  # by Ctrl-C


class Preempted(Exception):
    """SIGTERM or SIGUSR1 reached a rank, and all of them have stopped at the same step."""


class Postponed(OSError):
    """The place of the checkpoints, which has served this run before, or of the data fails: the same command may do
    later."""


class Diverged(Exception):
    """Refused steps did not end, however often the run went back."""


class RankLost(Exception):
    """A rank died or hung. Empty on the ranks that are not to tell it."""


ENDS: dict[type[Exception], int] = {
    Preempted: PREEMPTED,
    Postponed: PREEMPTED,
    Diverged: DIVERGED,
    RankLost: LOST,
}
