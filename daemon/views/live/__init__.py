"""
What goes on now: for the full screen of the terminal and for the page.

In: the state folder. Out: values. `queue` has what waits, in its order, and which tracks are paused; `now`
all that a person who watches wants to see at once, `awaited` how something ended that is waited for. Open `now`.
"""
