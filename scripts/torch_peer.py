"""PyTorch's half of compare_peers.py, which runs it inside the venv.

    torch_peer.py ops THREADS [--compile]                     answers lines as benches/peers.rs does
    torch_peer.py mnist DIR MODEL EPOCHS LIMIT THREADS        prints seconds per epoch as JSON
"""
import functools
import gzip
import json
import struct
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from peer_lines import answer_lines, parsed

DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
BATCH = 64


def build(norm, dims):
    if norm == "batch":
        return BATCH_NORMS[len(dims)](dims[1])
    if norm == "layer":
        return nn.LayerNorm(dims[-1])
    if norm == "rms":
        return nn.RMSNorm(dims[-1], eps=1e-5)
    if norm == "instance":
        return {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[len(dims)](dims[1], affine=True)
    return nn.GroupNorm(int(norm.removeprefix("group")), dims[1])


def prepare(compiled, shape, dtype, pass_):
    """A function that runs `pass_` once."""
    norm, dims = parsed(shape)
    x = (torch.randn(dims) * 2 + 1).to(DTYPES[dtype])
    bn = build(norm, dims).to(DTYPES[dtype])
    relu = torch.relu if norm == "batch" else lambda x: x
    # Each shape for itself, and none of them without being compiled, however many came before.
    compiled = functools.partial(torch.compile, dynamic=False) if compiled else lambda function: function
    if pass_ == "fwd":
        layer = compiled(lambda x: bn(x))
        return lambda: layer(x)
    if pass_ == "eval":
        bn.eval()
        layer = compiled(lambda x: bn(x))
        # As PyTorch's users evaluate, and its faster way.
        return torch.inference_mode()(lambda: layer(x))
    if pass_ == "all":
        layer = compiled(lambda x: relu(bn(x)))
        x.requires_grad_(True)
        dy = torch.ones_like(x)

        def run():
            # Otherwise PyTorch would add to the gradients of the run before, which costs it time.
            x.grad = None
            bn.zero_grad(set_to_none=True)
            layer(x).backward(dy)

        return run
    raise ValueError(f"unknown pass {pass_}")


def idx(folder, name):
    plain = Path(folder) / name
    data = plain.read_bytes() if plain.exists() else gzip.decompress(Path(f"{plain}.gz").read_bytes())
    dims = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    return torch.frombuffer(bytearray(data[4 + 4 * data[3] :]), dtype=torch.uint8).view(dims)


def network(model, with_bn):
    """The networks of src/models; both libraries start from weights uniform in ±1/√fan_in."""

    def block(layer, channels, norm):
        return [layer] + [norm(channels)] * with_bn + [nn.ReLU()]

    if model == "mlp":
        return nn.Sequential(
            nn.Flatten(),
            *block(nn.Linear(784, 256), 256, nn.BatchNorm1d),
            *block(nn.Linear(256, 128), 128, nn.BatchNorm1d),
            nn.Linear(128, 10),
        )
    return nn.Sequential(
        *block(nn.Conv2d(1, 32, 3, padding=1), 32, nn.BatchNorm2d),
        nn.MaxPool2d(2),
        *block(nn.Conv2d(32, 64, 3, padding=1), 64, nn.BatchNorm2d),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *block(nn.Linear(64 * 7 * 7, 128), 128, nn.BatchNorm1d),
        nn.Linear(128, 10),
    )


def epoch(net, optimiser, images, labels):
    """Mean loss and accuracy; they stay tensors until the end, so that no step waits for them."""
    order = torch.randperm(len(images))
    steps = len(images) // BATCH
    loss_sum, right = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    for step in range(steps):
        batch = order[step * BATCH : (step + 1) * BATCH]
        x, y = images[batch], labels[batch]
        optimiser.zero_grad(set_to_none=True)
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimiser.step()
        loss_sum += loss.detach()
        right += (logits.detach().argmax(1) == y).sum()
    return loss_sum.item() / steps, right.item() / (steps * BATCH)


def train_mnist(folder, model, epochs, limit):
    images = idx(folder, "train-images-idx3-ubyte")[: limit or None].unsqueeze(1)
    images = (images / 255 - 0.1307) / 0.3081
    labels = idx(folder, "train-labels-idx1-ubyte")[: limit or None].long()
    seconds = {}
    for key, with_bn in [("without_bn", False), ("with_bn", True)]:
        torch.manual_seed(42)
        net = network(model, with_bn).train()
        optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        seconds[key] = []
        for _ in range(epochs):
            started = time.perf_counter()
            loss, accuracy = epoch(net, optimiser, images, labels)
            seconds[key].append(time.perf_counter() - started)
        print(f"{model} {key}: train loss {loss:.4f}, accuracy {accuracy:.4f}", file=sys.stderr)
    print(json.dumps(seconds))


def main(command, *args):
    if command == "ops":
        torch.set_num_threads(int(args[0]))
        ready = functools.partial(prepare, "--compile" in args)
        if "--compile" in args:
            torch._dynamo.config.recompile_limit = 1000
            # Each round asks for the same again, and a compilation takes many seconds.
            ready = functools.lru_cache(maxsize=4)(ready)
        answer_lines(ready)
    else:
        folder, model, epochs, limit, threads = args
        torch.set_num_threads(int(threads))
        train_mnist(folder, model, int(epochs), int(limit))


if __name__ == "__main__":
    main(*sys.argv[1:])
