"""A refreshed tail with a segment over several ciphertexts, through a real cell over gRPC."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.he.native_backend import available
from blindtail.models.pack import pack
from blindtail.models.refresh import Refresh
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing
from blindtail.wire import TicketOffer, TicketsTaken
from cloud.gateway import Gateway
from cloud.local import LocalCell
from edge.executor import softmax
from edge.runtime import EdgeRuntime
from edge.session import RemoteTail

SHAPE, CLASSES = (1, 64, 64), 4


@functools.cache
def model() -> SplitModel:
    torch.manual_seed(3)
    tail = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten(), nn.Linear(64, CLASSES)
    )
    made = SplitModel(
        "wide",
        [nn.Identity()],
        {0: nn.Sequential(nn.MaxPool2d(8), nn.Flatten(), nn.Linear(64, CLASSES))},
        {0: tail},
        Preprocessing(SHAPE, (0.5,), (0.25,)),
        [f"class {i}" for i in range(CLASSES)],
    )
    return made.eval()


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


@functools.cache
def packed() -> tuple[EdgeBundle, CloudBundle]:
    return pack(
        model(),
        images(12),
        temperatures=(1.0,),
        thresholds=(0.9,),
        metrics={},
        version="1",
        refresh=Refresh(ring_degree=4096),
    )


@torch.no_grad()
def expected(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Logits (n, classes) of the network itself."""
    x: Tensor = torch.from_numpy(model().preprocessing.apply(pixels))
    return model().tails["0"](x).double().numpy()  # type: ignore[no-any-return]


@pytest.mark.skipif(not available(), reason="the native extension was not built")
def test_a_segment_of_two_ciphertexts_in_and_out_is_answered_and_takes_no_tickets(tmp_path: Path) -> None:
    specs, pixels = packed()[0].segments(0), images(3, seed=5)
    assert [(s.input_ciphertexts, s.output_ciphertexts) for s in specs] == [(2, 2), (1, 1)]
    packed()[1].save(tmp_path / "cloud.bt")
    with (
        LocalCell([tmp_path / "cloud.bt"], backend="native", state_dir=tmp_path / "cloud") as cell,
        EdgeRuntime.open(
            packed()[0],
            cell.address,
            credentials="insecure-loopback",
            policy="cloud-only",
            state_dir=tmp_path / "edge",
            backend="seal",
        ) as edge,
    ):
        assert edge.wait_ready(60), edge.status()
        answers = [edge.infer(image, deadline_s=20) for image in pixels]
        gateway = cell.gateway
        (tail,) = edge._tails.values()
        assert gateway is not None
        assert isinstance(tail, RemoteTail)
        assert tail._place is not None
        session = tail._place.session
        assert session is not None
        held = gateway.sessions._all[session]
        identity = held.identity
        # Tickets of another program would be made here.
        assert gateway.ahead._on
        entry = gateway.registry.find(held.model, held.version, held.program_id)
        assert gateway.registry.answers_itself(entry)
        offer = TicketOffer(session, tuple(os.urandom(64) for _ in range(3)))
        taken = cell.call(lambda: _offered(gateway, identity, offer))
        again = edge.infer(pixels[0], deadline_s=20)
    assert taken == TicketsTaken(0, 0)
    assert len(gateway.ahead.book) == 0
    for answer, logits in zip([*answers, again], expected(pixels[[0, 1, 2, 0]]), strict=True):
        assert (answer.route, answer.fallback) == ("tail", None)
        assert answer.label == int(logits.argmax())
        np.testing.assert_allclose(answer.probabilities, softmax(logits), atol=0.01)
        assert answer.uplink_bytes == sum(s.uplink_bytes for s in specs)
        assert answer.reply_bytes == sum(s.reply_bytes for s in specs)
        assert answer.extra["round_trips"] == 2


async def _offered(gateway: Gateway, identity: str, offer: TicketOffer) -> TicketsTaken:
    return gateway.tickets(identity, offer)
