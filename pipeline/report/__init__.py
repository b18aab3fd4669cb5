"""
Write the evidence card of a run: `report.json`, and a page that shows it and nothing else.

In: what the steps published, and the verdict. Out: two files that need no network. `facts` is what is said, `story`
words it, `examples` picks the answers, `tables` and `plots` lay it out, `page` renders `templates/`. Open `write`
first.
"""
