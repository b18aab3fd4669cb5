"""
Examples at the end of each command's `--help`: whole commands that can be copied.

In: the commands. Out: their help. `examples` has them all; a command without one fails a test.
"""
