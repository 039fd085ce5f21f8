#!/usr/bin/env python3
"""Checks the compiled CUDA kernels, without a GPU.

    scripts/cuda-toolkit.sh scripts/check-kernels.py [DTYPE...]    of f32, f64, f16, bf16; without: all

Compiles kernels/*.cu to the PTX that build.rs ships, has ptxas make code of it for each GPU
architecture, as the driver will, and reads what came out: parameters, registers, spills, shared
memory, and the instructions that the kernels were written for. Prints the registers, then a line for
each failure. Needs nvcc, ptxas and nvdisasm on the PATH.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}  # and bytes of a value
LAYOUTS = ("planes", "ragged", "columns", "odd")

# The parameters of each kind of kernel, which src/ops/batch_norm/cuda/mod.rs passes in this order.
READ = "const T *x, const T *dy, const T *y, const void *weight, const void *bias, const double *saved, "
GRADIENTS = "T *dx, T *dresidual, void *dparams, Problem p"
X_PARAMS = "const T *x, const T *residual, const void *weight, const void *bias, "
RESIDENT_FORWARD = X_PARAMS + "Pair *partials, unsigned *counters, T *y, double *saved, Problem p"
RESIDENT_BACKWARD = READ + "Pair *partials, unsigned *counters, " + GRADIENTS
PARAMETERS = {
    "stats": "const T *x, Pair *partials, Problem p",
    "forward": X_PARAMS + "const void *given_mean, const void *given_var, const Pair *partials, "
    "T *y, double *saved, Problem p",
    "backward_sums": READ + "Pair *partials, Problem p",
    "backward": READ + "const Pair *partials, " + GRADIENTS,
    "forward_group": RESIDENT_FORWARD, "backward_group": RESIDENT_BACKWARD,
    "forward_cluster": RESIDENT_FORWARD, "backward_cluster": RESIDENT_BACKWARD,
}
# Row norms, which src/ops/row_norm/cuda passes.
ROW_PARAMS = "const void *weight, const void *bias, "
ROW_FORWARD = "const T *x, " + ROW_PARAMS + "Pair *partials, unsigned *counters, T *y, double *saved, RowProblem p"
ROW_READ = "const T *x, const T *dy, " + ROW_PARAMS + "const double *saved, "
ROW_BACKWARD = ROW_READ + "Pair *partials, unsigned *counters, T *dx, RowProblem p"
PARAMETERS |= {
    "rn_stats": "const T *x, Pair *partials, RowProblem p",
    "rn_forward": "const T *x, " + ROW_PARAMS + "const Pair *partials, T *y, double *saved, RowProblem p",
    "rn_backward_sums": ROW_READ + "Pair *partials, RowProblem p",
    "rn_backward": ROW_READ + "const Pair *partials, T *dx, RowProblem p",
    "rn_param_sums": "const T *x, const T *dy, " + ROW_PARAMS + "const RowOf<real_of<T>> *rows, "
    "Pair *partials, Problem p, int64_t groups, int64_t channels, int64_t lines",
    **{f"rn_forward_{how}": ROW_FORWARD for how in ("lanes", "group", "cluster")},
    **{f"rn_backward_{how}": ROW_BACKWARD for how in ("lanes", "group", "cluster")},
}
# Those that have no layout.
PLAIN = {
    "bn_running_f32": "float *running, const double *value, double keep, double take, int64_t c",
    "bn_running_f64": "double *running, const double *value, double keep, double take, int64_t c",
    "rn_rows_f32": "const double *saved, RowOf<float> *table, double eps, int64_t rows",
    "rn_rows_f64": "const double *saved, RowOf<double> *table, double eps, int64_t rows",
    "rn_params": "const Pair *partials, void *dparams, Problem p",
}
PTX_TYPES = {"double": ".f64", "int64_t": ".u64", "Problem": ".align 8 .b8 [72]", "RowProblem": ".align 8 .b8 [112]"}

# The files of these.
PLAIN_FILES = {"running": ["bn_running_f32", "bn_running_f64"], "row_params": ["rn_rows_f32", "rn_rows_f64", "rn_params"]}

# Tensors that a kind of kernel loads and stores chunk by chunk.
TENSORS = {"stats": (1, 0), "forward": (2, 1), "backward_sums": (3, 0), "backward": (3, 2),
           "rn_stats": (1, 0), "rn_forward": (1, 1), "rn_backward_sums": (2, 0), "rn_backward": (2, 1),
           "rn_param_sums": (2, 0)}

# Registers at most: by layout for dtypes that are computed in float, and for f64. Two passes: what
# was measured with CUDA 13.0 and about a tenth more. Resident: the planner counts on two blocks of
# 256 threads on a multiprocessor, or one of 512.
RESIDENT = 128
REGISTERS = {
    "stats": {"planes": (95, 71), "ragged": (81, 69), "columns": (79, 71), "odd": (62, 71)},
    "forward": {"planes": (71, 82), "ragged": (85, 91), "columns": (84, 82), "odd": (71, 88)},
    "backward_sums": {"planes": (100, 91), "ragged": (113, 106), "columns": (113, 111), "odd": (84, 117)},
    "backward": {"planes": (90, 93), "ragged": (111, 111), "columns": (105, 103), "odd": (71, 103)},
    "rn_stats": {"planes": (101, 70), "ragged": (86, 71)},
    "rn_forward": {"planes": (104, 91), "ragged": (91, 84)},
    "rn_backward_sums": {"planes": (124, 113), "ragged": (110, 106)},
    "rn_backward": {"planes": (124, 117), "ragged": (109, 108)},
    "rn_param_sums": {"planes": (106, 110), "ragged": (117, 113), "columns": (128, 117), "odd": (106, 124)},
    "rn_forward_lanes": {"planes": (116, 99), "ragged": (96, 88)},
    "rn_backward_lanes": {"planes": (126, 126), "ragged": (119, 113)},
}

# Bytes of local memory that are put up with: in odd, ptxas keeps some kernels to 64 registers, which
# let twice as many threads run, at the cost of a few spilled numbers.
SPILLS = {f"bn_{kind}_odd_{dtype}": 24 for kind in ("forward_cluster", "backward_sums")
          for dtype in ("f32", "f16", "bf16")}
# And a few on sm_120.
SPILLS |= {"rn_forward_ragged_f32": 8, "rn_stats_ragged_f16": 16, "rn_stats_ragged_bf16": 16}

# What the driver on such a GPU makes of our PTX; the code is read where `True`.
PORTABLE_ON = {80: True, 86: False, 89: False, 90: True, 100: False, 120: False}
CLUSTERS_ON = {90: True, 100: False, 120: False}

failures = []


def check(holds, what):
    """Notes a failure unless `holds`."""
    if not holds:
        failures.append(what)


def read(path):
    return (ROOT / path).read_text()


def number(pattern, text):
    """The number that a pattern finds in a source."""
    found = re.search(pattern + r"\D*?(\d+)", text)
    if not found:
        sys.exit(f"check-kernels: nothing matches {pattern!r}: has the source changed?")
    return int(found[1])


def call(*command):
    """The output of a command, and what it complained of if it failed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = done.stdout
    errors = [line for line in output.splitlines() if "error" in line or "fatal" in line]
    return output, None if done.returncode == 0 else (errors or output.splitlines() or ["failed"])[0]


def kind_of(name):
    """(kind, layout, dtype) of a kernel's name."""
    found = re.fullmatch(r"(?:bn_)?(\w+?)_(planes|ragged|columns|odd)_(\w+)", name)
    return found.groups() if found else (name, "", name.rsplit("_", 1)[1])


def name_of(kind, layout, dtype):
    return "_".join(([] if kind.startswith("rn_") else ["bn"]) + [kind, layout, dtype])


def layouts_of(kind):
    """Rows are tiles of one channel, but the gradients of their parameters are sums over channels."""
    return LAYOUTS[:2] if kind.startswith("rn_") and kind != "rn_param_sums" else LAYOUTS


def parameters(name):
    """The parameters that a kernel's source should have, and the types of those in PTX."""
    text = PLAIN.get(name) or PARAMETERS[kind_of(name)[0]]
    return text, [".u64" if "*" in one else PTX_TYPES[one.split()[0]] for one in text.split(", ")]


def check_sources():
    """What both sides of a launch say, in Rust and in CUDA C++; returns what the planner promises."""
    tile, tiles = read("src/ops/batch_norm/plan/tile.rs"), read("kernels/tiles.cuh")
    plan = read("src/ops/batch_norm/plan/mod.rs")
    constants = {}
    for name in ("WIDE", "MOST_CHANNELS", "MOST_COLUMNS"):
        constants[name] = number(rf"const {name}: usize =", tile)
        there = number(rf"constexpr int {name} =", tiles)
        check(constants[name] == there, f"{name} is {constants[name]} in tile.rs, {there} in tiles.cuh")
    threads = [int(n) for n in re.search(r"const THREADS.*\[(\d+), (\d+)\];", plan).groups()]
    most = number(r"constexpr int MOST_THREADS =", tiles)
    check(max(threads) == most, f"blocks of {max(threads)} threads in plan/mod.rs, {most} in tiles.cuh")
    check(RESIDENT * most <= 65536, "a block of the planner's has more registers than there are")
    fields = {"i64": "int64_t", "f64": "double", "i32": "int32_t"}
    rust = re.search(r"pub struct Problem \{(.*?)\}", read("src/ops/batch_norm/plan/problem.rs"), re.S)
    rust = [(fields[kind], name) for name, kind in re.findall(r"pub (\w+): (\w+)", rust[1])]
    cuda = re.search(r"struct Problem \{(.*?)\n\n", tiles, re.S)[1]
    cuda = [(kind, name) for kind, names in re.findall(r"(\w+_t|double) ([\w, ]+);", cuda)
            for name in names.split(", ")]
    check(rust == cuda, f"Problem differs: {rust} in problem.rs, {cuda} in tiles.cuh")
    rows = read("kernels/rows.cuh")
    rust = re.search(r"pub struct RowProblem \{(.*?)\}", read("src/ops/row_norm/plan/mod.rs"), re.S)[1]
    rust = [(fields.get(kind, "Problem"), name) for name, kind in re.findall(r"pub (\w+): ([\w:]+)", rust)]
    cuda = re.findall(r"  (\w+) (\w+);", re.search(r"struct RowProblem \{(.*?)\n\};", rows, re.S)[1])
    check(rust == cuda, f"RowProblem differs: {rust} in row_norm/plan/mod.rs, {cuda} in rows.cuh")
    for path in sorted((ROOT / "kernels").glob("*.cu*")):
        for name, text in re.findall(r"KERNEL ([br]n_\w+?[\w#]*)\((.*?)\)\s*\{", path.read_text(), re.S):
            text = " ".join(text.replace("\\", " ").replace("[[maybe_unused]]", "").split())
            hows = [""]
            if "##how##" in name:
                hows = ("group", "cluster") if name.startswith("bn") else ("lanes", "group", "cluster")
            for full in (name.replace("##how##", how).replace("##name", "planes_f32") for how in hows):
                check(text == parameters(full)[0], f"{path.name}: {full} has other parameters: {text}")
    promised = re.search(r"fn static_shared_bytes.*?true => ([^,]*),.*?false => ([^,]*),", tile, re.S)
    one, several = (eval(text, {}, constants) for text in promised.groups())  # sums and products
    return {"planes": one, "ragged": one, "columns": several, "odd": several, "": 0}, constants["WIDE"], most


def check_ptx(source, ptx, expected, threads):
    """Names, parameters and launch bounds of the kernels in a file's PTX."""
    found = dict(re.findall(r"\.visible \.entry (\w+)\((.*?)\)\s*(?=\.|\{)", ptx, re.S))
    check(set(found) == set(expected), f"{source}: kernels are missing or new: "
          f"{' '.join(sorted(set(found) ^ set(expected)))}")
    bounds = dict(re.findall(r"\.visible \.entry (\w+)\([^)]*\)\s*\.maxntid (\d+, 1, 1)", ptx))
    for name in sorted(set(found) & set(expected)):
        # Less ".param", what a pointer points to, and the name.
        types = [" ".join(re.sub(r"\.ptr( \.align \d+)?|\w+_param_\d+", " ", one).split()[1:])
                 for one in found[name].split(",")]
        check(types == parameters(name)[1], f"{name}: parameters {types}, not {parameters(name)[1]}")
        check(bounds.get(name) == f"{threads}, 1, 1",
              f"{name}: no launch bounds of {threads} threads but {bounds.get(name)}")


def check_resources(arch, log, shared):
    """Registers, local and shared memory of the kernels, as ptxas tells; returns the registers."""
    registers = {}
    pattern = (r"entry function '(\w+)' for.*\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
               r"(\d+) bytes spill loads\n.*Used (\d+) registers(.*)")
    for name, stack, stored, loaded, used, rest in re.findall(pattern, log):
        (kind, layout, dtype), registers[name] = kind_of(name), int(used)
        budget = REGISTERS.get(kind, {}).get(layout, (RESIDENT, RESIDENT))[dtype == "f64"]
        check(int(used) <= budget, f"{name} sm_{arch}: {used} registers, more than {budget}")
        local = max(int(stack), int(stored), int(loaded))
        check(local <= SPILLS.get(name, 0), f"{name} sm_{arch}: {local} bytes of local memory")
        static = int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1])
        check(static <= shared[layout], f"{name} sm_{arch}: {static} bytes of shared memory, the planner "
              f"leaves room for {shared[layout]}")
    return registers


def check_code(arch, code, wide):
    """The instructions of the kernels; returns their names."""
    names = set()
    for name, text in re.findall(r"\n\.text\.(\w+):\n(.*?)(?=\n//-|\Z)", code, re.S):
        names.add(name)
        kind, layout, dtype = kind_of(name)
        counts = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text))
        many = lambda pattern: sum(n for op, n in counts.items() if re.fullmatch(pattern, op))
        where = f"{name} sm_{arch}"
        check(name in SPILLS or not many(r"(LDL|STL)\b.*"), f"{where}: local memory")
        barriers = many(r"UCGABAR_ARV"), many(r"UCGABAR_WAIT")
        # One pair for sum() and one to keep the shared memory of a block that others read.
        least = 2 if "cluster" in kind else 0
        check(min(barriers) >= least and max(barriers) <= 99 * least, f"{where}: barriers of clusters: "
              f"{barriers[0]} arrivals and {barriers[1]} waits")
        if not layout:
            continue
        v = {"odd": 1, "columns": 2 if dtype == "f64" else 4}.get(layout, wide // DTYPES[dtype])
        size = {16: r"\.128", 8: r"\.64", 4: "", 2: r"\.U16"}[v * DTYPES[dtype]]
        chunk = 8 if v == 1 else 4
        for ops, tensors in zip(("LDG", "STG"), TENSORS[re.sub("_(lanes|group|cluster)", "", kind)]):
            # STRONG is what blocks exchange, not the tensor.
            found = many(rf"{ops}\.E(\.EF)?{size}(?!.*STRONG).*")
            check(found >= tensors * chunk, f"{where}: {found} {ops} of {v * DTYPES[dtype]} bytes, expected "
                  f"{chunk} for each of {tensors} tensors")
    return names


def kernels_of(source):
    """The names of the kernels that a file should have."""
    if source in PLAIN_FILES:
        return PLAIN_FILES[source]
    module, dtype = source.rsplit("_", 1)
    kinds = [kind for kind in PARAMETERS if kind.endswith("_cluster") == module.startswith("cluster")
             and kind.startswith("rn_") == module.startswith(("row_", "cluster_rows"))]
    return [name_of(kind, layout, dtype) for kind in kinds for layout in layouts_of(kind)]


class Build:
    """What build.rs has nvcc do."""

    def __init__(self, directory):
        text, self.directory = read("build.rs"), Path(directory)
        self.portable = str(number("const PORTABLE: usize =", text))
        self.clusters = str(number("const CLUSTERS: usize =", text)) + "a"
        self.flags = re.findall(r'\.arg\("(.*?)"\)', text)
        self.replaced = re.search(r'\.replace\("(.*?)", "(.*?)"\)', text).groups()

    def ptx(self, source):
        """Compiles a file to PTX, and says which error there was."""
        arch = self.clusters if source.stem.startswith("cluster_") else self.portable
        path = self.directory / f"{source.stem}.ptx"
        _, error = call("nvcc", f"-gencode=arch=compute_{arch},code=sm_{arch}", "--ptx", *self.flags,
                        "--default-stream", "per-thread", str(source), "-o", str(path))
        if not error:
            path.write_text(path.read_text().replace(*self.replaced))
        return path, error


def assemble(ptx, arch, reads_code, shared, wide):
    """Makes code of PTX and checks it; returns the registers of each kernel."""
    cubin = ptx.with_suffix(f".{arch}.cubin")
    log, error = call("ptxas", "-v", f"-arch=sm_{arch}", str(ptx), "-o", str(cubin))
    check(not error, f"{ptx.name} on sm_{arch}: {error}")
    if error:
        return {}
    registers = check_resources(arch, log, shared)
    expected = set(kernels_of(ptx.stem))
    check(set(registers) == expected, f"{ptx.name} sm_{arch}: ptxas tells of {len(registers)} kernels")
    if reads_code:
        code, error = call("nvdisasm", "-c", str(cubin))
        check(not error, f"{cubin.name}: {error}")
        check(check_code(arch, code, wide) == expected, f"{cubin.name}: code of other kernels")
    return registers


def table(registers):
    """Registers on sm_90, and in brackets where another GPU takes more."""
    rows = [(kind, layout) for kind in PARAMETERS for layout in layouts_of(kind)]
    print(f"{'registers':<27}" + "".join(f"{dtype:>12}" for dtype in DTYPES))
    for kind, layout in rows:
        cells = []
        for dtype in DTYPES:
            of = registers.get(name_of(kind, layout, dtype), {})
            h100, most = of.get(90, 0), max(of.values(), default=0)
            cells.append(f"{h100} ({most})" if most > h100 else str(h100 or ""))
        print(f"{kind:<20}{layout:<7}" + "".join(f"{cell:>12}" for cell in cells))


def main():
    dtypes = sys.argv[1:] or list(DTYPES)
    if not set(dtypes) <= set(DTYPES):
        sys.exit(__doc__)
    for tool in ("nvcc", "ptxas", "nvdisasm"):
        if not shutil.which(tool):
            sys.exit(f"check-kernels: needs {tool} on the PATH: scripts/cuda-toolkit.sh has it")
    shared, wide, threads = check_sources()
    sources = sorted((ROOT / "kernels").glob("*.cu"))
    modules = ("batch_norm", "cluster", "row_norm", "cluster_rows")
    expected = {f"{module}_{dtype}" for module in modules for dtype in DTYPES}
    odd = {source.stem for source in sources} ^ (expected | set(PLAIN_FILES))
    check(not odd, f"files are missing or new: {odd}")
    registers = {}
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        build = Build(directory)

        def compile_and_assemble(source):
            ptx, error = build.ptx(source)
            check(not error, f"{source.name}: {error}")
            if error:
                return []
            check_ptx(source.name, ptx.read_text(), kernels_of(source.stem), threads)
            archs = CLUSTERS_ON if source.stem.startswith("cluster_") else PORTABLE_ON
            return [(arch, pool.submit(assemble, ptx, arch, reads_code, shared, wide))
                    for arch, reads_code in archs.items()]

        wanted = [source for source in sources if source.stem in PLAIN_FILES or source.stem.rsplit("_", 1)[-1] in dtypes]
        for compiled in [pool.submit(compile_and_assemble, source) for source in wanted]:
            for arch, assembled in compiled.result():
                for name, used in assembled.result().items():
                    registers.setdefault(name, {})[arch] = used
    table(registers)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{len(registers)} kernels for sm_{' sm_'.join(map(str, PORTABLE_ON))}: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
