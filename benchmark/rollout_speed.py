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
    shape: Literal["embedded", "gemma2-2b"] = "embedded"
    """the embedded model and its SAE, or random weights in Gemma 2 2B's shape and 16384 random directions at layer 20"""
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
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def random_gemma(directory, **config):
    """A model of random weights in the shape of Gemma 2 2B, with the embedded model's tokenizer, in `directory`."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
    tok = AutoTokenizer.from_pretrained(crl_model.fetch_embedded_model(crl.Args().cache_dir))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma2ForCausalLM(Gemma2Config(**config))  # its defaults are the 2B model's
    model.to(torch.bfloat16).save_pretrained(directory)
    tok.save_pretrained(directory)
    return {"model": directory, "sae": ("random:16384",), "layer": (20,), "reward_decoding": "constrained"}


def padded(lm, prompts):
    """Token ids (B, T) of whole prompts, padded on the left, and their attention mask."""
    T = max(len(p.ids) for p in prompts)
    ids = [[lm.tok.pad_token_id] * (T - len(p.ids)) + p.ids for p in prompts]
    mask = [[0] * (T - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    return torch.tensor(ids, device=lm.device), torch.tensor(mask, device=lm.device)


def unsteered(lm, prompts):
    """One plain forward of all prompts in batches of 16 of like length, nothing shared."""
    prompts = sorted(prompts, key=lambda p: len(p.ids))
    with torch.no_grad():
        for part in (prompts[s:s + 16] for s in range(0, len(prompts), 16)):
            ids, mask = padded(lm, part)
            lm.model(ids, attention_mask=mask, logits_to_keep=1)


def naive(lm, actions, prompts, G):
    """One hooked forward of the whole prompts per rollout."""
    site = actions.sites[0].layer

    def edit(i, h):
        h = h.clone()
        h[:, -1] += actions.added(0, h[:, -1], torch.randint(actions.noop, (len(h), 1), device=h.device)).to(h.dtype)
        return h
    with crl_model.hooked(lm, [site], edit):
        for _ in range(G):
            unsteered(lm, prompts)


def plain_loop(lm, prompts, mask, cache, owner, steps):
    """A bare greedy loop of forward passes over the same cache."""
    cache, mask = crl_model.spread(cache, owner, steps), mask[owner, :-1]
    token = torch.tensor([p.ids[-1] for p in prompts], device=lm.device)[owner]
    with torch.no_grad():
        for _ in range(steps):
            mask = F.pad(mask, (0, 1), value=1)
            position = (mask.cumsum(1) - 1)[:, -1:]
            token = lm.model(token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache,
                             use_cache=True).logits[:, -1].argmax(-1)


def decoding(lm, actions, args, prompts, G, steps, repeats):
    """(decode_vs_plain, steered_vs_generate, steered_tokens_per_s): every token steered, nobody stops early."""
    eos, lm.eos, new = lm.eos, {-2}, crl.dataclasses.replace(args, max_new_tokens=steps, steer_tokens=0)
    owner = torch.arange(len(prompts), device=lm.device).repeat_interleave(G)
    push = torch.randint(actions.noop, (len(owner), 1), device=lm.device)
    ids, seen = (v[owner] for v in padded(lm, prompts))
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
        ratios.append((loop / steered, generate / whole, len(owner) * steps / steered))
    lm.eos = eos
    return [round(statistics.median(column), 2) for column in zip(*ratios)]


def main_job(samples, flags):
    """`crl_ppo.py --task mmlu` in a process of its own: (final.json, wall seconds, peak resident MB, peak GPU MB)."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [str(ROOT / "crl_ppo.py"), "--task", "mmlu", "--samples", str(samples), "--run-dir", tmp]
        for flag, values in flags.items():
            values = values if isinstance(values, tuple) else (values,)
            command += ["--" + flag.replace("_", "-"), *map(str, values)]
        code = ("import resource, runpy, sys, torch\n"
                "sys.argv = sys.argv[1:]\n"
                "runpy.run_path(sys.argv[0], run_name='__main__')\n"
                "gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0\n"
                "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, gpu)")
        start = time.perf_counter()
        command = [sys.executable, "-c", code, *command]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        wall, peak = time.perf_counter() - start, re.search(r"peak (\d+) (\d+)", said)
        [final] = Path(tmp).glob("*/final.json")
        return json.loads(final.read_text()), wall, round(int(peak[1]) / 1024), round(int(peak[2]) / 2**20)


def main(speed):
    with tempfile.TemporaryDirectory() as tmp:
        flags = random_gemma(tmp) if speed.shape == "gemma2-2b" else {"model": crl_model.EMBEDDED}
        print(json.dumps(measure(speed, flags | ({"data_dir": speed.data_dir} if speed.data_dir else {}))))


def measure(speed, flags):
    """The ratios of the docstring, as a dict; flags: those of crl_ppo.py."""
    args = crl.Args(task="mmlu", samples=max(speed.main_samples), **flags)
    lm, actions, prompts, _ = crl.set_up(args)
    typical = sorted(prompts["train"], key=lambda p: abs(len(p.ids) - 139))[:speed.prompts]
    out, G = {"device": lm.device.type, "dtype": args.dtype}, 32
    unsteered(lm, typical)  # warm up
    if "rollouts" in speed.parts:
        push = torch.randint(actions.noop, (len(typical), G, 1), device=lm.device)
        pairs = [(clock(lambda: naive(lm, actions, typical, 4)) * G / 4,
                  clock(lambda: crl.answers(lm, actions, args, typical, push))) for _ in range(speed.repeats)]
        out["rollouts_vs_naive"] = round(statistics.median(slow / fast for slow, fast in pairs), 2)
        out["rollouts_per_s"] = round(len(typical) * G / statistics.median(fast for _, fast in pairs))
    if "decoding" in speed.parts:
        names = "decode_vs_plain", "steered_vs_generate", "steered_tokens_per_s"
        out |= zip(names, decoding(lm, actions, args, typical[:8], 16, 32, speed.repeats))
    for samples in speed.main_samples if "main" in speed.parts else ():
        asked = prompts["train"][:samples] + prompts["val"]
        before = clock(lambda: unsteered(lm, asked))
        final, wall, peak, gpu = main_job(samples, flags)
        one_pass = (before + clock(lambda: unsteered(lm, asked))) / 2
        end = "" if samples == speed.main_samples[0] else f"_{samples}"
        out |= {f"main_job_vs_pass{end}": round(wall / one_pass, 2), f"main_job_s{end}": round(wall), "peak_mb": peak,
                f"learn_s_vs_pass{end}": round(final["learn_s"] / one_pass, 3), f"pass_s{end}": round(one_pass, 1)}
        out |= {"gpu_mb": gpu} if gpu else {}
    return out


if __name__ == "__main__":
    main(SPEED)
