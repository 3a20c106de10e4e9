"""The figures of the README, and the numbers behind the second as a table.

    python benchmark/figures.py learning runs/learn/bbq_ambig-400 ...   # docs/learning.png
    python benchmark/figures.py samples                                 # docs/samples.png

learning: reward of the greedy policy on the validation prompts over PPO's updates, all runs of some jobs.
samples: accuracy on the test prompts against labelled samples, a panel a task, a line a condition, bands from the worst
to the best run; from benchmark/results/samples/TASK-N.json, which samples.sh leaves there. Prints three tables: the
accuracy, what is gained or lost on other tasks, and the samples that each condition needs for 90 % of its best gain.
"""
import json
import statistics
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from crl_stats import CONDITIONS, cells, markdown  # noqa: E402


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
    right, own, elsewhere, needed = {}, [], [], {}  # right: {(task, condition): {samples: % right of every run}}
    paths = (ROOT / "benchmark" / "results" / "samples").glob("*.json")
    for path in sorted(paths, key=lambda path: (path.stem.split("-")[0], int(path.stem.split("-")[1]))):
        for t in (t for t in json.loads(path.read_text())["tables"] if t["decoding"] == "free"):
            c = pd.DataFrame(t["conditions"]).set_index("condition", drop=False)
            row, lora = {"trained on": t["trained_on"], "samples": t["samples"]}, c.loc[["sft_lora"]]
            if t["task"] == t["trained_on"]:
                for name, by_run in c["by_run"].items():
                    right.setdefault((t["task"], name), {})[t["samples"]] = [100 * share for share in by_run]
                row |= dict(zip(c["condition"], cells(c, "accuracy", "low", "high")))
                own.append(row)
            else:
                row["task"] = t["task"]
                row |= dict(zip(c["condition"][1:], cells(c[1:], "gain", "gain_low", "gain_high", "+")))
                elsewhere.append(row)
            row["CRL minus LoRA"], = cells(lora, "crl_minus", "crl_minus_low", "crl_minus_high", "+")
            row["p, prompts"], row["p, runs"] = lora[["p_prompts", "p_runs"]].astype(float).iloc[0]
    tasks = [task for task, name in right if name == "crl" and len(right[task, name]) > 1]
    names = [name for name in CONDITIONS if any(of == name for _, of in right)]
    fig = Figure(figsize=(4 * len(tasks), 4), layout="constrained")
    for ax, task in zip(fig.subplots(1, len(tasks), squeeze=False)[0], tasks):
        sizes = sorted(right[task, "crl"])
        for n, name in ((n, name) for n, name in enumerate(names) if (task, name) in right):
            by = pd.Series(right[task, name]).explode().astype(float).groupby(level=0).agg(["mean", "min", "max"])
            if len(by) == 1:  # few_shot: the same for all sizes
                by = pd.concat([by.set_axis([size]) for size in sizes])
            elif name != "unsteered":
                gain = by["mean"] - by.index.map(lambda size: statistics.mean(right[task, "unsteered"][size]))
                enough = gain.index[(gain > 0) & (gain >= 0.9 * gain.max())]
                needed.setdefault(name, {"condition": name})[task] = int(enough.min()) if len(enough) else None
            ax.plot(by.index, by["mean"], "o-", label=name, color=f"C{n}", lw=3 if name == "crl" else 1)
            ax.fill_between(by.index, by["min"], by["max"], color=f"C{n}", alpha=0.15)
        ax.set(title=task, xscale="log", xlabel="labelled samples", ylabel="test prompts right, %", ylim=(0, 100))
        ax.set_xticks(sizes, minor=False)
        ax.get_xaxis().set_major_formatter("{x:g}")
        ax.minorticks_off()
    ax.legend(fontsize="small")
    fig.savefig(ROOT / "docs" / "samples.png", dpi=100)
    for table in (own, elsewhere, list(needed.values())):
        print(markdown(pd.DataFrame(table).to_dict("list")), end="\n\n")


if __name__ == "__main__":
    {"learning": learning, "samples": samples}[sys.argv[1]](*sys.argv[2:])
