"""The networks of table 1, with Keras' initial weights, as the paper's have.

Layers carry the table's names. Softmax is left to the loss, as torch has it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def lenet_5(classes: int = 10) -> nn.Sequential:
    """Make LeNet-5 of table 1(a): 60 074 parameters for inputs (B, 1, 28, 28)."""
    return _initialised(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 6, 3),
                relu1=nn.ReLU(),
                pool1=nn.AvgPool2d(2),
                conv2=nn.Conv2d(6, 16, 3),
                relu2=nn.ReLU(),
                pool2=nn.AvgPool2d(2),
                flatten=nn.Flatten(),
                layer1=nn.Linear(400, 120),
                relu3=nn.ReLU(),
                layer2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                layer3=nn.Linear(84, classes),
            )
        )
    )


def vgg_like(classes: int = 10, dropout: tuple[float, ...] = (0.2, 0.3, 0.4)) -> nn.Sequential:
    """Make the VGG-like network of table 1(b) for inputs (B, 3, 32, 32).

    308 394 parameters, and 896 moving means and variances: the table's 309 290.

    Parameters
    ----------
    dropout : tuple of float, length 3
        After the convolutions 2, 4 and 6. The paper does not give them; these are from its code.
    """
    if len(dropout) != 3:
        raise ValueError(f"dropout: got {dropout}, want three shares")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for index, width in enumerate((32, 32, 64, 64, 128, 128), 1):
        layers[f"conv{index}"] = nn.Conv2d(channels, width, 3, padding=1)
        layers[f"elu{index}"] = nn.ELU()
        # Keras' batch normalisation: epsilon 0.001, momentum 0.99 of the old.
        layers[f"norm{index}"] = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        if index % 2 == 0:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
            layers[f"dropout{index}"] = nn.Dropout(dropout[index // 2 - 1])
        channels = width
    layers["flatten"] = nn.Flatten()
    layers["denselayer"] = nn.Linear(2048, classes)
    return _initialised(nn.Sequential(layers))


def _initialised(network: nn.Sequential) -> nn.Sequential:
    """Draw Glorot's uniform weights, with biases zero: where Keras begins."""
    for module in network:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # Channels last: a step of LeNet-5 takes an eighth less time on a CPU; values are the same.
    for module in network:
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data
            module.weight.data = weight.contiguous(memory_format=torch.channels_last)
    return network
