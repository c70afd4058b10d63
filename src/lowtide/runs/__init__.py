"""Runs, looked at from outside: their files read, compared, and drawn as a page."""
