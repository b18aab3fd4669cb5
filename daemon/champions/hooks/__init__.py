"""
Run the user's commands, those that tell a server, and see to it that none is forgotten.

In: settings and rows. Out: processes, and what became of them. `changes` runs what follows on a change of champion,
`training` what frees the GPU for a run and gives it back, `commands` one command in the background.
Open `changes` first.
"""
