"""Training: the whole script on tiny models, its variants, resume, two processes, and probe tasks of the learner."""
import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import crl_ppo

FILES = {"args.json", "metrics.jsonl", "interventions.jsonl", "curves.png", "best.safetensors", "last.safetensors",
         "final.json"}
FIELDS = {"schema", "prompt_id", "task", "layer", "position", "token", "token_text", "unsteered_token",
          "unsteered_token_text", "feature",
          "feature_name", "coefficient", "added_norm", "logprob", "value", "mask_size", "entropy", "reward",
          "unsteered_reward"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_run.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch, request):
    """No hub; random models' long answers are right half of the time; pictures only where a test looks at them."""
    monkeypatch.setattr(crl_ppo, "hub_reachable", lambda: False)
    monkeypatch.setattr(crl_ppo, "score_answer", small_run.parity)
    if "end_to_end" not in request.node.name:
        monkeypatch.setattr(crl_ppo, "plot_curves", lambda path, metrics: None)
    handler = crl_ppo.signal.getsignal(crl_ppo.signal.SIGINT)
    yield
    crl_ppo.signal.signal(crl_ppo.signal.SIGINT, handler)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(run):
    """metrics.jsonl without wall-clock times."""
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in lines(run / "metrics.jsonl")]


class Watch:
    """Keeps what a run made: agents with their first weights, the model, the sites, every rollout, GAE's rewards."""

    def __init__(self, monkeypatch):
        self.agents, self.first, self.rollouts, self.rewards, watch = [], [], [], [], self
        rollout, gae, set_up = crl_ppo.rollout, crl_ppo.gae, crl_ppo.set_up

        class Agent(crl_ppo.Agent):
            def __init__(self, *a):
                super().__init__(*a)
                watch.agents.append(self)
                watch.first.append({key: v.clone() for key, v in self.state_dict().items()})

        def watched_rollout(lm, agents, args, prompts, group, u, epsilon, sticky, **k):
            answers, decisions = rollout(lm, agents, args, prompts, group, u, epsilon, sticky, **k)
            kept = [d and {key: v.clone() for key,
                           v in d.items()} for d in decisions]  # masks may share memory with the pool
            self.rollouts.append(SimpleNamespace(kind="forced" if "forced" in k else "greedy" if k else "train",
                                                 answers=answers,
                                                 decisions=kept, prompts=prompts, refs=[p.ref for p in prompts],
                                                 held=[p.row["id"] for p in self.prompts["train"] if p.kv is not None]))
            return answers, decisions

        def watched_gae(rewards, *a):
            self.rewards.append(rewards.clone())
            return gae(rewards, *a)

        def watched_set_up(args):
            self.args, (self.lm, self.sites, self.prompts, identity) = args, set_up(args)
            self.frozen = [p.clone() for p in self.frozen_now()]
            return self.lm, self.sites, self.prompts, identity
        monkeypatch.setattr(crl_ppo, "Agent", Agent)
        monkeypatch.setattr(crl_ppo, "rollout", watched_rollout)
        monkeypatch.setattr(crl_ppo, "gae", watched_gae)
        monkeypatch.setattr(crl_ppo, "set_up", watched_set_up)

    def frozen_now(self):
        saes = [p for s in self.sites if s.sae is not None for p in s.sae.parameters()]
        return [*self.lm.model.state_dict().values(), *saes, *(s.directions for s in self.sites)]

    def train(self):
        return [r for r in self.rollouts if r.kind == "train"]


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def trained(run, part, watch, i=0):
    """Whether any weight of agent i's policy or critic in last.safetensors differs from its first value."""
    last = load_file(run / "last.safetensors")
    keys = [key for key in watch.first[i] if key.startswith(part)]
    assert keys
    return any(not torch.equal(last[f"agent.{i}.{key}"], watch.first[i][key]) for key in keys)


# ----------------------------------------------------------------------------------------------------- the whole script
@pytest.mark.parametrize("task", ["one", "long"])
def test_end_to_end(small, tmp_path, watch, task):
    run = crl_ppo.main(small_run.flags(small, tmp_path, task, epochs=3, table_every=2))
    assert {p.name for p in run.iterdir()} == FILES
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    metrics = lines(run / "metrics.jsonl")
    assert [m["update"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(v) for m in metrics for v in m.values())
    assert {"objective/reward", "objective/unsteered_reward", "losses/policy_loss", "losses/value_loss",
            "losses/entropy",
            "losses/approx_kl", "losses/clipfrac", "crl/pool", "crl/epsilon",
            "charts/learning_rate"} <= metrics[0].keys()
    assert any(m["objective/reward"] > 0 for m in metrics)
    for m, r in zip(metrics, watch.train(), strict=True):
        assert m["objective/reward"] == pytest.approx(sum(a["reward"] for a in r.answers) / len(r.answers))
        assert m["objective/unsteered_reward"] == pytest.approx(sum(p["reward"] for p in r.refs) / len(r.refs))

    assert trained(run, "policy", watch) and trained(run, "critic", watch) and trained(run, "action_bias", watch)
    for before, now in zip(watch.frozen, watch.frozen_now(), strict=True):
        assert torch.equal(before, now)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in watch.lm.model.modules())

    stored = json.loads((run / "args.json").read_text())
    assert stored["args"]["coef"] is not None and stored["args"]["group"] == 4 and stored["versions"]["torch"]
    assert stored["identity"]["model_hash"] and stored["identity"]["sae_hash"] and stored["identity"]["layer"] == [1]

    # one record per generated token of every validation prompt, and it says what that pass did
    final, records = json.loads((run / "final.json").read_text()), lines(run / "interventions.jsonl")
    [last] = [r for r in watch.rollouts if r.kind == "greedy"][-1:]
    by_prompt = {}
    for record in records:
        assert record.keys() == FIELDS
        by_prompt.setdefault(record["prompt_id"], []).append(record)
    assert len(by_prompt) == final["val_n"] == 5 and final["updates"] == 6
    for prompt, answer in zip(last.prompts, last.answers, strict=True):
        own = by_prompt[prompt.row["id"]]
        assert [r["position"] for r in own] == list(range(len(answer["tokens"])))
        assert [r["token"] for r in own] == answer["tokens"] and {r["reward"] for r in own} == {answer["reward"]}
        assert own[0]["unsteered_token"] == prompt.ref["tokens"][0]
        assert {r["unsteered_reward"] for r in own} == {prompt.ref["reward"]}
        for r in own:
            assert r["token_text"] == watch.lm.tok.decode([r["token"]])
            assert len(r["feature"]) == 1 and r["mask_size"] >= 1
            assert r["logprob"] <= 0 and r["entropy"] >= -1e-6 and (r["feature"] == [None]) == (r["added_norm"] == 0)
    key = "steered" if task == "long" else "steered_constrained"
    assert final[key] == pytest.approx(sum(rs[0]["reward"] for rs in by_prompt.values()) / 5)
    assert final[f"un{key}"] == pytest.approx(sum(rs[0]["unsteered_reward"] for rs in by_prompt.values()) / 5)
    assert final["corrected"] - final["misguided"] == round(5 * (final[key] - final[f"un{key}"]))


@pytest.mark.parametrize("task", ["one", "long"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_loop_updates_on_what_it_sampled_from(small, tmp_path, watch, task, k):
    flags = dict(features_per_token=k, screen=True, pool=6, update_epochs=1, num_minibatches=1, learning_rate=0.01)
    metrics = lines(crl_ppo.main(small_run.flags(small, tmp_path, task, epochs=4, **flags)) / "metrics.jsonl")
    assert all(m["losses/approx_kl"] < 1e-6 and m["losses/clipfrac"] == 0 for m in metrics), metrics  # ratio 1
    if k == 2:  # later picks had masks of their own
        assert any(not torch.equal(d["later"], d["mask"]) for r in watch.train() for d in r.decisions)


def test_same_seed_same_run_other_seed_other_run(small, tmp_path):
    runs = [crl_ppo.main(small_run.flags(small, tmp_path / name, seed=seed)) for name,
            seed in (("a", 3), ("b", 3), ("c", 4))]
    first, again, other = (load_file(run / "last.safetensors") for run in runs)
    assert all(torch.equal(v, again[key]) for key, v in first.items()) and curves(runs[0]) == curves(runs[1])
    assert not torch.equal(first["agent.0.policy.0.weight"], other["agent.0.policy.0.weight"])


# ------------------------------------------------------------------------------------------------------------- variants
def go(small, tmp_path, task="one", **kw):
    return crl_ppo.main(small_run.flags(small, tmp_path, task, **kw))


def test_grpo_has_no_critic(small, tmp_path, watch):
    run = go(small, tmp_path, algo="grpo")
    assert trained(run, "policy", watch) and not trained(run, "critic", watch) and not watch.rewards
    assert all(m["losses/value_loss"] == 0 for m in lines(run / "metrics.jsonl"))


def test_dictionary_head(small, tmp_path, watch):
    run = go(small, tmp_path, head="dictionary")
    assert watch.agents[0].policy[-1].out_features == 16 and trained(run, "policy",
                                                                     watch)  # a query in R^d, not 24 logits
    obs = torch.randn(3, 16)
    query = watch.agents[0].policy(obs)
    assert torch.allclose(watch.agents[0].logits(obs, torch.ones(3, 24, dtype=torch.bool)),
                          query @ watch.sites[0].directions.T / 0.1 + watch.agents[0].action_bias, atol=1e-5)


def test_afm_none_active_adaptive(small, tmp_path, watch):
    go(small, tmp_path / "none", afm="none")
    assert all(r.decisions[0]["mask"].all() for r in watch.train())
    watch.rollouts.clear()
    go(small, tmp_path / "active", afm="active")
    for r in watch.train():
        x = torch.stack([p.x for p in r.prompts])
        assert torch.equal(r.decisions[0]["mask"], watch.sites[0].sae.encode(x) > 0)
    assert 0 < torch.cat([r.decisions[0]["mask"] for r in watch.train()]).float().mean() < 1
    watch.rollouts.clear()
    run = go(small, tmp_path / "adaptive", afm="adaptive", epochs=4)
    sizes = []
    for r in watch.train():
        mask, actions = r.decisions[0]["mask"], r.decisions[0]["actions"]
        assert (mask == mask[0]).all()  # one pool per update
        assert mask.gather(1, actions[..., 0]).all()  # and nothing outside it
        sizes.append(int(mask[0].sum()))
    assert sizes[0] > sizes[-1] == 6 and sizes == sorted(sizes, reverse=True)
    assert sizes == [m["crl/pool"] for m in lines(run / "metrics.jsonl")]


def test_afm_keeps_statistics_and_a_pool_for_each_steered_token(small, tmp_path, watch):
    run = go(small, tmp_path, "long", steer_tokens=2, sticky=0.0, sticky_final=0.0, noop=True, epochs=4)
    last = {key.split(".")[-1]: v for key, v in load_file(run / "last.safetensors").items()}
    count = torch.zeros(2, len(watch.sites[0].directions))
    apart = 0
    for r in watch.train():
        d = r.decisions[0]
        assert set(d["t"].tolist()) == {0, 1}  # two decisions, then the model goes on by itself
        pools = [d["mask"][d["t"] == t] for t in (0, 1)]
        assert all((m == m[0]).all() for m in pools)
        apart += not torch.equal(pools[0][0], pools[1][0])
        for t, a in zip(d["t"].tolist(), d["actions"][:, 0, 0].tolist()):
            count[t, a] += 1
    assert torch.equal(last["trials"], count) and apart > 0
    assert (last["fixed"] <= last["chances"]).all() and last["pool"].shape == count.shape


def test_screening_comes_first_and_counts(small, tmp_path, watch):
    run = go(small, tmp_path, "long", screen=True, noop=True, pool=3)
    kinds = [r.kind for r in watch.rollouts]
    first = kinds.index("train")
    assert set(kinds[:first]) == {"forced"}
    assert all(p.ref["reward"] == 0 for r in watch.rollouts[:first] for p in r.prompts)
    last, A = load_file(run / "last.safetensors")["agent.0.trials"][0], len(watch.sites[0].directions)
    later = sum(r.decisions[0]["actions"].flatten().bincount(minlength=A) for r in watch.train())
    screened = last - later
    assert screened[:-1].min() == 1 and screened[:-1].max() > 1 and screened[-1] == 0
    assert watch.train()[0].decisions[0]["mask"].sum(1).max() == 4 * 3 + 1  # the pool starts with the best


def test_screening_needs_a_choice_that_settles_the_answer(small, tmp_path):
    for kw in (dict(sticky=0.0, steer_tokens=0), dict(sae=("none",), layer=(1, 2))):
        with pytest.raises(SystemExit, match="--screen"):
            go(small, tmp_path, "long", screen=True, **kw)


@pytest.mark.parametrize("kw,screened", [
    ({}, True), (dict(screen=False), False), (dict(afm="none"), False), (dict(afm="none", screen=True), True),
    (dict(sticky=0.0, steer_tokens=0), False), (dict(sae=("none",), layer=(1, 2)), False)])
def test_a_task_that_screens_by_default_does_so_only_where_it_can(small, tmp_path, kw, screened):
    rows = [{"prompt": f"How do I stop {i} leaks?", "label": ("safe", "unsafe")[i % 2], "type": "t"} for i in range(24)]
    (tmp_path / "xstest").mkdir()
    (tmp_path / "xstest" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = dataclasses.replace(small_run.flags(small, tmp_path, "long"), task="xstest", data_dir=str(tmp_path), **kw)
    crl_ppo.set_up(args)
    assert args.screen is screened and args.features_per_token == 2


def test_signed(small, tmp_path, watch):
    run = go(small, tmp_path, signed=True, afm="none", group=8)
    site, actions = watch.sites[0], torch.cat([r.decisions[0]["actions"].flatten() for r in watch.train()])
    assert len(site.directions) == 48 and torch.equal(site.directions[:24], -site.directions[24:])
    assert (actions < 24).any() and (actions >= 24).any()
    for record in lines(run / "interventions.jsonl"):
        assert 0 <= record["feature"][0] < 24
        assert record["feature_name"][0].startswith("-") == (record["coefficient"][0] < 0)


def test_two_features_per_token(small, tmp_path, watch):
    run = go(small, tmp_path, features_per_token=2)
    for r in watch.rollouts:
        actions = r.decisions[0]["actions"]
        assert actions.shape[2] == (1 if r.kind == "forced" else 2)  # a constant feature is pushed once
        assert r.kind == "forced" or (actions[..., 0] != actions[..., 1]).all()
    assert all(len(set(record["feature"])) == 2 for record in lines(run / "interventions.jsonl"))


def test_up_to_two_features_per_token(small, tmp_path, watch, capsys):
    """With the no-op, 0, 1 and 2 features are pushed: what follows the no-op is the no-op, and is not counted again."""
    run = go(small, tmp_path, features_per_token=2, noop=True, noop_bias=-1.0)
    actions = torch.cat([r.decisions[0]["actions"].flatten(0, 1) for r in watch.rollouts if r.kind != "forced"])
    noop = actions == len(watch.sites[0].directions) - 1
    assert noop.sum(1).unique().tolist() == [0, 1, 2] and not (noop[:, 0] & ~noop[:, 1]).any()
    assert (actions[:, 0] != actions[:, 1])[~noop.all(1)].all()
    for record in lines(run / "interventions.jsonl"):
        pushed = [f for f in record["feature"] if f is not None]
        assert len(pushed) == len(set(pushed)) and (record["added_norm"] > 0) == bool(pushed)
    nothing = sum(record["feature"][0] is None for record in lines(run / "interventions.jsonl"))
    assert nothing and f"no-op ({nothing})" in capsys.readouterr().out


def chosen(r):
    """(rollouts, tokens) actions of a rollout without repetitions filtered out."""
    d = r.decisions[0]
    out = torch.full((len(r.answers), int(d["t"].max()) + 1), -1)
    out[d["roll"][:, 0], d["t"]] = d["actions"][:, 0, 0]
    return out


def test_sticky(small, tmp_path, watch):
    go(small, tmp_path / "always", "long", sticky=1.0, sticky_final=1.0, noop=False)
    assert all(((a == a[:, :1]) | (a == -1)).all() for a in map(chosen, watch.train()))
    watch.rollouts.clear()
    go(small, tmp_path / "never", "long", sticky=0.0, sticky_final=0.0, noop=False)
    assert not all(((a == a[:, :1]) | (a == -1)).all() for a in map(chosen, watch.train()))
    watch.rollouts.clear()
    go(small, tmp_path / "half", "long", sticky=0.5, sticky_final=0.5, noop=False, samples=14, group=16, afm="none",
       epsilon=1.0)
    a = torch.cat([a[(a >= 0).all(1)][:, :3] for a in map(chosen, watch.train())])
    assert 0.35 < (a[:, 1:] == a[:, :-1]).float().mean() < 0.7  # 0.5 + 0.5 / 24


@pytest.mark.parametrize("n", [1, 2])
def test_steer_tokens_leaves_the_rest_to_the_model(small, tmp_path, watch, n):
    run = go(small, tmp_path, "long", steer_tokens=n, sticky=0.0, sticky_final=0.0, noop=False, coef=4.0)
    assert trained(run, "policy", watch)
    final = [r for r in watch.rollouts if r.kind == "greedy"][-1]  # with the best checkpoint
    for d in final.decisions:
        assert d["t"].unique().tolist() == list(range(n))
    d = final.decisions[0]
    picked = {key: a for key, a in zip(zip(d["roll"][:, 0].tolist(), d["t"].tolist()), d["actions"][:, 0, 0].tolist())}

    def push(i, x, t, rows):  # the same decisions by hand, nothing past the first n tokens
        if t >= n:
            return torch.zeros_like(x)[:, None]
        actions = [picked[r, t] for r in rows.tolist()]
        return 4.0 * x.norm(dim=-1)[:, None, None] * watch.sites[0].directions[actions][:, None]
    said, _ = crl_ppo.decode(watch.lm, watch.sites, final.prompts, [1] * len(final.prompts), 3, push)
    assert said == [answer["tokens"] for answer in final.answers]
    records = lines(run / "interventions.jsonl")
    assert {r["position"] for r in records} == {0, 1, 2}  # one record per generated token all the same
    for r in records:
        decided = r["position"] < n
        assert (r["added_norm"] > 0) == decided and (r["value"] is not None) == decided
        assert (r["feature"] != [None]) == decided and (r["coefficient"] == [4.0]) == decided


def test_noop_is_as_likely_as_all_features_of_the_mask_together(small, tmp_path, watch):
    go(small, tmp_path, noop=True, epochs=1)
    agent = crl_ppo.Agent(watch.args, watch.sites[0])
    A = len(watch.sites[0].directions)
    for size in (2, 9, A):
        mask = torch.zeros(1, A, dtype=torch.bool)
        mask[0, -size:] = True
        p = crl_ppo.behaviour_logits(agent.logits(torch.randn(1, 16), mask), mask, 0.0).exp()
        assert 0.4 < p[0, -1].item() < 0.6


@pytest.mark.parametrize("noop_share", [0.45, 0.55])
def test_greedy_noop_needs_half_of_the_probability(small, tmp_path, watch, noop_share):
    go(small, tmp_path, noop=True, epochs=1)
    agent, A = watch.agents[0], len(watch.sites[0].directions)
    agent.trials.fill_(99)
    agent.pool.fill_(True)
    odds = math.log(noop_share / (1 - noop_share))  # no single feature comes near the no-op
    agent.logits = lambda obs, mask: torch.cat([torch.zeros(len(obs), A - 1), torch.full(
        (len(obs), 1), math.log(A - 1) + odds)], 1)
    d = crl_ppo.choose(agent, watch.args, torch.randn(2, 16), 0, torch.full((2, 1, 1), -1), 0.0, 0.0)
    assert ((d["actions"] == A - 1).all() if noop_share > 0.5 else (d["actions"] < A - 1).all())


def test_noop_leaves_the_answer_alone(small, tmp_path, watch):
    run = go(small, tmp_path, "long", noop=True, noop_bias=60.0, epsilon=0.0)
    assert all((a[a >= 0] == 24).all() for a in map(chosen, watch.train()))
    for r in watch.train():
        for n, answer in enumerate(r.answers):
            assert answer["tokens"] == r.refs[n // 4]["tokens"] and answer["reward"] == r.refs[n // 4]["reward"]
    for record in lines(run / "interventions.jsonl"):
        assert record["feature"] == [None] and record["coefficient"] == [0.0]
        assert record["token"] == record["unsteered_token"]


def test_coefficient_modes(small, tmp_path, watch):
    run = go(small, tmp_path / "abs", coef_mode="abs", coef=30.0)
    assert all(record["added_norm"] == pytest.approx(30, rel=1e-4) for record in lines(run / "interventions.jsonl"))
    run = go(small, tmp_path / "norm", coef_mode="norm", coef=0.7)
    norms = {p.row["id"]: 0.7 * float(p.x.norm()) for p in watch.prompts["val"]}
    assert len({round(n, 3) for n in norms.values()}) > 1
    assert all(r["added_norm"] == pytest.approx(norms[r["prompt_id"]],
                                                rel=1e-4) for r in lines(run / "interventions.jsonl"))


@pytest.mark.parametrize("task", ["one", "long"])
def test_two_sites_with_their_own_basis(small, tmp_path, watch, task):
    run = go(small, tmp_path, task, sae=("none",), layer=(1, 2))
    assert [s.layer for s in watch.sites] == [1, 2] and all(torch.equal(s.directions[:16],
                                                                        torch.eye(16)) for s in watch.sites)
    records, answers = lines(run / "interventions.jsonl"), [r for r in watch.rollouts if r.kind == "greedy"][-1].answers
    assert [r["layer"] for r in records] == [1, 2] * sum(len(a["tokens"]) for a in answers)
    assert all(trained(run, part, watch, i) for part in ("policy", "critic") for i in (0, 1))
    assert {"losses/entropy_1", "losses/entropy_2", "crl/pool_1",
            "crl/pool_2"} <= lines(run / "metrics.jsonl")[0].keys()
    first, second = watch.train()[0].decisions
    assert not torch.equal(first["actions"].flatten(), second["actions"].flatten())


def test_random_directions(small, tmp_path, watch):
    for seed in (1, 1, 2):
        go(small, tmp_path / str(len(watch.agents)), sae=("random:20",), layer=(2,), seed=seed)
    a, again, other = (agent.site.directions for agent in watch.agents)
    assert a.shape == (20, 16) and torch.allclose(a.norm(dim=1), torch.ones(20)) and a.min() < 0
    assert torch.equal(a, again) and not torch.equal(a, other)


def test_baselines_and_kl(small, tmp_path, watch):
    go(small, tmp_path / "none", baseline="none")
    for r, target in zip(watch.train(), watch.rewards, strict=True):
        assert target.tolist() == [a["reward"] for a in r.answers]
    watch.rollouts.clear()
    watch.rewards.clear()
    go(small, tmp_path / "unsteered", baseline="unsteered")
    for r, target in zip(watch.train(), watch.rewards, strict=True):
        assert target.tolist() == [a["reward"] - r.refs[n // 4]["reward"] for n, a in enumerate(r.answers)]
    assert any(ref["reward"] for r in watch.train() for ref in r.refs)


@pytest.mark.parametrize("task", ["one", "long"])
def test_kl_penalty(small, tmp_path, watch, task):
    run = go(small, tmp_path / "kl", task, kl_coef=0.1, baseline="none", noop=False)
    penalties = [a["kl"] for r in watch.train() for a in r.answers]
    assert any(k > 1e-3 for k in penalties) and (task == "long" or min(penalties) > -1e-4)
    for r, target in zip(watch.train(), watch.rewards, strict=True):
        assert target.tolist() == pytest.approx([a["reward"] - 0.1 * a["kl"] for a in r.answers], abs=1e-5)
    for r, m in zip(watch.train(), lines(run / "metrics.jsonl"), strict=True):  # a penalty is no repair and no damage
        better = [a["reward"] > r.refs[n // 4]["reward"] for n, a in enumerate(r.answers)]
        assert m["objective/corrected"] == pytest.approx(sum(better) / len(better))
    assert (watch.agents[0].fixed <= watch.agents[0].chances).all()
    watch.rollouts.clear()
    go(small, tmp_path / "idle", task, kl_coef=0.1, coef=0.0, noop=False)
    assert all(abs(a["kl"]) < 1e-4 for r in watch.train() for a in r.answers)  # nothing added, nothing to pay
    assert (run / "final.json").exists()


def test_streaming_equals_cached(small, tmp_path, watch):
    """--kv-cache-gb 0 prefills every batch anew; the first update's rollouts are those of the cached path."""
    go(small, tmp_path / "cached")
    assert all(len(r.held) == 8 for r in watch.train())
    [cached] = watch.train()[:1]
    watch.rollouts.clear()
    go(small, tmp_path / "streamed", kv_cache_gb=0.0)
    assert all(sorted(r.held) == sorted(p.row["id"] for p in r.prompts) for r in watch.train())  # this batch only
    [streamed] = watch.train()[:1]
    assert [p.row["id"] for p in cached.prompts] == [p.row["id"] for p in streamed.prompts]
    assert [(a["tokens"], a["reward"]) for a in cached.answers] == [(a["tokens"],
                                                                     a["reward"]) for a in streamed.answers]
    for key, v in cached.decisions[0].items():
        assert torch.allclose(v.float(), streamed.decisions[0][key].float(), atol=1e-3), key


def test_best_checkpoint_is_the_best_on_validation(small, tmp_path, watch):
    run = go(small, tmp_path, epochs=4, eval_every=1, learning_rate=0.02)
    metrics, final = lines(run / "metrics.jsonl"), json.loads((run / "final.json").read_text())
    scores = [m["objective/val_reward"] for m in metrics]
    with safe_open(run / "best.safetensors", "pt") as f:
        state = json.loads(f.metadata()["crl"])
    assert state["best"] == max(scores) and final["best_update"] == state["update"] == 1 + scores.index(max(scores))


# --------------------------------------------------------------------------------------------------------------- resume
def interrupt(monkeypatch, update, error=None):
    """Ctrl-C (or an error) while the given update is under way."""
    original, calls = crl_ppo.torch.rand, []

    def interrupting(*a, **k):
        if len(a) == 5:  # the numbers behind an update's draws
            calls.append(1)
            if len(calls) == update:
                if error:
                    raise error
                crl_ppo.signal.raise_signal(crl_ppo.signal.SIGINT)
        return original(*a, **k)
    monkeypatch.setattr(crl_ppo.torch, "rand", interrupting)


@pytest.mark.parametrize("task, how, kw", [
    ("one", "ctrl-c", {}), ("one", "crash", dict(save_every=2)), ("one", "ctrl-c", dict(kv_cache_gb=0.0)),
    ("long", "ctrl-c", dict(screen=True, noop=True)),
    ("one", "ctrl-c", dict(screen=True, kv_cache_gb=0.0)),
    ("long", "ctrl-c", {}),
    ("long", "crash", dict(save_every=1, sae=("none",), layer=(1, 2), sticky=0.5, sticky_final=0.0, signed=True))])
def test_resumed_run_equals_the_uninterrupted_one(small, tmp_path, monkeypatch, task, how, kw):
    kw = dict(epochs=3, eval_every=2, **kw)  # six updates
    whole = go(small, tmp_path / "whole", task, **kw)
    with monkeypatch.context() as m:
        interrupt(m, 4 if how == "crash" else 3, RuntimeError("the machine went down") if how == "crash" else None)
        if how == "crash":
            with pytest.raises(RuntimeError):
                go(small, tmp_path / "parts", task, **kw)
        else:
            go(small, tmp_path / "parts", task, **kw)
    [run] = (tmp_path / "parts").iterdir()
    assert len(lines(run / "metrics.jsonl")) == 3 and not (run / "final.json").exists()
    assert crl_ppo.main(crl_ppo.Args(resume=str(run))) == run
    for name in ("last.safetensors", "best.safetensors"):
        a, b = load_file(whole / name), load_file(run / name)
        assert a.keys() == b.keys() and any("pool" in key for key in a)
        assert name == "best.safetensors" or any("adam" in key for key in a)
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"
    assert curves(whole) == curves(run)
    assert (whole / "interventions.jsonl").read_text() == (run / "interventions.jsonl").read_text()


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """A run that was stopped after two of four updates; tests damage copies of it."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(crl_ppo, "hub_reachable", lambda: False)
        interrupt(m, 2)
        return crl_ppo.main(small_run.flags(small, tmp_path_factory.mktemp("stopped"), save_every=1))


def refuses(tmp_path, stopped, damage, *words, **flags):
    run = tmp_path / "copy"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped, run)
    damage(run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(SystemExit) as exit:
        crl_ppo.main(crl_ppo.Args(resume=str(run), **flags))
    message = str(exit.value.code)
    assert message.startswith("crl: ") and "\n" not in message
    assert all(str(word) in message for word in words), message
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def rewrite(name="last.safetensors", header=None, **fields):
    """Damage that saves the checkpoint again with other state fields, or with another header."""
    def damage(run):
        with safe_open(run / name, "pt") as f:
            state = json.loads(f.metadata()["crl"])
        assert fields.keys() <= state.keys()
        save_file(load_file(run / name), run / name,
                  metadata=header if header is not None else {"crl": json.dumps(state | fields)})
    return damage


def test_truncated_and_foreign_checkpoints(tmp_path, stopped):
    last = "last.safetensors"
    for keep in (0, 7, 200, -1):
        refuses(tmp_path, stopped, lambda run: (run / last).write_bytes((run / last).read_bytes()[:keep]), last,
                "not a readable")
    refuses(tmp_path, stopped, lambda run: (run / last).write_text("not weights " * 99), last, "not a readable")
    refuses(tmp_path, stopped, rewrite(header={"format": "pt"}), last, "not a readable", "crl")
    refuses(tmp_path, stopped, rewrite(header={"crl": "{"}), last, "not a readable")
    refuses(tmp_path, stopped, lambda run: (run / last).unlink(), "no checkpoint", last)
    refuses(tmp_path, stopped, lambda run: save_file({"agent.0.pool": torch.ones(3)}, run / last,
                                                     metadata=metadata(stopped / last)),
            "agent.0.", "differs: checkpoint None")


def metadata(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


@pytest.mark.parametrize("field, value", [
    ("schema", 0), ("task", "mmlu"), ("model", "other"), ("model_hash", "0" * 16), ("sae", ["other"]),
    ("sae_hash", ["0" * 16]),
    ("layer", [2]), ("data_hash", "0" * 16)])
def test_mismatching_checkpoint_names_the_field(tmp_path, stopped, field, value):
    refuses(tmp_path, stopped, rewrite(**{field: value}), "last.safetensors", f"{field} differs", repr(value))


def edit_args(**fields):
    def damage(run):
        stored = json.loads((run / "args.json").read_text())
        stored["args"] |= fields
        (run / "args.json").write_text(json.dumps(stored))
    return damage


def test_resume_with_other_flags_or_without_a_run(tmp_path, stopped):
    def nothing(run):
        pass
    refuses(tmp_path, stopped, nothing, "seed differs", "has 1", "line 5", seed=5)
    refuses(tmp_path, stopped, nothing, "sae differs", sae=("none",))
    refuses(tmp_path, stopped, lambda run: (run / "args.json").unlink(), "no readable args.json")
    refuses(tmp_path, stopped, lambda run: (run / "args.json").write_text("{"), "no readable args.json")
    refuses(tmp_path, stopped, edit_args(hidden=4), "agent.0.policy.0.weight differs", "(8, 16)", "(4, 16)")
    refuses(tmp_path, stopped, edit_args(a_flag_of_another_version=1), "args.json", "a_flag_of_another_version")
    with pytest.raises(SystemExit, match="no readable args.json"):
        crl_ppo.main(crl_ppo.Args(resume=str(tmp_path / "nowhere")))


def test_other_weights_under_the_same_name(small, tmp_path, stopped):
    """The model or the SAE was replaced between the two parts of a run."""
    copy = tmp_path / "small"
    shutil.copytree(small, copy)
    stored = json.loads((stopped / "args.json").read_text())["args"]
    here = dict(model=str(copy / "model"), sae=[str(copy / "sae")])
    weights = load_file(copy / "sae" / "sae_weights.safetensors")
    weights["W_dec"][0, 0] += 1
    save_file(weights, copy / "sae" / "sae_weights.safetensors")
    refuses(tmp_path, stopped, edit_args(sae=here["sae"]), "sae_hash differs")
    weights = load_file(copy / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, copy / "model" / "model.safetensors", metadata={"format": "pt"})

    def swap(run):
        os.rename(small / "model", small / "kept")
        os.rename(copy / "model", small / "model")
    try:
        refuses(tmp_path, stopped, swap, "model_hash differs")
    finally:
        shutil.rmtree(small / "model")
        os.rename(small / "kept", small / "model")
    assert stored["model"] == str(small / "model")


# -------------------------------------------------------------------------------------------------------- two processes
def launch(small, run_dir, world, given):
    """The script in `world` processes joined by gloo; returns its run directory."""
    flags = dataclasses.asdict(small_run.flags(small, run_dir, **given))
    flags = {k: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in flags.items()
             if v not in (None, ()) and v is not True and v is not False}
    words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), OMP_NUM_THREADS="1",
                            HF_HUB_OFFLINE="1")
    jobs = [subprocess.Popen([sys.executable, crl_ppo.__file__, *words], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(world)]
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * world, "\n".join(said)
    [run] = Path(run_dir).iterdir()
    return run


def test_two_processes_give_the_single_process_gradients(small, tmp_path):
    """One update of four minibatches; Adam's first moment is the average of the gradients it saw."""
    same = dict(samples=8, val_samples=4, batch_prompts=8, group=4, epochs=1, update_epochs=1)
    one, two = go(small, tmp_path / "one", **same), launch(small, tmp_path / "two", 2, same)
    a, b = load_file(one / "last.safetensors"), load_file(two / "last.safetensors")
    assert sum("exp_avg" in key for key in a) > 20
    for key in a:
        if key.startswith(("agent", "adam")):
            assert torch.allclose(a[key].double(), b[key].double(), rtol=1e-4, atol=1e-5), key
    for key in [key for key in a if key.endswith(".exp_avg")]:
        assert a[key].abs().max() > 1e-5, f"{key}: a gradient to compare"
    for m, n in zip(curves(one), curves(two), strict=True):
        assert m == pytest.approx(n, abs=1e-3, rel=1e-2)


def test_two_processes_share_the_screening(small, tmp_path):
    run = launch(small, tmp_path, 2, dict(samples=8, batch_prompts=8, epochs=1, screen="True"))
    agent = {key.split(".")[-1]: v for key, v in load_file(run / "last.safetensors").items() if key.startswith("agent")}
    assert agent["chances"].min() >= 1 and agent["chances"].max() > 1 and (agent["fixed"] <= agent["chances"]).all()


# ------------------------------------------------------------------------------------------- probe tasks of the learner
class Probe:
    """An environment in the place of the language model: observations in, actions out, a reward that is known.

    observe(prompt, t, history) -> (d,); reward(prompt, actions) -> 0/1. The actions are read off what the policy adds
    (own basis, absolute coefficient 1, so the direction of action a is the a-th unit vector)."""

    def __init__(self, monkeypatch, D, T, observe, reward, contexts=2, prompts=16):
        self.T, self.D, self.observe, self.reward = T, D, observe, reward
        rows = [{"id": str(i), "prompt": f"context {i % contexts}", "choices": ["x", "y"], "answer": 0, "meta": {},
                 "z": i % contexts,
                 "noise": 0.3 * torch.randn(D, generator=torch.Generator().manual_seed(i))} for i in range(2 * prompts)]
        cfg = SimpleNamespace(hidden_size=D, num_attention_heads=1, num_key_value_heads=1, head_dim=D)
        cfg.get_text_config = lambda: cfg
        self.lm = SimpleNamespace(model=SimpleNamespace(config=cfg, dtype=torch.float32), name="probe",
                                  layers=[None] * 3, micro_batch=64, update_batch=2**31,
                                  device=torch.device("cpu"), tok=SimpleNamespace(decode=lambda ids, **k: ""))
        made = [crl_ppo.Prompt(row, [0]) for row in rows]

        def set_up(args):
            for key, value in crl_ppo.ONE.items():
                if getattr(args, key, 0) is None:
                    setattr(args, key, value)
            W = torch.eye(D)
            site = crl_ppo.Site(1, torch.cat([W, torch.zeros(1, D)]) if args.noop else W, None, "probe", "0", D, False,
                                args.noop, {})
            parts = {"train": made[:prompts], "val": made[prompts:], "test": []}
            return self.lm, [site], parts, {"schema": crl_ppo.SCHEMA, "task": "probe", "source": "probe"}

        def reference(lm, sites, args, prompts, look=None):
            for p in prompts:
                p.x = self.observe(p.row, 0, [])
                p.ref = {"tokens": [0] * T, "text": "", "reward": 0.0, "free": 0.0, "constrained": 0.0, "valid": True}

        def calibrate(lm, agents, args, prompts):
            reference(lm, None, args, prompts)

        monkeypatch.setattr(crl_ppo, "check_args", lambda args: None)
        monkeypatch.setattr(crl_ppo, "set_up", set_up)
        monkeypatch.setattr(crl_ppo, "reference", reference)
        monkeypatch.setattr(crl_ppo, "calibrate", calibrate)
        monkeypatch.setattr(crl_ppo, "answer", self.answer)
        monkeypatch.setattr(crl_ppo, "unsteered_next", lambda lm, prompts, answers: ([[0] * T] * len(prompts), None))

    def read(self, added):
        """Added vectors (..., D) -> actions; D where nothing was added."""
        return torch.where(added.abs().sum(-1) > 0.5, added.argmax(-1), self.D)

    def answer(self, lm, agents, args, prompts, counts, decide):
        owner = [p.row for p, count in zip(prompts, counts) for _ in range(count)]
        actions = torch.zeros(len(owner), self.T, dtype=torch.long)
        for t in range(self.T):
            if self.T == 1:  # rollouts of a prompt share their state
                x = torch.stack([self.observe(p.row, 0, []) for p in prompts])
                picks = self.read(decide(0, x, 0, torch.arange(len(prompts))))  # (B, G)
                actions[:, 0] = torch.cat([row[:count] for row, count in zip(picks, counts)])
            else:
                x = torch.stack([self.observe(row, t, actions[r, :t].tolist()) for r, row in enumerate(owner)])
                actions[:, t] = self.read(decide(0, x, t, torch.arange(len(owner))))[:, 0]
        rewards = [float(self.reward(row, done)) for row, done in zip(owner, actions.tolist())]
        return [{"tokens": [0] * self.T, "text": "", "valid": True, "free": r, "constrained": r, "reward": r, "kl": 0.0}
                for r in rewards]

    def train(self, tmp_path, **kw):
        """Final greedy reward on contexts the policy has not seen, and the run directory."""
        given = dict(task="probe", run_dir=str(tmp_path), coef=1.0, coef_mode="abs", noop=False, max_new_tokens=self.T,
                     batch_prompts=16,
                     group=16, epochs=40, hidden=32, learning_rate=3e-3, ent_coef=0.01, epsilon=0.5, epsilon_final=0.0,
                     sticky=0.0,
                     sticky_final=0.0, pool=8, afm="none", table_every=0, min_trials=1, device="cpu", eval_every=40)
        run = crl_ppo.main(crl_ppo.Args(**{**given, **kw}))
        return lines(run / "metrics.jsonl")[-1]["objective/val_reward"], run


def one_of_two(row, t, history):
    """Two contexts: opposite patterns in eight dimensions, below noise in all."""
    x = row["noise"].clone()
    x[:8] += 1.0 if row["z"] else -1.0
    return x


@pytest.mark.parametrize("kw", [dict(afm="none"), dict(afm="adaptive"), dict(afm="adaptive", algo="grpo"),
                                dict(head="dictionary", afm="none")],
                         ids=lambda kw: "-".join(kw.values()))
def test_probe_one_good_feature_among_64(tmp_path, monkeypatch, kw):
    probe = Probe(monkeypatch, 64, 1, one_of_two, lambda row, actions: actions[0] == 37)
    assert probe.train(tmp_path, **kw)[0] > 0.9


@pytest.mark.parametrize("kw", [dict(afm="none"), dict(afm="adaptive"), dict(afm="adaptive", algo="grpo")],
                         ids=lambda kw: "-".join(kw.values()))
def test_probe_good_feature_depends_on_the_observation(tmp_path, monkeypatch, kw):
    probe = Probe(monkeypatch, 64, 1, one_of_two, lambda row, actions: actions[0] == (41 if row["z"] else 5))
    reward, run = probe.train(tmp_path, **kw)
    final = json.loads((run / "final.json").read_text())
    assert reward > 0.9 and final["constant"] <= 0.5 and final["features_used"] >= 2


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_probe_delayed_reward_is_credited_to_the_right_step(tmp_path, monkeypatch, lam):
    """Feature 7 at the second of four tokens decides, and spoils the answer at any other; only the end pays. With
    lambda 0 the credit can reach that token through the critic alone, which sees at the next one what was pulled."""
    def observe(row, t, history):
        x = 0.1 * row["noise"].clone()
        x[t] += 1.0
        x[8] += float(history[1:2] == [7] and history.count(7) == 1)
        x[9] += float(7 in history)
        return x

    probe = Probe(monkeypatch, 12, 4, observe, lambda row, actions: actions.count(7) == 1 and actions[1] == 7)
    watched = []
    original = crl_ppo.rollout

    def rollout(*a, **k):
        out = original(*a, **k)
        watched.append((a[1][0], out))
        return out
    monkeypatch.setattr(crl_ppo, "rollout", rollout)
    reward, run = probe.train(tmp_path, gae_lambda=lam, epochs=60, eval_every=60, epsilon=0.3, baseline="none")
    assert reward > 0.9
    agent = watched[-1][0]
    crl_ppo.load_checkpoint(run / "last.safetensors", {}, [agent])
    row = {"z": 0, "noise": torch.zeros(12)}
    after = {a: agent.critic(agent.observe(observe(row, 2, [0, a])[None], 2)).item() for a in (7, 3)}
    assert after[7] > 0.6 and after[3] < 0.4, after  # the critic separates outcomes before they are paid


class Tempted(crl_ppo.Agent):
    """Starts with a strong liking for feature 3."""

    def __init__(self, args, site):
        super().__init__(args, site)
        self.action_bias.data[3] = 14.0


def test_probe_tempting_feature_is_masked(tmp_path, monkeypatch):
    """Without exploration by epsilon the policy picks feature 3 only, which never helps; AFM has to take it away."""
    probe = Probe(monkeypatch, 64, 1, one_of_two, lambda row, actions: actions[0] == 20)
    monkeypatch.setattr(crl_ppo, "Agent", Tempted)
    seen, original = [], crl_ppo.rollout

    def rollout(lm, agents, args, prompts, *a, **k):
        answers, decisions = original(lm, agents, args, prompts, *a, **k)
        if not k:
            seen.append((bool(decisions[0]["mask"][:, 3].any()), float((decisions[0]["actions"] == 3).float().mean())))
        return answers, decisions
    monkeypatch.setattr(crl_ppo, "rollout", rollout)
    stuck, _ = probe.train(tmp_path / "none", afm="none", epsilon=0.0, ent_coef=0.0)
    assert stuck == 0.0 and all(allowed and share > 0.9 for allowed, share in seen[:20])
    seen.clear()
    learned, _ = probe.train(tmp_path / "adaptive", afm="adaptive", epsilon=0.0)
    assert learned > 0.9 and seen[0] == (True, pytest.approx(1, abs=0.1)) and (False, 0.0) in seen[1:4]
    seen.clear()
    probe.train(tmp_path / "whole", afm="adaptive", epsilon=0.0, pool=64, epochs=3)  # a pool that never shrinks
    assert (False, 0.0) in seen[1:]
