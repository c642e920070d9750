# SPDX-License-Identifier: Apache-2.0
"""Hand-written networks, each with one thing to get right."""

import torch
from helpers.families import randomise
from torch import nn

from zsq.teacher.graph import build_network, export_module


def conv(c_in=3, c_out=4, kernel=3, **options):
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


class Net(nn.Module):
    """Named parts and a function of them and the images; a linear classifier at the end."""

    def __init__(self, function, channels=4, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(self.function(self, x).mean((2, 3)))


def network_of(module, shape=(3, 8, 8)):
    return build_network(export_module(randomise(module), shape))


def images(*shape, count=3):
    return torch.randn(count, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(2))


def smooth_images(count, shape=(3, 8, 8), seed=0):
    """Return images without much noise, of mean 0 and standard deviation 1 per channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, shape[0], 4, 4, generator=generator)
    x = nn.functional.interpolate(x, size=shape[1:], mode="bilinear")
    return nn.functional.batch_norm(x, None, None, training=True)


def with_own_statistics(module, shape=(3, 8, 8)):
    """Let batch norms store what smooth images give them, as if the network had been trained."""
    norms = [p for p in module.modules() if isinstance(p, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        module.train()(smooth_images(256, shape))
    return module.eval()


class Residual(nn.Module):
    """Stem, a residual block with a projection, one without, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = conv(3, 4, bias=False), nn.BatchNorm2d(4)
        self.a1, self.a1_bn = conv(4, 6, stride=2, bias=False), nn.BatchNorm2d(6)
        self.a2, self.a2_bn = conv(6, 6, bias=False), nn.BatchNorm2d(6)
        self.proj, self.proj_bn = conv(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6)
        self.b1, self.b1_bn = conv(6, 6, bias=False), nn.BatchNorm2d(6)
        self.b2, self.b2_bn = conv(6, 6, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.stem_bn(self.stem(x)))
        y = self.a2_bn(self.a2(self.relu(self.a1_bn(self.a1(x)))))
        x = self.relu(y + self.proj_bn(self.proj(x)))
        y = self.b2_bn(self.b2(self.relu(self.b1_bn(self.b1(x)))))
        x = self.relu(y + x)
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """Stem, an inverted residual with ReLU6 and a linear bottleneck, a last convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = conv(3, 4, bias=False), nn.BatchNorm2d(4)
        self.exp, self.exp_bn = conv(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.dw, self.dw_bn = conv(8, 8, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pw, self.pw_bn = conv(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.last, self.last_bn = conv(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.stem_bn(self.stem(x)))
        y = self.act(self.exp_bn(self.exp(x)))
        y = self.act(self.dw_bn(self.dw(y)))
        x = x + self.pw_bn(self.pw(y))
        x = self.act(self.last_bn(self.last(x)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(nn.Module):
    """Two branches of max-pooled features side by side, as in SqueezeNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze = conv(3, 4), conv(4, 4, 1)
        self.left, self.right, self.last = conv(4, 3, 1), conv(4, 3), conv(6, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        x = self.squeeze(x).relu()
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.fc(self.last(x).relu().mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A gate on the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 4), conv(4, 4)
        self.down, self.up = conv(4, 2, 1), conv(2, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.body(self.stem(x).relu()).relu()
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc((x * gate).mean((2, 3)))


class SplitAttention(nn.Module):
    """Two branches, weighed against each other channel by channel (selective kernels)."""

    def __init__(self, width=32):
        super().__init__()
        self.width = width
        self.stem, self.left, self.right = conv(3, 8), conv(8, width), conv(8, width, 1)
        self.down, self.up = conv(width, 8, 1), conv(8, 2 * width, 1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        both = torch.stack([self.left(x).relu(), self.right(x).relu()], 1)
        pooled = both.sum(1).mean((2, 3), keepdim=True)
        choice = self.softmax(self.up(self.down(pooled).relu()).reshape(-1, 2, self.width))
        return self.fc((both * choice[..., None, None]).sum(1).mean((2, 3)))

    def softmax(self, x):
        return x.softmax(1)


class DecomposedSplitAttention(SplitAttention):
    """The same with the operator that decomposed graphs have."""

    def softmax(self, x):
        return torch._softmax(x, 1, False)


class Branch(nn.Module):
    """Two residual blocks in a row."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (conv(4, 4) for _ in range(4))

    def forward(self, x):
        x = (x + self.b(self.a(x).relu())).relu()
        return (x + self.d(self.c(x).relu())).relu()


class Parallel(nn.Module):
    """Two branches that exchange their values twice; no cut between stem and head."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.over, self.fc = conv(), conv(4, 4), conv(4, 4), nn.Linear(4, 3)
        self.one, self.two, self.three, self.four = (Branch() for _ in range(4))

    def forward(self, x):
        x = self.stem(x).relu()
        a, b = self.one(x), self.two(self.down(x))
        a, b = a + b, b + self.over(a)
        a, b = self.three(a), self.four(b)
        return self.fc((a * b).mean((2, 3)))
