"""A network in pieces: stages of a head, early exits between them, and encrypted tails.

    image -> stage 0 -> stage 1 -> ... -> stage n-1
                |          |
              exit 0     exit 1, cut: tail (runs encrypted in the cloud)

The pieces are plain `nn.Module`s, also those of a network that already exists:

    net = MyNet()
    net.load_state_dict(torch.load("mynet.pt", weights_only=True))
    model = SplitModel.from_parts(
        name="mynet",
        stages=[net.block1, net.block2],
        exits={1: nn.Sequential(nn.Flatten(), nn.Linear(784, 10))},
        tails={1: nn.Sequential(nn.Flatten(), nn.Linear(784, 128), Square(), nn.Linear(128, 10))},
        preprocessing=Preprocessing(input_shape=(1, 28, 28), mean=(0.286,), std=(0.353,)),
        class_names=("t-shirt", "trouser", ...),
    )

A tail is made of linear layers with `Square` or `Quadratic` between them.

Several tensors may meet in a tail: a stage that gives a tuple of 1 to 8 tensors calls what follows
it, the next stage, exits and tails, with them as positional arguments.

    stages=[Branches()]         # forward(x) -> (main, skip)
    tails={0: Meeting()}        # forward(main, skip) -> fc(act(conv(main)) + down(skip))

What is encrypted there is one flat activation (`blindtail.models.several`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from blindtail.bundle import ExitInfo, StageInfo
from blindtail.errors import ModelError
from blindtail.models.cost import count_bytes, trace_cost
from blindtail.models.several import Activation, Form, check_takes, operands, piece
from blindtail.preprocessing import Preprocessing


class SplitModel(nn.Module):
    """Stages, exits and tails over one preprocessing. Checked when it is built.

    stages   `nn.Module`s, each (B, ...) -> (B, ...), run in order; one may give a tuple of tensors
    exits    index of the stage an exit follows -> module giving logits (B, classes)
    tails    index of the stage after which the network may be cut -> module giving logits
    names    of stages, by default "stage0", ...; exits are called "exit1", "exit2", ...

    Raises `ModelError` naming the layer when an exit or cut follows no stage, or
    when shapes do not fit, also when something does not take as many tensors as a stage gives.

    forms    of what each stage gives, in order. `stage_infos` have the shape of the one activation
             there: of a tuple (features,)
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[nn.Module],
        exits: Mapping[int, nn.Module],
        tails: Mapping[int, nn.Module],
        preprocessing: Preprocessing,
        class_names: Sequence[str],
        stage_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.preprocessing = preprocessing
        self.class_names = tuple(class_names)
        self.exits_after = tuple(sorted(exits))
        self.cuts = tuple(sorted(tails))
        self.stage_names = tuple(stage_names or (f"stage{i}" for i in range(len(stages))))
        if not stages or not exits or len(self.class_names) < 2:
            raise ModelError(f"model {name!r} needs at least one stage, one exit and two classes")
        if len(self.stage_names) != len(stages):
            raise ModelError(f"model {name!r}: {len(self.stage_names)} names for {len(stages)} stages")
        for what, places in (("exit", self.exits_after), ("cut", self.cuts)):
            for after in places:
                if not 0 <= after < len(stages):
                    raise ModelError(
                        f"model {name!r}: {what} after stage {after}, but its stages are "
                        f"0 to {len(stages) - 1}"
                    )
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleDict({str(after): exits[after] for after in self.exits_after})
        self.tails = nn.ModuleDict({str(cut): tails[cut] for cut in self.cuts})
        self._measure()

    @classmethod
    def from_parts(
        cls,
        *,
        name: str,
        stages: Sequence[nn.Module],
        exits: Mapping[int, nn.Module],
        tails: Mapping[int, nn.Module],
        preprocessing: Preprocessing,
        class_names: Sequence[str],
        stage_names: Sequence[str] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> SplitModel:
        """Build from the owner's own modules; `state` is a checkpoint of a `SplitModel`, loaded strictly.

        Modules that already carry trained weights keep them. Raises `ModelError`
        when shapes do not fit or the checkpoint belongs to another network.
        """
        model = cls(name, stages, exits, tails, preprocessing, class_names, stage_names)
        if state is not None:
            try:
                model.load_state_dict(dict(state))
            except RuntimeError as error:
                raise ModelError(f"the checkpoint does not fit model {name!r}: {error}") from error
        return model

    def _measure(self) -> None:
        """Fill the tables of shapes and costs, checking that every piece fits the next."""
        form = Form((self.preprocessing.input_shape,))
        classes = len(self.class_names)
        infos, self.forms = list[StageInfo](), list[Form]()
        for i, stage in enumerate(self.stages):
            check_takes(stage, f"stages.{i}", form, _giver(i - 1))
            macs, form = trace_cost(stage, form, f"stages.{i}")
            infos.append(StageInfo(self.stage_names[i], macs, count_bytes(stage), form.shape))
            self.forms.append(form)
        self.stage_infos = tuple(infos)
        heads = [(f"exits.{a}", a, self.exits[str(a)]) for a in self.exits_after]
        heads += [(f"tails.{c}", c, self.tails[str(c)]) for c in self.cuts]
        self._macs: dict[str, int] = {}
        for path, after, module in heads:
            check_takes(module, path, self.forms[after], _giver(after))
            self._macs[path], out = trace_cost(module, self.forms[after], path)
            if out.several:
                raise ModelError(f"{path} gives {out.told()}: give the logits (B, classes) alone")
            if out.shape != (classes,):
                raise ModelError(
                    f"{path} gives {out.shape} for one image, but the model has {classes} classes: "
                    f"end it in a layer with {classes} outputs"
                )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Preprocessed (B, C, H, W) -> logits (B, classes) of every exit, then of every tail."""
        exits, tails = [], []
        given: Activation = x
        for i, stage in enumerate(self.stages):
            given = stage(*operands(given))
            if i in self.exits_after:
                exits.append(self.exits[str(i)](*operands(given)))
            if i in self.cuts:
                tails.append(self.tails[str(i)](*operands(given)))
        return exits + tails

    def head(self, x: Tensor, upto: int) -> Activation:
        """Preprocessed (B, C, H, W) -> what stage `upto` gives: (B, *output_shape), or a tuple of tensors.

        `blindtail.models.several.flat` makes the one activation of a tuple.
        """
        if not 0 <= upto < len(self.stages):
            raise ModelError(f"model {self.name!r} has no stage {upto}")
        given: Activation = x
        for stage in list(self.stages)[: upto + 1]:
            given = stage(*operands(given))
        return given

    def stage(self, index: int) -> nn.Module:
        """A stage that takes one activation and gives one: flat ones in the place of tuples."""
        given = self.forms[index - 1] if index else Form((self.preprocessing.input_shape,))
        return piece(self.stages[index], given, self.forms[index].several)

    def exit(self, after: int) -> nn.Module:
        """The exit after a stage, on the one activation there: (B, *output_shape) -> logits."""
        return piece(self.exits[str(after)], self.forms[after])

    def tail(self, cut: int) -> nn.Module:
        """The tail of a cut, on the one activation there: (B, *output_shape) -> logits. It shares weights."""
        return piece(self.tails[str(cut)], self.forms[cut])

    def features(self, cut: int) -> int:
        """Length of the flattened activation at a cut."""
        return math.prod(self.stage_infos[cut].output_shape)

    def tail_macs(self, cut: int) -> int:
        return self._macs[f"tails.{cut}"]

    def exit_infos(self, temperatures: Sequence[float], thresholds: Sequence[float]) -> tuple[ExitInfo, ...]:
        """One description per exit, in order; see `ExitInfo` for the numbers."""
        if not len(temperatures) == len(thresholds) == len(self.exits_after):
            raise ModelError(
                f"give one temperature and one threshold for each of {len(self.exits_after)} exits"
            )
        return tuple(
            ExitInfo(
                name=f"exit{i + 1}",
                after_stage=after,
                temperature=float(temperatures[i]),
                macs=self._macs[f"exits.{after}"],
                bytes=count_bytes(self.exits[str(after)]),
                threshold=float(thresholds[i]),
            )
            for i, after in enumerate(self.exits_after)
        )

    def edge_budget(self) -> dict[str, int]:
        """MACs and parameter bytes of head and exits, one image through all of them."""
        return {
            "macs": sum(s.macs for s in self.stage_infos)
            + sum(self._macs[f"exits.{after}"] for after in self.exits_after),
            "bytes": sum(s.bytes for s in self.stage_infos)
            + sum(count_bytes(self.exits[str(after)]) for after in self.exits_after),
        }

    @torch.no_grad()
    def logits(self, images: object, batch: int = 500) -> list[Tensor]:
        """Raw images (n, C, H, W) in the accepted dtype -> what `forward` gives, in evaluation mode."""
        x = torch.from_numpy(self.preprocessing.apply(images))  # type: ignore[arg-type]
        training = self.training
        self.eval()
        try:
            parts = [self(x[i : i + batch]) for i in range(0, len(x), batch)]
        finally:
            self.train(training)
        return [torch.cat(column) for column in zip(*parts, strict=True)]


def _giver(stage: int) -> str:
    return f"stages.{stage}" if stage >= 0 else "preprocessing"
