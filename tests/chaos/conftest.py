"""How much of the chaos is tried: a seeded sample, or all of it with DROPFORGE_CHAOS=whole (`make chaos`)."""

import os

import pytest


@pytest.fixture(scope="session")
def whole() -> bool:
    """Whether everything is tried."""
    return os.environ.get("DROPFORGE_CHAOS") == "whole"


@pytest.fixture(scope="session")
def seed(testrun_uid: str) -> int:
    """What chooses the sample in all of pytest's processes: DROPFORGE_CHAOS_SEED, or another one each time."""
    return int(os.environ.get("DROPFORGE_CHAOS_SEED") or int(testrun_uid, 16) % 10**6)
