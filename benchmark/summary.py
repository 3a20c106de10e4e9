"""Table of finished runs, and the figures behind it as one small JSON file a job in benchmark/results.

python benchmark/summary.py runs/learn/*      # a row per folder of runs: mean ± standard deviation, in %
python benchmark/summary.py                   # the same table from benchmark/results, without the runs
"""

import json
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = "job | runs | samples | n (val) | unsteered | **CRL** | best constant action | coverage | valid"


def collect(folder):
    """The runs of a folder as rows: the flags that tell them apart, final.json, commit and dtype."""
    rows = []
    for path in Path(folder).glob("*/final.json"):
        record = json.loads((path.parent / "args.json").read_text())
        row = {key: record["args"][key] for key in ("task", "samples", "seed", "fold", "dtype")}
        rows.append(row | {"git": record["versions"]["git"], "final": json.loads(path.read_text())})
    return sorted(rows, key=lambda row: (row["seed"], row["fold"]))


def spread(values):
    """mean ± sample standard deviation, in per cent; "-" where a run has no such figure."""
    if None in values:
        return "-"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main(folders):
    for folder in folders:
        if rows := collect(folder):
            text = json.dumps(rows, indent=1) + "\n"
            (RESULTS / f"{Path(folder).name}.json").write_text(text)
    print(f"| {COLUMNS} | corrected / misguided | s |\n|{'---|' * 11}")
    for path in sorted(RESULTS.glob("*.json")):
        rows = json.loads(path.read_text())
        finals = [row["final"] for row in rows]
        runs = " ".join(f"{row['seed']}/fold {row['fold']}".removesuffix("/fold 0") for row in rows)
        cells = [path.stem, runs, finals[0]["train_n"], finals[0]["val_n"]]
        for key in ("unsteered", "steered", "constant", "coverage", "steered_valid"):
            cell = spread([final.get(key) for final in finals])
            cells.append(f"**{cell}**" if key == "steered" else cell)
        mean = {key: statistics.mean(f[key] for f in finals) for key in ("corrected", "misguided", "wall_s")}
        cells += [f"{mean['corrected']:.0f} / {mean['misguided']:.0f}", f"{mean['wall_s']:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
