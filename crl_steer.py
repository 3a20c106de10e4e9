"""A trained controller in anyone's code: plain transformers, no task, no rows.

    with crl_steer.steered(model, tokenizer, "runs/RUN") as log:
        model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=20)

Greedy decoding and sampling work, batches padded on the left, with and without a cache. The policy reads
the prompt in the forward pass that it steers: its last token, and where its options end, or else its
question. Options are found where lines begin with "A.", "B." and so on.

    python crl_steer.py export runs/RUN DIR     # what steered() needs of a run, and a model card, to publish
"""

import bisect
import functools
import inspect
import itertools
import re
import shutil
import threading
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from statsmodels.stats.proportion import proportion_confint
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

import crl_ppo
import crl_tasks
from crl_tasks import Prompt, hub

# what runs other forward passes than one a token, or changes the prompt
REFUSED = "inputs_embeds past_key_values custom_generate guidance_scale prefill_chunk_size assistant_model"
REFUSED += " assistant_early_exit prompt_lookup_num_tokens use_mtp speculation_type penalty_alpha dola_layers"
REFUSED += " num_beam_groups constraints force_words_ids token_healing"
NEUTRAL = {"guidance_scale": 1, "num_beam_groups": 1, "penalty_alpha": 0}  # values that change nothing


def find_ends(text, request, lettered, lettered_request=""):
    """Index in a prompt's text of each option's last character if it is `lettered`, or else the question's.

    Options are the last lines that begin with A., B., C. in order. One of several lines ends where the next
    letter begins, the last one with its first line. Without options the question ends before `request`, with
    which the prompts of the training ended; -1 if the text does not."""
    found = []
    run = []
    for line in re.finditer(r"^([A-Z])\. .*", text, re.M):
        letter = ord(line[1]) - ord("A")
        if letter in (0, len(run)):
            run = [*run[:letter], line]
        if len(run) > 1:
            found = run
    if lettered and found:
        whole = lettered_request and text.endswith(lettered_request)
        last = len(text) - len(lettered_request) if whole else found[-1].end()
        return [option.start() - 2 for option in found[1:]] + [last - 1]
    if lettered and re.search(r"^B\. ", text, re.M):
        warnings.warn("a prompt's options lack A, as if it were cut: none is read", stacklevel=2)
        return []
    if not text.endswith(request):
        unlike = f"a prompt does not end with {request!r} as in the training"
        warnings.warn(f"{unlike}: the end of its question is not read", stacklevel=2)
        return [-1]
    return [len(text) - len(request) - 1]


@functools.cache
def request_of(tok, choices=None):
    """With what a prompt ends, after its question or its last option."""
    text, ends = crl_tasks.prompt_text(tok, {"prompt": "x", "choices": choices})
    return text[ends[-1] + 1 :]


def prompt_of(env, ids):
    """The Prompt of token ids: an end is at the token with which the text reaches that character."""
    tok = env.tok

    def length(n):
        text = tok.decode(ids[:n], clean_up_tokenization_spaces=False)
        return len(text.rstrip("\ufffd"))  # a character that has begun only

    text = tok.decode(ids, clean_up_tokenization_spaces=False)
    ends = []
    for end in find_ends(text, request_of(tok), env.ends > 1, request_of(tok, ("x", "x"))):
        ends.append(-1 if end < 0 else bisect.bisect(range(1, len(ids)), end, key=length))
    return Prompt({}, ids, ends)


# --------------------------------------------------------------------------------------------------- steering
class Steering:
    """What a run's policy does to one batch of B prompts and their answers."""

    def __init__(self, env, agent, prompts):
        self.env = env
        self.agent = agent
        self.batch = crl_ppo.Batch(prompts, None, None)
        self.made = []  # decisions, each a dict of tensors (B,)
        self.passes = 0
        self.thread = threading.get_ident()  # the model may answer another one meanwhile

    def acts(self, t):
        """Whether token t of an answer is steered."""
        return t < self.env.args.steer_tokens or self.env.args.steer_tokens == 0

    def decide(self, h, t):
        """Decision t from the residual stream h (B, d) where it is made."""
        obs = self.agent.observe(torch.cat([h, self.batch.x[:, 1:].flatten(1)], 1), t)
        policy = self.agent.get_policy(obs)
        action = policy.logits.argmax(-1)
        decision = {"action": action, "logprob": policy.log_prob(action)}
        return decision | {"value": self.agent.critic(obs)[:, 0], "entropy": policy.entropy()}

    @torch.no_grad()
    def add(self, columns, first, site, h):
        """The hook: residual stream h (B, q, d) with actions added for tokens first, first + 1, ...

        columns (B, n): where each is written, counted from the end of h; 0 or more: nowhere."""
        if site == 0 and not self.made:
            self.env.read(self.batch, site, h)
        h = h.clone()
        for t, column in enumerate(columns.T, start=first):
            if not self.acts(t):
                break
            here = (column < 0).nonzero()[:, 0]
            x = h[torch.arange(len(h)), column.clamp(max=-1)]
            if site == 0 and t == len(self.made) < self.env.args.decisions:
                self.made.append(self.decide(x, t))
            actions = self.made[min(t, len(self.made) - 1)]["action"].to(self.env.device)
            h[here, column[here]] = self.env.add(site, x, actions)[here]
        return h

    def step(self, length, site, h):
        """The hook in generate(), which reads `length` columns, then a token a time or all anew."""
        if self.thread != threading.get_ident():
            return h
        self.passes += site == 0
        t = self.passes - 1
        if len(h) != len(self.batch.prompts) or h.shape[1] not in (1, length + t):
            hub.fail("something runs forward passes of its own between two tokens; leave it out")
        n = t + 1 if h.shape[1] == length + t else 1
        return self.add(torch.arange(-n, 0).expand(len(h), n), t + 1 - n, site, h)

    def look(self, model, inputs, output):
        """A hook of the model: logits that are not finite have a likeliest token, which means nothing."""
        if self.thread != threading.get_ident():
            return
        best = output.logits[:, -1].amax(-1)
        for row in (~best.isfinite()).nonzero()[:1, 0].tolist():
            hub.fail(f"row {row}: logits are not finite under steering; train and load it in float32")

    def log(self, call, answers):
        """A dict for each token of B answers, lists of ids without the padding behind them."""
        for row, tokens in enumerate(answers):
            for position, token in enumerate(tokens):
                decision = self.made[min(position, len(self.made) - 1)]
                line = {"call": call, "row": row, "position": position, "token": token}
                line["decided"] = position < len(self.made)
                line |= {key: value[row].item() for key, value in decision.items()}
                line["steering"] = self.env.describe(line["action"]) if self.acts(position) else None
                yield line


class Ends(StoppingCriteria):
    """The caller's own stopping criteria, and what they said after each token, n tensors (B,)."""

    def __init__(self, given):
        self.given = StoppingCriteriaList(given)
        self.said = []
        for criterion in given:
            vars(self).update({key: v for key, v in vars(criterion).items() if key == "eos_token_id"})

    def __call__(self, ids, scores, **kwargs):
        self.said.append(self.given(ids, scores, **kwargs))
        return self.said[-1]


class Call:
    """The arguments of one generate(): what is read of them, and one line where they cannot be steered."""

    def __init__(self, model, tok, given):
        self.config = model.generation_config
        self.tok = tok
        self.given = given | given.pop("kwargs", {})
        if self.flag("num_beams", 1) > 1:
            beams = self.flag("num_beams")
            hub.fail(f"num_beams {beams}: beams cannot be steered; decode greedily or sample")
        for name in REFUSED.split():
            value = self.flag(name, False)
            if value is not False and (name not in NEUTRAL or value != NEUTRAL[name]):
                hub.fail(f"{name}: a controller decides token by token from input_ids; leave it out")
        self.given["disable_compile"] = True  # a static cache would have the model compiled
        self.ids = self.given.pop("input_ids", self.given.pop("inputs", None))  # (B, length)
        if not torch.is_tensor(self.ids) or self.ids.dim() != 2 or not self.ids.numel():
            hub.fail("generate() needs input_ids of shape (prompts, tokens)")
        self.length = self.ids.shape[1]
        self.eos = torch.as_tensor(self.flag("eos_token_id", [])).flatten().to(self.ids.device)
        self.mask = self.read_mask(self.given.pop("attention_mask", None))
        self.ends = Ends(self.given.get("stopping_criteria") or [])
        if self.ends.given:
            self.given["stopping_criteria"] = StoppingCriteriaList([self.ends])

    def flag(self, name, default=None):
        """A flag of generation: an argument, or else what the configurations say."""
        configs = (self.given.get("generation_config"), self.config)
        values = [self.given.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), default)

    def read_mask(self, mask):
        """The attention mask (B, length), which padding on the left alone may leave out."""
        pad = self.tok.pad_token_id
        padded = pad is not None and bool((self.ids[:, [0, -1]] == pad).any())
        counts = len(self.ids) > 1 or pad not in self.eos  # else transformers takes it for the prompt's own
        if mask is None and padded and counts:
            hub.fail("prompts begin or end with padding; hand on attention_mask as the tokenizer gave it")
        mask = torch.ones_like(self.ids) if mask is None else mask
        if mask.shape != self.ids.shape:
            shapes = f"{tuple(mask.shape)} is not of the shape of input_ids {tuple(self.ids.shape)}"
            hub.fail(f"attention_mask {shapes}")
        seen = mask.bool()
        if not seen[:, -1].all() or (seen[:, :-1] & ~seen[:, 1:]).any():
            hub.fail("a prompt has padding in it or behind it; use tokenizer.padding_side = 'left'")
        return mask

    def prompts(self, env):
        """The Prompt of each row that will be written."""
        found = []
        for ids, seen in zip(self.ids, self.mask.bool(), strict=True):
            found += [prompt_of(env, ids[seen].tolist())] * self.flag("num_return_sequences", 1)
        return found

    def answers(self, out):
        """The answers in `out` (B, length + n) without the padding behind them, lists of ids."""
        answers = out[:, self.length :].tolist()
        stops = self.flag("stop_strings")
        stops = StopStringCriteria(self.tok, stops) if stops else None
        for n in reversed(range(out.shape[1] - self.length)):
            ended = torch.isin(out[:, self.length + n], self.eos)
            if stops:
                ended = ended | stops(out[:, : self.length + n + 1], None)
            if self.ends.said:
                ended = ended | self.ends.said[n]
            for row in ended.nonzero()[:, 0].tolist():
                answers[row] = answers[row][: n + 1]
        return answers


def record_of(run):
    """args.json of a run directory; one line where it does not say what the run belongs to."""
    record = hub.read_json(Path(run) / "args.json")
    identity = record.get("identity")
    if not isinstance(identity, dict) or not {"model", "task", "model_hash", "sae_hash"} <= identity.keys():
        hub.fail(f"{run}: its args.json lacks the identity of the run; restore it, or train the run again")
    return record


def load_controller(model, tok, run):
    """(environment, agent) of a run directory around a model that the caller has loaded.

    The environment's tokenizer asks as the training did: chat or plain, thinking on or off.
    Fails with one line that names the field where model or SAE are not those of the training."""
    run = Path(run)
    model = getattr(model, "_orig_mod", model)  # of torch.compile()
    args = crl_ppo.stored_args(run)
    own = [str(run / spec) if (run / spec).is_dir() else spec for spec in args.sae]  # an exported run's
    args.sae = tuple(own)
    identity = record_of(run)["identity"]
    tok = crl_tasks.fit_tokenizer(tok, args)
    if any(weights.is_meta for weights in model.parameters()):
        hub.fail("some weights of the model are offloaded; load it where it fits into memory")
    sites = hub.load_sites(args, model.config.get_text_config(), known=True)
    wanted = identity | {"dtype": f"torch.{args.dtype}"}
    here = {"dtype": str(model.dtype), "layer": [site.layer for site in sites]}
    here |= hub.steering_flags(args)
    here["model_hash"] = hub.model_hash(model)
    here["sae_hash"] = [site.hash for site in sites]
    for key, value in here.items():
        if value != wanted.get(key):
            hub.fail(f"{run}: {key} differs: run {wanted.get(key)!r}, here {value!r}; load the run's own")
    agent = crl_ppo.load_agent(run / "best.safetensors", identity)
    ends = agent.obs_mean.shape[1] // sites[0].directions.shape[1] - 1
    env = crl_ppo.Environment(args, model, tok, sites, ends)
    env.keep(hub.load_tensors(run / "rewards.safetensors", identity)[0]["kept"])
    return env, agent


@contextmanager
def watched(steering, length):
    """While open, the model's forward passes in this thread are steered: prompts of `length` columns."""
    edit = functools.partial(steering.step, length)
    handle = steering.env.model.register_forward_hook(steering.look)
    try:
        with crl_ppo.residual_hook(steering.env.steered_layers, edit):
            yield
    finally:
        handle.remove()


@contextmanager
def steered(model, tok, run):
    """While open, model.generate() answers under the policy of a run; then the model is what it was.

    model, tok: a Hugging Face causal LM and its tokenizer; run: a directory, or what load_controller() gives.
    Yields the log, dicts {call, row, position, token, decided, action, steering: {layer, feature, name,
    coefficient} or None, logprob, value, entropy} in the order of calls, rows and tokens. model.generate()
    fails with one line on beams and on whatever takes several tokens a step."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile(), whose generate() is the model's own
    if "generate" in vars(model):
        hub.fail("this model is steered already; leave the first `with` before")
    for module in model.modules():
        forward = vars(module).get("forward")
        if getattr(module, "_compiled_call_impl", None) or hasattr(forward, "_torchdynamo_orig_callable"):
            hub.fail("the model is compiled, so that no hook is called; load it anew without torch.compile()")
    env, agent = run if isinstance(run, tuple) else load_controller(model, tok, run)
    if env.model is not model:
        hub.fail("load_controller() was given another model; give both the same one")
    log = []
    calls = itertools.count()
    original = model.generate
    lock = threading.Lock()  # the hook belongs to one call at a time
    busy = set()  # threads inside generate()

    def generate(*args, **kwargs):
        if threading.get_ident() in busy:
            hub.fail("something calls generate() between two tokens of generate(); leave it out")
        call = Call(model, tok, inspect.signature(original).bind(*args, **kwargs).arguments)
        prompts = call.prompts(env)
        busy.add(threading.get_ident())
        try:
            with lock:
                steering = Steering(env, agent, prompts)
                with watched(steering, call.length):
                    out = original(inputs=call.ids, attention_mask=call.mask, **call.given)
                sequences = out if torch.is_tensor(out) else out.sequences
                said = sequences.shape[1] - call.length
                spare = int(call.ids.device.type == "mps")  # there transformers sees the end a token late
                if steering.passes - said not in (0, spare):
                    hub.fail(f"{steering.passes} forward passes for {said} tokens; leave out what runs more")
                log.extend(steering.log(next(calls), call.answers(sequences)))
        finally:
            busy.remove(threading.get_ident())
        return out

    def refuse(*args, **kwargs):
        hub.fail("continuous batching cannot be steered; use model.generate()")

    model.generate = generate
    model.init_continuous_batching = refuse  # generate_batch() begins with it
    try:
        yield log
    finally:
        del model.generate, model.init_continuous_batching


# ----------------------------------------------------------------------------------------------------- export
CARD = """---
tags: [steering, sparse-autoencoder, reinforcement-learning]
library_name: transformers
---

# A controller of {model}, trained on {task}

A small policy that picks a feature of a sparse autoencoder (SAE) and adds its direction to the residual
stream of a frozen language model while it answers. Trained with PPO by Control Reinforcement Learning (arXiv
2602.10437) on {train_n} labelled prompts, seed {seed}. The language model itself is not in here.

```python
with crl_steer.steered(model, tokenizer, "this directory") as log:  # crl_steer.py of the project that made it
    model.generate(...)
```

## Figures

{val_n} validation prompts, which chose the checkpoint:

| | right, % (95 % interval) |
|---|---|
{figures}

{verdict}.

{report}

## What it belongs to

{identity}

## Licences

Nothing in here is executable: safetensors, JSON and this text. Model, SAE and data have licences of their
own, which hold for their use with this controller. {terms}
"""
GEMMA = "It is made from a Gemma, so the Gemma Terms of Use hold for it too (ai.google.dev/gemma/terms)."


def model_card(run, record, seed):
    """README.md of an exported run directory; record: its args.json."""
    final = hub.read_json(run / "final.json")
    for key in ("val_n", "train_n", "unsteered", "steered", "constant", "verdict"):
        if not isinstance(final.get(key), str if key == "verdict" else int | float):
            hub.fail(f"{run}/final.json lacks {key!r}, or has no number there; train the run again")
    identity = record["identity"]
    n = final["val_n"]
    figures = []
    for key, title in (("unsteered", "unsteered"), ("steered", "CRL"), ("constant", "best constant action")):
        low, high = proportion_confint(round(final[key] * n), n, method="wilson")
        figures.append(f"| {title} | {final[key]:.1%} ({low:.1%} to {high:.1%}) |".replace("%", ""))
    facts = {"figures": "\n".join(figures), "report": "", "seed": seed} | final
    if (run / "eval" / "report.md").exists():
        report = (run / "eval" / "report.md").read_text("utf-8")
        facts["report"] = report.replace("# Evaluation", "### Test prompts").replace("\n## ", "\n#### ")
    facts["identity"] = "\n".join(f"* {key}: {value}" for key, value in identity.items())
    facts["terms"] = GEMMA if "gemma" in identity["model"].lower() else ""
    return CARD.format(**facts, model=identity["model"], task=identity["task"])


def export(run: Path, out: Path):
    """Write the policy of a finished run as a directory to publish; steered() takes it as it takes the run.

    Args:
        run: directory of the run
        out: directory to write, which must not exist yet
    """
    args = crl_ppo.stored_args(run)
    record = record_of(run)
    if out.exists():
        hub.fail(f"{out} exists; give a directory that does not")
    if not (run / "final.json").exists():
        hub.fail(f"{run} is not finished; go on with python crl_ppo.py --resume {run}")
    agent = hub.load_tensors(run / "best.safetensors", record["identity"])[0]["agent"]
    kept = hub.load_tensors(run / "rewards.safetensors", record["identity"])[0]["kept"]
    new = out.with_name(out.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    own = {key: getattr(crl_ppo.Args(), key) for key in crl_ppo.MACHINE_FLAGS} | {"sae": list(args.sae)}
    own["model"] = Path(args.model).name if Path(args.model).is_dir() else args.model
    own["task"] = "file:" + Path(args.task).name if args.task.startswith("file:") else args.task
    for site, spec in enumerate(args.sae):
        if Path(spec).is_dir():
            own["sae"][site] = f"sae{site}"
            (new / f"sae{site}").mkdir()
            for file in Path(spec).iterdir():
                if file.suffix in (".json", ".jsonl", ".safetensors"):
                    shutil.copy(file, new / f"sae{site}")
    record["args"] = asdict(args) | own
    record["identity"]["task"] = own["task"]
    hub.write_json(new / "args.json", record)
    hub.save_tensors(new / "best.safetensors", {"agent": agent}, record["identity"])
    hub.save_tensors(new / "rewards.safetensors", {"kept": kept}, record["identity"])
    (new / "README.md").write_text(model_card(run, record, args.seed), "utf-8")
    new.rename(out)
    print(f"exported to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


if __name__ == "__main__":
    export = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(export)
    try:
        tyro.extras.subcommand_cli_from_dict({"export": export}, description=__doc__)
    except KeyboardInterrupt:
        hub.fail("interrupted")
    except OSError as e:
        hub.fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}")
