"""
The web page and `/api/v1`: what the command line shows and does, for a browser and for programs.

In: requests, of which `security` lets through what comes from here and may do what it asks. Out: pages (`pages`, drawn
by `templates/`), JSON (`api`), events (`live`). What is shown is asked of `daemon.views`, what is done is done by the
functions that the command line calls. It is a process of its own: its death touches no training. Open `app` first.
"""
