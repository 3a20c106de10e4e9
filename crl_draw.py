"""What analyze_features.py writes for people: report.md and a picture beside each table."""

import math
import re
import warnings
from urllib.parse import quote

import numpy as np
from markupsafe import escape
from matplotlib.figure import Figure

from crl_report import FEW, markdown

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#767676"  # told apart by the colour-blind
HEAD = """# What the policy does

Intervals are 95 %. Effects are differences of reward, paired by prompt. Features: vs_noop and vs_random are
measured where an action was picked; val and train are over all prompts with known rewards. A *letter switch*
is an action that gives one letter on at least 80 % of the prompts it was tried on. Permute: the share of
rotated prompts on which the option's text, or its letter, is that of the unrotated prompt. Map, held out:
constant is one direction for all, switch one per class of right decisions, ceiling one per class that the
probe tells, coverage some of a mask."""


def finite(value):
    """JSON has no NaN, no infinity and no numpy; six digits do for the rest."""
    if isinstance(value, dict):
        return {str(key): finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


# --- report ---
def cell(value):
    """A value of the report in one line that is harmless in Markdown tables and in HTML."""
    if isinstance(value, dict) and "ci" in value:
        middle = value.get("mean", value.get("auc"))
        few = "p" in value and value.get("n", FEW) < FEW
        value = "too few" if few else "{:.3g} ({:.3g} to {:.3g})".format(middle, *value["ci"])
    if isinstance(value, bool):
        value = "yes" if value else None
    if value is None:
        value = "-"
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return str(escape(" ".join(text.split())[:160])).replace("|", "&#124;").replace("`", "&#96;")


def table(rows):
    """A Markdown table of the first 30 of a list of dicts, without what is a list or dict of its own."""
    columns = []
    for column in rows[0]:
        values = [row[column] for row in rows]
        nested = any(isinstance(v, list) or isinstance(v, dict) and "ci" not in v for v in values)
        if not nested and column not in ("run", "id", "hash"):
            columns.append(column)
    found = {}
    for column in columns:
        found[column] = [cell(row[column]) for row in rows[:30]]
    return markdown(found)


def report(results, folder=None):
    """report.md: per command and run what is one value as a list, and lists of dicts as tables.

    folder: where the pictures are, COMMAND-RUN.png."""
    text = [HEAD]
    for name, runs in results.items():
        for run, result in runs.items():
            text.append(f"## {name}: {cell(run)}")
            ones = []
            tables = []
            for key, value in result.items():
                if isinstance(value, list) and value:
                    more = f", the first 30 of {len(value)}" if len(value) > 30 else ""
                    tables += [f"### {key}{more}", table(value)]
                elif not isinstance(value, list):
                    ones.append(f"- {key}: {cell(value)}")
            text.append("\n".join(ones))
            picture = picture_name(name, run)
            if folder and (folder / picture).is_file():
                text.append(f"![{name}]({quote(picture)})")
            text += tables
    return "\n\n".join(filter(None, text)) + "\n"


def picture_name(command, run):
    """The file of a picture; a run may be named by its task, file:PATH."""
    safe = re.sub(r"[^-.\w]", "_", run)
    return f"{command}-{safe}.png"


# --- pictures: (result of a command, path) ---
def short(name, size=44):
    """A name as matplotlib can write it: in one line, without control characters or mathematics."""
    text = "".join(c for c in " ".join(str(name).split()) if c.isprintable())
    text = text if len(text) <= size else text[: size - 1] + "…"
    return text.replace("$", r"\$")


def save(figure, path):
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def canvas(rows, width=9):
    figure = Figure(figsize=(width, 1.6 + 0.3 * rows), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def label_rows(ax, names):
    ax.set_yticks(range(len(names)), [short(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)


def draw_interval(ax, y, found, colour, marker, label):
    """A point with its interval, in percent."""
    low, high = found["ci"]
    ax.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=1.5)
    ax.plot([100 * found["mean"]], [y], marker, color=colour, label=label)


def draw_answers(result, path):
    """Which answer each action gives how often, %."""
    rows = result["answers"][:24]
    classes = [key for key in rows[0] if key in ("refusal", "other") or len(key) == 1]
    shares = np.zeros((len(rows), len(classes)))
    for y, row in enumerate(rows):
        shares[y] = [100 * row[key] for key in classes]
    figure, ax = canvas(len(rows), 5.5 + 0.6 * len(classes))
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    for y, x in np.ndindex(*shares.shape):
        if shares[y, x] >= 0.5:
            ax.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", fontsize=8)
    switch = {True: " (switch)", False: ""}
    label_rows(ax, [f"{short(row['action'], 34)}{switch[row['switch']]}" for row in rows])
    ax.set_xticks(range(len(classes)), classes)
    ax.set_title("What each action says, % of the prompts it was tried on", fontsize=10)
    save(figure, path)


def draw_permute(result, path):
    """What is kept when the options are rotated."""
    rows = result["answers"][:10]
    figure, ax = canvas(len(rows))
    for y, row in enumerate(rows):
        label = "" if y else "keeps the {}"
        draw_interval(ax, y - 0.14, row["keeps_content"], BLUE, "o", label.format("content"))
        draw_interval(ax, y + 0.14, row["keeps_letter"], ORANGE, "s", label.format("letter"))
    label_rows(ax, [row["action"] for row in rows])
    ax.set_xlim(-2, 102)
    ax.set_xlabel("% of rotated prompts, with 95 % interval")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2, frameon=False)
    save(figure, path)


def draw_branch(result, path):
    """How sure the right answer is with the chosen decision, and with another one."""
    rows = result["top"]
    figure, ax = canvas(len(rows))
    for y, row in enumerate(rows):
        shares = [100 * row["right"], 100 * row["instead_right"]]
        ax.plot(shares, [y, y], color=GREY, linewidth=1.5, zorder=1)
        ax.scatter(shares[:1], [y], color=BLUE, label="" if y else "as chosen", zorder=2)
        other = "" if y else "another in its place"
        ax.scatter(shares[1:], [y], color=ORANGE, marker="s", label=other, zorder=2)
    label_rows(ax, [f"{row['prompt'][:30]}, token {row['position']}" for row in rows])
    ax.set_xlim(-2, 102)
    ax.set_xlabel(f"probability of a right answer, % ({result['by']})")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False)
    save(figure, path)


def draw_critic(result, path):
    """Calibration of the critic: value against what steering gained."""
    rows = result["calibration"]
    figure, ax = canvas(8, 6)
    values = [row["value"] for row in rows]
    gains = [row["gain"] for row in rows]
    ends = [min(values + gains), max(values + gains)]
    ax.plot(ends, ends, color=GREY, linestyle=":", label="as predicted")
    ax.plot(values, gains, "o-", color=BLUE, label=f"{len(rows)} groups of prompts by value")
    ax.set_xlabel("value V of the critic, mean of the group")
    ax.set_ylabel("reward over the unsteered answer's")
    ax.legend(frameon=False)
    save(figure, path)


def draw_map(result, path):
    """What each layer, kind of directions and strength reaches on prompts held out."""
    rows = result["cells"][:40]
    figure, ax = canvas(len(rows))
    marks = (
        ("unsteered", GREY, "|"),
        ("constant", ORANGE, "s"),
        ("switch", GREEN, "^"),
        ("ceiling", BLUE, "o"),
    )
    for key, colour, marker in marks:
        shares = [100 * row[key] for row in rows]
        ax.scatter(shares, range(len(rows)), color=colour, marker=marker, label=key)
    names = ["layer {layer}, {directions} x {coef:g}".format(**row) for row in rows]
    label_rows(ax, names)
    ax.set_xlim(-2, 102)
    ax.set_xlabel("right, % of prompts held out")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=4, frameon=False)
    save(figure, path)


PICTURES = {  # command -> (the list that is drawn, the function)
    "features": ("answers", draw_answers),
    "critic": ("calibration", draw_critic),
    "permute": ("answers", draw_permute),
    "branch": ("top", draw_branch),
    "map": ("cells", draw_map),
}
