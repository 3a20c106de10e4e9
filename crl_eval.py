"""Evaluation of trained controllers: every cheaper explanation of a gain beside it, on the same test prompts.

    python crl_eval.py --run runs/A [runs/B ...] [--conditions unsteered crl] [--tasks gsm8k,xstest]

Read from the top: flags -> a Study (a run before the test prompts of a task) -> pushing and reading -> conditions (copy
one) -> part files -> main. A condition that pushes is a function from what is known of the test prompts, their residual
streams above all, to pushes; the others read, ask or train the model differently. What is chosen is chosen on training
and validation prompts, and every baseline may abstain (coefficient 0, no shots, epoch 0); test prompts are only ever
answered. On a CPU the same runs and flags give the same bytes. Files in --out:
  predictions.jsonl  a line per run, condition, task, prompt and draw: crl_stats.FIELDS and reward, text, tokens (their
                     number), push (per token a list of {layer, feature, name, coefficient}; the last one is held),
                     setting (what a baseline has chosen), and for unsteered the prompt
  parts/             a file per run, task and condition, for --resume; by crl_stats.py: summary.json, report.md and plot
"""

import contextlib
import hashlib
import math
import re
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import tyro


@dataclass
class Args:
    run: tuple[str, ...] = ()
    """run directories of crl_ppo.py: seeds and folds of an experiment, or several tasks, with one model"""
    out: str | None = None
    """where the results go (default: eval/ in the first run directory)"""
    resume: bool = False
    """keep the parts that an interrupted evaluation has left in --out, those of the same runs, prompts and flags"""
    conditions: tuple[str, ...] = ()
    """conditions by name (default: all but sft_lora, which is slow); unsteered and crl are always there"""
    tasks: tuple[str, ...] = ()
    """other tasks (a,b) to which every condition is applied as well: what is lost there"""
    test_samples: int = 0
    """test prompts (0: all)"""
    sft_epochs: int = 15
    """most epochs of fine-tuning, passes over the training prompts or 400 of them; three without progress end it"""
    data_dir: str | None = None
    """local mirror of the data, if not the one the run recorded"""
    cache_dir: str | None = None
    """cache of the embedded model and data wheels, if not the one the run recorded"""
    device: str | None = None
    """device, if not the one the run recorded"""
    micro_batch: int | None = None
    """prompts per forward pass, if not the number the run recorded"""


if __name__ == "__main__":
    ARGS = tyro.cli(
        Args, description=__doc__.split("\n\n")[0]
    )  # before the heavy imports: --help answers at once

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

import crl_ppo  # noqa: E402
import crl_stats  # noqa: E402
import crl_tasks  # noqa: E402
from crl_model import (
    Actions,
    Prompt,
    Site,
    begin,
    decode,
    forward,
    hash_of,
    hooked,
    logits_of,  # noqa: E402
    places,
    prefill,
    reading,
    share_prefix,
)
from crl_ppo import HERE, answers, decide, in_batches, write_atomically, write_jsonl  # noqa: E402
from crl_tasks import defaults_of, encode_prompt, fail, judge, kind_of, score_answer, sha256, solution  # noqa: E402

DRAWS = 16  # of random pushes for every answer
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # probe_switch: inverse of the ridge penalty
MULTIPLES = (
    0.25,
    0.5,
    1.0,
    2.0,
    4.0,
)  # corrsteer_s: of the mean activation; caa: of the run's largest --coef
SHOTS = (1, 4)  # few_shot: solved training prompts before the question, next to 0
LETTERS = ("format_control", "logit_bias")  # are about option letters, answered in one token
RATES, RANK, BATCH, EPOCH, PATIENCE = (
    (1e-3, 2e-4),
    8,
    8,
    400,
    3,
)  # sft_lora: learning rates, rank, prompts a step,
#   prompts between two looks at validation (all, if fewer), looks
OWN = ("data_dir", "cache_dir", "device", "micro_batch")  # flags of this file that replace the run's
HANDLING = (*HERE, "micro_batch")  # flags of crl_ppo.py that change no answer


# --------------------------------------------------------------------------------------------------------------- study
@dataclass(eq=False)
class Study:
    """One controller before the test prompts of one task, and what its conditions need."""

    opts: Args
    args: object  # crl_ppo.Args as resolved
    lm: object
    actions: object
    agent: object
    prompts: dict  # train, val, test: [Prompt]; shots: [row]
    identity: dict  # of the run, with a hash of its test rows and their gold labels
    table: object  # the run's outcomes: its training prompts first, then those of validation
    path: Path  # of the run
    home: object = None  # the Study of the run's own task, where everything is chosen
    letters: torch.Tensor = None  # (N, 26) unsteered scores of the option letters, for one-token answers
    x: torch.Tensor = None  # (N, d) what the policy reads on the test prompts
    push: torch.Tensor = None  # (N, T, k) the policy's decisions on the test prompts; the last one is held

    @property
    def one(self):
        return self.args.max_new_tokens == 1

    @cached_property
    def known(self):
        """All that the answers under every condition depend on: run, flags, prompts and gold labels."""
        args = {key: v for key, v in asdict(self.args).items() if key not in HANDLING}
        files = [sha256(self.path / f"{name}.safetensors") for name in ("best", "table")]
        own = DRAWS, PENALTIES, MULTIPLES, SHOTS, RATES, RANK, BATCH, EPOCH, PATIENCE, crl_stats.SCHEMA
        return repr((own, hash_of(self.prompts["test"]), self.path.name, self.identity, args, files))

    def part(self, condition):
        """The part file of a condition."""
        flags = self.opts.sft_epochs if condition == "sft_lora" else None
        digest = hashlib.sha256(f"{self.known} {flags}".encode()).hexdigest()
        return Path(self.opts.out) / "parts" / f"{condition}.{digest[:24]}.jsonl"

    @property
    def generator(self):
        """Random numbers that differ by seed and fold, whatever the batches."""
        return torch.Generator().manual_seed(1000 * self.args.seed + self.args.fold)


def load_study(opts, path, lm=None):
    """The Study of a run directory. Fails with one line that names the field when the run is of another version, model,
    SAE, split or data than what is here."""
    path, own = (
        Path(path).resolve(),
        {key: getattr(opts, key) for key in OWN if getattr(opts, key) is not None},
    )
    args = replace(crl_ppo.stored_args(path), **own)
    crl_ppo.check_args(args)
    lm, actions, prompts, identity = crl_ppo.set_up(args, lm)
    agent, *_ = crl_ppo.load_agent(args, path / "best.safetensors", identity)
    table = crl_ppo.load_table(path / "table.safetensors", prompts["train"] + prompts["val"], identity)
    for n, said in enumerate(
        table.said
    ):  # by the rule of today, which may not be the one that it was trained with
        for p, answer in said.items():
            table.reward[n, p] = judge(lm, args, table.prompts[n].row, answer)["reward"]
    rows = sorted(prompts["test"], key=lambda r: r["id"])
    identity = identity | {"test_hash": hash_of([Prompt(row, []) for row in rows])}
    study = Study(opts, args, lm, actions, agent, prompts, identity, table, path)
    study.home = study
    return before(study, rows)


def before(study, rows):
    """The same study with the test prompts of these rows that fit the model's context, --test-samples of them."""
    lm, args, shots = study.lm, study.args, study.prompts["shots"]
    asked = [
        Prompt(row, encode_prompt(lm.tok, row, shots)) for row in rows[: study.opts.test_samples or None]
    ]
    fit = [p for p in asked if len(p.ids) + args.max_new_tokens <= lm.context]
    if len(fit) < len(asked):
        print(
            f"{len(asked) - len(fit)} test prompts are longer than the context of {lm.context} tokens: skipped"
        )
    if not fit:
        fail(f"{args.task} has no test prompts; add rows, or give the --data-dir that the run had")
    return replace(study, prompts=study.prompts | {"test": fit})


def on_task(study, task):
    """The same controller before the test prompts of another task, without rows of groups that it has learnt from."""
    args, lm = study.args, study.lm
    try:
        parts, _ = crl_tasks.load_rows(task, args.data_dir, args.fold, args.cache_dir)
    except SystemExit:  # a source with splits of its own has no folds
        parts, _ = crl_tasks.load_rows(task, args.data_dir, 0, args.cache_dir)
    learnt = {p.row["group"] for part in ("train", "val") for p in study.prompts[part]}
    learnt |= {row["group"] for row in study.prompts["shots"]}
    rows = [r for r in sorted(parts["test"], key=lambda r: r["id"]) if r["group"] not in learnt]
    defaults = defaults_of(task, rows, lm)
    if defaults["max_new_tokens"] == 1 and not all(lm.letters):
        fail(
            f"--tasks {task}: the tokenizer of {lm.name} has no single token for some option letters; leave it out"
        )
    args = replace(args, task=task, max_new_tokens=defaults["max_new_tokens"], reward_decoding="free")
    args.decide = "once" if args.max_new_tokens == 1 else args.decide
    return before(replace(study, args=args), rows)


def check_alike(studies):
    """Refuse runs that no table may hold together: those of a task and a number of samples differ in seed and fold."""
    seen = {}
    for s in studies:
        kind = s.args.task, s.args.samples
        facts = [
            (kind, key, v) for key, v in asdict(s.args).items() if key not in (*HANDLING, "seed", "fold")
        ]
        facts += [
            ((s.args.task, s.args.fold), "test_hash", s.identity["test_hash"]),
            ((kind, s.args.seed, s.args.fold), "the run of this task, seed and fold", str(s.path)),
        ]
        for where, key, value in facts:
            other, there = seen.setdefault((where, key), (s.path.name, value))
            if value != there:
                fail(
                    f"--run {s.path.name}: {key} differs from {other}: {value!r}, there {there!r}; evaluate it alone"
                )


# ------------------------------------------------------------------------------------------------ pushing and reading
@torch.no_grad()
def pushed(study, prompts, push, actions=None, title=""):
    """Answers (for judge()) to N prompts, unsteered and under pushes (N, G, T, k) at their first T tokens, the last of
    which is held as --steer-tokens says. Returns N lists of 1 + G."""
    lm, actions, (G, T) = study.lm, actions or study.actions, push.shape[1:3]
    args = replace(study.args, afm="none")  # nothing is chosen here
    share_prefix(lm, prompts, args.max_new_tokens)

    def work(rows):
        some, p = [prompts[n] for n in rows], push[rows].to(lm.device)
        if study.one or T == 1:  # at a letter acts what acts first
            return [said for *_, said in answers(lm, actions, args, some, p[:, :, 0])]
        p = torch.cat([p.new_full((len(rows), 1, *p.shape[2:]), actions.noop), p], 1).flatten(
            0, 1
        )  # (B (1 + G), T, k)
        owner = torch.arange(len(rows), device=lm.device).repeat_interleave(1 + G)
        _, _, mask, cache = prefill(lm, [], some)
        said = decode(
            lm, actions, args, some, mask, cache, owner, lambda x, t, which: p[which, min(t, T - 1)]
        )
        return [said[b * (1 + G) : (b + 1) * (1 + G)] for b in range(len(rows))]

    size = args.micro_batch if study.one else max(1, crl_ppo.ROWS // (1 + G))
    return in_batches(list(range(len(prompts))), size, work, lambda n: len(prompts[n].ids), title)


def plain(study, prompts, title=""):
    """N answers without pushes, by whatever weights the model has now."""
    return [
        said for (said,) in pushed(study, prompts, torch.zeros(len(prompts), 0, 1, 1).long(), title=title)
    ]


def mean_reward(study, prompts, said):
    return sum(judge(study.lm, study.args, p.row, a)["reward"] for p, a in zip(prompts, said)) / len(prompts)


@torch.no_grad()
def read(study, prompts, said=None, acts=False, title=""):
    """What is in the unsteered model where it writes the T tokens of `said`, its answers (default: the first token).

    Per prompt: x {layer: (d,)}, the mean residual stream over T at the sites; the largest activations {site: (D,)} if
    `acts`; what the policy reads, if T is 1; and scores (26,) of the option letters, for one-token answers."""
    lm, args, sites = study.lm, study.args, study.actions.sites
    layers, said = sorted({args.observe, *(s.layer for s in sites)}), said or [[0]] * len(prompts)
    share_prefix(lm, prompts, args.max_new_tokens)

    def work(rows):
        some, xs = [Prompt({}, prompts[n].ids + said[n][:-1]) for n in rows], {}

        def look(i, h):
            xs[layers[i]] = h
            return h

        ids, *rest = begin(lm, some)
        with hooked(lm, layers, look):
            logits = forward(lm, ids, *rest)
        found, seen = [], reading(xs[args.observe], places(lm, ids, args.observe_options)).float().cpu()
        for b, n in enumerate(rows):
            own = {layer: x[b, -len(said[n]) :] for layer, x in xs.items()}  # (T, d) each
            means = {layer: x.float().mean(0).cpu() for layer, x in own.items()}
            most = {s.layer: s.encode(own[s.layer]).amax(0).cpu() for s in sites if acts}
            letters = logits[b, torch.tensor(lm.letters)].amax(-1).float().cpu() if study.one else None
            found.append((means, most, seen[b], letters))
        return found

    return in_batches(
        list(range(len(prompts))), args.micro_batch, work, lambda n: len(prompts[n].ids + said[n]), title
    )


def by_token(actions, push):
    """Pushes (..., k), decided once, token by token: (..., T, k); T is 1 where all act together, k where in turn."""
    return push[..., None, :] if actions.together else push[..., None]


def choose(studies):
    """Read, once, the test prompts that these runs share, and fill in each run's greedy decisions there."""
    first, prompts = studies[0], studies[0].prompts["test"]
    xs, _, told, letters = zip(*read(first, prompts, title=f"{first.args.task}: reading"))
    for s in studies:
        s.x, s.letters = torch.stack(told), torch.stack(letters) if s.one else None
        mask = None
        if s.args.afm == "active":
            at_sites = [torch.stack([x[site.layer] for x in xs]) for site in s.actions.sites]  # (N, d) each
            mask = s.actions.active([x.to(s.lm.device) for x in at_sites])
        s.push = by_token(s.actions, s.agent.pushes[decide(s.agent, s.x, mask)["push"]])  # (N, T, k)
        if s.args.decide == "token":
            rolls = [
                d["push"] for ((_, d),) in crl_ppo.answer_by_token(s.lm, s.actions, s.args, s.agent, prompts)
            ]
            T = s.args.steer_tokens or s.args.max_new_tokens
            picks = torch.stack([F.pad(p[:T], (0, max(0, T - len(p))), value=int(p[-1])) for p in rolls])
            s.push = s.agent.pushes[picks]


# ---- conditions that push: Study -> pushes (N, G, T, k), and the list of actions they are from (None: the run's own)
def random_pushes(study):
    """DRAWS times for each answer: random features where the policy pushes, of its site and strength, held as long."""
    own = study.push[:, None].expand(-1, DRAWS, -1, -1)  # (N, G, T, k)
    return study.actions.others(
        own, torch.rand(own.shape, generator=study.generator, dtype=torch.double)
    ), None


def shuffled(study):
    """The policy's pushes for another test prompt: does the choice depend on the prompt?"""
    order = torch.randperm(len(study.push), generator=study.generator)
    partner = order.roll(1)[order.argsort()]  # one cycle: no prompt keeps its own
    return study.push[partner][:, None], None


def held(study, push, actions):
    """The same push (k,) for all prompts."""
    return by_token(actions or study.actions, push).expand(len(study.prompts["test"]), 1, -1, -1), actions


def outcomes(home, rows, columns):
    """Rewards in the run's table, which is filled there where it has gaps; rows, columns as Table.fill() has them."""
    share_prefix(home.lm, home.table.prompts, home.args.max_new_tokens)
    home.table.fill(home.lm, home.actions, home.args, rows, columns, title="outcomes")
    return home.table.reward[rows, columns]


@cache
def best_pushes(home):
    """Up to 32 pushes of the mask, those that are best on all training prompts, best first."""
    n = len(home.prompts["train"])
    top = home.table.reward[:n, :-1].nanmean(0).nan_to_num(-1).argsort(descending=True, stable=True)[:32]
    return top[outcomes(home, slice(n), top).mean(0).argsort(descending=True, stable=True)]


@cache
def fit_constant(home):
    """Of the four pushes of the mask that are best on all training prompts, and the no-op, the best on validation."""
    table, n = home.table, len(home.prompts["train"])
    top = torch.cat([torch.tensor([table.noop]), best_pushes(home)[:4]])  # of equals the first is taken
    return table.pushes[top[outcomes(home, slice(n, None), top).mean(0).argmax()]], None


def has_classes(home):
    """Whether the right decisions of the training prompts are of two classes or more, which a probe can tell apart."""
    kinds = {kind_of(p.row) for p in home.prompts["train"]}
    return None not in kinds and len(kinds) > 1


@cache
def fit_switch(home):
    """(probe, {class: push (k,)}): a linear probe of the right decision from what the policy reads, and for each class
    the push of the mask that gains most on its training prompts. The penalty is the best on validation; None where no
    push gains there, or the task has no classes."""
    if not has_classes(home):
        return None
    table, n, kinds = home.table, len(home.prompts["train"]), [kind_of(p.row) for p in home.prompts["train"]]
    x, top = home.agent.observe(table.x).numpy(), torch.cat([torch.tensor([table.noop]), best_pushes(home)])
    right = outcomes(home, slice(n), top)  # (n, 33)
    of = {kind: torch.tensor([own == kind for own in kinds]) for kind in set(kinds)}  # (n,) bool each
    best = {kind: top[right[rows].sum(0).argmax()] for kind, rows in of.items()}
    val, found = torch.arange(n, len(x)), None
    most = outcomes(home, val, table.noop).sum()
    for C in PENALTIES:
        probe = LogisticRegression(C=C, max_iter=1000).fit(x[:n], kinds)
        worth = outcomes(home, val, torch.stack([best[kind] for kind in probe.predict(x[n:])])).sum()
        if worth > most:
            found, most = (probe, {kind: table.pushes[p] for kind, p in best.items()}), worth
    return found


def probe_switch(study):
    """The best push for what a linear probe says: is supervised learning with the same labels and pushes as good?"""
    if fit_switch(study.home) is None:
        return held(study, study.home.table.pushes[-1], None)
    probe, best = fit_switch(study.home)
    push = torch.stack([best[kind] for kind in probe.predict(study.agent.observe(study.x).numpy())])
    return by_token(study.actions, push)[:, None], None


@cache
def read_training(home):
    """From the unsteered answers to all training prompts: which are right (n,) bool, x {layer: (n, d)}, activations
    {site: (n, D)} and letters (n, 26) as read() says."""
    table, prompts = home.table, home.prompts["train"]
    said = [table.said[n][table.noop][: 1 if home.one else None] for n in range(len(prompts))]
    xs, acts, _, letters = zip(*read(home, prompts, said, acts=True, title="training prompts"))
    x = {layer: torch.stack([row[layer] for row in xs]) for layer in xs[0]}
    acts = {layer: torch.stack([row[layer] for row in acts]) for layer in acts[0]}
    return table.reward[: len(prompts), -1] > 0, x, acts, torch.stack(letters) if home.one else None


def best_vector(home, vectors, coef, coef_mode):
    """(push (1,), actions): of the vectors {site: (name, (d,))}, at MULTIPLES of `coef`, the one that is best on
    validation, or the no-op."""
    args = replace(home.args, coef=tuple(m * coef for m in MULTIPLES), coef_mode=coef_mode)
    sites = [
        Site(layer, v[None].to(home.lm.device), None, name, "", {0: {"name": name}})
        for layer, (name, v) in vectors.items()
    ]
    if not sites:
        return torch.tensor([home.actions.noop]), None
    actions, val = Actions(args, sites), home.prompts["val"]
    tried = torch.arange(actions.noop).view(1, -1, 1, 1).expand(len(val), -1, -1, -1)
    said = zip(*pushed(home, val, tried, actions, "validation prompts"))  # the unsteered answers first
    best = [mean_reward(home, val, answer) for answer in said]
    return torch.tensor([[actions.noop, *range(actions.noop)][best.index(max(best))]]), actions


@cache
def fit_corrsteer(home):
    """CorrSteer (Cho et al., arXiv 2508.12535): the feature whose largest activation over the generated tokens has the
    highest positive Pearson correlation with correctness, at its mean activation on right answers, times a multiple."""
    (right, _, acts, _), vectors = read_training(home), {}
    y = right.double() - right.double().mean()
    for site in home.actions.sites:
        a = acts[site.layer].double()  # (n, D)
        spread = (a - a.mean(0)).norm(dim=0) * y.norm()
        r = torch.where(spread > 1e-9, y @ a / spread.clamp(min=1e-9), 0.0)
        if r.max() > 0:
            f = int(r.argmax())
            row = site.sae.W_dec[f].detach().float() if site.sae is not None else site.directions[f]
            vectors[site.layer] = f"feature {f}, r = {r[f]:.3f}", row * float(a[right, f].mean())
    return best_vector(home, vectors, 1.0, "abs")


@cache
def fit_caa(home):
    """Contrastive activation addition (Rimsky et al. 2024): mean residual stream of right minus wrong answers."""
    right, x, *_ = read_training(home)
    vectors = {
        s.layer: ("right - wrong", F.normalize(x[s.layer][right].mean(0) - x[s.layer][~right].mean(0), dim=0))
        for s in home.actions.sites
        if 0 < right.sum() < len(right)
    }
    return best_vector(home, vectors, max(map(abs, home.args.coef)), home.args.coef_mode)


PUSHING = {
    "unsteered": lambda study: (study.push[:, None][:, :0], None),  # the frozen model
    "crl": lambda study: (study.push[:, None], None),  # the trained policy, greedy
    "random": random_pushes,
    "shuffled": shuffled,
    "constant_best": lambda study: held(study, *fit_constant(study.home)),
    "probe_switch": probe_switch,
    "corrsteer_s": lambda study: held(study, *fit_corrsteer(study.home)),
    "caa": lambda study: held(study, *fit_caa(study.home)),
}


# ------------------------- conditions with other readings, prompts or weights: Study -> N answers, what was chosen
def lettered(study, prompts, scores):
    """Answers (for judge()) with the best offered option letter by scores (N, 26), and the scores of those offered."""
    offered = torch.tensor([[c < len(p.row["choices"]) for c in range(26)] for p in prompts])
    scores = scores.masked_fill(~offered, -math.inf)
    return [[study.lm.letters[c][0], c] for c in scores.argmax(-1).tolist()], scores


@cache
def fit_letters(home):
    """(bias (26,), share): the most likely bias per letter on all training prompts (generalised iterative scaling,
    Darroch and Ratcliff 1972), and how much of it is best on validation (0, half, all)."""
    train, val, bias = home.prompts["train"], home.prompts["val"], torch.zeros(26)
    _, scores = lettered(home, train, read_training(home)[3])
    gold = torch.tensor([p.row["answer"] for p in train]).bincount(minlength=26)
    for _ in range(200):
        bias = bias + ((gold + 0.1) / ((scores + bias).softmax(-1).sum(0) + 0.1)).log()
    scores = torch.stack([letters for *_, letters in read(home, val)])
    return bias, max(
        (0.0, 0.5, 1.0), key=lambda c: mean_reward(home, val, lettered(home, val, scores + c * bias)[0])
    )


def logit_bias(study):
    """A bias per option letter: is it only a prior over letters?"""
    bias, share = fit_letters(study.home)
    return lettered(study, study.prompts["test"], study.letters + share * bias)[0], f"{share:g} of the bias"


def after_shots(study, prompts, k):
    """Answers after the run's first k training prompts, solved, or as many of them as fit the model's context."""
    dressed = []
    for p in prompts:
        shots = [*study.prompts["shots"], *(q.row for q in study.prompts["train"][:k])]
        while (
            len(ids := encode_prompt(study.lm.tok, p.row, shots)) + study.args.max_new_tokens
            > study.lm.context
        ):
            shots.pop()
        dressed.append(Prompt(p.row, ids))
    return plain(study, dressed, f"{k} shots")


@cache
def fit_shots(home):
    """The number of shots, 0 among them, that is best on validation."""
    val = home.prompts["val"]
    return max((0, *SHOTS), key=lambda k: mean_reward(home, val, after_shots(home, val, k)))


def few_shot(study):
    """Solved training prompts before the question."""
    k = fit_shots(study.home)
    return after_shots(study, study.prompts["test"], k), f"{k} shots"


@contextlib.contextmanager
def adapted(home, weights=None):
    """While open, LoRA (Hu et al. 2021) sits on every linear layer of the model: `weights`, or a start that changes
    nothing. Yields its weights {name: tensor}. Afterwards the model is what it was, bit for bit."""
    import peft

    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(home.generator.initial_seed())
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        wrapped = peft.get_peft_model(home.lm.model, config)
    try:
        own = {name: w for name, w in wrapped.named_parameters() if w.requires_grad}
        for name, value in (weights or {}).items():
            own[name].data.copy_(value)
        yield own
    finally:
        wrapped.unload()
        vars(home.lm.model).pop("peft_config", None)
        home.lm.model.requires_grad_(False)


def golds(home):
    """[(training prompt, ids of the answer to learn)]. Refusal tasks have no gold text: a refusal for harmful prompts,
    and the model's own answer to harmless ones where it is right."""
    lm, table, pairs = home.lm, home.table, []
    for n, p in enumerate(home.prompts["train"]):
        text = ("\n</think>\n\n" if lm.thinks else "" if crl_tasks.has_chat(lm.tok) else " ") + solution(
            p.row
        )
        ids = (lm.tok.encode(text, add_special_tokens=False) + [lm.tok.eos_token_id])[
            : home.args.max_new_tokens
        ]
        ids = lm.letters[p.row["answer"]][:1] if home.one else ids
        if kind_of(p.row) == "safe":
            ids = table.said[n][table.noop] if table.reward[n, -1] else []
        pairs += [(p, ids)] * bool(ids)
    return pairs


def answer_loss(lm, pairs):
    """Cross-entropy of the answers in [(prompt, answer ids)], mean over their tokens."""
    T = max(len(ids) for _, ids in pairs)
    share_prefix(
        lm, [p for p, _ in pairs], T
    )  # with gradients: the weights before this step are not its weights
    gold = torch.tensor([[-100] * (T - len(ids)) + ids for _, ids in pairs], device=lm.device)
    logits = logits_of(lm, *begin(lm, [Prompt({}, p.ids + ids) for p, ids in pairs]), T + 1)[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), gold.flatten(), ignore_index=-100)


@cache
def fit_lora(home):
    """(weights, what was chosen): learning rate and epoch best on validation, epoch 0 (the frozen model) among them. A
    rate ends after PATIENCE epochs that are no better than the best until then; where nothing can be better, all end."""
    pairs, val = golds(home), home.prompts["val"]
    best = mean_reward(home, val, plain(home, val)), {}, "epoch 0"
    for lr in RATES:
        with adapted(home) as weights:
            optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.0)
            order, since = home.generator, 0
            for epoch in range(1, home.opts.sft_epochs + 1):
                for part in torch.randperm(len(pairs), generator=order)[:EPOCH].split(BATCH):
                    optimizer.zero_grad()
                    answer_loss(home.lm, [pairs[n] for n in part]).backward()
                    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
                    optimizer.step()
                reward = mean_reward(home, val, plain(home, val, f"sft_lora {lr:g}, epoch {epoch}"))
                since += 1
                if reward > best[0]:
                    copies = {name: w.detach().clone() for name, w in weights.items()}
                    best, since = (reward, copies, f"learning rate {lr:g}, epoch {epoch}"), 0
                if best[0] == 1:
                    return best[1:]
                if since == PATIENCE:
                    break
    return best[1:]


def sft_lora(study):
    """Fine-tuning on the same training prompts."""
    weights, chosen = fit_lora(study.home)
    with adapted(study.home, weights) if weights else contextlib.nullcontext():
        return plain(study, study.prompts["test"], "sft_lora"), chosen


OTHERWISE = {
    "format_control":  # the frozen model held to the option letters: is it only the format?
    lambda study: (lettered(study, study.prompts["test"], study.letters)[0], ""),
    "logit_bias": logit_bias,
    "few_shot": few_shot,
    "sft_lora": sft_lora,
}


# ---------------------------------------------------------------------------------------------------------- part files
def names_option(study, row, answer, c):
    """Whether a judged answer names option c: by its first token, or in its text."""
    if study.one:
        return answer["tokens"][0] in study.lm.letters[c]
    return bool(score_answer(study.args.task, row | {"answer": c}, answer["text"], study.lm.thinks)[0])


def write_part(study, condition, said, push=None, actions=None, setting=""):
    """The part file of a condition from its answers, N lists of G draws, and pushes (N, G, T, k)."""
    args, lm, lines = study.args, study.lm, []
    names = {"run": study.path.name, "model": lm.name, "task": args.task, "trained_on": study.home.args.task}
    known = {key: re.sub("(^|:)/.*/", r"\1", name) for key, name in names.items()}  # no machine's paths
    known |= {"schema": crl_stats.SCHEMA, "samples": args.samples, "fold": args.fold, "seed": args.seed}
    for n, p in enumerate(study.prompts["test"]):
        for draw, answer in enumerate(said[n]):
            a = judge(lm, args, p.row, answer)
            named = [c for c in range(len(p.row["choices"] or ())) if names_option(study, p.row, a, c)]
            did = [actions.describe(q) for q in push[n, draw]] if push is not None and push.shape[1] else []
            line = known | {
                "condition": condition,
                "draw": draw,
                "choice": named[0] if named else None,
                "push": did,
                "setting": setting,
                "text": a["text"],
                "tokens": len(a["tokens"]),
            }
            line |= {key: p.row[key] for key in ("id", "group", "answer", "meta")}
            line |= {key: a[key] for key in ("free", "constrained", "reward", "valid")}
            lines.append(line | ({"prompt": p.row["prompt"]} if condition == "unsteered" else {}))
    write_jsonl(study.part(condition), lines)


def evaluate(studies, names):
    """Write the part files that are missing of runs that share their test prompts. Conditions that push from the same
    list of actions share a pass over them."""
    todo = [
        (s, c)
        for s in studies
        for c in names
        if (c not in LETTERS or s.one and s.home.one) and (c != "probe_switch" or has_classes(s.home))
    ]
    todo = [(s, c) for s, c in todo if not s.part(c).exists()]
    if todo:
        choose(studies)
    passes = {}
    for s, c in todo:
        if c in PUSHING:
            push, actions = PUSHING[c](s)
            passes.setdefault((actions or s.actions, push.shape[2:]), []).append((s, c, push))
    for (actions, _), some in passes.items():
        first, prompts = some[0][0], some[0][0].prompts["test"]
        said = pushed(
            first, prompts, torch.cat([push for *_, push in some], 1), actions, f"{first.args.task}: pushes"
        )
        end = 1  # column 0 is the unsteered answer
        for s, c, push in some:
            start, end = end, end + push.shape[1]
            write_part(s, c, [row[start:end] or row[:1] for row in said], push, actions)
    for s, c in todo:
        if c in OTHERWISE:
            said, setting = OTHERWISE[c](s)
            write_part(s, c, [[answer] for answer in said], setting=setting)


# ---------------------------------------------------------------------------------------------------------------- main
def check_opts(opts):
    """Refuse impossible flags; commas separate names as well as spaces do. Returns the conditions to evaluate."""
    opts.run = tuple(dict.fromkeys(opts.run))  # each once
    opts.tasks = tuple(dict.fromkeys(filter(None, ",".join(opts.tasks).split(","))))
    opts.conditions = tuple(filter(None, ",".join(opts.conditions).split(",")))
    if not opts.run:
        fail("--run is missing: give one or more run directories of crl_ppo.py")
    for name in set(opts.conditions) - set(crl_stats.CONDITIONS):
        fail(f"--conditions: unknown condition {name!r}{crl_tasks.suggest(name, crl_stats.CONDITIONS)}")
    if opts.test_samples < 0 or opts.sft_epochs < 1:
        fail("--test-samples must not be negative, --sft-epochs must be at least 1")
    wanted = {"unsteered", "crl", *(opts.conditions or set(crl_stats.CONDITIONS) - {"sft_lora"})}
    return [c for c in crl_stats.CONDITIONS if c in wanted]


def main(opts):
    """Evaluate opts.run, write the files and print the report."""
    # 1. runs
    started, names = time.time(), check_opts(opts)
    opts.out = str(opts.out or Path(opts.run[0]) / "eval")
    studies = [load_study(opts, opts.run[0])]
    studies += [
        load_study(opts, path, studies[0].lm) for path in opts.run[1:]
    ]  # which refuses those of another model
    check_alike(studies)
    studies += [on_task(s, task) for task in opts.tasks for s in studies if task != s.args.task]

    # 2. answers: a part file per run, task and condition
    out, groups = Path(opts.out), {}
    if not opts.resume:
        shutil.rmtree(out / "parts", ignore_errors=True)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for s in studies:  # runs that share test prompts and actions
        like = (
            s.home.args.task,
            s.args.task,
            s.args.samples,
            hash_of(s.prompts["test"]),
            *s.identity["sae_hash"],
        )
        groups.setdefault(like, []).append(s)
        s.actions = groups[like][0].actions
    for (trained, task, *_), like in groups.items():
        print(
            f"{len(like)} run(s) of {trained}, {len(like[0].prompts['test'])} test prompts of {task}",
            flush=True,
        )
        evaluate(like, names)

    # 3. one file, and what crl_stats.py makes of it
    text = "".join(part.read_text() for s in studies for c in names if (part := s.part(c)).exists())
    write_atomically(out / "predictions.jsonl", lambda tmp: tmp.write_text(text))
    crl_stats.main((out / "predictions.jsonl",), out)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    try:
        main(ARGS)
    except OSError as e:
        fail(
            f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}; --resume keeps what is finished"
        )
    except KeyboardInterrupt:
        fail("interrupted; --resume continues with what is finished")
