"""report.md and conditions.png from the tables of crl_stats.summarise()."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

FEW = 6  # under so many groups, prompts or decisions nothing can be shown, and no figure is printed
TRAINED = ["model", "trained_on", "samples"]  # what names a section of the report
COLUMNS = ["condition", "n", "groups", "accuracy", "low", "high"]  # what gained() shows
COLUMNS += ["gain", "gain_low", "gain_high", "corrected", "misguided"]
HEAD = f"""# Evaluation

Percent of n test prompts, mean over runs and draws; 95 % intervals, clustered by the
groups of the split, XSTest's by its focus. "too few": fewer than {FEW} groups were
measured. Corrected, misguided: answers, against unsteered. No-op: share of the decisions
that leave the model alone.

CRL is better or worse where p over prompts and p over runs, after Holm's correction over
the table, are both under 0.05; else the verdict says which one fails. It is as good where
two one-sided tests show a difference of less than 5 points, over prompts and over runs,
after the same correction. Unit of p over runs: the fold (mean over its seeds; folds share
training prompts), within one fold the seed: runs of one fold share test prompts, so that
the test speaks about training noise only."""
AWAY = """Tasks that the runs were not trained on, without groups of prompts that they have
seen: `minus unsteered` is what is lost there."""
BIAS = """BBQ's bias score (Parrish et al. 2022), -100 to 100, positive where answers follow
the stereotype: before steering (unsteered) and after. Biased: of the answers that are not
"unknown"."""
NO_BIAS = "No bias score: these rows of BBQ do not say whom their options are about."


def cells(frame, name, low, high, sign=""):
    """Percent and interval of every row, "56.0 (51.1 to 60.8)".

    "-" where there is none, "too few" under FEW groups."""
    texts = []
    for groups, *values in frame[["groups", name, low, high]].to_numpy(float):
        percent = [format(round(100 * v, 1) + 0, f"{sign}.1f") for v in values]
        text = "{} ({} to {})".format(*percent)
        if groups < FEW:
            text = "too few"
        texts.append("-" if np.isnan(values[0]) else text)
    return texts


def markdown(columns):
    """A Markdown table of {header: column}; numbers to three digits, "-" for nothing."""

    def text(v):
        if v is None or v != v:
            return "-"
        if isinstance(v, float):
            return format(v, ".3g" if v < 1000 else ".0f")
        return str(v)

    rows = [columns, ["---"] * len(columns)]
    rows += zip(*columns.values(), strict=True)
    return "\n".join(f"| {' | '.join(map(text, row))} |" for row in rows)


def gained(c):
    """The columns that every table of conditions c begins with."""
    columns = {"condition": c["condition"], "n": c["n"]}
    columns["accuracy (Wilson)"] = cells(c, "accuracy", "low", "high")
    columns["minus unsteered"] = cells(c, "gain", "gain_low", "gain_high", "+")
    return columns | {"corrected": c["corrected"], "misguided": c["misguided"]}


def versus_crl(c):
    columns = {"no-op": 100 * c["noop"]}
    columns["CRL minus it"] = cells(c, "crl_minus", "crl_minus_low", "crl_minus_high", "+")
    return columns | {"verdict": c["verdict"]}


def by_kind(t):
    """Halves of a task under all conditions, smaller kinds under unsteered and CRL."""
    groups = pd.DataFrame(t["groups"]).reindex(columns=["half", "kind", *COLUMNS])
    shown = groups[groups["half"].eq(True) | groups["condition"].isin(("unsteered", "crl"))]
    return markdown({"kind": shown["kind"], **gained(shown)})


def bias_table(t):
    bias = pd.DataFrame(t["bias"])
    bias = bias.sort_values("context", kind="stable")  # conditions keep their order
    columns = {"context": bias["context"], "condition": bias["condition"]}
    columns |= {"answers": bias["n"], "right": bias["right"]}
    columns |= {"not unknown": bias["not_unknown"], "biased": bias["biased"]}
    score = (100 * bias["score"]).round(1) + 0.0  # no -0.0
    score = score.map("{:.1f}".format)
    columns["bias score"] = score.where(bias["n"] >= FEW, "too few")
    return markdown(columns)


def own_section(t):
    """The task that the runs were trained on."""
    c = t["conditions"]
    columns = gained(c) | versus_crl(c)
    by_run = []
    for values in c["by_run"]:
        by_run.append(", ".join(f"{100 * v:.1f}" for v in values))
    by_run = pd.Series(by_run, c.index)
    columns["by run"] = by_run.where(c["groups"] >= FEW, "too few")
    columns["invalid"] = 100 * c["invalid"]
    columns |= {"p prompts": c["p_prompts"], "p runs": c["p_runs"]}
    columns["p as good: prompts"] = c["p_equal_prompts"]
    columns["p as good: runs"] = c["p_equal_runs"]
    columns["unit"] = c["unit"]
    title = "## {task}: {model}, {samples} prompts of {trained_on}, {runs} run(s)"
    text = [title.format(**t), markdown(columns)]
    if t["groups"]:
        text.append(by_kind(t))
    if t["bias"]:
        text += [BIAS, bias_table(t)]
    elif t["task"].startswith("bbq"):
        text.append(NO_BIAS)
    return text


def away_section(away):
    """One table of all tasks that the runs were not trained on."""
    tasks = [t["conditions"].assign(task=t["task"]) for t in away]
    tasks = pd.concat(tasks, ignore_index=True)
    title = "## Off the task: {model}, {samples} prompts of {trained_on}, {runs} run(s)"
    columns = {"task": tasks["task"]} | gained(tasks) | versus_crl(tasks)
    return [title.format(**away[0]), AWAY, markdown(columns)]


def report(tables):
    """report.md: per model and number of samples the trained task, then all others."""
    sections = {}
    for t in tables:
        sections.setdefault(tuple(t[key] for key in TRAINED), []).append(t)
    text = [HEAD]
    for section in sections.values():
        for t in section:
            if t["task"] == t["trained_on"]:
                text += own_section(t)
        away = [t for t in section if t["task"] != t["trained_on"]]
        if away:
            text += away_section(away)
    return "\n\n".join(text) + "\n"


def plot(tables, path):
    """A panel per trained task: accuracy there against the gain on the other tasks.

    That is the mean over them, with their intervals combined as independent ones.
    Without other tasks the height is the place in the table."""
    homes = [t for t in tables if t["task"] == t["trained_on"]] or tables[:1]
    fig = Figure(figsize=(7 * len(homes), 5), layout="tight")
    axes = fig.subplots(1, len(homes), squeeze=False)[0]
    for ax, home in zip(axes, homes, strict=True):
        c = home["conditions"].set_index("condition")
        c["y"] = -np.arange(len(c))
        c["half"] = 0.0
        away = []
        for t in tables:
            if t["task"] != home["task"] and all(t[key] == home[key] for key in TRAINED):
                away.append(t["conditions"])
        if away:
            others = pd.concat(away)
            others["square"] = (others["gain_high"] - others["gain_low"]) ** 2 / 4
            others = others.groupby("condition")
            c["y"] = 100 * others["gain"].mean()
            c["half"] = 100 * others["square"].sum() ** 0.5 / others.size()
            c.loc[c.index == "unsteered", "y"] = 0.0
        width = 100 * (c[["low", "high"]].T - c["accuracy"]).abs()
        ax.errorbar(100 * c["accuracy"], c["y"], c["half"], width, "o")
        for name, point in c.dropna(subset="y").iterrows():
            at = (100 * point["accuracy"], point["y"])
            ax.annotate(name, at, (4, 4), textcoords="offset points")
        ax.set_title(f"{home['trained_on']}, {home['samples']} samples")
        ax.set_xlabel("right on the trained task, % (Wilson 95 %)")
        ax.set_ylabel("change on the other tasks, points (95 %)" if away else "")
    fig.savefig(path, dpi=100, metadata={"Software": None})
