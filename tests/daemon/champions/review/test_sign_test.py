"""The exact sign test and its interval, beside scipy's."""

import pytest
from scipy.stats import binomtest

from daemon.champions.review.blind_review import share_interval, sign_test


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (1, 0), (5, 5), (12, 4), (3, 17), (20, 0), (0, 20), (540, 460)])
def test_p_value_and_interval_are_those_of_scipy(wins: int, losses: int) -> None:
    peer = binomtest(wins, wins + losses)
    assert sign_test(wins, losses) == pytest.approx(peer.pvalue, abs=1e-12)
    assert share_interval(wins, losses) == pytest.approx(tuple(peer.proportion_ci(0.95, "exact")), abs=1e-9)


def test_without_a_decided_pair_nothing_is_known() -> None:
    assert (sign_test(0, 0), share_interval(0, 0)) == (1.0, (0.0, 1.0))
