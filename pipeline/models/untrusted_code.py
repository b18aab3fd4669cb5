"""Limit time and errors of a model folder's own programs: its chat template and its tokenizer."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import CannotTrain

#: Most processor time of one use; usually it takes milliseconds, loading a tokenizer some seconds.
SECONDS = 120.0
#: The signal that kills a process beyond that limit. No exception is possible: such code may never release the
#: interpreter.
ENDED_BY = signal.SIGPROF


@contextmanager
def foreign_code(what: str, hint: str) -> Iterator[None]:
    """
    Raise `CannotTrain`, with a message that begins with `what`, for any error of the block but `MemoryError`.

    `ENDED_BY` kills the whole process if the block takes more than `SECONDS` of processor time.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except (MemoryError, CannotTrain, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' library is no Exception
        raise CannotTrain(f"{what}: {type(error).__name__}: {error}"[:1000], hint) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
