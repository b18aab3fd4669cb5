"""What a job of the storm runs: `dropforge worker --one KEY FENCE --state ROOT`, with a script in a step's place."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from daemon.cli.service import configure_logs
from daemon.dispatch import attempt
from pipeline.contract import StepSpec

#: Marks that it has begun, works for a moment, and leaves the artifact that stands in its spec.
STEP = """
import json, os, pathlib, signal, sys, threading
spec = json.loads(pathlib.Path("spec.json").read_text())
if not os.read(int(os.environ["DROPFORGE_LIFELINE_FD"]), 1):
    os._exit(75)
key = f"{spec['run']}-{spec['step']}-{spec['attempt']}"
def mark(word):
    # Beside the shared folder, which may be away or full.
    with open(spec["root"] + ".marks", "a") as file:
        file.write(f"{word} {key}\\n")
mark("begin")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
stopped = stop.wait(1)
mark("stopped" if stopped else "end")
result = {"key": key, "fence": spec["fence"], "status": "ok", "exit_code": 0}
if stopped:
    result |= {"status": "interrupted", "exit_code": 75}
else:
    result["artifact"] = json.loads(spec["env"]["ARTIFACT"])
try:
    pathlib.Path("aside").write_text(json.dumps(result))
except OSError:
    sys.exit(74)  # the folder is full
os.rename("aside", "result.json")
sys.exit(result["exit_code"])
"""


def step(_spec: StepSpec, _path: Path) -> tuple[str, ...]:
    """Return what does a step."""
    return (sys.executable, "-c", STEP)


if __name__ == "__main__":
    _, key, fence, _, root = sys.argv[1:]
    configure_logs()
    attempt.serve_one(Path(root), key, fence, step)
