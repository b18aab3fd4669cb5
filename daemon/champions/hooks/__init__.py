"""
Run the user's commands that notify a server, each at least once.

In: settings and rows. Out: processes, and their results in the rows. `changes` runs the commands after a change of
champion, `training` those that free the GPU for a run and give it back, `commands` one command in the background.
Open `changes` first.
"""
