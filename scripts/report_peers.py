"""The tables of compare_peers.py, and its files."""
import csv
import json
import re
import statistics

# What each pass has to read and write at least: x, y; and for gradients x, dy, dx.
MOVED = {"fwd": 2, "eval": 2, "vjp": 5, "all": 5}
# A load above this is more than the shell and an idle desktop.
BUSY = 0.5
NAMES = {
    "ours": "this crate",
    "pytorch": "PyTorch",
    "pytorch-kept": "PyTorch, memory kept",
    "pytorch-compiled": "torch.compile, memory kept",
    "candle-nn": "candle-nn",
    "jax": "JAX, memory kept",
    "tensorflow": "TensorFlow, memory kept",
}
NOTES = """\
- `fwd`: forward in training. `all`: batch norm and ReLU (other norms alone), forward and backward through autograd. `vjp`: ours are
  forward and gradients without candle's autograd, the others' are their `all`. `eval`: forward in evaluation.
- Each time is the median over rounds of a round's median; the peers take turns.
- PyTorch runs eagerly, with the system's allocator as it comes and (memory kept) with the same allocator kept from
  giving memory back to the system. This crate and candle-nn run with mimalloc, which keeps its memory too.
- torch.compile, JAX (a compiled batch norm with Flax's statistics) and TensorFlow (its fused op, channels last) are measured where asked for, all
  with the allocator that keeps its memory.
- Floor: what it takes to move as many bytes on all threads, with one addition at most: two passes for fwd and eval (x to y), five
  for vjp and all (also x and dy to dx). Share: the floor divided by our time. Small tensors, for which ours takes one thread, can be above 100 %.
"""


def locked_version(lock, package):
    found = re.search(rf'name = "{package}"\nversion = "(.*)"', lock.read_text())
    return found[1] if found else "unknown"


def median(times):
    return statistics.median(times) if times else None


def micros(time):
    return "–" if time is None else f"{time:.1f}" if time < 1000 else f"{time:,.0f}"


def ratio(theirs, ours):
    return "–" if None in (theirs, ours) else f"{theirs / ours:.2f}"


def table(head, rows):
    lines = [head, ["---"] * min(1, len(head)) + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def named(shape):
    """As it stands in tables: `layer [64,256]` for layer:64,256."""
    norm, _, dims = shape.rpartition(":")
    return f"{norm} [{dims}]".strip()


def op_row(row, peers):
    times = {peer: median(row["times"][peer]) for peer in (*peers, "floor")}
    ours, floor = times["ours"], times["floor"]
    return [
        f"{named(row['shape'])} {row['pass']}",
        *(micros(times[peer]) for peer in peers),
        *(ratio(times[peer], ours) for peer in peers[1:]),
        micros(floor),
        f"{floor / ours:.0%}".replace("%", " %") if ours else "–",
    ]


def summary(rows, peers):
    """For each pass the geometric mean and the worst case of each peer's ratio."""
    lines = []
    for pass_ in dict.fromkeys(row["pass"] for row in rows):
        cells = [pass_]
        for peer in peers[1:]:
            pairs = [(median(row["times"][peer]), median(row["times"]["ours"])) for row in rows if row["pass"] == pass_]
            ratios = [theirs / ours for theirs, ours in pairs if theirs and ours]
            cells.append(f"{statistics.geometric_mean(ratios):.2f} (least {min(ratios):.2f})" if ratios else "–")
        lines.append(cells)
    return table(["their time / ours", *(NAMES[peer] for peer in peers[1:])], lines)


def op_tables(data):
    text = ""
    for threads, dtype in dict.fromkeys((row["threads"], row["dtype"]) for row in data["ops"]):
        rows = [row for row in data["ops"] if (row["threads"], row["dtype"]) == (threads, dtype)]
        peers = [peer for peer in NAMES if peer in rows[0]["times"]]
        head = [f"{dtype.upper()}, threads: {threads}", *(f"{NAMES[peer]}, µs" for peer in peers)]
        head += [*(f"{NAMES[peer]} / ours" for peer in peers[1:]), "floor, µs", "share of it"]
        text += f"\n{table(head, [op_row(row, peers) for row in rows])}\nGeometric means:\n\n{summary(rows, peers)}"
    return text


def scaling_table(data):
    rows = [*data["scaling"]["threads"], *data["scaling"]["sizes"]]
    peers = [peer for peer in NAMES if peer in rows[0]["times"]]
    head = ["vjp, F32", *(f"{NAMES[peer]}, µs" for peer in peers), *(f"{NAMES[peer]} / ours" for peer in peers[1:])]
    head += ["floor, µs", "share of it"]
    lines = [op_row(row, peers) for row in rows]
    for row, line in zip(rows, lines):
        line[0] = f"{named(row['shape'])}, threads: {row['threads']}"
    return f"\nScaling:\n\n{table(head, lines)}"


def mnist_tables(data):
    runs, lines = data["mnist"]["runs"], []
    for model in dict.fromkeys(run["model"] for run in runs):
        ours = None
        for peer in dict.fromkeys(run["peer"] for run in runs):
            mine = [run for run in runs if (run["model"], run["peer"]) == (model, peer)]
            plain, normed = (
                median([s for run in mine for s in run["seconds"][key][1:]]) for key in ("without_bn", "with_bn")
            )
            ours = ours or (plain, normed)
            peak = f"{max(run['peak_mib'] for run in mine):.0f}"
            lines.append([
                f"{model}, {NAMES[peer]}", f"{plain:.2f}", f"{normed:.2f}", f"{100 * (normed / plain - 1):+.0f} %",
                ratio(plain, ours[0]), ratio(normed, ours[1]), peak,
            ])
    settings = data["settings"]
    head = ["MNIST", "without BN, s", "with BN, s", "BN costs", "plain / ours", "with BN / ours", "peak, MiB"]
    memory = [[NAMES[peer], f"{peak:.0f}"] for peer, peak in data["mnist"]["training_peak_mib"].items()]
    return (
        f"\nSeconds per epoch of {settings['limit'] or 60000} images, batches of 64, SGD, threads: "
        f"{settings['threads'][0]}; the median epoch, the first of each run left out. candle-nn is its batch norm in "
        f"this crate's model. The peak is the whole process's, with libraries and evaluation (PyTorch has none).\n\n"
        f"{table(head, lines)}\nPeak memory of training the CNN for a few steps, without a large evaluation:\n\n"
        f"{table(['batch norm', 'MiB'], memory)}"
    )


def markdown(data):
    text = "# This crate, PyTorch and candle-nn on the CPU\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in data["machine"].items() if value != "")
    settings = data["settings"]
    text += f"- rounds: {settings['rounds']} of {settings['seconds']} s\n"
    if settings["quick"]:
        text += "\nThis was a quick run: the figures mean nothing.\n"
    if float(data["machine"]["load before"]) > BUSY:
        text += "\nThe machine was busy before the run began: the figures are in doubt, those with all cores most.\n"
    text += f"\n{NOTES}"
    text += op_tables(data) if data["ops"] else ""
    text += scaling_table(data) if data["scaling"] else ""
    text += mnist_tables(data) if data["mnist"] else ""
    if data["errors"]:
        text += "\nNot measured:\n\n" + "".join(f"- {error}\n" for error in data["errors"])
    return text


def records(data):
    """Every number as measured: one for each round or epoch."""
    scaling = data["scaling"] or {"threads": [], "sizes": []}
    tables = {"ops": data["ops"], "scaling threads": scaling["threads"], "scaling sizes": scaling["sizes"]}
    for name, rows in tables.items():
        for row in rows:
            for peer, times in row["times"].items():
                for i, time in enumerate(times):
                    yield name, row["threads"], row["dtype"], row["shape"], row["pass"], peer, i + 1, time, "µs"
    for run in data["mnist"].get("runs", []):
        start = "mnist", data["settings"]["threads"][0], "f32", run["model"]
        for key, seconds in run["seconds"].items():
            for i, time in enumerate(seconds):
                yield *start, key, run["peer"], i + 1, time, "s"
        yield *start, "both", run["peer"], "", run["peak_mib"], "MiB"


def write(data, out):
    """Writes peers.json, peers.csv and peers.md, and returns the last one's text."""
    (out / "peers.json").write_text(json.dumps(data, indent=1, ensure_ascii=False))
    with open(out / "peers.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "threads", "dtype", "case", "pass", "peer", "round", "value", "unit"])
        writer.writerows(records(data))
    text = markdown(data)
    (out / "peers.md").write_text(text)
    return text
