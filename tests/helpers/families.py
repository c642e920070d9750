# SPDX-License-Identifier: Apache-2.0
"""Small networks of pytorchcv's families: the real blocks, a few of each, with few channels."""

from functools import cache
from importlib import import_module

import torch
from torch import nn

from zsq.teacher.graph import build_network, export_module

CLASSES = 5
#: family -> class, its arguments, by keyword, side of the images where it is not 32
FAMILIES = {
    "resnet": ("ResNet", ([[8], [12, 12]], 8, False, False)),
    "preresnet": ("PreResNet", ([[8], [16]], 8, True, False)),
    "densenet": ("DenseNet", ([[12, 16], [14, 18]], 8)),
    "mobilenet": ("MobileNet", ([[8], [12], [16, 16]], False)),
    "mobilenetv2": ("MobileNetV2", ([[8], [12, 12], [16, 16]], 8, 24, False)),
    "mobilenetv3": (
        "MobileNetV3",
        (
            *([[8], [12, 12], [16, 16]], [[8], [24, 36], [48, 48]], 8, 24, 32),
            *([[1], [0, 1], [0, 0]], [[1], [1, 0], [0, 0]], [[1], [0, 1], [1, 1]], True, False),
        ),
    ),
    "shufflenet": ("ShuffleNet", ([[24, 24], [48, 48]], 12, 3), 64),
    "shufflenetv2": ("ShuffleNetV2", ([[16, 16], [32, 32]], 8, 24), 64),
    "squeezenet": ("SqueezeNet", ([[16, 16], [32]], [[0, 1], [0]], 3, 16), 64),
    "efficientnet": (
        "EfficientNet",
        ([[8], [12, 12], [16]], 8, 24, [[3], [3, 3], [5]], [1, 2, 2], [[1], [6, 6], [6]]),
    ),
    "seresnet": ("SEResNet", ([[16], [32]], 16, False, False)),
    "bninception": (
        "BNInception",
        (
            *([[32], [40, 32]], [8, 12], [[[8, 8]], [[8, 8], [8, 8]]]),
            [[[8, 8, 8, 8]], [[0, 4, 4, 0], [8, 8, 8, 8]]],
        ),
    ),
    "mnasnet": (
        "MnasNet",
        (
            *([[12, 12], [16]], [8, 8], [16, 24], [[1, 1], [0]]),
            *([[3, 3], [6]], [[0, 0], [4]], False, False),
        ),
    ),
    "resnext": ("ResNeXt", ([[64], [64]], 8, 4, 4)),
    "ghostnet": (
        "GhostNet",
        ([[8], [12, 12]], 8, 24, 32, [[1], [1, 0]], [[1], [3, 3]], [[0], [0, 1]], False),
    ),
    "dpn": (
        "DPN",
        ([[28, 32], [47]], 8, 3, 1, [8, 16], [16, 32], [4, 5], 2, False, False, True),
    ),
    "xception": ("Xception", ([[16], [1024]],), 40),
    "diracnetv2": ("DiracNetV2", ([[8, 8], [16]], 8)),
    "vgg": ("VGG", ([[8, 8], [12, 12]], True, True), 28),
    "regnet": ("RegNet", ([[16], [24, 24]], 8, [8, 8], True)),
    "nin_cifar": ("CIFARNIN", ([[12, 8], [12, 12], [12, 8]], [5, 5, 3])),
    "wrn_cifar": ("CIFARWRN", ([[8], [16, 16]], 8)),
    "xdensenet_cifar": ("CIFARXDenseNet", ([[12, 16], [20, 24]], 8, True)),
}


def build(family):
    """Return a family's network, with random weights and statistics, and its image shape."""
    name, arguments, side = (*FAMILIES[family], 32)[:3]
    return construct(family, name, *arguments), (3, side, side)


@cache
def read(family):
    """Return a family's network, what zsq made of it, and images. Not to be changed: it is kept."""
    module, shape = build(family)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    return module, build_network(export_module(module, shape)), x


def construct(module, name, *arguments):
    """Return a pytorchcv network that takes images of any size, with random weights."""
    torch.manual_seed(0)
    family = import_module(f"pytorchcv.models.{module}")
    network = getattr(family, name)(*arguments, num_classes=CLASSES)
    for part in network.modules():
        for child_name, child in part.named_children():
            if isinstance(child, nn.AvgPool2d) and child.kernel_size >= 7:  # for 224x224 images
                setattr(part, child_name, nn.AdaptiveAvgPool2d(1))
    if module == "vgg":  # its classifier has 4096 channels whatever the arguments
        output = network.output
        output.fc1.fc = nn.Linear(output.fc1.fc.in_features, 24)
        output.fc2.fc, output.fc3 = nn.Linear(24, 24), nn.Linear(24, CLASSES)
    return randomise(network)


def randomise(module):
    """Give batch norms statistics and affine maps that differ between channels, some negative."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            channels = part.num_features
            part.running_mean.copy_(torch.randn(channels, generator=generator) * 0.3)
            part.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
            if part.weight is not None:
                signs = torch.randint(0, 8, (channels,), generator=generator).clamp(max=1) * 2 - 1
                with torch.no_grad():
                    part.weight.copy_(signs * (torch.rand(channels, generator=generator) + 0.5))
                    part.bias.copy_(torch.randn(channels, generator=generator) * 0.3)
    return module.eval()


def compose(network, units, x):
    """Run every unit's nodes one after the other, each from the previous unit's output alone.

    Written without zsq's own cutting of pieces: a dictionary of values that forgets everything at
    the end of a unit except the value of its last node that the rest of the network reads.
    """
    nodes = {node.name: node for node in network.graph.nodes}
    output = next(node for node in network.graph.nodes if node.op == "output").args[0]
    entry = next(node for node in network.graph.nodes if node.op == "placeholder")
    constants = {
        node: network.get_buffer(node.target)
        for node in network.graph.nodes
        if node.op == "get_attr"
    }
    for index, unit in enumerate(units):
        values = {**constants, entry: x}
        for name in unit.nodes:
            node = nodes[name]
            if node.op == "get_attr":
                continue
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "call_module":
                values[node] = network.get_submodule(node.target)(*args, **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)
        inside = {nodes[name] for name in unit.nodes}
        leaving = [
            node
            for node in map(nodes.__getitem__, unit.nodes)
            if node.op != "get_attr" and any(user not in inside for user in node.users)
        ]
        assert len(leaving) == 1, f"unit {unit.name} hands on {leaving}"
        entry, x = leaving[0], values[leaving[0]]
        if index == len(units) - 1:
            assert entry is output
    return x
