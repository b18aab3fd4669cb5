"""Which module of `daemon.cli` has each command, and its line in the list of all; modules are imported when needed."""

from collections.abc import Mapping
from types import MappingProxyType

#: The module, whose function of this name it is, and with what the command's help begins, by its name.
COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "run": ("service", "Run the daemon until Ctrl-C or SIGTERM."),
        "worker": ("service", "Run the steps that the daemon orders."),
        "web": ("service", "Serve the web page until Ctrl-C, with or without a daemon."),
        "init": ("inbox", "Make a workspace: settings, inbox, state folder."),
        "check": ("inbox", "Say what is wrong with a file, line by line."),
        "submit": ("inbox", "Check a file and copy it into the inbox."),
        "status": ("status", "Say what the daemon does and what waits."),
        "attention": ("status", "List what needs a person, the most urgent first, each behind its key."),
        "watch": ("live.watch", "Show what goes on until Ctrl-C."),
        "wait": ("live.wait", "Wait until a run, or the run that trains on a drop, has its verdict."),
        "ask": ("live.ask", "Let the champion answer as it was evaluated."),
        "search": ("live.search", "Begin a run now that trains several times, with what [train.search] has to try."),
        "move": ("live.queue", "Let a queued or waiting run go before all others, or right behind another one."),
        "pause": ("live.queue", "Let a track begin no run until it is resumed."),
        "resume": ("live.queue", "Let a paused track begin runs again."),
        "runs": ("runs", "List the runs, newest first."),
        "show": ("runs", "Show everything about one run."),
        "logs": ("runs", "Print what a run's steps have written."),
        "train": ("runs", "Begin a run now, without waiting for a drop or for the night."),
        "retry": ("runs", "Let a failed, cancelled or crashed run go on where it stopped."),
        "cancel": ("runs", "End a run without a verdict."),
        "report": ("report", "Open the evidence behind a run's verdict in a browser."),
        "compare": ("report", "Show two runs beside each other."),
        "review": ("report", "Judge a run's answers beside the champion's without knowing whose is whose."),
        "champion": ("champion", "Show each track's champion."),
        "history": ("champion", "List the champions of each track, today's first."),
        "promote": ("champion", "Promote a run that won and waits for approval."),
        "rollback": ("champion", "Let a former champion serve again."),
        "hook": ("champion", "Run hooks.after_promotion again for the champion that serves, as after a failure."),
        "export": ("handover.export", "Copy a track's champion to a folder."),
        "serve-hook": ("handover.serve_hook", "Let a server take the champion, and ask it."),
        "gc": ("maintenance", "Remove what nothing needs any more."),
        "backup": ("maintenance", "Back up database, drops and verdicts with their cards."),
        "restore": ("maintenance", "Put a backup in the place of the present database; no daemon may run."),
        "doctor": ("maintenance", "Look at database, disks, inbox, models and clock, and say what to mend."),
        "messages": ("maintenance", "List the messages that have not arrived."),
        "metrics": ("maintenance", "Print all metrics in Prometheus' text format, as /metrics of the page does."),
        "demo": ("demo.command", "Show the whole loop on a real small model."),
        "drops": ("drops", "List the files that were taken in, newest first."),
        "config": ("maintenance", "Show the settings in force and where each comes from, or check them."),
    }
)
#: The commands below a command, functions of its module.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"drops": ("accept", "withdraw", "restore"), "config": ("show", "check")}
)
