"""One program in another's place: a new tail for devices that hold an older edge.bt.

Two programs are compatible when an edge cannot tell them apart: same parameters,
same layout and scale going in, same keys at the same levels, same form coming
out. Then the new one can answer what was encrypted for the old one, with the
same evaluation keys, under the old one's id.
"""

from __future__ import annotations

from dataclasses import fields, replace

from blindtail.errors import ProgramMismatch
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec

#: What may differ: what depends on the weights and is no part of the wire.
_OWN = {"predicted_noise", "predicted_worst_noise", "input_bound", "program_id"}


def differences(ours: TailSpec, theirs: TailSpec) -> list[str]:
    """Names of the fields in which two tails differ for an edge; empty = compatible."""
    names = (f.name for f in fields(TailSpec) if f.name not in _OWN)
    found = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    # The segments of a refreshed tail belong together: one alone takes no other's place.
    chained = ours.segment is not None or theirs.segment is not None
    if chained and ours.program_id != theirs.program_id and "segment" not in found:
        found.append("segment")
    return found


def serving_as(program: Program, spec: TailSpec) -> Program:
    """`program`, answering what was encrypted for `spec`. Raises `ProgramMismatch`."""
    if program.spec.program_id == spec.program_id:
        return program
    differing = differences(program.spec, spec)
    if differing:
        raise ProgramMismatch(
            f"the new tail differs for devices in {', '.join(differing)}: compile it for their edge.bt "
            "(`like`), or hand out its own edge.bt"
        )
    return Program(replace(program.spec, program_id=spec.program_id), program.ops)


__all__ = ["differences", "serving_as"]
