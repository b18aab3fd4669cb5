"""
Disk space of the state folder, and its backups.

In: the state folder. Out: free bytes, or a backup. `disk` and `disk_estimate` check whether a run fits, `retention`
lists the files to keep, `gc` finds all others and deletes them; `backup` and `restore` copy a workspace out and in
(`rebuild`: the rows). Open `retention` first.
"""
