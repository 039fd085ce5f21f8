#!/usr/bin/env python3
"""Writes what PyTorch computes into tests/data, for tests/pytorch.rs to hold ours against.

    pip install torch==2.13.0 safetensors numpy
    python scripts/pytorch_reference.py tests/data

The files in the repository were written with PyTorch 2.13.0 on a CPU.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

OUT = Path(sys.argv[1])
# Every tensor under "case/name".
TENSORS = {}


def inputs(shape, dtype=torch.float32, seed=0):
    """x with a mean and a scale of its own in each channel, and dy."""
    generator = torch.Generator().manual_seed(seed)
    c = shape[1]
    view = [1, c] + [1] * (len(shape) - 2)
    mean = torch.linspace(-3.0, 5.0, c).view(view)
    scale = torch.linspace(0.5, 2.0, c).view(view)
    x = torch.randn(shape, generator=generator) * scale + mean
    dy = torch.randn(shape, generator=generator)
    return x.to(dtype), dy.to(dtype)


def record(case, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None:
            TENSORS[f"{case}/{name}"] = tensor.detach().clone().contiguous()


def run(case, layer, shape, *, batches=1, train=True, relu=False, residual=False,
        dtype=torch.float32, channels_last=False):
    """Trains `layer` on some batches; records the last output, all gradients, all statistics."""
    c = shape[1]
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, c))
            layer.bias.copy_(torch.linspace(-0.5, 0.5, c))
    if not train:
        with torch.no_grad():
            layer.running_mean.copy_(torch.linspace(-1.0, 2.0, c))
            layer.running_var.copy_(torch.linspace(0.5, 4.0, c))
    layer.train(train)
    for batch in range(batches):
        x, dy = inputs(shape, dtype, seed=batch)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        r = inputs(shape, dtype, seed=100)[1] if residual else None
        leaves = [t.requires_grad_() for t in (x, r) if t is not None]
        record(case, **{f"x{batch}": x})
        if layer.affine:
            layer.weight.grad = layer.bias.grad = None
        y = layer(x)
        y = y + r if residual else y
        y = torch.relu(y) if relu else y
        y.backward(dy)
    record(case, dy=dy, y=y, dx=leaves[0].grad, residual=r,
           dresidual=leaves[1].grad if residual else None)
    if layer.affine:
        record(case, weight=layer.weight, bias=layer.bias,
               dweight=layer.weight.grad, dbias=layer.bias.grad)
    if layer.track_running_stats:
        record(case, running_mean=layer.running_mean, running_var=layer.running_var,
               num_batches_tracked=layer.num_batches_tracked)


def layer_cases():
    run("1d", nn.BatchNorm1d(3), (5, 3))
    run("1d_sequence", nn.BatchNorm1d(3), (4, 3, 7))
    run("2d", nn.BatchNorm2d(5), (2, 5, 3, 4))
    run("3d", nn.BatchNorm3d(3), (2, 3, 2, 3, 4))
    run("two_values", nn.BatchNorm1d(3), (2, 3))
    run("no_affine", nn.BatchNorm2d(3, affine=False), (2, 3, 4, 4))
    run("no_tracking", nn.BatchNorm1d(3, track_running_stats=False), (6, 3))
    run("momentum", nn.BatchNorm1d(3, momentum=0.3), (6, 3), batches=3)
    run("cumulative", nn.BatchNorm1d(3, momentum=None), (6, 3), batches=3)
    run("eps", nn.BatchNorm1d(3, eps=0.1), (6, 3))
    run("eval", nn.BatchNorm2d(3), (2, 3, 4, 4), train=False)
    run("relu", nn.BatchNorm2d(4), (3, 4, 5, 5), relu=True)
    run("residual_relu", nn.BatchNorm2d(4), (3, 4, 5, 5), relu=True, residual=True)
    run("channels_last", nn.BatchNorm2d(4), (3, 4, 5, 6), channels_last=True)
    run("f64", nn.BatchNorm2d(4).double(), (3, 4, 5, 5), dtype=torch.float64)
    run("bf16", nn.BatchNorm2d(4), (3, 4, 5, 5), dtype=torch.bfloat16)
    run("f16", nn.BatchNorm2d(4), (3, 4, 5, 5), dtype=torch.float16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.fc1(torch.relu(self.bn1(self.conv1(x))).flatten(1))


def state_dict():
    torch.manual_seed(7)
    net = Net()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        x = torch.randn(8, 1, 6, 6) + 1
        loss = nn.functional.cross_entropy(net(x), torch.arange(8) % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()
    x = torch.randn(2, 1, 6, 6)
    record("net", x=x, after_bn=net.bn1(net.conv1(x)), logits=net(x))
    torch.save(net.state_dict(), OUT / "state_dict.pth")
    save_file(net.state_dict(), OUT / "state_dict.safetensors")


torch.set_num_threads(1)
layer_cases()
state_dict()
save_file(TENSORS, OUT / "pytorch_batch_norm.safetensors")
