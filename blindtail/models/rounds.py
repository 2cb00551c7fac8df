"""Which operation of a tail runs where, when the edge may decrypt between round trips.

Every operation that an activation goes into is placed as early as it can be:

- *encrypted*, in segment k: linear layers with weights, squares of what is encrypted, and
  whatever linear stands between them;
- *at the edge*, after k round trips: what no polynomial computes and needs no weight (ReLU, max
  pooling, a product of two activations), and linear steps without weights on values that the
  edge knows by then.

An encrypted value is known at the edge after its segment, if anybody asks for it there. A sum
with an earlier value (a residual) is the edge's where what follows is the edge's too, so
that it costs no ciphertext; else the earlier value goes into the segment beside its input.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from blindtail.errors import ModelError
from blindtail.he.spec import MOST_SEGMENTS
from blindtail.models import operation_names as names
from blindtail.models.network import Network
from blindtail.models.operation_names import name_of
from blindtail.models.plans import is_number
from blindtail.models.rulings import Effect
from blindtail.models.tracing import attribute

_ALSO_BAD = frozenset({"setitem", *names.RANDOM})
_WEIGHTS = (
    "holds weights of its own, and a refreshed tail's weights stay in the cloud: use it without them "
    "(ReLU or LeakyReLU for PReLU, affine=False for a norm), or cut the network after it"
)


@dataclass
class Rounds:
    """Where each operation of a tail runs.

    place  segment of an encrypted operation, None for one at the edge
    known  round trips after which the edge knows a value, if it asks for it
    again  encrypted values that are decrypted and encrypted again wherever they are used
    growing  linear steps at the edge, without weights, that give no fewer values than they take
    """

    network: Network
    place: dict[fx.Node, int | None] = field(default_factory=dict)
    known: dict[fx.Node, int] = field(default_factory=dict)
    again: set[fx.Node] = field(default_factory=set)
    growing: set[fx.Node] = field(default_factory=set)

    @property
    def source(self) -> fx.Node:
        """The activation at the cut."""
        return self.network.inputs[0]

    @property
    def segments(self) -> int:
        return 1 + max((s for s in self.place.values() if s is not None), default=-1)

    def own(self, node: fx.Node, segment: int) -> bool:
        """Whether a value is a segment's, encrypted, and used there as it is."""
        return self.place[node] == segment and node not in self.again

    def inside(self, node: fx.Node, segment: int) -> bool:
        """Whether a segment computes a value itself, for its own use.

        What the edge could do before it encrypts is folded into the first map where it would
        only make the ciphertext's values more (padding, upsampling) or move them, and all that
        comes before the first segment.
        """
        if self.own(node, segment):
            return True
        if self.place[node] is not None or node is self.source:
            return False
        return node in self.growing or (segment == 0 and self.known[node] == 0)

    def inputs(self, segment: int) -> list[fx.Node]:
        """Values that the edge encrypts for a segment, in the order of the network."""
        found: set[fx.Node] = set()
        waiting = [n for n, at in self.place.items() if at == segment]
        seen = set(waiting)
        while waiting:
            for source in self.live_inputs(waiting.pop()):
                if not self.inside(source, segment):
                    found.add(source)
                elif source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return self._ordered(found)

    def outputs(self, segment: int) -> list[fx.Node]:
        """Values of a segment that the edge decrypts, in the order of the network."""
        own = [n for n, at in self.place.items() if at == segment]
        return self._ordered({n for n in own if n in self.again or any(self._leaves(n, u) for u in n.users)})

    def _leaves(self, node: fx.Node, user: fx.Node) -> bool:
        if user.op == "output":
            return node is self.network.output
        return user in self.place and self.place[user] != self.place[node]

    def live_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.place]

    def _ordered(self, nodes: Collection[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=self.network.order.__getitem__)


def place(network: Network, at: Collection[str] = ()) -> Rounds:
    """Place every operation. `at`: names of layers whose result is decrypted and encrypted again.

    Raises `ModelError` naming the layer that can run on neither side, and what to write instead.
    """
    if network.unsteady:
        raise ModelError(f"the tail's forward {network.unsteady}: leave the batch alone")
    if not network.plain_output or len(network.inputs) != 1:
        raise ModelError("a refreshed tail takes one activation and returns one tensor of logits")
    made = Rounds(network)
    made.place[made.source], made.known[made.source] = None, 0
    unknown = set(at)
    for node in network.nodes:
        if node not in network.live or node not in network.reaching or node is made.source:
            continue
        if is_number(node.meta["value"]):
            continue
        _place_one(made, node)
        if (named := unknown & network.known_as(node)) and made.place[node] is not None:
            made.again.add(node)
            unknown -= named
    if unknown:
        raise ModelError(f"there is no encrypted layer {', '.join(sorted(unknown))} to refresh after")
    if made.segments == 0:
        raise ModelError("nothing of this tail needs the cloud: it holds no weights")
    if made.segments > MOST_SEGMENTS:
        raise ModelError(f"this tail needs {made.segments} round trips, at most {MOST_SEGMENTS}: cut later")
    return made


def _place_one(made: Rounds, node: fx.Node) -> None:
    network, ruling = made.network, made.network.rulings[node]
    sources, weighty = made.live_inputs(node), _weighty(network, node)
    where = network.told(node)
    if str(node.target) in network.opaque:
        raise ModelError(f"tail layer {where}: {ruling.reason}; {ruling.advice}")
    if ruling.effect is Effect.REFUSED:
        batch = not _keeps_apart(node) or name_of(node) in _ALSO_BAD
        if batch:
            raise ModelError(f"tail layer {where}: cannot run in a refreshed tail, it {ruling.reason}")
        if weighty:
            raise ModelError(f"tail layer {where}: {ruling.reason}, and it {_WEIGHTS}")
        _at_edge(made, node, sources)
        if made.known[node] == 0:
            raise ModelError(
                f"tail layer {where}: comes before any layer with weights: cut the network after it, so "
                "that the head does it"
            )
        return
    encrypted = [s for s in sources if made.place[s] is not None and s not in made.again]
    if not weighty and not encrypted:
        _at_edge(made, node, sources)
        if ruling.effect is Effect.LINEAR and len(sources) == 1 and _grows(node, sources[0]):
            made.growing.add(node)
        return
    segment = max(_segment_of(made, s) for s in sources)
    apart = any(not made.own(s, segment) for s in sources)
    if not weighty and apart and ruling.effect is Effect.LINEAR and _edge_follows(network, node):
        _at_edge(made, node, sources)
        return
    made.place[node], made.known[node] = segment, segment + 1


def _at_edge(made: Rounds, node: fx.Node, sources: list[fx.Node]) -> None:
    made.place[node], made.known[node] = None, max(made.known[s] for s in sources)


def _grows(node: fx.Node, source: fx.Node) -> bool:
    sizes = [n.meta["value"] for n in (node, source)]
    return all(isinstance(s, torch.Size) for s in sizes) and width(node) >= width(source)


def _segment_of(made: Rounds, node: fx.Node) -> int:
    """The first segment that can use a value."""
    at = made.place[node]
    return made.known[node] if at is None or node in made.again else at


def _edge_follows(network: Network, node: fx.Node) -> bool:
    """Whether all that uses a value, past steps without weights, is the edge's, or the end."""
    for user in node.users:
        if user.op == "output":
            continue
        if user not in network.live or user not in network.reaching:
            continue
        ruling = network.rulings[user]
        if ruling.effect is Effect.REFUSED:
            continue
        if ruling.effect is Effect.SQUARE or _weighty(network, user) or not _edge_follows(network, user):
            return False
    return True


def _weighty(network: Network, node: fx.Node) -> bool:
    """Whether an operation uses numbers of the owner's: parameters, statistics, constant tensors."""
    module = network.module(node)
    if module is not None:
        return any(t.numel() > 0 for t in module.state_dict().values())
    return any(_holds_weights(network, n) for n in node.all_input_nodes if n not in network.live)


def _holds_weights(network: Network, node: fx.Node) -> bool:
    if node.op == "get_attr":
        value: Any = attribute(network.root, str(node.target))
        return isinstance(value, Tensor) and (value.numel() > 1 or value.requires_grad)
    return any(_holds_weights(network, n) for n in node.all_input_nodes if n not in network.live)


def _keeps_apart(node: fx.Node) -> bool:
    from blindtail.models.network import keeps_batch

    return keeps_batch(node.meta["value"], node.meta["third"])


def width(node: fx.Node) -> int:
    """Values of one image."""
    return math.prod(shape(node))


def shape(node: fx.Node) -> tuple[int, ...]:
    """Of one image. Raises `ModelError` for several tensors at once."""
    value = node.meta["value"]
    if not isinstance(value, torch.Size):
        raise ModelError(f"{node.name}: gives several tensors at once, which cannot cross to the edge")
    return tuple(int(n) for n in value[1:])


def offsets(nodes: list[fx.Node]) -> Iterator[tuple[fx.Node, int, int]]:
    """(node, from, to) of each in a flat vector of all of them."""
    at = 0
    for node in nodes:
        yield node, at, at + width(node)
        at += width(node)


__all__ = ["Rounds", "offsets", "place", "shape", "width"]
