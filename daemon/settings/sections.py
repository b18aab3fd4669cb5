"""Settings of the web page, messages, the executor and the jobs of a Slurm cluster."""

import ipaddress
import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from daemon.settings.text import check_path
from pipeline.artifacts import Frozen

_UNIX = "unix:"
_MOST_PORT = 65_535
#: Options of sbatch that Dropforge sets itself: they identify or hold a job, or change what sbatch prints.
_RESERVED = frozenset(
    {"array", "chdir", "clusters", "comment", "error", "export", "hold", "job-name", "output", "parsable", "requeue"}
    | {"signal", "test-only", "wait", "wrap"}
)
#: Schemes whose URL has a host behind `://`; that of the others begins with a token (slack, tgram, ntfy, pbul).
_WITH_HOST = frozenset(
    {"form", "forms", "gotify", "gotifys", "http", "https", "json", "jsons", "mailto", "mailtos", "xml", "xmls"}
)
#: Enough digits to tell a few addresses apart, too few to try passwords by.
_DIGITS = 4


class Address(NamedTuple):
    """Where the page is served: the path of a Unix socket, or if `socket` is `None` an IP address and a port."""

    socket: Path | None
    host: str = ""
    port: int = 0

    @property
    def is_near(self) -> bool:
        """Whether no other machine can reach it: a socket or a loopback address."""
        return self.socket is not None or ipaddress.ip_address(self.host).is_loopback


class WebSettings(Frozen):
    """The web page; `dropforge web` shows it without these, too."""

    enabled: bool = False
    """Whether the daemon serves the page, in a separate process."""
    listen: str = "127.0.0.1:8765"
    """Address and port, or a socket as "unix:/run/dropforge/web.sock"."""
    token: Literal["auto", "changes", "all"] = "auto"  # noqa: S105 - a choice
    """What asks for the token: `changes`, or reading too; `auto` is `changes` on loopback, `all` on a socket."""
    hosts: tuple[str, ...] = ()
    """Further host names that requests may use, such as a proxy's; requests with others are refused."""

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        address_of(value)
        return value

    @model_validator(mode="after")
    def _is_near_or_closed(self) -> "WebSettings":
        if not self.address.is_near and not self.closed:
            raise ValueError(f'{self.listen} can be reached from other machines: that needs token = "all"')
        return self

    @property
    def address(self) -> Address:
        """Where the page is served: `listen`, parsed."""
        return address_of(self.listen)

    @property
    def closed(self) -> bool:
        """Whether reading, too, needs the token: if `token` is "all", or "auto" and a socket, which a group can use."""
        return self.token == "all" or (self.token == "auto" and self.address.socket is not None)  # noqa: S105 - a choice


def address_of(text: str) -> Address:
    """Parse "IP:PORT", "[IPV6]:PORT" or "unix:/PATH"; raise `ValueError` for anything else, also for host names."""
    if text.startswith(_UNIX):
        path = Path(text.removeprefix(_UNIX))
        if not path.is_absolute():
            raise ValueError('a socket needs its whole path, as "unix:/run/dropforge/web.sock"')
        return Address(path)
    msg = f'must be an IP address with a port, 0 to {_MOST_PORT}, as "127.0.0.1:8765" or "[::1]:8765", or "unix:/PATH"'
    try:
        parts = urlsplit(f"//{text}")
        ip, port = ipaddress.ip_address(parts.hostname or ""), parts.port
    except ValueError as error:
        raise ValueError(msg) from error
    if port is None or parts.netloc != text or "@" in text:
        raise ValueError(msg)
    return Address(None, str(ip), port)


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


class ExecutorSettings(Frozen):
    """Where steps run, and how many runs go on at once."""

    kind: Literal["local", "slurm"] = "local"
    """`local`: on this machine; `slurm`: training, merge and evaluation as jobs of a Slurm cluster."""
    parallel: int = Field(default=1, ge=1, le=1000)
    """Most runs at once, of each track one; on one machine they share its memory and its GPUs."""
    shared: Annotated[str, AfterValidator(check_path)] = ""
    """Folder for drops, runs and models that all nodes see under this path; empty: the state folder."""
    setup: Annotated[str, AfterValidator(check_path)] = ""
    """Shell file that a job reads before its step, for modules and variables."""
    poll_seconds: float = Field(default=10.0, ge=0.1, le=3600)
    """Seconds between two looks at Slurm's queue."""
    slurm: SlurmSettings = SlurmSettings()

    @property
    def steps_on_nodes(self) -> frozenset[str]:
        """Names of the steps that run as Slurm jobs: train, merge, evaluate but `slurm.local`; none without Slurm."""
        return frozenset({"train", "merge", "evaluate"} - {*self.slurm.local} if self.kind == "slurm" else ())

    @property
    def parallel_here(self) -> int:
        """Most steps at once on this machine: `parallel`; with Slurm, of which it is the size, at most four."""
        return min(self.parallel, 4) if self.kind == "slurm" else self.parallel


class SecretUrl(SecretStr):
    """A URL of which only scheme and host are shown."""

    def _display(self) -> str:
        return shown_url(self.get_secret_value())

    @property
    def address(self) -> str:
        """What the database has in its place: the first four hexadecimal digits of its SHA-256."""
        return sha256(self.get_secret_value().encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


class MessageSettings(Frozen):
    """Where messages are sent, and when the digest; a service needs PrivateNetwork=no to send them."""

    urls: tuple[SecretUrl, ...] = ()
    """Addresses as Apprise has them, as ["mailto://user:password@example.org", "slack://TOKEN"]; [] sends nothing."""
    digest: str = "08:00"
    """Time of day, in `timezone`, at which events without a message of their own are sent as a digest; empty: never."""

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, value: tuple[SecretUrl, ...]) -> tuple[SecretUrl, ...]:
        if any("://" not in url.get_secret_value() for url in value):
            raise ValueError("must be URLs as Apprise writes them, such as mailto://user:password@example.org")
        if len(set(value)) < len(value):
            raise ValueError("one of them is there twice")
        if len({url.address for url in value}) < len(value):
            raise ValueError("two of them have the same short hash: add ?n=1 to one of them")
        return value

    @field_validator("digest")
    @classmethod
    def _is_a_time_of_day(cls, value: str) -> str:
        if not re.fullmatch(r"(?:([01]?[0-9]|2[0-3]):[0-5][0-9])?", value):
            raise ValueError('must be a time of day, such as "08:00", or "" for no digest')
        return value

    @property
    def schedule(self) -> str:
        """The digest's time as a cron expression; empty where there is none."""
        hour, _, minute = self.digest.partition(":")
        return f"{int(minute)} {int(hour)} * * *" if self.digest else ""


def shown_url(url: str) -> str:
    """Return a URL without secrets: its scheme, and its host if it certainly has one, else "…"; empty if not a URL."""
    scheme, there, rest = url.partition("://")
    if not there:
        return ""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A password may hold these characters: then it ends behind them.
    cut = "@" not in authority and "@" in rest
    try:
        host = None if cut or scheme.lower() not in _WITH_HOST else urlsplit(f"//{authority}").hostname
    except ValueError:
        host = None
    return f"{scheme}://{host}" if host else f"{scheme}://…"
