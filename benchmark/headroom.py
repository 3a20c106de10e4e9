"""Headroom of the actions: on how many validation prompts does at least one of K random features give the right answer?

    python benchmark/headroom.py --task bbq_ambig --data-dir DIR --features 256

Prints the unsteered accuracy, the mean over single features, the best single feature of the sample, and the share of prompts
that at least one feature sets right; for the SAE's directions and for unit Gaussian directions of the same norm.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl  # noqa: E402


@dataclass
class HeadroomArgs:
    task: str = "bbq_ambig"
    """as in crl_ppo.py"""
    data_dir: str | None = None
    """as in crl_ppo.py"""
    features: int = 256
    """K, features drawn at random"""
    prompts: int = 100
    """validation prompts"""
    coef: float | None = None
    """steering coefficient; default: the task's"""
    seed: int = 0
    """draws the features"""


if __name__ == "__main__":
    HEADROOM = crl.parse_args(HeadroomArgs, __doc__)

import torch  # noqa: E402


def main(h):
    for sae, layer in (("auto", ()), ("random:4608", (15,))):
        args = crl.Args(task=h.task, data_dir=h.data_dir, model=crl.EMBEDDED, dtype="bfloat16", sae=(sae,), layer=layer, coef=h.coef,
                        val_samples=h.prompts)
        lm, sites, prompts, _ = crl.set_up(args)
        agents, val = [crl.Agent(args, s) for s in sites], sorted(prompts["val"], key=lambda p: len(p.ids))
        crl.reference(lm, sites, args, val)
        picks = torch.randperm(sites[0].d_sae, generator=torch.Generator().manual_seed(h.seed))[:h.features]
        right, group = [], min(64, h.features) if args.max_new_tokens == 1 else 8
        for part in picks.split(group):
            said, _ = crl.rollout(lm, agents, args, val, len(part), None, 0.0, 0.0, forced=part.repeat(len(val))[:, None])
            right.append(torch.tensor([r["reward"] for r in said]).view(len(val), len(part)))
        right = torch.cat(right, 1)  # (prompts, K)
        print(json.dumps({"task": h.task, "sae": sae, "coef": args.coef, "prompts": len(val), "features": h.features,
                          "unsteered": round(crl.mean(p.ref["reward"] for p in val), 3), "mean_feature": round(float(right.mean()), 3),
                          "best_constant_in_sample": round(float(right.mean(0).max()), 3),
                          "any_feature": round(float(right.amax(1).mean()), 3)}), flush=True)


if __name__ == "__main__":
    main(HEADROOM)
