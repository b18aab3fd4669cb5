"""The loss of the answers alone: the same number and the same gradients as TRL's, and as transformers' own."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.models.loading import load_model
from pipeline.models.memory_estimate import LOGITS_BYTES
from pipeline.train import trainer as trainer_module
from pipeline.train.answer_loss import has_plain_head, summed_loss
from pipeline.train.job import TokenRow
from pipeline.train.packing import collate, micro_batches
from tests.made_adapters import assert_near, gradients_of, save_base, token_rows, trainer_of, trls_loss

Gradients = dict[str, torch.Tensor]
NO_LABEL, SOFT = -100, "final_logit_softcapping"
#: Chunks of one position, of three, and one chunk of all there is.
CHUNK_ROWS = (1, 3, 10**6)


class Losses:
    """A trainer as the step builds it, whose adapter is not the zero that it begins at."""

    def __init__(self, base: Path, folder: Path, rows: Sequence[TokenRow], **settings: Any) -> None:
        self.trainer = trainer_of(base, folder, rows, **{"batch_size": 4, **settings})
        # Accelerate puts mixed precision around the forward, as at the beginning of a training.
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.model.eval()
        prepared = [dict(row) for row in self.trainer.train_dataset]
        parts = [collate(prepared[start : start + 4]) for start in range(0, len(prepared), 4)]
        self.batches = [inputs for part in parts for inputs in micro_batches(part, 10**6, packed=False)]

    def of(
        self, compute: Callable[..., Any], batches: Sequence[Any], items: Any = None
    ) -> tuple[list[float], Gradients]:
        """Return the loss of each batch, and the gradients that have gathered after the last."""
        self.model.zero_grad()
        found = []
        for batch in batches:
            loss = compute(self.model, dict(batch), num_items_in_batch=items)
            loss.backward()
            found.append(loss.item())
        return found, gradients_of(self.model)

    def plain(self) -> float:
        """Return the mean loss of the answers of the only batch, from all of the model's logits."""
        (batch,) = self.batches
        with torch.no_grad():
            logits = self.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, batch["labels"][:, 1:]))

    def compare(self, batches: Sequence[Any], items: Any = None, tolerance: float = 1e-5) -> None:
        """Hold our loss and gradients against TRL's."""
        trl = self.of(partial(trls_loss, self.trainer), batches, items)
        ours = self.of(self.trainer.compute_loss, batches, items)
        assert ours[0] == pytest.approx(trl[0], rel=tolerance)
        assert_near(ours[1], trl[1], tolerance)


def answers_of(batches: Sequence[Any]) -> torch.Tensor:
    return torch.stack([(batch["labels"][:, 1:] != NO_LABEL).sum() for batch in batches]).sum()


@pytest.fixture(autouse=True)
def _padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pad as TRL does; what packing changes is tested in test_packed_attention.py."""
    monkeypatch.setattr(trainer_module, "enable_packing", lambda *_: False)


@pytest.mark.parametrize("rows", CHUNK_ROWS)
def test_loss_and_gradients_are_trls(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    losses = Losses(tiny_llama, tmp_path, token_rows(16, seed=2))
    # As many positions go through the head at once.
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * rows * losses.model.get_output_embeddings().out_features)
    widths = {batch["input_ids"].shape[1] for batch in losses.batches}
    assert len(widths) > 1, "batches padded to different lengths"
    losses.compare(losses.batches, answers_of(losses.batches))
    losses.compare(losses.batches[:1])


def test_loss_and_gradients_are_trls_over_an_nf4_base_with_recomputed_activations(
    tiny_llama: Path, tmp_path: Path
) -> None:
    losses = Losses(tiny_llama, tmp_path, token_rows(8, seed=4), quantization="nf4")
    assert type(losses.model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    losses.trainer.model.activation_checkpointing_enable()
    losses.model.train()
    assert losses.model.get_base_model().model.layers[0].gradient_checkpointing
    losses.compare(losses.batches, answers_of(losses.batches), tolerance=0.02)


def test_no_logits_are_kept_and_nothing_else_measured(tiny_llama: Path, tmp_path: Path) -> None:
    losses = Losses(tiny_llama, tmp_path, token_rows(4, seed=6))
    (batch,) = losses.batches
    head = losses.model.get_output_embeddings()
    hidden = torch.randn(*batch["labels"].shape, head.in_features, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(head, hidden, batch["labels"], batch["answers"]).backward()
    weight = (head.in_features, head.out_features)
    assert [shape for shape in kept if shape[-1:] == weight[1:] and shape != weight] == []
    assert hidden.grad is not None
    losses.trainer.compute_loss(losses.model, dict(batch), num_items_in_batch=answers_of([batch]))
    assert not any(losses.trainer._metrics.values()), "neither entropy nor accuracy"


def test_logits_that_are_capped_are_left_to_trl(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"head_dim": 16, SOFT: 5.0}
    base = save_base(transformers.Gemma2Config, tiny_llama, tmp_path / "base", **options)
    model: Any = load_model(base, "cpu")
    assert has_plain_head(load_model(tiny_llama, "cpu"), range(3, 20))
    assert not has_plain_head(model, range(3, 20))
    losses = Losses(base, tmp_path, token_rows(4, seed=7))
    losses.compare(losses.batches, tolerance=0)
    assert "TRL computes the loss" in capsys.readouterr().err
    assert losses.of(losses.trainer.compute_loss, losses.batches)[0] == pytest.approx([losses.plain()], rel=1e-5)
    far_above = save_base(transformers.Gemma2Config, tiny_llama, tmp_path / "far", **options | {SOFT: 500.0})
    assert not has_plain_head(load_model(far_above, "cpu"), range(3, 20))


def test_a_head_whose_second_product_is_rounded_differently_is_plain(tiny_llama: Path) -> None:
    model: Any = load_model(tiny_llama, "cpu")
    head, times = model.get_output_embeddings(), itertools.count()
    head.register_forward_hook(lambda _, __, made: made * (1 + 2**-8 * next(times)))
    assert has_plain_head(model, range(3, 20))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_the_loss_of_a_router_is_left_to_trl_and_no_part_of_the_dev_loss(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"num_local_experts": 2, "router_aux_loss_coef": 0.5}
    base = save_base(transformers.MixtralConfig, tiny_llama, tmp_path / "base", **options)
    assert has_plain_head(load_model(base, "cpu"), range(3, 20))
    losses = Losses(base, tmp_path, token_rows(4, seed=7))
    losses.compare(losses.batches, tolerance=0)
    assert "TRL computes the loss" in capsys.readouterr().err
    step = collate([dict(row) for row in losses.trainer.train_dataset])
    losses.trainer.get_eval_dataloader = lambda: [step]
    found = losses.trainer.dev_loss()
    assert losses.trainer.aux_loss_enabled, "it is trained with all the same"
    assert found == pytest.approx(losses.plain(), rel=1e-4)
