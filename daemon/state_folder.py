"""Names in the state folder that several modules share."""

DATABASE_NAME = "dropforge.db"
#: Held by the living daemon, with its process number as text.
LOCK_NAME = "daemon.lock"
#: What the inbox holds that was not taken, as the daemon last saw it; a hint for `dropforge status`.
WATCHER_NOTE = "watcher.json"
#: There while a restore is under way; no daemon starts beside it.
RESTORING = "restoring.json"
