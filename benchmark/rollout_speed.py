"""Speed and memory of rollouts, steered decoding and the main job, as ratios measured in one run.

    python benchmark/rollout_speed.py            # some 20 minutes on 2 cores; the last line is one JSON object
    python benchmark/rollout_speed.py --shape gemma2-2b --main-samples 400     # for a GPU

Each ratio divides two times taken on the same prompts in the same process, repeated and interleaved, medians quoted:
  rollouts_vs_naive    G = 32 hooked full forwards per prompt, over one prefill and one shared-prefix forward
  decode_vs_plain      steered tokens per second of decode(), over a bare loop of forward passes, same cache and rows
  steered_vs_generate  tokens per second of steered answers with their prefill, over model.generate unsteered
  main_job_vs_pass     the whole main job on mmlu (screening, table, PPO, validation) at --samples 400 and 4000, over
                       one unsteered pass of its training and validation prompts in batches of 16
  learn_s_vs_pass      everything after the outcomes are known, over the same pass (--samples 400)
  peak_mb, gpu_mb      resident memory and PyTorch's memory on a GPU, of the main job in a process of its own
  rollouts_per_s, steered_tokens_per_s      are no ratios, and this machine's
"""
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import crl_model  # noqa: E402
import crl_ppo as crl  # noqa: E402

REPEATS = 3  # of each pair of times
JOB = """import resource, runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, torch.cuda.max_memory_allocated() // 2**20)"""


def clock(f):
    """Seconds that f() takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def random_gemma(directory):
    """A model of random weights in the shape of Gemma 2 2B, with the embedded model's tokenizer, in `directory`."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
    tok = AutoTokenizer.from_pretrained(crl_model.fetch_embedded_model(crl.Args().cache_dir))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma2ForCausalLM(Gemma2Config())  # its defaults are the 2B model's
    model.to(torch.bfloat16).save_pretrained(directory)
    tok.save_pretrained(directory)
    return ["--model", directory, "--sae", "random:16384", "--layer", "20", "--reward-decoding", "constrained"]


def padded(lm, prompts):
    """Token ids (B, T) of whole prompts, padded on the left, and their attention mask."""
    padded = lm.tok.pad({"input_ids": [p.ids for p in prompts]}, padding_side="left", return_tensors="pt")
    return padded["input_ids"].to(lm.device), padded["attention_mask"].to(lm.device)


@torch.no_grad()
def unsteered(lm, prompts):
    """One plain forward of all prompts in batches of 16 of like length, nothing shared."""
    prompts = sorted(prompts, key=lambda p: len(p.ids))
    for start in range(0, len(prompts), 16):
        ids, mask = padded(lm, prompts[start:start + 16])
        lm.model(ids, attention_mask=mask, logits_to_keep=1)


def naive(lm, actions, prompts, G):
    """One hooked forward of the whole prompts per rollout."""
    def edit(i, h):
        h = h.clone()
        h[:, -1] += actions.added(0, h[:, -1], torch.randint(actions.noop, (len(h), 1), device=h.device)).to(h.dtype)
        return h
    with crl_model.hooked(lm, [actions.sites[0].layer], edit):
        for _ in range(G):
            unsteered(lm, prompts)


@torch.no_grad()
def plain_loop(lm, prompts, mask, cache, owner, steps):
    """A bare greedy loop of forward passes over the same cache."""
    cache, mask = crl_model.spread(cache, owner, steps), mask[owner, :-1]
    token = torch.tensor([p.ids[-1] for p in prompts], device=lm.device)[owner]
    for _ in range(steps):
        mask = F.pad(mask, (0, 1), value=1)
        position = (mask.cumsum(1) - 1)[:, -1:]
        token = lm.model(token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache,
                         use_cache=True).logits[:, -1].argmax(-1)


@torch.no_grad()
def decoding(lm, actions, args, prompts, G=16, steps=32):
    """(decode_vs_plain, steered_vs_generate, steered_tokens_per_s): every token steered, nobody stops early."""
    lm, args = dataclasses.replace(lm, eos={-2}), dataclasses.replace(args, max_new_tokens=steps, steer_tokens=0)
    owner = torch.arange(len(prompts), device=lm.device).repeat_interleave(G)
    push = torch.randint(actions.noop, (len(owner), 1), device=lm.device)
    ids, seen = (v[owner] for v in padded(lm, prompts))
    _, _, mask, cache = crl_model.prefill(lm, [], prompts)

    def steered(mask, cache):
        crl_model.decode(lm, actions, args, prompts, mask, cache, owner, lambda x, t, rows: push[rows])
    ratios = []
    for _ in range(REPEATS):
        loop = clock(lambda: plain_loop(lm, prompts, mask, cache, owner, steps))
        decode = clock(lambda: steered(mask, cache))
        whole = clock(lambda: steered(*crl_model.prefill(lm, [], prompts)[2:]))
        generate = clock(lambda: lm.model.generate(ids, attention_mask=seen, max_new_tokens=steps, min_new_tokens=steps,
                                                   do_sample=False, pad_token_id=lm.tok.pad_token_id))
        ratios.append((loop / decode, generate / whole, len(owner) * steps / decode))
    return [round(statistics.median(column), 2) for column in zip(*ratios)]


def main_job(samples, flags):
    """`crl_ppo.py --task mmlu` in a process of its own: (final.json, wall seconds, [resident MB, GPU MB])."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-c", JOB, ROOT / "crl_ppo.py", *flags, "--samples", str(samples), "--run-dir", tmp]
        start = time.perf_counter()
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        wall, [final] = time.perf_counter() - start, Path(tmp).glob("*/final.json")
        return json.loads(final.read_text()), wall, [int(v) for v in said.split()[-2:]]


def main(shape: Literal["embedded", "gemma2-2b"] = "embedded", main_samples: tuple[int, ...] = (400, 4000),
         data_dir: str | None = None):
    """Speed and memory as ratios measured in one run.

    Args:
        shape: the embedded model, or random weights in Gemma 2 2B's shape and 16384 random directions at layer 20
        main_samples: --samples of the main jobs
        data_dir: as in crl_ppo.py
    """
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--task", "mmlu", *(["--data-dir", data_dir] if data_dir else [])]
        flags += random_gemma(tmp) if shape == "gemma2-2b" else ["--model", crl_model.EMBEDDED]
        args = tyro.cli(crl.Args, args=[*flags, "--samples", str(max(main_samples))])
        lm, actions, prompts, _ = crl.set_up(args)
        typical, G = sorted(prompts["train"], key=lambda p: abs(len(p.ids) - 139))[:16], 32
        unsteered(lm, typical)  # warm up

        push = torch.randint(actions.noop, (len(typical), G, 1), device=lm.device)
        pairs = [(clock(lambda: naive(lm, actions, typical, 4)) * G / 4,
                  clock(lambda: crl.answers(lm, actions, args, typical, push))) for _ in range(REPEATS)]
        out = {"device": lm.device.type, "dtype": args.dtype,
               "rollouts_vs_naive": round(statistics.median(slow / fast for slow, fast in pairs), 2),
               "rollouts_per_s": round(len(typical) * G / statistics.median(fast for _, fast in pairs))}
        names = "decode_vs_plain", "steered_vs_generate", "steered_tokens_per_s"
        out |= zip(names, decoding(lm, actions, args, typical[:8]))
        for samples in main_samples:
            asked, end = prompts["train"][:samples] + prompts["val"], f"_{samples}" if samples > main_samples[0] else ""
            before = clock(lambda: unsteered(lm, asked))
            final, wall, (peak, gpu) = main_job(samples, flags)
            one_pass = (before + clock(lambda: unsteered(lm, asked))) / 2
            out |= {f"main_job_vs_pass{end}": round(wall / one_pass, 2), f"main_job_s{end}": round(wall),
                    f"learn_s_vs_pass{end}": round(final["learn_s"] / one_pass, 3), f"pass_s{end}": round(one_pass, 1),
                    "peak_mb": peak, "gpu_mb": gpu}
    print(json.dumps(out))


if __name__ == "__main__":
    tyro.cli(main)
