"""Control Reinforcement Learning (CRL): PPO steers a language model with SAE features.

    python crl_ppo.py --task mmlu --samples 4000

A small policy reads the residual stream of a frozen language model and picks an action:
a feature of a sparse autoencoder (SAE), whose direction is added there while the model
answers. A rule checks the answer, and this 0/1 reward trains the policy.

Order: flags, environment (hook, generation, rewards), Adaptive Feature Masking (AFM),
agent, files, main (CleanRL's PPO). Questions and rules: crl_tasks.py. In words:
docs/method.md. Variants: forks/. Shapes: B, n or N prompts, G answers to each, T decisions
per answer, A actions, P in the mask, d residual width, k width of what is read.
"""

import itertools
import math
import os
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

import crl_tasks
from crl_tasks import Prompt, hub, passes

PerTask = tyro.conf.arg(help_behavior_hint="(default: per task, see the table)")


@dataclass
class RunArgs:
    task: str = "mmlu"
    """a name of the table in --help, or file:PATH"""
    samples: int = 4000
    """labelled training prompts to learn from"""
    seed: int = 1
    """seeds the sample, weights, exploration and minibatches"""
    data_dir: str | None = None
    """local mirror, DIR/<task>/<split>.jsonl with the hub's columns"""
    fold: Literal[0, 1, 2, 3] = 0
    """which quarter is the test part, if the source has no split"""
    val_samples: int = 200
    """validation prompts, which choose the checkpoint"""
    run_dir: str = "runs"
    """parent of the run directory <task>__<model>__<seed>__<time>"""
    resume: str | None = None
    """run directory to continue, bit for bit"""
    track: bool = False
    """log to Weights & Biases (offline without a login)"""


@dataclass
class ModelArgs:
    model: str = "auto"
    """preset, hub id or directory; auto: gemma2-2b on a GPU, else smollm2-135m"""
    sae: tuple[str, ...] = ("auto",)
    """one per site: auto, RELEASE/ID of SAELens, a directory, none or random:D"""
    layer: tuple[int, ...] = ()
    """sites (decoder layers, output side), ascending; default: the SAE's own"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, or auto-map (one model on several GPUs)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU or where the processor is faster with it"""
    batch_size: int = 32
    """prompts in a forward pass; lower it if memory runs out"""
    prompt: Literal["auto", "chat", "plain"] = "auto"
    """how to ask; auto: by the model"""
    shots: int = 0
    """solved training prompts before every question"""


@dataclass
class SteeringArgs:
    coef: Annotated[tuple[float, ...] | None, PerTask] = None
    """strengths; each gives every feature an action, negative ones subtract"""
    coef_mode: Literal["norm", "abs"] = "norm"
    """unit of --coef: the residual stream's norm, or 1 (the paper's 10 to 100)"""
    decisions: Annotated[int | None, PerTask] = None
    """decisions per answer, one at each first token; the last stays in force"""
    steer_tokens: Annotated[int | None, PerTask] = None
    """tokens of an answer that are steered; 0: all of them"""
    max_new_tokens: Annotated[int | None, PerTask] = None
    """longest answer in tokens; 1: an option letter"""
    pool: Annotated[int | None, PerTask] = None
    """size of the mask, without the no-op"""


@dataclass
class PPOArgs:
    epsilon: float = 0.5
    """probability of a random action, annealed to 0"""
    updates: Annotated[int | None, PerTask] = None
    """PPO updates"""
    group: int = 16
    """answers sampled per prompt in each update"""
    learning_rate: Annotated[float | None, PerTask] = None
    """learning rate of AdamW, annealed to 0"""
    gae_lambda: float = 1.0
    """lambda of generalised advantage estimation (gamma is 1)"""
    update_epochs: int = 4
    """passes over an update's prompts"""
    num_minibatches: int = 4
    """minibatches per pass"""
    clip_coef: float = 0.2
    """clipping of surrogate and value loss"""
    ent_coef: float = 0.01
    """weight of the policy's entropy"""
    target_kl: float | None = None
    """end an update's passes once the approximate KL exceeds this"""


@dataclass
class Args(PPOArgs, SteeringArgs, ModelArgs, RunArgs):
    """All flags; the four classes make the groups of --help."""


def parse_args():
    def flags(run: RunArgs, model: ModelArgs, steering: SteeringArgs, ppo: PPOArgs) -> Args:
        return Args(**vars(run), **vars(model), **vars(steering), **vars(ppo))

    about = __doc__.split("\n\n")[0] + "\n\n" + crl_tasks.table_of_defaults()
    return hub.tyro_cli(flags, description=about, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help answers at once

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributions import Categorical
from tqdm import tqdm

SCHEMA = 5  # version of args.json, interventions.jsonl and checkpoints
ANSWERS = 20  # answers at once, per unit of --batch-size
SCREEN = 4  # prompts of the first screening round
HIDDEN = 64  # width of the two hidden layers of policy and critic
NEW_PROMPTS = 32  # prompts per update if T > 1
NO_TOKEN = -1  # after an answer's end, or where logits are not finite
THREADS = torch.get_num_threads()
MACHINE_FLAGS = ("data_dir", "run_dir", "resume", "track", "device")  # change no result


# --- model and SAE ---
def load_model(args):
    """(model, tokenizer, name) of --model, frozen; resolves auto in args."""
    hub.keep_freed_memory()
    args.model, where = hub.find_model(args.model, torch.cuda.is_available())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = hub.find_device(args.device)
    if args.dtype == "auto":
        fast = device != "cpu" or hub.native_bfloat16()
        args.dtype = "bfloat16" if fast else "float32"
        print(f"--dtype auto: {args.dtype} on {device}")
    how = {"dtype": getattr(torch, args.dtype), "trust_remote_code": False}
    how["device_map"] = "auto" if args.device == "auto-map" else {"": device}
    try:
        tok = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(where, use_safetensors=True, **how)
    except Exception as e:
        hub.fail(f"cannot load {where}: {hub.first_line(e)}; {hub.model_hint(where)}")
    name = Path(args.model).name if Path(args.model).is_dir() else args.model
    return model.eval().requires_grad_(False), tok, name


# --- environment ---
@dataclass
class Batch:  # B prompts that the frozen model has read
    prompts: list
    cache: object  # keys and values of all prompt tokens but the last
    position: torch.Tensor  # (B, K) of each cached token; -1 for padding
    x: torch.Tensor = None  # (B, 1 + ends, d) what is read
    actions: torch.Tensor = None  # (B, G) now in force


@contextmanager
def residual_hook(layers, edit):
    """While open, edit(site, h) replaces h (B, t, d), the output of layers[site]."""

    def hook(site, layer, inputs, output):
        layer.gives_tuple = isinstance(output, tuple)  # for passes.skipped()
        if layer.gives_tuple:
            return (edit(site, output[0]), *output[1:])
        return edit(site, output)

    with ExitStack() as handles:
        for site, layer in enumerate(layers):
            handles.enter_context(layer.register_forward_hook(partial(hook, site)))
        yield


class Environment:
    """A frozen language model that answers while actions steer its residual stream.

    Actions: all features of all sites at all strengths, then the no-op. The policy reads
    the first site, in the forward pass that steers there."""

    shares_prefix = True  # the prompts' common prefix is read once

    def __init__(self, args, model, tok, sites, ends=1):
        config = model.config.get_text_config()
        self.args = args
        self.model = model
        self.decoder, self.layers = passes.decoder_layers(model)
        self.tok = tok
        self.device = next(model.parameters()).device
        self.context = passes.context_length(config)
        self.below = self.layers[: sites[0].layer + 1]  # skipped if steps == 1
        self.eos = crl_tasks.end_tokens(model, tok)
        self.letters = crl_tasks.letter_tokens(tok)
        self.sites = sites
        self.steered_layers = [self.layers[site.layer] for site in sites]
        self.ends = ends  # how many are read: one per option, else the question's
        self.obs_dim = config.hidden_size * (1 + ends)
        self.actions = []  # (site, feature, coefficient)
        vectors = []
        for number, site in enumerate(sites):
            for coef in args.coef:
                self.actions += [(number, f, coef) for f in range(len(site.directions))]
                vectors.append(coef * site.directions)
        self.actions.append((-1, 0, 0.0))
        vectors.append(torch.zeros(1, config.hidden_size))
        self.steering = torch.cat(vectors).to(self.device)  # (A, d)
        self.site_of = torch.tensor([a[0] for a in self.actions], device=self.device)
        self.noop = len(self.actions) - 1
        self.ask([])

    def keep(self, actions):
        """Shorten the list to these actions (P,), the no-op last."""
        self.actions = [self.actions[action] for action in actions.tolist()]
        self.steering = self.steering[actions.to(self.device)]
        self.site_of = self.site_of[actions.to(self.device)]
        self.noop = len(actions) - 1
        self.ask(self.prompts)

    def ask(self, prompts):
        """Set the N prompts, whose answers are remembered from now on."""
        self.prompts = prompts
        self.memo = torch.full((len(prompts), len(self.actions)), math.nan)
        self.obs = torch.full((len(prompts), self.args.decisions, self.obs_dim), math.nan)
        self.completions = [{} for _ in prompts]  # action -> token ids
        # their common prefix, which stops short of all ends and last tokens
        self.prefix = []
        shared = os.path.commonprefix([prompt.ids for prompt in prompts])
        for prompt in prompts:
            ends = [end for end in prompt.ends if end >= 0]
            shared = shared[: min([len(prompt.ids) - 1, *ends])]
        if self.shares_prefix and len(prompts) > 1 and len(shared) > 1:
            self.prefix_cache = self.prefill([Prompt({}, shared, [])]).cache
            self.prefix = shared[:-1]  # the cache of a Batch lacks the last token

    def describe(self, action):
        """{layer, feature, name, coefficient}; None for the no-op."""
        number, feature, coef = self.actions[action]
        if number < 0:
            return None
        site = self.sites[number]
        name = site.names.get(feature, {}).get("name", "")
        return {"layer": site.layer, "feature": feature, "name": name, "coefficient": coef}

    def label(self, action):
        does = self.describe(action)
        return "{layer}:{feature} {name} x {coefficient:g}".format(**does) if does else "no-op"

    def read(self, batch, site, h):
        """Keep what is read of prompts h (B, t, d), NaN for missing ends."""
        if site == 0:
            at = torch.tensor([-1] + [0] * self.ends).repeat(len(h), 1)  # 0: none
            for b, prompt in enumerate(batch.prompts):
                for number, end in enumerate(prompt.ends[: self.ends]):
                    at[b, 1 + number] = end - len(prompt.ids) if end >= 0 else 0
            batch.x = h[torch.arange(len(h))[:, None], at]
            batch.x[at == 0] = math.nan
        return h

    def steer(self, batch, choose, t, skip, site, h):
        """Add what choose() decides to the answers' t-th tokens h (B, G, d)."""
        if site == 0 and skip:  # h is a dummy: the layers below did not run
            h = batch.x[:, :1].expand(h.shape)
        if site == 0 and t < self.args.decisions:
            ends = batch.x[:, None, 1:].flatten(2).expand(-1, h.shape[1], -1)
            obs = torch.cat([h, ends], -1).float()
            batch.actions = choose(obs, t).to(self.device)
        return self.add(site, h, batch.actions)

    def add(self, site, h, actions):
        """h (..., d) with what actions (...) add at this site."""
        vectors = self.steering[actions] * (self.site_of[actions] == site)[..., None]
        if self.args.coef_mode == "norm":
            vectors = vectors.to(h.device) * h.float().norm(dim=-1, keepdim=True)
        return h + vectors.to(h)

    def forward(self, module, ids, cache, visible, key_position, position):
        """module(ids (B, q)), where each token sees the `visible` (B, q, K) cached ones.
        key_position (B, K) and position (B, q) decide what a window covers."""
        mask = passes.attention_mask(self.decoder, visible, key_position, position)
        inputs = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        return module(ids, position_ids=position.clamp(min=0), **inputs)

    @torch.no_grad()
    def prefill(self, prompts):
        """Read B prompts unsteered: a Batch."""
        from transformers import DynamicCache

        B = len(prompts)
        start = len(self.prefix)
        if any(prompt.ids[:start] != self.prefix for prompt in prompts):
            start = 0
        cache = DynamicCache()  # keeps all, windows or not
        for number, layer in enumerate(self.prefix_cache.layers if start else ()):
            keys = layer.keys.expand(B, -1, -1, -1)
            cache.update(keys, layer.values.expand(B, -1, -1, -1), number)
        rows = {"input_ids": [prompt.ids[start:] for prompt in prompts]}
        padded = self.tok.pad(rows, padding_side="left", return_tensors="pt")
        padded = padded.to(self.device)
        real = padded.attention_mask
        position = (real.cumsum(1) - 1 + start).masked_fill(real == 0, -1)
        shared = torch.arange(start, device=self.device).expand(B, start)
        key_position = torch.cat([shared, position], 1)  # (B, K)
        keys = key_position[:, None]
        visible = (keys >= 0) & (keys <= position[..., None])
        batch = Batch(prompts, cache, key_position[:, :-1])
        inputs = (padded.input_ids, cache, visible, key_position, position)
        with residual_hook(self.steered_layers, partial(self.read, batch)):
            self.forward(self.decoder, *inputs)
        cache.crop(-1)
        return batch

    @torch.no_grad()
    def decode(self, batch, choose, G, begun, steps):
        """G greedy answers to each of B prompts: token ids (B, G, n) or NO_TOKEN.

        They are columns of one sequence: all share the keys and values of their prompt,
        and each sees the prompt and its own tokens."""
        B = len(batch.prompts)
        itself = torch.eye(G, dtype=torch.bool, device=self.device).expand(B, G, G)
        visible = (batch.position >= 0)[:, None].expand(B, G, -1)
        key_position = batch.position
        last = torch.tensor([[p.ids[-1]] for p in batch.prompts])
        token = last.to(self.device).expand(B, G)
        length = torch.tensor([[len(p.ids)] for p in batch.prompts])
        position = length.to(self.device).expand(B, G) - 1
        stop = torch.tensor([NO_TOKEN, *self.eos], device=self.device)
        ended = torch.zeros(B, G, dtype=torch.bool, device=self.device)
        below = self.below if steps == 1 else []
        tokens = []
        for t in range(steps):
            visible = torch.cat([visible, itself], 2)
            key_position = torch.cat([key_position, position], 1)
            steered = t < self.args.steer_tokens or self.args.steer_tokens == 0
            edit = partial(self.steer, batch, choose, t, bool(below))
            layers = self.steered_layers if steered else []
            inputs = (token.clamp(min=0), batch.cache, visible, key_position, position)
            with residual_hook(layers, edit), passes.skipped(below):
                logits = self.forward(self.model, *inputs).logits.to(self.device)
            best, token = logits.max(-1)
            broken = ~best.isfinite()
            spoilt = G > 1 and broken.any()  # NaN spreads along a sequence
            if t < begun.shape[1]:
                token = begun[:, t].expand(B, G)
            token = token.masked_fill(ended | broken, NO_TOKEN)
            tokens.append(token)
            ended = torch.isin(token, stop)
            position = position + 1
            if spoilt or (ended.all() and t + 1 >= self.args.decisions):
                break
        for layer in batch.cache.layers[len(below) :]:
            layer.crop(-G * len(tokens))  # ready for others
        return None if spoilt else torch.stack(tokens, -1)

    def generate(self, prompts, choose, G, begun=None, steps=None):
        """G greedy answers to each of N prompts: N lists of G lists of token ids.

        choose(obs (B, g, k), t, rows, columns) -> actions (B, g), for t < T
        begun (G, n): tokens to begin with. torchrun's processes share the work."""
        steps = steps or self.args.max_new_tokens
        begun = torch.zeros(G, 0).long() if begun is None else begun
        at_once = ANSWERS * self.args.batch_size
        batches = passes.batches(prompts, self.args.batch_size)
        processes = PartialState()
        batches = batches[processes.process_index :: processes.num_processes]
        done = {}
        for rows in tqdm(batches, leave=False, delay=2, disable=not processes.is_main_process):
            batch = self.prefill([prompts[row] for row in rows])
            done |= {row: [] for row in rows.tolist()}
            todo = list(torch.arange(G).split(at_once // len(rows)))
            while todo:
                columns = todo.pop(0)
                decide = partial(choose, rows=rows, columns=columns)
                some = begun[columns].to(self.device)
                tokens = self.decode(batch, decide, len(columns), some, steps)
                if tokens is None:
                    todo = [*columns.chunk(2), *todo]  # halve, retry
                    continue
                for row, answers in zip(rows.tolist(), tokens.tolist(), strict=True):
                    for answer in answers:
                        done[row].append([token for token in answer if token != NO_TOKEN])
        everywhere = {}
        for part in gather_object([done]):
            everywhere |= part
        return [everywhere[row] for row in range(len(prompts))]

    def score(self, row, tokens):
        """(reward 0/1, whether the answer is valid) of a list of token ids."""
        length = self.args.max_new_tokens
        return crl_tasks.score_tokens(row, tokens, self.tok, self.letters, length)

    def score_all(self, prompts, answers):
        """Rewards (N, G) of N lists of G answers."""
        rewards = torch.zeros(len(prompts), len(answers[0]))
        for i, prompt in enumerate(prompts):
            for g, tokens in enumerate(answers[i]):
                rewards[i, g] = self.score(prompt.row, tokens)[0]
        return rewards

    def rewards(self, which, actions):
        """Rewards (n, G) of prompts `which` (n,) under actions (n, G) or (G,). Known ones
        are looked up."""
        actions = actions.expand(len(which), -1)
        new = self.memo[which[:, None], actions].isnan().any(1)
        if new.any():
            todo = which[new]
            tried = actions[new]
            seen = torch.zeros(len(todo), *self.obs.shape[1:])

            def choose(obs, t, rows, columns):
                seen[rows, t] = obs[:, 0].cpu()  # T > 1: the no-op
                return tried[rows][:, columns]

            prompts = [self.prompts[row] for row in todo]
            answers = self.generate(prompts, choose, tried.shape[1])
            earned = self.score_all(prompts, answers)
            self.obs[todo] = sum(gather_object([seen]))
            for i, row in enumerate(todo.tolist()):
                for g, action in enumerate(tried[i].tolist()):
                    if action not in self.completions[row]:
                        self.completions[row][action] = answers[i][g]
                        self.memo[row, action] = earned[i, g]
        return self.memo[which[:, None], actions]


def fixed(actions):
    """choose() where actions (N, G, T) are given; the last stays in force."""
    T = actions.shape[2]
    return lambda obs, t, rows, columns: actions[rows][:, columns, min(t, T - 1)]


# --- Adaptive Feature Masking (AFM) ---
def cover(rewards, size):
    """`size` columns of rewards (n, S) by greedy coverage (Nemhauser et al. 1978).

    Each step takes the largest sum of reward * (1/2)^n_i over prompts i, where n_i chosen
    columns are right already. Columns that earn nothing are left out, if any earns."""
    weight = torch.ones(len(rewards))
    chosen = []
    for _ in range(min(size, rewards.shape[1])):
        gain = weight @ rewards
        gain[chosen] = -math.inf
        if chosen and gain.max() <= 0:
            break
        chosen.append(int(gain.argmax()))
        weight = weight * 0.5 ** rewards[:, chosen[-1]]
    return chosen


def screen(env, args, train):
    """The mask: sequences (pool, T) of actions, and their rewards (n, pool).

    All actions (or, for long answers, those of search_beginnings()) are tried on SCREEN
    prompts that the frozen model gets wrong, the best by cover() on 4, then 16 times as many
    (successive halving, Jamieson and Talwalkar 2016)."""

    def tried(prompts, sequences):
        choose = fixed(sequences.expand(len(prompts), -1, -1))
        answers = env.generate(prompts, choose, len(sequences))
        return env.score_all(prompts, answers)

    unsteered = tried(train, torch.tensor([[env.noop]]))[:, 0]
    wrong = [train[i] for i in (unsteered == 0).nonzero()[:, 0]] or train
    sequences = torch.arange(env.noop)[:, None]
    if args.max_new_tokens > 1:
        sequences = search_beginnings(env, args, wrong[: 16 * SCREEN])
    for times, size in ((1, 16 * args.pool), (4, 4 * args.pool), (16, args.pool)):
        right = tried(wrong[: times * SCREEN], sequences)
        best = cover(right, size)
        sequences = sequences[best]
    return sequences, right[:, best]


def search_beginnings(env, args, prompts):
    """Sequences (S, T) of actions that cause rewarded first tokens.

    Few first tokens ever occur, so the frozen model tries beginnings: the commonest first
    tokens under any action, then, twice, the commonest pieces of rewarded answers. Then
    actions that cause the best ones are looked up."""
    T = args.decisions

    def next_tokens(some, begun, actions):
        """The token (n, S) after n prompts and `begun` under S actions."""
        longer = [Prompt(p.row, [*p.ids, *begun], p.ends) for p in some]
        choose = fixed(actions[None, :, None].expand(len(some), -1, -1))
        answers = env.generate(longer, choose, len(actions), steps=1)
        flat = [(tokens or [NO_TOKEN])[0] for tokens in itertools.chain(*answers)]
        return torch.tensor(flat).view(len(some), -1)

    @cache
    def under_any_action(begun):
        return next_tokens(prompts[:2], begun, torch.arange(env.noop))

    def causing(begun, token, size):
        """Causes of a token: 128 by 2 prompts, ranked on 24."""
        hits = (under_any_action(begun) == token).sum(0)
        likely = (hits == hits.max().clamp(min=1)).nonzero()[:128, 0]
        if len(likely) == 0:
            return []
        rate = (next_tokens(prompts[:24], begun, likely) == token).float().mean(0)
        return likely[rate.argsort(descending=True, stable=True)[:size]].tolist()

    pieces = Counter((token,) for token in under_any_action(()).flatten().tolist())
    rewarded = []
    for size in (64, 256, 256) if T > 1 else (64,):
        beginnings = [piece for piece, _ in pieces.most_common(size)]
        for some in (prompts[: max(8, 2048 // size)], prompts[-24:]):  # find, then confirm
            begun = torch.tensor(beginnings)
            unsteered = fixed(torch.full((len(some), len(begun), 1), env.noop))
            answers = env.generate(some, unsteered, len(begun), begun)
            right = env.score_all(some, answers)
            rewarded += [answers[i][s] for i, s in right.nonzero().tolist()]
            best = right.mean(0).argsort(descending=True, stable=True)[:32]
            beginnings = [beginnings[s] for s in best]
        found = Counter()
        for tokens in rewarded:
            found.update(tuple(tokens[i : i + T]) for i in range(len(tokens) - T + 1))
        pieces = found or pieces
    sequences = []
    for beginning in beginnings:
        actions = []
        for t, token in enumerate(beginning):
            actions.append(causing(beginning[:t], token, 16 if T == 1 else 2))
            if not actions[-1]:  # product() is then empty
                break
        sequences += itertools.product(*actions)
        if len(sequences) >= 16 * 16:
            break
    sequences = list(dict.fromkeys(some for some in sequences if len(some) == T))
    return torch.tensor(sequences or [[action] * T for action in range(env.noop)[:64]])


# --- agent ---
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
        self.prior = nn.Parameter(torch.zeros(T, P))  # output bias of the policy
        self.register_buffer("action_mask", torch.zeros(T, P))  # 1: allowed at this decision
        self.register_buffer("constant", torch.zeros(T).long())  # best on average
        self.register_buffer("obs_mean", torch.zeros(2, obs_dim))  # of prompts, of answers
        self.register_buffer("obs_std", torch.ones(2, obs_dim))

    def start_at(self, sequences, worth):
        """Allow sequences (S, T) and the no-op. Start at what works on average, by mean
        rewards (S,), the no-op P times as likely as otherwise."""
        self.action_mask[:, -1] = 1.0
        for sequence, value in zip(sequences.tolist(), worth.tolist(), strict=True):
            for t, action in enumerate(sequence):
                self.action_mask[t, action] = 1.0
                self.prior.data[t, action] = max(self.prior[t, action].item(), 5 * value)
        self.prior.data[:, -1] += math.log(self.prior.shape[1])
        self.constant[:] = sequences[worth.argmax()]

    def calibrate(self, x):
        """Statistics of what is read, x (N, T, k)."""
        for row, part in enumerate((x[:, :1], x[:, 1:])):
            if part.numel() > 0:
                self.obs_mean[row] = part.nanmean((0, 1))
                spread = ((part - self.obs_mean[row]) ** 2).nanmean((0, 1)).sqrt()
                self.obs_std[row] = spread.clamp(min=1e-6)

    def observe(self, x, t):
        """x (..., k), standardised, and position t as a one-hot: (..., k + T)."""
        row = min(t, 1)
        obs = (x.float().cpu() - self.obs_mean[row]) / self.obs_std[row]
        position = F.one_hot(torch.tensor(t), len(self.prior)).float()
        obs = obs.clamp(-10, 10).nan_to_num()
        return torch.cat([obs, position.expand(*obs.shape[:-1], -1)], -1)

    def get_value(self, obs):
        return self.critic(obs)[..., 0]

    def get_policy(self, obs, epsilon=0.0):
        """pi, mixed with uniform choice among what the mask allows."""
        position = obs[..., -len(self.prior) :]
        allowed = position @ self.action_mask
        logits = self.actor(obs) + position @ self.prior
        pi = logits.masked_fill(allowed == 0, -math.inf).softmax(-1)
        uniform = allowed / allowed.sum(-1, keepdim=True)
        return Categorical((1 - epsilon) * pi + epsilon * uniform, validate_args=False)


class Rollout(NamedTuple):
    obs: torch.Tensor  # (T, n, G, k + T), but (1, n, 1, k + 1) if T = 1
    actions: torch.Tensor  # (T, n, G)
    logprobs: torch.Tensor  # (T, n, G)
    values: torch.Tensor  # (T, n, G)
    rewards: torch.Tensor  # (n, G)
    completions: list  # n lists of G lists of token ids


@torch.no_grad()
def rollout(env, agent, which, G=1, epsilon=0.0, greedy=False):
    """G answers of the policy to each of n prompts `which`."""
    seed = torch.initial_seed() % 2**31 * 1_000_003

    def act(obs, g):
        policy = agent.get_policy(obs, epsilon).expand((*obs.shape[:-2], g))
        action = policy.logits.argmax(-1) if greedy else policy.sample()
        value = agent.get_value(obs).expand(action.shape)
        return action, policy.log_prob(action), value

    T = len(agent.prior)
    if T == 1:  # the answer is a function of prompt and action
        obs = agent.observe(env.obs[which], 0)[None]
        actions, logprobs, values = act(obs, G)
        rewards = env.rewards(which, actions[0])
        completions = []
        for row, some in zip(which.tolist(), actions[0].tolist(), strict=True):
            completions.append([env.completions[row][action] for action in some])
        return Rollout(obs, actions, logprobs, values, rewards, completions)

    obs = torch.zeros(T, len(which), G, env.obs_dim + T)
    actions = torch.zeros(T, len(which), G).long()
    logprobs = torch.zeros(T, len(which), G)
    values = torch.zeros(T, len(which), G)

    def choose(x, t, rows, columns):
        torch.manual_seed(seed + 1009 * t + 31 * int(columns[0]) + int(rows[0]))
        at = (t, rows[:, None], columns)
        obs[at] = agent.observe(x, t)
        actions[at], logprobs[at], values[at] = act(obs[at], len(columns))
        return actions[at]

    prompts = [env.prompts[row] for row in which]
    completions = env.generate(prompts, choose, G)
    torch.manual_seed(seed)
    buffers = [sum(gather_object([part])) for part in (obs, actions, logprobs, values)]
    return Rollout(*buffers, env.score_all(prompts, completions), completions)


# --- files ---
def load_rewards(path, identity, env):
    """Restore mask and rewards; returns sequences (S, T) and worth (S,)."""
    tensors, facts = hub.load_tensors(path, identity)
    env.keep(tensors["kept"])
    env.memo = tensors["memo"]
    env.obs = tensors["obs"]
    env.completions = [dict(known) for known in facts["completions"]]
    return tensors["sequences"], tensors["worth"]


def load_agent(path, identity):
    """The Agent of a checkpoint."""
    tensors = hub.load_tensors(path, identity)[0]["agent"]
    agent = Agent(tensors["obs_mean"].shape[1], *tensors["prior"].T.shape)
    hub.load_weights(agent, tensors, path)
    return agent


def stored_args(run):
    """The resolved Args of a run directory."""
    record = hub.read_json(Path(run) / "args.json")
    try:
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in record["args"].items()}
    except (KeyError, AttributeError):
        hub.fail(f"{run}: no readable args.json there; give a run directory")
    if record.get("schema") != SCHEMA or {*stored, *MACHINE_FLAGS} != {*vars(Args())}:
        hub.fail(f"{run}: made by another version of crl_ppo.py; train it again")
    return crl_tasks.check_types(Args(**stored), run)


def set_up(args, loaded=None):
    """(environment, prompts, identity) of a run; resolves flags that are None.

    loaded: what load_model() returned. Prompts: {"train", "val": [Prompt], "test", "shots":
    [row], "source"}."""
    parts, source = crl_tasks.load_rows(args.task, args.data_dir, args.fold)
    model, tok, name = loaded or load_model(args)
    tok = crl_tasks.fill_defaults(args, parts, name, tok)
    sites = hub.load_sites(args, model.config.get_text_config())
    args.layer = tuple(site.layer for site in sites)
    env = Environment(args, model, tok, sites, crl_tasks.most_ends(parts))
    passes.check_fast_passes(env, name)
    prompts = crl_tasks.sample_prompts(parts, args, tok, env.context) | {"source": source}
    identity = hub.identity(SCHEMA, args, name, model, sites, prompts["train"] + prompts["val"])
    return env, prompts, identity


# --- main ---
def main(args):
    # 1. flags and processes
    started = time.time()
    if args.resume:
        given = {k: v for k, v in vars(args).items() if v != getattr(Args(), k)}
        args = stored_args(args.resume)
        for key, value in given.items():
            if key in MACHINE_FLAGS:
                setattr(args, key, value)
            elif value != getattr(args, key):
                hub.fail(f"--resume uses the run's own flags; leave --{key} out")
    crl_tasks.check_flags(args)
    processes = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    first = processes.is_main_process
    if processes.num_processes > 1:
        args.device = str(processes.device)
    say = print if first else lambda *a, **k: None

    # 2. model, actions, prompts, run directory
    env, prompts, identity = set_up(args)
    run = gather_object([hub.run_directory(args, identity, first)])[0]
    if args.track and first:
        import wandb

        mode = None if wandb.login(prompt=False, verify=False) else "offline"
        wandb.init(project="crl", name=run.name, config=vars(args), dir=run, mode=mode)
    everyone = prompts["train"] + prompts["val"]
    train = torch.arange(len(prompts["train"]))
    val = torch.arange(len(train), len(everyone))
    say(f"{len(train)} training, {len(val)} validation prompts from {prompts['source']}")
    for site in env.sites:
        say(f"{identity['model']} in {args.dtype}, steered at layer {site.layer} ({site.name})")

    # 3. the mask (AFM), and each prompt's rewards under its actions
    state = {"update": 0, "best": -1.0, "metrics": []}
    if (run / "rewards.safetensors").exists():
        env.ask(everyone)
        sequences, worth = load_rewards(run / "rewards.safetensors", identity, env)
    else:
        sequences, right = screen(env, args, prompts["train"][: 32 * SCREEN])
        say(f"screened {env.noop} actions; the mask corrects {right.amax(1).mean():.0%}")
        worth = right.mean(0)
        kept, sequences = sequences.unique(return_inverse=True)  # renumbered
        kept = torch.cat([kept, torch.tensor([env.noop])])
        env.keep(kept)
        env.ask(everyone)
        tried = torch.arange(env.noop if args.decisions > 1 else 0, env.noop + 1)
        env.rewards(torch.arange(len(everyone)), tried)
        tensors = {"kept": kept, "sequences": sequences, "worth": worth}
        tensors |= {"memo": env.memo, "obs": env.obs}
        facts = identity | {"completions": [list(known.items()) for known in env.completions]}
        hub.save_tensors(run / "rewards.safetensors", tensors, facts)
    unsteered = crl_tasks.unsteered_rewards(env)
    known_s = time.time() - started

    # 4. policy, critic, optimizer (strong weight decay, since labels are few)
    torch.manual_seed(args.seed)
    agent = Agent(env.obs_dim, env.noop + 1, args.decisions)
    if args.decisions == 1:  # all rewards are known by now
        sequences = torch.arange(env.noop + 1)[:, None]
        worth = env.memo[train].mean(0)
    agent.start_at(sequences, worth)
    agent.calibrate(env.obs[train])
    optimizer = torch.optim.AdamW(agent.parameters(), eps=1e-5, weight_decay=5.0)
    if (run / "last.safetensors").exists():
        saved, state = hub.load_tensors(run / "last.safetensors", identity)
        say(f"resumed at update {state['update']} of {args.updates}")
        agent.load_state_dict(saved["agent"])
        slots = {int(number): slot for number, slot in saved["adam"].items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})

    # 5. PPO
    eval_every = math.ceil(args.updates / (30 if args.decisions == 1 else 10))
    todo = range(state["update"] + 1, args.updates + 1)
    bar = tqdm(todo, initial=state["update"], total=args.updates, disable=not first)
    for update in bar:
        frac = 1.0 - (update - 1.0) / args.updates
        optimizer.param_groups[0]["lr"] = frac * args.learning_rate
        epsilon = frac * args.epsilon
        torch.manual_seed(args.seed * 100_003 + update)  # for --resume

        # answers; if T = 1, all rewards are known by now, so take all prompts
        some = torch.randperm(len(train))[:NEW_PROMPTS]
        rows = train if args.decisions == 1 else train[some]
        r = rollout(env, agent, rows, args.group, epsilon)
        lengths = [list(map(len, answers)) for answers in r.completions]
        lengths = torch.tensor(lengths).clamp(1, args.decisions)  # in decisions
        alive = torch.arange(args.decisions)[:, None, None] < lengths  # (T, n, G)
        baseline = unsteered[rows][:, None]

        # advantages; the last decision of an answer is rewarded
        advantages = torch.zeros_like(r.values)
        lastgaelam = torch.zeros_like(r.rewards)
        nextvalues = torch.zeros_like(r.rewards)
        for t in reversed(range(args.decisions)):
            last = t == lengths - 1
            delta = torch.where(last, r.rewards - baseline, nextvalues) - r.values[t]
            lastgaelam = delta + args.gae_lambda * torch.where(last, 0.0, lastgaelam)
            advantages[t] = lastgaelam
            nextvalues = r.values[t]
        returns = advantages + r.values

        # optimise; a minibatch is prompts with all their answers
        torch.set_num_threads(1)  # threads only slow down tiny matrices
        for _ in range(args.update_epochs):
            for mb in torch.randperm(len(rows)).chunk(args.num_minibatches):
                inside = alive[:, mb]
                policy = agent.get_policy(r.obs[:, mb], epsilon)
                newlogprob = policy.log_prob(r.actions[:, mb])
                logratio = (newlogprob - r.logprobs[:, mb])[inside]
                ratio = logratio.exp()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
                mb_advantages = advantages[:, mb][inside]
                mb_advantages = mb_advantages - mb_advantages.mean()
                mb_advantages = mb_advantages / (mb_advantages.std(correction=0) + 1e-4)

                # policy loss
                pg_loss1 = -mb_advantages * ratio
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss2 = -mb_advantages * clipped
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()

                # value loss
                newvalue = agent.get_value(r.obs[:, mb]).expand_as(inside)[inside]
                mb_values = r.values[:, mb][inside]
                mb_returns = returns[:, mb][inside]
                change = (newvalue - mb_values).clamp(-args.clip_coef, args.clip_coef)
                v_loss_unclipped = (newvalue - mb_returns) ** 2
                v_loss_clipped = (mb_values + change - mb_returns) ** 2
                v_loss = 0.5 * torch.max(v_loss_unclipped, v_loss_clipped).mean()

                entropy = policy.entropy().expand_as(inside)[inside].mean()
                loss = pg_loss - args.ent_coef * entropy + 0.5 * v_loss
                if not torch.isfinite(loss):
                    hub.fail(f"update {update}: loss is not finite; lower --learning-rate")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        torch.set_num_threads(THREADS)

        # 6. log, validate, save
        losses = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
        losses |= {"approx_kl": approx_kl, "clipfrac": clipfrac}
        errors = (returns - r.values)[alive]
        explained = 1 - errors.var(correction=0) / (returns[alive].var(correction=0) + 1e-8)
        losses["explained_variance"] = explained
        objective = {"reward": r.rewards, "unsteered_reward": baseline}
        validates = update % eval_every == 0 or update == args.updates
        if validates:
            objective["val_reward"] = rollout(env, agent, val, greedy=True).rewards
        metrics = {"update": update, "charts/frac": frac, "charts/epsilon": epsilon}
        metrics |= {f"losses/{key}": value.item() for key, value in losses.items()}
        metrics |= {f"objective/{key}": v.mean().item() for key, v in objective.items()}
        state["metrics"].append(metrics)
        if validates:
            reward = metrics["objective/val_reward"]
            bar.set_postfix(val=reward, train=metrics["objective/reward"])
            state["update"] = update
            tensors = {"agent": agent.state_dict()}
            if reward >= state["best"]:
                state["best"] = reward
                hub.save_tensors(run / "best.safetensors", tensors, identity | state)
            tensors["adam"] = optimizer.state_dict()["state"]
            hub.save_tensors(run / "last.safetensors", tensors, identity | state)
            hub.write_jsonl(run / "metrics.jsonl", state["metrics"])
        if args.track and first:
            wandb.log(metrics, step=update)
    learn_s = time.time() - started - known_s

    # 7. the best checkpoint's log and final block
    processes.wait_for_everyone()
    agent = load_agent(run / "best.safetensors", identity)
    greedy = rollout(env, agent, val, greedy=True)
    answers = {"unsteered": [[env.completions[row][env.noop]] for row in val.tolist()]}
    answers["steered"] = greedy.completions
    constant = fixed(agent.constant.expand(len(val), 1, -1))
    answers["constant"] = env.generate(prompts["val"], constant, 1)
    hub.write_log(run / "interventions.jsonl", SCHEMA, env, agent, val, greedy)
    gains = greedy.rewards[:, 0] - unsteered[val]
    final = {"train_n": len(train), "val_n": len(val), "mask_size": env.noop + 1}
    final |= {"corrected": int((gains > 0).sum()), "misguided": int((gains < 0).sum())}
    final["constant_action"] = " + ".join(env.label(a) for a in agent.constant.tolist())
    if args.decisions == 1:
        final["coverage"] = env.memo[val].amax(1).mean().item()
    final["verdict"] = crl_tasks.verdict(gains.tolist())
    final |= {"wall_s": time.time() - started, "known_s": known_s, "learn_s": learn_s}
    say(f"\n{f'validation, n = {len(val)}':22}{'right':>8}{'valid answers':>16}")
    for who, some in answers.items():
        asked = zip(prompts["val"], some, strict=True)
        scores = [env.score(prompt.row, answer) for prompt, [answer] in asked]
        final[who] = sum(reward for reward, _ in scores) / len(val)
        final[f"{who}_valid"] = sum(valid for _, valid in scores) / len(val)
        say(f"{who:22}{final[who]:8.1%}{final[f'{who}_valid']:16.1%}")
    chosen = greedy.actions.flatten().tolist()
    if args.max_new_tokens == 1:
        final["switches"] = crl_tasks.switch_share(env, chosen)
        say("{switches:.0%} of decisions say one letter on 80% of prompts".format(**final))
    hub.write_json(run / "final.json", final)
    picks = Counter(map(env.label, chosen)).most_common(4)
    often = ", ".join(f"{label} ({count})" for label, count in picks)
    say("corrected {corrected}, misguided {misguided}".format(**final))
    say(f"most used: {often}")
    say("{wall_s:.0f} s this time, {learn_s:.1f} s of PPO\n{verdict}".format(**final))
    say(f"run directory: {run}\nnext: python crl_eval.py --run {run}")
    say(f"then: python analyze_features.py features --run {run}  (takes half as long)")
    if args.track and first:
        wandb.summary.update(final)
        wandb.finish()
    return run


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        hub.fail("interrupted; --resume RUN continues from the last save")
    except torch.OutOfMemoryError:
        hub.fail("out of memory; lower --batch-size")
    except OSError as e:
        hub.fail(f"cannot write or read {e.filename or 'a file'}: {e.strerror or e}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
