"""TensorFlow's part of compare_peers.py, which runs it inside the venv: `tensorflow_peer.py THREADS`.

Batch norm is its fused op inside a `tf.function`, as in Keras 2, with the channels last, which it is made for. Further norms are not
measured.
"""
import functools
import os
import sys

from peer_lines import answer_lines, parsed

# Its greetings and hints; errors still come.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import tensorflow as tf  # noqa: E402  (it reads the variable as it loads)

tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
tf.config.threading.set_inter_op_parallelism_threads(1)

DTYPES = {"f32": tf.float32, "f16": tf.float16, "bf16": tf.bfloat16}
EPS, MOMENTUM = 1e-5, 0.1


# Each round asks for the same again, and a graph takes its time.
@functools.lru_cache(maxsize=4)
def prepare(shape, dtype, pass_):
    norm, dims = parsed(shape)
    if norm != "batch":
        raise ValueError(f"TensorFlow: no {norm} norm here")
    if dtype not in DTYPES:
        raise ValueError(f"TensorFlow's fused op has no {dtype}")
    n, c, *space = dims
    if len(space) > 2:
        raise ValueError("TensorFlow's fused op has two dimensions in space at most")
    x = tf.cast(tf.random.normal([n, *([1] * (2 - len(space))), *space, c]) * 2 + 1, DTYPES[dtype])
    weight, bias, mean, var = tf.ones(c), tf.zeros(c), tf.Variable(tf.zeros(c)), tf.Variable(tf.ones(c))
    dy = tf.ones_like(x)

    def train(x, weight, bias):
        y, new_mean, new_var = tf.compat.v1.nn.fused_batch_norm(
            x, weight, bias, mean, var, epsilon=EPS, is_training=True, exponential_avg_factor=MOMENTUM
        )
        mean.assign(new_mean)
        var.assign(new_var)
        return y

    @tf.function
    def evaluate(x):
        return tf.compat.v1.nn.fused_batch_norm(x, weight, bias, mean, var, epsilon=EPS, is_training=False)[0]

    @tf.function
    def forward_and_backward(x, weight, bias):
        with tf.GradientTape() as tape:
            tape.watch((x, weight, bias))
            y = tf.nn.relu(train(x, weight, bias))
        return y, tape.gradient(y, (x, weight, bias), output_gradients=dy)

    forward = tf.function(train)
    return {
        "fwd": lambda: forward(x, weight, bias),
        "eval": lambda: evaluate(x),
        "all": lambda: forward_and_backward(x, weight, bias),
    }[pass_]


if __name__ == "__main__":
    answer_lines(prepare)
