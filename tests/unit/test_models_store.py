"""Models on disk: what is kept, what a damaged state says, and a death between any two steps."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from blindtail.bundle import CloudBundle
from blindtail.errors import BundleError, ConfigError
from blindtail.metrics import CloudMetrics
from blindtail.wire.cell import CanaryCall, DropCall, ModelHeader
from cloud import models
from cloud.catalogue import Catalogue
from cloud.config import CloudConfig
from cloud.evaluators import LocalPool, Pool
from cloud.gateway import Gateway
from cloud.models import ModelStore
from cloud.registry import Registry
from tests.model_cases import bundle_of, file_of

pytestmark = pytest.mark.timeout(60)


def header_of(data: bytes, *allow: str) -> ModelHeader:
    return ModelHeader(hashlib.sha256(data).digest(), len(data), allow)


async def pieces(data: bytes, size: int = 50_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def pool_of(registry: Registry) -> Pool:
    return LocalPool(registry.programs, "clear", 1, 1 << 20)


def gateway_of(root: Path, *named: CloudBundle) -> Gateway:
    config = CloudConfig(state_dir=root / "state", backend="clear")
    return Gateway(config, named, pool_of, CloudMetrics(CollectorRegistry()))


def on_a_cell(root: Path, *steps: Callable[[Gateway], Any], named: tuple[CloudBundle, ...] = ()) -> Catalogue:
    """Runs operations on a cell of its own, then ends it; what it served in the end."""

    async def run() -> Catalogue:
        gateway = gateway_of(root, *named)
        await gateway.start()
        try:
            for step in steps:
                await step(gateway)
            return gateway.registry.catalogue
        finally:
            await gateway.close()

    return asyncio.run(run())


def push(path: Path, *allow: str) -> Callable[[Gateway], Any]:
    data = path.read_bytes()
    return lambda gateway: gateway.models.push(header_of(data, *allow), pieces(data))


def canary(version: str, share: float) -> Callable[[Gateway], Any]:
    return lambda gateway: gateway.models.canary(CanaryCall("toy", version, share))


def drop(version: str) -> Callable[[Gateway], Any]:
    return lambda gateway: gateway.models.drop(DropCall("toy", version))


def reopened(root: Path, *named: CloudBundle) -> Catalogue:
    return ModelStore(root / "state", "clear").load(named)


def facts(catalogue: Catalogue) -> object:
    return (
        {name: (v.allow, v.pushed, v.sha256, v.programs) for name, v in catalogue.versions.items()},
        dict(catalogue.withdrawn),
        dict(catalogue.shares),
    )


def test_everything_decided_survives_a_restart(tmp_path: Path) -> None:
    one, two, other = (file_of(tmp_path, version) for version in ("1", "2", "other"))
    served = on_a_cell(
        tmp_path,
        push(one, "edge:*"),
        push(two),
        push(other),
        canary("2", 0.25),
        canary("2", 0.5),
        drop("other"),
    )
    assert facts(reopened(tmp_path)) == facts(served)
    assert served.versions["toy", "1"].allow == ("edge:*",)
    assert [rule.share for rule in served.rules("toy")] == [0.5]
    assert list(served.withdrawn) == [("toy", "other")]
    folder = tmp_path / "state" / "models"
    assert {path.stem for path in folder.iterdir()} == {v.sha256 for v in served.versions.values()}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_dropped_version_stays_dropped_until_it_is_pushed(tmp_path: Path) -> None:
    named = bundle_of("1")
    assert ("toy", "1") in on_a_cell(tmp_path, named=(named,)).versions  # positive control
    on_a_cell(tmp_path, drop("1"), named=(named,))
    again = gateway_of(tmp_path, named)
    assert again.registry.models == []
    assert any("named in the settings" in note for note in again._notes)
    again.keys.release()
    served = on_a_cell(tmp_path, push(file_of(tmp_path, "1")), named=(named,))
    assert served.versions["toy", "1"].pushed
    assert not served.withdrawn


def test_settings_that_contradict_what_was_pushed(tmp_path: Path) -> None:
    on_a_cell(tmp_path, push(file_of(tmp_path, "1")))
    assert ("toy", "1") in reopened(tmp_path, bundle_of("1")).versions  # the same content is no conflict
    foreign = CloudBundle("toy", "1", bundle_of("2").programs)
    with pytest.raises(ConfigError, match=r"toy 1 was pushed .* other programs"):
        reopened(tmp_path, foreign)


def test_shares_of_a_version_that_the_settings_no_longer_name(tmp_path: Path) -> None:
    on_a_cell(tmp_path, canary("2", 0.5), named=(bundle_of("1"), bundle_of("2")))
    assert reopened(tmp_path, bundle_of("1"), bundle_of("2")).rules("toy")  # positive control
    store = ModelStore(tmp_path / "state", "clear")
    assert store.load([bundle_of("1")]).rules("toy") == ()
    assert any("toy 2" in note for note in store.notes)


# --- damage ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    on_a_cell(root, push(file_of(root, "1")), push(file_of(root, "2")), canary("2", 0.5))
    return root


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A change by hand with a right checksum."""

    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        content.pop("sha256")
        change(content)
        digest = hashlib.sha256(models.canonical_json(content)).hexdigest()
        return json.dumps({**content, "sha256": digest}).encode()

    return apply


def swap(content: dict[str, Any]) -> None:
    one, two = content["models"]
    one["sha256"], two["sha256"] = two["sha256"], one["sha256"]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "half": lambda d: d[: len(d) // 2],
    "not JSON": lambda d: b"\xff\xfe" + d,
    "a list": lambda d: b"[]",
    "one digit": lambda d: d.replace(b"0.5", b"0.6", 1),
    "newer format": edited(lambda c: c.update(format=2)),
    "share above one": edited(lambda c: c["shares"]["toy"]["rules"][0].update(share=1.5)),
    "files swapped": edited(swap),
    "deep": lambda d: b"[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_list_names_the_file_and_what_to_do(sound: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(sound / "state", tmp_path / "state")
    assert reopened(tmp_path).rules("toy")  # positive control
    index = tmp_path / "state" / "models.json"
    index.write_bytes(DAMAGE[name](index.read_bytes()))
    with pytest.raises(ConfigError, match=r"models\.json.*push its models again"):
        reopened(tmp_path)
    index.unlink()
    assert not reopened(tmp_path).versions


@pytest.mark.parametrize("damage", ["missing", "flipped", "another"])
def test_a_damaged_model_names_its_file(sound: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(sound / "state", tmp_path / "state")
    path, other = sorted((tmp_path / "state" / "models").iterdir())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        shutil.copy(other, path)
    with pytest.raises(ConfigError, match=rf"{path.name}.*put its file back"):
        reopened(tmp_path)


# --- pushes that are wrong -----------------------------------------------------------


def announced(data: bytes, **changes: Any) -> ModelHeader:
    fields = {"sha256": hashlib.sha256(data).digest(), "total_bytes": len(data), **changes}
    return ModelHeader(**fields)


def test_what_arrives_is_what_was_announced_or_nothing(tmp_path: Path) -> None:
    data = file_of(tmp_path, "1").read_bytes()
    edge_bt = b"PK\x03\x04" + bytes(500)
    wrong: list[tuple[ModelHeader, bytes, str]] = [
        (announced(data), data[:-1], "of .* bytes arrived"),
        (announced(data), data + b"x", "more than the announced"),
        (announced(data, sha256=bytes(32)), data, "SHA-256"),
        (announced(edge_bt), edge_bt, "the pushed file"),
    ]

    async def run() -> None:
        gateway = gateway_of(tmp_path)
        await gateway.start()
        for header, content, text in wrong:
            with pytest.raises(BundleError, match=text):
                await gateway.models.push(header, pieces(content))
            assert list((tmp_path / "state" / "models").iterdir()) == []
            assert not gateway.registry.models
            assert not (tmp_path / "state" / "models.json").exists()
        await gateway.models.push(announced(data), pieces(data))  # and the right one is taken
        assert gateway.registry.models == [("toy", "1")]
        await gateway.close()

    asyncio.run(run())


def test_a_full_disk_says_so_before_and_while_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = file_of(tmp_path, "1").read_bytes()

    async def attempt(gateway: Gateway) -> None:
        with pytest.raises(ConfigError, match="disk"):
            await gateway.models.push(announced(data), pieces(data))
        assert not gateway.registry.models
        assert not list((tmp_path / "state" / "models").glob("*"))
        assert not list((tmp_path / "state" / "programs").iterdir())

    class Usage:
        free = 1000

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage)
        on_a_cell(tmp_path, attempt)
    with monkeypatch.context() as patch:  # the list cannot be written, after evaluators were loaded
        patch.setattr(models, "write_atomically", full)
        on_a_cell(tmp_path, attempt)
    on_a_cell(tmp_path, push(file_of(tmp_path, "1")))  # positive control


# --- death at any moment ----------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs, and nothing is cleaned up on disk."""


def test_a_death_before_any_step_on_disk_loses_nothing_that_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts every rename and removal of a run of operations, and dies before each of them once."""
    files = {version: file_of(tmp_path, version) for version in "12"}
    steps = [
        push(files["1"]),
        push(files["2"]),
        canary("2", 0.5),
        canary("2", 0),
        drop("2"),
        push(files["2"]),
    ]
    calls, died_at = 0, -1
    real = {"replace": os.replace, "unlink": os.unlink}

    def counted(name: str) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if 0 <= died_at < calls:
                raise Killed
            return real[name](*values, **options)

        return call

    async def run(root: Path) -> tuple[list[object], Catalogue | None]:
        """What was answered, in order; the catalogue that a step under way would have led to."""
        gateway = gateway_of(root)
        await gateway.start()
        answers: list[object] = [facts(gateway.registry.catalogue)]
        try:
            for step in steps:
                await step(gateway)
                answers.append(facts(gateway.registry.catalogue))
        except Killed:
            pass
        finally:
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", real["replace"])
                patch.setattr(os, "unlink", real["unlink"])
                for member in gateway.pool.members:
                    await asyncio.to_thread(member.close)  # type: ignore[attr-defined]
                gateway.keys.release()
        return answers, None

    def once(root: Path, at: int) -> list[object]:
        nonlocal calls, died_at
        calls, died_at = 0, at
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted("replace"))
            patch.setattr(os, "unlink", counted("unlink"))
            return asyncio.run(run(root))[0]

    every = once(tmp_path / "whole", -1)
    total = calls
    assert len(every) == len(steps) + 1
    assert total > 10
    for at in range(total):
        root = tmp_path / f"died-{at}"
        answers = once(root, at)
        found = facts(reopened(root))
        # What was answered last, or the change under way, in full.
        assert found in (answers[-1], every[min(len(answers), len(steps))]), at
        shutil.rmtree(root)
