"""Networks of the field, of any width: what refreshed tails are tried and measured on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def lenet5(activation: type[nn.Module] = nn.ReLU, *, side: int = 28) -> nn.Sequential:
    """LeNet-5 for (1, side, side), max pooling (LeCun et al., 1998, with today's pooling)."""
    left = ((side // 2) - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), activation(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), activation(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * left * left, 120), activation()),
        *(nn.Linear(120, 84), activation(), nn.Linear(84, 10)),
    )


def alexnet(width: int = 64, *, side: int = 32) -> nn.Sequential:
    """AlexNet's shape for small images: five convolutions, three of them pooled, three linear layers."""
    w = [width, 3 * width, 6 * width, 4 * width, 4 * width]
    features = w[4] * (side // 16) ** 2
    return nn.Sequential(
        *(nn.Conv2d(3, w[0], 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(w[0], w[1], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(w[1], w[2], 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(w[2], w[3], 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(w[3], w[4], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(features, 16 * width), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(16 * width, 16 * width), nn.ReLU(), nn.Linear(16 * width, 10)),
    )


class Block(nn.Module):
    """ResNet's basic block. shortcut: "projection" (1 x 1 convolution) or "padding" (He et al., 2015, A)."""

    def __init__(self, given: int, out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - given
        self.shortcut: nn.Module = nn.Identity()
        if shortcut == "projection" and (stride > 1 or self.more):
            self.stride, self.more = 1, 0
            self.shortcut = nn.Sequential(nn.Conv2d(given, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        x = self.shortcut(x)
        if self.stride > 1 or self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(self.bn2(self.conv2(out)) + x)


def resnet20(
    widths: tuple[int, int, int] = (16, 32, 64), blocks: int = 3, shortcut: str = "padding"
) -> nn.Sequential:
    """ResNet-20 for (3, n, n); fewer `blocks` a stage give a ResNet-8 or -14."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    given = widths[0]
    for stage, out in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(given, out, 2 if stage and not block else 1, shortcut))
            given = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, 10))


class PreActivation(nn.Module):
    """A residual network whose sums are not followed by an activation, but by a norm with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        self.last = nn.Linear(2 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.last(x.flatten(1))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """Branches, a product of two activations, attention over channels, and a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(12, 8)
        self.query, self.out = nn.Linear(8, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        gate = F.silu(self.one(x)) * torch.sigmoid(self.two(x))
        q = self.query(gate).view(gate.shape[0], 2, 4)
        mixed = F.scaled_dot_product_attention(q, q, q).flatten(1)
        return F.log_softmax(self.out(torch.cat([gate, mixed], 1)), 1)


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with statistics and weights of their own, in evaluation mode: nothing folds away by chance."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.running_mean, -0.2),
                (module.bias, -0.2),
            ):
                assert tensor is not None
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return net.eval()
