"""
Room on the disk, and copies of it.

In: the state folder. Out: free bytes, or a backup. `disk` and `disk_estimate` say whether a run fits, `retention` what
has to stay, `garbage` finds what need not, `gc` deletes it; `backup` and `restore` copy a workspace out and in.
Open `retention` first.
"""
