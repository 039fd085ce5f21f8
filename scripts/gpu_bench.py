#!/usr/bin/env python3
"""Checks and times the CUDA kernels beside PyTorch on a GPU, where neither Rust nor a network is needed.

    cargo run --example launch_plans -- --json > plans.json       where Rust is; scripts/gpu-check.sh packs all of it
    nvcc -ptx -std=c++17 -O3 -arch=sm_80 kernels/….cu             likewise; cluster_*.cu with -arch=sm_90

    python3 scripts/gpu_bench.py --plans plans.json --ptx DIR     where PyTorch and the GPU are
    python3 scripts/gpu_bench.py … --all-plans                    also the plans that were not chosen
    python3 scripts/gpu_bench.py … --check-only                   no times; small files suit compute-sanitizer
    python3 scripts/gpu_bench.py … --dry-run                      what would be launched, without PyTorch and GPU

Ends with 1 if a check of this crate's kernels fails.
"""
import argparse
import datetime
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu_driver
import gpu_report

ROOT = Path(__file__).resolve().parent.parent


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plans", nargs="+", type=Path, default=[], metavar="FILE", help="of launch_plans: checked and timed")
    add("--check-plans", nargs="+", type=Path, default=[], metavar="FILE", help="others, which are only checked")
    add("--ptx", type=Path, metavar="DIR", help="with batch_norm_f32.ptx, cluster_f32.ptx, …")
    add("--out", type=Path, metavar="DIR", default=ROOT / "target/gpu", help="for the results (default: target/gpu)")
    add("--dtypes", type=lambda text: text.split(","), metavar="f32,…", help="only these")
    add("--offsets", type=offsets, default=[0.0, 1e2, 1e4, 1e6], metavar="N,…", help="means that are checked")
    add("--all-plans", action="store_true", help="also the plans that were not chosen")
    add("--check-only", action="store_true", help="no times")
    add("--bare", action="store_true", help="nothing written before the kernels do, nor run twice: for initcheck")
    add("--no-eager", action="store_true", help="no errors of PyTorch's own kernels")
    add("--no-compile", action="store_true", help="no torch.compile, which takes seconds for each case")
    add("--compile-mode", default="default", help="of torch.compile, such as max-autotune-no-cudagraphs")
    add("--reps", type=int, default=30, help="of each time (default: 30)")
    add("--seconds", type=float, default=480, help="after which nothing new begins (default: 480)")
    add("--dry-run", action="store_true", help="what would be launched")
    args = parser.parse_args(words)
    if not args.plans and not args.check_plans:
        parser.error("--plans or --check-plans is needed")
    if not args.ptx and not args.dry_run:
        parser.error("--ptx is needed")
    if args.reps < 2:
        parser.error("--reps should be at least 2")
    return args


def offsets(text):
    return [float(word) for word in text.split(",")]


def entries_of(files, dtypes):
    entries = [entry for file in files for entry in json.loads(file.read_text())]
    return [entry for entry in entries if not dtypes or entry["dtype"] in dtypes]


def dry_run(args):
    """Prints each launch; whether all went well, as far as that can be told without a GPU."""
    all_plans = []
    for entry in entries_of([*args.plans, *args.check_plans], args.dtypes):
        for direction in ("forward", "backward"):
            for plan in entry[direction][: None if args.all_plans else 1]:
                all_plans.append(plan)
                print(f"{entry['shape']} {entry['dtype']} {direction}: {gpu_driver.name_of(plan)}")
                print(*(f"    {line}" for line in gpu_driver.describe(plan, entry["dtype"])), sep="\n")
    wrong = gpu_driver.mismatches(all_plans, args.ptx) if args.ptx else []
    print(f"{len(all_plans)} plans", *wrong, sep="\n")
    return not wrong


def machine(torch):
    def line_of(*command):
        # Absent on some systems, and no reason to stop.
        done = shutil.which(command[0]) and subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip().replace("\n", "; ") if done and done.returncode == 0 else "unknown"

    device = torch.cuda.get_device_properties(0)
    inductor = {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")}
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,utilization.gpu"
    return {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "commit": line_of("git", "describe", "--always", "--dirty"),
        "GPU": f"{device.name}, {device.multi_processor_count} multiprocessors, {device.total_memory >> 20} MiB",
        f"before the run, {query}": line_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        "Python": platform.python_version(),
        **inductor,
    }


class Broken(Exception):
    """The device does not answer any more, as after an access out of range: nothing more can run."""


class Bench:
    """A run, whose results are written after each of its parts."""

    def __init__(self, args, torch, driver):
        self.args, self.torch, self.driver = args, torch, driver
        self.deadline = time.monotonic() + args.seconds
        settings = {name: str(value) for name, value in vars(args).items()}
        self.data = {"machine": machine(torch), "settings": settings, "checks": [], "timings": [], "errors": []}

    def cases(self, files):
        """Those that there is time for; the memory of one is free again before the next."""
        from gpu_accuracy import Case

        for entry in entries_of(files, self.args.dtypes):
            case = Case(entry, self.args.all_plans)
            if time.monotonic() > self.deadline:
                self.data["errors"].append(f"{case.name}: no time left")
                continue
            yield case
            gc.collect()
            try:
                self.torch.cuda.synchronize()
                self.torch.cuda.empty_cache()
            except Exception as error:
                raise Broken(f"{case.name}: {error}") from error

    def check(self):
        import gpu_accuracy

        for case in self.cases([*self.args.check_plans, *self.args.plans]):
            try:
                for row in gpu_accuracy.check(
                    self.driver, case, self.args.offsets, self.args.bare, not self.args.no_eager
                ):
                    self.data["checks"].append(row)
                    if row["problems"]:
                        print(gpu_report.problems_of(row), flush=True)
            except Exception as error:  # of the input or the float64 reference, such as too little memory
                self.data["errors"].append(f"{case.name}, checks: {type(error).__name__}: {error}")
                print(self.data["errors"][-1], flush=True)

    def measure(self):
        import gpu_timing

        flush = self.torch.empty(gpu_timing.FLUSH // 4, device="cuda")
        self.data["machine"] |= gpu_timing.machine_rates(flush, self.args.reps)
        for stage in ["eager"] + ["compiled"] * (not self.args.no_compile):
            for case in self.cases(self.args.plans):
                if stage == "compiled" and case.is_huge:
                    continue
                for direction in case.plans:
                    print(f"{stage}, {case.name}, {direction}", file=sys.stderr, flush=True)
                    errors = self.data["errors"]
                    try:
                        self.data["timings"] += gpu_timing.measure(
                            self.driver, case, direction, stage, self.args, flush, errors
                        )
                    except Exception as error:  # such as too little memory: the next cell has its turn
                        errors.append(f"{case.name} {direction}, {stage}: {type(error).__name__}: {error}")
                        print(errors[-1], flush=True)
                gpu_report.write(self.data, self.args.out)
                if self.has_no_compiler():
                    break

    def has_no_compiler(self):
        """Whether torch.compile failed wherever it was tried so far."""
        failed = sum(", torch.compile: " in error for error in self.data["errors"])
        return failed > 2 and not any(row["name"] == "torch.compile" for row in self.data["timings"])

    def run(self):
        """The text of the report."""
        try:
            self.check()
            gpu_report.write(self.data, self.args.out)
            if not self.args.check_only:
                self.measure()
        except Broken as error:
            self.data["errors"].append(f"the device stopped working: {error}")
        return gpu_report.write(self.data, self.args.out)


def main():
    args = arguments()
    if args.dry_run:
        sys.exit(not dry_run(args))
    try:
        import torch
    except ImportError:
        sys.exit("error: this needs PyTorch: no module named torch")
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA GPU here")
    torch.zeros(1, device="cuda")  # makes the context that the driver's calls need
    gc.disable()  # or a collection would fall into a measurement
    bench = Bench(args, torch, gpu_driver.Driver(args.ptx))
    print(bench.run())
    print(f"written to {args.out}")
    sys.exit(bool(gpu_report.failures(bench.data["checks"])) or not bench.data["checks"])


if __name__ == "__main__":
    main()
