"""JAX's part of compare_peers.py, which runs it inside the venv: `jax_peer.py THREADS`.

JAX leaves batch norm to its users' libraries. This one is compiled, has the channels second as the other peers, and its statistics are
those of Flax, the means of x and of x² in F32. Further norms are not measured.
"""
import functools
import os
import sys

from peer_lines import answer_lines, parsed

# By this XLA sizes its pools.
os.environ["PJRT_NPROC"] = sys.argv[1]

import jax  # noqa: E402  (it reads the variable as it loads)
import jax.numpy as jnp  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
DTYPES = {"f32": jnp.float32, "f64": jnp.float64, "f16": jnp.float16, "bf16": jnp.bfloat16}
EPS, MOMENTUM = 1e-5, 0.1


def normalise(x, mean, var, weight, bias):
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = jax.lax.rsqrt(var + EPS) * weight
    return ((x - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


def train(x, parameters, running):
    axes = (0, *range(2, x.ndim))
    in_f32 = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    mean = in_f32.mean(axes)
    var = jnp.maximum(0, (in_f32 * in_f32).mean(axes) - mean * mean)
    count = x.size / x.shape[1]
    updates = mean, var * (count / (count - 1))
    running = [(1 - MOMENTUM) * old + MOMENTUM * new for old, new in zip(running, updates)]
    return normalise(x, mean, var, *parameters), running


@jax.jit
def forward_and_backward(x, parameters, running, dy):
    def loss(x, parameters):
        y, new_running = train(x, parameters, running)
        return jax.nn.relu(y), new_running

    y, pullback, new_running = jax.vjp(loss, x, parameters, has_aux=True)
    return y, pullback(dy), new_running


# Each round asks for the same again, and a compilation takes its time.
@functools.lru_cache(maxsize=4)
def prepare(shape, dtype, pass_):
    norm, dims = parsed(shape)
    if norm != "batch":
        raise ValueError(f"JAX: no {norm} norm here")
    x = (jax.random.normal(jax.random.key(0), dims) * 2 + 1).astype(DTYPES[dtype])
    in_f32 = jnp.float64 if dtype == "f64" else jnp.float32
    zeros, ones = jnp.zeros(dims[1], in_f32), jnp.ones(dims[1], in_f32)
    parameters, running, dy = (ones, zeros), (zeros, ones), jnp.ones_like(x)
    run, args = {
        "fwd": (jax.jit(train), (x, parameters, running)),
        "eval": (jax.jit(normalise), (x, *running, *parameters)),
        "all": (forward_and_backward, (x, parameters, running, dy)),
    }[pass_]
    return lambda: jax.block_until_ready(run(*args))


if __name__ == "__main__":
    answer_lines(prepare)
