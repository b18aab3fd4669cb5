"""The passes of an optimizer step: however it is divided, the same records, loss and gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.train import trainer as trainer_module
from pipeline.train.job import LengthGroups, TokenRow
from pipeline.train.packing import micro_batches
from tests import made_adapters
from tests.made_adapters import assert_near, gradients_of, token_rows

#: A record a pass, two to three records a pass, and all in one.
BUDGETS = (1, 64, 4096)
#: Sums of float32 in another order: an epsilon of 1.2e-7, some hundred terms, two layers.
TOLERANCE = 1e-5


def trainer_of(base: Path, folder: Path, rows: Sequence[TokenRow], **settings: Any) -> Any:
    trainer = made_adapters.trainer_of(base, folder, rows, **settings)
    trainer.create_optimizer()
    return trainer


def step_of(trainer: Any) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Return loss and gradients of the first optimizer step, and its records."""
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(inputs)).item()
    return loss, gradients_of(trainer.model), inputs


@pytest.mark.parametrize("packed", [True, False])
def test_a_smaller_budget_is_kept_and_changes_neither_the_records_nor_their_order_nor_the_gradients(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, packed: bool
) -> None:
    if not packed:
        monkeypatch.setattr(trainer_module, "enable_packing", lambda *_: False)
    rows = token_rows(8, seed=2)
    steps = [step_of(trainer_of(tiny_llama, tmp_path, rows, batch_tokens=budget)) for budget in BUDGETS]
    counts = []
    for (_, _, inputs), budget in zip(steps, BUDGETS, strict=True):
        parts = micro_batches(inputs, budget, packed=packed)
        records = [len(part["cu_seq_lens_q"]) - 1 if packed else len(part["input_ids"]) for part in parts]
        for part, count in zip(parts, records, strict=True):
            assert count == 1 or part["input_ids"].numel() <= budget
            if packed:
                lengths = part["cu_seq_lens_q"].diff().tolist()
                assert part["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
        assert sum(records) == 8
        counts.append(len(parts))
    assert counts[0] == 8 > counts[1] > counts[2] == 1
    whole = steps[-1]
    for loss, gradients, inputs in steps[:-1]:
        assert torch.equal(inputs["input_ids"], whole[2]["input_ids"])
        assert inputs["lengths"] == whole[2]["lengths"]
        assert loss == pytest.approx(whole[0], rel=TOLERANCE)
        assert_near(gradients, whole[1], TOLERANCE)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the name of each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(op.__name__.partition(".")[0])
        return op(*args, **kwargs or {})


def test_a_step_reads_no_number_from_the_device(tiny_llama: Path, tmp_path: Path) -> None:
    """On a GPU each would be waited for; those that the trainer logs after the step are left."""
    trainer = trainer_of(tiny_llama, tmp_path, token_rows(8, seed=2), batch_tokens=64)
    inputs = next(iter(trainer.get_train_dataloader()))
    with Operations() as operations:
        trainer.training_step(trainer.model, inputs)
        trainer._track_num_input_tokens(inputs)
    assert "mm" in operations.names
    assert not operations.names & {"nonzero", "_local_scalar_dense"}
    assert trainer.state.num_input_tokens_seen == sum(inputs["lengths"])


def test_each_epoch_meets_every_row_once_in_an_order_of_its_own() -> None:
    groups = LengthGroups([5, 9, 1, 7, 3, 8, 2, 6, 4, 10, 11], batch_size=2, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        groups.set_epoch(epoch)
        orders.append(list(groups))
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] == orders[2] != orders[1]
    assert list(LengthGroups(groups.lengths, batch_size=2, seed=2)) != orders[0]


def test_batches_are_of_like_length_and_the_longest_comes_first() -> None:
    lengths = [*range(1, 33)] * 2
    order = [lengths[row] for row in LengthGroups(lengths, batch_size=4, seed=0)]
    batches = [order[start : start + 4] for start in range(0, 64, 4)]
    assert max(max(batch) - min(batch) for batch in batches) <= 2
    assert batches[0][0] == 32
    assert batches != sorted(batches, reverse=True)
