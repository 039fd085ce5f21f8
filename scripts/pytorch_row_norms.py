#!/usr/bin/env python3
"""Writes what PyTorch computes for row norms into tests/data, for tests/row_norm_layers.rs.

    pip install torch==2.13.0 safetensors numpy
    python scripts/pytorch_row_norms.py tests/data

pytorch_row_norms.safetensors has every tensor under "case/name": x, dy, y, dx, and the parameters, their
gradients and the buffers of the module by their names. Inputs have the dtype of the case; results are what
PyTorch computes for them in F64, since its sums in less are further from the truth than ours. The file in the
repository was written with PyTorch 2.13.0 on a CPU.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

TENSORS = {}


def case(name, module, shape, dtype=torch.float32, batches=1, relu=False):
    """The module after training on some batches; the last one with its gradients, then an evaluation."""
    generator = torch.Generator().manual_seed(len(TENSORS))
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.3)
    tensors = {f"initial.{key}": value.clone() for key, value in module.named_parameters()}
    module = module.to(torch.float64)
    for batch in range(batches):
        x = (torch.randn(shape, generator=generator) * 1.5 + 2.0).to(dtype)
        dy = torch.randn(shape, generator=generator).to(dtype)
        tensors |= {f"x{batch}": x, "dy": dy}
        x = x.to(torch.float64).requires_grad_()
        module.zero_grad()
        y = module(x)
        if relu:
            y = torch.relu(y)
        y.backward(dy.to(torch.float64))
        tensors |= {"y": y, "dx": x.grad}
    tensors |= {f"d{key}": value.grad for key, value in module.named_parameters()}
    tensors |= {key: value for key, value in module.named_buffers() if value.dim()}
    tensors["eval"] = module.eval()(x)
    for key, value in tensors.items():
        TENSORS[f"{name}/{key}"] = value.detach().clone().contiguous()


case("layer", nn.LayerNorm(33), (4, 5, 33))
case("layer_f64", nn.LayerNorm(33, eps=1e-3), (4, 5, 33), torch.float64)
case("layer_bf16", nn.LayerNorm(64), (6, 64), torch.bfloat16)
case("layer_images", nn.LayerNorm((3, 5, 7)), (2, 3, 5, 7))
case("layer_no_bias", nn.LayerNorm(16, bias=False), (9, 16))
case("layer_plain", nn.LayerNorm(16, elementwise_affine=False), (9, 16))
case("rms", nn.RMSNorm(48, eps=1e-6), (3, 4, 48))
case("rms_f16", nn.RMSNorm(48, eps=1e-5), (3, 48), torch.float16)
case("group", nn.GroupNorm(3, 6), (4, 6, 5, 5))
case("group_relu", nn.GroupNorm(2, 8), (2, 8, 9, 9), relu=True)
case("group_dense", nn.GroupNorm(4, 32), (7, 32))
case("group_last", nn.GroupNorm(2, 8), (2, 8, 9, 9))
case("group_f64", nn.GroupNorm(1, 4), (2, 4, 3, 4, 5), torch.float64)
case("instance", nn.InstanceNorm2d(5), (2, 5, 4, 6))
case("instance_affine", nn.InstanceNorm1d(5, affine=True), (3, 5, 90))
case("instance_tracked", nn.InstanceNorm2d(4, affine=True, track_running_stats=True, momentum=0.3), (3, 4, 8, 9), batches=3)
save_file(TENSORS, Path(sys.argv[1]) / "pytorch_row_norms.safetensors")
