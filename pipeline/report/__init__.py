"""
The evidence card of a run: `report.json`, and the page that shows it and nothing else.

In: what the steps published. `facts` is what is said, `story` words it, `page` shows it. Open `write` first.
"""
