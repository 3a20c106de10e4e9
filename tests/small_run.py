"""A whole run in seconds: a tiny model directory, a tiny SAE directory and tiny file: tasks, all in one directory."""
import json

import tiny
import torch

import crl_ppo

HOOK = "blocks.1.hook_resid_post"


def build(folder):
    """Write model (4 layers, d = 16), SAE (D = 24, layer 1) and two tasks; returns the flags that name them."""
    tiny.save_tiny(folder / "model", "llama", d_model=16, n_layers=4)
    tiny.tiny_sae_dir(folder / "sae", d_model=16, d_sae=24, hook_name=HOOK)
    one = [{"prompt": f"{'x' * (i % 7)} item {i}", "choices": ["u", "v", "w", "x"][:2 + i % 3],
            "answer": i % 2} for i in range(28)]
    long = [{"prompt": f"Say {i}", "answer": "abcdefgh"[i % 8]} for i in range(28)]
    for name, rows in (("one", one), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def parity(task, row, text, thinks=False):
    """Stands in for crl_tasks.score_answer: a random model's long answers are right half of the time."""
    return float(sum(map(ord, text)) % 2), True


def flags(folder, run_dir, task="one", **kw):
    """Args of a small run on the CPU: 8 training prompts, 4 pushes and the no-op, four updates unless `kw` says so."""
    given = dict(task=f"file:{folder}/{task}.jsonl", model=f"{folder}/model", sae=(f"{folder}/sae",),
                 run_dir=str(run_dir), cache_dir=f"{folder}/cache", device="cpu", dtype="float32", samples=8,
                 val_samples=5, hidden=8, screen=2, pool=4, updates=4, update_epochs=2, num_minibatches=2,
                 learning_rate=0.1, max_new_tokens=1 if task == "one" else 3, micro_batch=4)
    if task == "one":
        given["reward_decoding"] = "constrained"  # a random model says a letter now and then
    return crl_ppo.Args(**{**given, **kw})


def go(folder, run_dir, task="one", **kw):
    """The run itself; returns its directory."""
    return crl_ppo.main(flags(folder, run_dir, task, **kw))


def random_policy(run):
    """Put random weights into a run's policy, so that its choices hang on the prompt."""
    tensors, state = crl_ppo.load_tensors(run / "best.safetensors", {})
    for key in (key for key in tensors if key.startswith("agent.policy")):
        tensors[key] = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0)) * 3
    crl_ppo.save_tensors(run / "best.safetensors", tensors, state)
