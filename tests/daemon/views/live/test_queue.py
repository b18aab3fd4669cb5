"""What a daemon says that it leaves for its next start."""

from typing import Any

from daemon.queue import run_queue
from daemon.queue.scheduling.pausing import pause
from daemon.state.events import Word
from daemon.views.live.queue import left_words
from daemon.views.overview import Overview
from tests.daemon.conftest import lines


def test_what_is_left_is_told_by_the_run_that_goes_first(lived_in: Any) -> None:
    overview = Overview(lived_in.settings.state_folder)
    assert left_words(overview) == "run 3 goes on in train without it", "a worker of its own does that"
    (claim,) = run_queue.rescue(lived_in.engine, lived_in.tick())
    run_queue.interrupt(lived_in.engine, claim, lived_in.tick())
    assert left_words(overview) == "run 3 was stopped in train and goes on at the next start"
    lived_in.take("fourth.jsonl", lines("e"))
    lived_in.take("case.jsonl", lines("f"), track="support")
    assert left_words(overview) == "run 3 was stopped in train and goes on at the next start; 2 more wait"
    pause(lived_in.engine, "default", Word("a fair", lived_in.tick(), "ana"))
    assert left_words(overview) == "run 5 begins at the next start", "what is paused goes on at none"
    pause(lived_in.engine, "support", Word("a fair", lived_in.tick(), "ana"))
    assert left_words(overview) == "no run waits"
