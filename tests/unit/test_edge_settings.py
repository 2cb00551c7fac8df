"""Settings of a site and images for the commands: checked at the door, each with a clear error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blindtail.config import load_config
from blindtail.errors import ConfigError, DataError
from blindtail.rpc import INSECURE_LOOPBACK, ClientTls, ClientTlsFiles
from edge.app import _Pace
from edge.config import EdgeConfig
from edge.images import read_file, read_set, to_dtype
from tests.certificates import certificates
from tests.edge_fakes import NAMES, bundle_of, image


def test_a_site_comes_from_toml_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(
        'model = "edge.bt"\ncloud = "127.0.0.1:50051"\nactors = 3\n'
        'orchestrator = "127.0.0.1:50061"\npolicy = "deadline"\n'
        "[policy_parameters]\nthresholds = [0.7, 0.8]\nsafety = 1.2\n"
    )
    config = load_config(EdgeConfig, path, {"actors": 2, "deadline_s": 0.5, "cloud": None, "tickets": 0})
    assert config.model == tmp_path / "edge.bt"
    assert (config.actors, config.deadline_s, config.cloud) == (2, 0.5, "127.0.0.1:50051")
    assert config.runtime_settings()["orchestrator"] == "127.0.0.1:50061"
    assert (config.runtime_settings()["tickets"], EdgeConfig(Path("m")).tickets) == (0, 4)
    assert config.runtime_settings()["policy_parameters"] == {"thresholds": [0.7, 0.8], "safety": 1.2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cloud": "nowhere"}, "host:port"),
        ({"orchestrator": "nowhere"}, "host:port"),
        ({"backend": "sael"}, "seal"),
        ({"actors": 0}, "actors"),
        ({"in_flight": 1000}, "in_flight"),
        ({"threads": 0}, "threads"),
        ({"tickets": -1}, "tickets"),
        ({"tickets": 65}, "tickets"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"uplink_bps": -1.0}, "uplink_bps"),
        ({"ready_timeout_s": -1.0}, "ready_timeout_s"),
        ({"policy": "nothing"}, "policy"),
        ({"policy": "cloud-only", "policy_parameters": {"cut": -1}}, "cut"),
        ({"plaintext": True, "tls": ClientTlsFiles(Path("a"), Path("b"), Path("c"))}, "exclude"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EdgeConfig(model=Path("edge.bt"), **changes)


def test_credentials(tmp_path: Path) -> None:
    assert EdgeConfig(Path("m")).credentials() is None
    assert EdgeConfig(Path("m"), plaintext=True).credentials() == INSECURE_LOOPBACK
    made = certificates(tmp_path / "certs", "me")
    files = ClientTlsFiles(made["ca.pem"], made["me.pem"], made["me.key"], "cloud")
    assert EdgeConfig(Path("m"), tls=files).credentials() == files
    made["me.key"].unlink()
    with pytest.raises(ConfigError, match=r"me\.key"):
        EdgeConfig(Path("m"), tls=files).credentials()


def test_credentials_reach_the_key_process_unchanged() -> None:
    from edge.keys_child import Order, credentials_from_json, credentials_to_json

    files = ClientTlsFiles(Path("/a/ca.pem"), Path("/a/me.pem"), Path("/a/me.key"), "name")
    for given in (None, INSECURE_LOOPBACK, ClientTls(b"\x00ca\xff", b"c", b"k", "name"), files):
        order = Order({}, "x", credentials=credentials_to_json(given))
        assert credentials_from_json(Order.decode(order.encode()).credentials) == given


def test_pictures_and_arrays_are_read(tmp_path: Path) -> None:
    bundle = bundle_of()
    Image.fromarray(image(1, 9)[0]).save(tmp_path / "grey.png")
    assert (read_file(bundle, tmp_path / "grey.png") == image(1, 9)).all()
    np.save(tmp_path / "a.npy", image(2, 7))
    assert (read_file(bundle, tmp_path / "a.npy") == image(2, 7)).all()
    as_float = read_file(bundle_of(dtype="float32"), tmp_path / "grey.png")
    assert as_float.dtype == np.float32
    assert as_float.max() == pytest.approx(9 / 255)


@pytest.mark.parametrize("name", ["missing.png", "missing.npy", "text.png", "text.npy", "large.png"])
def test_unreadable_images_are_named(tmp_path: Path, name: str) -> None:
    for text in ("text.png", "text.npy"):
        (tmp_path / text).write_text("no image")
    Image.new("L", (9, 9)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=name):
        read_file(bundle_of(), tmp_path / name)


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        read_file(bundle_of(), tmp_path / "o.npy")


def test_folders_become_sets(tmp_path: Path) -> None:
    for label, name in enumerate(NAMES[:2]):
        (tmp_path / name).mkdir()
        Image.fromarray(image(label, 200)[0]).save(tmp_path / name / "a.png")
    pixels, labels = read_set(bundle_of(), str(tmp_path))
    assert pixels.shape == (2, 1, 2, 4)
    assert labels.tolist() == [1, 0]  # sorted by folder: "one" before "zero"
    with pytest.raises(DataError):
        read_set(bundle_of(), str(tmp_path / "missing"))


def test_a_set_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match="shape"):
        read_set(bundle_of(), "digits")
    with pytest.raises(DataError, match="split"):
        read_set(bundle_of(), "digits", "tset")


def test_pixels_keep_their_dtype_or_become_floats() -> None:
    pixels = np.full((1, 1, 2, 4), 255, np.uint8)
    assert to_dtype(bundle_of(), pixels) is pixels
    assert to_dtype(bundle_of(dtype="float32"), pixels).max() == 1.0


@pytest.mark.parametrize("module", ["edge", "edge.cli", "edge.keys_child", "edge.config"])
def test_light_modules_stay_light(module: str) -> None:
    """The command line and the key process load neither ONNX Runtime nor Ray nor a cryptographic library."""
    heavy = "onnxruntime ray tenseal torch"
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in {heavy.split()}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    control = code.replace(f"import sys, {module}", f"import sys, {module}, onnxruntime")
    assert subprocess.run([sys.executable, "-c", control], check=False, timeout=60).returncode == 1


def test_a_gate_holds_images_back_until_it_is_gone(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.write_text("2")
    pace = _Pace(EdgeConfig(tmp_path / "edge.bt", gate=gate))
    assert [pace.wait_s(number) <= 0 for number in range(4)] == [True, True, False, False]
    gate.write_text("3")
    assert [pace.wait_s(number) <= 0 for number in (2, 3)] == [True, False]
    gate.unlink()
    assert all(pace.wait_s(number) <= 0 for number in range(3, 9))
    gate.write_text("many")
    with pytest.raises(ConfigError, match="one number"):
        _Pace(EdgeConfig(tmp_path / "edge.bt", gate=gate)).wait_s(0)


def test_images_keep_their_pace(tmp_path: Path) -> None:
    pace = _Pace(EdgeConfig(tmp_path / "edge.bt", images_per_s=1e-3))
    assert pace.wait_s(0) <= 0
    assert 900 < pace.wait_s(1) <= 1000  # the first one came at once
    free = _Pace(EdgeConfig(tmp_path / "edge.bt"))
    assert all(free.wait_s(number) <= 0 for number in range(9))
