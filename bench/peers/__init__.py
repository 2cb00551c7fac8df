"""Programs that `bench he` runs in other interpreters, and the lines they exchange with it.

A child is `PYTHON -m bench.peers.NAME FOLDER`. FOLDER holds a net (`protocol.Task`). The
child prepares and writes one JSON line that describes it; then, for each line that asks
for a run, it evaluates and answers with one line. Only it and we are alive meanwhile, and
only one of us works, so that rivals and we take turns on the same core. Children use
the standard library, numpy and their rival alone.
"""
