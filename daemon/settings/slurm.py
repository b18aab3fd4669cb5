"""Settings of a Slurm cluster's jobs."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.artifacts import Frozen

#: Options of sbatch by which a job is known or held, or with which its number is not what is printed.
_RESERVED = frozenset(
    {"array", "chdir", "clusters", "comment", "error", "export", "hold", "job-name", "output", "parsable", "requeue"}
    | {"signal", "test-only", "wait", "wrap"}
)


def _check_extra(value: tuple[str, ...]) -> tuple[str, ...]:
    for word in value:
        if not word.startswith("--") or word[2:].partition("=")[0] in _RESERVED:
            reserved = ", ".join(sorted(_RESERVED))
            raise ValueError(f"{word!r} cannot be given: long options as --name=value, but none of {reserved}")
    return value


class JobSettings(Frozen):
    """What a step's job asks Slurm for."""

    gpus: int = Field(default=0, ge=0, le=1024)
    """GPUs of each node of the job (--gres=gpu:N)."""
    cpus: int = Field(default=1, ge=1, le=4096)
    """Processors of each node of the job (--cpus-per-task)."""
    memory: str = ""
    """Memory of the job, as "120G" (--mem); empty: the partition's default."""
    time: str = ""
    """Longest time of the job, as "12:00:00" (--time); empty: the partition's default."""


class TrainingJobSettings(JobSettings):
    """What the job of a training asks Slurm for."""

    nodes: int = Field(default=1, ge=1, le=1024)
    """Nodes of the job, each with `gpus` and `cpus`; they share each optimizer step's records."""


class SlurmSettings(Frozen):
    """Where Slurm runs the jobs; empty settings are left to Slurm's defaults."""

    partition: str = ""
    """Partition of the jobs."""
    account: str = ""
    """Account that the jobs are charged to."""
    qos: str = ""
    """Quality of service of the jobs."""
    constraint: str = ""
    """Features that the nodes must have, as "a100"."""
    extra: Annotated[tuple[str, ...], AfterValidator(_check_extra)] = ()
    """Further arguments of sbatch, as ["--reservation=night"]."""
    local: tuple[Literal["merge", "evaluate"], ...] = ()
    """Steps that run on the daemon's host instead, as ["merge"]."""
    train: TrainingJobSettings = TrainingJobSettings()
    merge: JobSettings = JobSettings()
    evaluate: JobSettings = JobSettings()

    def arguments(self, step: str) -> tuple[str, ...]:
        """Return sbatch's arguments for a job of "train", "merge" or "evaluate"; empty settings are left out."""
        job: JobSettings = getattr(self, step)
        named = {name: getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        named |= {"gres": f"gpu:{job.gpus}" if job.gpus else "", "mem": job.memory, "time": job.time}
        options = (f"--{name}={value}" for name, value in named.items() if value)
        nodes = job.nodes if isinstance(job, TrainingJobSettings) else 1
        return (*self.extra, *options, f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={job.cpus}")
