"""A trained controller in anyone's code: plain transformers, no task, no rows.

    with crl_steer.steered(model, tokenizer, "runs/RUN") as log:
        model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=20)

Greedy decoding and sampling, batches padded on the left, with and without a cache; one decision per answer or per
token, as the run was trained. "runs/RUN" may be what `python crl_ppo.py --export` wrote. Options are found where lines
begin with "A.", "B." and so on. `log` then has a dict per row and token, named as in interventions.jsonl.
"""

import itertools
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from crl_model import LM, Actions, hooked, load_sites, prefill_ids, wrap_model
from crl_ppo import Agent, Args, decide, load_agent, stored_args
from crl_tasks import fail

REFUSED = (
    "inputs_embeds",
    "past_key_values",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "guidance_scale",
    "prefill_chunk_size",
)  # what runs other forward passes than one a token


@dataclass
class Controller:
    """A run's policy and the model that it steers."""

    args: Args
    lm: LM
    actions: Actions
    agent: Agent

    @property
    def sites(self):
        return [s.layer for s in self.actions.sites]

    @property
    def layers(self):
        """What a decision reads, in rising order."""
        return sorted({*self.sites, self.args.observe})

    def acts(self, t):
        """Whether anything is pushed at token t of an answer."""
        return not self.args.steer_tokens or t < self.args.steer_tokens

    def choose(self, xs, t):
        """decide()'s dict for token t from residual streams {layer: (B, ...)} as prefill() has them."""
        at_sites = [xs[layer][:, : self.actions.d] for layer in self.sites]
        mask = self.actions.active(at_sites) if self.args.afm == "active" else None
        return decide(self.agent, xs[self.args.observe], mask, min(t, 1))

    def push(self, d, t):
        """What of the pushes that were decided on, (B, k), acts at token t."""
        return self.actions.acting(self.agent.pushes[d["push"]], t)


def load_controller(model, tok, run):
    """The Controller of a run directory around a model that the caller has loaded. Fails with one line that names the
    field where model or SAE are not those that the run was trained with."""
    args = stored_args(run)
    args.sae = tuple(
        str(own) if (own := Path(run) / spec).is_dir() else spec for spec in args.sae
    )  # an exported one's
    identity = json.loads((Path(run) / "args.json").read_text())["identity"]
    lm = wrap_model(model, tok, identity["model"])
    sites = load_sites(args, lm)
    for key, own, here in (
        ("dtype", f"torch.{args.dtype}", str(model.dtype)),
        ("model_hash", identity["model_hash"], lm.hash),
        ("layer", identity["layer"], [s.layer for s in sites]),
        ("sae_hash", identity["sae_hash"], [s.hash for s in sites]),
    ):
        if own != here:
            fail(
                f"{run}: {key} differs: the run has {own!r}, here {here!r}; load the model and SAE of the run"
            )
    agent, *_ = load_agent(args, Path(run) / "best.safetensors", identity)
    return Controller(args, lm, Actions(args, sites), agent)


@contextmanager
def steered(model, tok, run):
    """While open, model.generate() answers under the policy of a run directory; afterwards the model is what it was.

    model, tok: a Hugging Face causal LM and its tokenizer; run: the directory, or a Controller. Yields the log, dicts
    {call, row, position, token, decided, choice, push: [{layer, feature, name, coefficient}], logp, value, entropy} in
    the order of calls, rows and tokens. model.generate() fails with one line on beams and on several tokens a step."""
    if "generate" in vars(model):
        fail("this model is steered already; leave the first `with` before")
    own = run if isinstance(run, Controller) else load_controller(model, tok, run)
    lm, actions, by_token = own.lm, own.actions, own.args.decide == "token"
    log, calls, original = [], itertools.count(), model.generate

    @torch.no_grad()
    def generate(inputs=None, generation_config=None, **kwargs):
        def flag(name, default):
            given = (
                kwargs.get(name),
                *(getattr(c, name, None) for c in (generation_config, model.generation_config)),
            )
            return next((value for value in given if value is not None), default)

        if flag("num_beams", 1) > 1:
            fail(
                f"num_beams {flag('num_beams', 1)}: steered answers have no beams; use greedy decoding or sampling"
            )
        for name in REFUSED:
            if (value := flag(name, None)) is not None and (name, value) != (
                "guidance_scale",
                1,
            ):  # 1: no guidance
                fail(f"{name}: a controller decides token by token from input_ids; leave it out")
        ids = kwargs.pop("input_ids", inputs)
        if ids is None or ids.dim() != 2:
            fail("generate() needs input_ids of shape (prompts, tokens)")
        mask = kwargs.pop("attention_mask", None)
        if mask is None and len(ids) > 1 and (ids[:, 0] == lm.tok.pad_token_id).any():
            fail(
                "some prompts begin with padding, and attention_mask is missing; hand it on as the tokenizer gave it"
            )
        mask = torch.ones_like(ids) if mask is None else mask
        if not mask[:, -1].all():
            fail("a prompt ends in padding; use tokenizer.padding_side = 'left'")
        copies = flag("num_return_sequences", 1)
        kwargs["num_return_sequences"] = 1  # the copies are made here, before anything is decided
        ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
        stop = flag("eos_token_id", None)
        stop = {*(stop if isinstance(stop, (list, tuple)) else [stop])} - {None} or lm.eos
        L, t, made = ids.shape[1], -1, []  # made: decisions {key of decide(): (B, ...)}

        if not by_token:  # read all of the prompt unsteered; its last token is then run again
            cache = DynamicCache()
            made.append(
                own.choose(prefill_ids(lm, own.layers, ids, mask, cache, own.args.observe_options)[1], 0)
            )
            if flag("use_cache", True) and not flag("cache_implementation", None) and L > 1:
                kwargs["past_key_values"] = cache

        def edit(i, h):  # (B, n, d): the last n of L + t columns
            nonlocal t
            t += i == 0
            if i == 0 and by_token and own.acts(t):
                made.append(own.choose({own.sites[0]: h[:, -1]}, t))
            first, h = L + t - h.shape[1], h.clone()
            for s in range(max(0, first - L + 1), t + 1):  # without a cache, what came before is pushed again
                if own.acts(s):
                    push = own.push(made[min(s, len(made) - 1)], s).to(h.device)
                    x = h[:, L - 1 + s - first]
                    h[:, L - 1 + s - first] = x + actions.added(i, x, push).to(h.dtype)
            return h

        with hooked(lm, own.sites, edit):
            out = original(ids, generation_config, attention_mask=mask, **kwargs)
        call = next(calls)
        for row, said in enumerate((out if torch.is_tensor(out) else out.sequences)[:, L:].tolist()):
            end = next((n + 1 for n, token in enumerate(said) if token in stop), len(said))
            for s, token in enumerate(said[:end]):
                d = {key: v[row] for key, v in made[min(s, len(made) - 1)].items()}
                log.append(
                    {
                        "call": call,
                        "row": row,
                        "position": s,
                        "token": token,
                        "decided": s < len(made),
                        "choice": int(d["push"]),
                        "push": actions.describe(own.push(d, s)) if own.acts(s) else [],
                        **{key: float(d[key]) for key in ("logp", "value", "entropy")},
                    }
                )
        return out

    model.generate = generate
    try:
        yield log
    finally:
        del model.generate
