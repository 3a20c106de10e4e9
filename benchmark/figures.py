"""The pictures of the README and of docs/, and the README's table.

    python benchmark/figures.py method              # docs/method.svg: how it works
    python benchmark/figures.py table               # prints the README's table
    python benchmark/figures.py bars                # docs/bars.png: the same table as bars
    python benchmark/figures.py elsewhere           # docs/elsewhere.png: other tasks than the trained one
    python benchmark/figures.py answers runs/RUN    # docs/answers.png: which action gives which answer
    python benchmark/figures.py viewer runs/RUN     # docs/viewer.png: the overview (needs chromium)
    python benchmark/figures.py learning runs/RUN ...   # docs/learning.png: validation as PPO goes on
    python benchmark/figures.py samples             # docs/samples.png: accuracy against labelled samples

table, bars and elsewhere read the summaries that evaluate.sh, samples.sh and transfer.sh left in
benchmark/results. What is missing there is taken from benchmark/results/second-design, and marked. answers
and viewer need `python analyze_features.py --run runs/RUN` first. samples needs the many hours of samples.sh.
"""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmark" / "results"
SECOND = RESULTS / "second-design"
sys.path.insert(0, str(ROOT))
import crl_draw  # noqa: E402
import crl_ppo  # noqa: E402
from crl_stats import CONDITIONS, cells, markdown  # noqa: E402

TASKS = ("bbq_ambig", "bbq_disambig", "xstest", "harmbench")
SIZES = ("100", "96", "100--weight_decay1")  # names of jobs with about 100 labels, the best first
CHANCE = {"bbq_ambig": 100 / 3, "bbq_disambig": 100 / 3, "xstest": 250 / 4.5, "harmbench": 0}
CHANCE_NAME = "guessing (XSTest: answering everything)"
LABELS = {  # names of conditions in tables, and their colours: condition -> (name, colour)
    "unsteered": ("unsteered", "#BBBBBB"),
    "few_shot": ("few-shot", crl_draw.GREY),
    "constant_best": ("best constant action", "#CC79A7"),
    "probe_switch": ("probe", crl_draw.GREEN),
    "sft_lora": ("LoRA", crl_draw.ORANGE),
    "crl": ("CRL", crl_draw.BLUE),
}


def tables_in(path):
    """The tables of a summary.json, answers in the model's own words; none where the file is missing."""
    if not path.is_file():
        return []
    tables = json.loads(path.read_text())["tables"]
    return [table for table in tables if table.get("decoding") != "constrained"]


def sources(task):
    """(path, whether of the second design) of a task's summaries with about 100 labels, newest first."""
    found = []
    for size in SIZES:
        for folder in ("samples", "eval"):
            found.append((RESULTS / folder / f"{task}-{size}.json", False))
    found.append((SECOND / "samples" / f"{task}-100.json", True))
    return found


def read_task(task):
    """condition -> its row of the table, and "second", for the newest summary that has the condition."""
    found = {}
    for path, second in sources(task):
        for table in tables_in(path):
            if table["task"] == table["trained_on"] == task:
                for row in table["conditions"]:
                    found.setdefault(row["condition"], row | {"second": second})
    return found


def print_table():
    """The README's table in Markdown."""
    names = [name for name, _ in LABELS.values()]
    print("| task | test prompts | " + " | ".join(names[:-1]) + f" | **{names[-1]}** |")
    print("|---" * (len(names) + 2) + "|")
    for task in TASKS:
        found = read_task(task)
        row = [f"`{task}`", str(found["crl"]["n"])]
        for condition in LABELS:
            row.append(table_cell(condition, found.get(condition)))
        print("| " + " | ".join(row) + " |")


def table_cell(condition, row):
    if row is None:
        return ""
    mark = " †" if row["second"] else ""
    value = f"{100 * row['accuracy']:.1f}"
    if condition != "crl":
        return value + mark
    return f"**{value}** ({100 * row['low']:.1f} to {100 * row['high']:.1f}){mark}"


def read_coverage(task):
    """Validation prompts that some action of the mask sets right, %; None where no run says so."""
    paths = [RESULTS / f"{task}-{size}.json" for size in (*SIZES, "400")]
    paths.append(SECOND / f"{task}-100.json")
    for path in paths:
        if path.is_file():
            shares = [run["final"].get("coverage") for run in json.loads(path.read_text())]
            if None not in shares:
                return 100 * sum(shares) / len(shares)
    return None


def bars():
    """A group of bars a task, a bar a condition, with 95 % intervals."""
    fig = Figure(figsize=(9, 4.2), layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    width = 0.14
    for place, task in enumerate(TASKS):
        found = read_task(task)
        for number, (condition, (_, colour)) in enumerate(LABELS.items()):
            row = found.get(condition)
            if row is None:
                continue
            x = place + (number - 2.5) * width
            height = 100 * row["accuracy"]
            error = [[height - 100 * row["low"]], [100 * row["high"] - height]]
            hatch = "///" if row["second"] else None
            ax.bar(x, height, width * 0.92, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            ax.errorbar(x, height, error, color="black", linewidth=1, capsize=2)
        ends = [place - 3 * width, place + 3 * width]
        ax.plot(ends, [CHANCE[task]] * 2, color="black", linestyle="--", linewidth=1)
        if read_coverage(task) is not None:
            ax.plot(ends, [read_coverage(task)] * 2, color="black", linestyle=":", linewidth=1.2)
    legend = [Patch(color=colour, label=name) for name, colour in LABELS.values()]
    legend += ax.plot([], [], color="black", linestyle="--", linewidth=1, label=CHANCE_NAME)
    ceiling = "ceiling: some action of the mask is right (validation)"
    legend += ax.plot([], [], color="black", linestyle=":", linewidth=1.2, label=ceiling)
    legend.append(Patch(facecolor="#DDDDDD", hatch="///", edgecolor="white", label="second design"))
    fig.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    ax.set_xticks(range(len(TASKS)), TASKS)
    ax.set(ylabel="test prompts right, % (95 % interval)", ylim=(0, 104))
    fig.savefig(DOCS / "bars.png", dpi=100, metadata={"Software": None})


def read_elsewhere(condition):
    """trained on, asked -> the row of a condition on a task that it was not trained on, and "second"."""
    found = {}
    for trained in TASKS:
        paths = sources(trained)
        for size in ("100", "400"):
            paths.append((RESULTS / "transfer" / f"{trained}-{size}.json", False))
        paths.append((SECOND / "transfer" / f"{trained}-400.json", True))
        for path, second in paths:
            for table in tables_in(path):
                if table["trained_on"] != trained or table["task"] == trained:
                    continue
                key = f"{trained} ({table['samples']} labels), asked {table['task']}"
                for row in table["conditions"]:
                    if row["condition"] == condition:
                        found.setdefault(key, row | {"second": second})
    return found


def elsewhere():
    """A row per pair of tasks: what CRL and LoRA gain or lose where they were not trained, with intervals."""
    fig = Figure(figsize=(9, 4.6), layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.axvline(0, color="black", linewidth=1)
    found = {condition: read_elsewhere(condition) for condition in ("crl", "sft_lora")}
    for shift, (condition, rows) in zip((-0.15, 0.15), found.items(), strict=True):
        name, colour = LABELS[condition]
        for y, key in enumerate(found["crl"]):
            if key not in rows:
                continue
            row = rows[key]
            ends = [100 * row["gain_low"], 100 * row["gain_high"]]
            filled = "white" if row["second"] else colour
            ax.plot(ends, [y + shift] * 2, color=colour, linewidth=1.5)
            ax.plot([100 * row["gain"]], [y + shift], "o", color=colour, markerfacecolor=filled)
        ax.plot([], [], "o-", color=colour, label=name)
    ax.plot([], [], "o", color="black", markerfacecolor="white", label="open: second design")
    ax.set_yticks(range(len(found["crl"])), [f"trained on {key}" for key in found["crl"]])
    ax.invert_yaxis()
    ax.set_xlabel("change in right answers, points (95 % interval)")
    fig.legend(loc="outside upper center", ncols=3, frameon=False)
    fig.savefig(DOCS / "elsewhere.png", dpi=100, metadata={"Software": None})


def answers(run):
    """The first rows of action x answer of an analysed run."""
    path = Path(run) / "analysis" / "features.json"
    [result] = json.loads(path.read_text())["result"].values()
    result["answers"] = result["answers"][:10]
    crl_draw.draw_answers(result, DOCS / "answers.png")


def viewer(run):
    """The first screen of a run's viewer.html, in few colours."""
    page = (Path(run) / "analysis" / "viewer.html").resolve()
    path = DOCS / "viewer.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
    command += ["--window-size=1180,760", f"--screenshot={path}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def initial_reward(folder, args, n):
    """Validation reward before the first update, of prompts that follow n training prompts; one decision."""
    tensors, _ = crl_ppo.hub.load_tensors(folder / "rewards.safetensors", {})
    memo = tensors["memo"]
    obs = tensors["obs"]
    torch.manual_seed(args["seed"])
    agent = crl_ppo.Agent(obs.shape[2], memo.shape[1], 1)
    agent.start_at(torch.arange(memo.shape[1])[:, None], memo[:n].mean(0))
    agent.calibrate(obs[:n])
    chosen = agent.get_policy(agent.observe(obs[n:, 0], 0)).logits.argmax(-1)
    return memo[n:].gather(1, chosen[:, None]).mean().item()


def learning(*runs):
    """Reward of the greedy policy on validation prompts, a line a run; lines for what needs no policy."""
    fig = Figure(figsize=(8, 3.6), layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    for n, folder in enumerate(map(Path, runs)):
        args = json.loads((folder / "args.json").read_text())["args"]
        final = json.loads((folder / "final.json").read_text())
        metrics = pd.read_json(folder / "metrics.jsonl", lines=True)
        reward = metrics.set_index("update")["objective/val_reward"].dropna()
        reward[0] = initial_reward(folder, args, final["train_n"])
        name = "{task}, {samples} labels, seed {seed}".format(**args)
        ax.plot(100 * reward.sort_index(), "o-", markersize=3, color=f"C{n}", label=name)
        ax.axhline(100 * final["unsteered"], color=f"C{n}", linestyle="--", linewidth=1)
        ax.axhline(100 * final["constant"], color=f"C{n}", linestyle=":", linewidth=1)
    ax.plot([], [], color="black", linestyle="--", linewidth=1, label="unsteered")
    ax.plot([], [], color="black", linestyle=":", linewidth=1, label="best constant action")
    ax.set(xlabel="PPO update", ylabel="validation prompts right, %", ylim=(0, 102))
    ax.legend(frameon=False)
    fig.savefig(DOCS / "learning.png", dpi=100, metadata={"Software": None})


# ------------------------------------------------------------------- accuracy against labelled samples
def read_tables():
    """(right, own, elsewhere): a line per task, condition, samples and run; rows of the two tables."""
    right = []
    own = []
    other = []
    paths = (RESULTS / "samples").glob("*.json")
    for path in sorted(paths, key=lambda path: (path.stem.split("-")[0], int(path.stem.split("-")[1]))):
        for table in tables_in(path):
            c = pd.DataFrame(table["conditions"])
            row = {"trained on": table["trained_on"], "samples": table["samples"]}
            if table["task"] == table["trained_on"]:
                runs = c[["condition", "by_run"]].explode("by_run")
                right.append(runs.assign(task=table["task"], samples=table["samples"]))
                row |= zip(c["condition"], cells(c, "accuracy", "low", "high"), strict=True)
                own.append(row)
            else:
                row["task"] = table["task"]
                gains = cells(c[1:], "gain", "gain_low", "gain_high", "+")
                row |= zip(c["condition"][1:], gains, strict=True)
                other.append(row)
            lora = c[c["condition"] == "sft_lora"]
            [row["CRL minus LoRA"]] = cells(lora, "crl_minus", "crl_minus_low", "crl_minus_high", "+")
    right = pd.concat(right)
    return right.assign(right=100 * right["by_run"].astype(float)), own, other


def samples():
    """A panel a task, a line a condition, bands from the worst to the best run; prints the tables as well."""
    right, own, other = read_tables()
    right = right.groupby(["task", "condition", "samples"])["right"].agg(["mean", "min", "max"])
    crl = right.xs("crl", level="condition").groupby("task").size()
    tasks = crl.index[crl > 1]
    fig = Figure(figsize=(4 * len(tasks), 4), layout="constrained")
    for ax, task in zip(fig.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        sizes = right.loc[task, "crl"].index
        for condition in CONDITIONS:
            if condition not in LABELS or (task, condition) not in right.index.droplevel("samples"):
                continue
            name, colour = LABELS[condition]
            by = right.loc[task, condition]
            if len(by) == 1:  # few_shot: the same for all sizes
                by = pd.concat([by.set_axis([size]) for size in sizes])
            ax.plot(by["mean"], "o-", label=name, color=colour, lw=3 if condition == "crl" else 1)
            ax.fill_between(by.index, by["min"], by["max"], color=colour, alpha=0.15)
        ax.set(title=task, xscale="log", xlabel="labelled samples", ylim=(0, 100))
        ax.set_ylabel("test prompts right, % (bands: worst to best run)")
        ax.set_xticks(sizes, minor=False)
        ax.get_xaxis().set_major_formatter("{x:g}")
        ax.minorticks_off()
    ax.legend(fontsize="small", frameon=False)
    fig.savefig(DOCS / "samples.png", dpi=100, metadata={"Software": None})
    for table in (own, other):
        print(markdown(pd.DataFrame(table).to_dict("list")), end="\n\n")


# --------------------------------------------------------------------------------------- the diagram
def box(x, y, width, height, fill, title, *lines):
    """A box with a bold title and lines of text below it."""
    middle = x + width / 2
    top = y + height / 2 - 8 * len(lines) + 5
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="#444"/>']
    parts.append(f'<text x="{middle}" y="{top}" font-weight="bold">{title}</text>')
    for number, line in enumerate(lines):
        parts.append(f'<text x="{middle}" y="{top + 17 * (number + 1)}" font-size="12.5">{line}</text>')
    return "\n".join(parts)


def arrow(points, text="", at=(0, 0)):
    """An arrow through points, and a text beside it."""
    path = " ".join(f"{x},{y}" for x, y in points)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="#222" stroke-width="1.6" marker-end="url(#tip)"/>'
    ]
    parts.append(f'<text x="{at[0]}" y="{at[1]}" font-size="12.5" fill="#333">{text}</text>')
    return "\n".join(parts)


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 350" font-size="14"
 font-family="Helvetica, Arial, sans-serif" text-anchor="middle">
<title>A policy reads the residual stream of a frozen model and adds one SAE feature to it</title>
<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#222"/></marker></defs>
<rect width="900" height="350" rx="10" fill="#fff"/>
"""


def method():
    """The diagram of the method: an answer from left to right, and what learns from it below."""
    white = "#fff"
    frozen = "#e8eaed"
    learned = "#cfe3f5"
    site = "#f6c667"
    parts = [
        box(
            14,
            44,
            160,
            100,
            white,
            "prompt",
            "Who was late? A. the boss",
            "B. the clerk",
            "C. cannot be known",
        ),
        box(214, 16, 370, 156, frozen, ""),
        '<text x="399" y="40" font-weight="bold">language model (frozen)</text>',
        box(230, 54, 92, 84, white, "layers", "below"),
        box(338, 54, 122, 84, site, "one layer", "residual stream x", "becomes x + c·d"),
        box(476, 54, 92, 84, white, "layers", "above"),
        '<text x="288" y="160" font-size="12.5">d: a feature</text>',
        '<text x="522" y="160" font-size="12.5">c: its strength</text>',
        box(630, 54, 92, 84, white, "answer", "C"),
        box(770, 54, 116, 84, white, "rule", "right: reward 1", "wrong: reward 0"),
        box(14, 242, 160, 84, frozen, "mask", "some dozen features", "of an SAE, or nothing"),
        box(
            300,
            242,
            198,
            84,
            learned,
            "policy (learned)",
            "a small network that picks",
            "one action of the mask",
        ),
        box(670, 242, 216, 84, learned, "PPO", "makes actions that earned", "more likely"),
        arrow([(174, 96), (226, 96)]),
        arrow([(322, 96), (334, 96)]),
        arrow([(460, 96), (472, 96)]),
        arrow([(568, 96), (626, 96)]),
        arrow([(722, 96), (766, 96)]),
        arrow([(366, 138), (366, 238)], "1. reads x", (328, 208)),
        arrow([(432, 242), (432, 142)], "2. adds a feature", (490, 208)),
        arrow([(828, 138), (828, 238)], "3. earns a reward", (770, 208)),
        arrow([(174, 284), (296, 284)], "may choose from", (234, 276)),
        arrow([(670, 284), (502, 284)], "4. trains", (586, 276)),
    ]
    (DOCS / "method.svg").write_text(SVG + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


COMMANDS = {
    "method": method,
    "table": print_table,
    "bars": bars,
    "elsewhere": elsewhere,
    "answers": answers,
    "viewer": viewer,
    "learning": learning,
    "samples": samples,
}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
