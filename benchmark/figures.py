"""The figures of the README, and the numbers behind the second as a table.

    python benchmark/figures.py learning runs/learn/bbq_ambig-400 ...   # docs/learning.png
    python benchmark/figures.py samples                                 # docs/samples.png

learning: reward of the greedy policy on the validation prompts over PPO's updates, all runs of some jobs.
samples: accuracy on the test prompts against labelled samples, a panel a task, a line a condition, bands from the worst
to the best run; from benchmark/results/samples/TASK-N.json, which samples.sh leaves there. Prints the samples that each
condition needs for 90 % of the gain that it has at its best.
"""
import json
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent


def learning(*folders):
    fig = Figure(figsize=(8, 4), layout="constrained")
    ax = fig.subplots()
    for n, folder in enumerate(map(Path, folders)):
        for run in sorted(p.parent for p in folder.glob("*/final.json")):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            points = [(m["update"], 100 * m["objective/val_reward"]) for m in lines if "objective/val_reward" in m]
            start = 100 * json.loads((run / "final.json").read_text())["unsteered"]
            ax.plot(*zip((0, start), *points), color=f"C{n}", alpha=0.7)
        ax.plot([], [], color=f"C{n}", label=folder.name)
    ax.set(xlabel="PPO update", ylabel="validation prompts right, %", ylim=(0, 100))
    ax.legend()
    fig.savefig(ROOT / "docs" / "learning.png", dpi=100)


def samples():
    rows = []  # task, samples, condition, right (%) of every run
    for path in sorted((ROOT / "benchmark" / "results" / "samples").glob("*.json")):
        for t in json.loads(path.read_text())["tables"]:
            if path.stem == f"{t['task']}-{t['samples']}" and t["decoding"] == "free":  # on the trained task
                rows += [(t["task"], t["samples"], c["condition"], 100 * right)
                         for c in t["conditions"] for right in c["by_run"]]
    frame = pd.DataFrame(rows, columns=["task", "samples", "condition", "right"])
    tasks = [task for task, part in frame.groupby("task") if part["samples"].nunique() > 1]
    fig, needed = Figure(figsize=(4 * len(tasks), 4), layout="constrained"), {}
    for ax, task in zip(fig.subplots(1, len(tasks), squeeze=False)[0], tasks):
        sizes = sorted(frame.query("task == @task")["samples"].unique())
        for condition, part in frame[frame["task"] == task].groupby("condition", sort=False):
            by = part.groupby("samples")["right"].agg(["mean", "min", "max"])
            if len(by) == 1:  # few_shot: the same for all sizes
                by = pd.concat([by.set_axis([n]) for n in sizes])
            else:
                start = frame.query("task == @task and condition == 'unsteered'")["right"].mean()
                enough = by.index[by["mean"] - start >= 0.9 * (by["mean"].max() - start)]
                needed.setdefault(condition, {})[task] = int(enough.min())
            ax.plot(by.index, by["mean"], "o-", label=condition)
            ax.fill_between(by.index, by["min"], by["max"], alpha=0.15)
        ax.set(title=task, xscale="log", xlabel="labelled samples", ylabel="test prompts right, %", ylim=(0, 100))
        ax.set_xticks(sizes, minor=False)
        ax.get_xaxis().set_major_formatter("{x:g}")
        ax.minorticks_off()
    ax.legend(fontsize="small")
    fig.savefig(ROOT / "docs" / "samples.png", dpi=100)
    print(pd.DataFrame(needed).T.to_string())


if __name__ == "__main__":
    {"learning": learning, "samples": samples}[sys.argv[1]](*sys.argv[2:])
