"""`.bt` files: round trip, determinism, and no damage that goes unnoticed."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail import archive
from blindtail.bundle import CloudBundle, EdgeBundle, sniff
from blindtail.errors import BundleError, ModelError
from blindtail.models.pack import pack
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets

Pair = tuple[SplitModel, EdgeBundle, CloudBundle, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(0)
    model = nets.digits().eval()
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
    edge, cloud = pack(
        model, images, temperatures=(1.0, 1.5), thresholds=(0.9, 0.8), metrics={"test": {"tail": 0.5}}
    )
    folder = tmp_path_factory.mktemp("bundles")
    edge.save(folder / "edge.bt")
    cloud.save(folder / "cloud.bt")
    return model, edge, cloud, folder


def test_round_trip(pair: Pair) -> None:
    _, edge, cloud, folder = pair
    again = EdgeBundle.open(folder / "edge.bt")
    assert again == edge
    assert again.cuts[1] == edge.cuts[1]
    assert again.exits[1].temperature == 1.5
    programs = CloudBundle.open(folder / "cloud.bt").programs
    assert programs[1].spec == cloud.programs[1].spec == edge.cuts[1]
    assert sniff(folder / "edge.bt") == "edge"
    assert sniff(folder / "cloud.bt") == "cloud"


def test_both_halves_carry_one_name_and_version(pair: Pair) -> None:
    _, edge, cloud, _ = pair
    assert (edge.model, edge.version) == (cloud.model, cloud.version)
    assert len(edge.version) == 12
    int(edge.version, 16)


def test_the_version_follows_the_contents(pair: Pair) -> None:
    model, edge, _, _ = pair
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
    fields = {"temperatures": (1.0, 1.5), "thresholds": (0.9, 0.8), "metrics": {"test": {"tail": 0.5}}}
    assert pack(model, images, **fields)[0].version == edge.version  # type: ignore[arg-type]
    tail = model.tails["1"]
    with torch.no_grad():
        tail[-1].bias[0] += 1.0  # type: ignore[index,union-attr]
        other = pack(model, images, **fields)[0].version  # type: ignore[arg-type]
        tail[-1].bias[0] -= 1.0  # type: ignore[index,union-attr]
    assert other != edge.version
    assert pack(model, images, version="2026.1", **fields)[1].version == "2026.1"  # type: ignore[arg-type]


def test_saving_is_deterministic_and_leaves_no_temporary_file(pair: Pair, tmp_path: Path) -> None:
    _, edge, cloud, folder = pair
    EdgeBundle.open(folder / "edge.bt").save(tmp_path / "edge.bt")
    cloud.save(tmp_path / "cloud.bt")
    for name in ("edge.bt", "cloud.bt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    edge.save(tmp_path / "edge.bt")  # over an existing file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cloud.bt", "edge.bt"]


def test_a_failed_save_keeps_the_old_file(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, edge, _, _ = pair
    edge.save(tmp_path / "edge.bt")
    before = (tmp_path / "edge.bt").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(archive.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        replace(edge, version="next").save(tmp_path / "edge.bt")
    assert (tmp_path / "edge.bt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["edge.bt"]


def test_reading_loads_no_torch_and_no_cryptography(pair: Pair) -> None:
    script = (
        "import sys; from blindtail.bundle import EdgeBundle; EdgeBundle.open(sys.argv[1]); "
        "print([m for m in ('torch', 'tenseal', 'ray', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(pair[3] / "edge.bt")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# No weight of the tail at the edge ------------------------------------------------------------


def needles(model: SplitModel, cloud: CloudBundle) -> dict[str, bytes]:
    """Eight-byte-or-longer pieces of the tail's weights in every form they could be written in."""
    found: dict[str, bytes] = {}
    for path, tensor in model.tails["1"].state_dict().items():
        values = tensor.detach().numpy().reshape(-1)
        if values.dtype.kind == "f" and len(values) >= 8 and len(set(values[:8].tolist())) > 4:
            for dtype in ("<f4", "<f8", "<f2"):
                found[f"{path} {dtype}"] = values[:8].astype(dtype).tobytes()
    for name, array in cloud.programs[1].to_parts()[1].items():
        flat = np.asarray(array).reshape(-1)
        flat = flat[flat != 0][:8]
        if len(set(flat.tolist())) > 4:
            for dtype in ("<f4", "<f8"):
                found[f"program {name} {dtype}"] = flat.astype(dtype).tobytes()
    return found


def test_edge_bundle_holds_no_weight_of_the_tail(pair: Pair) -> None:
    model, _, cloud, folder = pair
    edge_bytes, cloud_bytes = (folder / "edge.bt").read_bytes(), (folder / "cloud.bt").read_bytes()
    wanted = needles(model, cloud)
    assert len(wanted) >= 6
    assert [name for name, piece in wanted.items() if piece in edge_bytes] == []
    # Positive controls: the same search finds the program's weights in cloud.bt, and
    # the head's own weights, and a planted tail weight, in edge.bt.
    assert any(piece in cloud_bytes for piece in wanted.values())
    head = model.exits["1"][-1].weight.detach().numpy().reshape(-1)[:8].astype("<f4").tobytes()  # type: ignore[index]
    assert head in edge_bytes
    for piece in wanted.values():
        assert piece in edge_bytes[:500] + piece + edge_bytes[500:]


# Damage ---------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], object]] = {"edge.bt": EdgeBundle.open, "cloud.bt": CloudBundle.open}


def assert_refused(name: str, data: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(data)
    with pytest.raises(BundleError) as info:
        READERS[name](path)
    assert name in str(info.value)
    with pytest.raises(BundleError):
        sniff(path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["edge.bt", "cloud.bt"])
def test_every_changed_byte_is_noticed(pair: Pair, tmp_path: Path, name: str) -> None:
    """All headers, and a sweep through the data: one bit changed, and the byte's complement."""
    blob = (pair[3] / name).read_bytes()
    headers = [i for i in range(len(blob) - 4) if blob[i : i + 4] == b"PK\x03\x04"]
    positions = {j for i in headers for j in range(i, min(i + 60, len(blob)))}
    positions |= set(range(len(blob) - 700, len(blob)))  # central directory, its end record, and the comment
    positions |= set(range(0, len(blob), 11 if name == "edge.bt" else 61))
    path = tmp_path / name
    for position in sorted(positions):
        for flip in (1 << (position % 8), 0xFF):
            damaged = bytearray(blob)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(BundleError):
                READERS[name](path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["edge.bt", "cloud.bt"])
def test_random_damage_is_noticed(
    pair: Pair, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    blob = (pair[3] / name).read_bytes()
    folder = tmp_path_factory.mktemp("damage")
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "insert", "swap", "noise"]))
    at = data.draw(st.integers(0, len(blob) - 1))
    if kind == "flip":
        damaged = bytearray(blob)
        damaged[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        damaged = bytearray(blob[:at])
    elif kind == "extend":
        damaged = bytearray(blob + data.draw(st.binary(min_size=1, max_size=64)))
    elif kind == "insert":
        damaged = bytearray(blob[:at] + data.draw(st.binary(min_size=1, max_size=8)) + blob[at:])
    elif kind == "swap":
        damaged = bytearray(blob[at:] + blob[:at]) if at else bytearray(b"")
    else:
        damaged = bytearray(data.draw(st.binary(max_size=300)))
    assert_refused(name, bytes(damaged), folder)


def test_the_intact_file_is_read(pair: Pair, tmp_path: Path) -> None:
    """Positive control of the damage tests: the same path without damage opens."""
    for name, reader in READERS.items():
        (tmp_path / name).write_bytes((pair[3] / name).read_bytes())
        reader(tmp_path / name)


def rewrite(path: Path, change: Callable[[dict, dict[str, bytes]], None]) -> None:
    """Rebuild a `.bt` as a determined person would: contents changed, all hashes right."""
    with zipfile.ZipFile(path) as file:
        members = {n: file.read(n) for n in file.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(manifest, members)
    form = manifest.pop("format")
    version = manifest.pop("format_version")
    manifest.pop("sha256")
    archive.write(path, form, manifest, members, version)


def _drop(manifest: dict, members: dict[str, bytes]) -> None:
    del manifest["exits"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, "damaged"),
        (lambda m, f: m.update(format="blindtail-other"), "not a blindtail file"),
        (lambda m, f: m.update(format_version=4), "format version 4"),
        (lambda m, f: m.update(format_version=3), "format version 3"),
        (lambda m, f: f.update({"extra.bin": b"x"}), "unknown members"),
        (lambda m, f: f.update({"stage9.onnx": b"x"}), "graphs"),
        (lambda m, f: f.pop("stage0.onnx"), "graphs"),
        (lambda m, f: m["exits"][0].update(after_stage=7), "exits must follow"),
        (lambda m, f: m["exits"][0].update(temperature=0.0), "temperature"),
        (lambda m, f: m["exits"][0].update(macs="many"), "damaged"),
        (lambda m, f: m["preprocessing"].update(std=[0.0]), "std above zero"),
        (lambda m, f: m["preprocessing"].update(input_shape=[1, 8]), "damaged"),
        (lambda m, f: m["cuts"].update({"5": m["cuts"]["1"]}), "cut 5"),
        (lambda m, f: m["cuts"]["1"].pop("program_id"), "damaged"),
        (lambda m, f: m.update(class_names=["a", "b"]), "logits"),
        (lambda m, f: m.update(model="a/b"), "name"),
        (lambda m, f: m.update(edge_budget={"macs": 1}), "edge_budget"),
        (lambda m, f: m.update(stages=[]), "needs a stage"),
    ],
)
def test_contents_that_contradict_are_refused(
    pair: Pair, tmp_path: Path, change: Callable[[dict, dict[str, bytes]], None], words: str
) -> None:
    path = tmp_path / "edge.bt"
    path.write_bytes((pair[3] / "edge.bt").read_bytes())
    rewrite(path, change)
    with pytest.raises(BundleError, match=words):
        EdgeBundle.open(path)


def test_a_bundle_of_another_model_version_is_told_by_its_program(pair: Pair, tmp_path: Path) -> None:
    """Weights replaced in cloud.bt, hashes redone: the program id no longer fits."""
    path = tmp_path / "cloud.bt"
    path.write_bytes((pair[3] / "cloud.bt").read_bytes())

    def change(manifest: dict, members: dict[str, bytes]) -> None:
        name = next(iter(members))
        blob = bytearray(members[name])
        blob[-3] ^= 0x01
        members[name] = bytes(blob)

    rewrite(path, change)
    with pytest.raises(BundleError):
        CloudBundle.open(path)


@pytest.mark.parametrize(("name", "reader"), [("cloud.bt", EdgeBundle.open), ("edge.bt", CloudBundle.open)])
def test_the_other_kind_is_named(pair: Pair, name: str, reader: Callable[[Path], object]) -> None:
    with pytest.raises(BundleError, match=f"this is an? {name} file"):
        reader(pair[3] / name)


def test_a_compressed_bomb_is_refused_unread(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("manifest.json", b"0" * 50_000_000)
    (tmp_path / "edge.bt").write_bytes(buffer.getvalue())
    with pytest.raises(BundleError, match="compressed"):
        EdgeBundle.open(tmp_path / "edge.bt")


def test_a_member_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    blob = bytearray(archive._pack(b"{}", {}))
    at = blob.index(b"PK\x01\x02")
    blob[at + 20 : at + 28] = (0x7FFFFFFF).to_bytes(4, "little") * 2
    (tmp_path / "edge.bt").write_bytes(blob)
    with pytest.raises(BundleError):
        EdgeBundle.open(tmp_path / "edge.bt")


def test_a_missing_file_and_a_folder_are_bundle_errors(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        EdgeBundle.open(tmp_path / "none.bt")
    with pytest.raises(BundleError, match="cannot be read"):
        EdgeBundle.open(tmp_path)
    (tmp_path / "empty.bt").write_bytes(b"")
    with pytest.raises(BundleError, match=r"empty\.bt"):
        sniff(tmp_path / "empty.bt")


def test_a_deeply_nested_manifest_is_a_bundle_error(tmp_path: Path) -> None:
    text = b'{"format":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    (tmp_path / "edge.bt").write_bytes(archive._pack(text, {}))
    with pytest.raises(BundleError):
        EdgeBundle.open(tmp_path / "edge.bt")


def test_metrics_that_are_no_json_are_refused_on_saving(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="JSON"):
        replace(pair[1], metrics={"accuracy": float("nan")}).save(tmp_path / "edge.bt")
    assert not list(tmp_path.iterdir())


def test_the_manifest_names_every_member_by_hash(pair: Pair) -> None:
    with zipfile.ZipFile(pair[3] / "edge.bt") as file:
        manifest = json.loads(file.read("manifest.json"))
        others = [n for n in file.namelist() if n != "manifest.json"]
        assert file.comment.endswith(hashlib.sha256(file.read("manifest.json")).hexdigest().encode())
        assert manifest["sha256"] == {n: hashlib.sha256(file.read(n)).hexdigest() for n in others}
    assert sorted(others) == ["exit0.onnx", "exit1.onnx", "stage0.onnx", "stage1.onnx"]
