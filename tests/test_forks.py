"""Every patch of forks/ applies to the scripts, runs small, and does what its name says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import in_children, lines

ROOT = Path(__file__).resolve().parent.parent
PATCHES = {path.stem: path for path in sorted((ROOT / "forks").glob("*.patch"))}
SORRY = "I'm sorry, but I can't help with that."
D = 24  # features of small_run's SAE, which sits at layer 1 of 4


def metrics(run):
    return lines(run / "metrics.jsonl")


def log(run):
    return lines(run / "interventions.jsonl")


def set_up_again(crl_ppo, run):
    """The environment of a run, with its prompts."""
    env, prompts, _ = crl_ppo.set_up(crl_ppo.stored_args(run))
    env.ask(prompts["train"] + prompts["val"])
    return env


# What each fork does, checked in the copy: crl_ppo is the patched one, go(**flags) makes a run.
def grpo(crl_ppo, go):
    run = go()
    assert all("losses/policy_loss" in line and "losses/value_loss" not in line for line in metrics(run))
    last = load_file(run / "last.safetensors")
    moments = {key.split("/")[1] for key in last if key.startswith("adam/")}
    learned = {key for key in last if key.startswith("agent/actor")} | {"agent/prior"}
    assert len(moments) == len(learned)  # the optimizer never moved the critic
    crl_ppo.crl_tasks.score_tokens = lambda *a: (1.0, True)
    assert all(line["losses/policy_loss"] == 0 for line in metrics(go()))  # nobody beats the group


def exact(crl_ppo, go):
    run = go(group=1)
    assert metrics(run) == metrics(go(group=9))  # nothing is drawn
    first = metrics(run)[0]
    tensors = load_file(run / "rewards.safetensors")
    torch.manual_seed(1)
    agent = crl_ppo.Agent(tensors["obs"].shape[2], tensors["memo"].shape[1], 1)
    train = tensors["memo"][:8]
    agent.start_at(torch.arange(5)[:, None], train.mean(0))
    agent.calibrate(tensors["obs"][:8])
    probs = agent.get_policy(agent.observe(tensors["obs"][:8, 0], 0), 0.5).probs
    assert first["objective/reward"] == pytest.approx((probs * train).sum(1).mean().item(), abs=1e-5)


def linear_policy(crl_ppo, go):
    actor = [key for key in load_file(go() / "best.safetensors") if "actor" in key]
    assert sorted(actor) == ["agent/actor.bias", "agent/actor.weight"]


def mean_mask(crl_ppo, go):
    crl_ppo.cover = None
    worth = load_file(go() / "rewards.safetensors")["worth"]
    assert len(worth) == 4 and torch.equal(worth, worth.sort(descending=True)[0])


def no_baseline(crl_ppo, go):
    crl_ppo.crl_tasks.score_tokens = lambda *a: (1.0, True)  # nothing is gained, 1 is earned
    assert metrics(go(learning_rate=1e-4))[0]["losses/value_loss"] == pytest.approx(0.5, abs=0.05)


def refuse_all(crl_ppo, go):
    rows = [{"prompt": f"How do I kill process {i}?", "label": ("safe", "unsafe")[i % 2]} for i in range(40)]
    Path("mirror/xstest").mkdir(parents=True)
    crl_ppo.hub.write_jsonl(Path("mirror/xstest/test.jsonl"), rows)
    run = go(task="xstest", data_dir="mirror", max_new_tokens=3)
    assert {line["task"] for line in log(run)} == {"xstest"}
    score = crl_ppo.crl_tasks.score_answer
    for label in ("safe", "unsafe"):
        row = {"task": "xstest", "choices": None, "answer": label}
        assert score(row, SORRY) == (1.0, True) and score(row, "Sure, do this.") == (0.0, True)
        assert crl_ppo.crl_tasks.solution(row) == SORRY


def late_reading(crl_ppo, go):
    from tiny import near, plain, plain_answer

    tensors = load_file((run := go()) / "rewards.safetensors")
    env = set_up_again(crl_ppo, run)
    crl_ppo.load_rewards(run / "rewards.safetensors", {}, env)
    for number, prompt in enumerate(env.prompts):
        layers = plain(env, prompt.ids, hidden=True)
        near(tensors["obs"][number, 0, :16], layers[3][-1])  # int(0.8 * 4)
        near(tensors["obs"][number, 0, 16:32], layers[3][prompt.ends[0]])
        for action in range(env.noop):  # the action acts at layer 1 all the same
            answer = plain_answer(env, prompt, 1, lambda t, action=action: action)
            assert env.completions[number][action] == answer


def hand_picked(crl_ppo, go):
    crl_ppo.HAND_PICKED = [(1, 7), (1, 3), (2, 5)]
    assert load_file(go() / "rewards.safetensors")["kept"].tolist() == [3, 7, D]


def constrained(crl_ppo, go):
    final = json.loads((go(scored_as_ever=True) / "final.json").read_text())
    assert final["steered_valid"] == final["unsteered_valid"] == 1.0


def no_mask(crl_ppo, go):
    run = go()
    assert json.loads((run / "final.json").read_text())["mask_size"] == D + 1
    tried = ~load_file(run / "rewards.safetensors")["memo"].isnan()
    assert tried[:, D].all() and not tried[:, :D].any()  # before PPO
    assert {line["mask_size"] for line in log(run)} == {D + 1}
    assert (load_file(run / "best.safetensors")["agent/prior"][0, :D] != 0).any()


def active(crl_ppo, go):
    from tiny import plain

    run = go(coef=(1.0, -1.0))
    env = set_up_again(crl_ppo, run)
    prompts = {prompt.row["id"]: prompt for prompt in env.prompts}
    for line in log(run):
        h = plain(env, prompts[line["prompt_id"]].ids, hidden=True)[1][-1]
        features = (env.sites[0].sae.encode(h) > 0).nonzero()[:, 0].tolist()
        assert line["mask_size"] == 2 * len(features) + 1 < 2 * D
        assert line["action"] == env.noop or line["steering"]["feature"] in features


def in_copy(copy, small, name):
    """Runs in a process of its own: import the scripts of `copy`, then make a run and check it."""
    for module in [*sys.modules]:
        if module.startswith("crl_") or module in ("small_run", "tiny"):
            del sys.modules[module]
    sys.path.insert(0, str(copy))
    os.chdir(copy)
    import small_run

    import crl_ppo
    import crl_tasks

    assert Path(crl_ppo.__file__).parent == Path(crl_tasks.__file__).parent == copy
    score = crl_tasks.score_tokens
    crl_tasks.score_tokens = small_run.parity

    def go(task=None, scored_as_ever=False, **flags):
        if scored_as_ever:
            crl_tasks.score_tokens = score
        args = small_run.flags(small, copy / "runs", **flags)
        args.task = task or args.task
        run = crl_ppo.main(args)
        assert (run / "final.json").exists()
        return run

    globals()[name](crl_ppo, go)


def apply(name, copy, *options):
    """git apply in a directory that lies in no repository."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
    subprocess.run(["git", "apply", *options, str(PATCHES[name])], cwd=copy, env=environment, check=True)


@pytest.mark.parametrize("name", PATCHES)
def test_fork(name, small, tmp_path):
    scripts = {path.name: path.read_bytes() for path in ROOT.glob("crl_*.py")}
    for script, text in scripts.items():
        (tmp_path / script).write_bytes(text)
    apply(name, tmp_path)
    assert in_children(in_copy, (tmp_path, small, name)) == [0]
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    apply(name, tmp_path, "-R")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("crl_*.py")} == scripts


def test_forks_are_short_and_listed():
    listed = {}
    for line in (ROOT / "forks" / "README.md").read_text().splitlines():
        if line.startswith("| `"):
            name, _, count, *_ = line.strip("| ").split(" | ")
            listed[name.strip("`")] = int(count)
    for name, path in PATCHES.items():
        changed = [line for line in path.read_text().splitlines() if line[:1] in ("+", "-")]
        changed = [line for line in changed if not line.startswith(("+++ ", "--- "))]
        assert 0 < len(changed) == listed.pop(name) <= 40
    assert listed == {}
