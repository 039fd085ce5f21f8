#!/usr/bin/env python3
"""Writes what PyTorch computes into tests/data, for tests/pytorch.rs to hold ours against.

    pip install torch==2.13.0 safetensors numpy
    python scripts/pytorch_reference.py tests/data

The files in the repository were written with PyTorch 2.13.0 on a CPU. Another version may differ
in the last digits.

- pytorch_batch_norm.safetensors: every tensor under "case/name". Outputs of cases in less than F64
  are there twice: as PyTorch gives them, and under "case/truth/name" as PyTorch gives them in F64
  for the same input, rounded to F32.
- state_dict.pth, state_dict.safetensors: a small network after a few steps of training. Its input
  and its outputs are the case "net".
"""
import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

OUT = Path(sys.argv[1])
TENSORS = {}


def inputs(shape, dtype, seed):
    """x with a mean and a scale of its own in each channel, and dy."""
    generator = torch.Generator().manual_seed(seed)
    c = shape[1]
    view = [1, c] + [1] * (len(shape) - 2)
    mean = torch.linspace(-3.0, 5.0, c).view(view)
    scale = torch.linspace(0.5, 2.0, c).view(view)
    x = torch.randn(shape, generator=generator) * scale + mean
    dy = torch.randn(shape, generator=generator)
    return x.to(dtype), dy.to(dtype)


def record(case, tensors):
    for name, tensor in tensors.items():
        TENSORS[f"{case}/{name}"] = tensor.detach().clone().contiguous()


def outcome(layer, batches, residual, relu):
    """The statistics after each batch; after the last, the output and all gradients."""
    tensors = {}
    for i, (x, dy) in enumerate(batches):
        layer.zero_grad()
        # clone() keeps the layout in memory.
        x = x.clone().requires_grad_()
        y = before = layer(x)
        if residual is not None:
            r = residual.clone().requires_grad_()
            y = before = y + r
        if relu:
            y = torch.relu(before)
        y.backward(dy)
        for name, tensor in layer.named_buffers():
            tensors[f"{name}{i}"] = tensor.clone()
    if relu and x.dtype == torch.float64:
        # So near 0, rounding would decide which gradients pass.
        assert before.abs().min() > 1e-4
    tensors |= {"y": y, "dx": x.grad}
    if residual is not None:
        tensors["dresidual"] = r.grad
    for name, parameter in layer.named_parameters():
        tensors[f"d{name}"] = parameter.grad
    return tensors


def run(case, layer, shape, *, batches=1, train=True, relu=False, residual=False,
        dtype=torch.float32, channels_last=False):
    """Records a case: what goes into `layer`, and what comes out of it."""
    c = shape[1]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            low, high = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5)}[name]
            parameter.copy_(torch.linspace(low, high, c))
        if not train and layer.running_mean is not None:
            layer.running_mean.copy_(torch.linspace(-1.0, 2.0, c))
            layer.running_var.copy_(torch.linspace(0.5, 4.0, c))
    layer.train(train)
    data = [inputs(shape, dtype, seed) for seed in range(batches)]
    if channels_last:
        data = [[t.to(memory_format=torch.channels_last) for t in batch] for batch in data]
    added = inputs(shape, dtype, 100)[1] if residual else None

    record(case, {f"x{i}": x for i, (x, _) in enumerate(data)} | {"dy": data[-1][1]})
    record(case, dict(layer.named_parameters()))
    record(case, {f"{name}_start": buffer for name, buffer in layer.named_buffers()})
    if residual:
        record(case, {"residual": added})

    in_f64 = copy.deepcopy(layer).double()
    record(case, outcome(layer, data, added, relu))
    if dtype != torch.float64:
        data = [[t.double() for t in batch] for batch in data]
        added = added.double() if residual else None
        for name, tensor in outcome(in_f64, data, added, relu).items():
            if tensor.is_floating_point():
                record(case, {f"truth/{name}": tensor.float()})


def layer_cases():
    run("1d", nn.BatchNorm1d(3), (5, 3))
    run("1d_sequence", nn.BatchNorm1d(3), (4, 3, 7))
    run("2d", nn.BatchNorm2d(5), (2, 5, 3, 4))
    run("3d", nn.BatchNorm3d(3), (2, 3, 2, 3, 4))
    run("two_values", nn.BatchNorm1d(3), (2, 3))
    run("no_affine", nn.BatchNorm2d(3, affine=False), (2, 3, 4, 4))
    run("no_tracking", nn.BatchNorm1d(3, track_running_stats=False), (6, 3))
    run("no_tracking_eval", nn.BatchNorm1d(3, track_running_stats=False), (6, 3), train=False)
    run("momentum", nn.BatchNorm1d(3, momentum=0.3), (6, 3), batches=3)
    run("cumulative", nn.BatchNorm1d(3, momentum=None), (6, 3), batches=3)
    run("eps", nn.BatchNorm1d(3, eps=0.1), (6, 3))
    run("eval", nn.BatchNorm2d(3), (2, 3, 4, 4), train=False)
    run("eval_residual_relu", nn.BatchNorm2d(3), (2, 3, 4, 4), train=False, relu=True,
        residual=True)
    run("relu", nn.BatchNorm2d(4), (3, 4, 5, 5), relu=True)
    run("residual", nn.BatchNorm2d(4), (3, 4, 3, 3), residual=True)
    run("residual_relu", nn.BatchNorm2d(4), (3, 4, 5, 5), relu=True, residual=True)
    run("channels_last", nn.BatchNorm2d(4), (3, 4, 5, 6), channels_last=True)
    run("channels_last_residual_relu", nn.BatchNorm2d(4), (2, 4, 3, 5), channels_last=True,
        relu=True, residual=True)
    run("f64", nn.BatchNorm2d(4).double(), (3, 4, 5, 5), dtype=torch.float64)
    run("f64_eval", nn.BatchNorm2d(4).double(), (2, 4, 3, 3), dtype=torch.float64, train=False)
    # Input in half precision, parameters and statistics in F32: PyTorch's mixed precision.
    for name, dtype in [("bf16", torch.bfloat16), ("f16", torch.float16)]:
        run(name, nn.BatchNorm2d(4), (3, 4, 5, 5), dtype=dtype)
        run(f"{name}_eval", nn.BatchNorm2d(4), (2, 4, 3, 3), dtype=dtype, train=False)


class Functional(nn.Module):
    """torch.nn.functional.batch_norm, which takes weight and bias one without the other."""

    def __init__(self, c, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c)) if weight else None
        self.bias = nn.Parameter(torch.empty(c)) if bias else None
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            training=self.training, momentum=0.25, eps=1e-3)


def functional_cases():
    shape = (3, 4, 5)
    for mode in ["train", "inference"]:
        for parameters in ["", "weight", "bias", "weight_bias"]:
            layer = Functional(shape[1], "weight" in parameters, "bias" in parameters)
            run(f"functional_{mode}_{parameters}".rstrip("_"), layer, shape, train=mode == "train")
    x = inputs(shape, torch.float32, 0)[0].double()
    record("functional_statistics", {"mean": x.mean((0, 2)), "var": x.var((0, 2), correction=0)})


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
        loss = F.cross_entropy(net(x), torch.arange(8) % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()
    x = torch.randn(2, 1, 6, 6)
    record("net", {"x": x, "after_bn": net.bn1(net.conv1(x)), "logits": net(x)})
    torch.save(net.state_dict(), OUT / "state_dict.pth")
    save_file(net.state_dict(), OUT / "state_dict.safetensors")

    # Goes on from the four batches so far.
    net.bn1.momentum = None
    net.train()
    net(x)
    record("net", {f"{name}_cumulative": buffer for name, buffer in net.bn1.named_buffers()})


def gradient_penalty():
    """A critic's (|dloss/dx| - 1)^2 and its gradients: the second derivatives of WGAN-GP."""
    torch.manual_seed(11)
    conv, bn, fc = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3 * 20, 1)
    critic = nn.Sequential(conv, bn, nn.ReLU(), nn.Flatten(), fc).double()
    with torch.no_grad():
        bn.weight.copy_(torch.linspace(0.5, 1.5, 3))
        bn.bias.copy_(torch.linspace(-0.5, 0.5, 3))
    x = torch.randn(6, 2, 4, 5, dtype=torch.float64).requires_grad_()
    record("penalty", dict(critic.named_parameters()) | {"x": x})
    assert bn(conv(x)).abs().min() > 1e-4
    dx, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
    penalty.backward()
    record("penalty", {"dx": dx, "penalty": penalty, "penalty_dx": x.grad})
    grads = {f"penalty_d{name}": p.grad for name, p in critic.named_parameters()}
    record("penalty", {name: grad for name, grad in grads.items() if grad is not None})


def batch_norm_lstm(lstm, norms, x):
    """Cooijmans et al. 2016 with the batch's statistics: the hidden states, and the last cell."""
    h = c = torch.zeros(x.shape[0], lstm.hidden_size, dtype=x.dtype)
    states = []
    bn = lambda name, values: F.batch_norm(values, None, None, norms[f"{name}.weight"],
                                           norms.get(f"{name}.bias"), training=True)
    for t in range(x.shape[1]):
        gates = bn("bn_ih", x[:, t] @ lstm.weight_ih_l0.T) + bn("bn_hh", h @ lstm.weight_hh_l0.T)
        i, f, g, o = (gates + lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * bn("bn_c", c).tanh()
        states.append(h)
    return torch.stack(states, dim=1), c


def lstm_cases():
    torch.manual_seed(13)
    inputs, hidden = 3, 4
    lstm = nn.LSTM(inputs, hidden, batch_first=True).double()
    norms = {name: nn.Parameter(torch.linspace(low, low + 0.4, c, dtype=torch.float64))
             for name, c, low in [("bn_ih.weight", 4 * hidden, 0.3), ("bn_hh.weight", 4 * hidden, 0.2),
                                  ("bn_c.weight", hidden, 0.1), ("bn_c.bias", hidden, -0.2)]}
    x = torch.randn(6, 5, inputs, dtype=torch.float64).requires_grad_()
    dy = torch.randn(6, 5, hidden, dtype=torch.float64)
    for case, parameters in [("lstm", {}), ("lstm_bn", norms)]:
        parameters = dict(lstm.named_parameters()) | parameters
        lstm.zero_grad()
        x.grad = None
        if case == "lstm":
            y, (_, c) = lstm(x)
            c = c[0]
        else:
            y, c = batch_norm_lstm(lstm, norms, x)
        y.backward(dy)
        record(case, parameters | {"x": x, "dy": dy, "y": y, "c": c, "dx": x.grad})
        record(case, {f"d{name}": parameter.grad for name, parameter in parameters.items()})


torch.set_num_threads(1)
layer_cases()
functional_cases()
state_dict()
gradient_penalty()
lstm_cases()
save_file(TENSORS, OUT / "pytorch_batch_norm.safetensors")
