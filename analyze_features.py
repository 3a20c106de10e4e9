"""From interventions to understanding: what a trained policy does, what that changes, and what limits it.

    python analyze_features.py --run runs/RUN [runs/OTHER ...]   # every analysis
    python analyze_features.py features --run runs/RUN           # one of them
    python analyze_features.py map --task bbq_ambig              # before anyone trains

  features  what each action of the policy is and does, by counterfactual; features that runs share
  branch    decisions that mattered: another one in their place flips the outcome
  critic    values against outcomes: AUC, calibration; does V tell what steering sets right?
  map       layers x directions x strengths: probe, effects, ceiling, SAE against random, the policy's regret
  viewer    viewer.html: one self-contained page to look at every prompt, token, action and feature

Files in --out: COMMAND.json, report.md, viewer.html, and the lines that their numbers are counted from:
table.jsonl (a line per prompt with the rewards of its actions), decisions.jsonl (measured decision),
branch.jsonl (alternative), map.jsonl (prompt in a cell). An action is named "layer:feature name x strength".
"""

import dataclasses
import math
import re
import warnings
from collections import Counter
from contextlib import contextmanager
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
    """decisions whose counterfactuals are measured, spread over the actions"""
    draws: int = 4
    """random features of the same site and strength that each of them is compared with"""
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
    """layers to steer at (default: the SAE's, and for random directions two others)"""
    coef: tuple[float, ...] = ()
    """strengths (default: half, once and twice the task's or the run's)"""
    directions: int = 32
    """SAE features, and as many random ones, tried at every site (a quarter of them for long answers)"""
    prompts: int = 48
    """validation prompts on which they are tried"""
    probe_samples: int = 400
    """training prompts that the probe is fitted on"""


if __name__ == "__main__":
    ARGS = tyro.cli(Args, description=__doc__)  # before the heavy imports: --help answers at once

import jinja2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from markupsafe import escape
from scipy import optimize, stats
from sklearn import linear_model, metrics, pipeline, preprocessing
from sklearn import model_selection as ms

import crl_ppo as ppo
from crl_stats import accuracy, difference, holm, markdown
from crl_tasks import hub, kind_of

SCHEMA = 3  # version of the files in --out
OUTCOMES = ("corrected", "misguided", "right", "wrong")  # against the unsteered model; right, wrong: both are
FIELDS = {"schema": int, "decided": bool, "steering": (dict, type(None))}  # of the log
FIELDS |= dict.fromkeys(("prompt_id", "token_text", "unsteered_token_text"), str)
FIELDS |= dict.fromkeys(("position", "token", "action", "mask_size"), int)
FIELDS |= dict.fromkeys(("logprob", "value", "entropy", "reward", "unsteered_reward"), (int, float))
DECISION = [
    "run",
    "id",
    "group",
    "position",
    "action",
    "reward",
    "noop",
    "random",
]  # a line of decisions.jsonl
NOOP = "no-op"
FREE = -1  # instead of an action: the policy decides
RESAMPLES = 2000  # of every bootstrap


# -------------------------------------------------------- a run's files
def read_log(path):
    """interventions.jsonl as a frame, with each line's outcome. Bad lines are
    refused by number and field."""
    if not path.is_file():
        hub.fail(f"no {path}: was this run stopped before its validation with the best checkpoint?")
    rows = hub.read_jsonl(path, cut=True, fields=FIELDS)
    for where, row in rows:
        if row["schema"] != ppo.SCHEMA:
            hub.fail(f"{where}: schema {row['schema']}, here {ppo.SCHEMA}; use the version that made the run")
    log = pd.DataFrame([row for _, row in rows], columns=list(FIELDS))
    if log.empty:
        hub.fail(f"{path} holds no lines; was this run stopped before its validation?")
    lost = log[log["position"] != log.groupby("prompt_id").cumcount()]
    if len(lost):
        at = f"token {lost['position'].iloc[0]} of prompt {lost['prompt_id'].iloc[0]}"
        cure = "a line before it is missing: restore it, or remove all lines of that prompt"
        hub.fail(f"{path}: {at} stands where another one belongs; {cure}")
    gain = log["reward"] - log["unsteered_reward"]
    same = np.where(log["reward"] > 0.5, "right", "wrong")
    log["outcome"] = np.select([gain > 0, gain < 0], OUTCOMES[:2], same)
    log["n"] = log.groupby("prompt_id", sort=False).ngroup()  # number of the prompt in the log
    return log


class Lab:
    """A run: environment, log, rewards and policy. Without a run (map): environment
    and prompts of --task."""

    def __init__(self, opts, run):
        self.opts = opts
        self.run = run
        self.rng = np.random.default_rng(opts.seed)
        if run:
            self.name = Path(run).name
            self.args = ppo.stored_args(run)
            self.log = read_log(Path(run) / "interventions.jsonl")
        else:
            self.name = opts.task
            self.args = ppo.Args(task=opts.task, model=opts.model, sae=opts.sae)
            self.args.layer = opts.layer[:1] if opts.sae == ("none",) else ()
            self.args.samples = opts.probe_samples
            self.args.val_samples = opts.prompts
        self.args.data_dir = opts.data_dir or self.args.data_dir
        self.env, prompts, self.identity = ppo.set_up(self.args)
        self.sites = self.env.sites
        top = len(self.env.layers) - 1
        if max(opts.layer, default=0) > top:
            hub.fail(f"--layer {max(opts.layer)}: {self.identity['model']} has layers 0 to {top}")
        self.train = prompts["train"]
        self.val = prompts["val"]
        self.env.ask(self.train + self.val)
        self.one = self.args.max_new_tokens == 1
        if run:
            self.read(Path(run))

    def read(self, run):
        """Rewards and policy; from here on `val` are the prompts in the order of
        the log."""
        env = self.env
        ppo.load_rewards(run / "rewards.safetensors", self.identity, env)
        self.agent = ppo.load_agent(run / "best.safetensors", self.identity)
        self.names = [env.label(action) for action in range(env.noop + 1)]
        rows = {prompt.row["id"]: row for row, prompt in enumerate(env.prompts)}
        known = {"prompt_id": {prompt.row["id"] for prompt in self.val}, "action": set(range(env.noop + 1))}
        for key, values in known.items():
            lost = sorted(set(self.log[key]) - values)
            if lost:
                hub.fail(f"{run}/interventions.jsonl: {key} {lost[0]!r} is unknown to the run's data or mask")
        self.log["name"] = [self.names[action] for action in self.log["action"]]
        self.answers = self.log.drop_duplicates("prompt_id")  # a line per prompt
        self.at = torch.tensor([rows[i] for i in self.answers["prompt_id"]])  # numbers into env.prompts
        self.val = [env.prompts[row] for row in self.at]
        self.tokens = self.log.groupby("n")["token"].agg(list)
        self.picks = self.log[self.log["decided"]].groupby("n")["action"].agg(list)  # a list per prompt
        self.used = set()  # (layer, feature) that the policy chooses
        for action in self.log.loc[self.log["decided"], "action"].unique():
            does = env.describe(action)
            if does:
                self.used.add((does["layer"], does["feature"]))

    @cached_property
    def logprobs(self):
        """(T, n, P) the policy's log-probabilities at the decisions of the log."""
        greedy = ppo.rollout(self.env, self.agent, self.at, greedy=True)
        with torch.no_grad():
            return self.agent.get_policy(greedy.obs).logits[:, :, 0]

    def likeliest(self, n, t):
        """[(action, probability)] of the other choices at token t of prompt n,
        likeliest first."""
        logprobs = self.logprobs[t, n]
        found = []
        for action in logprobs.argsort(descending=True).tolist():
            if self.agent.action_mask[t, action] and action != self.picks[n][t]:
                found.append((action, logprobs[action].exp().item()))
        return found


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


def auc(scores, positive):
    """Area under the ROC curve; None where all outcomes are alike.

    Newcombe's score interval (2006, method 5) has a width at 0 and 1 too."""
    n = int(positive.sum())
    m = int((~positive).sum())
    if not n or not m:
        return None
    a = float(metrics.roc_auc_score(positive, scores))
    z = stats.norm.ppf(0.975)
    half = (n + m) / 2 - 1

    def outside(t):  # positive beyond the interval's ends
        spread = 1 + half * (1 - t) / (2 - t) + half * t / (1 + t)
        return (a - t) ** 2 - z**2 * t * (1 - t) * spread / (n * m)

    low = optimize.brentq(outside, 0, a - 1e-9) if a > 0 else 0.0
    high = optimize.brentq(outside, a + 1e-9, 1) if a < 1 else 1.0
    return {"auc": a, "ci": [low, high], "n": [n, m]}


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


# ---------------------------------------- another decision in its place
@contextmanager
def watched(model, look):
    """While open, look(module, inputs, output) is called after the model's forward
    pass."""
    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def given_else_policy(agent, actions):
    """The choice of Environment.generate(): actions (N, G, T), and the policy's
    where they are FREE."""

    def choose(x, t, rows, columns):
        given = actions[rows][:, columns, t]
        own = agent.get_policy(agent.observe(x, t)).logits.argmax(-1)
        return torch.where(given == FREE, own, given)

    return choose


def with_decision(lab, n, t, action):
    """The T actions of prompt n's answer with another one at token t: the log's
    before it, FREE after it."""
    return lab.picks[n][:t] + [action] + [FREE] * (lab.args.decisions - t - 1)


def answers_with(lab, env, cases):
    """(prompts, answers, places) in which one decision is another.

    A case (n, t, action of env) replaces the decision at token t of prompt n of the
    log. Its answer is answers[row][column], (row, column) being its place."""
    given = {}
    places = []
    for n, t, action in cases:
        own = given.setdefault(n, [])
        places.append((list(given).index(n), len(own)))
        own.append(with_decision(lab, n, t, action))
    width = max(len(own) for own in given.values())
    actions = [own + own[:1] * (width - len(own)) for own in given.values()]
    prompts = [lab.val[n] for n in given]
    choose = given_else_policy(lab.agent, torch.tensor(actions))
    return prompts, env.generate(prompts, choose, width), places


def rewards_with(lab, env, cases):
    """Rewards (N,) of cases as in answers_with()."""
    if not cases:
        return np.zeros(0)
    prompts, answers, places = answers_with(lab, env, cases)
    rewards = env.score_all(prompts, answers)
    return np.array([rewards[place].item() for place in places])


def continued(lab, n, t, action):
    """Answers (--continuations) of prompt n, sampled at --temperature from token t
    on, with `action` there.

    The argmax of logits + temperature x Gumbel noise is a sample of softmax(logits
    / temperature)."""
    env = lab.env
    noise = torch.Generator(env.device).manual_seed(int(lab.rng.integers(2**31)))

    def sample(module, inputs, output):
        uniform = torch.empty_like(output.logits, dtype=torch.float32)
        gumbel = -uniform.exponential_(generator=noise).log()
        output.logits = output.logits.float() + lab.opts.temperature * gumbel

    k = lab.opts.continuations
    actions = torch.tensor([[with_decision(lab, n, t, action)] * k])
    begun = torch.tensor([lab.tokens[n][:t]] * k, dtype=torch.long)
    with watched(env.model, sample):
        return env.generate([lab.val[n]], given_else_policy(lab.agent, actions), k, begun)[0]


# ------------------------------------------------------------- features
def random_actions(lab, actions):
    """(environment, numbers): --draws random features of the same site and strength
    for each of `actions`.

    The environment's first actions are those of the mask, under their numbers."""
    env = ppo.Environment(lab.args, lab.env.model, lab.env.tok, lab.sites, lab.env.ends)
    number_of = {action: number for number, action in enumerate(env.actions)}
    kept = [number_of[action] for action in lab.env.actions]
    drawn = []
    for action in actions:
        site, _, coef = lab.env.actions[action]
        for feature in lab.rng.integers(len(lab.sites[site].directions), size=lab.opts.draws):
            drawn.append(number_of[site, int(feature), coef])
    env.keep(torch.tensor([*kept, *drawn, env.noop]))
    env.ask(lab.val)
    return env, list(range(len(kept), len(kept) + len(drawn)))


def decision_lines(lab):
    """Frame of measured decisions: what a prompt earns with action, no-op and
    random actions.

    The actions take turns, so that rare ones are measured too."""
    draws = lab.opts.draws
    frame = lab.log[lab.log["decided"] & (lab.log["action"] != lab.env.noop)]
    frame = frame.sample(frac=1, random_state=lab.opts.seed)
    frame = frame.assign(turn=frame.groupby("action").cumcount()).sort_values("turn", kind="stable")
    frame = frame.head(lab.opts.decisions).sort_values(["n", "position"])
    env, random = random_actions(lab, frame["action"])
    cases = []
    for i, (n, t) in enumerate(zip(frame["n"], frame["position"], strict=True)):
        cases += [(n, t, action) for action in [env.noop, *random[i * draws : (i + 1) * draws]]]
    rewards = rewards_with(lab, env, cases).reshape(len(frame), 1 + draws)
    lines = []
    for line, (noop, *others) in zip(frame.to_dict("records"), rewards.tolist(), strict=True):
        row = lab.val[line["n"]].row
        found = {"run": lab.name, "id": row["id"], "group": row["group"], "position": line["position"]}
        found |= {"action": line["name"], "reward": line["reward"], "noop": noop, "random": others}
        lines.append(found)
    return pd.DataFrame(lines, columns=DECISION)


def against(decisions):
    """Effects of measured decisions against the no-op and against the mean random
    action."""
    d = decisions.set_index(["id", "group"])[["reward", "noop", "random"]]
    d["random"] = d["random"].map(np.mean)
    d = d.astype(float)
    return {"vs_noop": effect(d["reward"] - d["noop"]), "vs_random": effect(d["reward"] - d["random"])}


def contexts_of(lab, row, acts):
    """Up to five strongest contexts of a feature, [[text, activation], ...] each.

    They are those of its row in features.jsonl, or else of the run's prompts. There
    acts [(tokens - 1,)] are its activations at all tokens but the first."""
    found = []
    for context in row.get("contexts", ())[:5]:
        before, token, after = re.split("[«»]", context["text"])
        found.append([[before, 0], [token, context["activation"]], [after, 0]])
    if found:
        return found
    for n in sorted(range(len(acts)), key=lambda n: -acts[n].max().item())[:5]:
        best = int(acts[n].argmax())
        ids = lab.env.prompts[n].ids[1:]
        around = range(max(0, best - 10), min(len(ids), best + 6))
        if acts[n][best] > 0:
            found.append([[lab.env.tok.decode([ids[t]]), acts[n][t].item()] for t in around])
    return found


def activations(env, site, ids):
    """[(tokens - 1, features)] of 64 prompts: activations of features `ids`,
    without the first position."""
    found = []

    def look(_, h):  # (1, tokens, d)
        x = h[0, 1:]
        if site.sae is None:
            every = x.float() @ site.directions.T.to(x.device)
        else:
            every = site.sae.to(x.device).encode(x.to(site.sae.W_dec.dtype)).float()
        found.append(every[:, ids].clamp(min=0).cpu())
        return h

    with ppo.residual_hook([env.layers[site.layer]], look):
        for prompt in env.prompts[:64] if ids else ():
            env.decoder(torch.tensor([prompt.ids], device=env.device), use_cache=False)
    return found


@torch.no_grad()
def cards(lab, wanted):
    """What the features `wanted` {(layer, number)} are: tokens, activations,
    contexts, neighbours.

    Promoted and suppressed tokens: what the direction adds to the logits straight
    through the last norm."""
    env = lab.env
    head = env.model.get_output_embeddings()
    inside = set(env.layers.modules())
    norms = [m for m in env.model.modules() if "norm" in type(m).__name__.lower() and m not in inside]
    found = []
    for site in lab.sites:
        ids = sorted(feature for layer, feature in wanted if layer == site.layer)
        own = site.directions[ids].to(head.weight)
        logits = (norms[-1](own) - norms[-1](torch.zeros_like(own))) @ head.weight.T  # (n, V), up to a factor
        cosines = site.directions[ids] @ site.directions.T
        near = cosines.topk(min(6, len(site.directions)))
        acts = activations(env, site, ids)
        page = str(site.sae.cfg.metadata.neuronpedia_id) if site.sae is not None else ""
        has_page = re.fullmatch(r"[\w.-]+/[\w.-]+", page)
        for j, feature in enumerate(ids):
            own_acts = [part[:, j] for part in acts]
            values = torch.cat(own_acts)
            top = max(1e-6, values.max().item())
            counts, _ = np.histogram(values[values > 0], bins=10, range=(0, top))
            row = site.names.get(feature, {})
            neighbours = []
            for other, cosine in zip(near.indices[j].tolist(), near.values[j].tolist(), strict=True):
                if other != feature:
                    neighbours.append([other, site.names.get(other, {}).get("name", ""), cosine])
            card = {"layer": site.layer, "feature": feature, "name": row.get("name", "")}
            card |= {"dictionary": site.name, "hash": site.hash}
            for key, sign in (("promoted", 1), ("suppressed", -1)):
                best = (sign * logits[j].float()).topk(8).indices.tolist()
                card[key] = [env.tok.decode([token]) for token in best]
            card |= {"tokens": len(values), "active": counts.sum(), "density": counts.sum() / len(values)}
            card |= {"density_corpus": row.get("density"), "top": top, "histogram": counts.tolist()}
            card |= {"contexts": contexts_of(lab, row, own_acts), "neighbours": neighbours[:5]}
            card["url"] = f"https://www.neuronpedia.org/{page}/{feature}" if has_page else None
            found.append(card)
    return found


@cache
def features(lab):
    """What the policy's actions are and do, where picked (measured) and on all
    prompts with known rewards.

    Returns the result and the lines of each JSONL file, as all commands do. The
    viewer shows the same."""
    prompts = lab.env.prompts
    decided = lab.log[lab.log["decided"]]
    counted = decision_lines(lab)
    reward = pd.DataFrame(lab.env.memo.float().numpy(), index_of(prompts), lab.names, dtype=float)
    gain = reward.sub(reward[NOOP], axis=0)
    part = np.where(np.arange(len(prompts)) < len(lab.train), "train", "val")
    picks = decided["name"].value_counts()
    per_prompt = decided.drop_duplicates(["prompt_id", "name"]).groupby(["name", "outcome"]).size()
    shown = {*picks.index, *reward.dropna(axis=1, how="all")}
    actions = []
    for name in sorted(shown, key=lambda name: (-picks.get(name, 0), name)):
        mine = counted[counted["action"] == name]
        d = gain[name]
        action = {"name": name, "steering": lab.env.describe(lab.names.index(name))}
        action["picks"] = picks.get(name, 0)
        action |= {outcome: per_prompt.get((name, outcome), 0) for outcome in OUTCOMES}
        action |= {"measured": len(mine), **against(mine), "tried": d.count()}
        action |= {"sets_right": (d > 0).sum(), "sets_wrong": (d < 0).sum()}
        for own in ("val", "train"):
            action[own] = effect(d[part == own]) if name != NOOP else None
        actions.append(action)
    steering = [action["steering"] for action in actions if action["steering"]]
    every = {(does["layer"], does["feature"]) for does in steering}
    lines = []
    for n, kind in enumerate(classes_of(prompts, reward[NOOP])):
        row = prompts[n].row
        line = {"run": lab.name, "part": part[n], "id": row["id"], "group": row["group"], "class": kind}
        lines.append(line | {"rewards": reward.iloc[n].dropna().to_dict()})
    outcomes = lab.answers["outcome"].value_counts()
    result = {"task": lab.args.task, "prompts": len(lab.val), "tokens": len(lab.log)}
    result |= {"decisions": len(decided)} | {outcome: outcomes.get(outcome, 0) for outcome in OUTCOMES}
    result |= {"actions_used": len(picks), "entropy": stats.entropy(picks), "measured": len(counted)}
    result |= against(counted) | {"actions": actions}
    result["features"] = cards(lab, every if len(actions) <= 100 else lab.used)
    return result, {"table": lines, "decisions": counted.to_dict("records")}


def shared(a, b):
    """The flags in which two runs differ, and the features that both policies
    choose.

    Per common dictionary, against random sets of these sizes (hypergeometric
    test)."""
    common = []
    others = {(site.layer, site.hash) for site in b.sites}
    for site in a.sites:
        if (site.layer, site.hash) not in others:
            continue
        x = {feature for layer, feature in a.used if layer == site.layer}
        y = {feature for layer, feature in b.used if layer == site.layer}
        size = len(site.directions)
        both = sorted(x & y)
        row = {"layer": site.layer, "dictionary": size, "first": len(x), "second": len(y), "both": len(both)}
        row["expected"] = len(x) * len(y) / size
        row["p"] = stats.hypergeom.sf(len(both) - 1, size, len(x), len(y))
        row["features"] = " ".join(map(str, both))
        common.append(row)
    flags = []
    for key, value in vars(a.args).items():
        other = getattr(b.args, key)
        if value != other:
            flags.append({"flag": key, "first": str(value), "second": str(other)})
    return {"flags": flags, "shared": common}


# --------------------------------------------------------------- branch
def right_shares(lab, n):
    """P probabilities, at --temperature, that the letter for prompt n is right
    under each action."""
    env = lab.env
    seen = []

    def look(module, inputs, output):  # logits (1, G, V); decode() asks anew where some are not finite
        logits = output.logits[0].float().cpu()
        if len(logits) == 1 or logits.amax(-1).isfinite().all():
            seen.append(logits)

    every = torch.arange(env.noop + 1)[None, :, None]
    with watched(env.model, look):
        env.generate([lab.val[n]], ppo.fixed(every), env.noop + 1)
    logits = torch.cat(seen) / lab.opts.temperature
    letters = sorted(set(env.letters[lab.val[n].row["answer"]]))
    shares = (logits[:, letters].logsumexp(1) - logits.logsumexp(1)).exp()
    return shares.nan_to_num(0.0).tolist()  # not-a-number is no right answer


def alternatives(lab):
    """(cases as in answers_with(), lines): other decisions and what the answer
    would earn with them.

    One decision an answer: all actions of the mask, whose rewards are known.
    Several: the policy's next three and the no-op, one decision at a time."""
    cases = []
    lines = []
    changed = lab.answers["outcome"].isin(OUTCOMES[:2]).tolist()
    order = sorted(lab.rng.permutation(len(lab.val)).tolist(), key=lambda n: not changed[n])
    for n in order[: lab.opts.branch_prompts]:
        row = lab.val[n].row
        for t, own in enumerate(lab.picks[n]):
            line = {"run": lab.name, "id": row["id"], "prompt": row["prompt"][:60], "position": t}
            line |= {"chosen": lab.names[own], "reward": lab.answers["reward"].iloc[n]}
            line |= {"right": None, "instead_right": None, "p_holm": None, "confirmed": False}
            for rank, (action, probability) in enumerate(lab.likeliest(n, t)):
                if lab.args.decisions == 1 or rank < 3 or action == lab.env.noop:
                    cases.append((n, t, action))
                    lines.append(line | {"instead": lab.names[action], "probability": probability})
    if lab.args.decisions == 1:
        rewards = [lab.env.memo[lab.at[n], action].item() for n, _, action in cases]
    else:
        rewards = rewards_with(lab, lab.env, cases).tolist()
    for line, reward in zip(lines, rewards, strict=True):
        line["instead_reward"] = reward
    return cases, lines


def confirm(lab, cases, lines, flips):
    """Fills right, instead_right, p_holm and confirmed of the likeliest of the
    lines numbered `flips`.

    One-token answers have exact probabilities. Of long answers two flips a prompt
    are tested on sampled continuations, by Barnard's exact test with Holm's
    correction."""
    k = lab.opts.continuations
    tests = Counter()
    shares = {}
    p_values = {}
    for i in sorted(flips, key=lambda i: -lines[i]["probability"]):
        n, t, instead = cases[i]
        chosen = lab.picks[n][t]
        tests[n] += 1
        if lab.one:
            if n not in shares:
                shares[n] = right_shares(lab, n)
            right = shares[n][chosen]
            instead_right = shares[n][instead]
            p_values[i] = 0.0
        elif tests[n] <= 2:
            answers = [continued(lab, n, t, chosen), continued(lab, n, t, instead)]
            x, y = lab.env.score_all([lab.val[n]] * 2, answers).sum(1).int().tolist()
            right = x / k
            instead_right = y / k
            p_values[i] = 1.0
            if x != y:
                p_values[i] = min(1.0, stats.barnard_exact([[x, y], [k - x, k - y]]).pvalue)
        else:
            continue
        lines[i] |= {"right": right, "instead_right": instead_right}
    for i, p in holm(pd.Series(p_values, dtype=float)).items():
        line = lines[i]
        line["p_holm"] = None if lab.one else p
        expected = (line["right"] - line["instead_right"]) * (line["reward"] - line["instead_reward"])
        line["confirmed"] = bool(expected > 0 and p < 0.05)


def branches(lab):
    """Which decisions mattered: others take their place, and flips of the reward
    are tested."""
    cases, lines = alternatives(lab)
    flips = [i for i, line in enumerate(lines) if line["reward"] != line["instead_reward"]]
    confirm(lab, cases, lines, flips)
    found = [line for line in lines if line["confirmed"]]
    found.sort(key=lambda line: -abs(line["right"] - line["instead_right"]))
    flipped = [lines[i] for i in flips]
    result = {"prompts": len({line["id"] for line in lines}), "tried": len(lines), "flips": len(flips)}
    result["tested"] = sum(line["right"] is not None for line in lines)
    result["flipped_prompts"] = len({line["id"] for line in flipped})
    result["noop_flips"] = sum(line["instead"] == NOOP for line in flipped)
    result["confirmed"] = len(found)
    sampled = f"{lab.opts.continuations} sampled continuations of either"
    result["by"] = "exact probabilities" if lab.one else sampled
    return result | {"top": found[:15]}, {"branch": lines}


# --------------------------------------------------------------- critic
def critic(lab):
    """The values of the log against what V was trained to predict, the gain over
    the unsteered answer."""
    log = lab.log[lab.log["decided"]]
    log = log.assign(gain=log["reward"] - log["unsteered_reward"])
    by_position = []
    for t, at in log.groupby("position"):
        v = at["value"].to_numpy()
        y = at["gain"].to_numpy()
        explained = 1 - (y - v).var() / y.var() if np.ptp(y) else None
        row = {"position": t, "n": len(at), "auc": auc(v, y > 0), "auc_right": auc(v, at["reward"] > 0.5)}
        by_position.append(row | {"explained_variance": explained})
    first = log[log["position"] == 0].sort_values("value", kind="stable")
    bins = []
    for rows in np.array_split(np.arange(len(first)), min(10, len(first))):
        part = first.iloc[rows]
        bins.append({"n": len(part), "value": part["value"].mean(), "gain": part["gain"].mean()})
    seen = by_position[0]["auc"]
    tells = "tells" if seen and seen["ci"][0] > 0.5 else "is not shown to tell"
    result = {"n": len(first), "verdict": f"V {tells} what steering sets right from the rest"}
    off = sum(part["n"] * abs(part["value"] - part["gain"]) for part in bins)
    result["calibration_error"] = off / len(first)
    return result | {"by_position": by_position, "calibration": bins}, {}


# ------------------------------------------------------------------ map
def read_at(env, layers, prompts):
    """What a policy at each of L layers would read of N prompts, unsteered: (N, L,
    k); 0 where nothing is."""
    found = {}
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
    for rows in torch.tensor(order).split(env.args.batch_size):
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

    Returns rows with held-out accuracy and learning curve, and {layer: (N,)
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
        parts = {"train_sizes": (0.25, 0.5, 0.75, 1.0), "shuffle": True, "random_state": lab.opts.seed}
        with warnings.catch_warnings(action="ignore"):  # few prompts may hold one class only, which gives NaN
            sizes, _, curve = ms.learning_curve(probe, x, classes, cv=folds, **parts)
            curve = np.nanmean(curve, axis=1)
        for size, share in zip(sizes, curve, strict=True):
            row[f"{size} samples"] = share
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
    for layer in layers:
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
    index = index_of(prompts)
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
        row |= {"tried": reward.shape[1] - 1, "unsteered": plain.mean()}
        row["to_right"] = int((reward[:, 1:] > plain[:, None]).sum())
        row["to_wrong"] = int((reward[:, 1:] < plain[:, None]).sum())
        row["coverage"] = covered(reward, plain, folds, lab.args.pool).mean()
        row["constant"] = served(reward, nothing, folds).mean()
        row["switch"] = served(reward, classes, folds).mean()
        row["ceiling"] = ceiling.mean()
        row["gain"] = effect(pd.Series(ceiling - plain, index))
        row["sae_minus_random"] = None
        if kind != "random" and wrong.any():
            noise = cells[layer, "random", coef]
            row["sae_minus_random"] = two_way(opts, reward[wrong, 1:], noise[wrong, 1:], groups[wrong])
        table.append(row)
        cell_line = {"run": lab.name, "layer": layer, "directions": kind, "coef": coef}
        for n, prompt in enumerate(prompts):
            line = cell_line | {"id": prompt.row["id"], "group": prompt.row["group"], "class": classes[n]}
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


# --------------------------------------------------------------- viewer
@torch.no_grad()
def read_through(env, prompt, tokens, actions):
    """Log-probabilities (2, T, V) of what follows a prompt and each prefix of its
    answer (T tokens).

    They are unsteered, and with actions (T,) at these tokens."""
    ids = torch.tensor([prompt.ids + tokens[:-1]], device=env.device)
    T = len(tokens)
    actions = torch.tensor(actions, device=env.device)

    def edit(site, h):  # (1, L, d)
        return torch.cat([h[:, :-T], env.add(site, h[:, -T:], actions[None])], 1)

    plain = env.model(ids, use_cache=False, logits_to_keep=T).logits[0]
    with ppo.residual_hook(env.steered_layers, edit):
        steered = env.model(ids, use_cache=False, logits_to_keep=T).logits[0]
    return torch.stack([plain, steered]).float().log_softmax(-1).cpu()


def view_tokens(lab, n, number_of):
    """The tokens of prompt n's answer as the page shows them; number_of: an
    action's name -> its number."""
    env = lab.env
    lines = lab.log[lab.log["n"] == n].to_dict("records")
    acting = [line["action"] if line["steering"] else env.noop for line in lines]
    logprobs = read_through(env, lab.val[n], lab.tokens[n], acting)
    shown = []
    for t, line in enumerate(lines):
        token = {key: line[key] for key in ("decided", "value", "logprob", "entropy", "mask_size")}
        token |= {"text": line["token_text"], "plain": line["unsteered_token_text"], "others": []}
        token["next"] = []
        for row in logprobs[:, t].flip(0):  # steered, unsteered
            best = row.topk(5)
            words = [env.tok.decode([other]) for other in best.indices]
            token["next"].append(list(zip(words, best.values.exp().tolist(), strict=True)))
        token["effect"] = float(logprobs[1, t, line["token"]] - logprobs[0, t, line["token"]])
        for action, probability in lab.likeliest(n, t)[:3] if line["decided"] else ():
            if lab.names[action] in number_of:
                token["others"].append([number_of[lab.names[action]], probability])
        token["action"] = number_of[line["name"]] if line["steering"] or line["decided"] else None
        shown.append(token)
    return shown


def view(lab, data):
    """Adds a run to the page's data. Features and actions are a run's own: the
    cards show its prompts."""
    found = features(lab)[0]
    env = lab.env
    run = len(data["runs"])
    about = {"name": lab.name, "task": lab.args.task, "model": lab.identity["model"]}
    data["runs"].append(about | {"layer": lab.identity["layer"]})
    for card in found["features"]:
        data["features"][f"{run}:{card['layer']}:{card['feature']}"] = card
    number_of = {}
    for action in found["actions"]:
        number_of[action["name"]] = len(data["actions"])
        does = action["steering"] or {"layer": None, "feature": None}
        key = f"{run}:{does['layer']}:{does['feature']}"
        card = key if key in data["features"] else None
        data["actions"].append(action | {"run": run, "card": card})
    for n, prompt in enumerate(lab.val):
        row = prompt.row
        options = [f"{chr(65 + j)}. {choice}" for j, choice in enumerate(row["choices"] or ())]
        answer = lab.answers.iloc[n]
        plain = env.completions[lab.at[n]][env.noop]
        shown = {"run": run, "id": row["id"], "prompt": "\n".join([row["prompt"], *options])}
        shown["gold"] = options[row["answer"]] if options else row["answer"]
        shown["outcome"] = OUTCOMES.index(answer["outcome"])
        shown["reward"] = [answer["reward"], answer["unsteered_reward"]]
        shown["plain"] = env.tok.decode(plain, skip_special_tokens=True)
        shown["tokens"] = view_tokens(lab, n, number_of)
        data["prompts"].append(shown)
    counts = {key: len(found[key]) for key in ("features", "actions")}
    return {"prompts": len(lab.val)} | counts, {}


def write_viewer(out, data):
    """Writes viewer.html. jinja2 escapes what could end the data's script."""
    template = Path(__file__).with_name("viewer_template.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template).render(data=finite(data))
    hub.write_atomically(out / "viewer.html", lambda temporary: temporary.write_text(page, "utf-8"))


# ------------------------------------------------------ report and main
COMMANDS = {"features": features, "branch": branches, "critic": critic, "map": atlas, "viewer": view}
HEAD = """# What the policy does

Intervals are 95 %. Effects are differences of reward, paired by prompt. Features: vs_noop and vs_random are
measured where an action was picked; val and train are over all prompts with known rewards. Map, held out:
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


def cell(value):
    """A value of the report in one line that is harmless in Markdown tables and in
    HTML."""
    if isinstance(value, dict) and "ci" in value:
        middle = value.get("mean", value.get("auc"))
        value = "{:.3g} ({:.3g} to {:.3g})".format(middle, *value["ci"])
    if value is None:
        value = "-"
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return str(escape(" ".join(text.split())[:160])).replace("|", "&#124;").replace("`", "&#96;")


def report(results):
    """report.md: per command and run what is one value as a list, and lists of
    dicts as tables."""
    text = [HEAD]
    for name, runs in results.items():
        for run, result in runs.items():
            text.append(f"## {name}: {cell(run)}")
            ones = []
            tables = []
            for key, value in result.items():
                if isinstance(value, list) and value:
                    columns = [c for c, v in value[0].items() if not isinstance(v, list)]
                    columns = [c for c in columns if c not in ("run", "id", "hash", "steering")]
                    more = f", the first 30 of {len(value)}" if len(value) > 30 else ""
                    tables.append(f"### {key}{more}")
                    tables.append(markdown({c: [cell(row[c]) for row in value[:30]] for c in columns}))
                elif not isinstance(value, list):
                    ones.append(f"- {key}: {cell(value)}")
            text.append("\n".join(ones))
            text += tables
    return "\n\n".join(filter(None, text)) + "\n"


def check_flags(opts):
    """Refuse impossible flags before anything heavy is loaded."""
    if opts.command not in ("all", *COMMANDS):
        hub.fail(f"unknown command {opts.command!r}; one of {', '.join(COMMANDS)}, or none for all")
    counts = "decisions draws branch_prompts continuations directions prompts probe_samples"
    for name in counts.split():
        if getattr(opts, name) < 1:
            hub.fail(f"--{name.replace('_', '-')} {getattr(opts, name)}: must be at least 1")
    for name, values in (("temperature", [opts.temperature]), ("coef", opts.coef)):
        for value in values:
            if not 0 < value < math.inf:
                hub.fail(f"--{name} {value}: must be above 0")
    for name, values in (("seed", [opts.seed]), ("layer", opts.layer)):
        for value in values:
            if value < 0:
                hub.fail(f"--{name} {value}: must be at least 0")
    if not opts.run and not (opts.task and opts.command in ("map", "all")):
        hub.fail(f"{opts.command} needs --run runs/RUN; what works without a run is map --task TASK")
    if len({Path(run).name for run in opts.run}) < len(opts.run):
        hub.fail(
            f"--run {' '.join(opts.run)}: two have the same name; results are kept by it, so give each once"
        )


def main(opts):
    """Run a command, or all; returns {command: {run: result}}."""
    check_flags(opts)
    for run in opts.run:
        ppo.stored_args(run)
    hub.check_out(Path(opts.out or Path(*opts.run[:1]) / "analysis"))
    names = [opts.command]
    if opts.command == "all":
        names = list(COMMANDS) if opts.run else ["map"]
    out = Path(opts.out or Path(*opts.run[:1]) / "analysis")
    labs = []
    lines = {}
    results = {name: {} for name in names}
    data = {"runs": [], "features": {}, "actions": [], "prompts": []}
    for run in opts.run or (None,):
        lab = Lab(opts, run)
        labs.append(lab)
        for name in names:
            print(f"{name}: {lab.name}", flush=True)
            result, found = view(lab, data) if name == "viewer" else COMMANDS[name](lab)
            results[name][lab.name] = finite(result)
            for file, rows in found.items():
                lines.setdefault(file, [])
                lines[file] += [{"schema": SCHEMA} | finite(row) for row in rows]
        del lab.env  # one model in memory at a time
    if "features" in names:
        for a, b in combinations(labs, 2):
            results["features"][f"{a.name} and {b.name}"] = finite(shared(a, b))
    out.mkdir(parents=True, exist_ok=True)
    if "viewer" in names:
        write_viewer(out, data)
    for file, rows in lines.items():
        hub.write_jsonl(out / f"{file}.jsonl", rows)
    for name, result in results.items():
        record = {"schema": SCHEMA, "command": name, "flags": vars(opts), "result": result}
        hub.write_json(out / f"{name}.json", record)
    text = report(results)
    hub.write_atomically(out / "report.md", lambda temporary: temporary.write_text(text, "utf-8"))
    print(f"report.md, {', '.join(f'{name}.json' for name in results)} are in {out}")
    return results


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        hub.fail("interrupted; nothing was written")
    except OSError as e:
        hub.fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}")
