"""Evaluation of trained policies: every cheaper explanation of a gain, on the same test prompts.

    python crl_eval.py --run runs/A [runs/B ...] [--conditions unsteered crl] [--tasks gsm8k,xstest]

Read from the top: conditions (copy one) -> part files -> main; runs and their test prompts: crl_runs.py.
All choices are made on training and validation prompts, and every baseline may abstain (no-op, no shots,
epoch 0). Test prompts are only ever answered. On a CPU the same runs and flags give the same bytes. Shapes:
N prompts, G answers to a prompt, T decisions of an answer, S sequences of T actions in the mask, d residual.

Files in --out:
  predictions.jsonl  a line per run, condition, task, prompt and draw: crl_stats.FIELDS, and text, tokens
                     (their number), actions (per decision {layer, feature, name, coefficient} or null; the
                     last one holds), setting (a baseline's choice) and, for unsteered, the prompt
  parts/             a file per run, task and condition, written when it is finished, for --resume
  summary.json, report.md, conditions.png: made by crl_stats.py
"""

import contextlib
import copy
import math
import re
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import crl_hub as hub


@dataclass
class Args:
    run: tuple[str, ...] = ()
    """run directories of crl_ppo.py: seeds, folds or tasks of one model"""
    out: str | None = None
    """where the results go (default: eval/ in the first run directory)"""
    resume: bool = False
    """keep what an interrupted evaluation of the same runs, prompts and flags left in --out"""
    conditions: tuple[str, ...] = ()
    """conditions by name (default: all but sft_lora, which is slow); unsteered and crl are always there"""
    tasks: tuple[str, ...] = ()
    """other tasks (a,b) that unsteered, crl, constant_best and sft_lora answer as well: what is lost there
    (default: all of the run's kind, letters or long answers, that share no rows with its task and whose rows
    can be had; for file: tasks, and with `none`, no other one)"""
    test_samples: int = 0
    """test prompts of a task (0: all of the run's own, 200 of each other one)"""
    sft_epochs: int = 15
    """most epochs of fine-tuning; three without progress end it"""
    data_dir: str | None = None
    """local mirror of the data, if not the one that the run recorded"""
    device: str | None = None
    """device, if not the one that the run recorded"""
    batch_size: int | None = None
    """prompts in a forward pass, if not the number that the run recorded"""


if __name__ == "__main__":
    ARGS = hub.tyro_cli(Args, description=__doc__.split("\n\n")[0])  # before heavy imports: --help is quick

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

import crl_ppo
import crl_runs
import crl_stats
import crl_tasks
from crl_runs import HANDLING, batches, beside, complete, mean_reward, padded, plain, read_letters
from crl_tasks import named_option

DRAWS = 16  # answers to a prompt under random actions
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # probe_switch: inverse of the ridge penalty
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # corrsteer_s: of the mean activation; caa: of --coef
SHOTS = (1, 4)  # few_shot: solved training prompts before the question, next to 0
RATES = (1e-3, 2e-4)  # sft_lora: learning rates
RANK = 8  # sft_lora: rank of the added matrices
BATCH = 8  # sft_lora: prompts of a step
EPOCH = 400  # sft_lora: most prompts between two looks at validation
PATIENCE = 3  # sft_lora: looks without progress that end a learning rate
CONSTANTS = (DRAWS, PENALTIES, MULTIPLES, SHOTS, RATES, RANK, BATCH, EPOCH, PATIENCE, crl_stats.SCHEMA)
ELSEWHERE = ("unsteered", "crl", "constant_best", "sft_lora")  # what answers other tasks


class Answers(NamedTuple):
    """What a condition returns."""

    completions: list  # N lists of G lists of token ids
    setting: str = ""  # what a baseline has chosen
    env: object = None  # whose actions these are
    actions: torch.Tensor = None  # (N, G, T), if there are any


# ---------------------------------------------- choices among the mask's actions: Study -> (N, 1, T)
def unsteered(study):
    """The frozen model."""
    return torch.tensor(study.env.noop).expand(len(study.env.prompts), 1, study.args.decisions)


@cache
def crl(study):
    """The trained policy, greedy."""
    agent = study.run.agent
    if study.args.decisions > 1:
        rows = torch.arange(len(study.env.prompts))
        return crl_ppo.rollout(study.env, agent, rows, greedy=True).actions.permute(1, 2, 0)
    return agent.get_policy(study.observe()).logits.argmax(-1)[:, None, None]


def shuffled(study):
    """The policy's actions for another test prompt: does the choice depend on the prompt?"""
    order = torch.randperm(len(study.env.prompts), generator=study.run.generator())
    partner = order.roll(1)[order.argsort()]  # one cycle: no prompt keeps its own
    return crl(study)[partner]


@cache
def candidates(run):
    """The no-op and the sequences of the mask, those that are best on training prompts first: (1 + S, T), and
    what they earn on training and then on validation prompts (N, 1 + S)."""
    noop = torch.full_like(run.sequences[:1], run.env.noop)
    sequences = torch.cat([noop, run.sequences])
    actions = sequences.expand(len(run.env.prompts), -1, -1)
    rewards = run.env.score_all(run.env.prompts, complete(run.env, actions))
    best = rewards[: run.n, 1:].mean(0).argsort(descending=True, stable=True)
    order = torch.cat([torch.tensor([0]), best + 1])
    return sequences[order], rewards[:, order]


def constant_best(study):
    """The same actions for all prompts: does a policy have to look at the prompt?

    They are the best on validation of the no-op and the four sequences that are best on training prompts."""
    sequences, rewards = candidates(study.run)
    best = rewards[study.run.n :, :5].mean(0).argmax()  # of equals the first
    return sequences[best].expand(len(study.env.prompts), 1, -1)


def has_classes(run):
    """Whether the right answers to training prompts are of two classes or more, for a probe."""
    kinds = {crl_tasks.kind_of(p.row) for p in run.prompts["train"]}
    return None not in kinds and len(kinds) > 1


@cache
def fit_switch(run):
    """(probe, {class: sequence (T,)}); None where that gains nothing on validation.

    A linear probe tells the class of the right answer from what the policy reads. Each class gets the
    sequence that is best on its training prompts. The probe's penalty is the best on validation."""
    sequences, rewards = candidates(run)
    x = run.agent.observe(run.env.obs[:, 0], 0).numpy()
    kinds = [crl_tasks.kind_of(p.row) for p in run.prompts["train"]]
    best = {}
    for kind in set(kinds):
        rows = torch.tensor([other == kind for other in kinds])
        best[kind] = rewards[: run.n][rows].sum(0).argmax()  # of equals the first
    validation = rewards[run.n :]
    most = validation[:, 0].sum()
    found = None
    for C in PENALTIES:
        probe = LogisticRegression(C=C, max_iter=1000).fit(x[: run.n], kinds)
        picks = torch.stack([best[kind] for kind in probe.predict(x[run.n :])])
        worth = validation.gather(1, picks[:, None]).sum()
        if worth > most:
            most = worth
            found = probe, {kind: sequences[number] for kind, number in best.items()}
    return found


def probe_switch(study):
    """The best actions for what a linear probe says: is supervised learning from the same labels as good?"""
    fitted = fit_switch(study.run)
    if fitted is None:
        return unsteered(study)
    probe, best = fitted
    told = probe.predict(study.observe().numpy())
    return torch.stack([best[kind] for kind in told])[:, None]


CHOOSING = (unsteered, crl, shuffled, constant_best, probe_switch)


# ----------------------------------------------- other actions, prompts or weights: Study -> Answers
def draw_actions(env, everything, actions, generator):
    """Actions of `everything`: random features of the site and strength of `actions` (...) of `env`."""
    starts = []
    sizes = []
    for site, _, coef in env.actions[:-1]:
        starts.append(everything.actions.index((site, 0, coef)))
        sizes.append(len(env.sites[site].directions))
    starts = torch.tensor([*starts, everything.noop])
    sizes = torch.tensor([*sizes, 1])
    u = torch.rand(actions.shape, generator=generator, dtype=torch.double)
    return starts[actions] + (u * sizes[actions]).long()


def random(study):
    """DRAWS answers to each prompt with other features: does it matter which ones?"""
    everything = copy.copy(study.env)  # with its shared beginning; its memo is of no use
    for name in ("actions", "steering", "site_of", "noop"):
        setattr(everything, name, getattr(study.run.all_actions, name))
    like = crl(study).expand(-1, DRAWS, -1)
    actions = draw_actions(study.env, everything, like, study.run.generator())
    completions = everything.generate(study.env.prompts, crl_ppo.fixed(actions), DRAWS)
    return Answers(completions, "", everything, actions)


def note(xs, site, h):
    """Keep the residual stream of a site in the dict `xs`; leaves it as it is."""
    xs[site] = h.float().cpu()
    return h


@cache
@torch.no_grad()
def read_training(run):
    """What is in the unsteered model where it writes the tokens of its answers to n training prompts.

    Which answers are right (n,), and per site the mean residual stream (n, d) and the largest activation of
    every feature (n, D); without an SAE activations are coordinates along the directions."""
    env = run.env
    prompts = run.prompts["train"]
    means = [torch.zeros(run.n, site.directions.shape[1]) for site in env.sites]
    largest = [torch.zeros(run.n, len(site.directions)) for site in env.sites]
    for rows in batches(env, prompts):
        answers = [env.completions[row][env.noop] for row in rows]
        texts = [prompts[row].ids + answer[:-1] for row, answer in zip(rows, answers, strict=True)]
        xs = {}
        with crl_ppo.residual_hook(env.steered_layers, partial(note, xs)):
            env.decoder(**padded(env, texts))
        for number, site in enumerate(env.sites):
            for b, row in enumerate(rows):
                x = xs[number][b, -max(1, len(answers[b])) :]  # (tokens, d)
                acts = x @ site.directions.T
                if site.sae is not None:
                    acts = site.sae.encode(x.to(site.sae.W_dec)).float().cpu()
                means[number][row] = x.mean(0)
                largest[number][row] = acts.amax(0)
    return env.memo[: run.n, -1] > 0, means, largest


def best_vector(run, vectors, coef, coef_mode):
    """(environment, action) of the vector at a multiple of `coef` that is best on validation, or the no-op.

    vectors: {layer: (name, (d,))}."""
    if not vectors:
        return run.env, run.env.noop
    args = replace(run.args, coef=tuple(m * coef for m in MULTIPLES), coef_mode=coef_mode)
    sites = []
    for layer, (name, vector) in vectors.items():
        sites.append(hub.Site(layer, vector[None], None, name, "", {0: {"name": name}}))
    env = crl_ppo.Environment(args, run.env.model, run.env.tok, sites)
    env.ask(run.prompts["val"])
    order = torch.arange(-1, env.noop) % (env.noop + 1)  # the no-op first
    rewards = env.rewards(torch.arange(len(env.prompts)), order)
    return env, int(order[rewards.mean(0).argmax()])  # of equals the first


def with_vector(study, env, action):
    """Answers to the test prompts under one action of the environment of best_vector()."""
    args = replace(study.args, coef_mode=env.args.coef_mode)
    there = beside(env, study.env.prompts, args)
    actions = torch.tensor(action).expand(len(there.prompts), 1, 1)
    return Answers(complete(there, actions), "", there, actions)


@torch.no_grad()
def contribution(site, f, x, acts):
    """What feature f adds to the residual stream (d,), mean over n answers: decode(a) - decode(a without f).

    x (n, d): residual streams, which SAEs that normalise their input scale the output by; acts (n, D)."""
    if site.sae is None:
        return acts[:, f].mean() * site.directions[f]
    total = torch.zeros(x.shape[1])
    for some, a in zip(x.split(256), acts.split(256), strict=True):
        some = some.to(site.sae.W_dec)
        a = a.to(site.sae.W_dec)
        without = a.index_fill(1, torch.tensor([f], device=a.device), 0)
        decoded = []
        for kept in (a, without):
            site.sae.encode(some)  # SAELens' decode() takes the scale from the call before
            decoded.append(site.sae.decode(kept))
        total += (decoded[0] - decoded[1]).sum(0).float().cpu()
    return total / len(x)


@cache
def fit_corrsteer(run):
    """CorrSteer (Cho et al., arXiv 2508.12535): the feature whose largest activation over the generated
    tokens has the highest positive Pearson correlation with correctness, at a multiple of what it
    contributes on average where answers are right."""
    right, means, largest = read_training(run)
    y = right.double() - right.double().mean()
    vectors = {}
    for site, x, acts in zip(run.env.sites, means, largest, strict=True):
        a = acts.double()  # (n, D)
        spread = (a - a.mean(0)).norm(dim=0) * y.norm()
        r = torch.where(spread > 1e-9, y @ a / spread.clamp(min=1e-9), 0.0)
        if r.max() > 0:
            f = int(r.argmax())
            vector = contribution(site, f, x[right], acts[right])
            vectors[site.layer] = (f"feature {f}, r = {r[f]:.3f}", vector)
    return best_vector(run, vectors, 1.0, "abs")


def corrsteer_s(study):
    return with_vector(study, *fit_corrsteer(study.run))


@cache
def fit_caa(run):
    """Contrastive activation addition (Rimsky et al. 2024): the mean residual stream of right answers
    less that of wrong ones."""
    right, means, _ = read_training(run)
    vectors = {}
    if 0 < right.sum() < len(right):
        for site, x in zip(run.env.sites, means, strict=True):
            difference = x[right].mean(0) - x[~right].mean(0)
            vectors[site.layer] = ("right - wrong", F.normalize(difference, dim=0))
    return best_vector(run, vectors, max(map(abs, run.args.coef)), run.args.coef_mode)


def caa(study):
    return with_vector(study, *fit_caa(study.run))


def offered(prompts, scores):
    """Scores (N, 26) with -inf for letters that a prompt does not offer."""
    counts = torch.tensor([len(p.row["choices"]) for p in prompts])
    return scores.masked_fill(torch.arange(26) >= counts[:, None], -math.inf)


def best_letters(env, prompts, scores):
    """N completions: the offered letter that has the highest score."""
    return [env.letters[letter][:1] for letter in offered(prompts, scores).argmax(-1).tolist()]


def format_control(study):
    """The frozen model held to the option letters: is it only the format?"""
    return said(best_letters(study.env, study.env.prompts, read_letters(study.env)))


def said(completions, setting=""):
    """Answers of unsteered completions, one to a prompt."""
    return Answers([[completion] for completion in completions], setting)


@cache
def fit_letters(run):
    """(bias (26,), share of it that is best on validation: 0, half or all).

    The bias per letter is the most likely one on training prompts, by generalised iterative scaling (Darroch
    and Ratcliff 1972)."""
    train = run.prompts["train"]
    val = run.prompts["val"]
    scores = offered(train, read_letters(run.env)[: run.n])
    gold = torch.tensor([p.row["answer"] for p in train]).bincount(minlength=26)
    bias = torch.zeros(26)
    for _ in range(200):
        expected = (scores + bias).softmax(-1).sum(0)
        bias = bias + ((gold + 0.1) / (expected + 0.1)).log()
    scores = read_letters(run.env)[run.n :]
    worth = {}
    for share in (0.0, 0.5, 1.0):
        letters = best_letters(run.env, val, scores + share * bias)
        worth[share] = mean_reward(run.env, val, letters)
    return bias, max(worth, key=worth.get)


def logit_bias(study):
    """A bias per option letter: is it only a prior over letters?"""
    bias, share = fit_letters(study.run)
    scores = read_letters(study.env) + share * bias
    return said(best_letters(study.env, study.env.prompts, scores), f"{share:g} of the bias")


def after_shots(run, env, prompts, k):
    """Completions after the run's first k training prompts, solved, or as many as fit the model's context."""
    dressed = []
    for prompt in prompts:
        shots = run.prompts["shots"] + [p.row for p in run.prompts["train"][:k]]
        longer = crl_tasks.encode_prompt(env.tok, prompt.row, shots)
        while len(longer.ids) + env.args.max_new_tokens > env.context:
            shots.pop()
            longer = crl_tasks.encode_prompt(env.tok, prompt.row, shots)
        dressed.append(longer)
    return plain(env, dressed)


@cache
def fit_shots(run):
    """The number of shots, 0 among them, that is best on validation."""
    val = run.prompts["val"]
    worth = {k: mean_reward(run.env, val, after_shots(run, run.env, val, k)) for k in (0, *SHOTS)}
    return max(worth, key=worth.get)


def few_shot(study):
    """Solved training prompts before the question."""
    k = fit_shots(study.run)
    return said(after_shots(study.run, study.env, study.env.prompts, k), f"{k} shots")


# --------------------------------------------------------------------------------------- fine-tuning
@contextlib.contextmanager
def adapted(run, weights=None):
    """While open, LoRA (Hu et al. 2021) sits on every linear layer of the model; yields its {name: tensor}.

    weights: values for them; by default a start that changes nothing. Afterwards the model is what it
    was, bit for bit."""
    import peft

    model = run.env.model
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(run.generator().initial_seed())
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        wrapped = peft.get_peft_model(model, config)
    try:
        own = {name: w for name, w in wrapped.named_parameters() if w.requires_grad}
        for name, value in (weights or {}).items():
            own[name].data.copy_(value)
        yield own
    finally:
        wrapped.unload()
        vars(model).pop("peft_config", None)
        model.requires_grad_(False)


def gold_pairs(run):
    """[(token ids of a training prompt, those of the answer to learn)].

    Refusal tasks have no right texts: a refusal for harmful prompts, and for harmless ones the model's own
    answer where that is right."""
    env = run.env
    start = "" if crl_tasks.has_chat(env.tok) else " "
    if crl_tasks.opens_think(env.tok):
        start = "\n</think>\n\n"
    pairs = []
    for number, prompt in enumerate(run.prompts["train"]):
        row = prompt.row
        if crl_tasks.kind_of(row) == "safe":
            answer = env.completions[number][env.noop] if env.memo[number, env.noop] else []
        elif run.args.max_new_tokens == 1:
            answer = env.letters[row["answer"]][:1]
        else:
            answer = env.tok.encode(start + crl_tasks.solution(row), add_special_tokens=False)
            ends = [env.tok.eos_token_id] if env.tok.eos_token_id is not None else sorted(env.eos)
            answer = [*answer, *ends[:1]][: run.args.max_new_tokens]
        if answer:
            pairs.append((prompt.ids, answer))
    return pairs


def answer_loss(env, pairs):
    """Cross-entropy of the answers of [(prompt ids, answer ids)], mean over their tokens."""
    longest = max(len(answer) for _, answer in pairs)
    inputs = padded(env, [prompt + answer for prompt, answer in pairs])
    gold = [[-100] * (longest - len(answer)) + answer for _, answer in pairs]
    logits = env.model(**inputs, logits_to_keep=longest + 1).logits[:, :-1]
    gold = torch.tensor(gold, device=logits.device)
    return F.cross_entropy(logits.float().flatten(0, 1), gold.flatten(), ignore_index=-100)


@cache
def fit_lora(run):
    """(weights, what was chosen): learning rate and epoch that are best on validation, or epoch 0, the frozen
    model. A rate ends after PATIENCE epochs without progress; where nothing can be better, all end."""
    val = run.prompts["val"]
    pairs = gold_pairs(run)
    best = mean_reward(run.env, val, plain(run.env, val))
    found = {}, "epoch 0"
    for rate in RATES:
        with adapted(run) as weights:
            optimizer = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)
            order = run.generator()
            since = 0
            for epoch in range(1, run.opts.sft_epochs + 1):
                for part in torch.randperm(len(pairs), generator=order)[:EPOCH].split(BATCH):
                    optimizer.zero_grad()
                    answer_loss(run.env, [pairs[number] for number in part]).backward()
                    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
                    optimizer.step()
                reward = mean_reward(run.env, val, plain(run.env, val))
                since += 1
                if reward > best:
                    best = reward
                    since = 0
                    copies = {name: w.detach().clone() for name, w in weights.items()}
                    found = copies, f"learning rate {rate:g}, epoch {epoch}"
                if best == 1:
                    return found
                if since == PATIENCE:
                    break
    return found


def sft_lora(study):
    """Fine-tuning on the same training prompts."""
    weights, chosen = fit_lora(study.run)
    with adapted(study.run, weights) if weights else contextlib.nullcontext():
        return said(plain(study.env, study.env.prompts), chosen)


OTHERWISE = (random, corrsteer_s, caa, format_control, logit_bias, few_shot, sft_lora)


# ---------------------------------------------------------------------------------------- part files
@cache
def known(study):
    """A hash of all that answers hang on, whatever the condition: run, flags, prompts and right answers."""
    run = study.run
    args = {key: v for key, v in asdict(study.args).items() if key not in HANDLING}
    files = [hub.sha256(run.path / f"{name}.safetensors") for name in ("best", "rewards")]
    return hub.hash_of(CONSTANTS, study.env.prompts, run.path.name, run.identity, args, files)


def part(study, condition):
    """The part file of a condition."""
    epochs = study.run.opts.sft_epochs if condition == "sft_lora" else None
    name = f"{condition}.{hub.hash_of(known(study), epochs)}.jsonl"
    return Path(study.run.opts.out) / "parts" / name


def write_part(study, condition, answers):
    """The part file of a condition."""
    run = study.run
    env = study.env
    names = {"run": run.path.name, "model": run.identity["model"]}
    names |= {"task": study.args.task, "trained_on": run.args.task}
    about = {key: re.sub("(^|:)/.*/", r"\1", name) for key, name in names.items()}  # no machine's paths
    about |= {"schema": crl_stats.SCHEMA, "samples": run.args.samples}
    about |= {"fold": run.args.fold, "seed": run.args.seed, "condition": condition}
    lines = []
    for n, prompt in enumerate(env.prompts):
        row = prompt.row
        for draw, completion in enumerate(answers.completions[n]):
            reward, valid = env.score(row, completion)
            actions = []
            if answers.env:
                actions = [answers.env.describe(action) for action in answers.actions[n, draw].tolist()]
            text = env.tok.decode(completion, skip_special_tokens=study.args.max_new_tokens > 1)
            line = about | {"draw": draw, "choice": named_option(env, row, completion)}
            line |= {"actions": actions, "setting": answers.setting}
            line |= {"text": text, "tokens": len(completion)}
            line |= {key: row[key] for key in ("id", "group", "answer", "meta")}
            line |= {"reward": reward, "valid": valid}
            if condition == "unsteered":
                line["prompt"] = row["prompt"]
            lines.append(line)
    hub.write_jsonl(part(study, condition), lines)


def missing(study, names):
    """The conditions of these names that make sense on a study and have no part file yet."""
    own = study.args.task == study.run.args.task
    found = []
    for name in names:
        sense = own or name in ELSEWHERE
        if name in ("format_control", "logit_bias"):
            sense = sense and study.args.max_new_tokens == 1
        if name == "probe_switch":
            sense = sense and has_classes(study.run)
        if sense and not part(study, name).exists():
            found.append(name)
    return found


def answers_of(study, condition):
    """About how many answers a condition takes, those that it chooses by included."""
    n = len(study.env.prompts)
    train = study.run.n
    val = len(study.run.prompts["val"])
    more = {"random": 3 * n, "few_shot": 4 * n + 12 * val, "corrsteer_s": 2 * val, "caa": 2 * val}
    more["sft_lora"] = study.run.opts.sft_epochs * (3 * min(train, EPOCH) + val)  # half of all epochs
    own = study.args.task == study.run.args.task
    return n + (more.get(condition, 0) if own else 0)


def seconds_each(study):
    """Seconds that an answer takes, about, by the first tokens of a few."""
    env = study.env
    some = env.prompts[:4]
    noop = crl_ppo.fixed(torch.tensor(env.noop).expand(len(some), 1, 1))
    length = study.args.max_new_tokens
    seconds = []
    for steps in (1, 5) if length > 1 else (1,):
        started = time.perf_counter()
        env.generate(some, noop, 1, steps=steps)
        seconds.append(time.perf_counter() - started)
    token = max(0.0, seconds[-1] - seconds[0]) / 4
    return (seconds[0] + token * (length - 1)) / len(some)


def evaluate(studies, names):
    """Write the part files that are missing, each as soon as its condition is finished."""
    todo = {study: missing(study, names) for study in studies}
    total = sum(map(len, todo.values()))
    if total == 0:
        return
    each = {}  # by task: its runs have one model
    seconds = 0.0
    for study, left in todo.items():
        task = study.args.task
        if left and task not in each:
            each[task] = seconds_each(study)
        for name in left:
            seconds += each[task] * answers_of(study, name)
    print(f"{total} conditions: about {seconds:.0f} s", flush=True)
    with tqdm(total=total, desc="conditions") as bar:
        for study, left in todo.items():
            chosen = {}
            for condition in CHOOSING:
                if condition.__name__ in left:  # a letter takes the first decision of several
                    chosen[condition.__name__] = condition(study)[..., : study.args.decisions]
            if chosen:  # all in one pass
                completions = complete(study.env, torch.cat(list(chosen.values()), 1))
            for column, (name, actions) in enumerate(chosen.items()):
                answers = [[row[column]] for row in completions]
                write_part(study, name, Answers(answers, "", study.env, actions))
                bar.update()
        for condition in OTHERWISE:  # each for all studies: what one has fitted serves the others of its run
            for study, left in todo.items():
                if condition.__name__ in left:
                    write_part(study, condition.__name__, condition(study))
                    bar.update()


# ---------------------------------------------------------------------------------------------- main
def check_opts(opts):
    """Refuse impossible flags; names may be separated by commas. Returns the conditions to evaluate."""
    opts.run = tuple({Path(run).resolve(): run for run in opts.run}.values())  # each once
    opts.tasks = tuple(dict.fromkeys(filter(None, ",".join(opts.tasks).split(","))))
    opts.conditions = tuple(filter(None, ",".join(opts.conditions).split(",")))
    if not opts.run:
        hub.fail("--run is missing: give one or more run directories of crl_ppo.py")
    for name in opts.conditions:
        if name not in crl_stats.CONDITIONS:
            near = hub.suggest(name, crl_stats.CONDITIONS)
            hub.fail(f"--conditions: unknown condition {name!r}{near}")
    if opts.test_samples < 0 or opts.sft_epochs < 1:
        hub.fail("--test-samples must not be negative, --sft-epochs must be at least 1")
    wanted = opts.conditions or set(crl_stats.CONDITIONS) - {"sft_lora"}
    return [name for name in crl_stats.CONDITIONS if name in {"unsteered", "crl", *wanted}]


def main(opts):
    """Evaluate opts.run, write the files and print the report."""
    # 1. runs, and what they are tried on
    started = time.time()
    names = check_opts(opts)
    opts.out = str(opts.out or Path(opts.run[0]) / "eval")
    for run in opts.run:
        crl_ppo.stored_args(run)
    hub.check_out(Path(opts.out))
    runs = []
    for path in opts.run:
        # the model of the first serves all; load_run() refuses runs of another one
        loaded = (runs[0].env.model, runs[0].env.tok, runs[0].identity["model"]) if runs else None
        runs.append(crl_runs.load_run(opts, path, loaded))
    crl_runs.check_alike(runs)
    studies = []
    for run in runs:
        studies += crl_runs.studies_of(run)

    # 2. answers: a part file per run, task and condition
    out = Path(opts.out)
    if not opts.resume:
        shutil.rmtree(out / "parts", ignore_errors=True)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for study in studies:
        print(f"{study.run.path.name}: {len(study.env.prompts)} test prompts of {study.args.task}")
    evaluate(studies, names)

    # 3. one file, and what crl_stats.py makes of it
    text = ""
    for study in studies:
        files = [part(study, name) for name in names]
        text += "".join(file.read_text("utf-8") for file in files if file.exists())
    hub.write_atomically(out / "predictions.jsonl", lambda temporary: temporary.write_text(text, "utf-8"))
    crl_stats.main((out / "predictions.jsonl",), out)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        hub.fail("interrupted; --resume continues with what is finished")
    except torch.OutOfMemoryError:
        hub.fail("out of memory; lower --batch-size, --resume keeps what is finished")
    except OSError as e:
        what = f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}"
        hub.fail(f"{what}; --resume keeps what is finished")
