"""The trainer's callback: report progress, record the dev loss, stop a diverged training, and save checkpoints."""

import math
import shlex
import sys
import time
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback

from pipeline.artifacts import Dataset
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.train.checkpoints import publish
from pipeline.train.data_parallel import summed
from pipeline.train.job import Job

_WINDOW_STEPS = 20
_LOG_LINES = 20
_MOST_LINES = 8


class Watcher(TrainerCallback):
    """
    The trainer's callback: it reports progress, records losses, saves checkpoints and ends the training.

    A training ends if its loss is not finite, or at the next optimizer step once `attempt.stop` is set in any of its
    processes. Losses are read from the trainer's log, so that a resumed training is treated like an uninterrupted one.
    A checkpoint is saved every `checkpoint_minutes` and at such a stop, but not after the last step: rank 0 moves it
    from `job.scratch` to the run's checkpoint folder.
    """

    def __init__(self, attempt: Attempt, job: Job) -> None:
        """Watch the training of `job`."""
        self.attempt, self.job = attempt, job
        self.marks: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW_STEPS + 1)
        self.losses: list[tuple[int, float]] = []
        self.dev: list[tuple[int, float]] = []
        self.saved_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the losses that an interrupted training had logged, and begin to report progress."""
        self.losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        self.dev = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
        self.attempt.show_curve(self.losses, self.dev)
        self.marks.append((time.monotonic(), state.global_step, int(state.num_input_tokens_seen)))
        self.attempt.progress(state.global_step, state.max_steps, phase="train")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set in `control` whether to save and to end; after the last step, whether to measure the dev loss."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            return
        stops = torch.tensor(float(self.attempt.stop.is_set()), device=args.device)
        stopping = bool(summed(self.job.process, stops))  # all processes decide alike
        is_due = time.monotonic() - self.saved_at >= self.attempt.config.train.checkpoint_minutes * 60
        control.should_training_stop = control.should_training_stop or stopping
        control.should_save = self.job.process.rank == 0 and (stopping or is_due)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the checkpoint that the trainer saved to the run's checkpoint folder, see `publish`."""
        spec, source = self.attempt.spec, self.job.scratch / f"checkpoint-{state.global_step}"
        publish(source, self.attempt.path(spec.checkpoints), state.global_step, self.job.fingerprint, spec.attempt)
        self.saved_at = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record and report a logged loss or dev loss. Raises `CannotTrain` if that or a gradient is not finite."""
        logs = logs or {}
        for name, what in (("loss", "loss"), ("grad_norm", "gradient's norm"), ("eval_loss", "dev loss")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise self._diverged(state.global_step, f"the {what} at step {state.global_step} is {logs[name]}")
        if "eval_loss" in logs:
            sys.stderr.write(f"step {state.global_step}: dev loss {logs['eval_loss']:.4f}\n")
            self.dev.append((state.global_step, logs["eval_loss"]))
            self._report(state)
        if "loss" not in logs:
            return
        self.losses.append((state.global_step, logs["loss"]))
        self.marks.append((time.monotonic(), state.global_step, int(state.num_input_tokens_seen)))
        self._report(state)
        if state.global_step % max(1, state.max_steps // _LOG_LINES) == 0:
            sys.stderr.write(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}\n")

    def _report(self, state: Any) -> None:
        (began, first, tokens), (now, last, seen) = self.marks[0], self.marks[-1]
        elapsed = max(now - began, 1e-9)
        self.attempt.progress(
            state.global_step,
            state.max_steps,
            phase="train",
            loss=self.losses[-1][1],
            dev_loss=self.dev[-1][1] if self.dev else None,
            tokens_per_second=(seen - tokens) / elapsed,
            eta_seconds=elapsed / max(1, last - first) * (state.max_steps - last),
        )

    def _diverged(self, step: int, words: str) -> CannotTrain:
        """Return the error of a training that diverged at `step`, with the lines of up to 8 of its records."""
        path = self.attempt.path(self.attempt.load(Dataset).folder) / "train.jsonl"
        lines = sorted(self.job.rows[row].line for row in self.job.order.of_step(step))[:_MOST_LINES]
        message = f"training diverged: {words}; its records are lines {', '.join(map(str, lines))} of {path.name}"
        shown = "".join(f"{line}p;" for line in lines)
        hint = f"lower train.learning_rate; to look at the records: sed -n '{shown}' {shlex.quote(str(path))}"
        # The same rows in the same order diverge again: another attempt is pointless.
        return CannotTrain(message, hint)
