"""
Write the evidence card of a run: `report.json`, and a page that shows it and nothing else.

In: what the steps published, and the verdict. Out: two files that need no network. `write` gathers `facts`, `story` and
`next_steps` are the words, `figures` lays out tables and plots, `page` renders `templates/`. Open `write` first.
"""
