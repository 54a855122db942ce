"""What the library costs, measured beside what it replaces.

    python -m benchmarks                     # everything, as a table: figure, target, reached
    python -m benchmarks stack server        # some of it
    python -m benchmarks --json              # one JSON object, keyed by benchmark
    python -m benchmarks --smoke             # that each of them runs; the figures mean nothing

Figures of one run are compared with each other, never with those of another machine. `timing` says how.
"""
