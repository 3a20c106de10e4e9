"""Speed and memory of rollouts, steered decoding and the main job, as ratios measured in one run on the embedded model.

    python benchmark/rollout_speed.py            # some 20 minutes on 2 cores; the last line is one JSON object

Each ratio divides two times taken on the same prompts in the same process, repeated and interleaved, medians quoted:
  rollouts_vs_naive    G = 32 hooked full forwards per prompt, over one prefill and one shared-prefix forward
  decode_vs_plain      steered tokens per second of decode(), over a bare loop of forward passes, same cache and rows
  steered_vs_generate  tokens per second of steered answers with their prefill, over model.generate unsteered
  main_job_vs_pass     the whole main job on mmlu (screening, table, PPO, validation) at --samples 400 and 4000, over
                       one unsteered pass of its training and validation prompts in batches of 16
  learn_s_vs_pass      everything after the outcomes are known, over the same pass (--samples 400)
  peak_mb              resident memory of the main job at 4000, in a process of its own
"""
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class SpeedArgs:
    prompts: int = 16
    """prompts per measured batch"""
    repeats: int = 3
    """repetitions of each pair; the median of the ratios is quoted"""
    main_samples: tuple[int, ...] = (400, 4000)
    """--samples of the main jobs"""
    parts: tuple[Literal["rollouts", "decoding", "main"], ...] = ("rollouts", "decoding", "main")
    """what to measure"""
    data_dir: str | None = None
    """as in crl_ppo.py"""


if __name__ == "__main__":
    SPEED = tyro.cli(SpeedArgs, description=__doc__.split("\n\n")[0])

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

sys.path.insert(0, str(ROOT))
import crl_model  # noqa: E402
import crl_ppo as crl  # noqa: E402


def clock(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def unsteered(lm, prompts):
    """One plain forward of all prompts in batches of 16 of like length, nothing shared."""
    prompts = sorted(prompts, key=lambda p: len(p.ids))
    with torch.no_grad():
        for part in (prompts[s:s + 16] for s in range(0, len(prompts), 16)):
            T = max(len(p.ids) for p in part)
            mask = torch.tensor([[0] * (T - len(p.ids)) + [1] * len(p.ids) for p in part])
            ids = torch.tensor([[lm.tok.pad_token_id] * (T - len(p.ids)) + p.ids for p in part])
            lm.model(ids, attention_mask=mask, logits_to_keep=1)


def naive(lm, actions, prompts, G):
    """One hooked forward of the whole prompts per rollout."""
    site = actions.sites[0].layer

    def edit(i, h):
        h = h.clone()
        h[:, -1] += actions.added(0, h[:, -1], torch.randint(actions.noop, (len(h), 1))).to(h.dtype)
        return h
    with crl_model.hooked(lm, [site], edit):
        for _ in range(G):
            unsteered(lm, prompts)


def plain_loop(lm, prompts, mask, cache, owner, steps):
    """A bare greedy loop of forward passes over the same cache."""
    cache, mask = crl_model.spread(cache, owner, steps), mask[owner, :-1]
    token = torch.tensor([p.ids[-1] for p in prompts])[owner]
    with torch.no_grad():
        for _ in range(steps):
            mask = F.pad(mask, (0, 1), value=1)
            position = (mask.cumsum(1) - 1)[:, -1:]
            token = lm.model(token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache,
                             use_cache=True).logits[:, -1].argmax(-1)


def decoding(lm, actions, args, prompts, G, steps, repeats):
    """(decode_vs_plain, steered_vs_generate): every token steered, nobody stops early."""
    eos, lm.eos, new = lm.eos, {-2}, crl.dataclasses.replace(args, max_new_tokens=steps, steer_tokens=0)
    owner = torch.arange(len(prompts)).repeat_interleave(G)
    push = torch.randint(actions.noop, (len(owner), 1))
    T = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[lm.tok.pad_token_id] * (T - len(p.ids)) + p.ids for p in prompts])[owner]
    seen = torch.tensor([[0] * (T - len(p.ids)) + [1] * len(p.ids) for p in prompts])[owner]
    ratios = []

    def choose(x, t, rows):
        return push[rows]
    for _ in range(repeats):
        with torch.no_grad():
            _, _, mask, cache = crl_model.prefill(lm, [], prompts)
        loop = clock(lambda: plain_loop(lm, prompts, mask, cache, owner, steps))
        steered = clock(lambda: crl_model.decode(lm, actions, new, prompts, mask, cache, owner, choose))
        with torch.no_grad():
            whole = clock(lambda: crl_model.decode(lm, actions, new, prompts, *crl_model.prefill(lm, [], prompts)[2:],
                                                   owner, choose))
            generate = clock(lambda: lm.model.generate(ids, attention_mask=seen, max_new_tokens=steps, do_sample=False,
                                                       min_new_tokens=steps, pad_token_id=lm.tok.pad_token_id))
        ratios.append((loop / steered, generate / whole))
    lm.eos = eos
    return [round(statistics.median(column), 2) for column in zip(*ratios)]


def main_job(samples, data_dir):
    """`crl_ppo.py --task mmlu` in a process of its own: (final.json, wall seconds, peak resident MB)."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, str(ROOT / "crl_ppo.py"), "--task", "mmlu", "--samples", str(samples), "--model",
                   crl_model.EMBEDDED, "--run-dir", tmp] + (["--data-dir", data_dir] if data_dir else [])
        code = ("import resource, subprocess, sys\n"
                "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
                "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        start = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True).stdout
        wall = time.perf_counter() - start
        [final] = Path(tmp).glob("*/final.json")
        return json.loads(final.read_text()), wall, round(int(re.search(r"peak (\d+)", said)[1]) / 1024)


def main(speed):
    args = crl.Args(task="mmlu", model=crl_model.EMBEDDED, samples=max(speed.main_samples), data_dir=speed.data_dir)
    lm, actions, prompts, _ = crl.set_up(args)
    typical = sorted(prompts["train"], key=lambda p: abs(len(p.ids) - 139))[:speed.prompts]
    out, G = {"dtype": args.dtype}, 32
    unsteered(lm, typical)  # warm up
    if "rollouts" in speed.parts:
        push = torch.randint(actions.noop, (len(typical), G, 1))
        ratios = [clock(lambda: naive(lm, actions, typical, 4)) * G / 4 / clock(
            lambda: crl.answers(lm, actions, args, typical, push)) for _ in range(speed.repeats)]
        out["rollouts_vs_naive"] = round(statistics.median(ratios), 2)
    if "decoding" in speed.parts:
        some = typical[:8]
        out["decode_vs_plain"], out["steered_vs_generate"] = decoding(lm, actions, args, some, 16, 32, speed.repeats)
    for samples in speed.main_samples if "main" in speed.parts else ():
        asked = prompts["train"][:samples] + prompts["val"]
        before = clock(lambda: unsteered(lm, asked))
        final, wall, peak = main_job(samples, speed.data_dir)
        one_pass = (before + clock(lambda: unsteered(lm, asked))) / 2
        end = "" if samples == speed.main_samples[0] else f"_{samples}"
        out |= {f"main_job_vs_pass{end}": round(wall / one_pass, 2), f"main_job_s{end}": round(wall), "peak_mb": peak,
                f"learn_s_vs_pass{end}": round(final["learn_s"] / one_pass, 3), f"pass_s{end}": round(one_pass)}
    print(json.dumps(out))


if __name__ == "__main__":
    main(SPEED)
