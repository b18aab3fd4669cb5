"""README.txt: what may be dropped into a folder of the inbox and how it is answered, by the settings in force."""

from daemon.inbox.answers.remarks import begins_when, rows_for_verdict
from daemon.inbox.answers.wanted import WANTED
from daemon.settings.model import IntakeSettings, Settings, TrackSettings
from pipeline.records.validate import Options
from pipeline.words import count, size_words

README = "README.txt"


def readme_text(settings: Settings, track: str, metric: str | None = None) -> str:
    """Return the text for the folder of `track`, which is judged by `metric`; `None`: not known yet."""
    intake, own = settings.intake, settings.track(track)
    below, top = ("", "") if track == "default" else (f"{track}/", "../")
    return f"""\
This is the inbox of track {track}: drop files of training records here.

WHAT TO DROP
A file that ends in .jsonl or .json, in UTF-8, a record a line:

  {{"instruction": "...", "input": "...", "output": "..."}}

"input" may be left out. "tags": ["one", "two"] and "category": "one" name the
kinds that scores are given for. Other keys are not used.
A file has at most {size_words(intake.max_bytes)}, a line {size_words(Options().max_line_bytes)}.
"dropforge check FILE" tells beforehand what is wrong with a file.

{_what_judges(own, metric)}

HOW IT IS ANSWERED
A file is taken once it has not changed for {intake.settle_seconds:g} s. It then lies in

  {top}done/{below}       taken; beside it NAME.receipt.json with its number, and
              NAME.verdict.txt: what became of it, replaced when that changes
  {top}rejected/{below}   given back; beside it NAME.errors.json with line, field and
              remedy of each finding: mend the file and drop it again

(in a folder ~USER there, which only you can read, if you are not the user that
Dropforge runs as). {_bad_rows(intake)}

A file that cannot be taken stays here; NAME.waits.txt beside it says why.

The next run of this track {begins_when(settings, track)}.
{WANTED}, where there is one, lists the kinds of rows that would help most.
"""


def _what_judges(own: TrackSettings, metric: str | None) -> str:
    never = "Records that are dropped into heldout/ are never trained on"
    needed = f"No model gets a verdict before\n{rows_for_verdict(own, metric)}."
    if own.gate.on == "pinned":
        return f"{never}:\nthe models are judged on them. {needed}"
    return f"{never}.\nThe models are judged on a share of each drop. {needed}"


def _bad_rows(intake: IntakeSettings) -> str:
    if intake.on_bad_rows == "reject":
        return "One bad row, and the whole file is given back."
    most = f"{count(intake.max_bad_rows, 'bad row')} ({intake.max_bad_percent:g} % of the rows)"
    return f"Up to {most} are left out;\nwith more, the whole file is given back."
