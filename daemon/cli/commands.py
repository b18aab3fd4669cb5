"""Tables of all commands: their modules in `daemon.cli`, their lines in `--help`, and their examples."""

from collections.abc import Mapping
from types import MappingProxyType

#: Command name -> (module of `daemon.cli` with the function of this name, its line in the list of commands).
COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "run": ("service", "Run the daemon until Ctrl-C or SIGTERM."),
        "worker": ("service", "Run the steps that the daemon orders."),
        "web": ("service", "Serve the web page until Ctrl-C, with or without a daemon."),
        "init": ("inbox", "Make a workspace: settings, inbox, state folder."),
        "check": ("inbox", "Say what is wrong with a file, line by line."),
        "convert": ("convert", "Make records of a table: CSV, TSV, Parquet, gzip."),
        "submit": ("inbox", "Check a file and copy it into the inbox."),
        "status": ("status", "Say what the daemon does and what waits."),
        "attention": ("maintenance", "List what needs a person, the most urgent first, each with its key."),
        "watch": ("wait", "Show what goes on until Ctrl-C."),
        "wait": ("wait", "Wait until a run, or the run that trains on a dropped file, has its verdict."),
        "ask": ("handover", "Let the champion answer as it was evaluated."),
        "search": ("queue", "Begin a run now that trains several times, each time with other settings."),
        "move": ("queue", "Let a queued or waiting run go before all others."),
        "pause": ("queue", "Let a track begin no run until it is resumed."),
        "resume": ("queue", "Let a paused track begin runs again."),
        "runs": ("runs", "List the runs, newest first."),
        "show": ("runs", "Show everything about one run."),
        "logs": ("runs", "Print what a run's steps have written."),
        "train": ("queue", "Begin a run now, without waiting for a drop or for the night."),
        "retry": ("queue", "Let a failed, cancelled or crashed run go on where it stopped."),
        "cancel": ("queue", "End a run without a verdict."),
        "report": ("runs", "Open the evidence behind a run's verdict in a browser."),
        "review": ("runs", "Compare a run's answers with the champion's without knowing which is which."),
        "champion": ("champion", "Show each track's champion."),
        "history": ("champion", "List the champions of each track, today's first."),
        "promote": ("handover", "Promote a run that won and waits for approval."),
        "rollback": ("handover", "Let a former champion serve again."),
        "hook": ("handover", "Run hooks.after_promotion again for the champion that serves, as after a failure."),
        "export": ("handover", "Copy a track's champion to a folder."),
        "serve-hook": ("handover", "Make a server serve the champion, and check its answers."),
        "gc": ("maintenance", "Remove what nothing needs any more."),
        "backup": ("maintenance", "Back up database, drops and verdicts with their cards."),
        "restore": ("maintenance", "Put a backup in the place of the present database; no daemon may run."),
        "doctor": ("maintenance", "Look at database, disks, inbox and models, and say what to mend."),
        "messages": ("maintenance", "List the messages that have not arrived."),
        "metrics": ("maintenance", "Print all metrics in Prometheus' text format, as /metrics of the page does."),
        "demo": ("demo", "Show the whole loop on a real small model."),
        "drops": ("drops", "List the files that were taken in, newest first."),
        "config": ("workspace", "Show the settings, or check them."),
    }
)
#: Command name -> its subcommands, functions of the same module.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"drops": ("accept", "withdraw", "restore"), "config": ("show", "check")}
)
#: Command name -> examples; two spaces and `#` begin a comment on an example.
EXAMPLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "run": ("dropforge run", "dropforge --config /etc/dropforge/dropforge.toml run"),
        "web": ("dropforge web", "dropforge web --url"),
        "worker": ("dropforge worker", "dropforge worker --state .dropforge"),
        "init": ("dropforge init", "dropforge init ~/forge --base-model ~/models/SmolLM2-135M-Instruct"),
        "check": (
            "dropforge check data.jsonl",
            "dropforge check data.jsonl --track support --json",
            "dropforge check data.jsonl --show 3",
        ),
        "convert": (
            "dropforge convert table.csv -o records.jsonl",
            "dropforge convert table.csv --map instruction=question --map output=answer --drop",
        ),
        "submit": ("dropforge submit data.jsonl --track support", "dropforge submit test.jsonl --heldout"),
        "status": ("dropforge status", "dropforge status --json | jq .runs"),
        "attention": ("dropforge attention", "dropforge attention --dismiss failed-7"),
        "watch": ("dropforge watch", "dropforge watch | tee progress.txt"),
        "wait": (
            "dropforge wait 7",
            "dropforge wait data.jsonl --timeout 3600 && echo promoted  # the newest drop of this name",
        ),
        "ask": (
            "dropforge ask 'Where is my parcel?'",
            "dropforge ask 'Classify the message.' --input 'I was billed twice.'",
            "dropforge ask 'And by train?' --messages earlier.json",
        ),
        "move": ("dropforge move 9",),
        "pause": ("dropforge pause --reason 'the GPU is lent out'", "dropforge pause support --reason 'bad labels'"),
        "resume": ("dropforge resume", "dropforge resume support"),
        "runs": ("dropforge runs", "dropforge runs --track support --state failed"),
        "show": ("dropforge show 7", "dropforge show 7 --json | jq .run.verdict"),
        "logs": ("dropforge logs 7",),
        "train": ("dropforge train", "dropforge train support"),
        "search": ("dropforge search", "dropforge search support"),
        "retry": ("dropforge retry 7", "dropforge retry 7 --from evaluate"),
        "cancel": ("dropforge cancel 7",),
        "report": ("dropforge report 7", "dropforge report 7 --path"),
        "review": ("dropforge review 7", "dropforge review 7 --json", "dropforge review 7 --choose 4f1c09a2b7e35d68=1"),
        "champion": ("dropforge champion", "vllm serve $(dropforge champion --path)"),
        "history": ("dropforge history --track support", "dropforge history --at 2026-11-24T02:00"),
        "promote": ("dropforge promote 7", "dropforge promote 7 --force --reason 'wanted for the fair'"),
        "rollback": (
            "dropforge rollback --reason 'it answers in capitals'",
            "dropforge rollback --track support --to 3 --reason 'trained on a leaked file'",
        ),
        "hook": ("dropforge hook --track support",),
        "export": ("dropforge export --to ~/champion", "dropforge export support --to ~/for-llama --gguf"),
        "serve-hook": (
            "dropforge serve-hook http://127.0.0.1:8000",
            "dropforge serve-hook unix:/run/vllm/vllm.sock --adapter-name /srv/serving/name",
        ),
        "gc": ("dropforge gc --dry-run", "dropforge gc"),
        "backup": ("dropforge backup", "dropforge backup /mnt/backups --models"),
        "restore": ("dropforge restore /mnt/backups/dropforge-20261124T020000Z",),
        "doctor": ("dropforge doctor",),
        "messages": ("dropforge messages", "dropforge messages --test"),
        "metrics": ("dropforge metrics", "dropforge metrics | sponge /var/lib/node-exporter/dropforge.prom"),
        "config show": ("dropforge config show", "dropforge config show | grep train.epochs"),
        "config check": ("dropforge --config new.toml config check",),
        "demo": ("dropforge demo",),
        "drops accept": ("dropforge drops accept 4 --reason 'looked at all of it'",),
        "drops withdraw": ("dropforge drops withdraw 12 --reason 'a customer asked for it'",),
        "drops restore": ("dropforge drops restore 12 --reason 'it was not the cause'",),
    }
)


def examples_of(command_path: str) -> tuple[str, ...]:
    """Return the examples of a command path such as `dropforge drops accept`; empty if it has none."""
    return EXAMPLES.get(command_path.partition(" ")[2], ())


def epilog_of(command_path: str) -> str:
    """Return the end of a command's help: its examples, not wrapped, so that they can be copied; empty without any."""
    lines = [f"  {line}" for line in examples_of(command_path)]
    return "\n".join(("\b", "Examples:", *lines)) if lines else ""
