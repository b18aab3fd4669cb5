"""Names in the state folder and the work folder that several modules share."""

DATABASE_NAME = "dropforge.db"
#: Held by the living daemon, with its process number as text.
LOCK_NAME = "daemon.lock"
#: Held by the running worker.
WORKER_LOCK = "spool/worker.lock"
#: Files in the inbox that were not taken, as the daemon last saw them; a hint for `dropforge status`.
WATCHER_NOTE = "watcher.json"
#: Current errors of tracks, hooks and collections, as the daemon last wrote them; a hint for `dropforge status`.
TROUBLES_NOTE = "troubles.json"
#: Exists while a run uses the GPU that a server freed for it: hooks.after_training must run, whatever happens.
GPU_NOTE = "gpu-lent.json"
#: Exists during a restore; no daemon starts while it exists.
RESTORING = "restoring.json"
#: Installation's id, in the state folder and the shared folder.
INSTANCE_NAME = "instance"
#: In the shared folder: host and state folder of the daemon that works there.
LEASE_NAME = "daemon.json"
#: Written while the shared folder is gone: a step that failed then is done again.
SHARE_GONE_NOTE = "share-gone"
#: Held while a collection moves files away, and while a result is published.
GC_LOCK_NAME = "gc.lock"
#: Folder of collected files that are about to be deleted.
TRASH_NAME = "trash"
#: Every folder that Dropforge makes in the state folder; others (`lost+found`, files of a person) are left alone.
FOLDERS = ("backups", "drops", "incoming", "models", "predictions", "runs", "spool", "tracks", TRASH_NAME)
