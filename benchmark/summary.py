"""Table of finished runs, and the figures behind it as one small JSON file a job in benchmark/results.

    python benchmark/summary.py runs/learn/*      # a row per folder of runs, Markdown: mean +- standard deviation, in %
    python benchmark/summary.py                   # the same table from benchmark/results, without the runs
"""
import json
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
KEEP = ("task", "samples", "seed", "fold")


def collect(folder):
    """The runs of a folder as rows: the flags that tell them apart, final.json, commit and dtype."""
    rows = []
    for final in sorted(Path(folder).glob("*/final.json")):
        record = json.loads((final.parent / "args.json").read_text())
        rows.append({key: record["args"][key] for key in KEEP} | {"dtype": record["args"]["dtype"],
                    "git": record["versions"]["git"], "final": json.loads(final.read_text())})
    return sorted(rows, key=lambda r: (r["seed"], r["fold"]))


def spread(values):
    """mean +- sample standard deviation, in per cent; "no table" where runs have none to count from."""
    if None in values:
        return "no table"
    values = [100 * v for v in values]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main(folders):
    for folder in folders:
        if rows := collect(folder):
            (RESULTS / f"{Path(folder).name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("| job | runs | samples | n (val) | unsteered | **CRL** | best constant push | coverage | valid | "
          "corrected / misguided | s |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for path in sorted(RESULTS.glob("*.json")):
        rows = json.loads(path.read_text())
        finals = [r["final"] for r in rows]
        runs = " ".join(f"{r['seed']}" + (f"/fold {r['fold']}" if r["fold"] else "") for r in rows)
        keys = ("unsteered", "steered", "constant", "coverage", "steered_valid")
        for f in finals:  # without a table nothing is known of constant pushes either
            f["constant"] = f["constant"] if f["coverage"] is not None else None
        cells = [spread([f[key] for f in finals]) for key in keys]
        counts = [f"{statistics.mean(f[key] for f in finals):.0f}" for key in ("corrected", "misguided", "wall_s")]
        print(f"| {path.stem} | {runs} | {finals[0]['train_n']} | {finals[0]['val_n']} | {cells[0]} | **{cells[1]}** | "
              f"{' | '.join(cells[2:])} | {counts[0]} / {counts[1]} | {counts[2]} |")


if __name__ == "__main__":
    main(sys.argv[1:])
