"""What a model folder brings along runs here: its chat template and its tokenizer are programs, of somebody else's."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import CannotTrain

#: Processor time that one use may take; an honest one takes milliseconds, loading a tokenizer some seconds.
SECONDS = 120.0
#: What a process dies of that was at it for longer. It cannot word that itself: such code may never let go of the
#: interpreter.
ENDED_BY = signal.SIGPROF


@contextmanager
def foreign_code(what: str, hint: str) -> Iterator[None]:
    """
    Turn whatever the block raises into `CannotTrain`, whose message begins with `what`; `MemoryError` stays.

    The whole process ends, by `ENDED_BY`, if the block takes more than `SECONDS` of the processor.
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
