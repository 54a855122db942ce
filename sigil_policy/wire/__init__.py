"""Header grammar as pure functions and values: no IO, no ASGI; each file names its RFC."""
