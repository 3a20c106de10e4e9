"""Speed and memory of rollouts, steered decoding and the main job, as ratios measured in one run.

    python benchmark/rollout_speed.py       # some 20 minutes on 2 cores; the last line is one JSON object
    python benchmark/rollout_speed.py --shape gemma2-2b --main-samples 400     # for a GPU

Each ratio divides two times taken on the same prompts, repeated and interleaved, medians quoted:
  rollouts_vs_naive    G = 32 hooked full forwards per prompt, over one prefill and one forward that shares it
  decode_vs_plain      a bare loop of forward passes from the same cache, a row an answer, over decode()
  steered_vs_generate  model.generate unsteered, over steered answers with their prefill
  main_job_vs_pass     the whole main job on mmlu (screening, rewards, PPO, validation) at --samples 400 and
                       4000, over one unsteered pass of its training and validation prompts in batches of 16
  learn_s_vs_pass      everything after the rewards are known, over the same pass
  ppo_two_at_once      that part while another such job goes on beside it, over its time alone (--samples 400)
  peak_mb, gpu_mb      resident memory (Linux) and PyTorch's memory on a GPU, of the main job's own process
  rollouts_per_s, steered_tokens_per_s      are no ratios, and this machine's
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import crl_ppo  # noqa: E402
from crl_tasks import hub  # noqa: E402

REPEATS = 3  # of each pair of times
JOB = """import pathlib, runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
status = pathlib.Path('/proc/self/status').read_text()  # ru_maxrss would be the parent's peak
peak = int(status.split('VmHWM:')[1].split()[0]) // 1024
print('peak', peak, torch.cuda.max_memory_allocated() // 2**20)
"""


def clock(f, *args):
    """Seconds that f(*args) takes."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    start = time.perf_counter()
    f(*args)
    wait()
    return time.perf_counter() - start


def random_gemma(directory):
    """Flags for random weights in Gemma 2 2B's shape, with the embedded tokenizer, in `directory`."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma2ForCausalLM(Gemma2Config())  # its defaults are the 2B model's
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(hub.fetch_embedded_model()).save_pretrained(directory)
    return ["--model", directory, "--sae", "random:16384", "--layer", "20"]


def padded(env, prompts):
    """Token ids and attention mask of whole prompts, padded on the left."""
    rows = {"input_ids": [prompt.ids for prompt in prompts]}
    return env.tok.pad(rows, padding_side="left", return_tensors="pt").to(env.device)


@torch.no_grad()
def unsteered(env, prompts):
    """One plain forward of all prompts in batches of 16 of like length, nothing shared."""
    prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))
    for start in range(0, len(prompts), 16):
        env.model(**padded(env, prompts[start : start + 16]), logits_to_keep=1)


def naive(env, prompts, G):
    """One hooked forward of the whole prompts per rollout."""

    def edit(site, h):
        h = h.clone()
        h[:, -1] = env.add(site, h[:, -1], torch.randint(env.noop, (len(h),), device=h.device))
        return h

    with crl_ppo.residual_hook(env.steered_layers, edit):
        for _ in range(G):
            unsteered(env, prompts)


def rollouts(env, prompts, G=32):
    """(rollouts_vs_naive, rollouts_per_s)."""
    choose = crl_ppo.fixed(torch.randint(env.noop, (len(prompts), G, 1)))
    slow = []
    fast = []
    for _ in range(REPEATS):
        slow.append(clock(naive, env, prompts, 4) * G / 4)
        fast.append(clock(partial(env.generate, prompts, choose, G, steps=1)))
    ratio = statistics.median(a / b for a, b in zip(slow, fast, strict=True))
    return ratio, len(prompts) * G / statistics.median(fast)


@torch.no_grad()
def plain_loop(env, batch, cache, G, steps):
    """A bare greedy loop of forward passes, cache (B x G rows) being that of the prefilled batch."""
    mask = (batch.position >= 0).long().repeat_interleave(G, 0)
    token = torch.tensor([prompt.ids[-1:] for prompt in batch.prompts], device=env.device)
    token = token.repeat_interleave(G, 0)
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        position = mask.sum(1, keepdim=True) - 1
        inputs = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        token = env.model(token, **inputs, use_cache=True).logits[:, -1:].argmax(-1)


def decoding(env, prompts, G=16, steps=32):
    """(decode_vs_plain, steered_vs_generate, steered_tokens_per_s): all is steered, none stops."""
    env.args.steer_tokens = 0
    env.eos = {-2}
    actions = torch.randint(env.noop, (len(prompts), G), device=env.device)
    begun = torch.zeros(G, 0, device=env.device).long()
    batch = env.prefill(prompts)
    asked = {key: value.repeat_interleave(G, 0) for key, value in padded(env, prompts).items()}
    asked |= {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}

    def steered(batch):
        env.decode(batch, lambda obs, t: actions, G, begun, steps)

    ratios = []
    for _ in range(REPEATS):
        cache = copy.deepcopy(batch.cache)
        cache.batch_repeat_interleave(G)
        loop = clock(plain_loop, env, batch, cache, G, steps)
        decode = clock(steered, batch)
        whole = clock(lambda: steered(env.prefill(prompts)))
        generate = clock(lambda: env.model.generate(**asked, pad_token_id=env.tok.pad_token_id))
        ratios.append((loop / decode, generate / whole, len(prompts) * G * steps / decode))
    return torch.tensor(ratios).median(0).values.tolist()


def main_jobs(samples, flags, at_once=1):
    """Main jobs side by side, in processes of their own: [(final.json, [MB, GPU MB])], seconds."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-c", JOB, ROOT / "crl_ppo.py", *flags, "--samples", str(samples)]
        start = time.perf_counter()
        jobs = []
        for job in range(at_once):
            own = [*command, "--run-dir", f"{tmp}/{job}"]
            jobs.append(subprocess.Popen(own, stdout=subprocess.PIPE, text=True))
        said = [job.communicate()[0] for job in jobs]
        wall = time.perf_counter() - start
        finals = [json.loads(path.read_text()) for path in sorted(Path(tmp).glob("*/*/final.json"))]
        peaks = [[int(mb) for mb in text.split()[-2:]] for text in said]
        return list(zip(finals, peaks, strict=True)), wall


def main(
    shape: Literal["embedded", "gemma2-2b"] = "embedded",
    main_samples: tuple[int, ...] = (400, 4000),
    data_dir: str | None = None,
):
    """Speed and memory as ratios measured in one run.

    Args:
        shape: the embedded model, or random weights in Gemma 2 2B's shape and 16384 random directions
        main_samples: --samples of the main jobs
        data_dir: as in crl_ppo.py
    """
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--task", "mmlu", *(["--data-dir", data_dir] if data_dir else [])]
        flags += random_gemma(tmp) if shape == "gemma2-2b" else ["--model", hub.EMBEDDED]
        args = tyro.cli(crl_ppo.Args, args=[*flags, "--samples", str(max(main_samples))])
        env, prompts, _ = crl_ppo.set_up(args)
        env.ask(prompts["train"] + prompts["val"])
        typical = sorted(prompts["train"], key=lambda prompt: abs(len(prompt.ids) - 139))[:16]
        unsteered(env, typical)  # warm up
        names = ["rollouts_vs_naive", "rollouts_per_s"]
        names += ["decode_vs_plain", "steered_vs_generate", "steered_tokens_per_s"]
        figures = [*rollouts(env, typical), *decoding(env, typical[:8])]
        out = {"device": env.device.type, "dtype": args.dtype}
        out |= {name: round(figure, 2) for name, figure in zip(names, figures, strict=True)}
        for samples in main_samples:
            asked = prompts["train"][:samples] + prompts["val"]
            end = f"_{samples}" if samples > main_samples[0] else ""
            before = clock(unsteered, env, asked)
            [(final, peak)], wall = main_jobs(samples, flags)
            one_pass = (before + clock(unsteered, env, asked)) / 2
            out[f"main_job_vs_pass{end}"] = round(wall / one_pass, 2)
            out[f"main_job_s{end}"] = round(wall)
            out[f"learn_s_vs_pass{end}"] = round(final["learn_s"] / one_pass, 3)
            out[f"pass_s{end}"] = round(one_pass, 1)
            out["peak_mb"], out["gpu_mb"] = peak
            if samples == main_samples[0]:
                pair, _ = main_jobs(samples, flags, at_once=2)
                together = statistics.mean(beside["learn_s"] for beside, _ in pair)
                out["ppo_two_at_once"] = round(together / final["learn_s"], 2)
    print(json.dumps(out))


if __name__ == "__main__":
    tyro.cli(main)
