"""What is quick enough for most tests of the gate."""

import pytest

from pipeline.decide import power


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest gain rest on few draws, which takes a tenth of the time: most tests do not look at it."""
    monkeypatch.setattr(power, "DRAWS", 30)
