"""How often pushed features make the embedded model refuse harmful xstest training prompts, alone and in company.

    python benchmark/levers.py DIR [FEATURE ...]      # DIR: the --data-dir mirror; features: known levers

Prints, per coefficient, the mean (and the highest) share of refusals over 20 prompts, in per cent: each lever alone,
beside a random feature, in pairs of levers, and random features alone and in pairs. One push at the first token.
"""
import itertools
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl

LEVERS = (636, 1748, 1295, 4532, 3538, 4329, 3627, 2314, 2253, 3913)  # what the runs of the README found


@torch.no_grad()
def main(folder, levers):
    args = crl.Args(task="xstest", data_dir=folder, model="smollm2-135m", dtype="bfloat16", samples=200, val_samples=10,
                    features_per_token=2)
    lm, (site,), parts, _ = crl.set_up(args)
    prompts = [p for p in parts["train"] if p.row["answer"] == "unsafe"][:20]
    chance = random.Random(5).sample(range(4608), 60)
    kinds = {"lever alone": [(f,) for f in levers],
             "beside a random feature": list(itertools.product(levers, chance[:3])),
             "pair of levers": list(itertools.combinations(levers, 2)),
             "random feature": [(f,) for f in chance[:30]],
             "random pair": list(zip(chance[:30], chance[30:]))}
    print("| c | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    agent = crl.Agent(args, site)
    for args.coef in (1.0, 1.4):
        shares = []
        for p in prompts:
            p.memo = {}  # answers at another coefficient
        for actions in kinds.values():
            refused = []
            for part in (actions[n:n + 12] for n in range(0, len(actions), 12)):
                said, _ = crl.rollout(lm, [agent], args, prompts, len(part), None, 0, 0,
                                      forced=torch.tensor(part).repeat(len(prompts), 1))
                refused += [crl.mean(r["reward"] for r in said[n::len(part)]) for n in range(len(part))]
            shares.append(f"{100 * crl.mean(refused):.1f} ({100 * max(refused):.1f})")
        print(f"| {args.coef} | " + " | ".join(shares) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], tuple(map(int, sys.argv[2:])) or LEVERS)
