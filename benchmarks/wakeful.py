"""Keeps the machine's cores awake while two processes talk to each other.

    with wakeful():
        ...     # one waits for the other, again and again

A core without work sleeps, and a virtual machine's takes longer to wake than a store takes to decide: what is measured
then is the hypervisor. A process of the idle class on each core leaves every cycle to whoever wants one (`SCHED_IDLE`;
nothing is done where the system has no such class). Both sides of every ratio are measured under it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SPIN = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"


@contextmanager
def wakeful() -> Iterator[None]:
    """Without sleeping cores."""
    count = (os.cpu_count() or 1) if hasattr(os, "SCHED_IDLE") else 0
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
