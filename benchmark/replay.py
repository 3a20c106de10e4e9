"""PPO again on the tables of finished runs, under other flags: seconds instead of minutes, for choosing defaults.

    python benchmark/replay.py runs/learn/xstest-200/*__* -- "" "weight_decay=3." "pool=3" "hidden=16"

pool=K keeps the K pushes of the mask that cover() takes first on the training rows, first=K those that the screening
took first. Two seeds each; prints the reward on validation prompts at the best checkpoint and at the last, and on the
training prompts at the last.
"""
import dataclasses
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl  # noqa: E402
from screening import flags  # noqa: E402


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
    for update in range(args.updates):
        left = 1 - update / args.updates
        optimizer.param_groups[0]["lr"], epsilon = args.learning_rate * left, args.epsilon * left
        rows = train[torch.randperm(len(train), generator=generator)[:args.batch_prompts or None]]
        b = crl.decisions_of_table(agent, args, table, rows, epsilon, generator, lambda rows, push: None)
        crl.ppo_update(agent, optimizer, args, b, epsilon, generator)
        if (update + 1) % max(1, args.updates // 30) == 0:
            history.append(reward(val))
    return max(history), history[-1], reward(train)


def main(runs, texts):
    print(f"{'flags':44}{'best':>8}{'last':>8}{'train':>8}   best of each run")
    for text in texts:
        rows = []
        for run in runs:
            changed = flags(text)
            pool, first = changed.pop("pool", None), changed.pop("first", None)
            args = dataclasses.replace(crl.stored_args(run), **changed)
            tensors, _ = crl.load_tensors(f"{run}/table.safetensors", {})
            n = json.loads(Path(run, "final.json").read_text())["train_n"]
            reward, keep = tensors["reward"], list(range(tensors["reward"].shape[1] - 1))[:first]
            if pool:
                keep = crl.cover(reward[:n][reward[:n, -1] == 0][:, :-1], pool)
            table = crl.Table([None] * len(reward), tensors["pushes"][keep + [-1]], tensors["x"].shape[1])
            table.x, table.reward = tensors["x"], reward[:, keep + [-1]]
            train, val = torch.arange(n), torch.arange(n, len(reward))
            rows.append(torch.tensor([learn(args, table, train, val, seed) for seed in (1, 2)]).mean(0))
        mean = torch.stack(rows).mean(0)
        print(f"{text or 'defaults':44}" + "".join(f"{v:8.1%}" for v in mean), "  ",
              " ".join(f"{row[0]:.1%}" for row in rows), flush=True)


if __name__ == "__main__":
    cut = sys.argv.index("--")
    main(sys.argv[1:cut], sys.argv[cut + 1:] or [""])
