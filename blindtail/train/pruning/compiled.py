"""Pruned tails, compiled: in the order in which they were pruned, for activations in their own order.

What the units of a tail are called costs nothing: the orders of its input and of its logits go
into the layouts at the cut and of the reply, those between its maps vanish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blindtail.errors import ModelError
from blindtail.he import plan, precision, schedule
from blindtail.he.compiler import compile_plan, compile_tail
from blindtail.he.dataflow import finish
from blindtail.he.elementwise import Op
from blindtail.he.layers import Affine, FloatArray, Layer, Polynomial
from blindtail.he.layout import Layout
from blindtail.he.objective import NoPlan, Objective
from blindtail.he.operations import MapOp, Term
from blindtail.he.plan import Plan
from blindtail.he.program import Program
from blindtail.he.sparse import Sparse, Weight
from blindtail.progress import Span
from blindtail.train.pruning.groups import IntArray


def plan_for(layers: Sequence[Layer], *, lanes: int = 1, objective: Objective | None = None) -> Plan:
    """The plan whose diagonals a tail is pruned by: the objective's or, without one, the fastest
    within the compiler's usual budget of keys. Raises `ModelError`, `NoPlan` among them.
    """
    if objective is not None:
        return plan.best(layers, objective, lanes=lanes)
    fastest = plan.best(layers, Objective(), lanes=lanes)
    budget = schedule.default_budget(fastest.parameters)
    try:
        return plan.best(layers, Objective(at_most={"key_bytes": float(budget)}), lanes=lanes)
    except NoPlan:
        return plan.best(layers, Objective({"key_bytes": 1.0}), lanes=lanes)


def ordered(layers: Sequence[Layer], elements: Sequence[IntArray]) -> list[Layer]:
    """The folded tail with its elements in these orders: before the first map, and after each."""
    found: list[Layer] = []
    at = 0
    for layer in layers:
        if isinstance(layer, Affine):
            rows, columns = elements[at + 1], elements[at]
            weight = np.asarray(layer.weight)[np.ix_(rows, columns)]
            found.append(Affine(weight, layer.bias[rows], layer.name))
            at += 1
        elif isinstance(layer, Polynomial):
            found.append(replace(layer, coefficients=layer.coefficients[:, elements[at]]))
        else:
            here = elements[at]
            found.append(replace(layer, a=layer.a[here], b=layer.b[here], c=layer.c[here]))
    return found


def renamed(program: Program, before: IntArray, after: IntArray) -> Program:
    """The program that takes element `before[i]` where this one takes i, and gives `after[i]` for its i.

    Layouts and the names of rows and columns change, and no operation. Raises `ModelError`
    when these are no orders, or when an operation other than a map reads the input.
    """
    made = list[Op]()
    for index, op in enumerate(program.ops):
        # Values are the inputs, then one of each operation; the last operations are the result.
        reads = [back > index for back in op.backs]
        if isinstance(op, MapOp):
            terms = [
                _with_inputs(term, before) if reading else term
                for term, reading in zip(op.terms, reads, strict=True)
            ]
            first = terms[0]
            op = replace(op, weight=first.weight, in_layout=first.in_layout, others=tuple(terms[1:]))
            made.append(_with_results(op, after) if index in program.results else op)
        elif any(reads):
            raise ModelError(f"{op.name}: reads the input, whose order only a map can take up")
        else:
            made.append(op)
    layout = _renamed(program.spec.input_layout, before)
    draft = replace(program.spec, input_layout=layout, keys=(), program_id="0" * 64)
    return Program(finish(tuple(made), draft), tuple(made))


def _with_inputs(term: Term, order: IntArray) -> Term:
    """A map's operand with the elements of its columns renamed."""
    _check(order, term.weight.shape[1])
    weight = term.weight
    if isinstance(weight, Sparse):
        renamed = Sparse.unordered(weight.shape, weight.rows, order[weight.columns], weight.values)
        return replace(term, weight=renamed, in_layout=_renamed(term.in_layout, order))
    return replace(term, weight=weight[:, np.argsort(order)], in_layout=_renamed(term.in_layout, order))


def _with_results(op: MapOp, order: IntArray) -> MapOp:
    """A map that gives a part of the result, with the elements of its rows renamed."""
    _check(order, len(op.bias))
    inverse = np.argsort(order)
    terms = [replace(term, weight=_rows(term.weight, order)) for term in op.terms]
    return replace(
        op,
        weight=terms[0].weight,
        others=tuple(terms[1:]),
        bias=op.bias[inverse],
        rows=_names(op.rows, order).astype(np.int32),
        out_layout=_renamed(op.out_layout, order),
    )


def _rows(weight: Weight, order: IntArray) -> Weight:
    if isinstance(weight, Sparse):
        return Sparse.unordered(weight.shape, order[weight.rows], weight.columns, weight.values)
    return weight[np.argsort(order)]


def _check(order: IntArray, width: int) -> None:
    if not np.array_equal(np.sort(order), np.arange(width)):
        raise ModelError("an order names each element once")


def _renamed(layout: Layout, order: IntArray) -> Layout:
    real = tuple(_names(layout.index, order).tolist())
    if layout.imaginary is None:
        return replace(layout, content=real)
    other = _names(np.asarray(layout.imaginary), order)
    return replace(layout, content=real, imaginary=tuple(other.tolist()))


def _names(held: Any, order: IntArray) -> Any:
    """Elements renamed; zero and undefined slots stay."""
    return np.where(held >= 0, order[np.maximum(held, 0)], held)


@dataclass(frozen=True, eq=False)
class Arranged:
    """How a pruned tail is compiled: the plan that its groups come from, and its orders.

    made  None where groups were tiles: the compiler then arranges the tail as any other
    """

    made: Plan | None
    elements: tuple[IntArray, ...]
    lanes: int = 1
    objective: Objective | None = None

    def compile(
        self,
        layers: Sequence[Layer],
        calibration: FloatArray,
        span: Span | None = None,
        margins: FloatArray | None = None,
    ) -> Program:
        """The folded tail, with activations at the cut (n, features) in their own order.

        In the order it was pruned in, by the plan it was pruned for or by what the compiler finds there;
        or in its own order, when that is predicted to be better.

        margins  as for `compile_tail`, in their own order

        Raises `ModelError` as `compile_tail` does.
        """
        if self.made is None:
            return self._any(layers, calibration, Span.of(span), margins)
        whole = Span.of(span)
        own, *others = whole.parts(1, 1, 1)
        found = [self._any(layers, calibration, own.named("in its own order: "), margins)]
        first, last = self.elements[0], self.elements[-1]
        inside, values = ordered(layers, self.elements), calibration[:, first]
        planned, free = (part.named("as it was pruned: ") for part in others)
        if self.objective is None or not precision.wanted(self.objective):  # else nobody knows its errors
            found.append(renamed(compile_plan(inside, values, self.made, progress=planned), first, last))
        told = None if margins is None else margins[:, first]
        found.append(renamed(self._any(inside, values, free, told), first, last))
        return whole.ended(min(found, key=self._value))

    def _any(
        self, layers: Sequence[Layer], calibration: FloatArray, span: Span, margins: FloatArray | None
    ) -> Program:
        """By what the compiler finds."""
        return compile_tail(
            layers,
            calibration,
            lanes=self.lanes,
            objective=self.objective,
            margins=margins,
            progress=span,
        )

    def _value(self, program: Program) -> float:
        costs = plan.costs_of(program)
        return costs.total_s if self.objective is None else self.objective.value(costs)


def counted(program: Program) -> Mapping[str, Any]:
    """What of a program's work depends on its zeros."""
    maps = [op for op in program.ops if isinstance(op, MapOp)]
    costs = plan.costs_of(program)
    return {
        "diagonals": sum(len(op.diagonals) for op in maps),
        "rotations": sum(row["rotations"] for row in program.op_summary("native")),
        "keys": len(program.spec.keys),
        "key_bytes": costs.key_bytes,
        "memory_bytes": costs.memory_bytes,
        "predicted_s": costs.total_s,
    }


__all__ = ["Arranged", "counted", "ordered", "plan_for", "renamed"]
