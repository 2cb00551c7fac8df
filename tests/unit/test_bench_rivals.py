"""Rivals in other interpreters, turns that interleave, and the nets that `bench he` runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench import he, interleave
from bench.peers import child
from bench.peers.child import Peer, PeerFailed
from bench.peers.protocol import Part, Task
from bench.rows import NET_FIELDS, check
from bench.tails import Client, Conv, dense_or_conv
from blindtail.errors import ConfigError
from blindtail.he.compiler import compile_tail
from blindtail.he.normal import normalised

FAKE = "tests.fake_rival"


def task(name: str = "net") -> Task:
    rng = np.random.default_rng(0)
    parts = (
        Part(rng.normal(size=(3, 4)), rng.normal(size=3)),
        Part(rng.normal(size=(2, 3)), rng.normal(size=2)),
    )
    return Task(name, parts, rng.normal(size=(5, 4)), 1, tuple(sorted(os.sched_getaffinity(0)))[:1])


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer("fake", sys.executable, task(), FAKE)
    yield made
    made.close()


def test_a_task_survives_its_folder(tmp_path: Path) -> None:
    given = task()
    given.write(tmp_path)
    got = Task.read(tmp_path)
    assert (got.name, got.threads, got.cores) == (given.name, given.threads, given.cores)
    assert np.array_equal(got.inputs, given.inputs)
    for a, b in zip(got.parts, given.parts, strict=True):
        assert np.array_equal(a.weight, b.weight)
        assert (a.stride, a.side) == (b.stride, b.side)


def test_a_rival_answers_run_by_run(peer: Peer) -> None:
    told = peer.description
    assert (told.system, told.uplink_bytes, told.key_bytes, told.reply_bytes) == ("clear 1.0", 100, 200, 300)
    assert len(told.encrypt_s) == len(told.decrypt_s) == 5
    given = task()
    for index in (0, 4):
        seconds, logits = peer.run(index, 3)
        assert len(seconds) == 3
        first, second = given.parts
        hidden = first.weight @ given.inputs[index] + first.bias
        assert np.allclose(logits, second.weight @ hidden**2 + second.bias)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", "RuntimeError: no layout fits"),
        ("slow", "no answer within 0.5 s"),
        ("gone", "it has ended: the last word"),
    ],
)
def test_a_rival_that_fails_says_so_in_one_line(name: str, says: str) -> None:
    with pytest.raises(PeerFailed) as failed:
        Peer("fake", sys.executable, task(name), FAKE, prepare_s=0.5 if name == "slow" else 60.0)
    assert says in str(failed.value)
    assert len(str(failed.value).splitlines()) == 1


def test_a_rival_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="cannot be run"):
        Peer("fake", str(tmp_path / "python"), task(), FAKE)


def test_a_rival_that_fails_on_the_way_is_left_out() -> None:
    made = Peer("fake", sys.executable, task("flaky"), FAKE)
    try:
        made.run(0)
        left: list[str] = []
        seconds = interleave.interleaved(
            {"ours": interleave.clocked(lambda _: None), "fake": lambda i, n: made.run(i, n)[0]},
            failed=lambda name, error: left.append(f"{name}: {error}"),
            expected=PeerFailed,
        )
    finally:
        made.close()
    assert left == ["fake: MemoryError: out of memory"]
    assert list(seconds) == ["ours"]
    assert len(seconds["ours"]) >= interleave.ROUNDS


def test_turns_interleave_and_rotate() -> None:
    turns: list[str] = []

    def run_of(name: str, seconds: float) -> interleave.Run:
        def run(index: int, times: int) -> list[float]:
            turns.append(name)
            return [seconds] * times

        return run

    runs = {"fast": run_of("fast", 0.001), "middle": run_of("middle", 0.7), "slow": run_of("slow", 1.5)}
    seconds = interleave.interleaved(runs)
    assert {name: len(found) for name, found in seconds.items()} == {"fast": 100, "middle": 20, "slow": 3}
    later = turns[3:]  # after the first run of each
    slow = [i for i, name in enumerate(later) if name == "slow"]
    assert slow[0] < len(later) / 2 < slow[-1], "spread over the whole time"
    assert {later[i : i + 2][0] for i in range(0, 8, 2)} == {"fast", "middle"}, "the order rotates"


def test_nets_and_peers_are_checked() -> None:
    assert he.names(None) == list(he.NETS)
    assert he.names("C, demo") == ["C", "demo"]
    with pytest.raises(ConfigError, match="no net 'F'"):
        he.names("A,F")
    assert he.parse_peers(["orion-v2=/x/python"]) == {"orion-v2": "/x/python"}
    for wrong in ("orion-v2", "orion-v2=", "tenseal=/x/python"):
        with pytest.raises(ConfigError, match="NAME=PYTHON"):
            he.parse_peers([wrong])


def test_the_convolution_is_folded_as_it_is_written() -> None:
    net = dense_or_conv("A")
    conv = net.parts[0]
    assert isinstance(conv, Conv)
    folded = normalised(net.layers).maps
    assert [m.weight.shape for m in folded] == [(256, 784), (64, 256), (10, 64)]
    image = net.inputs[0].reshape(28, 28)
    windows = np.lib.stride_tricks.sliding_window_view(image, (7, 7))[::3, ::3]
    want = np.einsum("ijkl,okl->oij", windows, conv.weight[:, 0]) + conv.bias[:, None, None]
    assert np.allclose(folded[0](net.inputs[:1]).reshape(4, 8, 8), want)


def test_one_key_set_serves_several_backends() -> None:
    net = dense_or_conv("B")
    parts = [np.ascontiguousarray(net.parts[0].weight[:16, :32]), net.parts[0].bias[:16]]
    from blindtail.he.layers import Affine

    layers = [Affine(parts[0], parts[1])]
    x = net.inputs[:2, :32]
    client = Client.of(compile_tail(layers, x), "auto", "seal")
    request = client.encryptor.encrypt(x[0])
    want = normalised(layers)(x[:1])[0]
    for backend in client.loaded:
        assert np.allclose(client.decryptor.decrypt(client.evaluate(backend, request)), want, atol=1e-3)
    assert client.evaluator is next(iter(client.loaded.values()))[0]


def test_rows_of_a_net_with_a_rival(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(child.PEERS, "fake", FAKE)
    monkeypatch.setitem(child.PEERS, "absent", FAKE)
    peers = [f"fake={sys.executable}", "absent=/nowhere/python"]
    before = os.sched_getaffinity(0)
    rows = he.rows(argparse.Namespace(quick=True, threads=1, nets="demo", peer=peers))
    for row in rows:
        check(row)
    by_backend = {row["backend"]: row for row in rows if "backend" in row}
    assert {"seal", "fake"} <= set(by_backend)
    assert all(row["eval_s"] == row["value"] for row in by_backend.values())
    assert by_backend["fake"]["max_abs_err"] < 1e-9, "it computes the same net"
    assert by_backend["fake"]["uplink_bytes"] == 100
    assert all(set(NET_FIELDS) <= set(row) for row in by_backend.values())
    names = " ".join(row["name"] for row in rows)
    for part in ("uplink", "evaluation keys", "reply", "encrypt and pack", "decrypt", "amortised", "noise"):
        assert part in names
    assert "absent left out" in capsys.readouterr().err
    assert os.sched_getaffinity(0) == before, "it pins itself for the time of its run alone"
