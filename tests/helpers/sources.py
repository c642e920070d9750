# SPDX-License-Identifier: Apache-2.0
"""Small networks in scripts, and an object that tells when a file ran code."""

import os

import torch
from torch import nn

NETWORK = """
from torch import nn
{extra}
def build():
    return nn.Sequential(nn.Conv2d(3, {width}, 3), nn.BatchNorm2d({width}))
"""


def tiny(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def write_script(folder, width=4, extra="", name="net.py"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(NETWORK.format(width=width, extra=extra))
    return path


def assert_same_weights(module, state):
    own = module.state_dict()
    assert set(own) == set(state)
    for key, value in state.items():
        assert torch.equal(own[key], value), key


class Touch:
    """Writes a file when unpickled: what a hostile checkpoint would do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
