"""
The commands that hand the champion over: `export` to a folder, `serve-hook` to a server.

In: arguments, and for `serve-hook` what the daemon tells its commands. Out: lines, and an exit code.
Open `serve_hook` first.
"""
