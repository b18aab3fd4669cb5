"""
The web page and `/api/v1`: the views and actions of the command line, for browsers and programs.

In: requests; `security` refuses those from foreign pages, and changes without the token. Out: pages (`pages`, rendered
from `templates/`), JSON and events (`api`). Data comes from `daemon.views`; actions call the same functions as
the command line. It runs in a separate process, whose death does not affect training. Open `server` first.
"""
