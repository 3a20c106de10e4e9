"""The map: what can be read at each layer, what steering does there, and the ceiling that follows.

analyze_features.py calls atlas(); `lab` is its Lab. Paired statistics of prompts, which all analyses use,
come first.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn import linear_model, pipeline, preprocessing
from sklearn import model_selection as ms
from tqdm import tqdm

import crl_ppo as ppo
from crl_stats import accuracy, difference, holm
from crl_tasks import hub, kind_of, passes

RESAMPLES = 2000  # of every bootstrap


# --- statistics ---
def classes_of(prompts, unsteered):
    """Per prompt the class of its right decision (kind_of).

    Where there is none, whether the unsteered answer is right: a policy must tell
    when to steer at all."""
    kinds = [kind_of(prompt.row) for prompt in prompts]
    if None in kinds:
        return np.array([f"unsteered {reward:g}" for reward in unsteered])
    return np.array([str(kind) for kind in kinds])


# ----------------------------------------------------------- statistics
def index_of(prompts):
    """The index (id, group) by which crl_stats.py keeps groups of the split
    together."""
    pairs = [(prompt.row["id"], prompt.row["group"]) for prompt in prompts]
    return pd.MultiIndex.from_tuples(pairs, names=["id", "group"])


def effect(d):
    """Mean over prompts of paired differences d (Series with index_of()), interval
    and p of difference()."""
    d = d.dropna().groupby(level=["id", "group"]).mean()
    if d.empty:
        return None
    found = difference(d, "mean")
    return {
        "n": len(d),
        "mean": d.mean(),
        "ci": [found["mean_low"], found["mean_high"]],
        "p": found["mean_p"],
    }


def share(values, prompts):
    """Mean over prompts of values (0 to 1, one a prompt; a prompt may come twice), with its interval."""
    found = accuracy(pd.Series(values, index_of(prompts), dtype=float))
    interval = np.round([found["low"], found["high"]], 9).tolist()
    return {"n": found["n"], "mean": found["accuracy"], "ci": interval}


def two_way(opts, a, b, groups):
    """Mean of a (N, F) minus mean of b (N, R), interval and p, by a bootstrap over
    groups and directions.

    It draws groups of prompts (the same for both) and directions (of each) anew:
    with others of either it might come out otherwise. p is at least the sign test's
    2^(1 - G) for G groups."""
    rng = np.random.default_rng(opts.seed)
    names, group = np.unique(groups, return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    rows = drawn[:, group]  # (RESAMPLES, N) how often each prompt counts

    def means(m):
        size = m.shape[1]
        columns = rng.multinomial(size, np.full(size, 1 / size), RESAMPLES)
        return (rows @ m * columns).sum(1) / (rows.sum(1) * size)

    d = means(a) - means(b)
    tail = min((d <= 0).sum(), (d >= 0).sum())
    p = max(2.0 ** (1 - len(names)), 2 * (1 + tail) / (1 + RESAMPLES))
    interval = np.quantile(d, (0.025, 0.975)).tolist()
    return {"mean": a.mean() - b.mean(), "ci": interval, "p": min(1.0, p)}


def served(reward, classes, folds, seen=None):
    """(N,) what held-out prompts earn with one action per class, chosen on the
    others.

    reward (N, A), the no-op first: it wins ties; folds [(fit, held)]; seen (N,):
    the class that each prompt is taken for (default: its own)."""
    seen = classes if seen is None else seen
    earned = np.zeros(len(reward))
    for fit, held in folds:
        best = {}
        for kind in set(classes[fit]):
            best[kind] = reward[fit][classes[fit] == kind].mean(0).argmax()
        for n in held:
            earned[n] = reward[n, best.get(seen[n], 0)]
    return earned


# --- the map ---
def read_at(env, layers, prompts):
    """What a policy at each of L layers would read of N prompts, unsteered: (N, L,
    k); 0 where nothing is."""
    found = {}
    for rows in passes.batches(prompts, env.args.batch_size):
        some = [prompts[n] for n in rows]
        seen = [ppo.Batch(some, None, None) for _ in layers]

        def look(number, h, seen=seen):
            return env.read(seen[number], 0, h)

        with ppo.residual_hook([env.layers[layer] for layer in layers], look):
            env.prefill(some)
        x = torch.stack([batch.x.flatten(1).float().cpu() for batch in seen], 1)
        found |= zip(rows.tolist(), x.nan_to_num().numpy(), strict=True)
    return np.stack([found[n] for n in range(len(prompts))])


def probes(lab, layers, prompts, classes):
    """Per layer what a linear probe of what a policy reads there tells of the
    classes of N prompts.

    Returns rows with held-out accuracy, and {layer: (N,)
    held-out classes}. Both are empty where there is nothing to tell."""
    groups = [prompt.row["group"] for prompt in prompts]
    most = np.unique(classes, return_counts=True)[1].max() / len(prompts)
    folds = list(ms.GroupKFold(min(5, len(set(groups)))).split(groups, groups=groups))
    if min(len(set(classes[fit])) for fit, _ in folds) < 2:
        return [], {}
    model = linear_model.LogisticRegression(C=0.01, max_iter=1000)
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
    rows = []
    told = {}
    read = read_at(lab.env, layers, prompts)
    for number, layer in enumerate(layers):
        x = read[:, number]
        told[layer] = ms.cross_val_predict(probe, x, classes, cv=folds)
        right = accuracy(pd.Series(told[layer] == classes, index_of(prompts), dtype=float))
        row = {"layer": layer, "n": len(prompts), "most_frequent": most}
        row["probe"] = {"mean": right["accuracy"], "ci": [right["low"], right["high"]]}
        rows.append(row)
    return rows, told


def measured(lab, layers, coefs, prompts):
    """{(layer, directions, coef): rewards (N, 1 + A)} of N prompts, unsteered and
    under each direction.

    Directions are --directions SAE features of a site and as many random ones. They
    act for as long as actions of the run (or the task) do."""
    count = lab.opts.directions if lab.one else max(2, lab.opts.directions // 4)
    args = dataclasses.replace(lab.args, coef=coefs)
    found = {}
    for layer in tqdm(layers, desc="layers", leave=False, delay=2):
        generator = torch.Generator().manual_seed(lab.opts.seed + layer)
        random = torch.randn(count, lab.env.steering.shape[1], generator=generator)
        kinds = {}
        for site in lab.sites:
            if site.layer == layer and not site.name.startswith("random:"):
                chosen = torch.randperm(len(site.directions), generator=generator)[:count]
                kinds[site.name] = site.directions[chosen]
        kinds["random"] = F.normalize(random, dim=1)
        site = hub.Site(layer, torch.cat(list(kinds.values())), None, "", "", {})
        env = ppo.Environment(args, lab.env.model, lab.env.tok, [site], lab.env.ends)
        env.ask(prompts)
        everything = torch.arange(env.noop + 1)
        reward = env.rewards(torch.arange(len(prompts)), everything).numpy()
        start = 0
        for coef in coefs:
            for kind, directions in kinds.items():
                columns = range(start, start + len(directions))
                found[layer, kind, coef] = reward[:, [env.noop, *columns]]
                start += len(directions)
    return found


def covered(reward, plain, folds, size):
    """(N,) the best that held-out prompts earn with a mask of `size` actions,
    chosen on the others."""
    best = np.zeros(len(reward))
    for fit, held in folds:
        wrong = fit[plain[fit] < 0.5]
        mask = ppo.cover(torch.tensor(reward[wrong, 1:]).float(), size)
        columns = [0, *(action + 1 for action in mask)]
        best[held] = reward[held][:, columns].max(1)
    return best


def policy_figures(lab):
    """What the run's policy earns beside the best of its mask; nothing where not
    all rewards are known."""
    reward = lab.env.memo[lab.at].float().numpy() if lab.run else np.array([math.nan])
    if np.isnan(reward).any():
        return {}
    mine = np.array([reward[n, own[0]] for n, own in lab.picks.items()])
    best = reward.max(1)
    better = (reward > mine[:, None]).sum(1)
    figures = {"policy": mine.mean(), "mask_coverage": best.mean()}
    return figures | {"regret": (best - mine).mean(), "mean_rank": (1 + better).mean()}


def atlas(lab):
    """Layers x directions x strengths: what can be read, what actions can do, and
    the ceiling that follows.

    Held out by folds of groups; p-values are corrected for the many cells."""
    opts = lab.opts
    top = len(lab.env.layers) - 1
    own = [site.layer for site in lab.sites]
    layers = sorted(set(opts.layer or (*own, round(top / 3), round(2 * top / 3))))
    read = sorted({*layers, *(round(top * j / 5) for j in range(1, 6))})
    prompts = [lab.val[n] for n in sorted(lab.rng.permutation(len(lab.val))[: opts.prompts])]
    groups = np.array([prompt.row["group"] for prompt in prompts])
    if len(set(groups)) < 2:
        hub.fail(f"{lab.args.task}: its validation prompts are one group; raise --prompts to have two")
    scaled = {share * coef for coef in lab.args.coef for share in (0.5, 1, 2)}
    cells = measured(lab, layers, opts.coef or tuple(sorted(scaled)), prompts)
    plain = next(iter(cells.values()))[:, 0]
    classes = classes_of(prompts, plain)
    named = all(kind_of(prompt.row) is not None for prompt in prompts)
    fitted = prompts + lab.train[: opts.probe_samples if named else 0]
    probe, told = probes(lab, read, fitted, classes_of(fitted, plain))
    nothing = np.full(len(prompts), "any")  # what nothing tells is one class
    folds = list(ms.GroupKFold(min(5, len(set(groups)))).split(prompts, groups=groups))
    wrong = plain < 0.5
    table = []
    lines = []
    for (layer, kind, coef), reward in cells.items():
        seen = told[layer][: len(prompts)] if told else nothing
        ceiling = served(reward, classes if told else nothing, folds, seen)
        row = {"layer": layer, "directions": kind, "coef": coef, "n": len(reward)}
        row |= cell_figures(reward, folds, classes, lab.args.pool)
        row["ceiling"] = ceiling.mean()
        row["gain"] = effect(pd.Series(ceiling - plain, index_of(prompts)))
        row["sae_minus_random"] = None
        if kind != "random" and wrong.any():
            noise = cells[layer, "random", coef]
            row["sae_minus_random"] = two_way(opts, reward[wrong, 1:], noise[wrong, 1:], groups[wrong])
        table.append(row)
        about = {"run": lab.name, "layer": layer, "directions": kind, "coef": coef}
        for n, prompt in enumerate(prompts):
            line = about | {"id": prompt.row["id"], "group": prompt.row["group"], "class": classes[n]}
            line |= {"told": seen[n], "unsteered": reward[n, 0], "rewards": reward[n, 1:].tolist()}
            lines.append(line)
    for key in ("gain", "sae_minus_random"):  # the best of many cells is the best by luck as well
        tests = [row[key] for row in table if row[key]]
        for test, p in zip(tests, holm(pd.Series([test["p"] for test in tests], dtype=float)), strict=True):
            test["p_holm"] = p
    result = {"task": lab.args.task, "model": lab.identity["model"], "prompts": len(prompts)}
    result |= verdicts(table) | policy_figures(lab)
    result["probe_target"] = "the right decision" if named else "whether the unsteered answer is right"
    return result | {"probe": probe, "cells": table}, {"map": lines}


def cell_figures(reward, folds, classes, pool):
    """What directions do to N prompts, and earn on those held out; rewards (N, 1 + A), unsteered first."""
    plain = reward[:, 0]
    nothing = np.full(len(reward), "any")
    row = {"tried": reward.shape[1] - 1, "unsteered": plain.mean()}
    row["to_right"] = int((reward[:, 1:] > plain[:, None]).sum())
    row["to_wrong"] = int((reward[:, 1:] < plain[:, None]).sum())
    row["coverage"] = covered(reward, plain, folds, pool).mean()
    row["constant"] = served(reward, nothing, folds).mean()
    row["switch"] = served(reward, classes, folds).mean()
    return row


def verdicts(table):
    """What the map says: is training worth while, and are SAE features better than
    random ones?"""
    sure = [row for row in table if row["gain"]["mean"] > 0 and row["gain"]["p_holm"] < 0.05]
    best = max(sure or table, key=lambda row: row["ceiling"])
    worth = f"training is {'' if sure else 'not shown to be '}worth while"
    reach = f"{best['ceiling']:.0%} in reach, {best['unsteered']:.0%} there already"
    where = f"layer {best['layer']}, {best['directions']}, strength {best['coef']:g}"
    sae = [row["sae_minus_random"] for row in table if row["sae_minus_random"]]
    shown = [test["mean"] > 0 for test in sae if test["p_holm"] < 0.05]
    against_random = f"better in {sum(shown)}, worse in {len(shown) - sum(shown)} of {len(sae)} cells"
    return {"verdict": f"{worth}: {reach}; {where}", "sae_against_random": against_random}
