"""
SQL queries that both the daemon (through `database.rows_of`) and commands (through `views.reader`) use.

Plain SQL, since SQLAlchemy takes longer to load than `dropforge status` takes for everything else.
"""

#: A track's champions, the base model first and the current one last.
CHAMPIONS = "SELECT * FROM promotion WHERE track = :track ORDER BY generation"

#: Condition for dismissals. A literal, so that SQLite uses the small index of these events.
IS_DISMISSAL = "kind = 'attention_dismissed'"

#: Condition for wins that wait for approval. A literal, so that SQLite uses the small index of these runs.
AWAITS_APPROVAL = "outcome = 'awaiting_approval'"

#: Condition for runs that may begin once their time has come.
MAY_BEGIN = "state IN ('queued', 'waiting') AND track NOT IN (SELECT name FROM track WHERE paused IS NOT NULL)"

#: Condition for runs that may begin now. Also if created a minute or more in the future: the clock was set back since.
#: (The intake may queue a run between the moment that `now` is and the query.)
IS_DUE = f"(not_before <= :now OR created_at > :now + 60000) AND {MAY_BEGIN}"

#: A row if a run of the track compared its candidate with the champion.
HAS_VERDICT = "SELECT 1 AS one FROM run WHERE track = :track AND outcome <> 'insufficient_evidence' LIMIT 1"

#: The choices of a run's blind review, oldest first: `daemon.champions.blind_review`.
CHOICES = "SELECT * FROM event WHERE run_id = :run AND kind = 'answer_chosen' ORDER BY id"

#: Hashes of a track's newest accepted drops of a role.
NEWEST_FILES = """
SELECT sha256 FROM "drop" WHERE track = :track AND role = :role AND state = 'accepted' ORDER BY id DESC LIMIT 20
"""

#: Rows of a track's accepted drops that can be held out, by role.
ACCEPTED_ROWS = """
SELECT role, sum(rows - selected) AS rows FROM "drop" WHERE track = :track AND state = 'accepted' GROUP BY role
"""

#: The event that recorded a drop; its detail has the findings.
TAKEN_IN = "SELECT * FROM event WHERE drop_id = :drop ORDER BY id LIMIT 1"

#: A track's last run that has prepared its data. One about a drop has not all of the track's drops.
PREPARED = """
SELECT id FROM run WHERE track = :track AND about_drop IS NULL AND EXISTS
(SELECT 1 FROM attempt WHERE run_id = run.id AND step = 'prepare' AND state = 'published') ORDER BY id DESC LIMIT 1
"""

#: The condition that selects the drops with new answers to old questions that a person may accept now.
NEW_ANSWERS = """
new_answers > 0 AND NOT answers_accepted AND state = 'accepted'
AND id NOT IN (SELECT drop_id FROM suspect WHERE ended IS NULL)
"""

#: The mean worth in points of the drops of one champion, that of a run that left out a drop, and their number.
MEAN_WORTH = """
SELECT avg(worth_points) AS points, count(*) AS drops
FROM run JOIN "drop" ON "drop".id = about_drop AND worth_run = run.id
WHERE about_champion = (SELECT about_champion FROM run WHERE id = :run)
"""

#: Of each night of a track's watch, oldest first: the former champion, and the drops on which the champion was worse
#: and better. A drop that was taken out does not count.
WATCHED = """
SELECT watch_former AS former, sum(watch_points < 0) AS worse, sum(watch_points > 0) AS better
FROM track JOIN "drop" ON "drop".track = track.name AND watch_run >= watch_since
WHERE track.name = :track AND "drop".state = 'accepted' GROUP BY watch_run ORDER BY watch_run
"""

#: The columns of `artifacts.Drop`.
_DROP = "sha256, name, 'drops/' || sha256 || '.jsonl' AS path, role, rows, records, answers_accepted"

#: The drops of a run's snapshot, in its order; NULL for what the database lacks.
SNAPSHOT = f"""
SELECT held.value AS id, {_DROP}
FROM run, json_each(run.snapshot) AS held LEFT JOIN "drop" ON "drop".id = held.value
WHERE run.id = :run ORDER BY held.key
"""  # noqa: S608 - our own words

#: The accepted drops of a run's track, from before the latest one of its snapshot, that are not in that.
ELDERS = f"""
SELECT "drop".id, {_DROP} FROM "drop" JOIN run ON run.track = "drop".track
WHERE run.id = :run AND "drop".state = 'accepted' AND "drop".id NOT IN (SELECT value FROM json_each(run.snapshot))
AND "drop".id < (SELECT max(value) FROM json_each(run.snapshot)) ORDER BY "drop".id
"""  # noqa: S608 - our own words

#: The accepted drops of a drop's track up to this one.
UP_TO = f"""
SELECT "drop".id, {_DROP} FROM "drop" WHERE state = 'accepted' AND id <= :drop
AND track = (SELECT track FROM "drop" WHERE id = :drop) ORDER BY id
"""  # noqa: S608 - our own words

#: The latest failed, crashed or cancelled run that used a drop since it last came in; none if a run is queued.
GAVE_BACK = """
SELECT run.id FROM run, json_each(run.snapshot) AS held
WHERE run.track = :track AND run.state IN ('failed', 'crashed', 'cancelled')
AND held.value = :drop
AND run.ended_at >=
    (SELECT max(at) FROM event WHERE drop_id = :drop AND kind IN ('drop_accepted', 'drop_restored'))
AND NOT EXISTS (SELECT 1 FROM run AS other WHERE other.track = run.track AND other.state = 'queued')
ORDER BY run.id DESC LIMIT 1
"""
