"""A run's policy as a directory to publish: python crl_ppo.py --export runs/RUN DIR

DIR holds best.safetensors (policy, critic, statistics), args.json without this machine's paths, the SAE if it was a
local directory, and README.md, a model card for the hub. crl_steer.steered() takes DIR as it takes the run.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from crl_ppo import HERE, Args, load_tensors, save_tensors, stored_args
from crl_stats import cells, markdown
from crl_tasks import fail

CARD = """---
tags: [steering, sparse-autoencoder, reinforcement-learning]
library_name: transformers
---

# A controller of {model}, trained on {task}

A small policy that picks a feature of a sparse autoencoder (SAE) and adds its direction to the residual stream of a
frozen language model while it answers. Trained with PPO by Control Reinforcement Learning (arXiv 2602.10437) on
{train_n} labelled prompts of {task}, seed {seed}. The language model itself is not in here and is not changed.

```python
with crl_steer.steered(model, tokenizer, "this directory") as log:  # crl_steer.py of the project that made it
    model.generate(...)
```

## Figures

{figures}

## What it belongs to

{identity}

## Licences

Nothing in here is executable: safetensors, JSON and this text. Model, SAE and data have licences of their own, which
hold for their use with this controller. {terms}
"""
GEMMA = (
    "The model is a Gemma: SAE and controller are made from it, so the Gemma Terms of Use hold for them as well "
    "(ai.google.dev/gemma/terms)."
)


def figures(run, final):
    """The figures of a run for its card: on validation, and on test prompts where crl_eval.py has answered them."""
    n, rates = final["val_n"], [final[key] for key in ("unsteered", "steered", "constant")]
    low, high = proportion_confint([round(rate * n) for rate in rates], n, method="wilson")
    right = cells(pd.DataFrame({"right": rates, "low": low, "high": high}), "right", "low", "high")
    table = markdown({"": ["unsteered", "CRL", "best constant push"], "right, % (95 % interval)": right})
    text = f"{n} validation prompts, which chose the checkpoint:\n\n{table}\n\n"
    text += final["verdict"] + "."
    if (report := run / "eval" / "report.md").exists():
        text += "\n\n" + report.read_text().replace("# Evaluation", "### Test prompts").replace(
            "\n## ", "\n#### "
        )
    return text


def export(run, out):
    """Write the policy of a finished run (Path) to a directory `out` (Path), which must not exist yet."""
    args, record = stored_args(run), json.loads((run / "args.json").read_text())
    if out.exists():
        fail(f"{out} exists; give a directory that does not")
    if not (run / "final.json").exists():
        fail(f"{run} is not finished; go on with python crl_ppo.py --resume {run}")
    tensors, state = load_tensors(run / "best.safetensors", record["identity"])
    tmp = out.with_name(out.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    own = {key: getattr(Args(), key) for key in HERE}
    own["model"], own["sae"] = (
        Path(args.model).name if Path(args.model).is_dir() else args.model,
        list(args.sae),
    )
    for n, spec in enumerate(args.sae):
        if Path(spec).is_dir():
            own["sae"][n] = f"sae{n}"
            (tmp / f"sae{n}").mkdir()
            for file in (f for f in Path(spec).iterdir() if f.suffix in (".json", ".jsonl", ".safetensors")):
                shutil.copy(file, tmp / f"sae{n}")
    task = args.task if not args.task.startswith("file:") else "file:" + Path(args.task[5:]).name
    record["args"] = dataclasses.asdict(args) | own | {"task": task}
    state["metrics"], state["task"], record["identity"]["task"] = [], task, task
    (tmp / "args.json").write_text(json.dumps(record, indent=1))
    save_tensors(
        tmp / "best.safetensors", {key: v for key, v in tensors.items() if key.startswith("agent.")}, state
    )
    final = json.loads((run / "final.json").read_text())
    identity = "\n".join(f"* {key}: {value}" for key, value in record["identity"].items())
    card = CARD.format(
        model=record["identity"]["model"],
        task=task,
        train_n=final["train_n"],
        seed=args.seed,
        figures=figures(run, final),
        identity=identity,
        terms=GEMMA if "gemma" in record["identity"]["model"].lower() else "",
    )
    (tmp / "README.md").write_text(card)
    tmp.rename(out)
    print(f"exported to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
