"""Speed of rollouts, updates, steered decoding and the main job, as ratios measured in one run on the embedded model.

    python benchmark/rollout_speed.py            # about 15 minutes on 2 cores; the last line is one JSON object

Each ratio divides two times taken in the same process on the same prompts, interleaved and repeated, medians quoted:
  rollouts_vs_naive    G = 32 hooked full forwards per prompt, over one prefill and one shared-prefix forward
  train_vs_prefill     a whole update at G = 16 (prefill, rollouts, rewards, PPO epochs), over one unsteered forward
  steered_vs_generate  tokens per second of steered decoding, over model.generate unsteered, same batch and length
  main_job_vs_pass     the whole main job at --samples 400 with validation, over one unsteered pass of its prompts
"""
import contextlib
import io
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl  # noqa: E402


@dataclass
class SpeedArgs:
    prompts: int = 16
    """prompts per measured batch"""
    repeats: int = 3
    """repetitions of each pair; the median of the ratios is quoted"""
    main_samples: int = 400
    """--samples of the main job"""
    parts: tuple[Literal["rollouts", "updates", "decoding", "main"], ...] = ("rollouts", "updates", "decoding", "main")
    """what to measure"""
    data_dir: str | None = None
    """as in crl_ppo.py"""


if __name__ == "__main__":
    SPEED = crl.parse_args(SpeedArgs, __doc__)

import torch  # noqa: E402


def clock(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def set_up(speed, **flags):
    args = crl.Args(task="mmlu", model=crl.EMBEDDED, samples=400, data_dir=speed.data_dir, **flags)
    lm, sites, prompts, _ = crl.set_up(args)
    agents = [crl.Agent(args, site) for site in sites]
    return args, lm, sites, agents, prompts


def near(prompts, T, n):
    """The n prompts whose length is closest to T tokens."""
    return sorted(prompts, key=lambda p: abs(len(p.ids) - T))[:n]


def unsteered(lm, batch):
    with torch.no_grad():
        for start in range(0, len(batch), lm.micro_batch):
            ids, mask = crl.left_pad(lm, batch[start:start + lm.micro_batch])
            lm.model(ids, attention_mask=mask, logits_to_keep=1)


def ours(lm, sites, args, batch, G):
    """Prefill and shared-prefix forward with G random features per prompt."""
    crl.reference(lm, sites, args, batch)
    A = len(sites[0].directions)

    def decide(i, x, t, rows):
        picks = torch.randint(A, (len(x), G))
        return 0.5 * x.norm(dim=-1)[:, None, None] * sites[0].directions[picks]
    for start in range(0, len(batch), lm.micro_batch):
        crl.branch(lm, sites, batch[start:start + lm.micro_batch], G, decide)


def naive(lm, sites, batch, G):
    """One hooked forward of the whole prompt per rollout."""
    A = len(sites[0].directions)

    def edit(i, h):
        h = h.clone()
        x = h[:, -1]
        h[:, -1] = x + 0.5 * x.norm(dim=-1, keepdim=True) * sites[0].directions[torch.randint(A, (len(x),))]
        return h
    with torch.no_grad(), crl.hooked(lm, sites, edit):
        for _ in range(G):
            ids, mask = crl.left_pad(lm, batch)
            lm.model(ids, attention_mask=mask, logits_to_keep=1)


def rollouts(lm, sites, args, batch, G, repeats):
    pairs = [(clock(lambda: naive(lm, sites, batch, min(G, 8))) * G / min(G, 8), clock(lambda: ours(lm, sites, args, batch, G)),
              clock(lambda: unsteered(lm, batch))) for _ in range(repeats)]
    return statistics.median(a / b for a, b, _ in pairs), statistics.median(b / c for _, b, c in pairs)


def run_main(**flags):
    """crl_ppo.main with its printing swallowed; returns (final.json, metrics, wall seconds)."""
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        run = crl.main(crl.Args(task="mmlu", model=crl.EMBEDDED, run_dir=tmp, table_every=0, **flags))
        wall = time.perf_counter() - start
        final = json.loads((run / "final.json").read_text())
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return final, metrics, wall


def long_answers(lm, sites, agents, args, batch, G, steps, repeats):
    eos, lm.eos = lm.eos, {lm.tok.vocab_size + 1}  # nobody stops early: both sides decode the same number of tokens
    args = crl.dataclasses.replace(args, max_new_tokens=steps, reward_decoding="free", noop=False)
    u = torch.rand(len(batch) * G, steps, 1, 2)
    ids, mask = crl.left_pad(lm, batch)
    ids, mask = ids.repeat_interleave(G, 0), mask.repeat_interleave(G, 0)

    def steered():
        crl.rollout(lm, agents, args, batch, G, u, 0.5, 0.0)

    def plain():
        with torch.no_grad():
            lm.model.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                              pad_token_id=lm.tok.pad_token_id)
    ratio = statistics.median(clock(plain) / clock(steered) for _ in range(repeats))
    lm.eos = eos
    return ratio


def main(speed):
    args, lm, sites, agents, prompts = set_up(speed)
    n, r = speed.prompts, speed.repeats
    typical = near(prompts["train"], 139, n)
    unsteered(lm, typical)  # warm up
    out = {}
    if "rollouts" in speed.parts:
        print(f"{'':34}{'naive / ours':>14}{'ours / prefill':>16}")
        for G in (8, 32, 128):
            ratio, cost = rollouts(lm, sites, args, typical, G, r if G < 128 else 1)
            print(f"rollouts, G = {G:<4} T = 139, D = 4608 {ratio:>12.1f}{cost:>16.2f}", flush=True)
            if G == 32:
                out["rollouts_vs_naive"] = round(ratio, 2)
            out[f"rollouts_vs_naive_G{G}"] = round(ratio, 2)
        for T in (80, 300):
            batch = near(prompts["train"], T, n)
            T = round(sum(len(p.ids) for p in batch) / len(batch))
            ratio, cost = rollouts(lm, sites, args, batch, 32, 1)
            print(f"rollouts, G = 32   T = {T}, D = 4608 {ratio:>12.1f}{cost:>16.2f}", flush=True)
            out[f"rollouts_vs_naive_T{T}"] = round(ratio, 2)

    if "updates" in speed.parts:
        same = sorted(random.Random(1).sample(prompts["train"], 256), key=lambda p: len(p.ids))
        base = statistics.median(clock(lambda: unsteered(lm, same)) for _ in range(r)) / 4  # per update of 64 prompts
        for name, flags in (("", {}), ("_G8", {"group": 8}), ("_G32", {"group": 32}), ("_G128", {"group": 128}),
                            ("_D16384", {"sae": ("random:16384",), "layer": (15,)})):
            _, metrics, _ = run_main(samples=256, batch_prompts=64, epochs=1, kv_cache_gb=0.0, val_samples=8, eval_every=10**6,
                                     data_dir=speed.data_dir, **{"group": 16, **flags})
            ratio = statistics.median(m["charts/update_seconds"] for m in metrics) / base
            out["train_vs_prefill" + name] = round(ratio, 3)
            print(f"whole update / unsteered forward, {name[1:] or 'G16':<8}{ratio:>8.2f}", flush=True)

    for steps, B, G in ((32, 4, 16), (32, 8, 4), (96, 4, 16)) if "decoding" in speed.parts else ():
        ratio = long_answers(lm, sites, agents, args, near(prompts["train"], 139, B), G, steps, 2)
        print(f"steered decoding / generate, {B * G} rows, {steps} tokens {ratio:>8.2f}", flush=True)
        out.setdefault("steered_vs_generate", round(ratio, 3))
        out[f"steered_vs_generate_rows{B * G}_tokens{steps}"] = round(ratio, 3)

    if "main" in speed.parts:
        args, lm, sites, agents, prompts = set_up(speed)
        everything = sorted(prompts["train"][:speed.main_samples] + prompts["val"], key=lambda p: len(p.ids))
        before = clock(lambda: unsteered(lm, everything))
        _, _, wall = run_main(samples=speed.main_samples, data_dir=speed.data_dir)
        after = clock(lambda: unsteered(lm, everything))
        out["main_job_vs_pass"] = round(wall / ((before + after) / 2), 3)
        print(f"main job, {speed.main_samples} samples / unsteered pass {out['main_job_vs_pass']:>8.2f}", flush=True)
    out["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(out))


if __name__ == "__main__":
    main(SPEED)
