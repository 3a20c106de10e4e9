"""PPO again on the tables of finished runs, under other flags: seconds instead of minutes, for choosing defaults.

    python benchmark/replay.py runs/learn/xstest-200/*__*

A line for each of VARIANTS, two seeds a run: the reward on validation prompts at the best checkpoint and at the last,
and on training prompts at the last.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl  # noqa: E402

VARIANTS = (  # flags of crl_ppo.py; pool: as many pushes of the run's mask, those that cover() takes first
    {}, {"updates": 150, "learning_rate": 1e-3}, {"updates": 30, "learning_rate": 3e-4}, {"pool": 2}, {"pool": 4},
    {"pool": 8}, {"pool": 16}, {"weight_decay": 0.1}, {"hidden": 16}, {"epsilon": 0.0}, {"group": 16}, {"algo": "grpo"})


def learn(args, table, train, val, seed):
    """(best, last validation reward, last training reward) of crl_ppo.main's loop on a table that is already full."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    agent = crl.Agent(args, table.pushes, table.x.shape[1], table.reward[train].mean(0))
    agent.calibrate(0, table.x[train])
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=args.weight_decay)

    @torch.no_grad()
    def reward(rows):
        return float(table.reward[rows, crl.decide(agent, table.x[rows], table.mask[rows])["push"]].mean())
    history = []
    for update in range(1, args.updates + 1):
        crl.ppo_update(None, None, args, agent, optimizer, table, train, update, generator)
        if update % max(1, args.updates // 30) == 0:
            history.append(reward(val))
    return max(history), history[-1], reward(train)


def replay(run, changed):
    """learn() on a run's table under changed flags, mean of two seeds: (3,)."""
    args, (tensors, _) = replace(crl.stored_args(run), **changed), crl.load_tensors(f"{run}/table.safetensors", {})
    n, reward = json.loads((run / "final.json").read_text())["train_n"], tensors["reward"]
    keep = list(range(reward.shape[1]))
    if "pool" in changed:
        keep = crl.cover(reward[:n][reward[:n, -1] == 0][:, :-1], args.pool) + [-1]
    table = crl.Table([None] * len(reward), tensors["pushes"][keep], tensors["x"].shape[1])
    table.x, table.reward = tensors["x"], reward[:, keep]
    train, val = torch.arange(n), torch.arange(n, len(reward))
    return torch.tensor([learn(args, table, train, val, seed) for seed in (1, 2)]).mean(0)


if __name__ == "__main__":
    print(f"{'best':>8}{'last':>8}{'train':>8}")
    for changed in VARIANTS:
        mean = torch.stack([replay(Path(run), changed) for run in sys.argv[1:]]).mean(0)
        print("".join(f"{v:8.1%}" for v in mean), changed, flush=True)
