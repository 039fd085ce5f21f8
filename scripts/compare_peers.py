#!/usr/bin/env python3
"""Measures this crate beside PyTorch and candle-nn on the CPU, in one run.

    python3 scripts/compare_peers.py                      one layer: tables, plots, raw numbers
    python3 scripts/compare_peers.py --scaling            also over threads and sizes
    python3 scripts/compare_peers.py --mnist DIR          also epochs of training, and their memory
    python3 scripts/compare_peers.py --quick              a few minutes at most (--also takes longer), to see that all of it works

Needs cargo, and a network the first time, for PyTorch goes into a venv of its own (pip's environment
variables choose where from; the CPU's build is enough). Close other programs: the figures are times.
"""
import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import report_peers
from peer_processes import Failure, NotMeasured, Worker, environment, kill_all, run, run_measured

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
PACKAGES = ["torch==2.13.0", "matplotlib==3.11.2"]
# Peers besides PyTorch and candle-nn, and what each of them needs.
FURTHER = {"compile": [], "jax": ["jax==0.10.2"], "tensorflow": ["tensorflow-cpu==2.21.0"]}

CASES = ["64,256", "1024,1024", "64,32,28,28", "32,64,56,56", "32,256,14,14", "128,64,32,32"]
SCALING_CASES = ["64,32,28,28", "32,64,56,56"]
PASSES = ["fwd", "vjp", "all", "eval"]
DTYPES = {"f32", "f64", "f16", "bf16"}
MNIST = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--venv", type=Path, metavar="DIR", help="an existing one gets no more than --also needs (default: target/peers-venv)")
    add("--out", type=Path, metavar="DIR", help="for tables, plots and raw numbers (default: target/peers)")
    add("--threads", type=numbers, default=[4, 1], metavar="N,N", help="default: 4,1; MNIST takes the first")
    add("--rounds", type=int, default=5, help="how often each worker has its turn (default: 5)")
    add("--seconds", type=float, default=0.3, help="of each turn (default: 0.3)")
    add("--dtypes", type=lambda text: text.split(","), default=["f32"], metavar="f32,…", help="of f32, f64, f16, bf16 (default: f32)")
    add("--cases", nargs="+", type=shape, default=CASES, metavar="N,C,…",
        help="shapes for batch norm, or for another norm as in layer:N,C, rms:N,C, group32:N,C,H,W and instance:N,C,H,W (default: six)")
    add("--also", type=lambda text: text.split(","), default=[], metavar="compile,jax,tensorflow",
        help="further peers: torch.compile (needs a C++ compiler, warms up slowly), JAX, TensorFlow's fused op")
    add("--skip-ops", action="store_true", help="no table of single layers")
    add("--scaling", action="store_true", help="also threads 1, 2, 4 and sizes from 2^12 to 2^26 values")
    add("--mnist", type=Path, metavar="DIR", help="also train on MNIST, whose four IDX files are in DIR")
    add("--models", type=lambda text: text.split(","), default=["mlp", "cnn"], metavar="mlp,cnn",
        help="that --mnist trains (default: both)")
    add("--epochs", type=int, default=3, help="of each MNIST run; the first does not count (default: 3)")
    add("--mnist-rounds", type=int, default=2, help="MNIST runs of each peer, in turns (default: 2)")
    add("--limit", type=int, default=0, metavar="N", help="only the first N training images")
    add("--quick", action="store_true", help="one short round of what is asked for, MNIST with 1280 images: the figures mean nothing")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(rounds=1, seconds=0.03, epochs=2, mnist_rounds=1, limit=1280)
    args = parser.parse_args()
    if args.mnist and args.epochs < 2:
        parser.error("--epochs should be at least 2, for the first does not count")
    if min(args.rounds, args.mnist_rounds, *args.threads) < 1 or args.seconds <= 0:
        parser.error("--rounds, --mnist-rounds, --threads and --seconds should be above 0")
    if unknown := set(args.dtypes) - DTYPES:
        parser.error(f"unknown dtype {', '.join(unknown)}")
    if unknown := set(args.models) - {"mlp", "cnn"}:
        parser.error(f"unknown model {', '.join(unknown)}")
    if args.mnist and (absent := [name for name in MNIST if not any(args.mnist.glob(f"{name}*"))]):
        parser.error(f"--mnist {args.mnist} should have {', '.join(absent)}, as it is or with .gz behind its name")
    if unknown := set(args.also) - set(FURTHER):
        parser.error(f"unknown peer {', '.join(unknown)}")
    args.out = args.out or ROOT / "target/peers"
    args.venv = args.venv or ROOT / "target/peers-venv"
    return args


def numbers(text):
    return [int(word) for word in text.split(",")]


def shape(text):
    norm, _, dims = text.rpartition(":")
    if len(numbers(dims)) not in range(2, 6) or not re.fullmatch(r"(layer|rms|instance|group\d+)?", norm):
        raise ValueError
    return text


def python_with_torch(venv, further):
    """The venv's interpreter; a venv that does not exist is made first, and gets the packages of further peers."""
    python = venv.absolute() / "bin/python"
    if not python.exists():
        try:
            run([sys.executable, "-m", "venv", venv], "no venv: Python's modules venv and ensurepip are needed")
            install(python, PACKAGES)
        except BaseException:
            # A half-made one would be taken for whole the next time.
            shutil.rmtree(venv, ignore_errors=True)
            raise
    version = run([python, "-c", "import torch; print(torch.__version__)"], f"no PyTorch in {venv}").strip()
    if f"torch=={version.split('+')[0]}" not in PACKAGES:
        print(f"this is PyTorch {version}, while {PACKAGES[0]} is what a new venv gets", file=sys.stderr)
    if wanted := [package for peer in further for package in FURTHER[peer]]:
        # pip writes some names with an underscore.
        present = run([python, "-m", "pip", "freeze"], f"no pip in {venv}").replace("_", "-").split()
        install(python, [package for package in wanted if package not in present])
    return python, version


def install(python, packages):
    if packages:
        print(f"installing {', '.join(packages)}: a large download", file=sys.stderr)
        run([python, "-m", "pip", "install", "--quiet", *packages], f"pip could not install {', '.join(packages)}")


def build(*target):
    """Compiles a target and returns its path, which only cargo's messages name."""
    if not shutil.which("cargo"):
        raise Failure("no cargo on the PATH: Rust is needed to build this crate")
    messages = run(["cargo", *target, "--message-format", "json-render-diagnostics"], "the build failed", cwd=ROOT)
    paths = [json.loads(line).get("executable") for line in messages.splitlines() if line.startswith("{")]
    return [path for path in paths if path][-1]


def start_workers(bench, python, threads, further):
    def script(name, *words, kept=False):
        return Worker([python, SCRIPTS / name, *words], environment(threads, kept), True)

    workers = {
        "ours": Worker([bench], environment(threads)),
        "pytorch": script("torch_peer.py", "ops", threads),
        "pytorch-kept": script("torch_peer.py", "ops", threads, kept=True),
        # The same program as ours, but stopped while ours is measured.
        "candle-nn": Worker([bench], environment(threads)),
    }
    # With their memory kept, as PyTorch is faster.
    if "compile" in further:
        workers["pytorch-compiled"] = script("torch_peer.py", "ops", threads, "--compile", kept=True)
    if "jax" in further:
        workers["jax"] = script("jax_peer.py", threads, kept=True)
    if "tensorflow" in further:
        workers["tensorflow"] = script("tensorflow_peer.py", threads, kept=True)
    return workers


def times_of(workers, shape, dtype, passes, args, errors):
    """Medians in µs by pass and peer, one for each round. The peers take turns within each pass."""
    times = {pass_: {peer: [] for peer in (*workers, "floor")} for pass_ in passes}
    broken = set()
    for _ in range(args.rounds):
        for pass_ in passes:
            for peer, worker in workers.items():
                # Only ours has gradients without autograd.
                if (pass_ == "vjp" and peer != "ours") or (peer, pass_) in broken:
                    continue
                layer = "candle-nn" if peer == "candle-nn" else "ours"
                try:
                    times[pass_][peer].append(worker.ask(f"{layer} {shape} {dtype} {pass_} {args.seconds}"))
                except NotMeasured as error:
                    broken.add((peer, pass_))
                    errors.append(f"{peer}, [{shape}] {dtype} {pass_}: {error}")
                    print(errors[-1], file=sys.stderr)
        floors = {}
        for pass_ in passes:
            moved = report_peers.MOVED[pass_]
            if moved not in floors:
                floors[moved] = workers["ours"].ask(f"ours {shape} {dtype} floor{moved} {args.seconds}")
            times[pass_]["floor"].append(floors[moved])
    if "vjp" in passes:
        for peer in set(workers) - {"ours"}:
            times["vjp"][peer] = times["all"][peer]
    return times


def measure(bench, python, threads, jobs, passes, args, errors):
    """A row for each pass of each `(shape, dtype)` of `jobs`."""
    workers, rows = start_workers(bench, python, threads, args.also), []
    for shape, dtype in jobs:
        print(f"{threads} threads, {dtype} [{shape}]", file=sys.stderr)
        for pass_, times in times_of(workers, shape, dtype, passes, args, errors).items():
            rows.append({"threads": threads, "dtype": dtype, "shape": shape, "pass": pass_, "times": times})
    for worker in workers.values():
        worker.kill()
    return rows


def shape_of_size(exponent):
    """A shape [32, C, side, side] of 2^exponent values, wider and deeper as it grows."""
    side = (exponent - 5) // 3
    return f"32,{2 ** (exponent - 5 - 2 * side)},{2**side},{2**side}"


def scaling(bench, python, args, errors):
    def only_vjp(threads, shapes):
        rows = measure(bench, python, threads, [(shape, "f32") for shape in shapes], ["vjp", "all"], args, errors)
        return [row for row in rows if row["pass"] == "vjp"]

    counts = [count for count in (1, 2, 4) if count <= (os.cpu_count() or 1)]
    exponents = range(12, 21 if args.quick else 27, 2)
    rows = only_vjp(args.threads[0], [shape_of_size(exponent) for exponent in exponents])
    return {
        "threads": [row for count in counts for row in only_vjp(count, SCALING_CASES)],
        "sizes": [{**row, "values": 2**exponent} for exponent, row in zip(exponents, rows)],
    }


def train_ours(example, model, norm, limit, args, out):
    command = [example, "--data", args.mnist, "--model", model, "--norm", norm, "--device", "cpu", "--quiet"]
    command += ["--epochs", args.epochs, "--out", out] + (["--limit", limit] if limit else [])
    _, peak = run_measured(command, environment(args.threads[0]))
    epochs = json.loads((out / "metrics.json").read_text())["epochs"]
    return {key: [epoch["seconds"] for epoch in epochs[key]] for key in epochs}, peak


def train_torch(python, model, kept, args):
    threads = args.threads[0]
    command = [python, SCRIPTS / "torch_peer.py", "mnist", args.mnist, model, args.epochs, args.limit, threads]
    output, peak = run_measured(command, environment(threads, kept))
    return json.loads(output), peak


def mnist(example, python, args):
    """Runs of both networks, by turns, and the memory of training the CNN."""
    out, runs = args.out / "mnist", []
    peers = {
        "ours": lambda model: train_ours(example, model, "none,batch", args.limit, args, out),
        "pytorch": lambda model: train_torch(python, model, False, args),
        "pytorch-kept": lambda model: train_torch(python, model, True, args),
        "candle-nn": lambda model: train_ours(example, model, "none,candle", args.limit, args, out),
    }
    for model in args.models:
        for index in range(args.mnist_rounds):
            for peer, train in peers.items():
                print(f"MNIST, {model}, {peer}, run {index + 1} of {args.mnist_rounds}", file=sys.stderr)
                seconds, peak = train(model)
                runs.append({"model": model, "peer": peer, "seconds": seconds, "peak_mib": peak})
    # Six batches, and as few test images: evaluation takes 1000 at a time, more than training does.
    norms = {"ours": "none,batch", "candle-nn": "none,candle"}
    memory = {peer: train_ours(example, "cnn", norm, 384, args, out)[1] for peer, norm in norms.items()}
    return {"runs": runs, "training_peak_mib": memory}


def machine(torch_version, further, load):
    def line_of(*command):
        # Absent on some systems, and no reason to stop.
        done = shutil.which(command[0]) and subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done else ""

    lscpu = dict(line.split(":", 1) for line in line_of("lscpu").splitlines() if ":" in line)
    lscpu = {key.strip(): value.strip() for key, value in lscpu.items()}
    caches = [f"{key.removesuffix(' cache')} {value}" for key, value in lscpu.items() if key.endswith(" cache")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": line_of("git", "describe", "--always", "--dirty"),
        "cpu": lscpu.get("Model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "caches": ", ".join(caches) or "unknown",
        "load before": f"{load:.1f}",
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(", "),
        "rustc": line_of("rustc", "--version"),
        "candle-nn": report_peers.locked_version(ROOT / "Cargo.lock", "candle-nn"),
        "PyTorch": torch_version,
        "further peers": ", ".join(package for peer in further for package in FURTHER[peer]),
        "Python": platform.python_version(),
    }


def compare(args):
    load = os.getloadavg()[0]
    python, torch_version = python_with_torch(args.venv, args.also)
    bench = build("bench", "--bench", "peers", "--no-run")
    example = build("build", "--release", "--example", "mnist_compare") if args.mnist else None
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    data = {"machine": machine(torch_version, args.also, load), "settings": settings, "errors": []}
    data.update(ops=[], scaling={}, mnist={})

    # What has been measured is written at once, so that an error later on does not lose it.
    if not args.skip_ops:
        jobs = [(shape, dtype) for dtype in args.dtypes for shape in args.cases]
        for threads in args.threads:
            data["ops"] += measure(bench, python, threads, jobs, PASSES, args, data["errors"])
            report_peers.write(data, args.out)
    if args.scaling:
        data["scaling"] = scaling(bench, python, args, data["errors"])
        report_peers.write(data, args.out)
    if args.mnist:
        data["mnist"] = mnist(example, python, args)
    print(report_peers.write(data, args.out))
    try:
        run([python, SCRIPTS / "plot_peers.py", args.out / "peers.json", args.out], "no plots")
    except Failure as failure:
        print(failure, file=sys.stderr)
    print(f"written to {args.out}: {', '.join(sorted(path.name for path in args.out.glob('peers*')))}")


def main():
    if not hasattr(signal, "SIGSTOP"):
        sys.exit("error: workers are stopped by signals that this system does not have")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = arguments()
    try:
        compare(args)
    except Failure as failure:
        sys.exit(f"error: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        kill_all()


if __name__ == "__main__":
    main()
