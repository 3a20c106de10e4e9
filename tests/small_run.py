"""A whole run in seconds: a tiny model, a tiny SAE and tiny file: tasks, all in one directory."""

import json
import shutil
from contextlib import contextmanager

import pytest
import tiny
import torch

import crl_ppo
import crl_tasks
from crl_tasks import hub

HOOK = "blocks.1.hook_resid_post"


def build(folder):
    """Write model (4 layers, d = 16), SAE (D = 24, layer 1) and two tasks into `folder`; returns it."""
    tiny.save_tiny(folder / "model", "llama", d_model=16, n_layers=4)
    tiny.tiny_sae_dir(folder / "sae", d_model=16, d_sae=24, hook_name=HOOK)
    letters = []
    for i in range(28):
        choices = ["u", "v", "w", "x"][: 2 + i % 3]
        letters.append({"prompt": f"{'x' * (i % 7)} item {i}", "choices": choices, "answer": i % 2})
    written = [{"prompt": f"Say {i}", "answer": "abcdefgh"[i % 8]} for i in range(28)]
    for name, rows in (("one", letters), ("long", written)):
        hub.write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def parity(row, tokens, *more):
    """Stands in for crl_tasks.score_tokens: what a random model says is right half of the time, and valid."""
    return float(sum(tokens) % 2), True


def flags(folder, run_dir, task="one", **kw):
    """Args of a small run on the CPU: 8 training prompts, 4 actions and the no-op, 4 updates; then `kw`."""
    where = dict(task=f"file:{folder}/{task}.jsonl", model=f"{folder}/model", sae=(f"{folder}/sae",))
    where |= dict(run_dir=str(run_dir), device="cpu", dtype="float32", batch_size=4)
    size = dict(samples=8, val_samples=5, pool=4, group=4, max_new_tokens=1 if task == "one" else 3)
    ppo = dict(updates=4, update_epochs=2, num_minibatches=2, learning_rate=0.1)
    return crl_ppo.Args(**{**where, **size, **ppo, **kw})


def go(folder, run_dir, task="one", **kw):
    """The run itself; returns its directory."""
    return crl_ppo.main(flags(folder, run_dir, task, **kw))


@contextmanager
def world(folder, agent=None, **kinds):
    """(folder, {name: run}) of runs with these flags, whose answers are right half of the time.

    Their policies are random ones, so that choices hang on the prompt, or begin as an `agent` does."""
    build(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_tasks, "score_tokens", parity)
        patch.setattr(crl_ppo, "Agent", agent or crl_ppo.Agent)
        runs = {name: go(folder, folder / "runs", **flags) for name, flags in kinds.items()}
        for run in runs.values() if agent is None else ():
            random_policy(run)
        yield folder, runs


def random_policy(run):
    """Put random weights into a run's policy, so that its choices hang on the prompt."""
    tensors, state = hub.load_tensors(run / "best.safetensors", {})
    generator = torch.Generator().manual_seed(0)
    for key, value in tensors["agent"].items():
        if key.startswith("actor") or key == "prior":
            tensors["agent"][key] = 3 * torch.randn(value.shape, generator=generator)
    hub.save_tensors(run / "best.safetensors", tensors, state)


def changed(run, new, schema=crl_ppo.SCHEMA, **flags):
    """A copy of a run whose args.json says something else; returns its directory."""
    shutil.copytree(run, new)
    record = json.loads((new / "args.json").read_text())
    hub.write_json(new / "args.json", record | {"schema": schema, "args": record["args"] | flags})
    return new
