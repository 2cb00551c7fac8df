"""An evaluator's engine and its tickets: used once, and gone with what they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from blindtail.errors import (
    ContainerError,
    EvaluationFailed,
)
from blindtail.he.backends import open_evaluator
from cloud.engine import Engine
from tests.cloud_cases import clear_keys, program
from tests.ticket_cases import (
    NATIVE_ALONE,
    Device,
    device_with_keys,  # noqa: F401
    seed_of,
)

pytestmark = NATIVE_ALONE


def test_an_engine_drops_tickets_with_the_keys_they_were_made_for(device: Device, tmp_path: Path) -> None:
    spec = program().spec
    name = spec.program_id
    (tmp_path / "sent").write_bytes(device.keys)
    evaluator = open_evaluator("native", program())
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    for path in paths:
        evaluator.prepare_keys(tmp_path / "sent", Path(path))
    engine = Engine({name: program()}, "native", 1)  # room for one key set
    (container, other) = device.containers(2)
    want = engine.evaluate(name, paths[0], container).container

    assert engine.make_ticket(b"1", name, paths[0], seed_of(container)) > 0
    assert engine.take_lost() == []
    engine.evaluate(name, paths[1], container)  # loads other keys
    assert engine.take_lost() == [b"1"]
    assert engine.take_lost() == []
    assert engine.evaluate(name, paths[0], container, b"1")[::2] == (want, False)

    # The same keys from another file: what was made of the old one is void.
    engine.make_ticket(b"2", name, paths[0], seed_of(container))
    evaluator.prepare_keys(tmp_path / "sent", Path(paths[0]))
    assert engine.evaluate(name, paths[0], container, b"2")[::2] == (want, False)
    assert engine.take_lost() == [b"2"]

    # Used once; a ticket of another seed, or of another client's keys, is not used at all.
    engine.make_ticket(b"3", name, paths[0], seed_of(container))
    assert engine.evaluate(name, paths[0], container, b"3")[::2] == (want, True)
    assert engine.evaluate(name, paths[0], container, b"3")[::2] == (want, False)
    engine.make_ticket(b"4", name, paths[0], seed_of(other))
    assert engine.evaluate(name, paths[0], container, b"4")[::2] == (want, False)
    assert engine._tickets == {}

    # A damaged container is refused as ever, and its ticket is gone.
    engine.make_ticket(b"5", name, paths[0], seed_of(container))
    with pytest.raises(ContainerError):
        engine.evaluate(name, paths[0], container[:-1] + bytes([container[-1] ^ 1]), b"5")
    assert engine._tickets == {}

    engine.make_ticket(b"6", name, paths[0], seed_of(container))
    engine.drop_tickets([b"6", b"never there"])
    assert engine.take_lost() == []
    engine.make_ticket(b"7", name, paths[0], seed_of(container))
    engine.unload(name)
    assert engine.take_lost() == [b"7"]
    assert engine._tickets == {}


def test_a_backend_without_tickets_says_so(tmp_path: Path) -> None:
    name = program().spec.program_id
    engine = Engine({name: program()}, "clear", 1)
    (tmp_path / "sent").write_bytes(clear_keys())
    open_evaluator("clear", program()).prepare_keys(tmp_path / "sent", tmp_path / "one")
    with pytest.raises(EvaluationFailed, match="tickets"):
        engine.make_ticket(b"1", name, str(tmp_path / "one"), bytes(64))
