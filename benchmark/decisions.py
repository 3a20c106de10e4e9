"""Are the decisions of xstest runs wrong, or their levers weak? The validation prompts, answered again.

    python benchmark/decisions.py [--data-dir DIR] runs/learn/xstest-200/*      # one row per run; Markdown

Every prompt is answered unsteered and with the features the policy would push there if it had to push. Who decides
between the two is the question: the policy itself, a linear probe of x_t fitted on the labels (harmful or harmless) of
the run's training prompts, the label itself (a perfect decision; what is missing to 100 % are the levers), or nobody
(pushed everywhere). In per cent of the prompts answered rightly; one push at the first token (--steer-tokens 1).
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import analyze_features
import crl_eval
import crl_ppo as crl


def must_push(agent, args, x):
    """The policy's greedy picks (N, k) at x (N, d) where the first of them may not be the no-op."""
    mask = agent.mask(args, x, 0, True)
    later, logp = agent.later(args, mask, 0), crl.behaviour_logits(agent.logits(agent.observe(x, 0), mask), mask, 0.0)
    first = logp[:, :-1].topk(1).indices
    if args.features_per_token == 1:
        return first
    left = logp.scatter(1, first, crl.IMPOSSIBLE)
    left = left if later is None else left.masked_fill(~later, crl.IMPOSSIBLE)
    return torch.cat([first, crl.greedy_actions(left, args.features_per_token - 1, True, later)], 1)


@torch.no_grad()
def outcomes(lab):
    """{who decides: (P,) float, whether each validation prompt is answered rightly}."""
    args, agent, val = lab.args, lab.agents[0], lab.prompts["val"]
    args.kl_coef = 0.0
    crl.reference(lab.lm, [agent.site], args, val)
    harmful, x = torch.tensor([p.row["answer"] == "unsafe" for p in val]), torch.stack([p.x for p in val])
    learned = torch.tensor([p.row["answer"] == "unsafe" for p in lab.prompts["train"]]).long()
    (seen,) = analyze_features.residuals(lab.lm, [agent.site.layer], lab.prompts["train"])

    def rewards(forced=None):
        said, _ = crl.rollout(lab.lm, lab.agents, args, val, 1, None, 0.0, 1.0, greedy=True, forced=forced)
        return torch.tensor([r["reward"] for r in said])
    policy, pushed = rewards(), rewards(must_push(agent, args, x))
    unsteered = torch.tensor([p.ref["reward"] for p in val])
    probe = analyze_features.ridge(seen, learned, x.double()).bool()
    return {"unsteered": unsteered, "policy": policy, "pushed everywhere": pushed,
            "linear probe decides": torch.where(probe, pushed, unsteered),
            "label decides": torch.where(harmful, pushed, unsteered), "probe is right": (probe == harmful).float()}


def line(name, row):
    """A row of the table: prompts, and per cent right by who decides."""
    return f"| {name} | {len(row['policy'])} | " + " | ".join(f"{100 * v.mean():.1f}" for v in row.values()) + " |"


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="mirror of the hub's data (default: what the run recorded)")
    parser.add_argument("run", nargs="+", help="run directories of xstest")
    given, total = parser.parse_args(argv), {}
    for run in given.run:
        lab, _ = crl_eval.load_run(crl_eval.Args(run=(run,), data_dir=given.data_dir, test_samples=1), run, Path(),
                                   "run")
        if lab.args.task != "xstest" or lab.args.steer_tokens != 1 or not lab.args.noop:
            crl.fail(f"{run}: not a run of xstest with one push at the first token and a no-op")
        row = outcomes(lab)
        if not total:
            print("| run | n | " + " | ".join(row) + " |\n" + "|---" * (len(row) + 2) + "|")
        print(line(f"{Path(run).parent.name}/{Path(run).name}", row), flush=True)
        for key, v in row.items():
            total.setdefault(key, []).append(v)
    print(line("all", {key: torch.cat(v) for key, v in total.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
