"""The tables of gpu_bench.py, and its files."""
import csv
import json
import statistics

# What each pass has to move at least: x and y; x, dy and dx.
MOVED = {"forward": 2, "backward": 3}
ANCHORS = ["eager", "channels_last", "no cuDNN", "torch.compile"]
QUANTITIES = ["y", "mean", "var", "dx", "dweight", "dbias"]
NOTES = """\
- Times are of the device: replays of a CUDA graph between two events, or events around the calls where a function
  could not be captured (marked e). What is compared in a row took turns. Median µs, in brackets the interquartile
  range. `cold`: L2 was written over before each run. `warm`: runs follow each other on the same tensors.
- Behind an anchor's time: its ratio to ours of the same turns, above 1 where ours is faster.
- `forward` is in training, without running statistics. `backward` starts from the saved statistics.
- Share: what ours has to move at least (forward 2 tensors, backward 3) per second, of what a copy of the same tensor
  moves in the same turns, which reads one and writes one.
- eager: PyTorch as it comes, [n, c, …] in order. channels_last: the same values in that layout. no cuDNN: only where
  PyTorch takes cuDNN otherwise. torch.compile took turns with ours in a later part of the run.
- Errors: of the worst channel, against float64 on the same input. y: norm of the error over that of y; dx: over that
  of dy in the units of dx; mean: in standard deviations; var: over var + eps; dweight and dbias: over the norms of
  what is summed.
"""


def table(head, rows):
    lines = [head, ["---"] * min(1, len(head)) + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def micros(time):
    return f"{time:.2f}" if time < 10 else f"{time:.1f}" if time < 1000 else f"{time:,.0f}"


def summary(row):
    """Median and quartiles of a row's samples."""
    samples = row["us"]
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": middle, "q1": low, "q3": high}


def text_of(row):
    of = summary(row)
    mark = "" if row["method"] == "graph" else " e"
    return f"{micros(of['median'])}{mark} ({micros(of['q3'] - of['q1'])})"


def cells_of(timings):
    """The rows of each comparison, by the name of what was measured."""
    cells = {}
    for row in timings:
        key = tuple(row["shape"]), row["dtype"], row["pass"], row["mode"]
        cells.setdefault(key, {}).setdefault(row["stage"], {})[row["name"]] = row
    return cells


def share_of(rows):
    """Of a copy's rate, at which ours moves what it has to."""
    ours, copy = (summary(rows[name])["median"] for name in ("ours", "copy"))
    return MOVED[rows["ours"]["pass"]] / 2 * copy / ours


def anchor(stages, name):
    for rows in stages.values():
        if name in rows and "ours" in rows:
            ratio = summary(rows[name])["median"] / summary(rows["ours"])["median"]
            return f"{text_of(rows[name])} {ratio:.2f}×"
    return "–"


def timing_tables(timings):
    cells, text = cells_of(timings), ""
    for dtype, direction, mode in dict.fromkeys(key[1:] for key in cells):
        lines = []
        for key, stages in cells.items():
            if key[1:] != (dtype, direction, mode):
                continue
            rows = next(iter(stages.values()))
            ours = rows["ours"]
            rate = MOVED[direction] * ours["bytes"] / summary(ours)["median"] / 1e6
            line = [list(key[0]), ours["plan"], text_of(ours), text_of(rows["copy"]), f"{rate:.2f}"]
            lines.append([*line, f"{share_of(rows):.0%}", *(anchor(stages, name) for name in ANCHORS)])
        head = [f"{dtype}, {direction}, {mode} L2", "plan", "ours", "copy", "TB/s", "share of copy", *ANCHORS]
        text += f"\n{table(head, lines)}"
    return text


def plan_table(timings):
    """The alternatives, the fastest first; none where only one plan was measured. The CSV has the warm ones too."""
    lines = []
    for (shape, dtype, direction, mode), stages in cells_of(timings).items():
        if mode != "cold":
            continue
        rows = {name: row for name, row in stages.get("eager", {}).items() if "plan" in row}
        if len(rows) < 2 or "ours" not in rows:
            continue
        chosen = summary(rows["ours"])["median"]
        for name, row in sorted(rows.items(), key=lambda item: summary(item[1])["median"]):
            line = [f"{list(shape)} {dtype}, {direction}, {mode}", row["plan"] + " (chosen)" * (name == "ours")]
            line += [text_of(row), f"{summary(row)['median'] / chosen:.2f}", row.get("registers", "–")]
            lines.append([*line, row.get("local_bytes", "–"), row.get("blocks_at_a_time", "–")])
    head = ["case", "plan", "µs", "of the chosen one's", "registers", "local bytes", "blocks at a time"]
    return f"\nPlans:\n\n{table(head, lines)}" if lines else ""


def worst(rows, quantity):
    errors = [row["errors"][quantity] for row in rows if quantity in row["errors"]]
    if not errors:
        return "–"
    return "NaN" if any(error != error for error in errors) else f"{max(errors):.1e}"


def check_table(checks):
    """The worst errors over shapes and plans, and what is wrong."""
    lines = []
    for key in dict.fromkeys((row["dtype"], row["offset"], row["who"]) for row in checks):
        rows = [row for row in checks if (row["dtype"], row["offset"], row["who"]) == key]
        lines.append([f"{key[0]}, offset {key[1]:g}", key[2], len(rows), *(worst(rows, name) for name in QUANTITIES)])
    text = f"\nErrors:\n\n{table(['case', 'who', 'runs', *QUANTITIES], lines)}" if lines else ""
    return text + "".join(f"- {problems_of(row)}\n" for row in checks if row["problems"])


def problems_of(row):
    where = f"{row['who']}, {row['shape']} {row['dtype']} {row['pass']}, offset {row['offset']:g}"
    return f"{where}, {row['plan'] or 'eager'}: {'; '.join(row['problems'])}"


def failures(checks):
    return [row for row in checks if row["who"] == "ours" and row["problems"]]


def markdown(data):
    text = "# Batch norm on a GPU: this crate and PyTorch\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in data["machine"].items())
    text += f"\n{NOTES}{check_table(data['checks'])}"
    if data["timings"]:
        text += timing_tables(data["timings"]) + plan_table(data["timings"])
    if data["errors"]:
        text += "\nNot measured:\n\n" + "".join(f"- {error}\n" for error in data["errors"])
    ours = [row for row in data["checks"] if row["who"] == "ours"]
    return text + f"\n{len(ours)} checks of ours, of which {len(failures(data['checks']))} failed.\n"


def write(data, out):
    """Writes gpu_bench.json, gpu_times.csv, gpu_errors.csv and gpu_bench.md, and returns the last one's text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_bench.json").write_text(json.dumps(data, indent=1, ensure_ascii=False))
    with open(out / "gpu_times.csv", "w", newline="") as file:
        writer = csv.writer(file)
        head = ["shape", "dtype", "pass", "stage", "mode", "name", "plan", "method", "runs", "bytes"]
        writer.writerow([*head, "reps", "median_us", "q1_us", "q3_us"])
        for row in data["timings"]:
            writer.writerow([*(row.get(name, "") for name in head), len(row["us"]), *summary(row).values()])
    with open(out / "gpu_errors.csv", "w", newline="") as file:
        writer = csv.writer(file)
        head = ["shape", "dtype", "pass", "offset", "who", "plan"]
        writer.writerow([*head, *QUANTITIES, "problems"])
        for row in data["checks"]:
            errors = (row["errors"].get(name, "") for name in QUANTITIES)
            writer.writerow([*(row[name] for name in head), *errors, "; ".join(row["problems"])])
    text = markdown(data)
    (out / "gpu_bench.md").write_text(text)
    return text
