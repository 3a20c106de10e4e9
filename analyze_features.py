"""From interventions to understanding: what a trained policy does, what that changes, and what limits it.

    python analyze_features.py --run runs/RUN [runs/OTHER ...]   # every analysis, in this order
    python analyze_features.py features --run runs/RUN           # one of them
    python analyze_features.py map --task bbq_ambig              # before anyone trains

  features  what each action says and does; is it a letter switch? against the no-op and random features
  critic    values against outcomes: AUC, calibration; does V tell what steering sets right?
  viewer    viewer.html: one self-contained page to look at every prompt, token, action and feature
  permute   the options in another order: does the answer follow the content or the letter?
  branch    decisions that mattered: another one in their place flips the outcome
  map       layers x directions x strengths: probe, effects, ceiling, SAE against random, the policy's regret

Each is written to --out as soon as it is finished: COMMAND.json, a picture COMMAND-RUN.png, report.md,
viewer.html, and the lines that the numbers are counted from: table.jsonl (a line per prompt with the rewards
of its actions), decisions.jsonl (measured decision), permute.jsonl (prompt and rotation), branch.jsonl
(alternative), map.jsonl (prompt in a cell). An action is named "layer:feature name x strength".
"""

import copy
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

import tyro

import crl_hub as hub


@dataclass
class Args:
    command: tyro.conf.Positional[str] = "all"
    """features, critic, viewer, permute, branch, map or all"""
    run: tuple[str, ...] = ()
    """run directories of crl_ppo.py"""
    out: str | None = None
    """where the results go (default: analysis/ in the first run; without a run analysis/ here)"""
    seed: int = 0
    """seed of every draw: features, prompts, continuations, bootstrap"""
    data_dir: str | None = None
    """local mirror of the data, if not the one the run recorded"""
    # --- features ---
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
    # --- map, permute ---
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
    """validation prompts on which they are tried; as many are asked again by permute"""
    probe_samples: int = 400
    """training prompts that the probe is fitted on"""


if __name__ == "__main__":
    ARGS = hub.tyro_cli(Args, description=__doc__)  # before the heavy imports: --help answers at once

import numpy as np
import pandas as pd
import torch
from scipy import optimize, stats
from sklearn import metrics
from tqdm import tqdm

import crl_ppo as ppo
import crl_viewer
from crl_draw import FEW, PICTURES, finite, picture_name, report
from crl_map import atlas, classes_of, effect, index_of, share
from crl_stats import holm
from crl_tasks import SWITCH, encode_prompt, is_switch, kind_of, named_option
from crl_viewer import OUTCOMES, READ, cards, watched, write_viewer

SCHEMA = 4  # version of the files in --out
FIELDS = {"schema": int, "decided": bool, "steering": (dict, type(None))}  # of the log
FIELDS |= dict.fromkeys(("prompt_id", "token_text", "unsteered_token_text"), str)
FIELDS |= dict.fromkeys(("position", "token", "unsteered_token", "action", "mask_size"), int)
FIELDS |= dict.fromkeys(("logprob", "value", "entropy", "reward", "unsteered_reward"), (int, float))
DECISION = ["run", "id", "group", "position", "action", "reward", "noop", "random"]  # of decisions.jsonl
NOOP = "no-op"
FREE = -1  # instead of an action: the policy decides


# -------------------------------------------------------- a run's files
def read_log(path):
    """interventions.jsonl as a frame, with each line's outcome. Bad lines are refused by number and field."""
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
    """A run: environment, log, rewards and policy. Without a run (map): environment and prompts of --task."""

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
        self.shots = prompts["shots"]
        self.env.ask(self.train + self.val)
        self.one = self.args.max_new_tokens == 1
        if run:
            self.read(Path(run))

    def read(self, run):
        """Rewards and policy; from here on `val` are the prompts in the order of the log."""
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
        self.counted = None  # decision_lines(), once features() has measured them
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
        """[(action, probability)] of the other choices at token t of prompt n, likeliest first."""
        logprobs = self.logprobs[t, n]
        found = []
        for action in logprobs.argsort(descending=True).tolist():
            if self.agent.action_mask[t, action] and action != self.picks[n][t]:
                found.append((action, logprobs[action].exp().item()))
        return found


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


# ---------------------------------------- another decision in its place
def given_else_policy(agent, actions):
    """The choice of Environment.generate(): actions (N, G, T), and the policy's where they are FREE."""

    def choose(x, t, rows, columns):
        given = actions[rows][:, columns, t]
        own = agent.get_policy(agent.observe(x, t)).logits.argmax(-1)
        return torch.where(given == FREE, own, given)

    return choose


def with_decision(lab, n, t, action):
    """The T actions of prompt n's answer with another one at token t: the log's before it, FREE after it."""
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
    """Answers (--continuations) of prompt n, sampled at --temperature from token t on, with `action` there.

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
    """(environment, numbers): --draws random features of the same site and strength for each of `actions`.

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
    """Frame of measured decisions: what a prompt earns with action, no-op and random actions.

    The actions take turns, so that rare ones are measured too."""
    draws = lab.opts.draws
    frame = steering_decisions(lab)
    frame = frame.sample(frac=1, random_state=lab.opts.seed)
    frame = frame.assign(turn=frame.groupby("action").cumcount()).sort_values("turn", kind="stable")
    frame = frame.head(lab.opts.decisions).sort_values(["n", "position"])
    env, random = random_actions(lab, frame["action"])
    # of one decision the log knows what the no-op earns
    unknown = [env.noop] if lab.args.decisions > 1 else []
    cases = []
    for i, (n, t) in enumerate(zip(frame["n"], frame["position"], strict=True)):
        cases += [(n, t, action) for action in [*unknown, *random[i * draws : (i + 1) * draws]]]
    rewards = rewards_with(lab, env, cases).reshape(len(frame), len(unknown) + draws)
    if not unknown:
        rewards = np.hstack([frame[["unsteered_reward"]], rewards])
    return measured_lines(lab, frame, rewards)


def steering_decisions(lab):
    """The log's decisions for an action other than the no-op."""
    return lab.log[lab.log["decided"] & (lab.log["action"] != lab.env.noop)]


def measured_lines(lab, frame, rewards):
    """The lines of decisions.jsonl for rows of the log; rewards (n, 1 + random), the no-op's first."""
    lines = []
    for line, (noop, *others) in zip(frame.to_dict("records"), rewards.tolist(), strict=True):
        row = lab.val[line["n"]].row
        found = {"run": lab.name, "id": row["id"], "group": row["group"], "position": line["position"]}
        found |= {"action": line["name"], "reward": line["reward"], "noop": noop, "random": others}
        lines.append(found)
    return pd.DataFrame(lines, columns=DECISION)


def against(decisions):
    """Effects of measured decisions against the no-op and against the mean random action."""
    d = decisions.set_index(["id", "group"])[["reward", "noop", "random"]]
    d["random"] = [np.mean(random) if random else math.nan for random in d["random"]]
    d = d.astype(float)
    return {"vs_noop": effect(d["reward"] - d["noop"]), "vs_random": effect(d["reward"] - d["random"])}


# ------------------------------------------------- what is said: letters, refusals
def classes_said(prompts):
    """The classes of answers to these prompts: letters, or "refusal"; [] where answers have none."""
    if any(kind_of(prompt.row) is None for prompt in prompts):
        return []
    most = max(len(prompt.row["choices"] or ()) for prompt in prompts)
    return [chr(65 + j) for j in range(most)] or ["refusal"]


def said(env, row, tokens):
    """The class of an answer (token ids) to a row: its letter or "refusal"; else "other".

    It is what the task's rule takes it for, so an unreadable answer is no refusal."""
    if not row["choices"]:
        return "refusal" if env.score(row | {"answer": "unsafe"}, tokens)[0] else "other"
    number = named_option(env, row, tokens)
    return "other" if number is None else chr(65 + number)


def mostly(classes):
    """(the commonest of the answers, its share, whether one letter is given so often that it is a switch)."""
    word, count = Counter(classes).most_common(1)[0]
    letters = [word if len(word) == 1 else None for word in classes]
    return word, count / len(classes), is_switch(letters)


@cache
def said_table(lab):
    """{action or "policy": [(prompt, class, reward)]} of the run's own stored answers; {} without classes."""
    env = lab.env
    found = {"policy": []}
    if not classes_said(env.prompts):
        return {}
    for row, known in enumerate(env.completions):
        prompt = env.prompts[row]
        for action, tokens in known.items():
            answer = (prompt, said(env, prompt.row, tokens), env.memo[row, action].item())
            found.setdefault(lab.names[action], []).append(answer)
    for n, reward in zip(lab.answers["n"], lab.answers["reward"], strict=True):
        tokens = [token for token in lab.tokens[n] if token >= 0]
        found["policy"].append((lab.val[n], said(env, lab.val[n].row, tokens), reward))
    return found


def answer_table(lab, picks):
    """Rows of the table action x answer, by how often the policy chooses the action (picks {name: count}).

    tried: prompts with a stored answer under it; then the share of each class, and of right answers."""
    table = said_table(lab)
    classes = [*classes_said(lab.env.prompts), "other"]
    rows = []
    picks = picks | {"policy": sum(picks.values())}
    first = {"policy": -2, NOOP: -1}
    for name in sorted(table, key=lambda name: (first.get(name, 0), -picks.get(name, 0))):
        answers = table[name]
        counts = Counter(word for _, word, _ in answers)
        row = {"action": name, "picks": picks.get(name, 0), "tried": len(answers)}
        row |= {word: counts[word] / len(answers) for word in classes}
        row["right"] = float(np.mean([reward for *_, reward in answers]))
        row["switch"] = mostly([word for _, word, _ in answers])[2]
        rows.append(row)
    return rows


def switches(rows, picks, names):
    """The share of the policy's decisions whose action is a letter switch, with and without the no-op.

    {} where not every action was tried alone. rows have "action" and "switch"; picks {name: decisions};
    names: all actions of the mask."""
    known = {row["action"]: row["switch"] for row in rows}
    if not set(names) <= set(known):
        return {}
    total = sum(picks.values())
    hits = sum(count for name, count in picks.items() if known[name])
    noops = picks.get(NOOP, 0) if known[NOOP] else 0
    found = {"switch_actions": sum(known[name] for name in names), "switch_share": hits / total}
    found["switch_share_without_noop"] = (hits - noops) / total
    text = f"{hits / total:.0%} of {total} decisions are letter switches: actions that give one letter"
    return found | {"switch_verdict": f"{text} on at least {SWITCH:.0%} of their prompts"}


@cache
def accuracies(lab):
    """{unsteered, policy, constant: share right of the validation prompts}."""
    env = lab.env
    actions = lab.agent.constant
    if lab.args.decisions == 1:
        constant = env.memo[lab.at, actions[0]].numpy()
    else:
        answers = env.generate(lab.val, ppo.fixed(actions.expand(len(lab.val), 1, -1)), 1)
        constant = env.score_all(lab.val, answers)[:, 0].numpy()
    earned = {"unsteered": lab.answers["unsteered_reward"], "policy": lab.answers["reward"]}
    earned["constant"] = constant
    return {who: share(np.array(values), lab.val) for who, values in earned.items()}


def action_rows(lab, counted, picks, answers):
    """A dict per action of the mask, by use: what it was chosen for, says and changes.

    counted: decision_lines(); picks {name: decisions}; answers: answer_table(). train and val are over all
    prompts with known rewards."""
    prompts = lab.env.prompts
    decided = lab.log[lab.log["decided"]]
    reward = pd.DataFrame(lab.env.memo.float().numpy(), index_of(prompts), lab.names, dtype=float)
    gain = reward.sub(reward[NOOP], axis=0)
    in_train = np.arange(len(prompts)) < len(lab.train)
    per_prompt = decided.drop_duplicates(["prompt_id", "name"]).groupby(["name", "outcome"]).size()
    says = {row["action"]: row for row in answers}
    rows = []
    for name in sorted(lab.names, key=lambda name: (-picks.get(name, 0), name)):
        mine = counted[counted["action"] == name]
        d = gain[name]
        row = {"name": name, "steering": lab.env.describe(lab.names.index(name))}
        row["picks"] = picks.get(name, 0)
        row |= {outcome: per_prompt.get((name, outcome), 0) for outcome in OUTCOMES}
        row |= {"measured": len(mine), **against(mine), "tried": d.count()}
        row |= {"sets_right": (d > 0).sum(), "sets_wrong": (d < 0).sum()}
        row["val"] = effect(d[~in_train]) if name != NOOP else None
        row["train"] = effect(d[in_train]) if name != NOOP else None
        row["says"] = says.get(name)
        rows.append(row)
    return rows


@cache
def known_cards(lab):
    """cards() of the mask's features; of a very large mask, of those that the policy chooses."""
    steering = [lab.env.describe(action) for action in range(lab.env.noop)]
    every = {(does["layer"], does["feature"]) for does in steering}
    return cards(lab, every if len(lab.names) <= 100 else lab.used)


def summary(lab, counted):
    """What `features` reports and the viewer shows."""
    decided = lab.log[lab.log["decided"]]
    picks = decided["name"].value_counts().to_dict()
    outcomes = lab.answers["outcome"].value_counts()
    rows = answer_table(lab, picks)
    result = {"task": lab.args.task, "prompts": len(lab.val), "tokens": len(lab.log)}
    result |= accuracies(lab)
    result |= {"decisions": len(decided)} | {outcome: outcomes.get(outcome, 0) for outcome in OUTCOMES}
    if lab.val[0].row["choices"]:
        result |= switches(rows, picks, lab.names)
    result["actions_used"] = len(picks)
    result["entropy"] = stats.entropy(list(picks.values()))
    result["measured"] = len(counted)
    result |= against(counted) | {"answers": rows}
    result["actions"] = action_rows(lab, counted, picks, rows)
    return result | {"features": known_cards(lab)}


def features(lab):
    """What the policy's actions are and do, where picked (measured) and on all prompts with known rewards.

    Returns the result and the lines of each JSONL file, as all commands do."""
    lab.counted = decision_lines(lab)
    prompts = lab.env.prompts
    reward = pd.DataFrame(lab.env.memo.float().numpy(), columns=lab.names, dtype=float)
    lines = []
    for n, kind in enumerate(classes_of(prompts, reward[NOOP])):
        row = prompts[n].row
        part = "train" if n < len(lab.train) else "val"
        line = {"run": lab.name, "part": part, "id": row["id"], "group": row["group"], "class": kind}
        lines.append(line | {"rewards": reward.iloc[n].dropna().to_dict()})
    return summary(lab, lab.counted), {"table": lines, "decisions": lab.counted.to_dict("records")}


def shared(a, b):
    """The flags in which two runs differ, and the features that both policies choose.

    Per common dictionary, against random sets of these sizes (hypergeometric test)."""
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
    """P probabilities, at --temperature, that the letter for prompt n is right under each action."""
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
    """(cases as in answers_with(), lines): other decisions and what the answer would earn with them.

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
    """Fills right, instead_right, p_holm and confirmed of the likeliest of the lines numbered `flips`.

    One-token answers have exact probabilities. Of long answers two flips a prompt
    are tested on sampled continuations, by Barnard's exact test with Holm's
    correction."""
    k = lab.opts.continuations
    tests = Counter()
    shares = {}
    p_values = {}
    order = sorted(flips, key=lambda i: -lines[i]["probability"])
    for i in tqdm(order, desc="flips", leave=False, delay=2):
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
    """Which decisions mattered: others take their place, and flips of the reward are tested."""
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
    """The values of the log against what V was trained to predict, the gain over the unsteered answer."""
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


# --------------------------------------------------------------- viewer
def stored_decisions(lab, out):
    """The run's lines of decisions.jsonl, if `features` was run before; else what the log tells by itself."""
    path = out / "decisions.jsonl"
    lines = []
    if path.is_file():
        fields = {"run": str, "id": str, "group": str, "action": str, "random": list}
        fields |= {"reward": (int, float), "noop": (int, float)}
        lines = [line for _, line in hub.read_jsonl(path, fields=fields) if line["run"] == lab.name]
    if lines and {line["action"] for line in lines} <= set(lab.names):
        return pd.DataFrame(lines, columns=DECISION)
    frame = steering_decisions(lab)
    if lab.args.decisions > 1:  # what one decision changed is not known
        frame = frame[:0]
    return measured_lines(lab, frame, frame[["unsteered_reward"]].to_numpy())


def view(lab, data):
    """Adds a run to the page's data."""
    if lab.counted is None:
        lab.counted = stored_decisions(lab, folder(lab.opts))
    classes = [*classes_said(lab.env.prompts), "other"]
    count = crl_viewer.add_run(lab, summary(lab, lab.counted), said_table(lab), classes, data)
    result = {"prompts": len(lab.val), "actions": len(lab.names), "tokens": len(lab.log)}
    return result | {"tokens_replayed_otherwise": count}, {}


# -------------------------------------------------------------- permute
def rotated(lab, prompt, k):
    """The prompt with its n options k letters further down: option j stands at (j + k) % n."""
    row = prompt.row
    n = len(row["choices"])
    choices = [row["choices"][(j - k) % n] for j in range(n)]
    row = row | {"choices": choices, "answer": (row["answer"] + k) % n}
    return encode_prompt(lab.env.tok, row, lab.shots)


def option(prompt, letter):
    """The text of the option with this letter."""
    return prompt.row["choices"][ord(letter) - ord("A")]


def followed(lab, asked, turns, name, picks, answers, rewards):
    """A row of the table of `permute`: what the answers to rotated prompts keep of the first one's.

    asked: prompts, those of one question in a row; turns: their rotations, 0 first; answers: token ids."""
    letters = [said(lab.env, p.row, tokens) for p, tokens in zip(asked, answers, strict=True)]
    content = []
    letter = []
    first = 0
    for i, k in enumerate(turns):
        if k == 0:
            first = i
            continue
        told = "other" not in (letters[i], letters[first])
        letter.append(float(told and letters[i] == letters[first]))
        same = told and option(asked[i], letters[i]) == option(asked[first], letters[first])
        content.append(float(same))
    others = [p for p, k in zip(asked, turns, strict=True) if k]
    word, most, switch = mostly(letters)
    row = {"action": name, "picks": picks, "keeps_content": share(content, others)}
    row["keeps_letter"] = share(letter, others)
    row["content_minus_letter"] = effect(pd.Series(np.subtract(content, letter), index_of(others)))
    row |= {"right": share(rewards, asked), "mostly": word, "mostly_share": most, "switch": switch}
    return row, letters


def permute(lab):
    """The options of validation prompts in every rotation: do answers follow the content or the letter?

    lines: a letter (or -) per action of the mask, in its order."""
    some = [p for p in lab.val if p.row["choices"]]
    some = [some[n] for n in sorted(lab.rng.permutation(len(some))[: lab.opts.prompts])]
    asked = []
    turns = []
    for prompt in some:
        for k in range(len(prompt.row["choices"])):
            asked.append(rotated(lab, prompt, k))
            turns.append(k)
    env = copy.copy(lab.env)
    env.ask(asked)
    which = torch.arange(len(asked))
    rewards = env.rewards(which, torch.arange(env.noop + 1)).numpy()
    greedy = ppo.rollout(env, lab.agent, which, greedy=True)
    chosen = greedy.actions[:, :, 0]  # (T, N)
    picks = Counter(lab.names[action] for action in chosen.flatten().tolist())
    answers = [completions[0] for completions in greedy.completions]
    total = sum(picks.values())
    rows = [followed(lab, asked, turns, "policy", total, answers, greedy.rewards[:, 0].numpy())]
    for action, name in enumerate(lab.names):
        own = [known[action] for known in env.completions]
        rows.append(followed(lab, asked, turns, name, picks[name], own, rewards[:, action]))
    lines = []
    for i, prompt in enumerate(asked):
        line = {"run": lab.name, "id": prompt.row["id"], "group": prompt.row["group"], "rotation": turns[i]}
        letters = ["-" if own[i] == "other" else own[i] for _, own in rows]
        line |= {"answer": chr(65 + prompt.row["answer"]), "policy": letters[0]}
        line["actions"] = "".join(letters[1:])
        lines.append(line | {"chosen": [lab.names[a] for a in chosen[:, i].tolist()]})
    table = [row for row, _ in rows]
    table[1:] = sorted(table[1:], key=lambda row: (row["action"] != NOOP, -row["picks"]))
    result = {"prompts": len(some), "asked": len(asked), "verdict": follows(table[0])}
    result |= switches(table, picks, lab.names)
    return result | {"answers": table}, {"permute": lines}


def follows(policy):
    """What the table's row of the policy says in a sentence."""
    d = policy["content_minus_letter"]
    shares = f"keeps the content on {policy['keeps_content']['mean']:.0%} of rotated prompts"
    shares += f", the letter on {policy['keeps_letter']['mean']:.0%}"
    follow = "neither is shown to prevail"
    if d["n"] >= FEW and d["ci"][0] > 0:
        follow = "it follows the content"
    if d["n"] >= FEW and d["ci"][1] < 0:
        follow = "it follows the letter"
    return f"the policy {shares}: {follow}"


# ------------------------------------------------------------- work and main
COMMANDS = {"features": features, "critic": critic, "viewer": view}
COMMANDS |= {"permute": permute, "branch": branches, "map": atlas}


def work(lab, name):
    """(prompts read, answers given) of a command, about."""
    opts = lab.opts
    n = len(lab.val)
    mask = lab.env.noop + 1
    branched = min(opts.branch_prompts, n)
    if name == "features":
        measured = min(opts.decisions, len(steering_decisions(lab)))
        return min(measured, n) + READ // 2, measured * opts.draws
    if name == "viewer":
        return n + READ // 2, 2 * n
    if name == "permute":
        options = [len(p.row["choices"]) for p in lab.val[: opts.prompts] if p.row["choices"]]
        return sum(options), sum(options) * mask
    if name == "branch":
        more = 0 if lab.one else 2 * opts.continuations
        if lab.args.decisions > 1:
            more += 4 * lab.args.decisions
        return branched, branched * (mask if lab.one else more)
    if name == "map":
        some = min(opts.prompts, n)
        cells = (2 * len(lab.sites) + 2) * 3 * opts.directions
        return some * (len(lab.sites) + 3) + opts.probe_samples, some * (cells if lab.one else cells // 4)
    return 0, 0


def estimate(lab, names):
    """Prints about how many seconds each command takes, from a few answers that are timed."""
    some = lab.val[:4]
    columns = 40  # about as many at once as there will be
    seconds = []
    for count, steps in ((1, 1), (1, 1), (columns, None)):  # the first one warms up
        noops = ppo.fixed(torch.full((len(some), count, lab.args.decisions), lab.env.noop))
        started = time.perf_counter()
        lab.env.generate(some, noops, count, steps=steps)
        seconds.append(time.perf_counter() - started)
    _, reading, answering = seconds
    prompt = reading / len(some)
    answer = max(0.0, answering - reading) / (columns * len(some))
    parts = {}
    for name in names:
        prompts, answers = work(lab, name)
        parts[name] = prompts * prompt + answers * answer
    each = ", ".join(f"{name} {cost:.0f}" for name, cost in parts.items())
    print(f"{lab.name}: about {sum(parts.values()):.0f} s ({each})", flush=True)


def refused(lab, name):
    """Why a command does not apply to the run, or None."""
    if name == "permute" and not all(prompt.row["choices"] for prompt in lab.val):
        return f"{lab.args.task} has answers without options, which permute needs"
    return None


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
        given = " ".join(opts.run)
        hub.fail(f"--run {given}: two have the same name; results are kept by it, so give each once")


def folder(opts):
    return Path(opts.out or Path(*opts.run[:1]) / "analysis")


class Files:
    """The folder --out. All that is finished is written at once, so nothing is lost when stopped."""

    def __init__(self, opts):
        self.opts = opts
        self.out = folder(opts)
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = {}  # command -> {run: result}
        self.lines = {}  # name of a JSONL file -> its lines

    def add(self, command, run, result, lines):
        """Write what a command found in a run: JSON, lines and picture, and the report of all commands."""
        own = self.results.setdefault(command, {})
        own[run] = finite(result)
        for file, rows in lines.items():
            self.lines.setdefault(file, [])
            self.lines[file] += [{"schema": SCHEMA} | finite(row) for row in rows]
            hub.write_jsonl(self.out / f"{file}.jsonl", self.lines[file])
        record = {"schema": SCHEMA, "command": command, "flags": vars(self.opts), "result": own}
        hub.write_json(self.out / f"{command}.json", record)
        key, draw = PICTURES.get(command, ("", None))
        if own[run].get(key):
            picture = self.out / picture_name(command, run)
            hub.write_atomically(picture, lambda temporary: draw(own[run], temporary))
        text = report(self.known(), self.out)
        hub.write_atomically(self.out / "report.md", lambda temporary: temporary.write_text(text, "utf-8"))

    def known(self):
        """{command: {run: result}} of what stands in the folder, in the order of the commands."""
        found = {}
        for command in COMMANDS:
            if command in self.results:
                found[command] = self.results[command]
            elif (self.out / f"{command}.json").is_file():
                found[command] = stored_result(self.out / f"{command}.json")
        return {command: runs for command, runs in found.items() if runs}


def stored_result(path):
    """{run: result} of a COMMAND.json; {} where another version made it."""
    try:
        record = hub.parse_json(path.read_bytes())
    except ValueError:
        hub.fail(f"{path} is not JSON; remove it")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return {}
    return record["result"]


def main(opts):
    """Run a command, or all; returns {command: {run: result}}."""
    check_flags(opts)
    for run in opts.run:
        ppo.stored_args(run)
    hub.check_out(folder(opts))
    names = [opts.command]
    if opts.command == "all":
        names = list(COMMANDS) if opts.run else ["map"]
    files = None
    labs = []
    data = {"runs": [], "features": {}, "actions": [], "prompts": []}
    for run in opts.run or (None,):
        lab = Lab(opts, run)
        files = files or Files(opts)
        labs.append(lab)
        estimate(lab, names)
        for name in names:
            reason = refused(lab, name)
            if reason and opts.command == name:
                hub.fail(f"{lab.name}: {reason}")
            if reason:
                print(f"{name}: left out, {reason}")
                continue
            started = time.perf_counter()
            print(f"{name}: {lab.name}", flush=True)
            found = view(lab, data) if name == "viewer" else COMMANDS[name](lab)
            if name == "viewer":
                write_viewer(files.out, data)
            files.add(name, lab.name, *found)
            print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        del lab.env  # one model in memory at a time
    if "features" in names:
        for a, b in combinations(labs, 2):
            files.add("features", f"{a.name} and {b.name}", shared(a, b), {})
    print(f"report.md and {', '.join(f'{name}.json' for name in files.results)} are in {files.out}")
    page = files.out / "viewer.html"
    todo = "open" if "viewer" in names else f"for a page: python {Path(__file__).name} viewer --run RUN makes"
    print(f"{todo} {page}")
    return files.results


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        hub.fail("interrupted; the analyses that were finished are written")
    except OSError as e:
        hub.fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}")
