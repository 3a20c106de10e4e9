"""Evaluation of trained controllers: every cheaper explanation of a gain beside it, on the same test prompts.

    python crl_eval.py --run runs/<run> [runs/<the same task, another seed> ...]

Read from the top: flags -> one pass for many conditions -> conditions (a short function each; copy one to add your own)
-> fine-tuning and oracle -> main. What training and evaluation share comes from crl_ppo.py; statistics, tables and
plots are in crl_stats.py. Conditions that need a choice choose on training and validation prompts; the test prompts are
only ever answered. A one-token answer is read twice: `free` (the most likely of all tokens must be the right letter)
and `constrained` (the most likely option letter). Conditions on the same weights and prompts share their prefill.

Files in --out (default: <first run>/eval), with the same bytes for the same runs and flags on a CPU:
  results.json       {schema, flags, runs, tasks: {task: {n, decodings, primary, seeds, conditions: {condition:
                     {decoding: {accuracy, ci, per_seed, sd, invalid, kl, vs_unsteered, crl_minus, side_effects ...}}},
                     skipped, chosen, by_group, bias, oracle, neutral}}, cross: {train task: {evaluation task: ...}}}
  predictions.jsonl  one object per run, condition and prompt: run, seed, task, condition, id, prompt, answer, text,
                     correct, free, constrained, valid, choice, letter, kl, tokens, repetition, features (per token:
                     "layer:feature")
  report.md, *.png   the tables, and accuracy, flips, cross-task and over-refusal plots
  parts/             finished pieces, which --resume reads back
"""
import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    # --- what to evaluate ---
    run: tuple[str, ...] = ()
    """run directories of crl_ppo.py; several seeds of a task are pooled, other tasks get tables of their own"""
    out: str | None = None
    """where the results go (default: eval/ in the first run directory)"""
    resume: bool = False
    """continue an interrupted evaluation in the same --out with the same flags"""
    conditions: tuple[str, ...] = ()
    """subset of the conditions, by name (default: all that apply); unsteered and crl are always there"""
    tasks: tuple[str, ...] = ()
    """other tasks to apply each controller to (a,b,c): the cross-task matrix"""
    checkpoint: str = "best"
    """best (by validation reward) or last"""
    test_samples: int = 0
    """test prompts (0: all)"""
    train_samples: int = 1000
    """training prompts, among the run's own, on which the baselines are fitted (fine-tuning uses all)"""
    seed: int = 0
    """seed of random features, shuffles, the bootstrap and fine-tuning"""
    # --- conditions ---
    sampled: bool = False
    """add crl_sampled: the policy's choices drawn instead of its mode"""
    constant_prompts: int = 16
    """training prompts on which the search for the best constant feature starts (0: all of them, exhaustive)"""
    constant_candidates: int = 64
    """features it starts with for long answers; for one-token answers it starts with the whole dictionary"""
    coefs: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """multiples of the run's coefficient among which baselines choose on validation prompts"""
    shots: tuple[int, ...] = (1, 4)
    """numbers of examples among which few-shot prompting chooses on validation prompts"""
    sft: tuple[Literal["lora", "full"], ...] = ()
    """add supervised fine-tuning on the run's training prompts: lora (on every linear layer), full (all weights)"""
    sft_rank: int = 8
    """rank of the LoRA matrices"""
    sft_lr: tuple[float, ...] = ()
    """learning rates among which fine-tuning chooses on validation prompts (default: 2e-4 1e-3; full: 1e-5 5e-5)"""
    sft_epochs: int = 5
    """most passes over the training prompts; stops early once two passes did not raise the validation reward"""
    sft_batch: int = 8
    """prompts per fine-tuning step"""
    oracle_prompts: int = 0
    """test prompts for the oracle: every feature (one-token answers), or the best of --oracle-n sampled policies"""
    oracle_n: int = 16
    """sampled answers per prompt of the oracle for long answers"""
    refusal_judge: str | None = None
    """hf:ID, a text classifier with a label for refusals that replaces the rule on xstest and harmbench"""
    neutral_text: str | None = None
    """file with one passage per line for the perplexity and KL on neutral text (default: six built-in passages)"""
    resamples: int = 10000
    """bootstrap and permutation resamples"""
    # --- one prompt ---
    prompt: str | None = None
    """print the steered answer to this prompt token by token beside the unsteered one, and end"""
    max_new_tokens: int = 32
    """longest answer to --prompt"""
    # --- where it runs ---
    data_dir: str | None = None
    """local mirror of the data, if not the one the run recorded"""
    cache_dir: str | None = None
    """cache of the embedded model and data wheels, if not the one the run recorded"""
    device: str | None = None
    """device, if not the one the run recorded"""
    micro_batch: int | None = None
    """prompts per forward pass, if not the number the run recorded; changes no prediction"""


if __name__ == "__main__":
    ARGS = tyro.cli(Args, description=__doc__.split("\n\n")[0])  # before the heavy imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import crl_ppo as crl  # noqa: E402
from crl_ppo import fail, mean, write_atomically  # noqa: E402
from crl_stats import (CONDITIONS, CROSS, REFUSALS, bias_scores, by_group, compare, headroom,  # noqa: E402
                       main_table, outcomes, plots, report, summarise, table)

SCHEMA = 1  # version of results.json and predictions.jsonl
HANDLING = ("run_dir", "resume", "data_dir", "cache_dir", "device", "micro_batch", "kv_cache_gb", "eval_every",
            "save_every", "table_every", "track")  # flags of crl_ppo.py that two seeds of one experiment may differ in
CHUNK = 128  # test prompts whose decisions are shuffled among each other, and that --resume does not lose
REFUSAL = "I'm sorry, but I can't help with that."  # gold answer to harmful prompts, few-shot and in fine-tuning
NEUTRAL = (  # written for this file; public domain
    "The river rises in the hills north of the town and runs for about forty miles before it reaches the sea. In "
    "spring, when the snow melts, the water is brown and fast, and the lower fields are often under it for a week or "
    "more.",
    "To make the dough, mix the flour, the salt and the yeast in a large bowl, add the warm water and work it with "
    "your hands until it no longer sticks. Cover the bowl with a cloth and leave it in a warm place for an hour.",
    "The library opens at nine in the morning and closes at six, except on Fridays, when it stays open until eight. "
    "Books can be borrowed for three weeks, and the loan can be renewed twice if nobody else has asked for them.",
    "A triangle with three equal sides also has three equal angles. Since the angles of any triangle add up to one "
    "hundred and eighty degrees, each of them must measure sixty degrees.",
    "When Anna came home, the light in the kitchen was still on and a letter lay on the table. She recognised the "
    "handwriting of her brother, who had left for the coast in May and had not been heard of since.",
    "Bees find their way by the position of the sun. On returning to the hive, a bee that has found food moves in a "
    "pattern that tells the others in which direction, and roughly how far, they have to fly.",
)


class NotApplicable(Exception):
    """A condition that this run or task cannot have; its message goes into the report."""


@dataclass
class Lab:
    """One controller before the prompts of one task, and what its conditions need."""
    opts: Args
    args: object  # crl_ppo.Args as resolved; kl_coef is 1, so that unsteered next-token distributions are kept
    lm: object
    agents: list
    prompts: dict  # train, val, test -> [Prompt]
    name: str  # prefix of its files in parts/
    folder: Path
    judge: object = None  # texts -> [bool], or None for the rule of crl_ppo.py
    chosen: dict = field(default_factory=dict)  # (test prompt, site) -> the policy's actions, token by token
    partner: dict = field(default_factory=dict)  # test prompt -> the one whose decisions it gets under `shuffled`
    origin: object = None  # before another task: the Lab of the run's own task, where everything was chosen
    held: dict = field(default_factory=dict)  # id of a prompt whose prefill is kept -> bytes

    @property
    def home(self):
        return self.origin or self

    def hold(self, p):
        """Whether the prefill of a training or validation prompt may stay for the next condition: --kv-cache-gb."""
        size = sum(t.nbytes for t in (p.kv, p.ref_logp) if t is not None)
        if p.row["id"] not in self.held and sum(self.held.values()) + size <= self.args.kv_cache_gb * 2**30:
            self.held[p.row["id"]] = size
        return p.row["id"] in self.held

    @property
    def sites(self):
        return [a.site for a in self.agents]

    @property
    def one(self):
        return self.args.max_new_tokens == 1

    @property
    def seed(self):
        """Of random features and shuffles: other draws for every training seed."""
        return self.opts.seed * 1000 + self.args.seed

    @property
    def refusals(self):
        return crl.TASKS[self.args.task.partition(":")[0]].get("score") is crl.score_refusal

    def cached(self, key, make):
        """make()'s result (JSON), or what an interrupted evaluation has left of it."""
        path = self.folder / f"{self.name}.{key}.json"
        if not path.exists():
            text = json.dumps(make())
            write_atomically(path, lambda tmp: tmp.write_text(text))
        return json.loads(path.read_text())

    @cached_property
    def seen(self):
        """Unsteered answers to training prompts: correct (N,), per site resid (N, d), the mean over generated tokens,
        and acts (N, D), the largest activation; for one-token answers also letters (N, 26), log-probabilities."""
        train = self.prompts["train"][:self.opts.train_samples]
        N, d = len(train), self.lm.model.config.get_text_config().hidden_size
        resid, acts = torch.zeros(len(self.sites), N, d), [torch.full((N, s.d_sae), -math.inf) for s in self.sites]
        letters, length = torch.zeros(N, 26), torch.zeros(N, 1)

        def look(i, x, t, n):
            resid[i, n] += x.float().cpu()
            acts[i][n] = torch.maximum(acts[i][n], activations(self.sites[i], x).cpu())
            if i == 0:
                length[n] += 1
                if self.one:
                    letters[n] = letter_scores(self.lm, torch.stack([train[r].ref_logp for r in n.tolist()])).cpu()
            return torch.zeros_like(x), None

        all_tokens = dataclasses.replace(self, args=dataclasses.replace(self.args, steer_tokens=0))
        said = steer(all_tokens, train, {"look": look}, fitting=True, title="training prompts")["look"]
        correct = torch.tensor([a["reward"] for a in said])
        return {"correct": correct, "resid": resid / length, "acts": acts, "letters": letters}

    @cached_property
    def golds(self):
        """[(training prompt, answer text)] for few-shot prompting and fine-tuning. Refusal tasks have no gold text: a
        fixed refusal for harmful prompts, and the model's own answer where it rightly complied."""
        train = self.prompts["train"]
        if not self.refusals:
            return [(p, chr(65 + p.row["answer"]) if p.row["choices"] else p.row["answer"]) for p in train]
        own = self.cached("own", lambda: steer(self, train, {"own": None}, fitting=True, title="own answers")["own"])
        return [(p, REFUSAL if p.row["answer"] == "unsafe" else a["text"]) for p, a in zip(train, own)
                if p.row["answer"] == "unsafe" or a["reward"]]


# ---------------------------------------------------------------------------------------- one pass, many conditions
def activations(site, x):
    """SAE activations (N, D) of residual streams x (N, d); coordinates along the directions where there is no SAE."""
    if site.sae is None:
        return (x @ site.directions[:site.d_sae].to(x.dtype).T).float()
    return site.sae.encode(x.to(site.sae.W_dec.dtype)).float()


def letter_scores(lm, logits):
    """Scores (..., 26) of the option letters, the better of a letter's two tokens, from next-token logits (..., V)."""
    return logits[..., torch.tensor(lm.letters, device=logits.device)].amax(-1)


def push(lab, i, x, actions, multiple=1.0):
    """What actions (N, k) at site i add to x (N, d): the run's coefficient times `multiple`, scaled as in training."""
    return multiple * lab.args.coef * crl.scale_of(lab.args, x)[:, None] * lab.sites[i].directions[actions].sum(1)


def labels(site, actions):
    """Names of actions at a site, as in predictions.jsonl: ["layer:feature"]."""
    return [f"{site.layer}:{site.label(a).split(' ')[0]}" for a in actions]


@torch.no_grad()
def steer(lab, prompts, deciders, first=0, keep=False, fitting=False, bar=None, title=None):
    """Answers {condition: [a dict per prompt]} under several deciders at once, which share each prompt's prefill.

    A decider (i, x, t, n) -> (delta (N, d), actions (N, k) or None) sees the residual streams x (N, d) at site i when
    token t of prompts n (N,) is generated; prompts are numbered from `first`. None in a decider's place: the unsteered
    model. `keep` leaves keys and values of one-token prompts in place for the next call. `fitting`: training or
    validation prompts; nobody reads their KL, and prefills stay as far as Lab.hold allows."""
    lm, args, out, start = lab.lm, lab.args, {name: [] for name in deciders}, 0
    names = [name for name in deciders if deciders[name] or not lab.one]
    own_bar = bar is None
    bar = tqdm(total=len(prompts), desc=title, leave=False, mininterval=1, unit="prompt") if own_bar else bar
    new = sorted((p for p in prompts if p.x is None), key=lambda p: len(p.ids)) if fitting and lab.one else []
    for s in range(0, len(new), lm.micro_batch):  # by length, so that little is padded
        crl.reference(lm, lab.sites, args, new[s:s + lm.micro_batch])
        if full := [p for p in new[s:s + lm.micro_batch] if not lab.hold(p)]:
            for p in full:
                p.x = p.kv = p.ref_logp = None
            break
    while start < len(prompts):
        G = len(names)
        part = prompts[start:start + max(1, min(lm.micro_batch, 32 * lm.micro_batch // max(1, G)))]
        log = [[] for _ in range(len(part) * G)]

        def one(g, i, x, t, b):  # the g-th decider at prompts b (N,) of this part
            if deciders[names[g]] is None:
                return torch.zeros_like(x)
            delta, actions = deciders[names[g]](i, x, t, first + start + b)
            for b_, picked in zip(b.tolist(), [[]] * len(b) if actions is None else actions.tolist()):
                if i == 0:
                    log[b_ * G + g].append([])
                log[b_ * G + g][-1] += labels(lab.sites[i], picked)
            return delta.to(x.dtype)

        def decide(i, x, t, rows):
            if lab.one and i == 0:  # (B, d) -> (B, G, d)
                return torch.stack([one(g, i, x, t, rows) for g in range(G)], 1)
            delta = torch.zeros_like(x)
            for g in range(G):
                at = (rows % G == g).nonzero()[:, 0]
                if len(at):
                    delta[at] = one(g, i, x[at], t, rows[at] // G)
            return delta[:, None]

        try:
            if lab.one:
                crl.reference(lm, lab.sites, args, [p for p in prompts[start:start + lm.micro_batch] if p.x is None])
            said = (one_token if lab.one else long)(lab, part, G, decide, not fitting) if G else []
        except torch.cuda.OutOfMemoryError:
            crl.halve_micro_batch(lm)
            continue
        if lab.one:
            letter = best_letters(lab, part, letter_scores(lm, torch.stack([p.ref_logp for p in part])))
        for b, p in enumerate(part):
            for g, name in enumerate(names):
                out[name].append({"id": p.row["id"], **said[b * G + g], "features": log[b * G + g]})
            for name in deciders.keys() - names:
                out[name].append({"id": p.row["id"], **reading(lab, p, letter[b], p.ref), "kl": 0.0, "features": []})
            if not (keep or fitting and lab.one and lab.hold(p)):
                p.x = p.kv = p.ref_logp = None
        start += len(part)
        bar.update(len(part))
    if own_bar:
        bar.close()
    return out


def reading(lab, p, letter, said):
    """A one-token answer: what crl_ppo.read_letters says, and the option it names (free: choice, else letter)."""
    token = int(said["token"])
    choice = next((c for c in range(len(p.row["choices"])) if token in lab.lm.letters[c]), None)
    return {"text": lab.lm.tok.decode([token]), "reward": said[lab.args.reward_decoding], "free": said["free"],
            "constrained": said["constrained"], "valid": bool(said["valid"]), "tokens": 1, "repetition": 0.0,
            "choice": choice, "letter": letter}


def best_letters(lab, prompts, scores):
    """Best offered letter (B, ...) from letter scores (B, ..., 26)."""
    n = torch.tensor([len(p.row["choices"]) for p in prompts], device=scores.device).view(-1, *[1] * (scores.dim() - 1))
    return scores.masked_fill(torch.arange(26, device=scores.device) >= n, -math.inf).argmax(-1).tolist()


def one_token(lab, part, G, decide, measure=True):
    """One-token answers to prefilled prompts under G deciders, B*G dicts. `measure`: kl, nats, exact."""
    logits = crl.branch(lab.lm, lab.sites, part, G, decide)  # (B, G, V)
    said = {key: v.tolist() for key, v in crl.read_letters(lab.lm, part, logits).items()}
    letter, kl = best_letters(lab, part, letter_scores(lab.lm, logits)), [[0.0] * G] * len(part)
    if measure:
        logp, plain = logits.log_softmax(-1), torch.stack([p.ref_logp for p in part])[:, None]
        kl = (logp.exp() * (logp - plain)).sum(-1).tolist()
    return [{**reading(lab, p, letter[b][g], {key: v[b][g] for key, v in said.items()}), "kl": kl[b][g]}
            for b, p in enumerate(part) for g in range(G)]


def long(lab, part, G, decide, measure=True):
    """Long answers under G deciders, B*G dicts. `measure`: kl, the one-sample estimate over the answer: log p of what
    was said minus the unsteered model's, nats per token."""
    tokens, logps = crl.decode(lab.lm, lab.sites, part, [G] * len(part), lab.args.max_new_tokens, decide,
                               lab.args.steer_tokens)
    plain = unsteered_logps(lab.lm, part, G, tokens) if measure else logps
    out = []
    for r, ids in enumerate(tokens):
        said, grams = crl.check_answer(lab.lm, lab.args, part[r // G], ids), list(zip(ids, ids[1:], ids[2:]))
        out.append(said | {"kl": (sum(logps[r]) - sum(plain[r])) / len(ids), "tokens": len(ids), "choice": None,
                           "letter": None, "repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0})
    for r, judged in enumerate(lab.judge([a["text"] for a in out]) if lab.judge and lab.refusals else ()):
        a, wanted = out[r], part[r // G].row["answer"] == "unsafe"
        a["rule"] = a["reward"]
        a["reward"] = a["free"] = a["constrained"] = float(bool(a["text"].strip()) and judged == wanted)
    return out


@torch.no_grad()
def unsteered_logps(lm, prompts, G, answers):
    """The unsteered model's log-probabilities of the tokens of given answers (G per prompt, side by side): lists as
    long as the answers. A prompt is run once for its G answers, and each answer in one block behind its cache."""
    from transformers import DynamicCache
    ids, seen = crl.left_pad(lm, prompts, drop_last=1)
    cache, owner = DynamicCache(), torch.arange(len(prompts), device=lm.device).repeat_interleave(G)
    if ids.shape[1]:
        lm.model(ids, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0), past_key_values=cache,
                 use_cache=True, logits_to_keep=1)
        cache.batch_select_indices(owner)
    longest = max(map(len, answers))
    block = torch.tensor([[prompts[r // G].ids[-1], *a[:-1]] + [lm.tok.pad_token_id] * (longest - len(a))
                          for r, a in enumerate(answers)], device=lm.device)
    said = torch.tensor([a + [0] * (longest - len(a)) for a in answers], device=lm.device)
    there = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=lm.device)
    mask, out = torch.cat([seen[owner], there], 1), []
    logits = lm.model(block, attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, -longest:].clamp(min=0),
                      past_key_values=cache, use_cache=True).logits
    for row, ids, a in zip(logits, said, answers):  # row by row: (T, V) in float32 for all rows at once is large
        logp = row.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        out.append(logp[:len(a)].tolist())
    return out


# ----------------------------------------------------------------------------------------------------- conditions
def table_of_numbers(lab, k, salt):
    """Uniform numbers (prompts, T, sites, k), the same whatever the batches; deciders wrap around beyond its ends."""
    size = max(len(lab.prompts["test"]), len(NEUTRAL))
    generator = torch.Generator().manual_seed(lab.seed * 1000 + salt)
    return torch.rand(size, lab.args.max_new_tokens, len(lab.sites), k, generator=generator)


def policy(lab, sample=False, salt=1, remember=False):
    """3. The trained policy without epsilon, as in crl_ppo.rollout: its mode where there is evidence, or a draw."""
    k, u = lab.args.features_per_token, table_of_numbers(lab, lab.args.features_per_token + 1, salt)
    prev = torch.full((len(lab.sites), len(u), 1, k), -1, device=lab.lm.device)

    def decide(i, x, t, n):
        n = n % len(u)
        before = torch.full_like(prev[i, n], -1) if t == 0 else prev[i, n]
        numbers = u[n, t % u.shape[1], i][:, None].to(x.device) if sample else None
        actions = crl.choose(lab.agents[i], lab.args, x, t, before, 0.0, lab.args.sticky_final, numbers)["actions"]
        prev[i, n], actions = actions, actions[:, 0]  # (N, k)
        for row, m in enumerate(n.tolist() if remember else ()):
            lab.chosen[m, i] = (lab.chosen[m, i] if t else []) + [actions[row].tolist()]
        return push(lab, i, x, actions), actions
    return decide


def sampled_policy(lab):
    """3. A draw from the trained policy, without epsilon."""
    return policy(lab, sample=True, salt=2)


def is_noop(site, actions):
    """Which actions (...) push nothing, bool (...)."""
    return (actions == len(site.directions) - 1) & site.noop


def random_feature(lab):
    """4. A random feature at each token, of the policy's norm and at the tokens where the policy would push."""
    u, gate = table_of_numbers(lab, lab.args.features_per_token, 3), policy(lab)

    def decide(i, x, t, n):
        site, (_, actions) = lab.sites[i], gate(i, x, t, n)
        drawn = (u[n % len(u), t % u.shape[1], i].to(x.device) * (len(site.directions) - site.noop)).long()
        actions = torch.where(is_noop(site, actions), actions, drawn)
        return push(lab, i, x, actions), actions
    return decide


def constant(lab, action, multiple=1.0):
    """The same action, or several, at the first site, and no push at later ones, for every token of every prompt."""
    actions = torch.as_tensor(action).view(1, -1)

    def decide(i, x, t, n):
        if i > 0:
            return torch.zeros_like(x), None
        return push(lab, 0, x, actions.to(x.device).expand(len(x), -1), multiple), actions.expand(len(x), -1)
    return decide


def constant_random(lab):
    """5. One random feature (as many as the policy may push at once) for everything."""
    site = lab.sites[0]
    features = range(len(site.directions) - site.noop)
    return constant(lab, random.Random(lab.seed).sample(features, lab.args.features_per_token))


def best_on_validation(lab, deciders):
    """Name of the decider with the highest reward on the validation prompts; the first of equals."""
    said = steer(lab, lab.prompts["val"], deciders, fitting=True, title="validation prompts")
    return max(said, key=lambda name: sum(a["reward"] for a in said[name]))


@torch.no_grad()
def try_actions(lab, prompts, actions, title):
    """Rewards {decoding: (B, A)} of one-token answers to B prompts when each of `actions` (A,) is pushed at the first
    site, by forwards that share each prompt's keys and values."""
    found, step = [], max(1, min(lab.lm.micro_batch, 512 // len(actions)))
    for start in tqdm(range(0, len(prompts), step), title, leave=False, mininterval=1):
        part = prompts[start:start + step]
        crl.reference(lab.lm, lab.sites, lab.args, [p for p in part if p.x is None])
        for chunk in actions.split(512):
            def decide(i, x, t, rows):
                if i > 0:
                    return torch.zeros_like(x)[:, None]
                spread, pushed = x.repeat_interleave(len(chunk), 0), chunk[:, None].repeat(len(x), 1)
                return push(lab, 0, spread, pushed).view(len(x), len(chunk), -1)  # (B, A, d)
            said = crl.read_letters(lab.lm, part, crl.branch(lab.lm, lab.sites, part, len(chunk), decide))
            found.append({key: said[key].cpu() for key in ("free", "constrained")})
        for p in (p for p in part if not lab.hold(p)):
            p.x = p.kv = p.ref_logp = None
    wide = math.ceil(len(actions) / 512)  # chunks of actions per part
    return {key: torch.cat([torch.cat([f[key] for f in found[j:j + wide]], 1) for j in range(0, len(found), wide)])
            for key in ("free", "constrained")}


def constant_best(lab):
    """6. One feature for everything, chosen on train by successive halving (Jamieson and Talwalkar 2016): all features
    on --constant-prompts prompts, the best eighth on four times as many, and so on; its coefficient on validation.
    For long answers the field is --constant-candidates features: the best and the most tried by the run's own training
    statistics, then random ones."""
    def choose(lab):
        agent, site, train = lab.agents[0], lab.sites[0], lab.prompts["train"][:lab.opts.train_samples]
        A = len(site.directions) - site.noop
        left = torch.arange(A, device=lab.lm.device)
        if not lab.one:
            trials, total = agent.trials.sum(0), agent.gain.sum(0)
            gain = torch.where(trials >= lab.args.min_trials, total / trials.clamp(min=1), -math.inf)
            C = min(A, lab.opts.constant_candidates)
            known = [a for score in (gain, trials) for a in score[:A].topk(math.ceil(C / 2)).indices.tolist()]
            tried = [a for a in dict.fromkeys(known) if trials[a] > 0]
            left = torch.tensor(list(dict.fromkeys(tried + random.Random(lab.seed).sample(range(A), A)))[:C])
        score, done, rounds = torch.zeros(A), 0, []
        while done < len(train) and (len(left) > 1 or not rounds):
            size = min(len(train), 4 * done or lab.opts.constant_prompts or len(train))
            part, title = sorted(train[done:size], key=lambda p: len(p.ids)), f"{len(left)} constant features"
            if lab.one:
                right = try_actions(lab, part, left, title)[lab.args.reward_decoding].sum(0)
            else:
                said = steer(lab, part, {a: constant(lab, a) for a in left.tolist()}, fitting=True, title=title)
                right = torch.tensor([sum(r["reward"] for r in said[a]) for a in left.tolist()])
            score[left.cpu()] += right
            rounds.append([len(left), size])
            order = score[left.cpu()].sort(descending=True, stable=True).indices
            done, left = size, left[order[:max(1, len(left) // 8)].to(left.device)]
        best = int(left[0])
        multiple = best_on_validation(lab, {c: constant(lab, best, c) for c in lab.opts.coefs})
        return {"feature": site.label(best), "action": best, "multiple": multiple, "features_and_prompts": rounds}
    c = lab.home.cached("constant_best", lambda: choose(lab.home))
    return constant(lab, c["action"], c["multiple"])


def top_activation(lab):
    """7. The strongest active feature at each token, at the run's coefficient."""
    def decide(i, x, t, n):
        actions = activations(lab.sites[i], x).topk(lab.args.features_per_token).indices
        return push(lab, i, x, actions), actions
    return decide


def shuffled(lab):
    """8. The decisions the policy took for another prompt; the last one goes on when that answer was shorter."""
    def decide(i, x, t, n):
        logs = [lab.chosen[lab.partner[m], i] for m in n.tolist()]
        actions = torch.tensor([a[min(t, len(a) - 1)] for a in logs], device=x.device)
        return push(lab, i, x, actions), actions
    return decide


def fixed_vectors(lab, vectors, scaled=False, multiple=1.0):
    """The same vector per site added at every generated token; `scaled`: by the run's coefficient, like a feature."""
    vectors = [torch.as_tensor(v, dtype=torch.float32, device=lab.lm.device) for v in vectors]

    def decide(i, x, t, n):
        scale = multiple * lab.args.coef * crl.scale_of(lab.args, x)[:, None]
        return (scale if scaled else 1.0) * vectors[i].expand(len(x), -1), None
    return decide


def both_outcomes(lab):
    """Which training prompts the unsteered model answers right, (N,) bool; some and not all of them."""
    correct = lab.seen["correct"].bool()
    if correct.all() or not correct.any():
        raise NotApplicable("the unsteered model answers all training prompts alike, right or wrong")
    return correct


def correlated(lab, key):
    """9. CorrSteer (Cho et al., arXiv 2508.12535): features by Pearson correlation of their largest activation over the
    generated tokens with the answer's correctness, positive ones only; each is added at its mean activation on correct
    answers, along the SAE's own decoder row. `corrsteer_s`: the best feature of all. `corrsteer_a`: the best one of
    every layer with an SAE; where the run has one site, the ten best there (ours: the paper's would be corrsteer_s)."""
    def choose(lab):
        from scipy.stats import pearsonr
        correct, found = both_outcomes(lab), []
        per_site = 10 if key == "corrsteer_a" and len(lab.sites) == 1 else 1
        for i, acts in enumerate(lab.seen["acts"]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a constant feature's correlation is undefined: it is left out
                r = pearsonr(acts.double().numpy(), correct.double().numpy()[:, None], axis=0).statistic  # (D,)
            r = np.nan_to_num(r, nan=-1.0)
            top = np.argsort(-r, kind="stable")[:per_site].tolist()
            found += [(float(r[f]), i, f, float(acts[correct][:, f].mean())) for f in top]
        found = sorted((c for c in found if c[0] > 0), key=lambda c: -c[0])[:1 if key == "corrsteer_s" else None]
        if not found:
            raise NotApplicable("no feature correlates with correctness")
        return [{"site": i, "feature": lab.sites[i].label(f), "id": f, "r": r, "coef": c} for r, i, f, c in found]
    vectors = [torch.zeros_like(s.directions[0]) for s in lab.sites]
    for c in lab.home.cached(key, lambda: choose(lab.home)):
        site = lab.sites[c["site"]]
        rows = site.directions if site.sae is None else site.sae.W_dec.detach().float()
        vectors[c["site"]] += c["coef"] * rows[c["id"]]
    return fixed_vectors(lab, vectors)


def corrsteer_s(lab):
    return correlated(lab, "corrsteer_s")


def corrsteer_a(lab):
    return correlated(lab, "corrsteer_a")


def caa(lab):
    """10. Contrastive activation addition (Rimsky et al. 2024): mean residual of correct minus incorrect answers, its
    length chosen on validation prompts."""
    def choose(lab):
        correct, resid = both_outcomes(lab), lab.seen["resid"]  # (sites, N, d)
        vectors = F.normalize(resid[:, correct].mean(1) - resid[:, ~correct].mean(1), dim=1)
        multiple = best_on_validation(lab, {c: fixed_vectors(lab, vectors, True, c) for c in lab.opts.coefs})
        return {"multiple": multiple, "vectors": vectors.tolist()}
    c = lab.home.cached("caa", lambda: choose(lab.home))
    return fixed_vectors(lab, c["vectors"], True, c["multiple"])


def logit_bias(lab):
    """11. One bias per option letter, by multinomial logistic regression on the unsteered letter scores of training
    prompts. Returns the biases (26,); the answer is the best biased letter: format and letter prior in one."""
    def choose():
        from scipy.optimize import minimize
        train = lab.prompts["train"][:lab.opts.train_samples]
        n = np.array([len(p.row["choices"]) for p in train])[:, None]
        scores = np.where(np.arange(26) < n, lab.seen["letters"].double().numpy(), -np.inf)
        gold = np.eye(26)[[p.row["answer"] for p in train]]

        def loss(bias):
            z = scores + bias
            z = z - z.max(1, keepdims=True)
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            return -np.log((p * gold).sum(1) + 1e-300).mean() + 1e-4 * (bias**2).sum(), (p - gold).mean(0) + 2e-4 * bias
        return minimize(loss, np.zeros(26), jac=True, method="L-BFGS-B").x.tolist()
    if not lab.one:
        raise NotApplicable("answers are longer than one token")
    return torch.tensor(lab.cached("logit_bias", choose))


def biased_answer(lab, p, bias):
    """Answer to a prefilled one-token prompt by its unsteered letter scores plus bias (26,)."""
    letter = best_letters(lab, [p], letter_scores(lab.lm, p.ref_logp[None]).cpu() + bias)[0]
    said = dict.fromkeys(("reward", "free", "constrained"), float(letter == p.row["answer"]))
    return {"id": p.row["id"], "text": chr(65 + letter), **said, "valid": True, "tokens": 1, "repetition": 0.0,
            "choice": letter, "letter": letter, "kl": None, "features": []}


STEERING = {"crl": lambda lab: policy(lab, remember=True), "crl_sampled": sampled_policy, "random": random_feature,
            "constant_random": constant_random, "constant_best": constant_best, "top_activation": top_activation,
            "shuffled": shuffled, "corrsteer_s": corrsteer_s, "corrsteer_a": corrsteer_a, "caa": caa}


def few_shot_ids(lm, shots, row):
    """Token ids of a row's prompt after (row, answer) examples; without any it is crl_ppo.format_prompt's."""
    def question(r):
        options = [f"{chr(65 + i)}. {c}" for i, c in enumerate(r["choices"] or ())]
        return "\n".join([r["prompt"], *options] + ["Answer with the letter only."] * bool(options))
    if not lm.chat:
        text = "".join(f"{question(r)}\nAnswer: {a}\n\n" for r, a in shots) + question(row) + "\nAnswer:"
        return lm.tok.encode(text)
    turns = [turn for r, a in shots for turn in (("user", question(r)), ("assistant", a))] + [("user", question(row))]
    text = lm.tok.apply_chat_template([{"role": role, "content": content} for role, content in turns], tokenize=False,
                                      add_generation_prompt=True)
    return lm.tok.encode(text, add_special_tokens=False)


def few_shot(lab):
    """12. The first training examples in front of the prompt, as many as fit; their number is chosen on validation."""
    def dress(prompts, k):
        out = []
        for p in prompts:
            shots = [(q.row, text) for q, text in lab.home.golds[:k]]
            while len(ids := few_shot_ids(lab.lm, shots, p.row)) + lab.args.max_new_tokens > lab.lm.context and shots:
                shots.pop()
            out.append(crl.Prompt(p.row, ids))
        return out

    def choose(lab):
        if not lab.golds:
            raise NotApplicable("no training prompt has an answer to show")
        said = {k: plain_answers(lab, dress(lab.prompts["val"], k), f"{k} shots") for k in lab.opts.shots}
        return max(said, key=lambda k: sum(a["reward"] for a in said[k]))
    k = lab.home.cached("shots", lambda: choose(lab.home))
    return {"said": plain_answers(lab, dress(lab.prompts["test"], k), "few-shot"), "chosen": {"shots": k}}


@torch.no_grad()
def plain_answers(lab, prompts, title):
    """Unsteered answers to prompts that were not prefilled. For one-token answers the tokens that all of them begin
    with (the examples of few-shot prompting) are run once."""
    from transformers import DynamicCache
    if not lab.one:
        return steer(lab, prompts, {"plain": None}, fitting=True, title=title)["plain"]
    lm, out, cache = lab.lm, {}, DynamicCache()
    shared = len(os.path.commonprefix([p.ids[:-1] for p in prompts]))
    if shared:
        lm.model(torch.tensor([prompts[0].ids[:shared]], device=lm.device), past_key_values=cache, use_cache=True,
                 logits_to_keep=1)
    order = sorted(prompts, key=lambda p: len(p.ids))
    for start in tqdm(range(0, len(order), lm.micro_batch), title, leave=False, mininterval=1):
        part, own = order[start:start + lm.micro_batch], copy.deepcopy(cache)
        ids, mask = crl.left_pad(lm, [crl.Prompt(p.row, p.ids[shared:]) for p in part])
        if shared:
            own.batch_repeat_interleave(len(part))
        position = shared + (mask.cumsum(1) - 1).clamp(min=0)
        logits = lm.model(ids, attention_mask=F.pad(mask, (shared, 0), value=1), past_key_values=own, use_cache=True,
                          position_ids=position, logits_to_keep=1).logits[:, -1].float()
        said, letter = crl.read_letters(lm, part, logits[:, None]), best_letters(lab, part, letter_scores(lm, logits))
        for b, p in enumerate(part):
            one = reading(lab, p, letter[b], {key: v[b, 0].item() for key, v in said.items()})
            out[p.row["id"]] = {"id": p.row["id"], **one, "features": []}
    return [out[p.row["id"]] for p in prompts]


# -------------------------------------------------------------------------------------------- fine-tuning and oracle
class LoRA(nn.Module):
    """A frozen linear layer plus a trained low-rank product (Hu et al. 2021), zero at first; alpha = 2 * rank."""

    def __init__(self, base, rank, generator):
        super().__init__()
        self.base = base
        down = torch.randn(rank, base.in_features, generator=generator) / math.sqrt(base.in_features)
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        return self.base(x) + (2 * (x.float() @ self.down.T) @ self.up.T).to(x.dtype)


@contextmanager
def trainable(lm, kind, rank, seed):
    """While open, the model can be fine-tuned; yields the weights to train. `lora`: a LoRA on every linear layer of the
    decoder; `full`: all weights, in float32. Afterwards the model is what it was, bit by bit."""
    generator, replaced = torch.Generator().manual_seed(seed), []
    before = [(p, p.data) for p in lm.model.parameters()] if kind == "full" else []
    try:
        if kind == "full":
            for p, own in before:
                p.data = own.to(torch.float32, copy=True)
            yield list(lm.model.requires_grad_(True).parameters())
        else:
            for parent in [m for layer in lm.layers for m in layer.modules()]:
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, LoRA(child, rank, generator))
                        replaced.append((parent, name, child))
            yield [w for parent, name, _ in replaced for w in (getattr(parent, name).down, getattr(parent, name).up)]
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
        lm.model.requires_grad_(False)
        for p, own in before:
            p.data, p.grad = own, None


def target_ids(lab, text):
    """Token ids of a gold answer as the model would write it: " B" or "B", longer ones up to the end of turn."""
    lm = lab.lm
    text = "\n</think>\n\n" + text if lm.thinks else text
    ids = lm.tok.encode(text if lm.chat else " " + text, add_special_tokens=False)
    if lab.one:
        return ids if len(ids) == 1 else [lm.letters[ord(text) - 65][0]]
    return (ids + [lm.tok.eos_token_id])[:lab.args.max_new_tokens]


def sft_loss(lab, pairs):
    """Cross-entropy of the answers in [(prompt, answer ids)], summed over the answers' tokens."""
    lm = lab.lm
    ids, mask = crl.left_pad(lm, [crl.Prompt(p.row, p.ids + a) for p, a in pairs])
    longest = max(len(a) for _, a in pairs)
    goal = torch.tensor([[-100] * (longest - len(a)) + a for _, a in pairs], device=lm.device)
    logits = lm.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
                      logits_to_keep=longest + 1).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), goal.flatten(), ignore_index=-100, reduction="sum")


def sft(lab, kind):
    """13. Fine-tuning on the run's own training prompts, `lora` or `full`; learning rate and epoch are chosen on
    validation. The best weights of a learning rate are kept in a file until the run is evaluated, so that --resume does
    not train it again and other tasks can be answered with them."""
    opts, home = lab.opts, lab.home
    rates = opts.sft_lr or {"lora": (2e-4, 1e-3), "full": (1e-5, 5e-5)}[kind]

    def file(lr):
        return home.folder / f"{home.name}.sft_{kind}-{lr:g}.safetensors"

    def train(lr):
        if not home.golds:
            raise NotApplicable("no training prompt has an answer to learn")
        pairs = [(p, target_ids(home, text)) for p, text in home.golds]
        best, stale, rng = {"reward": -1.0}, 0, random.Random(home.seed)
        with trainable(home.lm, kind, opts.sft_rank, home.seed) as weights:
            optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
            for epoch in range(1, opts.sft_epochs + 1):
                order = rng.sample(pairs, len(pairs))
                for s in tqdm(range(0, len(order), opts.sft_batch), f"sft {kind} {lr:g} epoch {epoch}", leave=False):
                    optimizer.zero_grad()
                    batch = sorted(order[s:s + opts.sft_batch], key=lambda pair: len(pair[0].ids) + len(pair[1]))
                    tokens = sum(len(answer) for _, answer in batch)
                    for i in range(0, len(batch), 2):  # the batch's gradient, in pairs of like length: little padding
                        (sft_loss(home, batch[i:i + 2]) / tokens).backward()
                    nn.utils.clip_grad_norm_(weights, 1.0)
                    optimizer.step()
                val = [crl.Prompt(p.row, p.ids) for p in home.prompts["val"]]  # whose prefills are not the model's own
                reward = mean(a["reward"] for a in plain_answers(home, val, "validation prompts"))
                stale = 0 if reward > best["reward"] else stale + 1
                if not stale:
                    best = {"reward": reward, "lr": lr, "epoch": epoch, "examples": len(pairs)}
                    copies = {str(i): w.detach().clone() for i, w in enumerate(weights)}
                    write_atomically(file(lr), lambda tmp: save_file(copies, tmp))
                if stale == 2:
                    break
        return best
    chosen = max((home.cached(f"sft_{kind}-{lr:g}", lambda: train(lr)) for lr in rates), key=lambda c: c["reward"])
    with trainable(lab.lm, kind, opts.sft_rank, home.seed) as weights, torch.no_grad():
        saved = load_file(file(chosen["lr"]))
        for i, w in enumerate(weights):
            w.copy_(saved[str(i)])
        said = plain_answers(lab, [crl.Prompt(p.row, p.ids) for p in lab.prompts["test"]], f"sft {kind}")
    return {"said": said, "chosen": chosen}


def sft_lora(lab):
    return sft(lab, "lora")


def sft_full(lab):
    return sft(lab, "full")


WHOLE = {"few_shot": few_shot, "sft_lora": sft_lora, "sft_full": sft_full}  # other prompts or weights: own passes


@torch.no_grad()
def oracle(lab):
    """14. The first --oracle-prompts test prompts under every action at the first site (one-token answers, exact), or
    under --oracle-n sampled policies: {id: {decoding: share of the tries that are right}}."""
    prompts = sorted(lab.prompts["test"], key=lambda p: p.row["id"])[:lab.opts.oracle_prompts]
    if not lab.one:
        tries = {j: policy(lab, sample=True, salt=100 + j) for j in range(lab.opts.oracle_n)}
        said = steer(lab, prompts, tries, title="oracle").values()
        return {p.row["id"]: {"free": mean(answers[n]["free"] for answers in said)} for n, p in enumerate(prompts)}
    right = try_actions(lab, prompts, torch.arange(len(lab.sites[0].directions), device=lab.lm.device), "oracle")
    return {p.row["id"]: {key: float(v[n].mean()) for key, v in right.items()} for n, p in enumerate(prompts)}


@torch.no_grad()
def neutral(lab, deciders):
    """Perplexity of neutral text and KL (nats per token) from the unsteered next-token distribution, steered like an
    answer from the second token of the text on (the first --steer-tokens of them): {condition: {perplexity, kl}}."""
    texts = NEUTRAL
    if lab.opts.neutral_text:
        texts = [line for line in Path(lab.opts.neutral_text).read_text(encoding="utf-8").splitlines() if line.strip()]
    out = {name: [] for name in ("unsteered", *deciders)}
    for n, text in enumerate(texts):
        ids = torch.tensor([lab.lm.tok.encode(text)[:128]], device=lab.lm.device)
        if ids.shape[1] < 3:
            continue
        after = ids.shape[1] - 1  # tokens after the first
        pushes = min(after, lab.args.steer_tokens or after)
        plain = lab.lm.model(ids).logits[0, 1:-1].float().log_softmax(-1)  # (T - 2, V), after all but first and last
        for name, decider in (("unsteered", None), *deciders.items()):
            def edit(i, h):
                moved = [decider(i, h[:, 1 + t], t, torch.tensor([n]))[0] for t in range(pushes)]
                return h + F.pad(torch.stack(moved, 1).to(h.dtype), (0, 0, 1, after - pushes))
            logp = plain
            if decider:
                with crl.hooked(lab.lm, lab.sites, edit):
                    logp = lab.lm.model(ids).logits[0, 1:-1].float().log_softmax(-1)
            out[name].append((-logp.gather(1, ids[0, 2:, None]).mean(), (logp.exp() * (logp - plain)).sum(-1).mean()))
    return {name: {"perplexity": math.exp(mean(float(nll) for nll, _ in v)), "kl": mean(float(kl) for _, kl in v)}
            for name, v in out.items()}


def evaluate(lab, names):
    """All conditions `names` on the test prompts: answers, why some do not apply, what was chosen, and neutral text."""
    test, skipped, deciders, bias = lab.prompts["test"], {}, {}, None
    for name in names:
        try:
            if name in STEERING and (name != "shuffled" or len(test) > 1):
                deciders[name] = STEERING[name](lab)
            elif name == "logit_bias":
                bias = logit_bias(lab)
            elif name == "format_control" and not lab.one:
                raise NotApplicable("answers are longer than one token")
        except NotApplicable as e:
            skipped[name] = str(e)
    # test prompts in random chunks, so that `shuffled` exchanges decisions between any two; by length inside a chunk
    order = random.Random(lab.seed).sample(sorted(test, key=lambda p: p.row["id"]), len(test))
    count = math.ceil(len(order) / CHUNK)
    chunks = [sorted(order[c::count], key=lambda p: (len(p.ids), p.row["id"])) for c in range(count)]
    first_pass = {"unsteered": None} | {name: d for name, d in deciders.items() if name != "shuffled"}
    said, first = {}, 0
    bar = tqdm(total=len(test), desc=lab.name, leave=False, mininterval=1, unit="prompt")
    for c, chunk in enumerate(chunks):
        def answer_chunk():
            out = steer(lab, chunk, first_pass, first, keep=lab.one, bar=bar)
            if bias is not None:
                out["logit_bias"] = [biased_answer(lab, p, bias) for p in chunk]
            if "shuffled" in deciders:
                ring = random.Random(lab.seed + c).sample(range(first, first + len(chunk)), len(chunk))
                lab.partner.update(zip(ring, ring[1:] + ring[:1]))
                out |= steer(lab, chunk, {"shuffled": deciders["shuffled"]}, first, title="shuffled")
            for p in chunk:
                p.x = p.kv = p.ref_logp = None
            return out
        for name, answers in lab.cached(f"answers-{c}", answer_chunk).items():
            said.setdefault(name, []).extend(answers)
        first += len(chunk)
        bar.n = first
    bar.close()
    for name in (n for n in names if n in WHOLE):
        try:
            said[name] = [a | {"kl": None} for a in lab.cached(name, lambda: WHOLE[name](lab))["said"]]
        except NotApplicable as e:
            skipped[name] = str(e)
    chosen = {}
    for name in (n for n in names if (lab.folder / f"{lab.name}.{n}.json").exists() and n != "logit_bias"):
        found = json.loads((lab.folder / f"{lab.name}.{name}.json").read_text())
        chosen[name] = found if isinstance(found, list) else found.get("chosen", found)
        if name == "caa":
            del chosen[name]["vectors"]
    text = {name: d for name, d in deciders.items() if name != "shuffled"}
    return said, skipped, chosen, lab.cached("neutral", lambda: neutral(lab, text)) if lab.origin is None else None


# ------------------------------------------------------------------------------------------------------------ main
def load_judge(spec, device):
    """texts -> [bool] by a text classifier one of whose labels is about refusing (or rejecting)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    if not spec.startswith("hf:"):
        fail(f"--refusal-judge {spec}: must be hf:<classifier id or directory>")
    online = crl.hub_reachable()
    try:
        tok = AutoTokenizer.from_pretrained(spec[3:], trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(spec[3:], trust_remote_code=False,
                                                                   use_safetensors=True)
    except Exception as e:  # transformers raises many kinds here; each becomes one line
        first = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        fail(f"--refusal-judge: cannot load {spec[3:]}{'' if online else ' (the hub cannot be reached)'}: {first}")
    names = model.config.id2label
    refusing = [i for i, label in names.items() if "refus" in label.lower() or "reject" in label.lower()]
    refusing = [i for i in refusing if not any(w in names[i].lower() for w in ("non", "not", "no_", "no-"))]
    if len(refusing) != 1:
        fail(f"--refusal-judge {spec[3:]}: one label must be about refusing; it has {', '.join(names.values())}")
    model = model.eval().to(device)

    @torch.no_grad()
    def judge(texts):
        out = []
        for s in range(0, len(texts), 32):
            batch = tok([text.rsplit("</think>", 1)[-1] for text in texts[s:s + 32]], padding=True, truncation=True,
                        return_tensors="pt")
            out += (model(**batch.to(device)).logits.argmax(-1) == refusing[0]).tolist()
        return out
    return judge


def stored_flags(path):
    """The flags that a run was trained with, as args.json has them; a run older than --screen was not screened."""
    try:
        return {"screen": False} | dict(json.loads((Path(path) / "args.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--run {path}: no readable args.json there; give a run directory that crl_ppo.py printed")


def check_grid(paths):
    """{task: (seeds, folds)} of the runs; refuses runs of one task in which a seed was not trained in every fold."""
    cells, out = {}, {}
    for flags in map(stored_flags, paths):
        cells.setdefault(flags.get("task"), set()).add((flags.get("seed"), flags.get("fold", 0)))
    for task, there in cells.items():
        seeds, folds = (sorted(set(part), key=str) for part in zip(*there))
        for cell in ((s, f) for s in seeds for f in folds if (s, f) not in there):
            fail(f"--run: {task} has no run of seed {cell[0]} in fold {cell[1]}; every seed needs every fold {folds}")
        out[task] = (seeds, folds)
    return out


def over_folds(runs):
    """[(run, lab, rows, found, best)] of one task as seeds of one experiment: (answers by condition and seed, rows, the
    oracle's tries by seed, fold of each row). The runs of a seed in all folds answer every prompt once between them."""
    seeds, rows, fold_of = {}, {}, {}
    for _, lab, mine, found, best in sorted(runs, key=lambda r: str(r[1].args.seed)):
        seeds.setdefault(lab.args.seed, []).append((found[0], best or {}))
        rows |= mine
        fold_of |= dict.fromkeys(mine, lab.args.fold)
    said = {c: [[a for answers, _ in parts for a in answers[c]] for parts in seeds.values()]
            for c in CONDITIONS if all(c in r[3][0] for r in runs)}
    tries = [{i: right for _, best in parts for i, right in best.items()} for parts in seeds.values()]
    return said, rows, tries, fold_of


def load_run(opts, path, folder, name):
    """(Lab of a run, what it is: model, SAE and data with their hashes, and the flags it was trained with).

    Fails with one line, naming the field, when its model, SAE or data differ from what it recorded."""
    run, stored = Path(path), stored_flags(path)
    unknown = sorted(stored.keys() - {f.name for f in dataclasses.fields(crl.Args)})
    if unknown:
        fail(f"--run {run}: {unknown[0]} is no flag of this crl_ppo.py; evaluate the run with the version that made it")
    args = crl.Args(**{key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()})
    own = {"data_dir": opts.data_dir, "cache_dir": opts.cache_dir, "device": opts.device,
           "micro_batch": opts.micro_batch}
    args = dataclasses.replace(args, **{key: value for key, value in own.items() if value is not None})
    crl.check_args(args)
    lm, sites, prompts, identity = crl.set_up(args)
    agents = [crl.Agent(args, site).to(lm.device).eval() for site in sites]
    identity.pop("source")
    crl.load_checkpoint(run / f"{opts.checkpoint}.safetensors", identity, agents)
    identity["args"] = {key: v for key, v in dataclasses.asdict(args).items() if key not in HANDLING}
    for agent in agents:
        if not agent.obs_mean[1].any():  # trained on one-token answers: no statistics of generated positions of its own
            agent.obs_mean[1], agent.obs_std[1] = agent.obs_mean[0].clone(), agent.obs_std[0].clone()
    args.kl_coef = 1.0
    judge = load_judge(opts.refusal_judge, lm.device) if opts.refusal_judge else None
    lab = Lab(opts, args, lm, agents, prompts, name, folder, judge)
    lab.prompts["test"] = test_prompts(lab, prompts["test"])
    return lab, identity


def test_prompts(lab, rows):
    """Prompts of test rows: --test-samples of them, those that fit the model's context."""
    rows = sorted(rows, key=lambda r: r["id"])[:lab.opts.test_samples or None]
    prompts = [crl.Prompt(row, crl.format_prompt(lab.lm, row)) for row in rows]
    fit = [p for p in prompts if len(p.ids) + lab.args.max_new_tokens <= lab.lm.context]
    if len(fit) < len(prompts):
        print(f"{len(prompts) - len(fit)} test prompts are longer than the context of {lab.lm.context} tokens: skipped")
    if not fit:
        fail(f"{lab.args.task} has no test prompts; add rows, or give the --data-dir that the run had")
    return fit


def on_task(lab, task):
    """The same controller before the test prompts of another task."""
    args = dataclasses.replace(lab.args, task=task, fold=0)
    rows = crl.load_rows(args)[0]["test"]
    defaults = crl.TASKS[task.partition(":")[0]]["defaults"]
    if any(r["choices"] is None for r in rows) and defaults["max_new_tokens"] == 1 or lab.lm.thinks:
        defaults = crl.LONG | {"max_new_tokens": 512 if lab.lm.thinks else crl.LONG["max_new_tokens"]}
    args.max_new_tokens, args.reward_decoding = defaults["max_new_tokens"], defaults["reward_decoding"]
    name = f"{lab.name}.{hashlib.sha256(task.encode()).hexdigest()[:8]}"
    other = dataclasses.replace(lab, args=args, prompts={}, name=name, chosen={}, partner={}, origin=lab, held={})
    other.prompts["test"] = test_prompts(other, rows)
    return other


def show_prompt(lab, text):
    """Print one answer token by token: what was pushed, what was said, what the unsteered model would say there."""
    lm = lab.lm
    lab.args.max_new_tokens = lab.opts.max_new_tokens
    row = {"id": "prompt", "prompt": text, "choices": None, "answer": "", "meta": {}}
    p, picks, decide_ = crl.Prompt(row, crl.format_prompt(lm, row)), {}, policy(lab)

    def decide(i, x, t, rows):
        delta, actions = decide_(i, x, t, rows)
        picks.setdefault(t, []).extend(f"{lab.sites[i].layer}: {lab.sites[i].label(a)}" for a in actions[0].tolist())
        return delta[:, None]
    with torch.no_grad():
        (ids,), _ = crl.decode(lm, lab.sites, [p], [1], lab.args.max_new_tokens, decide, lab.args.steer_tokens)
        (plain,), _ = crl.decode(lm, lab.sites, [p], [1], lab.args.max_new_tokens, None)
        (there,), (logp,) = crl.unsteered_next(lm, [p], [ids])
    rows = [[t, repr(lm.tok.decode([a])), repr(lm.tok.decode([b])), f"{lp:.2f}", ", ".join(picks.get(t, ()))]
            for t, (a, b, lp) in enumerate(zip(ids, there, logp))]
    print(table(["t", "said", "unsteered", "unsteered log p", f"pushed (layer: feature), c = {lab.args.coef:g}"], rows))
    for title, answer in (("unsteered", plain), ("steered", ids)):
        print(f"\n{title}: {lm.tok.decode(answer, skip_special_tokens=True)}")


def check_opts(opts):
    """Refuse impossible flags; commas separate names as well as spaces do. Returns the conditions to evaluate."""
    if not opts.run:
        fail("--run is missing: give one or more run directories of crl_ppo.py")
    opts.conditions, opts.tasks = (tuple(w for item in given for w in item.split(",") if w)
                                   for given in (opts.conditions, opts.tasks))
    for name in opts.conditions:
        if name not in CONDITIONS:
            fail(f"unknown condition {name!r}{crl.suggest(name, CONDITIONS)}")
    for task in opts.tasks:
        kind, _, path = task.partition(":")
        if kind not in crl.TASKS or (kind == "file") != bool(path) or path and not Path(path).is_file():
            fail(f"--tasks: unknown task {task!r}{crl.suggest(task, list(crl.TASKS))}")
    if opts.checkpoint not in ("best", "last"):
        fail(f"--checkpoint {opts.checkpoint}: must be best or last")
    for f in dataclasses.fields(Args):
        least = 0 if f.name in ("test_samples", "oracle_prompts", "constant_prompts", "seed") else 1e-9
        values = getattr(opts, f.name)
        for v in values if isinstance(values, tuple) else (values,):
            if type(v) in (int, float) and not least <= v < math.inf:  # also refuses NaN
                fail(f"--{f.name.replace('_', '-')} {v}: must {'not be negative' if least == 0 else 'be positive'}")
    if not opts.coefs or not opts.shots:
        fail("--coefs and --shots need at least one value")
    if opts.neutral_text and not Path(opts.neutral_text).is_file():
        fail(f"--neutral-text: no such file: {opts.neutral_text}")
    wanted = opts.conditions or tuple(c for c in CONDITIONS if c not in ("crl_sampled", "sft_lora", "sft_full"))
    wanted += ("crl_sampled",) * opts.sampled + tuple(f"sft_{kind}" for kind in opts.sft)
    return tuple(c for c in CONDITIONS if c in (*CROSS, *wanted))


def open_parts(opts, out):
    """The folder of finished pieces, emptied, or with --resume kept if flags and checkpoints are those it was begun
    with; and the flags that decide what the results are."""
    where = ("run", "out", "resume", "device", "micro_batch", "cache_dir", "data_dir")
    own = flags = {f.name: getattr(opts, f.name) for f in dataclasses.fields(Args) if f.name not in where}
    own = dict(own)
    for n, path in enumerate(opts.run):
        file = Path(path) / f"{opts.checkpoint}.safetensors"
        if not file.is_file():
            fail(f"--run {path}: no {file.name} there; was this run stopped before its first validation or checkpoint?")
        own[f"run {n + 1}"] = crl.sha256(file)
    own, parts = json.loads(json.dumps(own)), out / "parts"
    if opts.resume and (parts / "made_with.json").exists():
        made = json.loads((parts / "made_with.json").read_text())
        for key in own:
            if made.get(key) != own[key]:
                fail(f"--resume: {key} differs: {out} was begun with {made.get(key)!r}, now {own[key]!r}")
    else:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_atomically(parts / "made_with.json", lambda tmp: tmp.write_text(json.dumps(own)))
    return parts, flags


def main(opts):
    """Evaluate opts.run, write the files and print the tables; returns what is in results.json."""
    # 1. flags
    started, names = time.time(), check_opts(opts)
    torch.manual_seed(opts.seed)
    if opts.prompt is not None:
        if not opts.prompt.strip():
            fail("--prompt is empty")
        return show_prompt(load_run(opts, opts.run[0], None, "prompt")[0], opts.prompt)
    out = Path(opts.out or Path(opts.run[0]) / "eval")
    for path in opts.run:
        if not Path(path).is_dir():
            fail(f"--run {path}: no such directory")
    grid = check_grid(opts.run)
    folder, flags = open_parts(opts, out)

    # 2. every run on its own task, and on those of --tasks
    results = {"schema": SCHEMA, "flags": flags, "runs": [], "tasks": {}, "cross": {}}
    done, elsewhere, first = {}, {}, None  # task -> [(run, lab, rows, what evaluate() returned, oracle)]
    for n, path in enumerate(opts.run):
        lab, identity = load_run(opts, path, folder, f"run{n + 1}")
        task, first = lab.args.task, first or identity
        name = Path(path).name  # its path where another run, of a neighbouring folder, has the same name
        name = name if [Path(other).name for other in opts.run].count(name) == 1 else str(path)
        for key in ("model_hash", "sae", "sae_hash", "layer"):
            drawn = key == "sae_hash" and all(s.startswith("random:") for s in identity["sae"])  # anew for every seed
            if identity[key] != first[key] and not drawn:
                fail(f"--run {path}: {key} differs from {opts.run[0]}: {identity[key]!r}, there {first[key]!r}")
        rows = {p.row["id"]: p.row for p in lab.prompts["test"]}
        for other in (r for r in results["runs"] if r["task"] == task):
            mine, theirs = json.loads(json.dumps(identity["args"])), other["args"]
            unlike = next((key for key in mine if key not in ("seed", "fold") and mine[key] != theirs[key]), None)
            if unlike or (mine["seed"], mine["fold"]) == (theirs["seed"], theirs["fold"]):
                why = f"{unlike} is {mine[unlike]!r}, there {theirs[unlike]!r}" if unlike else "the same seed"
                fail(f"--run {path}: no other seed of the experiment of {other['run']} ({why}); evaluate it on its own")
        for other in done.get(task, ()):
            if rows != other[2] if lab.args.fold == other[1].args.fold else rows.keys() & other[2].keys():
                fail(f"--run {path}: test prompts differ from those of {other[0]} (data_seed, or another source)")
        results["runs"].append(json.loads(json.dumps({"run": name, "seed": lab.args.seed, **identity})))
        print(f"{path}: {task}, {len(rows)} test prompts, conditions: {', '.join(names)}", flush=True)
        found = evaluate(lab, names)
        best = lab.cached("oracle", lambda: oracle(lab)) if opts.oracle_prompts else None
        done.setdefault(task, []).append((name, lab, rows, found, best))
        for other in (t for t in opts.tasks if t != task):
            there = on_task(lab, other)
            rows = {p.row["id"]: p.row for p in there.prompts["test"]}
            pareto = {task, other} == set(REFUSALS)  # every condition goes into the plot of over-refusal
            said = evaluate(there, names if pareto else CROSS)
            elsewhere.setdefault((task, other), []).append((name, there, rows, said, None))
            there.lm = there.agents = there.origin = None  # the next run loads its own
        lab.prompts.clear()
        vars(lab).pop("seen", None)
        lab.lm = lab.agents = None
        for weights in folder.glob(f"{lab.name}.sft_*.safetensors"):
            weights.unlink()

    # 3. statistics
    for task, runs in done.items():
        lab, texts, (seeds, folds) = runs[0][1], [r[3][3] for r in runs], grid[task]
        said, rows, tries, fold_of = over_folds(runs)
        decodings = ("free", "constrained") if lab.one else ("free",)
        primary = lab.args.reward_decoding if lab.one else "free"
        summary = summarise(said, fold_of, decodings, opts.resamples, opts.seed)
        results["tasks"][task] = {
            "n": len(rows), "decodings": decodings, "primary": primary, "seeds": seeds,
            "folds": folds, "conditions": summary, "skipped": {c: why for r in runs for c, why in r[3][1].items()},
            "chosen": {r[0]: r[3][2] for r in runs}, "by_group": by_group(said, rows, primary, fold_of),
            "bias": bias_scores(said, rows) if task.startswith("bbq") and lab.one else None,
            "oracle": headroom(tries, said, decodings) if opts.oracle_prompts else None,
            "neutral": {c: {k: mean(t[c][k] for t in texts) for k in texts[0][c]} for c in said if c in texts[0]}}
        results["cross"].setdefault(task, {})[task] = {
            "n": len(rows), "decoding": primary, "by_group": results["tasks"][task]["by_group"],
            **{c: v[primary]["accuracy"] for c, v in summary.items() if primary in v},
            **{k: v for k, v in summary["crl"][primary]["vs_unsteered"].items() if "holm" not in k}}
    for (task, other), runs in elsewhere.items():
        lab, rows, conditions = runs[0][1], runs[0][2], [c for c in CONDITIONS if all(c in r[3][0] for r in runs)]
        said = {c: [r[3][0][c] for r in runs] for c in conditions}
        decoding = lab.args.reward_decoding if lab.one else "free"
        Y = {c: outcomes(said[c], sorted(rows), decoding) for c in conditions}
        results["cross"][task][other] = {
            "n": len(rows), "decoding": decoding, **{c: float(y.mean()) for c, y in Y.items()},
            "by_group": by_group(said, rows, decoding),
            **compare(Y["crl"], Y["unsteered"], opts.resamples, opts.seed),
            "bias": bias_scores(said, rows) if other.startswith("bbq") and lab.one else None}

    # 4. files and the terminal table
    lines, text = [], report(results)
    for name, lab, rows, (said, *_), _ in [r for runs in (*done.values(), *elsewhere.values()) for r in runs]:
        for condition, a in ((c, a) for c in said for a in sorted(said[c], key=lambda a: a["id"])):
            row, a = rows[a["id"]], dict(a)
            gold = chr(65 + row["answer"]) if row["choices"] else row["answer"]
            lines.append(json.dumps({"schema": SCHEMA, "run": name, "seed": lab.args.seed, "task": lab.args.task,
                                     "condition": condition, "id": a.pop("id"), "prompt": row["prompt"], "answer": gold,
                                     "text": a.pop("text"), "correct": a.pop("reward"), **a}) + "\n")
    write_atomically(out / "predictions.jsonl", lambda tmp: tmp.write_text("".join(lines)))
    write_atomically(out / "results.json", lambda tmp: tmp.write_text(json.dumps(results, indent=1)))
    write_atomically(out / "report.md", lambda tmp: tmp.write_text(text))

    def save(fig, file):
        fig.tight_layout()
        write_atomically(out / file, lambda tmp: fig.savefig(tmp, format="png", dpi=100, metadata={"Software": None}))
    plots(results, save)
    for name, task in results["tasks"].items():
        folds = f" in {len(task['folds'])} folds" * (len(task["folds"]) > 1)
        print(f"\n{name}, {task['n']} test prompts{folds}, {len(task['seeds'])} seed(s), {task['primary']} decoding")
        print(main_table(task, task["primary"]))
    print(f"\n{time.time() - started:.0f} s; report.md, results.json, predictions.jsonl and plots are in {out}")
    return results


if __name__ == "__main__":
    try:
        main(ARGS)
    except OSError as e:
        fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}; --resume keeps what is finished")
    except KeyboardInterrupt:
        fail("interrupted; --resume continues with what is finished")
