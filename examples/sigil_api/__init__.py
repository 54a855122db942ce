"""A whole service behind one `add_middleware` call: agents that run, remember and improve.

    python -m examples.sigil_api serve      # then paste one of the curl lines that it prints
    python -m examples.sigil_api tour       # see every policy at work, request by request

Read `policies.py` first: it is all that the library needs to be told. The rest is an ordinary FastAPI application.
"""
