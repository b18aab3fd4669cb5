"""
A model as a folder: what has to be in it, read as if an enemy wrote it.

`manifest` says which model it is by the hashes of its files; the others read one kind of file each, within bounds.
Open `manifest` first.
"""
