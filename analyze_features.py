"""From interventions to understanding: what a trained controller pushes, what that does, and what limits it.

    python analyze_features.py --run runs/RUN [runs/OTHER ...]        # every analysis; the model is loaded once a run
    python analyze_features.py features --run runs/RUN                # one of them
    python analyze_features.py map --task bbq_ambig                   # before anyone trains: no run needed

  features  what each push of the policy is and does, by counterfactual; features that runs share
  branch    decisions that mattered: another one in their place flips the outcome
  critic    values against outcomes: AUC, calibration; does V tell what steering sets right?
  map       sites x strengths x directions x prompts: probe, levers, ceiling, SAE against random, the policy's regret
  viewer    viewer.html: one self-contained page to look at every prompt, token, push and feature

Files in --out: COMMAND.json, report.md, viewer.html, and the lines that their numbers are counted from: table.jsonl (a
line per prompt of the run's table), decisions.jsonl (measured decision), branch.jsonl (alternative), map.jsonl (prompt
in a cell). A push is "layer:feature name x strength", with " + " between members; a pair's effect is the pair's alone.
"""
import dataclasses
import json
import math
import re
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

import tyro


@dataclass
class Args:
    command: tyro.conf.Positional[str] = "all"
    """features, branch, critic, map, viewer or all"""
    run: tuple[str, ...] = ()
    """run directories of crl_ppo.py"""
    out: str | None = None
    """where the results go (default: analysis/ in the first run; without a run analysis/ here)"""
    seed: int = 0
    """seed of every draw: features, prompts, continuations, bootstrap"""
    data_dir: str | None = None
    """local mirror of the data, if not the one the run recorded"""
    # --- features, viewer ---
    decisions: int = 200
    """decisions whose counterfactuals are measured, spread over the pushes"""
    draws: int = 4
    """random pushes of equal size and norm that each of them is compared with"""
    # --- branch ---
    branch_prompts: int = 20
    """answers that are searched for decisions that mattered, those that steering changed first"""
    continuations: int = 16
    """sampled continuations of either decision, behind the test of a flip (long answers)"""
    temperature: float = 0.7
    """of the language model, in continuations and in the exact probabilities of one-token answers"""
    # --- map ---
    task: str | None = None
    """the task, where there is no run"""
    model: str = "auto"
    """the model, where there is no run: preset, hub id or directory"""
    sae: tuple[str, ...] = ("auto",)
    """one per site, as in crl_ppo.py, where there is no run; none: random directions only, at --layer"""
    layer: tuple[int, ...] = ()
    """sites to push at (default: the SAE's, and for random directions two others)"""
    coef: tuple[float, ...] = ()
    """strengths (default: half, once and twice the task's or the run's)"""
    directions: int = 32
    """SAE features, and as many random directions, tried at every site (a quarter of them for long answers)"""
    prompts: int = 48
    """validation prompts on which they are tried"""
    probe_samples: int = 400
    """training prompts that the probe is fitted on"""


if __name__ == "__main__":
    ARGS = tyro.cli(Args, description=__doc__)  # before the heavy imports: --help answers at once

import jinja2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from markupsafe import escape  # noqa: E402
from scipy import optimize, stats  # noqa: E402
from sklearn import linear_model, metrics, pipeline, preprocessing  # noqa: E402
from sklearn import model_selection as ms  # noqa: E402

import crl_ppo as ppo  # noqa: E402
from crl_model import Actions, Site, branch, decode, hooked, prefill  # noqa: E402
from crl_stats import accuracy, difference, holm, markdown  # noqa: E402
from crl_tasks import fail, judge, kind_of, read_jsonl  # noqa: E402

SCHEMA = 2  # version of the files in --out
OUTCOMES = ("corrected", "misguided", "right", "wrong")  # against the unsteered model; right, wrong: both are
FIELDS = {"schema": int, "decided": bool, "push": list,
          **dict.fromkeys(("prompt_id", "token_text", "unsteered_token_text"), str),
          **dict.fromkeys(("position", "token", "choice", "mask_size"), int),
          **dict.fromkeys(("logp", "value", "entropy", "reward", "unsteered_reward"), (int, float))}  # of the log
DECISION = ["run", "id", "group", "position", "push", "reward", "noop", "random"]  # a line of decisions.jsonl
NOOP = "no-op"
RESAMPLES = 2000  # of every bootstrap


# ------------------------------------------------------------------------------------------------------ a run's files
def read_log(path):
    """interventions.jsonl as a frame, with each line's outcome. Refuses what it cannot use by line and field."""
    if not path.is_file():
        fail(f"no {path}: was this run stopped before its validation with the best checkpoint?")
    rows = read_jsonl(path, cut=True, fields=FIELDS)
    for where, row in rows:
        if row["schema"] != ppo.SCHEMA:
            fail(f"{where}: schema {row['schema']}, here {ppo.SCHEMA}; use the version that made the run")
    log = pd.DataFrame([row for _, row in rows], columns=list(FIELDS))
    if log.empty:
        fail(f"{path} holds no lines; was this run stopped before its validation?")
    if len(lost := log[log["position"] != log.groupby("prompt_id").cumcount()]):
        fail(f"{path}: token {lost['position'].iloc[0]} of prompt {lost['prompt_id'].iloc[0]} stands where another one "
             "belongs; a line before it is missing: restore it, or remove all lines of that prompt")
    gain, same = log["reward"] - log["unsteered_reward"], np.where(log["reward"] > 0.5, "right", "wrong")
    return log.assign(outcome=np.select([gain > 0, gain < 0], OUTCOMES[:2], same))


def classes_of(prompts, unsteered):
    """Per prompt the class of its right decision (kind_of); where there is none, whether the unsteered answer is right
    (0/1): a policy must tell when to push at all."""
    kinds = [kind_of(p.row) for p in prompts]
    return np.array([f"unsteered {r:g}" for r in unsteered] if None in kinds else [str(kind) for kind in kinds])


class Lab:
    """A run: model, actions, prompts, log, table and policy. Without a run (map): model and prompts of --task."""

    def __init__(self, opts, run):
        self.opts, self.run, self.rng = opts, run and Path(run), np.random.default_rng(opts.seed)
        if run:
            self.name, self.args = self.run.name, ppo.stored_args(run)
            self.log = read_log(self.run / "interventions.jsonl")
        else:
            site = opts.layer[:1] if opts.sae == ("none",) else ()
            self.name = opts.task
            self.args = ppo.Args(task=opts.task, model=opts.model, sae=opts.sae, layer=site, val_samples=opts.prompts,
                                 samples=opts.probe_samples)
        self.args.data_dir = opts.data_dir or self.args.data_dir
        self.lm, self.actions, prompts, self.identity = ppo.set_up(self.args)
        if (top := len(self.lm.layers) - 1) < max(opts.layer, default=0):
            fail(f"--layer {max(opts.layer)}: {self.lm.name} has layers 0 to {top}")
        self.train, self.val, self.everyone = prompts["train"], prompts["val"], prompts["train"] + prompts["val"]
        self.one, self.once = self.args.max_new_tokens == 1, self.args.decide == "once"
        if run:
            self.read()

    def read(self):
        """The prompts in the order of the log, and per prompt the numbers of the pushes that were decided for."""
        rows = {p.row["id"]: n for n, p in enumerate(self.everyone)}
        self.table = ppo.load_table(self.run / "table.safetensors", self.everyone, self.identity)
        self.agent, *_ = ppo.load_agent(self.args, self.run / "best.safetensors", self.identity)
        self.names = [self.actions.label(push) for push in self.table.pushes]
        for key, known in (("prompt_id", list(rows)[len(self.train):]), ("choice", range(len(self.names)))):
            if lost := set(self.log[key].tolist()) - set(known):
                fail(f"{self.run}/interventions.jsonl: {key} {min(lost)!r} is unknown to the run's data or table")
        self.log["name"] = [self.names[choice] for choice in self.log["choice"]]
        self.answers = self.log.drop_duplicates("prompt_id")
        self.at = [rows[i] for i in self.answers["prompt_id"]]  # rows of the table
        self.val, self.own = [self.everyone[n] for n in self.at], self.answers["reward"].to_numpy(float)
        decided = self.log[self.log["decided"]].groupby("prompt_id")["choice"].agg(list)
        self.picks = [decided[p.row["id"]] for p in self.val]
        pushed = (self.actions.describe(self.table.pushes[a]) for own in self.picks for a in own)
        self.used = {(m["layer"], m["feature"]) for push in pushed for m in push}  # features that the policy pushes

    @cached_property
    @torch.no_grad()
    def logp(self):
        """Per prompt of the log the policy's log-probabilities of every push at each of its decisions, (T, P)."""
        if self.once:
            obs = self.agent.observe(self.table.x[self.at])
            return list(ppo.behaviour(self.agent.policy(obs), self.table.mask[self.at], 0.0)[:, None])
        rolls = ppo.answer_by_token(self.lm, self.actions, self.args, self.agent, self.val)
        return [ppo.behaviour(self.agent.policy(d["obs"]), d["mask"], 0.0) for (_, d), in rolls]

    def likeliest(self, n, t):
        """[(push, probability)] that the policy would choose next at token t of prompt n, most probable first."""
        logp = self.logp[n][min(t, len(self.logp[n]) - 1)]
        allowed = [a for a in logp.argsort(descending=True).tolist() if logp[a] > ppo.IMPOSSIBLE / 2]
        return [(a, math.exp(logp[a])) for a in allowed if a != self.picks[n][t]]


# --------------------------------------------------------------------------------------------------------- statistics
def index_of(prompts):
    """The index (id, group) by which crl_stats.py keeps groups of the split together."""
    return pd.MultiIndex.from_tuples([(p.row["id"], p.row["group"]) for p in prompts], names=["id", "group"])


def effect(d):
    """Mean over prompts of paired differences d (a Series with index_of()), 95 % interval and p of difference()."""
    d = d.dropna().groupby(level=["id", "group"]).mean()
    if d.empty:
        return None
    found = difference(d, "mean")
    return {"n": len(d), "mean": d.mean(), "ci": [found["mean_low"], found["mean_high"]], "p": found["mean_p"]}


def two_way(opts, a, b, of):
    """Mean of a (N, F) minus mean of b (N, R), interval and p, by a bootstrap that draws groups of prompts (the same
    for both) and directions (of each) anew: with others of either it might come out otherwise. p is at least the sign
    test's 2^(1 - G) for G groups."""
    rng, (names, of) = np.random.default_rng(opts.seed), np.unique(of, return_inverse=True)
    rows = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)[:, of]  # (RESAMPLES, N)

    def means(m):
        columns = rng.multinomial(m.shape[1], np.full(m.shape[1], 1 / m.shape[1]), RESAMPLES)
        return (rows @ m * columns).sum(1) / (rows.sum(1) * m.shape[1])
    d = means(a) - means(b)
    p = max(2.0**(1 - len(names)), 2 * (1 + min((d <= 0).sum(), (d >= 0).sum())) / (1 + RESAMPLES))
    return {"mean": a.mean() - b.mean(), "ci": np.quantile(d, (0.025, 0.975)).tolist(), "p": min(1.0, p)}


def auc(scores, positive):
    """Area under the ROC curve with Newcombe's score interval (2006, method 5), which has a width at 0 and 1 too; None
    where all outcomes are alike."""
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    a, z, half = float(metrics.roc_auc_score(positive, scores)), stats.norm.ppf(0.975), (n + m) / 2 - 1

    def outside(t):  # positive beyond the interval's ends
        return (a - t)**2 - z**2 * t * (1 - t) * (1 + half * (1 - t) / (2 - t) + half * t / (1 + t)) / (n * m)
    low = optimize.brentq(outside, 0, a - 1e-9) if a > 0 else 0.0
    high = optimize.brentq(outside, a + 1e-9, 1) if a < 1 else 1.0
    return {"auc": a, "ci": [low, high], "n": [n, m]}


def served(reward, classes, folds, seen=None):
    """(N,) what held-out prompts earn with one push per class, chosen on the others. reward (N, A), the no-op first: it
    wins ties; folds [(fit, held)]; seen (N,): the class that each prompt is taken for (default: its own)."""
    out, seen = np.zeros(len(reward)), classes if seen is None else seen
    for fit, held in folds:
        best = {c: reward[fit][classes[fit] == c].mean(0).argmax() for c in set(classes[fit])}
        out[held] = [reward[n, best.get(seen[n], 0)] for n in held]
    return out


# ------------------------------------------------------------------------------------- another decision in its place
@torch.no_grad()
def answers_with(lab, cases, temperature):
    """Answers (token ids) to prompts of the log in which one decision is another. A case (n, t, push (k,)) replaces the
    decision at token t of prompt n: before t the log's are made, after it the policy's; --decide once holds the push.
    temperature: from token t on the model is sampled by the Gumbel-max trick: argmax of logits + T * Gumbel noise is
    a sample of softmax(logits / T)."""
    lm, args, noise = lab.lm, lab.args, torch.Generator(lab.lm.device)
    noise.manual_seed(int(lab.rng.integers(2**31)))  # others in every call: what is compared is independent

    def work(part):
        some = sorted({n for n, _, _ in part})
        given = [[*lab.table.pushes[lab.picks[n][:t]], push] for n, t, push in part]
        started = torch.ones(len(part), dtype=torch.bool)

        def choose(x, t, rows):
            nonlocal started
            rows = rows.tolist()
            started = torch.tensor([t >= len(given[r]) - 1 for r in rows])
            if lab.once:
                return torch.stack([given[r][-1] for r in rows]).to(lm.device)
            mask = lab.actions.active([x]) if args.afm == "active" else None
            own = lab.agent.pushes[ppo.decide(lab.agent, x, mask, min(t, 1))["push"]]
            return torch.stack([given[r][t] if t < len(given[r]) else p for r, p in zip(rows, own)]).to(lm.device)

        def sample(module, inputs, output):
            gumbel = -torch.empty_like(output.logits, dtype=torch.float32).exponential_(generator=noise).log()
            on = 1.0 if started.all() else started[:, None, None].to(gumbel)  # all have, once choose() falls silent
            output.logits = output.logits.float() + temperature * gumbel * on
        prompts, owner = [lab.val[n] for n in some], torch.tensor([some.index(n) for n, _, _ in part], device=lm.device)
        _, _, mask, cache = prefill(lm, [], prompts)
        hook = lm.model.register_forward_hook(sample) if temperature else None
        try:
            return decode(lm, lab.actions, args, prompts, mask, cache, owner, choose)
        finally:
            if hook:
                hook.remove()
    return ppo.in_batches(cases, 128, work, lambda case: len(lab.val[case[0]].ids), "decisions")


def tried(lab, actions, prompts, pushes, rows=slice(None), columns=slice(None)):
    """Rewards (N, P + 1) of prompts under `pushes` (P, k), held, where `rows` meet `columns`; unsteered last."""
    table = ppo.Table(prompts, F.pad(pushes, (0, 0, 0, 1), value=actions.noop), actions.width)
    args = dataclasses.replace(lab.args, afm="adaptive")
    table.fill(lab.lm, actions, args, rows, columns, title="pushes")
    return table.reward.numpy()


def rewards_with(lab, cases, temperature=0.0):
    """Rewards (N,) of cases as in answers_with(); those of held pushes come as crl_ppo.py tabulates them."""
    rows = [n for n, _, _ in cases]
    if lab.once and not temperature and cases:
        pushes, own = torch.stack([push for _, _, push in cases]), list(range(len(rows)))
        return tried(lab, lab.actions, lab.val, pushes, rows, own)[rows, own]
    said = answers_with(lab, cases, temperature)
    return np.array([judge(lab.lm, lab.args, lab.val[n].row, ids)["reward"] for n, ids in zip(rows, said)])


# ----------------------------------------------------------------------------------------------------------- features
def decision_lines(lab):
    """Per measured decision its push, and what its prompt earns with it, with the no-op in its place and with each of
    --draws random pushes: other features at the same sites and strengths, as many as it has members. The pushes take
    turns, so that rare ones are measured too."""
    some = [(n, t, a) for n, own in enumerate(lab.picks) for t, a in enumerate(own) if a != lab.table.noop]
    frame = pd.DataFrame(some, columns=["n", "t", "a"]).sample(frac=1, random_state=lab.opts.seed)
    frame = frame.assign(turn=frame.groupby("a").cumcount()).sort_values("turn", kind="stable").head(lab.opts.decisions)
    cases = sorted(frame[["n", "t", "a"]].itertuples(index=False, name=None))
    many = [case for case in cases for _ in range(lab.opts.draws)]
    pushes = lab.table.pushes[[a for _, _, a in many]]  # (n draws, k)
    other = lab.actions.others(pushes, torch.from_numpy(lab.rng.random(pushes.shape)))
    noop = rewards_with(lab, [(n, t, lab.table.pushes[-1]) for n, t, _ in cases])
    random = rewards_with(lab, [(n, t, push) for (n, t, _), push in zip(many, other)])
    for (n, t, a), without, others in zip(cases, noop, random.reshape(len(cases), lab.opts.draws)):
        yield {"run": lab.name, "id": lab.val[n].row["id"], "group": lab.val[n].row["group"], "position": t,
               "push": lab.names[a], "reward": lab.own[n], "noop": without, "random": others.tolist()}


def against(decisions):
    """Effects of measured decisions against the no-op and against the mean random push."""
    d = decisions.set_index(["id", "group"])[["reward", "noop", "random"]]
    d["random"] = d["random"].map(np.mean)
    d = d.astype(float)
    return {"vs_noop": effect(d["reward"] - d["noop"]), "vs_random": effect(d["reward"] - d["random"])}


def contexts_of(lab, row, acts):
    """Up to five strongest contexts of a feature, [[text, activation], ...] each: those of its row in features.jsonl,
    or else of the run's prompts, at whose tokens but the first its activations are acts [(T - 1,)]."""
    found = []
    for c in row.get("contexts", ())[:5]:
        parts = re.split("[«»]", c["text"])  # before, the token, after
        found.append([[text, v] for text, v in zip(parts, (0, c["activation"], 0))])
    if found:
        return found
    for n in sorted(range(len(acts)), key=lambda n: -float(acts[n].max()))[:5]:
        t, ids = int(acts[n].argmax()), lab.everyone[n].ids[1:]
        around = range(max(0, t - 10), min(len(ids), t + 6))
        if acts[n][t] > 0:
            found.append([[lab.lm.tok.decode([ids[s]]), float(acts[n][s])] for s in around])
    return found


@torch.no_grad()
def cards(lab, wanted):
    """What the features `wanted` {(layer, number)} are. Promoted and suppressed tokens: what the direction adds to the
    logits straight through the final norm; activations: on 64 of the run's prompts, without their first position."""
    lm, out, some, head = lab.lm, [], lab.everyone[:64], lab.lm.model.get_output_embeddings()
    inside = set(lm.layers.modules())
    last = [m for m in lm.model.modules() if "norm" in type(m).__name__.lower() and m not in inside][-1]
    for site in lab.actions.sites:
        ids, acts = sorted(f for layer, f in wanted if layer == site.layer), []
        own = site.directions[ids].to(head.weight)
        logits = (last(own) - last(torch.zeros_like(own))) @ head.weight.T  # (n, V), up to a factor per row
        near = (site.directions[ids] @ site.directions.T).topk(min(6, len(site.directions)))

        def look(_, h, site=site, ids=ids, acts=acts):  # (1, T, d)
            acts.append(site.encode(h[0, 1:])[:, ids].clamp(min=0).cpu())  # (T - 1, n)
            return h
        with hooked(lm, [site.layer], look):
            for p in some if ids else ():
                lm.model(torch.tensor([p.ids], device=lm.device), use_cache=False, logits_to_keep=1)
        page = str(site.sae.cfg.metadata.neuronpedia_id) if site.sae is not None else ""
        for j, f in enumerate(ids):
            values, row = torch.cat([a[:, j] for a in acts]), site.labels.get(f, {})
            counts, edges = np.histogram(values[values > 0], bins=10, range=(0, max(1e-6, float(values.max()))))
            best = [(sign * logits[j].float()).topk(8).indices.tolist() for sign in (1, -1)]
            up, down = ([lm.tok.decode([token]) for token in tokens] for tokens in best)
            out.append({
                "layer": site.layer, "feature": f, "name": row.get("name", ""), "dictionary": site.name,
                "hash": site.hash, "promoted": up, "suppressed": down, "tokens": len(values), "active": counts.sum(),
                "density": counts.sum() / len(values), "density_corpus": row.get("density"), "top": edges[-1],
                "histogram": counts.tolist(), "contexts": contexts_of(lab, row, [a[:, j] for a in acts]),
                "neighbours": [[g, site.labels.get(g, {}).get("name", ""), v]
                               for v, g in zip(near.values[j].tolist(), near.indices[j].tolist()) if g != f][:5],
                "url": f"https://www.neuronpedia.org/{page}/{f}" if re.fullmatch(r"[\w.-]+/[\w.-]+", page) else None})
    return out


@cache
def features(lab):
    """What the policy pushes and what that does, per push: where it was picked (measured), and on all prompts of the
    table. Returns the result and the lines of each JSONL, as all commands do. The viewer shows the same."""
    decided, counted = lab.log[lab.log["decided"]], pd.DataFrame(decision_lines(lab), columns=DECISION)
    reward = pd.DataFrame(dict(zip(lab.names, lab.table.reward.numpy().T)), index_of(lab.everyone), dtype=float)
    gain, part = reward.sub(reward[NOOP], axis=0), np.where(np.arange(len(reward)) < len(lab.train), "train", "val")
    picks, outcome = decided["name"].value_counts(), lab.answers["outcome"].value_counts()
    per_prompt, pushes = decided.drop_duplicates(["prompt_id", "name"]).groupby(["name", "outcome"]).size(), []
    for name in sorted({*picks.index, *reward.dropna(axis=1, how="all")}, key=lambda p: (-picks.get(p, 0), p)):
        mine, d = counted[counted["push"] == name], gain[name]
        parts = {own: effect(d[part == own]) if name != NOOP else None for own in ("val", "train")}
        pushes.append({
            "name": name, "members": lab.actions.describe(lab.table.pushes[lab.names.index(name)]),
            "picks": picks.get(name, 0), **{o: per_prompt.get((name, o), 0) for o in OUTCOMES},
            "measured": len(mine), **against(mine), "tried": d.count(), "sets_right": (d > 0).sum(),
            "sets_wrong": (d < 0).sum(), **parts})
    every = {(m["layer"], m["feature"]) for push in pushes for m in push["members"]}
    table = [{"run": lab.name, "part": own, "id": p.row["id"], "group": p.row["group"], "class": c,
              "rewards": r.dropna().to_dict()} for p, own, c, (_, r) in zip(
                  lab.everyone, part, classes_of(lab.everyone, reward[NOOP]), reward.iterrows())]
    return {
        "task": lab.args.task, "prompts": len(lab.val), "tokens": len(lab.log), "decisions": len(decided),
        **{o: outcome.get(o, 0) for o in OUTCOMES}, "pushes_used": len(picks), "entropy": stats.entropy(picks),
        "measured": len(counted), **against(counted), "pushes": pushes,
        "features": cards(lab, every if len(pushes) <= 100 else lab.used)}, {
        "table": table, "decisions": counted.to_dict("records")}


def shared(a, b):
    """The flags in which two runs differ, and of each common dictionary the features that both push, against random
    sets of these sizes (hypergeometric test)."""
    common, sites = [], {(s.layer, s.hash) for s in b.actions.sites}
    for site in (s for s in a.actions.sites if (s.layer, s.hash) in sites):
        x, y = ({f for layer, f in lab.used if layer == site.layer} for lab in (a, b))
        size, both = len(site.directions), sorted(x & y)
        common.append({
            "layer": site.layer, "dictionary": size, "first": len(x), "second": len(y), "both": len(both),
            "expected": len(x) * len(y) / size, "p": stats.hypergeom.sf(len(both) - 1, size, len(x), len(y)),
            "features": " ".join(map(str, both))})
    mine, other = vars(a.args), vars(b.args)
    flags = [{"flag": key, "first": str(v), "second": str(other[key])} for key, v in mine.items() if v != other[key]]
    return {"flags": flags, "shared": common}


# ------------------------------------------------------------------------------------------------------------- branch
@torch.no_grad()
def right_shares(lab, p, pushes):
    """Probabilities (G,) at --temperature that the one-token answer to a prompt is right under pushes (G, k): exact."""
    layers = [s.layer for s in lab.actions.sites]
    _, xs, mask, cache = prefill(lab.lm, layers, [p])
    logits = branch(lab.lm, lab.actions, [p], mask, cache, xs[layers[0]], pushes[None].to(lab.lm.device))[0].cpu()
    letters, logits = torch.tensor(lab.lm.letters[:len(p.row["choices"])]), logits.float() / lab.opts.temperature
    offered = logits if lab.args.reward_decoding == "free" else logits[:, letters.unique()]
    right = logits[:, letters[p.row["answer"]].unique()].logsumexp(1)
    return (right - offered.logsumexp(1)).exp().tolist()


def branches(lab):
    """Which decisions mattered: others take their place, with --decide token the policy's next three and the no-op, one
    token at a time; with once all of the mask, from the table. The likeliest flips, two a prompt, are tested on sampled
    continuations (Barnard's exact test, Holm's correction); one-token answers have exact probabilities instead."""
    k, table, lines, p_values = lab.opts.continuations, lab.table, [], []
    order = sorted(lab.rng.permutation(len(lab.val)), key=lambda n: lab.answers["outcome"].iloc[n] in OUTCOMES[2:])
    for n, t, own in ((n, t, a) for n in order[:lab.opts.branch_prompts] for t, a in enumerate(lab.picks[n])):
        row = {"run": lab.name, "id": lab.val[n].row["id"], "prompt": lab.val[n].row["prompt"][:60], "position": t,
               "chosen": lab.names[own], "reward": lab.own[n], "right": None, "instead_right": None, "p_holm": None}
        for rank, (a, q) in enumerate(lab.likeliest(n, t)):
            known = float(table.reward[lab.at[n], a])
            if known == known if lab.once else rank < 3 or a == table.noop:
                lines.append(row | {"instead": lab.names[a], "probability": q, "instead_reward": known,
                                    "confirmed": False, "case": (n, t, own, a)})
    if not lab.once:
        rewards = rewards_with(lab, [(n, t, table.pushes[a]) for n, t, _, a in (r["case"] for r in lines)])
        lines = [r | {"instead_reward": float(reward)} for r, reward in zip(lines, rewards)]
    flips, tested, shares = [r for r in lines if r["reward"] != r["instead_reward"]], [], {}
    for n in {r["case"][0] for r in flips} if lab.one else ():
        pushes = [lab.picks[n][0], *(r["case"][3] for r in flips if r["case"][0] == n)]
        shares |= zip([(n, a) for a in pushes], right_shares(lab, lab.val[n], table.pushes[pushes]))
    for r in sorted(flips, key=lambda r: -r["probability"]):
        n, t, *pair = r["case"]
        if not lab.one and sum(x["id"] == r["id"] for x in tested) == 2:
            continue
        if lab.one:
            r["right"], r["instead_right"] = (shares[n, a] for a in pair)
        else:
            said = [rewards_with(lab, [(n, t, table.pushes[a])] * k, lab.opts.temperature) > 0.5 for a in pair]
            (x, y), (r["right"], r["instead_right"]) = map(np.sum, said), map(np.mean, said)
            p_values.append(1.0 if x == y else min(1.0, stats.barnard_exact([[x, y], [k - x, k - y]]).pvalue))
        tested.append(r)
    for r, p in zip(tested, [None] * len(tested) if lab.one else holm(pd.Series(p_values, dtype=float))):
        alike = (r["right"] - r["instead_right"]) * (r["reward"] - r["instead_reward"]) > 0
        r["p_holm"], r["confirmed"] = p, bool(alike and (lab.one or p < 0.05))
    lines = [{key: v for key, v in r.items() if key != "case"} for r in lines]
    found = sorted((r for r in lines if r["confirmed"]), key=lambda r: -abs(r["right"] - r["instead_right"]))
    return {"prompts": len({r["id"] for r in lines}), "tried": len(lines), "flips": len(flips), "tested": len(tested),
            "flipped_prompts": len({r["id"] for r in flips}), "noop_flips": sum(r["instead"] == NOOP for r in flips),
            "confirmed": len(found), "by": "exact probabilities" if lab.one else f"{k} sampled continuations of either",
            "top": found[:15]}, {"branch": lines}


# ------------------------------------------------------------------------------------------------------------- critic
def critic(lab):
    """The values of the log against what V was trained to predict. (Whether a better choice among the same pushes would
    earn more is told by probe_switch of crl_eval.py, on test prompts.)"""
    log, gain = lab.log[lab.log["decided"]], lab.args.baseline == "unsteered"
    log = log.assign(outcome=log["reward"] - log["unsteered_reward"] if gain else log["reward"])
    first, by_position = log[log["position"] == 0].sort_values("value", kind="stable"), []
    for t, at in log.groupby("position"):
        v, y = at["value"].to_numpy(), at["outcome"].to_numpy()
        by_position.append({"position": t, "n": len(at), "auc": auc(v, y > 0), "auc_right": auc(v, at["reward"] > 0.5),
                            "explained_variance": 1 - (y - v).var() / y.var() if np.ptp(y) else None})
    bins = [first.iloc[part] for part in np.array_split(np.arange(len(first)), 10) if len(part)]
    bins = [{"n": len(b), "value": b["value"].mean(), "outcome": b["outcome"].mean()} for b in bins]
    seen, what = by_position[0]["auc"], "what steering sets right" if gain else "right answers"
    tells = "tells" if seen and seen["ci"][0] > 0.5 else "is not shown to tell"
    return {"n": len(first), "target": "gain" if gain else "reward", "verdict": f"V {tells} {what} from the rest",
            "calibration_error": sum(b["n"] * abs(b["value"] - b["outcome"]) for b in bins) / len(first),
            "by_position": by_position, "calibration": bins}, {}


# ---------------------------------------------------------------------------------------------------------------- map
def probes(lab, layers, some, classes):
    """Per layer what a linear probe of what a policy reads there tells of the classes of N prompts: accuracy on groups
    held out, learning curve. Returns rows, and {layer: (N,) held-out classes}; empty where there is nothing to tell."""
    of, most = [p.row["group"] for p in some], np.unique(classes, return_counts=True)[1].max() / len(some)
    folds = list(ms.GroupKFold(min(5, len(set(of)))).split(of, groups=of))
    if min(len(set(classes[fit])) for fit, _ in folds) < 2:
        return [], {}

    @torch.no_grad()
    def read(part):
        xs = prefill(lab.lm, layers, part, lab.args.observe_options)[1]
        return [[xs[layer][j].float().cpu().nan_to_num().numpy() for layer in layers] for j in range(len(part))]
    xs = np.array(ppo.in_batches(some, lab.args.micro_batch, read, lambda p: len(p.ids), "probe"))  # (N, layers, d)
    model, rows, told = linear_model.LogisticRegression(C=0.01, max_iter=1000), [], {}
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
    for x, layer in zip(xs.swapaxes(0, 1), layers):
        told[layer] = ms.cross_val_predict(probe, x, classes, cv=folds)
        right = accuracy(pd.Series(told[layer] == classes, index_of(some), dtype=float))
        with warnings.catch_warnings(action="ignore"):  # few prompts may hold one class only, which gives NaN
            sizes, _, curve = ms.learning_curve(probe, x, classes, cv=folds, train_sizes=(0.25, 0.5, 0.75, 1.0),
                                                shuffle=True, random_state=lab.opts.seed)
            curve = np.nanmean(curve, axis=1)
        rows.append({"layer": layer, "n": len(some), "most_frequent": most, "probe": {
            "mean": right["accuracy"], "ci": [right["low"], right["high"]]},
            **{f"{n} samples": share for n, share in zip(sizes, curve)}})
    return rows, told


def measured(lab, layers, coefs, prompts):
    """{(layer, directions, coef): rewards (N, 1 + A)} of N prompts unsteered and under --directions SAE features of a
    site, and as many random directions, at each strength; pushed for as long as the run (or the task) pushes."""
    count, out = lab.opts.directions if lab.one else max(2, lab.opts.directions // 4), {}
    for layer in layers:
        noise = torch.Generator().manual_seed(lab.opts.seed + layer)
        random, kinds = torch.randn(count, lab.actions.d, generator=noise), {}
        for site in (s for s in lab.actions.sites if s.layer == layer and not s.name.startswith("random:")):
            kinds[site.name] = site.directions[torch.randperm(len(site.directions), generator=noise)[:count]]
        kinds["random"] = F.normalize(random, dim=1).to(lab.lm.device)
        both = torch.cat(list(kinds.values()))
        actions = Actions(dataclasses.replace(lab.args, coef=coefs), [Site(layer, both, None, "", "", {})])
        reward = tried(lab, actions, prompts, torch.arange(actions.noop)[:, None])
        for c, start in zip(coefs, range(0, actions.noop, len(both))):
            for kind, rows in kinds.items():
                out[layer, kind, c] = reward[:, [-1, *range(start, start + len(rows))]]
                start += len(rows)
    return out


def atlas(lab):
    """Sites x strengths x directions x prompts: what can be read off x, what pushes can do, the ceiling that follows,
    and where a run's policy stands. Held out by folds of groups; p-values are corrected for the many cells."""
    opts, top, args = lab.opts, len(lab.lm.layers) - 1, lab.args
    layers = sorted(set(opts.layer or (*(s.layer for s in lab.actions.sites), round(top / 3), round(2 * top / 3))))
    observed = sorted({*layers, args.observe, *(round(top * j / 5) for j in range(1, 6))})
    prompts = [lab.val[n] for n in sorted(lab.rng.permutation(len(lab.val))[:opts.prompts])]
    of, index = np.array([p.row["group"] for p in prompts]), index_of(prompts)
    if len(set(of)) < 2:
        fail(f"{args.task}: its validation prompts are one group, but held-out figures need two; raise --prompts")
    cells = measured(lab, layers, opts.coef or tuple(sorted({f * c for c in args.coef for f in (0.5, 1, 2)})), prompts)
    plain = next(iter(cells.values()))[:, 0]
    classes, named = classes_of(prompts, plain), None not in map(kind_of, (p.row for p in prompts))
    some = prompts + lab.train[:opts.probe_samples if named else 0]
    rows, told = probes(lab, observed, some, classes_of(some, plain))
    kinds = classes if told else np.full(len(prompts), "any")  # what nothing tells is one class
    right, table, lines = {row["layer"]: row["probe"]["mean"] for row in rows}, [], []
    folds, wrong = list(ms.GroupKFold(min(5, len(set(of)))).split(prompts, groups=of)), plain < 0.5
    for (layer, kind, c), reward in cells.items():
        best = max((n for n in observed if n >= layer), key=lambda n: right.get(n, 0))
        seen = told[best][:len(prompts)] if told else kinds
        ceiling, covered = served(reward, kinds, folds, seen), np.zeros(len(prompts))
        for fit, held in folds:
            mask = ppo.cover(torch.tensor(reward[fit[wrong[fit]], 1:]), args.pool)
            covered[held] = reward[held][:, [0, *(a + 1 for a in mask)]].max(1)
        table.append({
            "layer": layer, "directions": kind, "coef": c, "n": len(reward), "tried": reward.shape[1] - 1,
            "to_right": int((reward[:, 1:] > plain[:, None]).sum()), "unsteered": plain.mean(),
            "to_wrong": int((reward[:, 1:] < plain[:, None]).sum()), "coverage": covered.mean(),
            "constant": served(reward, np.zeros(len(reward)), folds).mean(), "observed": best,
            "switch": served(reward, classes, folds).mean(), "ceiling": ceiling.mean(),
            "gain": effect(pd.Series(ceiling - plain, index)), "sae_minus_random": None})
        if kind != "random" and wrong.any():
            noise = cells[layer, "random", c]
            table[-1]["sae_minus_random"] = two_way(opts, reward[wrong, 1:], noise[wrong, 1:], of[wrong])
        lines += [{"run": lab.name, "layer": layer, "directions": kind, "coef": c, "id": p.row["id"], "class": own,
                   "group": p.row["group"], "told": guess, "unsteered": r[0], "rewards": r[1:].tolist()}
                  for p, own, guess, r in zip(prompts, classes, seen, reward)]
    gains, sae = ([cell[key] for cell in table if cell[key]] for key in ("gain", "sae_minus_random"))
    for tests in (gains, sae):  # the best of many cells is the best by luck as well
        for e, p in zip(tests, holm(pd.Series([e["p"] for e in tests], dtype=float))):
            e["p_holm"] = p
    sure = [cell for cell in table if cell["gain"]["mean"] > 0 and cell["gain"]["p_holm"] < 0.05]
    best = max(sure or table, key=lambda cell: cell["ceiling"])
    shown = [e["mean"] > 0 for e in sae if e["p_holm"] < 0.05]
    result = {
        "task": args.task, "model": lab.lm.name, "prompts": len(prompts),
        "verdict": f"training is {'' if sure else 'not shown to be '}worth while: {best['ceiling']:.0%} in reach, "
                   f"{best['unsteered']:.0%} there already; layer {best['layer']}, {best['directions']}, strength "
                   f"{best['coef']:g}, read at layer {best['observed']}",
        "sae_against_random": f"better in {sum(shown)}, worse in {len(shown) - sum(shown)} of {len(sae)} cells",
        "probe_target": "the right decision" if named else "whether the unsteered answer is right"}
    if lab.run and not lab.table.reward.isnan().any():
        reward = lab.table.reward[lab.at].numpy()
        mine = reward[range(len(reward)), [own[0] for own in lab.picks]]
        result |= {"policy": mine.mean(), "mask_coverage": reward.max(1).mean(),
                   "regret": (reward.max(1) - mine).mean(), "mean_rank": (1 + (reward > mine[:, None]).sum(1)).mean()}
    return result | {"probe": rows, "cells": table}, {"map": lines}


# ------------------------------------------------------------------------------------------------------------- viewer
@torch.no_grad()
def read_through(lab, p, tokens, pushes):
    """Log-probabilities (2, T, V) of what follows a prompt and each prefix of its answer (T tokens): unsteered, and
    with pushes (T, k) at its tokens."""
    lm, ids, T = lab.lm, torch.tensor([p.ids + tokens[:-1]], device=lab.lm.device), len(tokens)

    def edit(i, h):  # (1, L, d)
        return torch.cat([h[:, :-T], h[:, -T:] + lab.actions.added(i, h[0, -T:], pushes.to(h.device)).to(h.dtype)], 1)
    plain = lm.model(ids, use_cache=False, logits_to_keep=T).logits[0]
    with hooked(lm, [s.layer for s in lab.actions.sites], edit):
        steered = lm.model(ids, use_cache=False, logits_to_keep=T).logits[0]
    return torch.stack([plain, steered]).float().log_softmax(-1).cpu()


def view(lab, data):
    """Adds a run to the page's data. Features and pushes are a run's own: the cards show its prompts."""
    found, run, lm = features(lab)[0], len(data["runs"]), lab.lm
    data["runs"].append({"name": lab.name, "task": lab.args.task, "model": lm.name, "layer": lab.identity["layer"]})
    data["features"] |= {f"{run}:{f['layer']}:{f['feature']}": f for f in found["features"]}
    at = {push["name"]: n for n, push in enumerate(found["pushes"], len(data["pushes"]))}
    for push in found["pushes"]:
        members = [f"{run}:{m['layer']}:{m['feature']}" for m in push["members"]]
        data["pushes"].append(push | {"run": run, "members": [m for m in members if m in data["features"]]})

    def likely(row):
        return [[lm.tok.decode([token]), math.exp(p)] for p, token in zip(*(v.tolist() for v in row.topk(5)))]
    for (n, p), (_, part) in zip(enumerate(lab.val), lab.log.groupby("prompt_id", sort=False)):
        tokens, shown, acting = part["token"].tolist(), [], part["push"].map(bool)
        pushes = lab.table.pushes[part["choice"].where(acting, lab.table.noop).tolist()]
        pushes = torch.stack([lab.actions.acting(push, t) for t, push in enumerate(pushes)])
        plain, steered = read_through(lab, p, tokens, pushes)
        for t, r in enumerate(part.to_dict("records")):
            others = lab.likeliest(n, t)[:3] if r["decided"] else ()
            shown.append({key: r[key] for key in ("decided", "value", "logp", "entropy", "mask_size")} | {
                "text": r["token_text"], "plain": r["unsteered_token_text"],
                "next": [likely(steered[t]), likely(plain[t])], "effect": float((steered - plain)[t, tokens[t]]),
                "others": [[at[lab.names[a]], q] for a, q in others if lab.names[a] in at],
                "push": at[r["name"]] if r["push"] or r["decided"] else None})
        options = [f"{chr(65 + j)}. {c}" for j, c in enumerate(p.row["choices"] or ())]
        data["prompts"].append({
            "run": run, "id": p.row["id"], "prompt": "\n".join([p.row["prompt"], *options]), "tokens": shown,
            "gold": options[p.row["answer"]] if options else p.row["answer"], "outcome": OUTCOMES.index(r["outcome"]),
            "reward": [r["reward"], r["unsteered_reward"]],
            "plain": judge(lm, lab.args, p.row, lab.table.said[lab.at[n]][lab.table.noop])["text"]})
    return {"prompts": len(lab.val), "features": len(found["features"]), "pushes": len(found["pushes"])}, {}


def viewer(out, data):
    """Writes viewer.html. jinja2 escapes what could end the data's script."""
    template = Path(__file__).with_name("viewer_template.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template).render(data=finite(data))
    ppo.write_atomically(out / "viewer.html", lambda tmp: tmp.write_text(page, "utf-8"))


# ----------------------------------------------------------------------------------------------------- report and main
COMMANDS = {"features": features, "branch": branches, "critic": critic, "map": atlas, "viewer": view}
HEAD = """# What the controller does

Intervals are 95 %. Effects are differences of reward, paired by prompt. Features: vs_noop and vs_random are measured
where a push was picked; val and train are over all prompts of the table. Map, held out: constant is one direction for
all, switch one per class of right decisions, ceiling one per class that the probe tells, coverage some of a mask."""


def finite(value):
    """JSON has no NaN, no infinity and no numpy; six digits do for the rest."""
    if isinstance(value, dict):
        return {str(key): finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value


def cell(value):
    """A value of the report in one line that is harmless in Markdown tables and in HTML."""
    if isinstance(value, dict) and "ci" in value:
        value = "{:.3g} ({:.3g} to {:.3g})".format(value.get("mean", value.get("auc")), *value["ci"])
    text = "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return str(escape(" ".join(text.split())[:160])).replace("|", "&#124;").replace("`", "&#96;")


def report(results):
    """report.md: per command and run what is one value as a list, and lists of dicts as tables."""
    text = [HEAD]
    for name, run, r in ((name, *pair) for name, runs in results.items() for pair in runs.items()):
        text.append(f"## {name}: {cell(run)}")
        ones = {key: v for key, v in r.items() if not isinstance(v, (list, dict)) or "ci" in v}
        text.append("\n".join(f"- {key}: {cell(v)}" for key, v in ones.items()))
        for key, rows in r.items():
            if isinstance(rows, list) and rows:
                columns = [c for c, v in rows[0].items() if not isinstance(v, list) and c not in ("run", "id", "hash")]
                text.append(f"### {key}" + f", the first 30 of {len(rows)}" * (len(rows) > 30))
                text.append(markdown({c: [cell(row[c]) for row in rows[:30]] for c in columns}))
    return "\n\n".join(filter(None, text)) + "\n"


def main(opts):
    """Run a command, or all; returns {command: {run: result}}."""
    if opts.command not in ("all", *COMMANDS):
        fail(f"unknown command {opts.command!r}; one of {', '.join(COMMANDS)}, or none for all")
    for name in ("decisions", "draws", "branch_prompts", "continuations", "directions", "prompts", "probe_samples"):
        if getattr(opts, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(opts, name)}: must be at least 1")
    for name, v in (("temperature", opts.temperature), *(("coef", c) for c in opts.coef)):
        if not 0 < v < math.inf:
            fail(f"--{name} {v}: must be above 0")
    for name, v in (("seed", opts.seed), *(("layer", n) for n in opts.layer)):
        if v < 0:
            fail(f"--{name} {v}: must be at least 0")
    if not opts.run and not (opts.task and opts.command in ("map", "all")):
        fail(f"{opts.command} needs --run runs/RUN; what works without a run is map --task TASK")
    if len({Path(run).name for run in opts.run}) < len(opts.run):
        fail(f"--run {' '.join(opts.run)}: two have the same name, by which results are kept; give every run once")
    names = ["map"] if not opts.run else list(COMMANDS) if opts.command == "all" else [opts.command]
    out, labs = Path(opts.out or Path(opts.run[0] if opts.run else "") / "analysis"), []
    results, lines, data = {name: {} for name in names}, {}, {"runs": [], "features": {}, "pushes": [], "prompts": []}
    for run in opts.run or (None,):
        labs.append(lab := Lab(opts, run))
        for name in names:
            print(f"{name}: {lab.name}", flush=True)
            result, found = COMMANDS[name](lab) if name != "viewer" else view(lab, data)
            results[name][lab.name] = finite(result)
            for file, rows in found.items():
                lines.setdefault(file, []).extend({"schema": SCHEMA} | finite(row) for row in rows)
        del lab.lm  # one model in memory at a time
    out.mkdir(parents=True, exist_ok=True)
    if "features" in names:
        for a, b in combinations(labs, 2):
            results["features"][f"{a.name} and {b.name}"] = finite(shared(a, b))
    if "viewer" in names:
        viewer(out, data)
    for file, rows in lines.items():
        ppo.write_jsonl(out / f"{file}.jsonl", rows)
    files = {f"{name}.json": json.dumps({"schema": SCHEMA, "command": name, "flags": vars(opts), "result": result},
                                        indent=1) for name, result in results.items()}
    for file, text in (files | {"report.md": report(results)}).items():
        ppo.write_atomically(out / file, lambda tmp: tmp.write_text(text, "utf-8"))
    print(f"report.md, {', '.join(files)} are in {out}")
    return results


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
    except OSError as e:
        fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}")
