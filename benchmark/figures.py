"""docs/learning.png: reward of the greedy policy on the validation prompts over PPO's updates, all runs of some jobs.

    python benchmark/figures.py runs/learn/bbq_ambig-400 runs/learn/bbq_ambig-100 ...
"""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent


def main(folders):
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


if __name__ == "__main__":
    main(sys.argv[1:])
