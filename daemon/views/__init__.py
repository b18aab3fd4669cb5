"""
Read-only answers for whoever asks: terminal, JSON, doctor.

In: the database, opened for reading, and what runs published. Out: plain objects. Nothing here changes anything.
Open `overview` first.
"""
