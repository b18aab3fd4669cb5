"""
Files brought by a browser: they go into the inbox as `dropforge submit` puts them there.

The form is POST /upload, multipart: `file` (one or more), `track`, `heldout` (there, or not). `done.html` answers it.
"""

from fastapi import APIRouter

router = APIRouter(tags=["act"])
forms = APIRouter()
