"""Would another observation tell harmful from harmless xstest prompts better? Linear probes, no steering.

    python benchmark/observations.py DIR      # DIR: the --data-dir mirror

A ridge probe of the residual stream at the SAE's site, fitted on the labels of 50 (mean of ten draws) or 200 training
prompts, tells the validation prompts of the four folds harmful or harmless: per cent right, by fold and on average.
Positions: the last prompt position (x_t, what the policy sees), the last token of the user's text, the mean over it.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import analyze_features
import crl_ppo as crl

OBSERVATIONS = {"x_t": ["last"], "user's last token": ["user"], "x_t and user's last token": ["last", "user"],
                "x_t and mean of the user's text": ["last", "mean"], "all three": ["last", "user", "mean"]}


@torch.no_grad()
def positions(lm, site, prompt):
    """{name: (d,)} of a prompt's residual stream at the site."""
    frame, mark = (lm.tok.encode(text, add_special_tokens=False) for text in (crl.chat_text(lm.tok, "@"), "@"))
    start = frame.index(mark[0])
    end, seen = len(prompt.ids) - (len(frame) - start - 1), []
    with crl.hooked(lm, [site], lambda i, h: (seen.append(h[0].double()), h)[1]):
        lm.model(torch.tensor([prompt.ids]), use_cache=False, logits_to_keep=1)
    return {"last": seen[0][-1], "user": seen[0][end - 1], "mean": seen[0][start:end].mean(0)}


def main(folder):
    found, known = {}, {}
    for fold in range(4):
        args = crl.Args(task="xstest", samples=200, data_dir=folder, model="smollm2-135m", dtype="bfloat16", fold=fold)
        lm, (site,), prompts, _ = crl.set_up(args)
        parts = {part: prompts[part] for part in ("train", "val")}
        labels = {part: torch.tensor([p.row["answer"] == "unsafe" for p in ps]).long() for part, ps in parts.items()}
        for p in parts["train"] + parts["val"]:
            if p.row["id"] not in known:
                known[p.row["id"]] = positions(lm, site, p)
        for name, keys in OBSERVATIONS.items():
            x = {part: torch.stack([torch.cat([known[p.row["id"]][k] for k in keys]) for p in ps])
                 for part, ps in parts.items()}
            for samples, draws in ((50, 10), (200, 1)):
                right = []
                for seed in range(draws):
                    some = torch.randperm(len(x["train"]), generator=torch.Generator().manual_seed(seed))[:samples]
                    said = analyze_features.ridge(x["train"][some], labels["train"][some], x["val"])
                    right.append((said == labels["val"]).double().mean())
                found.setdefault((name, samples), []).append(100 * float(torch.stack(right).mean()))
    print("| observation | samples | folds 0 to 3 | mean |\n|---|---|---|---|")
    for (name, samples), v in sorted(found.items(), key=lambda item: item[0][1]):
        print(f"| {name} | {samples} | {', '.join(f'{a:.1f}' for a in v)} | {sum(v) / len(v):.1f} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("observations.py: give the --data-dir mirror as the one argument")
    main(sys.argv[1])
