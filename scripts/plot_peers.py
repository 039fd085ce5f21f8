"""Draws what compare_peers.py measured: `plot_peers.py peers.json FOLDER`, wherever matplotlib is."""
import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from matplotlib.lines import Line2D  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
PASSES = {
    "fwd": ("forward, training", BLUE),
    "vjp": ("forward + gradients, against PyTorch's autograd", GREEN),
    "all": ("forward + backward, autograd on both sides", ORANGE),
    "eval": ("forward, evaluation", VERMILION),
}
LINES = {
    "ours": ("this crate", BLUE, "o"),
    "pytorch": ("PyTorch", ORANGE, "s"),
    "pytorch-kept": ("PyTorch, memory kept", VERMILION, "^"),
    "floor": ("five passes, one addition", GREY, "x"),
}

plt.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "peers",
    "legend.frameon": False, "figure.constrained_layout.use": True,
})


def median(row, peer):
    times = row["times"].get(peer)
    return statistics.median(times) if times else None


def save(figure, out, name):
    for ending in ("png", "svg"):
        figure.savefig(out / f"{name}.{ending}", dpi=150, metadata={"Date": None} if ending == "svg" else None)
    plt.close(figure)


def bars(axes, rows):
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    width = 0.8 / len(PASSES)
    for i, (pass_, (_, colour)) in enumerate(PASSES.items()):
        for at, shape in enumerate(shapes):
            row = next((r for r in rows if (r["shape"], r["pass"]) == (shape, pass_)), None)
            ours, theirs = (median(row, peer) for peer in ("ours", "pytorch")) if row else (None, None)
            if not (ours and theirs):
                continue
            x = at + (i - (len(PASSES) - 1) / 2) * width
            axes.bar(x, theirs / ours, width * 0.92, color=colour)
            kept = median(row, "pytorch-kept")
            if kept:
                axes.hlines(kept / ours, x - width * 0.5, x + width * 0.5, color="black", linewidth=2)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(shapes)), [f"[{shape}]" for shape in shapes])
    axes.tick_params(axis="x", length=0, labelsize=10)
    axes.set_ylabel("PyTorch's time / ours")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def plot_ratio(data, out):
    dtype = data["settings"]["dtypes"][0]
    rows = [row for row in data["ops"] if row["dtype"] == dtype]
    counts = list(dict.fromkeys(row["threads"] for row in rows))
    figure, panels = plt.subplots(len(counts), 1, figsize=(9.5, 0.8 + 3 * len(counts)), squeeze=False)
    for threads, axes in zip(counts, panels[:, 0]):
        bars(axes, [row for row in rows if row["threads"] == threads])
        axes.set_title(f"{dtype.upper()}, {threads} thread{'s' * (threads != 1)}", fontsize=11, loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in PASSES.values()]
    labels = [label for label, _ in PASSES.values()]
    handles += [Line2D([], [], color="black", linewidth=2), Line2D([], [], color=GREY, linestyle="--")]
    labels += ["the same, if PyTorch's allocator keeps its memory", "equally fast"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    save(figure, out, "peers_ratio")


def plot_threads(axes, rows):
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for shape, style in zip(shapes, ("-", ":")):
        for peer in ("ours", "pytorch", "pytorch-kept"):
            points = [(row["threads"], median(row, peer)) for row in rows if row["shape"] == shape]
            points = [(threads, time / 1000) for threads, time in points if time]
            _, colour, marker = LINES[peer]
            axes.plot(*zip(*points), style, color=colour, marker=marker) if points else None
    counts = sorted({row["threads"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if inside(axes.get_ylim(), t)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("threads")
    axes.set_ylabel("forward + backward, ms")
    named = [f"[{shape}] {style}" for shape, style in zip(shapes, ("solid", "dotted"))]
    axes.set_title(f"F32, {', '.join(named)}", fontsize=10, loc="left")


def inside(limits, value):
    return limits[0] <= value <= limits[1]


def plot_sizes(axes, rows, value_bytes=4):
    sizes = [row["values"] for row in rows]
    for peer, (_, colour, marker) in LINES.items():
        # Forward and backward move each value five times at least.
        points = [(row["values"], median(row, peer)) for row in rows]
        points = [(n, 5 * value_bytes * n / time / 1000) for n, time in points if time]
        axes.plot(*zip(*points), color=colour, marker=marker) if points else None
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"$2^{{{size.bit_length() - 1}}}$" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("values in the tensor")
    axes.set_ylabel("achieved GB/s")


def plot_scaling(data, out):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.4))
    plot_threads(left, data["scaling"]["threads"])
    plot_sizes(right, data["scaling"]["sizes"])
    right.set_title(f"F32, {data['settings']['threads'][0]} threads", fontsize=10, loc="left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=colour, marker=marker) for _, colour, marker in LINES.values()]
    figure.legend(handles, [label for label, _, _ in LINES.values()], loc="outside lower center", ncols=4, fontsize=10)
    save(figure, out, "peers_scaling")


def main(json_file, folder):
    data = json.loads(Path(json_file).read_text())
    if data["ops"]:
        plot_ratio(data, Path(folder))
    if data["scaling"]:
        plot_scaling(data, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
