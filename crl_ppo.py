"""Control Reinforcement Learning (CRL): PPO steers a frozen language model with SAE features.

    python crl_ppo.py --task mmlu --samples 4000

A small policy reads the residual stream of a frozen language model and picks an action: a feature of a sparse
autoencoder (SAE), whose decoder direction is added to the residual stream while the model answers. A rule
checks the answer, and the 0/1 reward trains policy and critic with PPO. Model and SAE never change.

Read from the top: flags -> model and SAE -> environment (hook, generation, rewards) -> Adaptive Feature Masking
(AFM) -> agent -> main, which is CleanRL's PPO. Questions, rules and downloads are in crl_tasks.py, the method
in words is in docs/method.md, variants are in forks/. Shapes: B prompts in a batch, n prompts of a split,
G answers to a prompt, T decisions of an answer, A actions, P of them in the mask, d residual width, k width of
what the policy reads.
"""

import itertools
import json
import math
import os
import re
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

import crl_tasks
from crl_tasks import Prompt, hub

PerTask = tyro.conf.arg(help_behavior_hint="(default: per task, see the table)")


@dataclass
class RunArgs:
    task: str = "mmlu"
    """a name of the table above, or file:PATH"""
    samples: int = 4000
    """labelled training prompts that the policy may learn from"""
    seed: int = 1
    """of the sample, the initial weights, exploration and minibatches"""
    data_dir: str | None = None
    """local mirror with DIR/<task>/<split>.jsonl and the hub's columns"""
    fold: Literal[0, 1, 2, 3] = 0
    """which quarter of the rows is the test part where the source has no train split"""
    val_samples: int = 200
    """validation prompts (never trained on), for the best checkpoint and the final figures"""
    run_dir: str = "runs"
    """parent of the run directory <task>__<model>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue, with its flags; the result equals the uninterrupted run's"""
    track: bool = False
    """log to Weights & Biases (offline when there is no login)"""


@dataclass
class ModelArgs:
    model: str = "auto"
    """preset (crl_tasks.PRESETS), hub id or directory; auto: gemma2-2b on a GPU, else smollm2-135m"""
    sae: tuple[str, ...] = ("auto",)
    """one per site: auto (the preset's), RELEASE/ID of SAELens, a directory, none (own basis), random:D"""
    layer: tuple[int, ...] = ()
    """sites (decoder layers, output side) in rising order; default: the SAE's own"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, or auto-map (a model spread over all GPUs by accelerate)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU or a processor that is faster with it, else float32"""
    batch_size: int = 16
    """prompts in a forward pass; lower it when memory runs out"""
    shots: int = 0
    """solved training prompts put before every question"""


@dataclass
class SteeringArgs:
    coef: Annotated[tuple[float, ...] | None, PerTask] = None
    """strengths; several are more actions, negative ones subtract"""
    coef_mode: Literal["norm", "abs"] = "norm"
    """unit of --coef: the norm of the residual stream, or absolute (the paper's 10 to 100)"""
    decisions: Annotated[int | None, PerTask] = None
    """decisions of an answer, one at each of its first tokens; the last one holds"""
    steer_tokens: Annotated[int | None, PerTask] = None
    """tokens of an answer that are steered; 0: all of them"""
    max_new_tokens: Annotated[int | None, PerTask] = None
    """longest answer in tokens; 1: an option letter"""
    pool: Annotated[int | None, PerTask] = None
    """size of the mask: actions (with several decisions sequences of them) next to the no-op"""


@dataclass
class PPOArgs:
    epsilon: float = 0.5
    """share of uniform choice among the mask's actions, annealed linearly to 0"""
    updates: Annotated[int | None, PerTask] = None
    """PPO updates"""
    group: int = 16
    """answers drawn for a prompt in an update"""
    learning_rate: Annotated[float | None, PerTask] = None
    """of AdamW, annealed linearly to 0"""
    gae_lambda: float = 1.0
    """of generalised advantage estimation over the decisions of an answer (gamma is 1)"""
    update_epochs: int = 4
    """passes over an update's prompts"""
    num_minibatches: int = 4
    """minibatches in a pass"""
    clip_coef: float = 0.2
    """clipping of the surrogate and of the value loss"""
    ent_coef: float = 0.01
    """weight of the policy's entropy"""
    target_kl: float | None = None
    """end an update's passes once the approximate KL to the policy that acted exceeds this"""


@dataclass
class Args(PPOArgs, SteeringArgs, ModelArgs, RunArgs):
    """All flags; the four classes make the groups of --help."""


def parse_args():
    def flags(run: RunArgs, model: ModelArgs, steering: SteeringArgs, ppo: PPOArgs) -> Args:
        return Args(**vars(run), **vars(model), **vars(steering), **vars(ppo))

    description = __doc__.split("\n\n")[0] + "\n\n" + crl_tasks.table_of_defaults()
    return tyro.cli(flags, description=description, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, so that --help answers at once

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch.distributions import Categorical
from tqdm import tqdm

SCHEMA = 4  # version of args.json, interventions.jsonl and checkpoints
ANSWERS = 40  # answers generated at once, times --batch-size
SCREEN = 4  # prompts of the first screening round; then four and sixteen times as many
HIDDEN = 64  # width of the two hidden layers of policy and critic
WEIGHT_DECAY = 1.0
NEW_PROMPTS = 32  # prompts of an update where rewards are not known in advance
BROKEN = -1  # instead of a token whose logits are not finite
THREADS = torch.get_num_threads()
MACHINE_FLAGS = ("data_dir", "run_dir", "resume", "track", "device")  # they change no result


# --------------------------------------------------------------------------------------------- model and SAE
def load_model(args):
    """(model, tokenizer, name) of --model, frozen; replaces auto in args.model and args.dtype."""
    hub.keep_freed_memory()
    cuda = torch.cuda.is_available()
    args.model, where = hub.find_model(args.model, cuda)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = args.device.replace("auto-map", "auto").replace("auto", "cuda" if cuda else "cpu")
    if device.startswith("cuda") and not cuda:
        hub.fail(f"--device {args.device}: this PyTorch sees no GPU; use --device cpu")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device != "cpu" or hub.native_bfloat16() else "float32"
        print(f"--dtype auto: {args.dtype} on this {'processor' if device == 'cpu' else device}")
    options = {"dtype": getattr(torch, args.dtype), "use_safetensors": True, "trust_remote_code": False}
    options["device_map"] = "auto" if args.device == "auto-map" else {"": device}
    try:
        tok = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(where, **options)
    except Exception as e:  # transformers and its back-ends raise many kinds here
        hub.fail(f"cannot load the model {where}: {hub.first_line(e)}; {hub.model_hint(where)}")
    name = Path(args.model).name if Path(args.model).is_dir() else args.model
    return model.eval().requires_grad_(False), tok, name


class Site(NamedTuple):
    layer: int  # whose output is read and steered
    directions: torch.Tensor  # (D, d) unit rows
    sae: object  # of SAELens; None for own basis and random directions
    name: str
    hash: str
    names: dict  # feature -> its line of features.jsonl


def load_sites(args, config):
    """List of Site, one per --sae or --layer, for a model with this config."""
    specs = args.sae if len(args.sae) > 1 else args.sae * max(1, len(args.layer))
    sites = []
    for spec, layer in zip(specs, args.layer or [None] * len(specs), strict=True):
        sae = None
        names = {}
        if spec == "none":
            W = torch.eye(config.hidden_size)
        elif re.fullmatch(r"random:[1-9]\d*", spec):
            generator = torch.Generator().manual_seed(args.seed + 1000 * (layer or 0))
            W = torch.randn(int(spec[7:]), config.hidden_size, generator=generator)
        else:
            spec, sae, layer, names = hub.load_sae(args.model, spec, layer)
            W = sae.W_dec.detach().float().cpu()
        if W.shape[1] != config.hidden_size:
            hub.fail(
                f"SAE {spec} has width {W.shape[1]}, {args.model} {config.hidden_size}; take one of its own"
            )
        if layer not in range(config.num_hidden_layers):
            hub.fail(f"--layer {layer}: {args.model} has layers 0 to {config.num_hidden_layers - 1}")
        digest = hub.hash_of(*([W] if sae is None else sae.state_dict().values()))
        sites.append(Site(layer, F.normalize(W, dim=1), sae, spec, digest, names))
    layers = [site.layer for site in sites]
    if sorted(set(layers)) != layers:
        hub.fail(f"sites must be distinct layers in rising order, not {layers}")
    return sites


# ------------------------------------------------------------------------------------------------ environment
@dataclass
class Batch:
    """B prompts that the frozen model has read; their answers go on from here."""

    prompts: list
    cache: object  # keys and values of all prompt tokens but the last
    position: torch.Tensor  # (B, K) of each cached token; -1 for padding
    x: torch.Tensor = None  # (B, 1 + options, d) residual stream of the last token and where options end
    actions: torch.Tensor = None  # (B, G) what acts at present


@contextmanager
def residual_hook(layers, edit):
    """While open, edit(site, h) replaces the residual stream h (B, t, d) that layers[site] puts out."""

    def hook(site, layer, inputs, output):
        if isinstance(output, tuple):  # in some architectures
            return (edit(site, output[0]), *output[1:])
        return edit(site, output)

    with ExitStack() as handles:
        for site, layer in enumerate(layers):
            handles.enter_context(layer.register_forward_hook(partial(hook, site)))
        yield


@contextmanager
def skipped(layers):
    """While open, these layers hand their input on: what they do is the same for all answers to a prompt."""
    for layer in layers:
        layer.forward = lambda h, *args, **kwargs: h
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Environment:
    """A frozen language model that answers prompts while an action is added to its residual stream.

    The list of actions holds every feature of every site at every strength; the last action is the no-op."""

    def __init__(self, args, model, tok, sites, options=0):
        config = model.config.get_text_config()
        self.args = args
        self.model = model
        self.decoder = model.get_decoder()
        self.tok = tok
        self.device = next(model.parameters()).device
        self.context = getattr(config, "max_position_embeddings", math.inf)  # longest sequence in tokens
        self.layer_types = getattr(config, "layer_types", None) or []
        self.window = getattr(config, "sliding_window", None)  # tokens that layers with a window see
        if self.layer_types and "sliding_attention" not in self.layer_types:
            self.window = None
        self.eos = crl_tasks.end_tokens(model, tok)
        self.letters = crl_tasks.letter_tokens(tok)
        lists = [m for m in self.decoder.modules() if isinstance(m, nn.ModuleList)]
        self.layers = next((m for m in lists if len(m) == config.num_hidden_layers), None)
        if self.layers is None:
            hub.fail(f"{args.model}: found no list of {config.num_hidden_layers} decoder layers to hook")
        self.sites = sites
        self.steered_layers = [self.layers[site.layer] for site in sites]
        self.options = options  # the policy reads where so many options end
        self.obs_dim = config.hidden_size * (1 + options)
        self.actions = []  # (site, feature, coefficient)
        vectors = []
        for number, site in enumerate(sites):
            for coef in args.coef:
                self.actions += [(number, feature, coef) for feature in range(len(site.directions))]
                vectors.append(coef * site.directions)
        self.actions.append((-1, 0, 0.0))
        self.steering = torch.cat([*vectors, torch.zeros(1, config.hidden_size)]).to(self.device)  # (A, d)
        self.site_of = torch.tensor([site for site, _, _ in self.actions], device=self.device)  # (A,)
        self.noop = len(self.actions) - 1
        self.ask([])

    def ask(self, prompts):
        """Take up N prompts: remember what they earn from now on, and read only once what all begin with."""
        self.prompts = prompts
        self.memo = torch.full((len(prompts), len(self.actions)), math.nan)  # rewards; NaN: not tried
        self.obs = torch.full((len(prompts), self.args.decisions, self.obs_dim), math.nan)  # read, unsteered
        self.completions = [{} for _ in prompts]  # of each prompt: action -> token ids
        self.prefix = []
        ids = os.path.commonprefix([prompt.ids for prompt in prompts])
        for prompt in prompts:  # ends of options and the last token are read for every prompt
            ids = ids[: min([len(prompt.ids) - 1, *(end for end in prompt.option_ends if end >= 0)])]
        if len(prompts) > 1 and len(ids) > 1:
            self.prefix_cache = self.prefill([Prompt({}, ids, [])]).cache
            self.prefix = ids[:-1]  # the cache of a Batch lacks the last token

    def keep(self, actions):
        """Shorten the list to these actions, (P,) numbers of the present list, the no-op last."""
        self.actions = [self.actions[action] for action in actions.tolist()]
        self.steering = self.steering[actions.to(self.device)]
        self.site_of = self.site_of[actions.to(self.device)]
        self.noop = len(actions) - 1
        self.ask(self.prompts)

    def describe(self, action):
        """{layer, feature, name, coefficient} of an action; None for the no-op."""
        number, feature, coef = self.actions[action]
        if number < 0:
            return None
        name = self.sites[number].names.get(feature, {}).get("name", "")
        return {"layer": self.sites[number].layer, "feature": feature, "name": name, "coefficient": coef}

    def label(self, action):
        does = self.describe(action)
        return "{layer}:{feature} {name} x {coefficient:g}".format(**does) if does else "no-op"

    def read(self, batch, site, h):
        """The hook's work on prompts h (B, t, d): keep what the policy reads; NaN where an option is missing."""
        if site == 0:
            at = torch.full((len(h), 1 + self.options), -1)  # counted from the end
            for b, prompt in enumerate(batch.prompts):
                for option, end in enumerate(prompt.option_ends[: self.options], start=1):
                    at[b, option] = end - len(prompt.ids) if end >= 0 else -1
            batch.x = h[torch.arange(len(h))[:, None], at]
            batch.x[:, 1:][at[:, 1:] == -1] = math.nan
        return h

    def steer(self, batch, choose, t, skip, site, h):
        """The hook's work on the t-th token of G answers, h (B, G, d): add what choose() decides on."""
        if site == 0 and skip:
            h = batch.x[:, :1].expand(h.shape)
        if site == 0 and t < self.args.decisions:
            options = batch.x[:, None, 1:].flatten(2).expand(-1, h.shape[1], -1)
            batch.actions = choose(torch.cat([h, options], -1).float(), t).to(self.device)
        return self.add(site, h, batch.actions)

    def add(self, site, h, actions):
        """The residual stream h (..., d) at a site, with the vectors of actions (...) that act there."""
        vectors = self.steering[actions] * (self.site_of[actions] == site)[..., None]
        if self.args.coef_mode == "norm":
            vectors = vectors.to(h.device) * h.float().norm(dim=-1, keepdim=True)
        return h + vectors.to(h)

    def forward(self, module, ids, cache, visible, key_position, position):
        """module(ids (B, q)), where visible (B, q, K) says which cached tokens each of them sees. From key_position
        (B, K) and position (B, q) follows what lies within the window of layers that have one."""

        def additive(seen):
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
            return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None]

        mask = additive(visible)
        if self.window:
            near = additive(visible & (key_position[:, None] > position[..., None] - self.window))
            mask = {"full_attention": mask, "sliding_attention": near} if self.layer_types else near
        position = position.clamp(min=0)
        return module(ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def prefill(self, prompts):
        """Read B prompts unsteered: a Batch."""
        from transformers import DynamicCache

        B = len(prompts)
        shared = self.prefix if all(p.ids[: len(self.prefix)] == self.prefix for p in prompts) else []
        cache = DynamicCache()  # it keeps what lies outside of windows; the mask hides that
        for number, layer in enumerate(self.prefix_cache.layers if shared else ()):
            cache.update(layer.keys.expand(B, -1, -1, -1), layer.values.expand(B, -1, -1, -1), number)
        rows = {"input_ids": [prompt.ids[len(shared) :] for prompt in prompts]}
        padded = self.tok.pad(rows, padding_side="left", return_tensors="pt").to(self.device)
        position = padded.attention_mask.cumsum(1) - 1 + len(shared)
        position = position.masked_fill(padded.attention_mask == 0, -1)  # (B, q)
        start = torch.arange(len(shared)).to(position).expand(B, -1)
        key_position = torch.cat([start, position], 1)  # (B, K)
        visible = (key_position[:, None] >= 0) & (key_position[:, None] <= position[..., None])
        batch = Batch(prompts, cache, key_position[:, :-1])
        with residual_hook(self.steered_layers, partial(self.read, batch)):
            self.forward(self.decoder, padded.input_ids, cache, visible, key_position, position)
        cache.crop(-1)
        return batch

    @torch.no_grad()
    def decode(self, batch, choose, G, begun, steps):
        """G greedy answers of up to `steps` tokens to each of B prompts: token ids (B, G, n).

        They are G columns of one sequence: all share the keys and values of their prompt, and each sees the
        prompt and its own tokens. choose and begun are those of generate(). After its end an answer is BROKEN."""
        B = len(batch.prompts)
        own = torch.eye(G, dtype=torch.bool, device=self.device).expand(B, G, G)
        visible = (batch.position >= 0)[:, None].expand(B, G, -1)
        key_position = batch.position
        position = torch.tensor([[len(p.ids) - 1] for p in batch.prompts], device=self.device).expand(B, G)
        token = torch.tensor([[p.ids[-1]] for p in batch.prompts], device=self.device).expand(B, G)
        stop = torch.tensor([BROKEN, *self.eos], device=self.device)
        below = self.layers[: self.sites[0].layer + 1] if steps == 1 else []
        tokens = []
        for t in range(steps):
            visible = torch.cat([visible, own], 2)
            key_position = torch.cat([key_position, position], 1)
            steered = t < self.args.steer_tokens or self.args.steer_tokens == 0
            edit = partial(self.steer, batch, choose, t, steps == 1)
            with residual_hook(self.steered_layers if steered else [], edit), skipped(below):
                ids = token.clamp(min=0)
                logits = self.forward(self.model, ids, batch.cache, visible, key_position, position).logits
            ended = torch.isin(token, stop) if t > 0 else token < 0
            best, token = logits.to(self.device).max(-1)  # argmax is four times slower
            if t < begun.shape[1]:
                token = begun[:, t].expand(B, G)
            token = token.masked_fill(ended | ~best.isfinite(), BROKEN)
            tokens.append(token)
            position = position + 1
            if torch.isin(token, stop).all() and t + 1 >= self.args.decisions:
                break
        for layer in batch.cache.layers[len(below) :]:
            layer.crop(-G * len(tokens))  # ready for other answers to the same prompts
        return torch.stack(tokens, -1)

    def generate(self, prompts, choose, G, begun=None, steps=None, title=""):
        """G greedy answers to each of N prompts: N lists of G lists of token ids.

        choose(obs (B, g, k), t, rows, columns) -> actions (B, g) decides at token t < --decisions for some
        answers (columns) to some prompts (rows). begun (G, n): tokens that the answers must begin with. The
        processes of a torchrun job share the batches."""
        steps = steps or self.args.max_new_tokens
        begun = torch.zeros(G, 0).long() if begun is None else begun.to(self.device)
        at_once = ANSWERS * self.args.batch_size
        width = min(G, at_once if steps == 1 else 16)  # long answers would fill the sequence that they share
        size = self.args.batch_size if steps == 1 else max(1, at_once // width)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
        processes = PartialState()
        mine = torch.tensor(order).split(size)[processes.process_index :: processes.num_processes]
        quiet = len(mine) < 4 or not processes.is_main_process
        done = {}
        for rows in tqdm(mine, desc=title, leave=False, disable=quiet):
            batch = self.prefill([prompts[row] for row in rows])
            done |= {row: [] for row in rows.tolist()}
            for columns in torch.arange(G).split(min(width, max(1, at_once // len(rows)))):
                decide = partial(choose, rows=rows, columns=columns)
                tokens = self.decode(batch, decide, len(columns), begun[columns], steps)
                for row, answers in zip(rows.tolist(), tokens.tolist(), strict=True):
                    done[row] += [[token for token in answer if token != BROKEN] for answer in answers]
        everywhere = {}
        for part in gather_object([done]):
            everywhere |= part
        return [everywhere[row] for row in range(len(prompts))]

    def score(self, row, completion):
        """(reward 0/1, whether the answer is valid) of a list of token ids."""
        return crl_tasks.score_tokens(row, completion, self.tok, self.letters, self.args.max_new_tokens)

    def score_all(self, prompts, answers):
        """Rewards (N, G) of N lists of G completions."""
        rewards = torch.zeros(len(prompts), len(answers[0]))
        for i, prompt in enumerate(prompts):
            for g, completion in enumerate(answers[i]):
                rewards[i, g] = self.score(prompt.row, completion)[0]
        return rewards

    def rewards(self, rows, actions, title=""):
        """Rewards (n, G) of prompts `rows` (n,) under actions (n, G), or (G,) for all of them alike.

        What was tried once is remembered, and only what is new is generated."""
        actions = actions.expand(len(rows), -1)
        new = self.memo[rows[:, None], actions].isnan().any(1)
        if new.any():
            todo = rows[new]
            tried = actions[new]

            def choose(obs, t, rows, columns):
                self.obs[todo[rows], t] = obs[:, 0].cpu()
                return tried[rows][:, columns]

            prompts = [self.prompts[row] for row in todo]
            answers = self.generate(prompts, choose, tried.shape[1], title=title)
            for row, some, completions in zip(todo.tolist(), tried.tolist(), answers, strict=True):
                for action, completion in zip(some, completions, strict=True):
                    if action not in self.completions[row]:
                        self.completions[row][action] = completion
                        self.memo[row, action] = self.score(self.prompts[row].row, completion)[0]
        return self.memo[rows[:, None], actions].float()


def fixed(actions):
    """The choice of Environment.generate() where actions (N, G, T) are given; the last one holds."""
    return lambda obs, t, rows, columns: actions[rows][:, columns, min(t, actions.shape[2] - 1)]


# --------------------------------------------------------------------------- Adaptive Feature Masking (AFM)
def cover(rewards, size):
    """Numbers of `size` columns of rewards (n, S), chosen greedily: next comes the column with the largest sum
    over prompts of (1/2)^n_i * reward, n_i being the number of chosen columns that set prompt i right.

    Greedy maximum coverage (Nemhauser, Wolsey and Fisher 1978): for different prompts, not the best means."""
    weight = torch.ones(len(rewards))
    chosen = []
    for _ in range(min(size, rewards.shape[1])):
        gain = weight @ rewards
        gain[chosen] = -math.inf
        chosen.append(int(gain.argmax()))
        weight = weight * 0.5 ** rewards[:, chosen[-1]]
    return chosen


def screen(env, args, train):
    """The mask: --pool sequences of T actions (pool, T), and their rewards (n, pool) on training prompts that the
    frozen model gets wrong.

    Every action (for long answers every sequence of search_beginnings()) is tried on SCREEN prompts, the best on
    four and then sixteen times as many: successive halving (Jamieson and Talwalkar 2016), best meaning cover()."""

    def tried(prompts, sequences, title=""):
        choose = fixed(sequences.expand(len(prompts), -1, -1))
        return env.score_all(prompts, env.generate(prompts, choose, len(sequences), title=title))

    unsteered = tried(train, torch.tensor([[env.noop]]))[:, 0]
    wrong = [prompt for prompt, reward in zip(train, unsteered, strict=True) if reward == 0] or train
    sequences = torch.arange(env.noop)[:, None]
    if args.max_new_tokens > 1:
        sequences = search_beginnings(env, args, wrong[: 16 * SCREEN])
    for times, size in ((1, 16 * args.pool), (4, 4 * args.pool), (16, args.pool)):
        right = tried(wrong[: times * SCREEN], sequences, f"screening {len(sequences)} actions")
        best = cover(right, size)
        sequences = sequences[best]
    return sequences, right[:, best]


def search_beginnings(env, args, prompts):
    """For long answers: sequences (S, T) of actions that bring about first tokens that earn.

    What a long answer earns hangs on its first tokens, and there are fewer tokens than features. So beginnings of
    T tokens are tried on the frozen model: the 64 commonest first tokens under any action, then, twice, the
    commonest pieces of T tokens in the answers that earned. For the best, the actions that bring about each token
    are looked up."""
    T = args.decisions

    def next_tokens(some, begun, actions):
        """The token (n, S) that follows prompts and the tokens `begun` under each of S actions."""
        longer = [Prompt(p.row, [*p.ids, *begun], p.option_ends) for p in some]
        choose = fixed(actions[None, :, None].expand(len(some), -1, -1))
        answers = env.generate(longer, choose, len(actions), steps=1)
        return torch.tensor([[token for (token,) in row] for row in answers])

    @cache
    def under_any_action(begun):
        return next_tokens(prompts[:2], begun, torch.arange(env.noop))

    def bringing(begun, token, size):
        """Up to `size` actions that most often bring about a token on 24 prompts, of those that do so on two."""
        hits = (under_any_action(begun) == token).sum(0)
        likely = (hits == hits.max()).nonzero()[:128, 0]
        rate = (next_tokens(prompts[:24], begun, likely) == token).float().mean(0)
        return likely[rate.argsort(descending=True, stable=True)[:size]].tolist() if hits.max() > 0 else []

    pieces = Counter((token,) for token in under_any_action(()).flatten().tolist())
    earning = []
    for size in (64, 256, 256) if T > 1 else (64,):
        beginnings = [piece for piece, _ in pieces.most_common(size)]
        for some in (prompts[: max(8, 2048 // size)], prompts[-24:]):
            begun = torch.tensor(beginnings)
            unsteered = fixed(torch.full((len(some), len(begun), 1), env.noop))
            answers = env.generate(some, unsteered, len(begun), begun, title="trying beginnings")
            right = env.score_all(some, answers)
            earning += [answers[i][s] for i, s in right.nonzero().tolist()]
            beginnings = [beginnings[s] for s in right.mean(0).argsort(descending=True, stable=True)[:32]]
        starts = [tokens[i : i + T] for tokens in earning for i in range(len(tokens) - T + 1)]
        pieces = Counter(map(tuple, starts)) or pieces
    sequences = []
    for beginning in beginnings:
        actions = []
        for t, token in enumerate(beginning):
            if len(actions) == t:  # so far each token is brought about by some action
                actions += [some] if (some := bringing(beginning[:t], token, 16 if T == 1 else 2)) else []
        if len(actions) == T:
            sequences += itertools.product(*actions)
        if len(sequences) >= 8 * 16:
            break
    return torch.tensor(sequences or [[action] * T for action in range(env.noop)[:64]])


# ------------------------------------------------------------------------------------------------------ agent
def layer_init(layer, std=2**0.5, bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


def mlp(inputs, outputs):
    first = layer_init(nn.Linear(inputs, HIDDEN))
    second = layer_init(nn.Linear(HIDDEN, HIDDEN))
    last = layer_init(nn.Linear(HIDDEN, outputs), std=0.01)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


class Agent(nn.Module):
    """Policy over the P actions of the mask at each of T decisions, and critic."""

    def __init__(self, obs_dim, P, T):
        super().__init__()
        self.critic = mlp(obs_dim + T, 1)
        self.actor = mlp(obs_dim + T, P)
        self.prior = nn.Parameter(torch.zeros(T, P))  # the policy's last bias, one per decision
        self.register_buffer("action_mask", torch.zeros(T, P))  # 1: may be chosen at this decision
        self.register_buffer("constant", torch.zeros(T).long())  # what is best for all prompts alike
        self.register_buffer("obs_mean", torch.zeros(2, obs_dim))  # of the prompt, of generated tokens
        self.register_buffer("obs_std", torch.ones(2, obs_dim))

    def start_at(self, sequences, worth):
        """Allow these sequences (S, T) and start at what works on average, given their mean rewards (S,).

        The no-op starts as likely as all other actions together."""
        self.action_mask[:, -1] = 1.0
        self.prior.data[:, -1] = math.log(self.prior.shape[1])
        for sequence, value in zip(sequences.tolist(), worth.tolist(), strict=True):
            for t, action in enumerate(sequence):
                self.action_mask[t, action] = 1.0
                self.prior.data[t, action] = max(self.prior[t, action].item(), 5 * value)
        self.constant[:] = sequences[worth.argmax()]

    def calibrate(self, x):
        """Statistics of what is read, x (N, T, k) of unsteered training prompts, without their labels."""
        for row, part in enumerate((x[:, 0], x[:, 1:].flatten(0, 1))[: x.shape[1]]):
            self.obs_mean[row] = part.nanmean(0)
            self.obs_std[row] = ((part - self.obs_mean[row]) ** 2).nanmean(0).sqrt().clamp(min=1e-6)

    def observe(self, x, t):
        """obs (..., k + T) of what is read at decision t, x (..., k): standardised, with the position as a one-hot.
        0 where an option is missing."""
        obs = (x.float().cpu() - self.obs_mean[min(t, 1)]) / self.obs_std[min(t, 1)]
        position = F.one_hot(torch.tensor(t), len(self.prior)).float()
        return torch.cat([obs.clamp(-10, 10).nan_to_num(), position.expand(*obs.shape[:-1], -1)], -1)

    def get_policy(self, obs, epsilon=0.0):
        """The policy's choice, mixed with uniform choice among what the mask allows."""
        position = obs[..., -len(self.prior) :]
        allowed = position @ self.action_mask
        logits = self.actor(obs) + position @ self.prior
        pi = logits.masked_fill(allowed == 0, -math.inf).softmax(-1)
        uniform = allowed / allowed.sum(-1, keepdim=True)
        return Categorical(probs=(1 - epsilon) * pi + epsilon * uniform, validate_args=False)


class Rollout(NamedTuple):
    obs: torch.Tensor  # (T, n, G, k + T); if T = 1 (1, n, 1, k + 1), since all answers share it
    actions: torch.Tensor  # (T, n, G)
    logprobs: torch.Tensor  # (T, n, G)
    values: torch.Tensor  # (T, n, G)
    rewards: torch.Tensor  # (n, G)
    completions: list  # n lists of G lists of token ids


@torch.no_grad()
def rollout(env, agent, rows, G=1, epsilon=0.0, greedy=False):
    """G answers of the policy to each of the n prompts `rows`: a Rollout."""
    T = len(agent.prior)

    def act(obs):
        policy = agent.get_policy(obs, epsilon).expand((*obs.shape[:-2], G))
        action = policy.logits.argmax(-1) if greedy else policy.sample()
        return action, policy.log_prob(action), agent.critic(obs)[..., 0].expand(action.shape)

    if T == 1:  # the answer is a function of prompt and action
        obs = agent.observe(env.obs[rows], 0)[None]
        actions, logprobs, values = act(obs)
        rewards = env.rewards(rows, actions[0])
        chosen = zip(rows.tolist(), actions[0].tolist(), strict=True)
        completions = [[env.completions[row][action] for action in some] for row, some in chosen]
        return Rollout(obs, actions, logprobs, values, rewards, completions)

    obs = torch.zeros(T, len(rows), G, env.obs_dim + T)
    actions = torch.zeros(T, len(rows), G).long()
    logprobs = torch.zeros(T, len(rows), G)
    values = torch.zeros(T, len(rows), G)

    def choose(x, t, rows, columns):
        obs[t, rows] = agent.observe(x, t)
        actions[t, rows], logprobs[t, rows], values[t, rows] = act(obs[t, rows])
        return actions[t, rows]

    prompts = [env.prompts[row] for row in rows]
    completions = env.generate(prompts, choose, G)
    buffers = [reduce(buffer) for buffer in (obs, actions, logprobs, values)]  # every process fills its rows
    return Rollout(*buffers, env.score_all(prompts, completions), completions)


# ------------------------------------------------------------------------------------------ files of a run
def load_rewards(path, identity, env):
    """Take up the mask and the rewards of a run in `env`; returns its sequences (S, T) and their worth (S,)."""
    tensors, facts = hub.load_tensors(path, identity)
    env.keep(tensors["kept"])
    env.memo = tensors["memo"]
    env.obs = tensors["obs"]
    env.completions = [dict(known) for known in facts["completions"]]
    return tensors["sequences"], tensors["worth"]


def load_agent(path, identity):
    """The Agent of a checkpoint."""
    tensors = hub.load_tensors(path, identity)[0]["agent"]
    agent = Agent(tensors["obs_mean"].shape[1], tensors["prior"].shape[1], len(tensors["prior"]))
    agent.load_state_dict(tensors)
    return agent


def stored_args(run):
    """The resolved flags of a run directory, as Args. Fails with one line where another version made it."""
    try:
        record = json.loads((Path(run) / "args.json").read_text())
        stored = {key: tuple(v) if isinstance(v, list) else v for key, v in record["args"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        hub.fail(f"{run}: no readable args.json there; give a run directory that an earlier run printed")
    if record.get("schema") != SCHEMA or {*stored, *MACHINE_FLAGS} != {*vars(Args())}:
        hub.fail(
            f"{run}: made by another version of crl_ppo.py, whose schema is not {SCHEMA}; train it again"
        )
    return Args(**stored)


def write_log(path, env, agent, rows, greedy):
    """interventions.jsonl: a line per token of the answers to prompts `rows`, greedy being their Rollout."""
    buffers = (greedy.logprobs, greedy.values, agent.get_policy(greedy.obs).entropy())
    lines = []
    for i, row in enumerate(rows.tolist()):
        prompt = env.prompts[row]
        tokens = greedy.completions[i][0]
        about = {"schema": SCHEMA, "prompt_id": prompt.row["id"], "task": prompt.row["task"]}
        about |= {"reward": greedy.rewards[i, 0].item(), "unsteered_reward": env.memo[row, -1].item()}
        # what the unsteered model would have said after each prefix of this answer
        ids = torch.tensor([prompt.ids + tokens[:-1]], device=env.device)
        without = env.model(ids, logits_to_keep=max(1, len(tokens))).logits[0].argmax(-1).tolist()
        for position, token in enumerate(tokens):
            t = min(position, len(agent.prior) - 1)  # its decision, which holds
            action = greedy.actions[t, i, 0].item()
            steered = position < env.args.steer_tokens or env.args.steer_tokens == 0
            line = about | {"position": position, "decided": t == position, "action": action}
            line["steering"] = env.describe(action) if steered else None
            for who, said in (("", token), ("unsteered_", without[position])):
                line |= {f"{who}token": said, f"{who}token_text": env.tok.decode([said])}
            for name, buffer in zip(("logprob", "value", "entropy"), buffers, strict=True):
                line[name] = buffer[t, i, 0].item()
            lines.append(line | {"mask_size": int(agent.action_mask[t].sum())})
    hub.write_jsonl(path, lines)


# ---------------------------------------------------------------------------------------- setting up, and main
def set_up(args, loaded=None):
    """The environment, prompts and identity of a run; fills what is per task or auto into `args`.

    loaded: what load_model() has returned before. Prompts are {"train", "val": [Prompt], "test", "shots": [row],
    "source": where from}. The identity is what a checkpoint must share with a run."""
    parts, source = crl_tasks.load_rows(args.task, args.data_dir, args.fold)
    model, tok, name = loaded or load_model(args)
    crl_tasks.fill_defaults(args, parts, name, tok)
    options = max(len(row["choices"] or ()) for part in parts.values() for row in part)
    sites = load_sites(args, model.config.get_text_config())
    args.layer = tuple(site.layer for site in sites)
    env = Environment(args, model, tok, sites, options)
    prompts = crl_tasks.sample_prompts(parts, args, tok, env.context) | {"source": source}
    asked = [(p.row["id"], p.row["answer"], p.ids) for p in prompts["train"] + prompts["val"]]
    identity = {"schema": SCHEMA, "task": args.task, "model": name, "data_hash": hub.hash_of(asked)}
    identity["model_hash"] = hub.hash_of(*(weights.flatten()[:64] for weights in model.parameters()))
    identity["sae_hash"] = [site.hash for site in env.sites]
    identity |= {key: list(getattr(args, key)) for key in ("layer", "coef")} | {"coef_mode": args.coef_mode}
    return env, prompts, identity


def main(args):
    # 1. flags and processes
    started = time.time()
    if args.resume:
        given = args
        args = stored_args(args.resume)
        args.resume = given.resume
        for key, value in asdict(given).items():
            if value not in (getattr(Args(), key), getattr(args, key)):
                hub.fail(
                    f"--resume: --{key} is {value!r}, but the run has {getattr(args, key)!r}; leave it out"
                )
    crl_tasks.check_flags(args)
    processes = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    first = processes.is_main_process
    if processes.num_processes > 1:
        args.device = str(processes.device)
    say = print if first else lambda *a, **k: None

    # 2. model, actions, prompts, run directory
    env, prompts, identity = set_up(args)
    name = re.sub("[/:]", "_", "__".join([args.task, identity["model"], str(args.seed), f"{started:.6f}"]))
    run = Path(args.resume or Path(args.run_dir) / gather_object([name])[0])
    if first and not args.resume:
        run.mkdir(parents=True)
        record = {
            "schema": SCHEMA,
            "args": asdict(args),
            "identity": identity,
            "versions": hub.versions(),
        }
        hub.write_json(run / "args.json", record)
    if args.track and first:
        import wandb

        mode = None if wandb.login(prompt=False, verify=False) else "offline"
        wandb.init(project="crl", name=run.name, config=asdict(args), dir=run, mode=mode)
    sizes = f"{len(prompts['train'])} training and {len(prompts['val'])} validation prompts"
    say(f"task {args.task} from {prompts['source']}: {sizes}")
    for site in env.sites:
        at = f"layer {site.layer} with {site.name}, {len(site.directions)} features"
        say(f"{identity['model']} in {args.dtype} on {env.device}, steered at {at}", flush=True)

    # 3. the mask (AFM), and what prompts earn: unsteered and, with one decision, under every action of the mask
    env.ask(prompts["train"] + prompts["val"])
    train = torch.arange(len(prompts["train"]))
    val = torch.arange(len(prompts["train"]), len(env.prompts))
    state = {"update": 0, "best": -1.0, "best_update": 0, "metrics": []}

    def save(file, tensors, facts):
        if first:
            hub.save_tensors(run / file, tensors, identity | facts)

    if (run / "rewards.safetensors").exists():
        sequences, worth = load_rewards(run / "rewards.safetensors", identity, env)
    else:
        few = prompts["train"][: 64 * SCREEN]
        if args.max_new_tokens == 1:  # short prompts cost less
            few = sorted(few, key=lambda prompt: len(prompt.ids))
        sequences, right = screen(env, args, few[: 32 * SCREEN])
        worth = right.mean(0)
        helped = f"{right.amax(1).mean():.0%} of {len(right)} wrong answers"
        say(f"screened {env.noop} actions: some action of the mask sets {helped} right")
        kept = torch.cat([sequences.unique(), torch.tensor([env.noop])])
        sequences = torch.searchsorted(kept[:-1], sequences)  # their numbers in the shorter list
        env.keep(kept)
        tried = torch.arange(env.noop + 1) if args.decisions == 1 else torch.tensor([env.noop])
        env.rewards(torch.arange(len(env.prompts)), tried, title="rewards")
        tensors = {"kept": kept, "sequences": sequences, "worth": worth, "memo": env.memo, "obs": env.obs}
        completions = [list(known.items()) for known in env.completions]
        save("rewards.safetensors", tensors, {"completions": completions})
    unsteered = env.memo[:, -1].float()
    known_s = time.time() - started

    # 4. policy, critic, optimizer
    torch.manual_seed(args.seed)
    agent = Agent(env.obs_dim, env.noop + 1, args.decisions)
    if args.decisions == 1:
        sequences = torch.arange(env.noop)[:, None]
        worth = env.memo[train, :-1].float().mean(0)
    agent.start_at(sequences, worth)
    agent.calibrate(env.obs[train])
    adam = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.AdamW(agent.parameters(), **adam)
    if (run / "last.safetensors").exists():
        saved, state = hub.load_tensors(run / "last.safetensors", identity)
        say(f"resumed at update {state['update']} of {args.updates}")
        agent.load_state_dict(saved["agent"])
        slots = {int(number): slot for number, slot in saved["adam"].items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})

    # 5. PPO
    eval_every = max(1, args.updates // (30 if args.decisions == 1 else 10))
    todo = range(state["update"] + 1, args.updates + 1)
    bar = tqdm(todo, initial=state["update"], total=args.updates, disable=not first)
    for update in bar:
        frac = 1.0 - (update - 1.0) / args.updates
        optimizer.param_groups[0]["lr"] = frac * args.learning_rate
        epsilon = frac * args.epsilon
        torch.manual_seed(args.seed * 1_000_003 + update)  # so that a resumed run draws alike

        rows = train if args.decisions == 1 else train[torch.randperm(len(train))[:NEW_PROMPTS]]
        r = rollout(env, agent, rows, args.group, epsilon)
        lengths = torch.tensor([[len(tokens) for tokens in answers] for answers in r.completions])
        alive = torch.arange(args.decisions)[:, None, None] < lengths  # (T, n, G) decided before the end
        baseline = unsteered[rows][:, None]

        # generalised advantage estimation; the reward, less the frozen model's, comes at the last decision
        advantages = torch.zeros_like(r.values)
        lastgaelam = torch.zeros_like(r.rewards)
        for t in reversed(range(args.decisions)):
            last = t == lengths.clamp(max=args.decisions) - 1
            nextvalues = torch.zeros_like(r.rewards) if t + 1 == args.decisions else r.values[t + 1]
            delta = torch.where(last, r.rewards - baseline, nextvalues) - r.values[t]
            lastgaelam = delta + args.gae_lambda * torch.where(last, 0.0, lastgaelam)
            advantages[t] = lastgaelam
        returns = advantages + r.values

        # optimise the policy and the critic; a minibatch is some prompts with all their answers
        torch.set_num_threads(1)  # the products are tiny: threads would wait for each other
        for _ in range(args.update_epochs):
            for mb in torch.randperm(len(rows)).chunk(args.num_minibatches):
                inside = alive[:, mb]
                policy = agent.get_policy(r.obs[:, mb], epsilon)
                logratio = (policy.log_prob(r.actions[:, mb]) - r.logprobs[:, mb])[inside]
                ratio = logratio.exp()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
                mb_advantages = advantages[:, mb][inside]
                mb_advantages = mb_advantages - mb_advantages.mean()
                mb_advantages = mb_advantages / (mb_advantages.std(correction=0) + 1e-4)

                # policy loss
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()

                # value loss
                newvalue = agent.critic(r.obs[:, mb])[..., 0].expand_as(inside)[inside]
                mb_values = r.values[:, mb][inside]
                v_clipped = mb_values + torch.clamp(newvalue - mb_values, -args.clip_coef, args.clip_coef)
                v_loss_unclipped = (newvalue - returns[:, mb][inside]) ** 2
                v_loss_clipped = (v_clipped - returns[:, mb][inside]) ** 2
                v_loss = 0.5 * torch.max(v_loss_unclipped, v_loss_clipped).mean()

                entropy = policy.entropy().expand_as(inside)[inside].mean()
                loss = pg_loss - args.ent_coef * entropy + 0.5 * v_loss
                if not torch.isfinite(loss):
                    hub.fail(f"update {update}: the loss is not finite; lower --learning-rate, run is {run}")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        torch.set_num_threads(THREADS)

        # 6. log, validate, save
        metrics = {"losses/policy_loss": pg_loss, "losses/value_loss": v_loss, "losses/entropy": entropy}
        metrics |= {"losses/approx_kl": approx_kl, "losses/clipfrac": clipfrac}
        metrics["losses/explained_variance"] = 1 - (returns - r.values)[alive].var() / returns[alive].var()
        metrics |= {"objective/reward": r.rewards, "objective/unsteered_reward": baseline}
        metrics |= {"objective/corrected": r.rewards > baseline, "objective/misguided": r.rewards < baseline}
        metrics = {key: value.float().mean().item() for key, value in metrics.items()}
        metrics |= {"update": update, "charts/epsilon": epsilon, "charts/frac": frac}
        validates = update % eval_every == 0 or update == args.updates
        if validates:
            metrics["objective/val_reward"] = rollout(env, agent, val, greedy=True).rewards.mean().item()
            bar.set_postfix({key: f"{metrics[f'objective/{key}']:.3f}" for key in ("reward", "val_reward")})
        state["metrics"].append(metrics)
        if validates:
            state["update"] = update
            if metrics["objective/val_reward"] > state["best"]:
                state |= {"best": metrics["objective/val_reward"], "best_update": update}
                save("best.safetensors", {"agent": agent.state_dict()}, state)
            adam = optimizer.state_dict()["state"]
            save("last.safetensors", {"agent": agent.state_dict(), "adam": adam}, state)
            if first:
                hub.write_jsonl(run / "metrics.jsonl", state["metrics"])
        if args.track and first:
            wandb.log(metrics, step=update)
    learn_s = time.time() - started - known_s

    # 7. the best checkpoint on the validation prompts: log, metrics, final block
    processes.wait_for_everyone()  # the first one writes it
    agent = load_agent(run / "best.safetensors", identity)
    greedy = rollout(env, agent, val, greedy=True)
    constant = env.generate(prompts["val"], fixed(agent.constant.expand(len(val), 1, -1)), 1)
    if not first:  # the rest is for one process
        return run
    write_log(run / "interventions.jsonl", env, agent, val, greedy)
    gains = greedy.rewards[:, 0] - unsteered[val]
    final = {"train_n": len(train), "val_n": len(val), "mask_size": env.noop + 1}
    final |= {"best_update": state["best_update"], "verdict": crl_tasks.verdict(gains.tolist())}
    final |= {"corrected": int((gains > 0).sum()), "misguided": int((gains < 0).sum())}
    final["constant_action"] = " + ".join(env.label(action) for action in agent.constant.tolist())
    final["coverage"] = env.memo[val].float().amax(1).mean().item() if args.decisions == 1 else None
    final |= {"wall_s": time.time() - started, "known_s": known_s, "learn_s": learn_s}
    plain = [[env.completions[row][env.noop]] for row in val.tolist()]
    say(f"\n{f'validation, n = {len(val)}':24}{'right':>8}{'valid answers':>16}")
    for who, answers in (("unsteered", plain), ("steered", greedy.completions), ("constant", constant)):
        scores = [env.score(p.row, answer) for p, [answer] in zip(prompts["val"], answers, strict=True)]
        final[who] = sum(reward for reward, _ in scores) / len(val)
        final[f"{who}_valid"] = sum(valid for _, valid in scores) / len(val)
        title = {"constant": "best constant action"}.get(who, who)
        say(f"{title:24}{final[who]:8.1%}{final[f'{who}_valid']:16.1%}")
    hub.write_json(run / "final.json", final)
    picks = Counter(greedy.actions.flatten().tolist())
    often = ", ".join(f"{env.label(action)} ({count})" for action, count in picks.most_common(4))
    say(f"corrected {final['corrected']}, misguided {final['misguided']}; actions used most: {often}")
    say(f"{final['wall_s']:.0f} s in all, {learn_s:.1f} s of them PPO\n{final['verdict']}")
    say(f"run directory: {run}\nnext: python crl_eval.py --run {run}")
    if args.track:
        wandb.summary.update(final)
        wandb.finish()
    return run


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        hub.fail("interrupted; --resume RUN goes on from what was written")
    except torch.OutOfMemoryError:
        hub.fail("out of memory; lower --batch-size")
    except OSError as e:
        hub.fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}; what is written is kept")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
