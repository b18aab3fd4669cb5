"""How much of the chaos is tried: a seeded sample, or all of it with DROPFORGE_CHAOS=whole (`make chaos`)."""

import os
import random

import pytest


@pytest.fixture(scope="session")
def whole() -> bool:
    """Whether everything is tried."""
    return os.environ.get("DROPFORGE_CHAOS") == "whole"


@pytest.fixture(scope="session")
def seed() -> int:
    """What chooses the sample: DROPFORGE_CHAOS_SEED, or another one each time."""
    return int(os.environ.get("DROPFORGE_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
