"""Data sets: splits, checks, folders of images, and the ways to Fashion-MNIST's training files."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blindtail.errors import DataError
from blindtail.models import fetch
from blindtail.models.data import FASHION_CLASSES, Images, load, load_folder
from blindtail.models.fetch import ASSETS, Content, FashionSource, unpack


def test_fashion_test_images_ship_with_the_package() -> None:
    test = load("fashion", "test")
    assert test.pixels.shape == (10_000, 1, 28, 28)
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.bincount(test.labels).tolist() == [1_000] * 10
    assert test.class_names == FASHION_CLASSES
    licence = (ASSETS / "LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "MIT" in licence


def test_digits_splits_are_disjoint_seeded_and_share_one_test_split() -> None:
    one = {split: load("digits", split, seed=1) for split in ("train", "validation", "test")}
    two = {split: load("digits", split, seed=2) for split in ("train", "validation", "test")}
    assert [len(one[s]) for s in one] == [1187, 250, 360]
    assert one["train"].pixels.dtype == np.uint8
    assert one["train"].pixels.shape[1:] == (1, 8, 8)
    assert one["train"].pixels.max() == 255
    np.testing.assert_array_equal(one["test"].pixels, two["test"].pixels)
    assert not np.array_equal(one["validation"].pixels, two["validation"].pixels)
    np.testing.assert_array_equal(one["train"].pixels, load("digits", "train", seed=1).pixels)
    rows = np.concatenate([one[s].pixels.reshape(len(one[s]), -1) for s in one])
    every = np.concatenate([two[s].pixels.reshape(len(two[s]), -1) for s in two])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, every))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match="unknown data set"):
        load("nothing", "test")
    with pytest.raises(DataError, match="unknown split"):
        load("digits", "everything")  # type: ignore[arg-type]


def test_loading_needs_no_torch() -> None:
    script = (
        "import sys; from blindtail.models.data import load; "
        "load('fashion', 'test'); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_images_check_what_they_hold() -> None:
    pixels = np.zeros((2, 1, 4, 4), np.uint8)
    with pytest.raises(DataError, match="one label"):
        Images(pixels, np.zeros(3, np.int64), ("a", "b"))
    with pytest.raises(DataError, match="labels must lie"):
        Images(pixels, np.array([0, 2]), ("a", "b"))


# The ways to training files, with small stand-ins for the real ones -----------------------------

NAME = "train-labels-idx1-ubyte.gz"
CONTENT = b"\x00\x00\x08\x01" + bytes(range(200))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    files = {NAME: Content(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())}
    monkeypatch.setattr(fetch, "FILES", files)


def write_good(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    path.write_bytes(gzip.compress(CONTENT, 1))
    return path


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FashionSource:
    """A source with an empty system folder, an empty cache, no apt-get and nobody at the address."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    return FashionSource(system=tmp_path / "system", cache=tmp_path / "cache", address="http://127.0.0.1:9")


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys, time\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.usefixtures("stand_in")
def test_the_system_folder_comes_first(nothing: FashionSource) -> None:
    write_good(nothing.system)
    assert nothing.read(NAME) == CONTENT
    assert not nothing.cache.exists()


@pytest.mark.usefixtures("stand_in")
def test_debians_package_is_unpacked_without_root(nothing: FashionSource, tmp_path: Path) -> None:
    package = write_good(tmp_path / "package")
    tools = tmp_path / "tools"
    tool(
        tools,
        "apt-get",
        "assert 'download' in sys.argv; pathlib.Path('dataset-fashion-mnist_1_all.deb').touch()",
    )
    tool(
        tools,
        "dpkg",
        "assert sys.argv[1] == '-x'\n"
        f"to = pathlib.Path(sys.argv[3], *{fetch.SYSTEM_FOLDER.parts[1:]!r}); to.mkdir(parents=True)\n"
        f"(to / {NAME!r}).write_bytes(pathlib.Path({str(package)!r}).read_bytes())",
    )
    assert nothing.read(NAME) == CONTENT
    shutil.rmtree(tools)
    assert nothing.read(NAME) == CONTENT  # from the cache now
    assert [p.name for p in nothing.cache.iterdir()] == [NAME]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    root = tmp_path / "www"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/"
        listening.shutdown()
        thread.join()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.timeout(60)
def test_the_address_is_the_last_way(nothing: FashionSource, tmp_path: Path, server: str) -> None:
    write_good(tmp_path / "www")
    source = FashionSource(system=nothing.system, cache=nothing.cache, address=server)
    assert source.read(NAME) == CONTENT
    assert (nothing.cache / NAME).is_file()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.timeout(60)
def test_a_wrong_download_is_refused_and_not_kept(
    nothing: FashionSource, tmp_path: Path, server: str
) -> None:
    (tmp_path / "www" / NAME).write_bytes(gzip.compress(CONTENT[:-1] + b"x"))
    source = FashionSource(system=nothing.system, cache=nothing.cache, address=server)
    with pytest.raises(DataError, match="SHA-256 differs"):
        source.read(NAME)
    assert not (nothing.cache / NAME).exists()


@pytest.mark.usefixtures("stand_in")
def test_when_nothing_works_one_error_names_all_three_ways(nothing: FashionSource, tmp_path: Path) -> None:
    tool(tmp_path / "tools", "apt-get", "sys.exit('E: Unable to locate package dataset-fashion-mnist')")
    tool(tmp_path / "tools", "dpkg", "")
    with pytest.raises(DataError) as info:
        nothing.read(NAME)
    for words in (
        str(nothing.system),
        "Debian's package",
        nothing.address,
        "--data",
        "Unable to locate package",
    ):
        assert words in str(info.value)


@pytest.mark.usefixtures("stand_in")
def test_a_hanging_tool_is_given_up(nothing: FashionSource, tmp_path: Path) -> None:
    tool(tmp_path / "tools", "apt-get", "time.sleep(60)")
    tool(tmp_path / "tools", "dpkg", "")
    source = FashionSource(
        system=nothing.system, cache=nothing.cache, address=nothing.address, apt_timeout_s=0.3
    )
    with pytest.raises(DataError, match="did not finish"):
        source.read(NAME)


@pytest.mark.usefixtures("stand_in")
def test_a_damaged_system_file_is_named_and_the_next_way_tried(nothing: FashionSource) -> None:
    path = write_good(nothing.system)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        nothing.read(NAME)
    write_good(nothing.cache)
    assert nothing.read(NAME) == CONTENT


@pytest.mark.usefixtures("stand_in")
def test_a_named_folder_is_looked_at_alone(nothing: FashionSource, tmp_path: Path) -> None:
    write_good(nothing.system)
    with pytest.raises(DataError, match=r"four \.gz files"):
        FashionSource(folder=tmp_path / "mine", system=nothing.system).read(NAME)
    write_good(tmp_path / "mine")
    assert FashionSource(folder=tmp_path / "mine").read(NAME) == CONTENT


def test_a_file_that_unpacks_to_more_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0" * 50_000_000))
    with pytest.raises(DataError, match="SHA-256 differs"):
        unpack(path)


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FashionSource().cache == tmp_path / "blindtail" / "fashion-mnist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert FashionSource().cache == Path.home() / ".cache" / "blindtail" / "fashion-mnist"


# Folders of images ------------------------------------------------------------------------------


def write_image(path: Path, size: tuple[int, int] = (6, 4), mode: str = "L", value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    write_image(tmp_path / "dog" / "b.png", value=20)
    write_image(tmp_path / "cat" / "a.jpg", value=10)
    write_image(tmp_path / "dog" / "a.PNG", value=30)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    images = load_folder(tmp_path, (1, 4, 6))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1]
    assert images.pixels.shape == (3, 1, 4, 6)
    assert images.pixels[1:, 0, 0, 0].tolist() == [30, 20]


def test_colour_and_the_models_class_order(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png", mode="RGB", value=9)
    images = load_folder(tmp_path, (3, 4, 6), ("dog", "cat"))
    assert images.labels.tolist() == [1]
    assert images.pixels[0, :, 0, 0].tolist() == [9, 0, 255]
    with pytest.raises(DataError, match="'cat' is no class"):
        load_folder(tmp_path, (3, 4, 6), ("dog", "horse"))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "good.png")
    write_image(tmp_path / "cat" / "good.jpg")
    for name, data in {
        "cut.png": (tmp_path / "cat" / "good.png").read_bytes()[:-20],
        "text.jpg": b"not an image",
        "empty.png": b"",
        "half.jpg": (tmp_path / "cat" / "good.jpg").read_bytes()[:-40],
    }.items():
        path = tmp_path / "cat" / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=name):
            load_folder(tmp_path, (1, 4, 6))
        path.unlink()
    assert len(load_folder(tmp_path, (1, 4, 6))) == 2


def test_wrong_sizes_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sub-folders"):
        load_folder(tmp_path, (1, 4, 6))
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no PNG or JPEG"):
        load_folder(tmp_path, (1, 4, 6))
    write_image(tmp_path / "cat" / "a.png", size=(8, 8))
    with pytest.raises(DataError, match=r"a\.png is 8 x 8 pixels, the model takes 6 x 4"):
        load_folder(tmp_path, (1, 4, 6))
    with pytest.raises(DataError, match="is no folder"):
        load_folder(tmp_path / "none", (1, 4, 6))
    with pytest.raises(DataError, match="1 or 3 channels"):
        load_folder(tmp_path, (2, 4, 6))


@pytest.mark.skipif(
    not os.environ.get("BLINDTAIL_FASHION_DIR"),
    reason="BLINDTAIL_FASHION_DIR names no folder with the training files",
)
def test_the_real_training_files() -> None:
    source = FashionSource(folder=Path(os.environ["BLINDTAIL_FASHION_DIR"]))
    train, validation = (load("fashion", s, seed=0, source=source) for s in ("train", "validation"))  # type: ignore[arg-type]
    assert (len(train), len(validation)) == (55_000, 5_000)
