"""The command line: one line an error, exit codes, help that teaches, no role known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import pytest
import typer

from blindtail import cli
from blindtail.errors import BlindtailError, BundleError, ConfigError, InputError, TailUnavailable

COMMANDS = (
    *("cloud", "demo", "edge", "infer", "inspect", "lint", "orchestrator", "train", "verify"),
    *("certs init", "certs issue", "certs show"),
)


def _with_command(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> None:
    def register(app: typer.Typer) -> None:
        app.command("work")(command)

    class Entry:
        name = "work"

        def load(self) -> Callable[[typer.Typer], None]:
            return register

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("port 1 is taken"), 2),
        (BundleError("x.bt is damaged"), 2),
        (InputError("wrong\nshape"), 2),
        (TailUnavailable("nobody answers"), 1),
        (BlindtailError("failed"), 1),
        (RuntimeError("a bug"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else str(v),
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def work() -> None:
        raise error

    monkeypatch.delenv("BLINDTAIL_DEBUG", raising=False)
    _with_command(monkeypatch, work)
    with pytest.raises(SystemExit) as left:
        cli.main(["work"])
    captured = capsys.readouterr()
    assert left.value.code == code
    assert captured.out == ""
    assert len(captured.err.splitlines()) <= 1
    assert "Traceback" not in captured.err


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        raise ConfigError("here")

    monkeypatch.setenv("BLINDTAIL_DEBUG", "0")
    _with_command(monkeypatch, work)
    with pytest.raises(ConfigError):
        cli.main(["--debug", "work"])


def test_a_missing_part_keeps_the_other_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        name = "fly+swim"

        def load(self) -> None:
            raise ModuleNotFoundError("No module named 'wings'", name="wings")

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Broken()])
    with pytest.raises(SystemExit) as left:
        cli.main(["swim", "--far", "1"])
    assert left.value.code == 2
    assert "'swim' needs the module 'wings'" in capsys.readouterr().err


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code, text in (
        (["--version"], 0, f"blindtail {metadata.version('blindtail')}"),
        (["--help"], 0, "model owner"),
        (["nothing"], 2, "No such command"),
        (["inspect", "--nothing"], 2, "No such option"),
        (["inspect", "/nowhere.bt"], 2, "/nowhere.bt"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        captured = capsys.readouterr()
        assert (left.value.code, text in captured.out + captured.err) == (code, True), argv


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert f"blindtail {command}" in text.split("Options:")[0]
    assert "--json" in text
    assert len(text.split("Options:")[0].split()) > 25, "the help should explain and give an example"


def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blindtail", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("blindtail ")


def test_starting_is_cheap() -> None:
    """--help loads neither torch, nor Ray, nor the cryptographic library, nor ONNX Runtime."""
    code = (
        "import sys; from blindtail import cli; cli.build_app();"
        "heavy = {'torch', 'ray', 'tenseal', 'onnxruntime', 'matplotlib', 'sklearn'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_settings_of_any_command_come_from_toml_and_flags_win(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def work(images: Annotated[int, typer.Option("--images")] = 1, as_json: bool = False) -> None:
        print(images)

    _with_command(monkeypatch, work)
    settings = tmp_path / "all.toml"
    settings.write_text("[work]\nimages = 7\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["--settings", str(settings), "work", *arguments])
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out.strip(), captured.err.strip()  # type: ignore[return-value]

    assert run() == (0, "7", "")
    assert run("--images", "9") == (0, "9", "")
    for text, says in {
        "[work]\nimage = 7": "unknown setting 'work.image'; did you mean 'work.images'?",
        "[wrok]\nimages = 7": "unknown setting 'wrok'; did you mean 'work'?",
        "work = 3": "write [work] above its settings",
        "[work]\nimages = 'many'": "valid integer",
        "[work": "not valid TOML",
    }.items():
        settings.write_text(text)
        code, out, err = run()
        assert (code, out) == (2, "")
        assert says in err


def test_settings_of_a_group_of_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fly(far: Annotated[int, typer.Option("--how-far")] = 1, wings: int = 2) -> None:
        print(far, wings)

    def group_options(wind: Annotated[int, typer.Option("--wind")] = 0) -> None:
        print(wind)

    def register(app: typer.Typer) -> None:
        group = typer.Typer(callback=group_options)
        group.command("fly")(fly)
        group.command("land")(fly)
        app.add_typer(group, name="bird")

    class Entry:
        name = "bird"

        def load(self) -> Callable[[typer.Typer], None]:
            return register

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()])
    settings = tmp_path / "all.toml"
    settings.write_text("[bird]\nwind = 9\n[bird.fly]\nhow_far = 7\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["--settings", str(settings), "bird", *arguments])
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err.strip()  # type: ignore[return-value]

    assert run("fly") == (0, "9\n7 2\n", "")
    assert run("fly", "--how-far", "3") == (0, "9\n3 2\n", "")
    assert run("land") == (0, "9\n1 2\n", "")  # another command's table is not its own
    for text, says in {
        "[bird.fyl]\nhow_far = 7": "unknown setting 'bird.fyl'; did you mean 'bird.fly'?",
        "[bird.fly]\nhow_fast = 7": "unknown setting 'bird.fly.how_fast'; did you mean 'bird.fly.how_far'?",
        "[bird]\nfly = 3": "bird.fly must be a table: write [bird.fly] above its settings",
        "[bird]\nhow_far = 3": "unknown setting 'bird.how_far'",
        "debug = true": "unknown setting 'debug'",
    }.items():
        settings.write_text(text)
        code, out, err = run("fly")
        assert (code, out) == (2, "")
        assert says in err
