"""What the processes of a training share."""

from typing import Any

import pytest
import torch

from pipeline.train.data_parallel.sharing import Place, any_process, seed_step, summed
from pipeline.train.passes.packing import collate, passes


def step_of(count: int) -> dict[str, Any]:
    return collate([{"input_ids": [n, n, n], "labels": [-100, n, n]} for n in range(count)])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_record_of_a_step_is_in_one_process(count: int, packed: bool) -> None:
    places = [Place(rank, 3) for rank in range(3)]
    made = [passes(step_of(count), 6, packed=packed, share=place.share) for place in places]
    tokens = [token for parts in made for part in parts for token in part["input_ids"].flatten().tolist()]
    assert sorted(tokens) == [record for record in range(count) for _ in range(3)]
    assert [bool(parts) for parts in made] == [rank < count for rank in range(3)]


def test_a_process_that_is_alone_shares_nothing() -> None:
    loss, weight = torch.tensor(2.0), torch.ones(3, requires_grad=True)
    assert summed(Place(), loss, [weight]) is loss
    assert weight.grad is None
    assert [any_process(Place(), flag, torch.device("cpu")) for flag in (True, False)] == [True, False]


def test_a_single_process_keeps_its_generator_and_several_have_one_each() -> None:
    def drawn(place: Place) -> float:
        torch.manual_seed(1)
        seed_step(place, 42, 7)
        return float(torch.rand(()))

    alone = drawn(Place())
    torch.manual_seed(1)
    assert alone == float(torch.rand(()))
    assert drawn(Place(0, 2)) == drawn(Place(0, 2)) != drawn(Place(1, 2))
