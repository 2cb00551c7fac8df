"""A three-stage head with two exits in hand-written ONNX, and tails that misbehave on demand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from blindtail.bundle import EdgeBundle, ExitInfo, StageInfo
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, Layer, Quadratic
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec
from blindtail.preprocessing import Preprocessing
from blindtail.records import TailReply, TailTimings
from edge.tail import TailState, TailStatus, Ticket

FEATURES, CLASSES = 8, 4
SHAPE = (1, 2, 4)
NAMES = ("zero", "one", "two", "three")


def graph(weight: NDArray[np.float32]) -> bytes:
    """y = flatten(x) W as an ONNX model."""
    rows, columns = weight.shape
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], axis=1),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, None] if rows != FEATURES else None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])
    made = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def spec_of() -> TailSpec:
    return program().spec


@lru_cache
def program() -> Program:
    """A compiled tail 8-16-x^2-4 whose largest logit is that of the *darkest* of the first four pixels."""
    weight = np.zeros((16, FEATURES))
    weight[:CLASSES, :CLASSES] = -np.eye(CLASSES)
    bias = np.zeros(16)
    bias[:CLASSES] = 1.5
    last = np.zeros((CLASSES, 16))
    last[:, :CLASSES] = np.eye(CLASSES) * 4.0
    ones, zeros = np.ones(16), np.zeros(16)
    layers: list[Layer] = [
        Affine(weight, bias, "first"),
        Quadratic(ones, zeros, zeros, "square"),
        Affine(last, np.zeros(CLASSES), "last"),
    ]
    return compile_tail(layers, np.random.default_rng(0).uniform(0, 1, (64, FEATURES)))


def bundle_of(
    *,
    exits: tuple[int, ...] = (0, 1),
    cuts: tuple[int, ...] = (2,),
    dtype: str = "uint8",
    stages: int = 3,
    spec: TailSpec | None = None,
) -> EdgeBundle:
    """Stages are identities; an exit reads the first four pixels, scaled so that later exits are surer.

    The brighter one of the first four pixels, the surer every exit.
    """
    rng = np.eye(FEATURES, dtype=np.float32)
    graphs = {f"stage{i}": graph(rng) for i in range(stages)}
    for i in range(len(exits)):
        graphs[f"exit{i}"] = graph(np.eye(FEATURES, CLASSES, dtype=np.float32) * np.float32(4 * (i + 1)))
    return EdgeBundle(
        model="toy",
        version="1",
        preprocessing=Preprocessing(SHAPE, (0.0,), (1.0,), dtype),  # type: ignore[arg-type]
        class_names=NAMES,
        stages=tuple(StageInfo(f"stage{i}", 64, 256, (FEATURES,)) for i in range(stages)),
        exits=tuple(ExitInfo(f"exit{i}", after, 1.0, 32, 128, 0.9) for i, after in enumerate(exits)),
        cuts={cut: spec or spec_of() for cut in cuts},
        edge_budget={"macs": 100, "bytes": 1000},
        onnx=graphs,
    )


def image(label: int = 1, brightness: int = 60) -> NDArray[np.uint8]:
    """Bright in pixel `label`; below about 190 both exits stay unsure at 0.9."""
    pixels = np.zeros(SHAPE, dtype=np.uint8)
    pixels.reshape(-1)[label] = brightness
    return pixels


class NumberedTicket:
    """Its seed is its number."""

    def __init__(self, number: int) -> None:
        self.seed = number.to_bytes(64, "big")


class PlainCipher:
    """ "Encrypts" by writing floats down; the tail's answer is class 3 unless told otherwise.

    Tickets are numbered from 1 on; a container under one begins with its seed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, tickets: bool = True) -> None:
        self.encrypted = self.made = 0
        self.has_tickets = tickets
        self.used: list[bytes] = []

    def encrypt(
        self,
        activation: NDArray[np.float64],
        wait_s: float | None = None,
        ticket: Ticket | None = None,
        segment: int = 0,
    ) -> bytes:
        assert activation.shape == (FEATURES,)
        self.encrypted += 1
        if ticket is None:
            return activation.tobytes()
        assert ticket.seed not in self.used, "a second message under one ticket"
        self.used.append(ticket.seed)
        return ticket.seed + activation.tobytes()

    def ticket(self, wait_s: float | None = None) -> Ticket | None:
        if not self.has_tickets:
            return None
        self.made += 1
        return NumberedTicket(self.made)

    def decrypt(self, container: bytes, wait_s: float | None = None, segment: int = 0) -> NDArray[np.float64]:
        from blindtail.errors import ContainerError

        if len(container) != 8 * CLASSES:
            raise ContainerError("wrong length")
        return np.frombuffer(container)


def reply(label: int = 3, eval_s: float = 0.001) -> TailReply:
    logits = np.zeros(CLASSES)
    logits[label] = 9.0
    return TailReply(logits.tobytes(), TailTimings(0.0, eval_s, "fake"), eval_s)


@dataclass
class FakeTail:
    """A `Tail` whose `evaluate` is a function of the test's."""

    behave: Callable[[bytes, float | None], TailReply] = lambda _c, _r: reply()
    ready: bool = True
    cipher: PlainCipher | None = field(default_factory=PlainCipher)
    calls: list[float | None] = field(default_factory=list)
    spec: TailSpec = field(default_factory=spec_of)
    closed: bool = False
    waiting: list[Ticket] = field(default_factory=list)

    @property
    def tickets(self) -> int:
        return len(self.waiting)

    def take_ticket(self, cipher: object) -> Ticket | None:
        assert cipher is self.cipher
        return self.waiting.pop(0) if self.waiting else None

    def evaluate(self, container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
        self.calls.append(remaining_s)
        return self.behave(container, remaining_s)

    def status(self) -> TailStatus:
        return TailStatus(TailState.READY if self.ready else TailState.AWAY)

    def wait_ready(self, timeout_s: float) -> bool:
        return self.ready

    def close(self) -> None:
        self.closed = True
