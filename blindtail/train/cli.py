"""`blindtail train`: from a recipe to edge.bt, cloud.bt and a report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtail.errors import ConfigError

if TYPE_CHECKING:
    from blindtail.he.objective import Objective
    from blindtail.progress import Progress
    from blindtail.train.fit import Progress as TrainingProgress
    from blindtail.train.pruning.policy import Policy
    from blindtail.train.recipe import Recipe
    from blindtail.train.run import Splits, Trained


class PruneMethod(StrEnum):
    """How `--prune` prunes."""

    p4e = "p4e"
    magnitude = "magnitude"
    random = "random"


def register(app: typer.Typer) -> None:
    """Add the command `train`."""
    app.command("train")(train_command)


def train_command(
    recipe: Annotated[
        str,
        typer.Argument(help="fashion, digits, or a recipe of your own", metavar="NAME|FILE.toml"),
    ],
    out: Annotated[Path | None, typer.Option(help="folder to write to  [default: out/NAME]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over the training images")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="decides weights, batches and the validation split  [default: 0, or the file's]"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="folder with Fashion-MNIST's four .gz files, when they are not found by themselves; of a "
            "FILE.toml, the folder with train/, validation/ and test/"
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="model.safetensors of an earlier run: calibrate and compile it, train nothing"),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="edge.bt that devices hold: train the tail of --checkpoint on, and write a cloud.bt for them"
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, max=64, help="CPU threads; results may differ in rounding")
    ] = 1,
    allow_unstable: Annotated[
        bool,
        typer.Option(
            "--allow-unstable", help="compile a tail whose ranges escape on validation images all the same"
        ),
    ] = False,
    minimise: Annotated[
        list[str] | None, typer.Option(help="what the tail's plan has least of, as for `blindtail plan`")
    ] = None,
    at_most: Annotated[
        list[str] | None, typer.Option(help="METRIC=BOUND for the tail's plan, as for `blindtail plan`")
    ] = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(help="FRACTION, or LAYER=FRACTION: prune the tail, so that it runs faster"),
    ] = None,
    prune_method: Annotated[PruneMethod, typer.Option(help="p4e, or a baseline to compare with")] = (
        PruneMethod.p4e
    ),
    json_output: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Train a network that splits: a head with early exits for the edge, a tail that runs encrypted.

    Head, exits and tail are trained together; exits are temperature-calibrated, and their
    default thresholds are chosen on validation images so that about a third are offloaded.
    Then the head is exported to ONNX and the tail compiled for CKKS:

    edge.bt    goes to the device: head, exits, thresholds, and no weight of the tail

    cloud.bt   goes to the cloud: the compiled tail

    model.safetensors   stays with you: all weights

    The ranges of the tail are then compared between training and validation images. One whose
    values escape would answer wrongly once encrypted, and is refused (--allow-unstable).

    The same seed, epochs and threads give the same files. A training that was stopped goes on where it
    was: give the same command again. For your own network, build a SplitModel (see
    `blindtail.models.split`) and write a FILE.toml that names it, with phases, losses and schedules
    (docs/guide/recipes.md); THE CODE THAT IT NAMES IS RUN, with your rights.

    With --like nothing changes on the devices: only the tail of --checkpoint is trained
    on, and compiled to take the place of the one that devices hold. A cell can then let it
    answer a share of the requests (blindtail model canary). Give the seed of the earlier run:
    it decides which images are kept for validation.

    With --prune whole diagonals of the tail become zero: each saves a product, and often a
    rotation and its key. The tail is retrained twice for as many epochs. --prune 0.9 prunes all of its
    layers, --prune 2=0.9 the one of that name alone.

    \b
      blindtail train fashion --out out/fashion
      blindtail train ward.toml
      blindtail train fashion --out out/fast --prune 0.8 \\
          --checkpoint out/fashion/model.safetensors
      blindtail train fashion --out out/next --epochs 2 \\
          --checkpoint out/fashion/model.safetensors --like out/fashion/edge.bt
    """
    # torch is loaded only once this command runs, so that other commands start fast.
    from blindtail.he.objective import Objective
    from blindtail.train.recipe import RECIPES
    from blindtail.train.state import forget

    file = Path(recipe) if recipe.endswith(".toml") else None
    if file is None and recipe not in RECIPES:
        raise ConfigError(
            f"there is no recipe {recipe!r}: use {', '.join(RECIPES)}, or a file that ends in .toml"
        )
    if file is not None and (prune or like is not None or epochs is not None):
        raise ConfigError(
            "a FILE.toml says its phases' epochs itself, and is neither pruned nor trained on yet"
        )
    chosen, splits = _chosen(recipe, file, seed, epochs, data)
    seed = chosen.seed
    folder = out or Path("out") / chosen.name
    command = f"blindtail train {file.name if file else recipe}"
    if file is None:
        command += f" --epochs {chosen.epochs}"
    command += f" --seed {seed} --threads {threads}"
    if checkpoint is not None:
        command += f" --checkpoint {checkpoint.name}"
    if allow_unstable:
        command += " --allow-unstable"
    objective = None
    if minimise or at_most:
        objective = Objective.parse(minimise or (), at_most or ())
        command += "".join(f" --minimise {text}" for text in minimise or ())
        command += "".join(f" --at-most {text}" for text in at_most or ())
    policy = None
    if prune:
        from blindtail.train.pruning.policy import Policy

        if like is not None:
            raise ConfigError("devices of --like hold their keys: prune in a run without it")
        policy = Policy.parse(prune, method=prune_method.value, seed=seed)
        command += "".join(f" --prune {text}" for text in prune) + f" --prune-method {prune_method.value}"
    elif prune_method is not PruneMethod.p4e:
        raise ConfigError("--prune-method needs --prune FRACTION")
    if like is not None:
        if objective is not None:
            raise ConfigError("devices of --like hold their keys: leave out --minimise and --at-most")
        if checkpoint is None:
            raise ConfigError("--like needs --checkpoint: the model.safetensors that belongs to this edge.bt")
        _train_tail(chosen, splits, threads, command, checkpoint, like, folder, json_output, allow_unstable)
        return
    trained = _train_with_bar(
        chosen,
        splits,
        threads,
        command,
        checkpoint,
        json_output,
        allow_unstable,
        objective,
        policy,
        folder / "training",
    )
    trained.save(folder)
    forget(folder / "training")  # all that it was for is saved
    if json_output:
        typer.echo(json.dumps(trained.report, indent=2))
    else:
        _print(trained, folder)


def _chosen(
    name: str, file: Path | None, seed: int | None, epochs: int | None, data: Path | None
) -> tuple[Recipe, Splits]:
    """The recipe and its images."""
    from blindtail.train.recipe import RECIPES
    from blindtail.train.recipe_file import data_folder, load_recipe
    from blindtail.train.run import Splits

    if file is None:
        recipe = replace(RECIPES[name], seed=seed or 0, epochs=epochs or RECIPES[name].epochs)
        return recipe, Splits.load(recipe.data, seed=recipe.seed, folder=data)
    recipe = load_recipe(file, seed=seed)
    own = data_folder(recipe, file)
    if own is not None:
        return recipe, Splits.from_folder(data or own, recipe.build())
    return recipe, Splits.load(recipe.data, seed=recipe.seed, folder=data)


def _train_tail(
    recipe: Recipe,
    splits: Splits,
    threads: int,
    command: str,
    checkpoint: Path,
    like: Path,
    folder: Path,
    as_json: bool,
    allow_unstable: bool,
) -> None:
    from blindtail.bundle import EdgeBundle
    from blindtail.train.tail import train_tail

    held = EdgeBundle.open(like)
    command += f" --like {like.name}"
    with _bar(recipe, quiet=as_json) as (advance, compiling):
        trained = train_tail(
            recipe,
            splits,
            checkpoint,
            held,
            threads=threads,
            progress=advance,
            compiling=compiling,
            command=command,
            allow_unstable=allow_unstable,
        )
    trained.save(folder)
    report: Any = trained.report
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for split in ("validation", "test"):
        before, after = report["before"][split]["tail"], report["after"][split]["tail"]
        typer.echo(f"tail, {split}: {before:.2%} before, {after:.2%} now")
    for cut, found in trained.stability.items():
        typer.echo(f"tail at cut {cut}, stability {found.line()}")
    typer.echo(
        f"wrote {folder}/cloud.bt: {report['model']} {report['version']}, for devices that hold "
        f"{report['for_devices_with']}; training took {report['training_s']:.0f} s"
    )


def _train_with_bar(
    recipe: Recipe,
    splits: Splits,
    threads: int,
    command: str,
    checkpoint: Path | None,
    quiet: bool,
    allow_unstable: bool,
    objective: Objective | None,
    policy: Policy | None,
    kept: Path,
) -> Trained:
    from blindtail.train.run import train

    with _bar(recipe, quiet) as (advance, compiling):
        return train(
            recipe,
            splits,
            threads=threads,
            progress=advance,
            compiling=compiling,
            command=command,
            checkpoint=checkpoint,
            allow_unstable=allow_unstable,
            objective=objective,
            prune=policy,
            folder=kept,
        )


@contextmanager
def _bar(recipe: Recipe, quiet: bool) -> Iterator[tuple[TrainingProgress, Progress]]:
    """One bar on a terminal's stderr, of the training and then of the compile."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    console = Console(stderr=True)
    with Bar(*columns, TimeRemainingColumn(), console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task(f"training {recipe.name}", total=None)

        def advance(done: int, steps: int, loss: float) -> None:
            text = f"training {recipe.name}, loss {loss:.3f}" if done < steps else "calibrating, compiling"
            bar.update(task, completed=done, total=steps, description=text)

        def compiling(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"compiling: {what}")

        yield advance, compiling


def _print(trained: Trained, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    report: Any = trained.report
    metrics, budget = report["metrics"], report["edge_budget"]
    table = Table(title=f"{report['model']} {report['version']}")
    for column in ("route", "validation", "test", "ECE before", "ECE after", "threshold"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for row in report["exits"]:
        name, error = row["name"], metrics["calibration_error"][row["name"]]
        table.add_row(
            name,
            f"{metrics['validation'][name]:.2%}",
            f"{metrics['test'][name]:.2%}",
            f"{error['before']:.4f}",
            f"{error['after']:.4f}",
            f"{row['threshold']:.3f}",
        )
    table.add_row(
        "tail", f"{metrics['validation']['tail']:.2%}", f"{metrics['test']['tail']:.2%}", "", "", ""
    )
    console = Console()
    console.print(table)
    for split in ("validation", "test"):
        row = metrics["routed"][split]
        kept = (
            "nothing to gain"
            if row["gain_kept"] is None
            else f"{row['gain_kept']:.0%} of the tail's gain kept"
        )
        console.print(
            f"default thresholds, {split}: {row['shares']['tail']:.1%} offloaded, "
            f"accuracy {row['accuracy']:.2%} ({kept})"
        )
    console.print(f"edge budget: {budget['macs']:,} MACs, {budget['bytes'] / 1e3:.1f} KB of parameters")
    for cut, tail in report["tails"].items():
        console.print(
            f"tail at cut {cut}: {tail['uplink_bytes'] / 1e3:.1f} KB up, "
            f"{tail['reply_bytes'] / 1e3:.1f} KB down, "
            f"{tail['key_bytes'] / 1e6:.1f} MB of evaluation keys (once)"
        )
    for cut, tail in report.get("pruning", {"tails": {}})["tails"].items():
        _print_pruned(console, cut, tail)
    for cut, found in trained.stability.items():
        console.print(f"tail at cut {cut}, stability {found.line()}")
    console.print(
        f"wrote {folder}/edge.bt, cloud.bt, report.json, model.safetensors; "
        f"training took {report['training_s']:.0f} s"
    )


def _print_pruned(console: Any, cut: str, tail: Any) -> None:
    before, after = tail["before"], tail["after"]
    zero = ", ".join(f"{layer['name']} {layer['zero_groups']:.0%}" for layer in tail["layers"])
    console.print(
        f"tail at cut {cut}, pruned: zero diagonals of layers {zero}; "
        f"diagonals {before['diagonals']} -> {after['diagonals']}, keys {before['keys']} -> {after['keys']}, "
        f"predicted {1e3 * before['predicted_s']:.2f} -> {1e3 * after['predicted_s']:.2f} ms"
    )
