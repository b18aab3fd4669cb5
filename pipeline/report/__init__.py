"""
The evidence card of a run: `report.json`, and the page that shows it and nothing else.

In: what the steps published. `facts` is what is said, `story` words it, `tables` and `plots` lay it out, and `page`
renders `templates/`. Open `write` first.
"""
