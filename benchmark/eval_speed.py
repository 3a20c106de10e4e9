"""Speed of crl_eval.py: a test-split pass over conditions 1-8 of a one-token task over one unsteered pass, in one run.

    python benchmark/eval_speed.py            # the last line is one JSON object

Both passes answer the same test prompts in the same process, in turn, several times; the median ratio is quoted.
The pass over conditions holds everything that evaluation does with the test split: prefill, policy, SAE, steered
forwards, reading the letters, KL, shuffling, and the files that --resume reads. What is fitted on train (the best
constant feature) is not part of it. Policy and SAE cost the same trained or not, so an untrained policy is timed.
"""
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass
class SpeedArgs:
    task: str = "mmlu"
    """a task with one-token answers"""
    model: str = "smollm2-135m"
    """as in crl_ppo.py"""
    sae: tuple[str, ...] = ("auto",)
    """as in crl_ppo.py"""
    device: str = "auto"
    """as in crl_ppo.py"""
    micro_batch: int = 16
    """prompts per forward pass, in both passes"""
    test_samples: int = 256
    """test prompts (0: the whole split)"""
    repeats: int = 3
    """repetitions of each pair of passes"""
    data_dir: str | None = None
    """as in crl_ppo.py"""


if __name__ == "__main__":
    import tyro
    SPEED = tyro.cli(SpeedArgs, description=__doc__)

import torch  # noqa: E402

import crl_eval  # noqa: E402
import crl_ppo as crl  # noqa: E402

NAMES = ("unsteered", "format_control", "crl", "crl_sampled", "random", "constant_random", "constant_best",
         "top_activation", "shuffled")


def clock(lab, f):
    started = time.perf_counter()
    f()
    if lab.lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def unsteered(lab):
    """The plainest pass: sorted by length, no cache, last position's logits only."""
    prompts = sorted(lab.prompts["test"], key=lambda p: len(p.ids))
    for start in range(0, len(prompts), lab.lm.micro_batch):
        ids, mask = crl.left_pad(lab.lm, prompts[start:start + lab.lm.micro_batch])
        lab.lm.model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False)


def conditions(lab):
    for file in lab.folder.glob("*.answers-*.json"):
        file.unlink()
    return crl_eval.evaluate(lab, NAMES)


def main(speed):
    args = crl.Args(task=speed.task, model=speed.model, sae=speed.sae, device=speed.device, samples=16, val_samples=4,
                    micro_batch=speed.micro_batch, data_dir=speed.data_dir)
    lm, sites, prompts, _ = crl.set_up(args)
    if args.max_new_tokens != 1:
        crl.fail(f"{args.task} has long answers; conditions share a prefill where answers are one token")
    args.kl_coef = 1.0
    agents = [crl.Agent(args, site).to(lm.device) for site in sites]
    with tempfile.TemporaryDirectory() as folder:
        opts = crl_eval.Args(test_samples=speed.test_samples)
        lab = crl_eval.Lab(opts, args, lm, agents, prompts, "speed", Path(folder))
        lab.prompts["test"] = crl_eval.test_prompts(lab, prompts["test"])
        lab.cached("constant_best", lambda: {"action": 0, "multiple": 1.0})
        lab.cached("neutral", lambda: {})
        unsteered(lab)  # warm up
        pairs = [(clock(lab, lambda: unsteered(lab)), clock(lab, lambda: conditions(lab)))
                 for _ in range(speed.repeats)]
        said = conditions(lab)[0]
    assert {c: len(said[c]) for c in said} == {c: len(lab.prompts["test"]) for c in NAMES if c != "format_control"}
    for plain, steered in pairs:
        print(f"unsteered {plain:8.2f} s   conditions 1-8 {steered:8.2f} s   ratio {steered / plain:.2f}")
    tokens = sum(len(p.ids) for p in lab.prompts["test"]) / len(lab.prompts["test"])
    print(json.dumps({"eval_vs_unsteered": round(statistics.median(b / a for a, b in pairs), 3), "task": args.task,
                      "conditions": len(NAMES), "n": len(lab.prompts["test"]), "mean_prompt_tokens": round(tokens, 1),
                      "model": lm.name, "device": str(lm.device), "micro_batch": lm.micro_batch,
                      "unsteered_s": round(statistics.median(a for a, _ in pairs), 3),
                      "conditions_s": round(statistics.median(b for _, b in pairs), 3)}))


if __name__ == "__main__":
    main(SPEED)
