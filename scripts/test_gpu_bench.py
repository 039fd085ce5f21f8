"""Tests of gpu_bench.py that need no GPU: python3 -m unittest discover -s scripts

With PyTorch and KERNEL_EMULATOR, a shared library of the kernels on the CPU, its checks run as well:

    scripts/cuda-toolkit.sh cargo build -p kernel-emulator; cd target/debug/build/kernel-emulator-*/out
    g++ -shared -o emulator.so -Wl,--whole-archive libemulated_kernels.a libemulator_runtime.a -Wl,--no-whole-archive
"""
import contextlib
import ctypes
import io
import json
import os
import tempfile
import unittest
from pathlib import Path

import gpu_bench
import gpu_driver
import gpu_report


def plan_of(direction, kind, splits=1):
    """As the planner has it for [2, 3, 8, 8] f32: 32 vectors of 4 for each channel."""
    kernels = {"forward": ["stats", "forward"], "backward": ["backward_sums", "backward"]}[direction]
    kernels, how = (kernels, "") if kind == "two passes" else (kernels[1:], f"{kind}_")
    problem = {"n": 2, "c": 3, "s": 64, "part": 256, "eps": 1e-5, "channels": 1, "splits": splits}
    problem |= {"params_dtype": 0, "given_dtype": 1, "relu": 0, "remove_mean": 1, "training": 1, "unused": 0}
    return {
        "what": kind,
        "module": "cluster_f32" if kind == "cluster" else "batch_norm_f32",
        "kernels": [f"bn_{kernel}_{how}planes_f32" for kernel in kernels],
        "grid": 3 * splits,
        "threads": 256,
        "cluster": splits if kind == "cluster" else 1,
        "cooperative": kind == "group" and splits > 1,
        "shared_bytes": 0 if kind == "two passes" else 4096 * (1 + (direction == "backward")),
        "partials": 0 if kind == "cluster" else 6 * splits,
        "counters": 6 if kind == "group" and splits > 1 else 0,
        "dram_bytes": 0,
        "problem": problem,
    }


def entry():
    kinds = [("group", 1), ("two passes", 1), ("group", 2), ("cluster", 2)]
    plans = {direction: [plan_of(direction, *kind) for kind in kinds] for direction in ("forward", "backward")}
    return {"shape": [2, 3, 8, 8], "dtype": "f32", **plans}


class Layouts(unittest.TestCase):
    """The sizes and offsets are those of cuda.h, and of `Problem` in src/ops/batch_norm/plan/problem.rs."""

    def test_problem(self):
        numbers = dict(n=1, c=2, s=3, part=4, eps=0.5, channels=5, splits=6, params_dtype=7, given_dtype=8)
        numbers |= dict(relu=9, remove_mean=10, training=11, unused=12)
        packed = bytes(gpu_driver.Problem(**numbers))
        words = [*(number.to_bytes(8, "little") for number in (1, 2, 3, 4)), bytes.fromhex("000000000000e03f")]
        words += [number.to_bytes(4, "little") for number in range(5, 13)]
        self.assertEqual(packed, b"".join(words))
        self.assertEqual(len(packed), 72)

    def test_config(self):
        config = gpu_driver.Config
        fields = config.grid, config.block, config.shared_bytes, config.stream
        fields += config.attributes, config.attribute_count
        self.assertEqual([field.offset for field in fields], [0, 12, 24, 32, 40, 48])
        self.assertEqual(ctypes.sizeof(config), 56)

    def test_attributes(self):
        config, attributes = gpu_driver.config_of(plan_of("forward", "cluster", 2), 5)
        self.assertEqual((config.attribute_count, config.stream), (1, 5))
        expected = bytes([4]) + bytes(7) + b"".join(bytes([number, 0, 0, 0]) for number in (2, 1, 1))
        self.assertEqual(bytes(attributes), expected.ljust(72, b"\0"))
        config, attributes = gpu_driver.config_of(plan_of("forward", "group", 2), 0)
        self.assertEqual(bytes(attributes), (bytes([2]) + bytes(7) + bytes([1])).ljust(72, b"\0"))
        self.assertEqual(ctypes.string_at(config.attributes, 1), bytes([2]))
        self.assertEqual(gpu_driver.config_of(plan_of("forward", "group"), 0)[0].attribute_count, 0)


class DryRun(unittest.TestCase):
    def run_with(self, ptx):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as output:
            plans = Path(folder) / "plans.json"
            plans.write_text(json.dumps([{**entry(), "forward": entry()["forward"][:1], "backward": []}]))
            (Path(folder) / "batch_norm_f32.ptx").write_text(ptx)
            words = ["--plans", str(plans), "--ptx", folder, "--dry-run"]
            return gpu_bench.dry_run(gpu_bench.arguments(words)), output.getvalue()

    def test_parameters(self):
        name = "bn_forward_group_planes_f32"
        pointers = "".join(f"\t.param .u64 {name}_param_{i},\n" for i in range(8))
        ptx = f".visible .entry {name}(\n{pointers}\t.param .align 8 .b8 {name}_param_8[72]\n)\n.maxntid 512, 1, 1\n"
        well, output = self.run_with(ptx)
        self.assertTrue(well, output)
        self.assertIn("3 x 256 threads, 4096 B shared", output)
        for wrong in (ptx.replace("[72]", "[64]"), ptx.replace(name, "other"), ptx.replace(".u64", ".u32")):
            self.assertFalse(self.run_with(wrong)[0])


class Report(unittest.TestCase):
    def test_tables(self):
        row = {"shape": [2, 3], "dtype": "f32", "pass": "forward", "stage": "eager", "mode": "cold", "bytes": 8 << 20}
        row |= {"method": "graph", "runs": 1}
        timings = [{**row, "name": "ours", "plan": "a", "us": [10.0, 10.0]}, {**row, "name": "copy", "us": [9.0, 9.0]}]
        timings += [{**row, "name": "plan 1", "plan": "b", "us": [5.0, 5.0]}]
        timings += [{**row, "name": "eager", "us": [20.0, 20.0], "method": "events"}]
        check = {"shape": [2, 3], "dtype": "f32", "pass": "forward", "offset": 0.0, "who": "ours", "plan": "a"}
        checks = [{**check, "errors": {"y": 1e-7}, "problems": []}, {**check, "errors": {}, "problems": ["broken"]}]
        with tempfile.TemporaryDirectory() as folder:
            data = {"machine": {}, "settings": {}, "checks": checks, "timings": timings, "errors": ["none"]}
            text = gpu_report.write(data, Path(folder))
        self.assertIn("| [2, 3] | a | 10.0 (0.00) | 9.00 (0.00) | 1.68 | 90% | 20.0 e (0.00) 2.00× | – |", text)
        self.assertIn("| b | 5.00 (0.00) | 0.50 |", text)
        self.assertIn("2 checks of ours, of which 1 failed", text)


class EmulatorLaunch(ctypes.Structure):
    """Of emulator/runtime/launch.cpp."""

    _fields_ = [*((name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster"))]
    _fields_ += [("cooperative", ctypes.c_int), ("schedule", ctypes.c_int)]
    _fields_ += [("seed", ctypes.c_uint64), ("shared_bytes", ctypes.c_size_t)]


class Emulator:
    """In place of the driver."""

    def __init__(self):
        self.library = ctypes.CDLL(os.environ["KERNEL_EMULATOR"])

    def can_run(self, plan):
        return True

    def launch(self, plan, kernel, pointers, stream):
        sizes = [(plan[name], 1, 1) for name in ("grid", "threads", "cluster")]
        launch = EmulatorLaunch(*sizes, plan["cooperative"], 2, 1, plan["shared_bytes"])
        values = [ctypes.c_uint64(pointers.get(name, 0)) for name in gpu_driver.arguments_of(kernel)]
        values.append(gpu_driver.Problem(**plan["problem"]))
        count, message = len(values), ctypes.create_string_buffer(4096)
        addresses = (ctypes.c_void_p * count)(*map(ctypes.addressof, values))
        bytes_of = (ctypes.c_size_t * count)(*map(ctypes.sizeof, values))
        name, length = kernel.encode(), ctypes.c_size_t(len(message))
        of = ctypes.byref(launch), addresses, bytes_of, ctypes.c_size_t(count), message, length
        if self.library.emulator_launch(name, *of):
            raise RuntimeError(message.value.decode())


class Faulty(Emulator):
    """Writes one value behind a kernel's back, another one each time."""

    def __init__(self, tensor, index, what):
        super().__init__()
        self.tensor, self.index, self.what, self.launches = tensor, index, what, 0

    def launch(self, plan, kernel, pointers, stream):
        super().launch(plan, kernel, pointers, stream)
        if self.tensor in pointers:
            address = pointers[self.tensor] + self.index * ctypes.sizeof(self.what)
            self.what.from_address(address).value = 1 + self.launches
        self.launches += 1


@unittest.skipUnless(os.environ.get("KERNEL_EMULATOR"), "KERNEL_EMULATOR is not set")
class Checks(unittest.TestCase):
    def problems(self, driver):
        import gpu_accuracy

        rows = list(gpu_accuracy.check(driver, gpu_accuracy.Case(entry(), True, "cpu"), [0.0, 1e4]))
        self.assertEqual(len(rows), 2 * 2 * 5)
        self.assertEqual([row for row in rows if row["who"] == "PyTorch" and row["problems"]], [])
        return [" ".join(row["problems"]) for row in rows if row["problems"]]

    def test_the_kernels_pass(self):
        self.assertEqual(self.problems(Emulator()), [])

    def test_faults_are_found(self):
        for tensor, index, what, words in [
            ("y", 7, ctypes.c_float, "y is off by"),
            ("y", -1, ctypes.c_float, "writes beside y"),
            ("dparams", 6, ctypes.c_float, "writes beside dparams"),
            ("saved", 2, ctypes.c_double, "saved differs between two runs"),
            ("saved", 5, ctypes.c_double, "var is off by"),
            ("dx", 0, ctypes.c_float, "dx differs between two runs"),
            ("dparams", 4, ctypes.c_float, "dbias is off by"),
            ("counters", 1, ctypes.c_int, "counters are not zero"),
        ]:
            with self.subTest(tensor=tensor, index=index):
                self.assertIn(words, " ".join(self.problems(Faulty(tensor, index, what))))


if __name__ == "__main__":
    unittest.main()
