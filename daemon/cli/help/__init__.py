"""
Examples at the end of each command's `--help`: whole commands that can be copied.

In: the commands. Out: their help. A command without one fails a test.
Open `examples`.
"""
