"""Launches the kernels of kernels/*.cu for gpu_bench.py: CUDA's driver API through ctypes, and what a kernel is given.

Needs neither PyTorch nor a GPU until `Driver` is made.
"""
import ctypes
import re
from pathlib import Path

BYTES = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2, "u32": 4}

# From cuda.h.
ATTRIBUTE_COOPERATIVE, ATTRIBUTE_CLUSTER_DIMENSION = 2, 4
FUNCTION_SHARED_BYTES, FUNCTION_LOCAL_BYTES, FUNCTION_REGISTERS, FUNCTION_MOST_DYNAMIC_SHARED = 1, 3, 4, 8
DEVICE_MULTIPROCESSORS, DEVICE_CAPABILITY_MAJOR, DEVICE_MOST_SHARED_PER_BLOCK = 16, 75, 97


class Problem(ctypes.Structure):
    """`struct Problem` of kernels/tiles.cuh. The planner's JSON has the same names."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "c", "s", "part")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("channels", "splits", "params_dtype", "given_dtype")),
        *((name, ctypes.c_int32) for name in ("relu", "remove_mean", "training", "unused")),
    ]


class AttributeValue(ctypes.Union):
    """`CUlaunchAttributeValue`, as far as it is used here."""

    _fields_ = [
        ("pad", ctypes.c_char * 64),
        ("alignment", ctypes.c_uint64),
        ("cluster", ctypes.c_uint32 * 3),
        ("cooperative", ctypes.c_int32),
    ]


class Attribute(ctypes.Structure):
    """`CUlaunchAttribute`; its padding behind the id comes from the value's alignment."""

    _fields_ = [("id", ctypes.c_int32), ("value", AttributeValue)]


class Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint32),
    ]


# The tensors that each kernel is given before its Problem, as in src/ops/batch_norm/cuda/mod.rs. Those of one pass
# have the suffix.
ARGUMENTS = {
    "stats": "x partials",
    "forward": "x residual weight bias given_mean given_var partials y saved",
    "forward, one pass": "x residual weight bias partials counters y saved",
    "backward_sums": "x dy relu_y weight bias saved partials",
    "backward": "x dy relu_y weight bias saved partials dx dresidual dparams",
    "backward, one pass": "x dy relu_y weight bias saved partials counters dx dresidual dparams",
}


def arguments_of(kernel):
    """The names of a kernel's tensors, of which those that a launch does not have are null."""
    what, how = re.fullmatch(r"bn_(stats|forward|backward_sums|backward)_(group|cluster)?.*", kernel).groups()
    return ARGUMENTS[f"{what}, one pass" if how else what].split()


def sizes_of(plan, dtype):
    """For each tensor that a plan's kernels read or write: its number of values, and their dtype."""
    problem = plan["problem"]
    channels, values = problem["c"], problem["n"] * problem["c"] * problem["s"]
    params = "f64" if problem["params_dtype"] == 1 else "f32"
    sizes = {name: (values, dtype) for name in ("x", "y", "dy", "dx")}
    sizes |= {"weight": (channels, params), "bias": (channels, params), "dparams": (2 * channels, params)}
    sizes |= {"saved": (2 * channels, "f64"), "partials": (plan["partials"], "f64")}
    return sizes | {"counters": (plan["counters"], "u32")}


def name_of(plan):
    return f"{plan['what']}, {plan['threads']} threads"


def describe(plan, dtype):
    """A line for each kernel that a plan launches."""
    sizes, lines = sizes_of(plan, dtype), []
    for kernel in plan["kernels"]:
        how = f"{plan['grid']} x {plan['threads']} threads, {plan['shared_bytes']} B shared"
        how += f", clusters of {plan['cluster']}" if plan["cluster"] > 1 else ""
        how += ", cooperative" if plan["cooperative"] else ""
        tensors = []
        for name in arguments_of(kernel):
            values, of = sizes.get(name, (0, dtype))
            tensors.append(f"{name} {values * BYTES[of]} B" if values else f"{name} null")
        lines.append(f"{plan['module']}.ptx {kernel}: {how}\n        {', '.join(tensors)}, Problem")
    return lines


def parameters_in(ptx):
    """For each kernel of a PTX text its parameters' sizes in bytes."""
    kernels = {}
    for name, text in re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL):
        found = re.findall(r"\.param (?:\.align \d+ )?\.([a-z])(\d+)(?: \w+)+(?:\[(\d+)\])?", text)
        kernels[name] = [int(count) if count else int(bits) // 8 for _, bits, count in found]
    return kernels


def mismatches(plans, folder):
    """What is wrong with the PTX files of a folder for the kernels of some plans, as sentences."""
    files, wrong = {}, []
    for module, kernel in sorted({(plan["module"], kernel) for plan in plans for kernel in plan["kernels"]}):
        path = Path(folder) / f"{module}.ptx"
        if module not in files:
            files[module] = parameters_in(path.read_text()) if path.exists() else None
            wrong += [] if path.exists() else [f"{path} does not exist"]
        expected = [8] * len(arguments_of(kernel)) + [ctypes.sizeof(Problem)]
        if files[module] is not None and files[module].get(kernel) != expected:
            wrong.append(f"{path}: {kernel} has parameters of {files[module].get(kernel)} bytes, not {expected}")
    return wrong


class CudaError(Exception):
    """A call that the driver refused."""


class Driver:
    """Kernels of the PTX files in a folder, in the context that is current."""

    def __init__(self, folder):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.folder, self.modules, self.functions = Path(folder), {}, {}
        device = ctypes.c_int()
        self.call("cuCtxGetDevice", ctypes.byref(device))

        def attribute(which):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), device)
            return value.value

        self.capability = attribute(DEVICE_CAPABILITY_MAJOR)
        self.multiprocessors = attribute(DEVICE_MULTIPROCESSORS)
        self.most_shared = attribute(DEVICE_MOST_SHARED_PER_BLOCK)

    def call(self, name, *arguments):
        status = getattr(self.cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
            raise CudaError(f"{name}: error {status}, {(text.value or b'unknown').decode()}")

    def can_run(self, plan):
        """Clusters came with compute capability 9.0."""
        return plan["cluster"] == 1 or self.capability >= 9

    def function(self, plan, kernel):
        if kernel not in self.functions:
            if plan["module"] not in self.modules:
                ptx = (self.folder / f"{plan['module']}.ptx").read_bytes()
                module = ctypes.c_void_p()
                self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx))
                self.modules[plan["module"]] = module
            function = ctypes.c_void_p()
            module = self.modules[plan["module"]]
            self.call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(kernel.encode()))
            self.functions[kernel] = function
            if plan["shared_bytes"]:
                most = ctypes.c_int(self.most_shared - self.attribute(function, FUNCTION_SHARED_BYTES))
                which = ctypes.c_int(FUNCTION_MOST_DYNAMIC_SHARED)
                self.call("cuFuncSetAttribute", function, which, most)
        return self.functions[kernel]

    def attribute(self, function, which):
        value = ctypes.c_int()
        self.call("cuFuncGetAttribute", ctypes.byref(value), ctypes.c_int(which), function)
        return value.value

    def launch(self, plan, kernel, pointers, stream):
        """`pointers`: addresses on the device by the names of `ARGUMENTS`; those left out are null."""
        function, (config, _attributes) = self.function(plan, kernel), config_of(plan, stream)
        values = [ctypes.c_uint64(pointers.get(name, 0)) for name in arguments_of(kernel)]
        values.append(Problem(**plan["problem"]))
        # The driver copies the arguments before the call returns.
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.call("cuLaunchKernelEx", ctypes.byref(config), function, addresses, None)

    def occupancy(self, plan):
        """What the last kernel of a plan takes, and how many of its blocks run at a time."""
        function, (config, _attributes) = self.function(plan, plan["kernels"][-1]), config_of(plan, 0)
        count = ctypes.c_int()
        if plan["cluster"] > 1:
            self.call("cuOccupancyMaxActiveClusters", ctypes.byref(count), function, ctypes.byref(config))
            blocks = count.value * plan["cluster"]
        else:
            sizes = ctypes.c_int(plan["threads"]), ctypes.c_size_t(plan["shared_bytes"])
            self.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(count), function, *sizes)
            blocks = count.value * self.multiprocessors
        registers, local = (self.attribute(function, which) for which in (FUNCTION_REGISTERS, FUNCTION_LOCAL_BYTES))
        return {"registers": registers, "local_bytes": local, "blocks_at_a_time": blocks}


def config_of(plan, stream):
    """A launch's configuration, and the attributes that have to live as long as it does."""
    attributes = []
    if plan["cluster"] > 1:
        value = AttributeValue(cluster=(plan["cluster"], 1, 1))
        attributes.append(Attribute(ATTRIBUTE_CLUSTER_DIMENSION, value))
    if plan["cooperative"]:
        attributes.append(Attribute(ATTRIBUTE_COOPERATIVE, AttributeValue(cooperative=1)))
    array = (Attribute * max(len(attributes), 1))(*attributes)
    config = Config(
        grid=(plan["grid"], 1, 1),
        block=(plan["threads"], 1, 1),
        shared_bytes=plan["shared_bytes"],
        stream=stream,
        attributes=ctypes.cast(array, ctypes.POINTER(Attribute)),
        attribute_count=len(attributes),
    )
    return config, array
