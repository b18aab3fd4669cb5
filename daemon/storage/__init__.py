"""
Room on the disk, and copies of it.

`disk` and `disk_estimate` say whether there is room, `retention` what has to stay, `gc` deletes the rest; `backup` and
`restore` copy a workspace out and in. Open `retention` first.
"""
