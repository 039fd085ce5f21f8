"""Times of gpu_bench.py: everything that a cell compares takes turns, on the device's clock."""
import statistics

import torch

import gpu_driver
from gpu_accuracy import EPS, Ours, eager_backward, eager_forward, saved_of

# Bytes that are written between two cold runs: several times any L2 cache.
FLUSH = 256 << 20
# Of a warm measurement, µs: its runs follow each other within one graph.
LEAST_WARM = 200
MOST_REPEATS = 50


class Cell:
    """A case and direction, and the functions to be compared on its tensors; what cannot be set up is an error."""

    def __init__(self, driver, case, direction, errors, stage, mode):
        self.case, self.direction, self.errors, self.functions, self.plans = case, direction, errors, {}, {}
        inputs = case.inputs(0.0)
        x, dy = inputs["x"], inputs["dy"]
        output = torch.empty_like(x)
        saved = torch.empty(2, case.c, dtype=torch.float64, device=case.device)
        if direction == "backward":
            saved.copy_(saved_of(case, inputs))
        dparams = torch.empty(2, case.c, dtype=inputs["weight"].dtype, device=case.device)
        tensors = {**inputs, "saved": saved, "dparams": dparams, ("y" if direction == "forward" else "dx"): output}
        plans = [plan for plan in case.plans[direction] if driver.can_run(plan)]
        for i, plan in enumerate(plans if stage == "eager" else plans[:1]):
            name = "ours" if i == 0 else f"plan {i}"
            self.plans[name] = {"plan": gpu_driver.name_of(plan)}
            self.attempt(name, lambda plan=plan: self.ours(driver, plan, tensors))
            if name in self.functions:
                self.plans[name] |= driver.occupancy(plan)
        self.functions["copy"] = lambda: output.copy_(x)
        peers = {"torch.compile": lambda: self.compiled(inputs, mode)}
        if stage == "eager":
            peers = {"eager": lambda: self.eager(inputs)}
            if len(case.shape) == 4 and not case.is_huge:
                peers["channels_last"] = lambda: self.eager(inputs, layout=torch.channels_last)
            if not case.is_huge:
                peers["no cuDNN"] = lambda: self.eager(inputs, cudnn=False)
        for name, make in peers.items():
            self.attempt(name, make)

    def attempt(self, name, make):
        """Adds a function if it can be made and runs; None stands for one that another row has already."""
        try:
            function = make()
            if function:
                function()
                torch.cuda.synchronize()
                self.functions[name] = function
        except Exception as error:  # PyTorch's, Triton's or the driver's: the others have their turn
            self.fail(name, error)

    def fail(self, name, error):
        text = " ".join(str(error).split())[:300]
        self.errors.append(f"{self.case.name} {self.direction}, {name}: {type(error).__name__}: {text}")
        print(self.errors[-1], flush=True)

    def ours(self, driver, plan, tensors):
        return Ours(driver, self.case, self.direction, plan, tensors).run

    def eager(self, inputs, cudnn=True, layout=None):
        x, dy = inputs["x"].view(self.case.shape), inputs["dy"].view(self.case.shape)
        if layout:
            x, dy = x.to(memory_format=layout), dy.to(memory_format=layout)
        weight, bias = inputs["weight"], inputs["bias"]
        forward = eager_forward(x, weight, bias, cudnn)
        if not cudnn and eager_forward(x, weight, bias)[4] == forward[4]:
            return None  # PyTorch does not take cuDNN here anyway
        if self.direction == "forward":
            return lambda: eager_forward(x, weight, bias, cudnn)
        forward = (None, *forward[1:])  # y would only take memory
        return lambda: eager_backward(x, dy, weight, forward)

    def compiled(self, inputs, mode):
        """Both from the same statistics as eager PyTorch's own kernels; no autograd."""
        torch._dynamo.reset()
        x, dy = inputs["x"].view(self.case.shape), inputs["dy"].view(self.case.shape)
        weight, bias = inputs["weight"], inputs["bias"]
        aten = torch.ops.aten

        def forward(x, weight, bias):
            return aten.native_batch_norm.default(x, weight, bias, None, None, True, 0.1, EPS)

        def backward(x, dy, weight, mean, rstd):
            return aten.native_batch_norm_backward.default(
                dy, x, weight, None, None, mean, rstd, True, EPS, [True, True, True]
            )

        options = {"fullgraph": True, "dynamic": False, "mode": mode}
        if self.direction == "forward":
            run = torch.compile(forward, **options)
            return lambda: run(x, weight, bias)
        _, mean, rstd = forward(x, weight, bias)
        run = torch.compile(backward, **options)
        return lambda: run(x, dy, weight, mean, rstd)


class Timed:
    """A function as a graph of one run and as one of several; as it is, if it cannot be captured."""

    def __init__(self, name, function, stream, pool):
        self.name, self.samples = name, {"cold": [], "warm": []}
        for _ in range(3):
            function()
        self.once, self.repeats, self.method = capture(function, 1, stream, pool), 1, "graph"
        self.once()
        micros = statistics.median(time_of(self.once) for _ in range(3))
        self.repeats = min(max(round(LEAST_WARM / max(micros, 1)), 1), MOST_REPEATS)
        self.many = capture(function, self.repeats, stream, pool) if self.repeats > 1 else self.once

    @classmethod
    def of(cls, name, function, stream, pool):
        try:
            return cls(name, function, stream, pool)
        except Exception as error:  # of the capture; the function itself has run before
            torch.cuda.synchronize()
            timed = cls.__new__(cls)
            timed.name, timed.samples = name, {"cold": [], "warm": []}
            timed.once = timed.many = function
            timed.repeats, timed.method = 1, f"events ({type(error).__name__} in capture)"
            return timed


def capture(function, repeats, stream, pool):
    """A function that replays as many runs."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            for _ in range(repeats):
                function()
        finally:
            graph.capture_end()
    return graph.replay


def time_of(run):
    """µs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def take_turns(functions, reps, flush, modes):
    """Measures each of `functions` as often, cold (L2 written over before) and warm (after as many runs)."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    all_timed = [Timed.of(name, function, stream, pool) for name, function in functions.items()]
    for rep in range(reps):
        first = rep % len(all_timed)
        for mode in modes:
            marks = []
            for timed in all_timed[first:] + all_timed[:first]:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if mode == "cold":
                    # Long enough for the host to be ahead of the device with the next three calls.
                    flush.fill_(rep)
                else:
                    timed.many()
                start.record()
                (timed.once if mode == "cold" else timed.many)()
                end.record()
                marks.append((timed, start, end))
            torch.cuda.synchronize()
            for timed, start, end in marks:
                runs = 1 if mode == "cold" else timed.repeats
                timed.samples[mode].append(start.elapsed_time(end) * 1000 / runs)
    return all_timed


def modes_of(case):
    """A tensor that is many times the cache is as good as cold."""
    return ["cold"] if case.bytes > 1 << 30 else ["cold", "warm"]


def measure(driver, case, direction, stage, args, flush, errors):
    """Rows of samples: one for each function and mode. `stage`: eager or compiled."""
    cell = Cell(driver, case, direction, errors, stage, args.compile_mode)
    if "ours" not in cell.functions:
        return []
    rows = []
    for timed in take_turns(cell.functions, args.reps, flush, modes_of(case)):
        for mode, samples in timed.samples.items():
            if samples:
                row = {"shape": case.shape, "dtype": case.dtype, "pass": direction, "stage": stage, "mode": mode}
                row |= {"name": timed.name, **cell.plans.get(timed.name, {}), "method": timed.method}
                rows.append({**row, "bytes": case.bytes, "runs": timed.repeats if mode == "warm" else 1, "us": samples})
    return rows


def machine_rates(flush, reps):
    """What a copy of 1 GiB moves a second, and what the clock shows for next to nothing."""
    x = torch.ones(1 << 28, device="cuda")
    y, small = torch.empty_like(x), torch.ones(32, device="cuda")
    functions = {"copy": lambda: y.copy_(x), "nothing": lambda: small.add_(1)}
    copy, nothing = take_turns(functions, reps, flush, ["cold", "warm"])
    median = statistics.median
    rate = 2 * x.nbytes / median(copy.samples["cold"]) / 1e6
    cold, warm = (median(nothing.samples[mode]) for mode in ("cold", "warm"))
    return {
        "copy of 1 GiB": f"{rate:.2f} TB/s read and written",
        "a kernel for 32 values": f"{cold:.1f} µs cold, {warm:.1f} µs warm",
    }
