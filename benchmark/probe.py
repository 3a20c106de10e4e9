"""What the observation knows: a linear probe from the residual stream at the last prompt position to the right decision.

    python benchmark/probe.py --task mmlu --samples 600 --data-dir DIR

Ridge regression on one-hot targets (the right letter; for xstest, harmful or not) from x_t standardised per dimension, fitted on
training prompts, the penalty chosen on a fifth of them, scored once on validation prompts. Prints one JSON line.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl  # noqa: E402


@dataclass
class ProbeArgs:
    task: str = "mmlu"
    """a task with option letters, or xstest"""
    samples: int = 600
    """training prompts the probe is fitted on"""
    val_samples: int = 200
    """validation prompts it is scored on"""
    data_dir: str | None = None
    """as in crl_ppo.py"""
    layer: int = 15
    """the site: output of this decoder layer"""
    seed: int = 1
    """draws the training prompts"""


if __name__ == "__main__":
    PROBE = crl.parse_args(ProbeArgs, __doc__)

import torch  # noqa: E402


def fit(x, y, penalty):
    """Ridge regression in closed form: x (N, d), y (N, C) -> weights (d + 1, C)."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def accuracy(weights, x, labels):
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return float(((x @ weights).argmax(1) == labels).float().mean())


def main(probe):
    args = crl.Args(task=probe.task, samples=probe.samples, val_samples=probe.val_samples, data_dir=probe.data_dir, seed=probe.seed,
                    model=crl.EMBEDDED, dtype="bfloat16", sae=("none",), layer=(probe.layer,))
    lm, sites, prompts, _ = crl.set_up(args)
    data = {}
    for part in ("train", "val"):
        batch = sorted(prompts[part], key=lambda p: len(p.ids))
        for start in range(0, len(batch), lm.micro_batch):
            crl.prefill(lm, sites[0], batch[start:start + lm.micro_batch])
        labels = [("safe", "unsafe").index(p.row["answer"]) if p.row["choices"] is None else p.row["answer"] for p in prompts[part]]
        data[part] = torch.stack([p.x for p in prompts[part]]).double(), torch.tensor(labels)
    x, labels = data["train"]
    mu, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, y, inner = (x - mu) / std, torch.nn.functional.one_hot(labels).double(), len(x) // 5
    penalty = max((10.0**e for e in range(0, 7)), key=lambda c: accuracy(fit(x[inner:], y[inner:], c), x[:inner], labels[:inner]))
    xv, lv = data["val"]
    score = accuracy(fit(x, y, penalty), ((xv - mu) / std).clamp(-10, 10), lv)
    prior = float((lv == labels.bincount().argmax()).float().mean())
    print(json.dumps({"task": probe.task, "layer": probe.layer, "fit_on": len(x), "scored_on": len(lv), "penalty": penalty,
                      "probe_accuracy": round(score, 3), "most_frequent_answer": round(prior, 3)}))


if __name__ == "__main__":
    main(PROBE)
