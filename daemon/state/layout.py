"""Names in the state folder that several modules share."""

DATABASE_NAME = "dropforge.db"
#: Held by the living daemon, with its process number as text.
LOCK_NAME = "daemon.lock"
#: Held by the running worker.
WORKER_LOCK = "spool/worker.lock"
#: What the inbox holds that was not taken, as the daemon last saw it; a hint for `dropforge status`.
WATCHER_NOTE = "watcher.json"
#: What tracks, hooks and collections have run into, as the daemon last said it; a hint for `dropforge status`.
TROUBLES_NOTE = "troubles.json"
#: There while a run has the GPU that a server lent it: hooks.after_training is due, whatever happens.
GPU_NOTE = "gpu-lent.json"
#: There while a restore is under way; no daemon starts beside it.
RESTORING = "restoring.json"
#: Held while a collection moves files away, and while a result is published.
GC_LOCK_NAME = "gc.lock"
#: What was collected and is about to be deleted.
TRASH_NAME = "trash"
#: Every folder that Dropforge makes in it; others (`lost+found`, what a person keeps there) are none of its business.
FOLDERS = ("backups", "drops", "incoming", "models", "predictions", "runs", "spool", "tracks", TRASH_NAME)
