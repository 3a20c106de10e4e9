"""Table of finished runs: mean and standard deviation over seeds, read from each run's args.json and final.json.

    python benchmark/summary.py runs/learn/*      # one row per folder of runs; Markdown
"""
import json
import statistics
import sys
from pathlib import Path


def spread(values):
    """mean +- sample standard deviation, in per cent"""
    values = [100 * v for v in values]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main(folders):
    if not folders:
        raise SystemExit("summary.py: name the folders that hold runs, e.g. runs/learn/*")
    print("| runs | seeds | samples | n (val) | unsteered | **CRL** | best constant feature | unsteered, letters "
          "| CRL, letters | invalid, before -> after | corrected / misguided | minutes |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for folder in folders:
        runs = sorted(f.parent for f in Path(folder).glob("*/final.json"))
        if not runs:
            continue
        finals = [json.loads((r / "final.json").read_text()) for r in runs]
        args = [json.loads((r / "args.json").read_text())["args"] for r in runs]

        def column(key):
            return [f[key] for f in finals]
        invalid = [f"{100 * statistics.mean(column(key)):.1f}" for key in ("unsteered_invalid", "steered_invalid")]
        seeds = " ".join(str(a["seed"]) + (f" (fold {a['fold']})" if a.get("fold") else "") for a in args)
        print(f"| {Path(folder).name} | {seeds} | {finals[0]['train_n']} | {finals[0]['val_n']} "
              f"| {spread(column('unsteered'))} | **{spread(column('steered'))}** | {spread(column('constant'))} "
              f"| {spread(column('unsteered_constrained'))} | {spread(column('steered_constrained'))} "
              f"| {invalid[0]} -> {invalid[1]} "
              f"| {statistics.mean(column('corrected')):.0f} / {statistics.mean(column('misguided')):.0f} "
              f"| {statistics.mean(column('wall_s')) / 60:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
