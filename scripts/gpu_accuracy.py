"""Checks of gpu_bench.py: this crate's kernels and PyTorch's against float64, on the same input."""
import torch

import gpu_driver

EPS = 1e-5
DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16, "u32": torch.int32}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
OUTPUTS = {"forward": ["y", "saved"], "backward": ["dx", "dparams"]}
QUANTITIES = {"forward": ["y", "mean", "var"], "backward": ["dx", "dweight", "dbias"]}

# Values beside each output that nobody may write; they keep it a multiple of 16 bytes.
GUARD = 64
# Values that are compared at a time: in float64, and in several copies.
CHUNK = 1 << 25


def limit_of(dtype, quantity, offset):
    """The largest error that ours may have; the 16-bit dtypes round the tensors that they are stored in."""
    if dtype == "f64":
        return 1e-12 + 2e-16 * abs(offset)  # a mean is rounded to a float64 as well
    return {"f16": 1e-3, "bf16": 6e-3}.get(dtype, 2e-6) if quantity in ("y", "dx") else 2e-6


class Case:
    """A shape and dtype with their plans."""

    def __init__(self, entry, all_plans, device="cuda"):
        self.shape, self.dtype, self.device = entry["shape"], entry["dtype"], device
        self.name = f"{self.shape} {self.dtype}"
        self.n, self.c = self.shape[:2]
        self.values = torch.Size(self.shape).numel()
        self.s = self.values // (self.n * self.c)
        self.bytes = self.values * gpu_driver.BYTES[self.dtype]
        # The alternatives of a tensor with more than 2^30 values would take too long.
        self.is_huge = self.values > 1 << 30
        last = None if all_plans and not self.is_huge else 1
        self.plans = {direction: entry[direction][:last] for direction in OUTPUTS}

    def inputs(self, offset, seed=0):
        """x, dy, weight and bias, or None if the dtype does not reach the offset."""
        dtype = DTYPES[self.dtype]
        info = torch.finfo(dtype)
        if abs(offset) > info.max / 16:
            return None
        # A few steps of the dtype, or far from zero there would be nothing to normalise.
        spread = max(2.0, 8 * abs(offset) * info.eps)
        torch.manual_seed(seed)
        drawn = torch.float64 if self.dtype == "f64" else torch.float32

        def draw(*shape):
            return torch.randn(shape, dtype=drawn, device=self.device)

        x = draw(self.n, self.c, self.s).mul_(spread).add_(offset).to(dtype)
        dy = draw(self.n, self.c, self.s).to(dtype)
        return {"x": x, "dy": dy, "weight": draw(self.c).mul_(0.3).add_(1), "bias": draw(self.c)}

    def chunks(self):
        step = max(1, CHUNK // (self.n * self.s))
        return [slice(first, first + step) for first in range(0, self.c, step)]


class Ours:
    """A plan of this crate on some tensors."""

    def __init__(self, driver, case, direction, plan, tensors):
        self.driver, self.plan, self.direction = driver, plan, direction
        self.tensors = dict(tensors)
        sizes = gpu_driver.sizes_of(plan, case.dtype)
        # Partials that are read before they are written make everything NaN. The counters have to be zero.
        values, _ = sizes["partials"]
        self.tensors["partials"] = torch.full((values,), torch.nan, dtype=torch.float64, device=case.device)
        values, _ = sizes["counters"]
        self.tensors["counters"] = torch.zeros(values, dtype=torch.int32, device=case.device)
        self.pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items() if tensor.numel()}
        self.is_cuda = case.device == "cuda"

    def run(self):
        stream = torch.cuda.current_stream().cuda_stream if self.is_cuda else 0
        for kernel in self.plan["kernels"]:
            self.driver.launch(self.plan, kernel, self.pointers, stream)


class Output:
    """A tensor to be written, between guards; all of it NaN unless `bare`."""

    def __init__(self, values, dtype, device, bare):
        self.whole = torch.empty(values + 2 * GUARD, dtype=DTYPES[dtype], device=device)
        self.values = self.whole[GUARD : GUARD + values]
        self.is_bare = bare
        if not bare:
            self.whole.fill_(torch.nan)

    def is_guarded(self):
        ends = self.whole[:GUARD], self.whole[-GUARD:]
        return self.is_bare or all(bool(end.isnan().all()) for end in ends)

    def has_the_bits_of(self, other):
        as_integers = INTEGERS[self.values.element_size()]
        return torch.equal(self.values.view(as_integers), other.values.view(as_integers))


def truth_of(x, dy, weight, bias):
    """Everything in float64, of some channels; x and the mean are relative to `pivot`, which is exact."""
    pivot = x[:1, :, :1].double()
    x, dy = x.double() - pivot, dy.double()
    weight, bias = weight.double()[:, None], bias.double()[:, None]
    mean = x.mean((0, 2), keepdim=True)
    x -= mean
    var = x.square().mean((0, 2), keepdim=True)
    rstd = (var + EPS).rsqrt()
    x *= rstd
    dbias, dweight = dy.sum((0, 2), keepdim=True), (dy * x).sum((0, 2), keepdim=True)
    m = x.shape[0] * x.shape[2]
    # What errors are divided by: the values that a quantity is made of.
    norm_x, norm_dy = x.square().sum((0, 2)).sqrt(), dy.square().sum((0, 2)).sqrt()
    truth = {"y": x * weight + bias, "dx": weight * rstd * (dy - (dbias + x * dweight) / m)}
    scales = {"y": truth["y"].square().sum((0, 2)).sqrt(), "dx": (weight * rstd).flatten().abs() * norm_dy}
    scales |= {"mean": (var + EPS).sqrt().flatten(), "var": (var + EPS).flatten()}
    scales |= {"dweight": norm_x * norm_dy, "dbias": m**0.5 * norm_dy}
    truth |= {"mean": mean.flatten(), "var": var.flatten(), "dweight": dweight.flatten(), "dbias": dbias.flatten()}
    return truth, scales, pivot.flatten()


def truth_of_chunk(inputs, part):
    return truth_of(inputs["x"][:, part], inputs["dy"][:, part], inputs["weight"][part], inputs["bias"][part])


def saved_of(case, inputs):
    """The statistics that a backward pass is given."""
    saved = torch.empty(2, case.c, dtype=torch.float64, device=case.device)
    for part in case.chunks():
        truth, _, pivot = truth_of_chunk(inputs, part)
        saved[0, part], saved[1, part] = pivot + truth["mean"], truth["var"]
    return saved


def errors_of(case, inputs, found):
    """For each quantity in `found` the error of its worst channel; NaN if there is one in it."""
    worst = dict.fromkeys(found, 0.0)
    for part in case.chunks():
        truth, scales, pivot = truth_of_chunk(inputs, part)
        for name, values in found.items():
            if name in ("y", "dx"):
                error = (values[:, part].double() - truth[name]).square().sum((0, 2)).sqrt()
            else:
                mine = values[part].double() - pivot if name == "mean" else values[part].double()
                error = (mine - truth[name]).abs()
            # Where the scale is zero there is nothing but zeros.
            error = torch.where(error == 0, error, error / scales[name])
            largest = float("nan") if bool(error.isnan().any()) else error.max().item()
            worst[name] = worst[name] if largest <= worst[name] else largest
    return worst


def check_ours(driver, case, direction, plan, inputs, saved, bare):
    """The errors of a plan, and what else is wrong with it."""
    sizes, runs, problems = gpu_driver.sizes_of(plan, case.dtype), [], []
    for _ in range(1 if bare else 2):
        outputs = {name: Output(*sizes[name], case.device, bare) for name in OUTPUTS[direction]}
        tensors = {**inputs, "saved": saved, **{name: output.values for name, output in outputs.items()}}
        ours = Ours(driver, case, direction, plan, tensors)
        ours.run()
        if case.device == "cuda":
            torch.cuda.synchronize()
        if ours.tensors["counters"].any():
            problems.append("counters are not zero afterwards")
        problems += [f"writes beside {name}" for name, output in outputs.items() if not output.is_guarded()]
        runs.append(outputs)
    first, last = runs[0], runs[-1]
    problems += [f"{name} differs between two runs" for name in first if not first[name].has_the_bits_of(last[name])]
    tensor, pair = (first[name].values for name in OUTPUTS[direction])
    pair = pair.view(2, case.c)
    values = [tensor.view(case.n, case.c, case.s), pair[0], pair[1]]
    return errors_of(case, inputs, dict(zip(QUANTITIES[direction], values))), list(dict.fromkeys(problems))


def eager_forward(x, weight, bias, cudnn=True):
    """y, mean, 1/√(var + eps), what cuDNN keeps, and which of its implementations PyTorch chose."""
    return torch._batch_norm_impl_index(x, weight, bias, None, None, True, 0.1, EPS, cudnn)


def eager_backward(x, dy, weight, forward):
    """dx, dweight, dbias from the statistics that `eager_forward` saved."""
    _, mean, rstd, reserved, index = forward
    backward = torch.ops.aten._batch_norm_impl_index_backward
    return backward(index, x, dy, weight, None, None, mean, rstd, True, EPS, [True] * 3, reserved)


def check_eager(case, direction, inputs):
    x, dy = inputs["x"].view(case.shape), inputs["dy"].view(case.shape)
    forward = eager_forward(x, inputs["weight"], inputs["bias"])
    if direction == "forward":
        # PyTorch has no variance to show, and in these roundings it is not its own any more.
        found = forward[0], forward[1], forward[2].double().pow(-2) - EPS
    else:
        found = eager_backward(x, dy, inputs["weight"], forward)
    found = (found[0].view(case.n, case.c, case.s), *found[1:])
    return errors_of(case, inputs, dict(zip(QUANTITIES[direction], found)))


def check(driver, case, offsets, bare=False, eager=True):
    """Rows of errors and problems, for each offset, direction and plan, and for PyTorch."""
    for offset in offsets[: 2 if case.is_huge else None]:
        inputs = case.inputs(offset)
        if inputs is None:
            continue
        saved = saved_of(case, inputs)
        for direction, plans in case.plans.items():
            jobs = [("ours", plan) for plan in plans if driver.can_run(plan)]
            for who, plan in jobs + [("PyTorch", None)] * eager:
                row = {"shape": case.shape, "dtype": case.dtype, "pass": direction, "offset": offset, "who": who}
                row |= {"plan": gpu_driver.name_of(plan) if plan else "", "errors": {}, "problems": []}
                try:
                    if plan:
                        row["errors"], row["problems"] = check_ours(driver, case, direction, plan, inputs, saved, bare)
                    else:
                        row["errors"] = check_eager(case, direction, inputs)
                except Exception as error:  # whatever it is, the next plan has its turn
                    row["problems"] = [f"{type(error).__name__}: {error}"]
                limits = {name: limit_of(case.dtype, name, offset) for name in row["errors"]} if plan else {}
                for name, limit in limits.items():
                    if not row["errors"][name] <= limit:
                        row["problems"].append(f"{name} is off by {row['errors'][name]:.1e}, more than {limit:.0e}")
                yield row
