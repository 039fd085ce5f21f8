"""What the Python halves of compare_peers.py have in common: they answer lines as benches/peers.rs does."""
import statistics
import sys
import time


def parsed(shape):
    """`("layer", [64, 256])` of layer:64,256; batch norm has no name before its shape."""
    norm, _, dims = shape.rpartition(":")
    return norm or "batch", [int(dim) for dim in dims.split(",")]


def measure(run, limit):
    """Median and shortest time in µs, counted as benches/peers.rs does it."""
    warm_up, runs = time.perf_counter(), 0
    # What compiles does so in its first runs.
    while runs < 3 or time.perf_counter() - warm_up < limit / 4:
        run()
        runs += 1
    times, started = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < limit:
        one = time.perf_counter()
        run()
        times.append(time.perf_counter() - one)
    return statistics.median(times) * 1e6, min(times) * 1e6


def answer_lines(prepare):
    """`prepare(shape, dtype, pass)` gives a function that runs the pass once."""
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            _, shape, dtype, pass_, seconds = line.split()
            median, fastest = measure(prepare(shape, dtype, pass_), float(seconds))
            print(f"{median:.3f} {fastest:.3f}", flush=True)
        except Exception as error:  # Whatever it is, it is the answer, and the next line has its turn.
            print("error:", " ".join(str(error).split())[:300], flush=True)
