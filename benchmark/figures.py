"""The figures of the README, and the numbers behind the second as a table.

    python benchmark/figures.py learning runs/learn/bbq_ambig-400 ...   # docs/learning.png
    python benchmark/figures.py samples                                 # docs/samples.png

learning: reward of the greedy policy on the validation prompts over PPO's updates, all runs of some jobs.
samples: accuracy on the test prompts against labelled samples, a panel a task, a line a condition, bands from
the worst to the best run; from benchmark/results/samples/TASK-N.json, which samples.sh leaves there. Prints
three tables: the accuracy, what is gained or lost on other tasks, and the samples that each condition needs
for 90 % of its best gain.
"""

import json
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
        for final in sorted(folder.glob("*/final.json")):
            metrics = pd.read_json(final.with_name("metrics.jsonl"), lines=True)
            reward = metrics.set_index("update")["objective/val_reward"].dropna()
            reward[0] = json.loads(final.read_text())["unsteered"]
            ax.plot(100 * reward.sort_index(), color=f"C{n}", alpha=0.7)
        ax.plot([], [], color=f"C{n}", label=folder.name)
    ax.set(xlabel="PPO update", ylabel="validation prompts right, %", ylim=(0, 100))
    ax.legend()
    fig.savefig(ROOT / "docs" / "learning.png", dpi=100)


def read_tables():
    """(right, own, elsewhere): a line per task, condition, samples and run; rows of the two tables."""
    right = []
    own = []
    elsewhere = []
    paths = (ROOT / "benchmark" / "results" / "samples").glob("*.json")
    for path in sorted(paths, key=lambda path: (path.stem.split("-")[0], int(path.stem.split("-")[1]))):
        for table in json.loads(path.read_text())["tables"]:
            c = pd.DataFrame(table["conditions"])
            row = {"trained on": table["trained_on"], "samples": table["samples"]}
            if table["task"] == table["trained_on"]:
                runs = c[["condition", "by_run"]].explode("by_run")
                right.append(runs.assign(task=table["task"], samples=table["samples"]))
                row |= zip(c["condition"], cells(c, "accuracy", "low", "high"), strict=True)
                own.append(row)
            else:
                row["task"] = table["task"]
                row |= zip(
                    c["condition"][1:], cells(c[1:], "gain", "gain_low", "gain_high", "+"), strict=True
                )
                elsewhere.append(row)
            lora = c[c["condition"] == "sft_lora"]
            [row["CRL minus LoRA"]] = cells(lora, "crl_minus", "crl_minus_low", "crl_minus_high", "+")
            row["p, prompts"], row["p, runs"] = lora[["p_prompts", "p_runs"]].astype(float).iloc[0]
    right = pd.concat(right)
    return right.assign(right=100 * right["by_run"].astype(float)), own, elsewhere


def samples():
    right, own, elsewhere = read_tables()
    right = right.groupby(["task", "condition", "samples"])["right"].agg(["mean", "min", "max"])
    crl = right.xs("crl", level="condition").groupby("task").size()
    tasks = crl.index[crl > 1]
    names = [name for name in CONDITIONS if name in right.index.get_level_values("condition")]
    needed = {name: {"condition": name} for name in names}
    fig = Figure(figsize=(4 * len(tasks), 4), layout="constrained")
    for ax, task in zip(fig.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        sizes = right.loc[task, "crl"].index
        for n, name in enumerate(names):
            if (task, name) not in right.index.droplevel("samples"):
                continue
            by = right.loc[task, name]
            if len(by) == 1:  # few_shot: the same for all sizes
                by = pd.concat([by.set_axis([size]) for size in sizes])
            elif name != "unsteered":
                gain = by["mean"] - right.loc[task, "unsteered"]["mean"]
                enough = gain.index[(gain > 0) & (gain >= 0.9 * gain.max())]
                needed[name][task] = int(enough.min()) if len(enough) else None
            ax.plot(by["mean"], "o-", label=name, color=f"C{n}", lw=3 if name == "crl" else 1)
            ax.fill_between(by.index, by["min"], by["max"], color=f"C{n}", alpha=0.15)
        ax.set(
            title=task, xscale="log", xlabel="labelled samples", ylabel="test prompts right, %", ylim=(0, 100)
        )
        ax.set_xticks(sizes, minor=False)
        ax.get_xaxis().set_major_formatter("{x:g}")
        ax.minorticks_off()
    ax.legend(fontsize="small")
    fig.savefig(ROOT / "docs" / "samples.png", dpi=100)
    for table in (own, elsewhere, [row for row in needed.values() if len(row) > 1]):
        print(markdown(pd.DataFrame(table).to_dict("list")), end="\n\n")


if __name__ == "__main__":
    {"learning": learning, "samples": samples}[sys.argv[1]](*sys.argv[2:])
