"""What the processes of a training share."""

from typing import Any

import pytest
import torch

from pipeline.train.data_parallel import ProcessRank, any_process, seed_step, summed
from pipeline.train.packing import collate, micro_batches


def step_of(count: int) -> dict[str, Any]:
    return collate([{"input_ids": [n, n, n], "labels": [-100, n, n]} for n in range(count)])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_record_of_a_step_is_in_one_process(count: int, packed: bool) -> None:
    processes = [ProcessRank(rank, 3) for rank in range(3)]
    made = [micro_batches(step_of(count), 6, packed=packed, share=process.share) for process in processes]
    tokens = [token for parts in made for part in parts for token in part["input_ids"].flatten().tolist()]
    assert sorted(tokens) == [record for record in range(count) for _ in range(3)]
    assert [bool(parts) for parts in made] == [rank < count for rank in range(3)]


def test_a_process_that_is_alone_shares_nothing() -> None:
    loss, weight = torch.tensor(2.0), torch.ones(3, requires_grad=True)
    assert summed(ProcessRank(), loss, [weight]) is loss
    assert weight.grad is None
    assert [any_process(ProcessRank(), flag, torch.device("cpu")) for flag in (True, False)] == [True, False]


def test_a_single_process_keeps_its_generator_and_several_have_one_each() -> None:
    def drawn(process: ProcessRank) -> float:
        torch.manual_seed(1)
        seed_step(process, 42, 7)
        return float(torch.rand(()))

    alone = drawn(ProcessRank())
    torch.manual_seed(1)
    assert alone == float(torch.rand(()))
    assert drawn(ProcessRank(0, 2)) == drawn(ProcessRank(0, 2)) != drawn(ProcessRank(1, 2))
