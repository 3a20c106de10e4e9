"""Finished runs of crl_ppo.py on test prompts, of their own task and of others: what crl_eval.py asks.

load_run -> studies_of -> complete. A Study holds the prompts; complete() and plain() answer them. Shapes: N
prompts, G answers to a prompt, T decisions of an answer, S sequences of T actions in the mask.
"""

import copy
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import crl_ppo
import crl_tasks
from crl_tasks import hub, passes

OTHERS = 200  # test prompts of each other task
OWN = ("data_dir", "device", "batch_size")  # flags of this file that replace the run's
HANDLING = (*crl_ppo.MACHINE_FLAGS, "batch_size")  # flags of crl_ppo.py that change no answer


@dataclass(eq=False)
class Run:
    """A run directory of crl_ppo.py, and what its training and validation prompts earn."""

    path: Path
    opts: object  # crl_eval.Args
    args: object  # crl_ppo.Args as resolved
    env: object  # crl_ppo.Environment: training prompts, then those of validation; the actions of the mask
    all_actions: object  # the same model with the whole list of actions
    agent: object
    sequences: torch.Tensor  # (S, T) of the mask
    prompts: dict  # "train", "val": [Prompt]; "test", "shots": [row]
    identity: dict  # of the run, and a hash of its test rows and their answers

    @property
    def n(self):
        """Number of training prompts."""
        return len(self.prompts["train"])

    def generator(self):
        """Random numbers that differ by seed and fold."""
        return torch.Generator().manual_seed(1000 * self.args.seed + self.args.fold)


@dataclass(eq=False)
class Study:
    """A run on the test prompts of a task, its own or another one."""

    run: Run
    args: object  # those of the run, with the length of this task's answers
    env: object  # crl_ppo.Environment: the test prompts, and the actions of the mask

    def observe(self):
        """What the policy reads at its first decision (N, k)."""
        self.env.rewards(torch.arange(len(self.env.prompts)), torch.tensor([self.env.noop]))
        return self.run.agent.observe(self.env.obs[:, 0], 0)


def beside(env, prompts, args=None):
    """The same environment on other prompts. It reads their common beginning with the weights of now."""
    other = copy.copy(env)
    other.args = args or env.args
    other.ask(prompts)
    return other


def load_run(opts, path, loaded=None):
    """The Run of a directory. loaded: what crl_ppo.load_model() has returned for another one.

    Fails with one line that names the field where version, model, SAE, split or data are not the run's."""
    path = Path(path).resolve()
    own = {key: getattr(opts, key) for key in OWN if getattr(opts, key) is not None}
    args = replace(crl_ppo.stored_args(path), **own)
    crl_tasks.check_flags(args)
    env, prompts, identity = crl_ppo.set_up(args, loaded)
    agent = crl_ppo.load_agent(path / "best.safetensors", identity)
    all_actions = copy.copy(env)
    env.ask(prompts["train"] + prompts["val"])
    sequences, _ = crl_ppo.load_rewards(path / "rewards.safetensors", identity, env)
    for row, known in enumerate(env.completions):  # by the rule of today, which may be another one
        for action, completion in known.items():
            env.memo[row, action] = env.score(env.prompts[row].row, completion)[0]
    rows = sorted(prompts["test"], key=lambda row: row["id"])
    asked = [(row["id"], row["answer"]) for row in rows]
    identity |= {"test_hash": hub.hash_of(asked)}
    prompts |= {"test": rows}
    return Run(path, opts, args, env, all_actions, agent, sequences, prompts, identity)


def study_of(run, args, rows, tok=None):
    """The Study of a run on the test rows that fit the model's context. tok: if not the run's own."""
    env = copy.copy(run.env)
    if tok:
        env.tok = tok
        env.letters = crl_tasks.letter_tokens(tok)
    asked = [crl_tasks.encode_prompt(env.tok, row, run.prompts["shots"]) for row in rows]
    fit = [p for p in asked if len(p.ids) + args.max_new_tokens <= run.env.context]
    if len(fit) < len(asked):
        left_out = f"{len(asked) - len(fit)} test prompts are longer than the context"
        print(f"{left_out} of {run.env.context} tokens and were skipped")
    if not fit:
        hub.fail(f"{args.task} has no test prompts; add rows, or give the --data-dir that the run had")
    return Study(run, args, beside(env, fit, args))


def on_task(run, task):
    """The Study of a run on another task, without rows of groups that the run has learnt from."""
    try:
        parts, _ = crl_tasks.load_rows(task, run.args.data_dir, run.args.fold)
    except SystemExit:
        if not run.args.fold:
            raise
        parts, _ = crl_tasks.load_rows(task, run.args.data_dir)  # one with splits of its own has no folds
    learnt = {p.row["group"] for p in run.env.prompts}
    learnt |= {row["group"] for row in run.prompts["shots"]}
    rows = [row for row in parts["test"] if row["group"] not in learnt]
    rows = sorted(rows, key=lambda row: row["id"])[: run.opts.test_samples or OTHERS]
    args = replace(run.args, task=task, max_new_tokens=None, decisions=1)
    tok = None
    if rows:
        tok = crl_tasks.fill_defaults(args, {"test": rows}, run.identity["model"], run.env.tok)
        args.decisions = min(run.args.decisions, args.max_new_tokens)
    return study_of(run, args, rows, tok)


def other_tasks(task):
    """Tasks of the same kind, letters or long answers, without common rows; none for file: tasks."""
    if task not in crl_tasks.TASKS:
        return []
    own = crl_tasks.TASKS[task]
    found = []
    for name, spec in crl_tasks.TASKS.items():
        lettered = spec["defaults"]["max_new_tokens"] == 1
        alike = lettered == (own["defaults"]["max_new_tokens"] == 1)
        one_source = spec.get("folder", name) == own.get("folder", task)
        shares = one_source and not ("keep" in spec and "keep" in own)  # bbq holds both of its halves
        if alike and name not in (task, "file") and not shares:
            found.append(name)
    return found


def studies_of(run):
    """The Studies of a run: its own task, then the others, of which those named in --tasks must be there."""
    rows = run.prompts["test"][: run.opts.test_samples or None]
    studies = [study_of(run, run.args, rows)]
    for task in run.opts.tasks or other_tasks(run.args.task):
        if task in ("none", run.args.task):
            continue
        try:
            studies.append(on_task(run, task))
        except SystemExit as e:
            if run.opts.tasks:
                raise
            print(f"{task} is left out: {str(e).removeprefix('crl: ')}")
    return studies


def check_alike(runs):
    """Refuse runs that no table may hold together: those of one task and number of samples differ only in
    seed and fold."""
    seen = {}
    for run in runs:
        kind = (run.args.task, run.args.samples)
        facts = []
        for key, value in asdict(run.args).items():
            if key not in (*HANDLING, "seed", "fold"):
                facts.append((kind, key, value))
        facts.append(((run.args.task, run.args.fold), "test_hash", run.identity["test_hash"]))
        unique = (*kind, run.args.seed, run.args.fold)
        facts.append((unique, "the run of this task, seed and fold", str(run.path)))
        for where, key, value in facts:
            other, there = seen.setdefault((where, key), (run.path.name, value))
            if value != there:
                differs = f"{key} differs from {other}: {value!r}, there {there!r}"
                hub.fail(f"--run {run.path.name}: {differs}; evaluate it alone")


def complete(env, actions):
    """Completions, N lists of G, of the prompts of `env` under actions (N, G, T); the last one holds."""
    if actions.shape[2] > 1:
        return env.generate(env.prompts, crl_ppo.fixed(actions), actions.shape[1])
    chosen = actions[..., 0]
    env.rewards(torch.arange(len(chosen)), chosen)
    completions = []
    for known, row in zip(env.completions, chosen.tolist(), strict=True):
        completions.append([known[action] for action in row])
    return completions


def plain(env, prompts):
    """N completions without steering, by whatever weights the model has now."""
    now = beside(env, prompts)  # keys of a shared beginning that other weights have made would be wrong
    noop = torch.tensor([now.noop]).expand(len(prompts), 1, 1)
    return [completion for (completion,) in complete(now, noop)]


def mean_reward(env, prompts, completions):
    return env.score_all(prompts, [[completion] for completion in completions]).mean().item()


def batches(env, prompts):
    """Numbers of prompts of about the same length, --batch-size at once."""
    return tqdm(passes.batches(prompts, env.args.batch_size), "reading", leave=False, delay=2)


def padded(env, texts):
    """What the model is called with for B lists of token ids, padded on the left."""
    inputs = env.tok.pad({"input_ids": texts}, padding_side="left", return_tensors="pt").to(env.device)
    position = inputs.attention_mask.cumsum(1) - 1
    return {**inputs, "position_ids": position.clamp(min=0), "use_cache": False}


@cache
@torch.no_grad()
def read_letters(env):
    """Scores (N, 26) of the option letters as the first token of the unsteered answers.

    Ends with one line where they are not finite: the likeliest of them would be the first letter."""
    scores = torch.full((len(env.prompts), 26), -math.inf)
    for rows in batches(env, env.prompts):
        texts = [env.prompts[row].ids for row in rows]
        logits = env.model(**padded(env, texts), logits_to_keep=1).logits[:, -1].float().cpu()
        for row in rows[~logits.amax(-1).isfinite()].tolist():
            asked = env.prompts[row].row["id"]
            hub.fail(f"prompt {asked}: the model's own logits are not finite; train with --dtype float32")
        for letter, forms in enumerate(env.letters):
            if forms:
                scores[rows, letter] = logits[:, forms].amax(-1)
    return scores
