"""The paper's networks (section 6), their blocks gated; untouched, a gated network is a dense one.

Weights are drawn from torch's default generator: by He's rule for the residual networks, by torch's
own for those of MNIST, their blocks' then divided by the square root of the number of blocks. The
paper does not say how weights start. As torch makes them, a dense block adds about a seventh to
what passes through it, 49 of them a thousandfold: the first steps then throw a third of the first
layer's units to where no image ever activates them again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from retrain.trainers.gates.block import Gated, padded, pointwise, stacked
from solvers import checks


def dense_network(
    layers: int = 10, width: int = 100, inputs: int = 784, classes: int = 10
) -> nn.Module:
    """Make section 6.1's fully connected network: relu(xi (W z + b) + z) from the second layer on.

    `layers` hidden ones: 170 410 parameters with 10 of them, 271 410 with 20, 574 410 with 50.

    Raises
    ------
    ValueError
        If there is no layer to gate.
    """
    if layers < 2:
        raise ValueError(f"layers: got {layers}: the first is not gated, want 2 or more")
    modules: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("layer1", nn.Linear(inputs, width)),
        ("relu1", nn.ReLU()),
    ]
    for number in range(2, layers + 1):
        modules.append((f"layer{number}", Gated(nn.Linear(width, width), after=nn.ReLU())))
    return _calm(nn.Sequential(OrderedDict([*modules, ("output", nn.Linear(width, classes))])))


def deep_lenet(layers: int = 10) -> nn.Module:
    """Make section 6.1's convolutional network for 28 x 28 images, a deeper LeNet-5.

    Half of its `layers` convolutions, all 5 x 5, have 6 filters, the other half 16; those that keep
    the number are gated, with identity skips. 183 544 parameters with 40 of them. Channels come
    last in memory: a step on a CPU takes two thirds of the time.

    Raises
    ------
    ValueError
        If `layers` is odd, or below 4.
    """
    if layers < 4 or layers % 2:
        raise ValueError(f"layers: got {layers}, want an even number, 4 or more")
    half = layers // 2
    modules: list[tuple[str, nn.Module]] = []
    for stage, (n_in, n_out) in enumerate(((1, 6), (6, 16)), 1):
        first = (stage - 1) * half + 1
        modules += [(f"conv{first}", nn.Conv2d(n_in, n_out, 5)), (f"relu{first}", nn.ReLU())]
        for number in range(first + 1, first + half):
            block = Gated(nn.Conv2d(n_out, n_out, 5, padding=2), after=nn.ReLU())
            modules.append((f"conv{number}", block))
        modules.append((f"pool{stage}", nn.MaxPool2d(2)))
    modules += [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(256, 120)),
        ("relu_fc1", nn.ReLU()),
        ("fc2", nn.Linear(120, 84)),
        ("relu_fc2", nn.ReLU()),
        ("output", nn.Linear(84, 10)),
    ]
    network = _calm(nn.Sequential(OrderedDict(modules)))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # Not `contiguous`: it leaves the first one, of a single channel, in the other order.
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    return network


VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(classes: int = 10, width: int = 64) -> nn.Module:
    """Make section 6.2.1's VGG16 for 32 x 32 images, with skips around 12 of its 13 convolutions.

    relu(xi B(W z) + skip(z)); the skip is the identity, and where the width doubles it stacks a
    copy. Two dense layers follow. `width` is that of the first stage; the others grow with it.
    """
    modules: list[tuple[str, nn.Module]] = []
    n_in = 3
    for stage, widths in enumerate(VGG16, 1):
        layers: list[tuple[str, nn.Module]] = []
        for number, full in enumerate(widths, 1):
            n_out = full * width // 64
            convolution = nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
            )
            if n_in == 3:
                layers += [(f"conv{number}", convolution), (f"relu{number}", nn.ReLU())]
            else:
                skip = stacked() if n_out == 2 * n_in else nn.Identity()
                layers.append((f"conv{number}", Gated(convolution, skip, nn.ReLU())))
            n_in = n_out
        modules.append((f"stage{stage}", nn.Sequential(OrderedDict(layers))))
        modules.append((f"pool{stage}", nn.MaxPool2d(2)))
    modules += [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(n_in, n_in)),
        ("relu_fc1", nn.ReLU()),
        ("output", nn.Linear(n_in, classes)),
    ]
    return _he(nn.Sequential(OrderedDict(modules)))


def resnet_cifar(
    depth: int = 56,
    classes: int = 10,
    width: int = 16,
    kind: str = "wbaw",
    skip: str = "padded",
) -> nn.Module:
    """Make section 6.2.2's ResNet for 32 x 32 images: three stages of (depth - 2) / 6 blocks.

    Parameters
    ----------
    depth : int
        Of the layers with weights: 56, 110; 6 n + 2.
    width : int
        Filters of the first stage: 16.
    kind : {"wbaw", "resnet", "resnet-v2"}
        The paper's W-B-a-W; ResNet's W-B-a-W-B with a ReLU after the sum; B-a-W-B-a-W.
    skip : {"padded", "pointwise"}
        Where the shape changes. With "padded", ResNet56 takes the 125.5 million multiplications
        that the paper counts.

    Raises
    ------
    ValueError
        If an argument is none of those.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth: got {depth}, want 6 n + 2 with n at least 1")
    make = _chosen("kind", kind, BASIC_BLOCKS)
    skips = _chosen("skip", skip, {"padded": padded, "pointwise": pointwise})
    modules: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(3, width, 3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU()),
    ]
    n_in = width
    for stage in range(3):
        n_out = width << stage
        stride = 1 if stage == 0 else 2
        stage_blocks: list[tuple[str, nn.Module]] = []
        for number in range(1, blocks + 1):
            changes = n_in != n_out
            shortcut = skips(n_in, n_out, stride) if changes else nn.Identity()
            block, after = make(n_in, n_out, stride if changes else 1)
            stage_blocks.append((f"block{number}", Gated(block, shortcut, after)))
            n_in = n_out
        modules.append((f"stage{stage + 1}", nn.Sequential(OrderedDict(stage_blocks))))
    if kind == "resnet-v2":
        modules += [("norm_out", nn.BatchNorm2d(n_in)), ("relu_out", nn.ReLU())]
    return _he(nn.Sequential(OrderedDict([*modules, *_head(n_in, classes)])))


def resnet50(classes: int = 1000, width: int = 64) -> nn.Module:
    """Make section 6.3's W-B-a-W form of ResNet50, for images of 224 x 224.

    Bottlenecks W-B-a-W-B-a-W, nothing after the sum. Where the shape changes the skip is a 1x1
    convolution, which is absorbed when its block is pruned and the next one can take it.
    """
    modules: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(3, width, 7, 2, 3, bias=False)),
        ("norm", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU()),
        ("pool", nn.MaxPool2d(3, 2, 1)),
    ]
    n_in = width
    for stage, count in enumerate((3, 4, 6, 3)):
        inner, n_out = width << stage, 4 * width << stage
        blocks: list[tuple[str, nn.Module]] = []
        for number in range(1, count + 1):
            stride = 2 if number == 1 and stage > 0 else 1
            shortcut = pointwise(n_in, n_out, stride) if number == 1 else nn.Identity()
            blocks.append(
                (f"block{number}", Gated(_bottleneck(n_in, inner, n_out, stride), shortcut))
            )
            n_in = n_out
        modules.append((f"stage{stage + 1}", nn.Sequential(OrderedDict(blocks))))
    modules += [("norm_out", nn.BatchNorm2d(n_in)), ("relu_out", nn.ReLU())]
    return _he(nn.Sequential(OrderedDict([*modules, *_head(n_in, classes)])))


def _wbaw(n_in: int, n_out: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """Ours: W-B-a-W, h the identity."""
    block = nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
        nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
    )
    return block, nn.Identity()


def _resnet(n_in: int, n_out: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """W-B-a-W-B, h a ReLU."""
    block, _ = _wbaw(n_in, n_out, stride)
    return nn.Sequential(*block.children(), nn.BatchNorm2d(n_out)), nn.ReLU()


def _resnet_v2(n_in: int, n_out: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """B-a-W-B-a-W, h the identity."""
    block, _ = _wbaw(n_in, n_out, stride)
    return nn.Sequential(nn.BatchNorm2d(n_in), nn.ReLU(), *block.children()), nn.Identity()


BlockMaker = Callable[[int, int, int], tuple[nn.Module, nn.Module]]
BASIC_BLOCKS: dict[str, BlockMaker] = {"wbaw": _wbaw, "resnet": _resnet, "resnet-v2": _resnet_v2}


def _bottleneck(n_in: int, inner: int, n_out: int, stride: int) -> nn.Module:
    widths = (n_in, inner, inner, n_out)
    kernels, strides = (1, 3, 1), (1, stride, 1)
    layers: list[nn.Module] = []
    for (a, b), kernel, step in zip(pairwise(widths), kernels, strides, strict=True):
        layers += [nn.BatchNorm2d(a), nn.ReLU()] if layers else []
        layers.append(nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
    return nn.Sequential(*layers)


def _head(features: int, classes: int) -> list[tuple[str, nn.Module]]:
    return [
        ("pool_out", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("output", nn.Linear(features, classes)),
    ]


def _calm(model: nn.Sequential) -> nn.Sequential:
    """Divide the blocks' weights by the square root of the number of blocks."""
    blocks = [module.block for module in model if isinstance(module, Gated)]
    with torch.no_grad():
        for block in blocks:
            for parameter in block.parameters():
                parameter.div_(len(blocks) ** 0.5)
    return model


def _he(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _chosen(argument: str, name: str, among: dict[str, Callable]) -> Callable:
    checks.one_of(among, **{argument: name})
    return among[name]
