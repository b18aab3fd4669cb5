"""
Steps in processes of their own without the seconds that importing torch takes: imports once, then forks one a line.

Each line on standard input is `STEP SPEC`; each step writes to log.txt beside its spec as under the worker. Answers on
standard output: `began PID`, then `ended EXIT`, where EXIT is negative for a signal.
"""

import os
import sys
from pathlib import Path

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import trl  # noqa: F401
from transformers import Trainer  # noqa: F401
from trl import SFTTrainer  # noqa: F401

from pipeline.__main__ import main


def run(step: str, spec: str) -> None:
    """Run one step in a forked process to its end."""
    print("ready", flush=True)
    child = os.fork()
    if child == 0:
        log = os.open(Path(spec).with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(main([step, spec]))
    print(f"began {child}", flush=True)
    print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    # More than one thread sums in an order of its own, and a fork does not inherit them.
    torch.set_num_threads(1)
    for line in sys.stdin:
        run(*line.split())
