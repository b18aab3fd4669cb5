"""
Disk space of the state folder, and its backups.

In: the state folder. Out: free bytes, or a backup. `disk` and `disk_estimate` check whether a run fits, `retention`
lists the files to keep, `garbage` finds all others, `gc` deletes them; `backup` and `restore` copy a workspace out and
in. Open `retention` first.
"""
