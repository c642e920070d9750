# SPDX-License-Identifier: Apache-2.0
"""Networks of (3, 8, 8) images that use PyTorch in every way that a graph can get wrong."""

import torch
from helpers.networks import Net, conv
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return functional.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=1)


class BatchNormWithActivation(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


class ConvWithItsOwnNorm(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(super().forward(x))


def write_into_copy(net, x):
    x = net.c(x)
    y = x.clone()
    y.relu_()
    return x + 2 * y


def write_into_alias(net, x):
    x = net.c(x)
    y = functional.dropout(x, 0.5, net.training)  # the same memory in eval mode
    y.relu_()
    return x + 2 * y


def write_into_detached(net, x):
    x = net.c(x)
    y = x.detach()
    y.relu_()
    return x + 2 * y


def write_into_slice(net, x):
    x = net.bn(net.c(x))
    x[:, :2] = x[:, :2] * 2
    x[:, 2:].relu_()
    return x


def copy_into_new_memory(net, x):
    x = net.c(x)
    y = torch.zeros(x.shape[0], 5, 8, 8, dtype=torch.float64)
    y[:, :4] = x  # another type
    y[:, 4:].copy_(x[:, :1])
    y[:, 2:3] = x[0, 0, 0, 0]  # a scalar, spread out
    return y[:, 1:].float()


def copy_in_place(net, x):
    x = net.c(x)
    whole = torch.zeros(x.shape, dtype=torch.int64)
    same = functional.dropout(whole, 0.5, net.training)  # the same memory in eval mode
    whole.copy_(10 * x[:, :1])  # cut to integers, spread over the channels
    return torch.cat([x[:, :1], x[:, 1:] + same[:, 1:].float()], 1)


def write_twice(net, x):
    x = net.c(x)
    y = x
    x += 1
    y *= x
    return x + y


def write_into_input(net, x):
    x.mul_(2)
    return net.c(x)


def accumulate(net, x):
    x = net.c(x)
    total = torch.zeros(x.shape[0], 4, 8, 8)
    total += x
    total.relu_()
    return total + x


def accumulate_constants(net, x):
    factor = torch.ones(4, 1, 1)
    factor += 1.5
    early = factor * 2
    factor += 1
    return net.c(x) * factor + early


def without_gradient(net, x):
    with torch.no_grad():
        x = net.bn(net.c(x))
    return x.relu()


def windows(net, x):
    x = net.c(x)
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h // 4, 4, w // 4, 4, c).transpose(2, 3)
    x = net.mix(x.reshape(-1, 16, c))
    n = x.shape[0] // 4  # worked out from the windows, not read off the images
    x = x.reshape(n, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(n, h, w, c)
    return x.permute(0, 3, 1, 2).relu()


def attention(net, x):
    x = net.c(x)
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([net.fc.weight[:1].expand(x.shape[0], 1, -1), tokens], 1)
    tokens = tokens + net.attention(tokens, tokens, tokens, need_weights=False)[0]
    return tokens[:, 1:].transpose(1, 2).reshape(x.shape)


def shuffle(net, x):
    x = net.c(x)
    n, c, h, w = x.shape
    return net.d(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


NETS = {
    "reused convolution": lambda: Net(
        lambda n, x: n.b(n.b(n.a(x)).relu()).relu(), a=conv(), b=conv(4, 4)
    ),
    "reused relu module": lambda: Net(
        lambda n, x: n.act(n.b(n.act(n.a(x)))), a=conv(), b=conv(4, 4), act=nn.ReLU(inplace=True)
    ),
    "reused batch norm": lambda: Net(
        lambda n, x: n.bn(n.b(n.bn(n.a(x)))), a=conv(), b=conv(4, 4), bn=nn.BatchNorm2d(4)
    ),
    "functional": lambda: Net(
        lambda n, x: functional.relu6(torch.add(n.a(x), n.b(x), alpha=2)), a=conv(), b=conv()
    ),
    "in place": lambda: Net(
        lambda n, x: functional.leaky_relu(n.a(x), 0.1, inplace=True).add_(1), a=conv()
    ),
    "write into a copy": lambda: Net(write_into_copy, c=conv()),
    "write into an alias": lambda: Net(write_into_alias, c=conv()),
    "write into a detached tensor": lambda: Net(write_into_detached, c=conv()),
    "write into a slice": lambda: Net(write_into_slice, c=conv(), bn=nn.BatchNorm2d(4)),
    "copy into new memory": lambda: Net(copy_into_new_memory, c=conv()),
    "copy in place": lambda: Net(copy_in_place, c=conv()),
    "write twice": lambda: Net(write_twice, c=conv()),
    "write into the input": lambda: Net(write_into_input, c=conv()),
    "accumulate into zeros": lambda: Net(accumulate, c=conv()),
    "accumulate constants": lambda: Net(accumulate_constants, c=conv()),
    "batch norm after an add": lambda: Net(
        lambda n, x: n.bn(n.a(x) + n.b(x)), a=conv(), b=conv(), bn=nn.BatchNorm2d(4)
    ),
    "batch norm after a concat": lambda: Net(
        lambda n, x: n.bn(torch.cat([n.a(x), n.b(x)], 1)),
        channels=8, a=conv(), b=conv(), bn=nn.BatchNorm2d(8),
    ),
    "batch norm on the images": lambda: Net(
        lambda n, x: n.c(n.bn(x)), bn=nn.BatchNorm2d(3), c=conv()
    ),
    "batch norm without statistics": lambda: Net(
        lambda n, x: n.bn(n.c(x)), c=conv(), bn=nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "batch norm without affine": lambda: Net(
        lambda n, x: n.bn(n.c(x)), c=conv(), bn=nn.BatchNorm2d(4, affine=False)
    ),
    "batch norm with its activation": lambda: Net(
        lambda n, x: n.bn(n.c(x)), c=conv(), bn=BatchNormWithActivation(4)
    ),
    "convolution with its norm inside": lambda: Net(
        lambda n, x: n.c(x).relu(), c=ConvWithItsOwnNorm()
    ),
    "batch norm behind a batch norm": lambda: Net(
        lambda n, x: n.b(n.a(n.c(x))), c=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4)
    ),
    "two batch norms read one layer": lambda: Net(
        lambda n, x: functional.relu(n.a(x := n.c(x))) + n.b(x),
        c=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4),
    ),
    "instance norm": lambda: Net(
        lambda n, x: n.b(n.a(n.c(x))), c=conv(),
        a=nn.InstanceNorm2d(4), b=nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ),
    "one weight, two strides": lambda: Net(
        lambda n, x: n.c(x).mean((2, 3), True) + functional.conv2d(x, n.c.weight, None, 2).mean(
            (2, 3), True
        ), c=conv(),
    ),
    "padding same": lambda: Net(lambda n, x: n.c(x), c=nn.Conv2d(3, 4, (3, 4), padding="same")),
    "padding reflect": lambda: Net(
        lambda n, x: n.c(x), c=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    ),
    "grouped": lambda: Net(
        lambda n, x: n.b(n.a(x)), channels=8, a=conv(3, 6, groups=3), b=conv(6, 8, groups=2)
    ),
    "depthwise, dilated, strided": lambda: Net(
        lambda n, x: n.b(n.a(x)), channels=6,
        a=conv(3, 6, groups=3, stride=(2, 1)), b=nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
    ),
    "transposed convolution": lambda: Net(
        lambda n, x: n.up(n.c(x)), c=conv(), up=nn.ConvTranspose2d(4, 4, 2, stride=2)
    ),
    "weight-standardised": lambda: Net(
        lambda n, x: n.bn(n.c(x)), c=StandardisedConv(3, 4, 3), bn=nn.BatchNorm2d(4)
    ),
    "weight norm": lambda: Net(lambda n, x: n.c(x), c=weight_norm(conv())),
    "dropout": lambda: Net(
        lambda n, x: n.d2(n.d(n.c(x))), c=conv(), d=nn.Dropout(inplace=True), d2=nn.Dropout2d()
    ),
    "no_grad inside": lambda: Net(without_gradient, c=conv(), bn=nn.BatchNorm2d(4)),
    "windows": lambda: Net(windows, c=conv(), mix=nn.Linear(4, 4)),
    "attention": lambda: Net(
        attention, c=conv(), attention=nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    "channel shuffle": lambda: Net(shuffle, c=conv(), d=conv(4, 4)),
    "chunk": lambda: Net(
        lambda n, x: torch.cat([t.relu() for t in n.c(x).chunk(2, 1)], 1), c=conv()
    ),
    "awkward names": lambda: Net(
        lambda n, x: n.x(n.constants(n.quantizers(n.shifts(x)))),
        shifts=nn.Sequential(conv(), nn.BatchNorm2d(4)), quantizers=conv(4, 4),
        constants=conv(4, 4), x=conv(4, 4),
    ),
}  # fmt: skip
