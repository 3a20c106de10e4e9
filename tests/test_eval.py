"""crl_eval.py on tiny models: every condition by hand, what choices read, resume, batches, other tasks, refusals."""
import dataclasses
import gc
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import small_run
import tiny
import torch
from scipy.optimize import minimize

import crl_eval
import crl_ppo
import crl_stats
import crl_tasks
from crl_model import Actions, Prompt

ALL = tuple(crl_stats.CONDITIONS)


def opts(out, *runs, **kw):
    return crl_eval.Args(run=tuple(map(str, runs)), out=str(out), **kw)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs: two seeds of a one-token task, its --afm active, and long answers, right half of the time."""
    folder = small_run.build(tmp_path_factory.mktemp("eval"))
    gc.freeze()  # accelerate collects garbage before every batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_tasks, "score_answer", small_run.parity)
        patch.setattr(crl_eval, "RATES", (1e-2,))
        small = {"pool": 6, "updates": 12}
        runs = {"one": small_run.go(folder, folder / "runs", **small),
                "two": small_run.go(folder, folder / "runs", seed=2, **small),
                "active": small_run.go(folder, folder / "runs", afm="active", group=4),
                "long": small_run.go(folder, folder / "runs", "long", features=2, steer_tokens=1, coef=(1.0, 2.0),
                                     **small),
                "turns": small_run.go(folder, folder / "runs", "long", features=2, steer_tokens=3, seed=3, **small),
                "token": small_run.go(folder, folder / "runs", "long", decide="token", steer_tokens=2)}
        yield folder, runs


def load(world, kind, tmp, part="test", **kw):
    """The Study of a run before its test prompts or others; its home has none, so that no choice can read them."""
    study = crl_eval.load_study(opts(tmp, **kw), world[1][kind])
    prompts = {"test": study.prompts.pop("test"), **study.prompts}
    del study.home.prompts["test"]
    (tmp / "parts").mkdir(exist_ok=True)
    return dataclasses.replace(study, prompts=study.prompts | {"test": prompts[part]})


def lively(study):
    """With a policy whose choices hang on the prompt, instead of one that has hardly learnt."""
    for seed in range(9):
        random = torch.Generator().manual_seed(seed)
        for p in study.agent.policy.parameters():  # all layers, since learning may have saturated the first ones
            p.data.normal_(0, 3, generator=random)
        crl_eval.choose([study])
        if len(set(map(str, study.push.tolist()))) > 2:
            break
    assert len(set(map(str, study.push.tolist()))) > 2
    return study


def lines(study, condition):
    return [json.loads(line) for line in study.part(condition).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ the policy
@pytest.mark.parametrize("kind", ["one", "active", "long", "turns", "token"])
def test_crl_is_the_greedy_policy_of_training(world, tmp_path, kind):
    study = load(world, kind, tmp_path, "val")
    crl_eval.evaluate([study], ["unsteered", "crl"])
    final = json.loads((study.path / "final.json").read_text())
    for condition, title in (("unsteered", "unsteered"), ("crl", "steered")):
        for key, end in (("free", ""), ("constrained", "_constrained"), ("valid", "_valid")):
            assert np.mean([r[key] for r in lines(study, condition)]) == pytest.approx(final[title + end])
    log = [json.loads(line) for line in open(study.path / "interventions.jsonl")]
    for row in lines(study, "crl"):
        own = [entry for entry in log if entry["prompt_id"] == row["id"]]
        assert row["text"] == study.lm.tok.decode([e["token"] for e in own], skip_special_tokens=not study.one)
        assert row["tokens"] == len(own) and row["reward"] == own[0]["reward"]
        decided = [e["push"] for e in own if e["decided"]]
        assert row["push"][:len(decided)] == decided


def by_hand(study, prompt, push):
    """Greedy answer under pushes (T, k), without cache, batch or shared prefix: forward passes over the whole text."""
    lm, actions, ids, P = study.lm, study.actions, list(prompt.ids), len(prompt.ids)

    def edit(module, inputs, h):
        x = h.clone()
        for s in range(min(len(ids) - P + 1, study.args.steer_tokens or len(ids))):
            for a in push[min(s, len(push) - 1)].tolist():
                v = actions.value[a] * h[0, P - 1 + s].norm() * actions.sites[0].directions[actions.feature[a]]
                x[0, P - 1 + s] += v * (a != actions.noop)
        return x
    hook = lm.layers[1].register_forward_hook(edit)
    while len(ids) < P + study.args.max_new_tokens and not set(ids[P:]) & lm.eos:
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    hook.remove()
    return ids[P:]


@pytest.mark.parametrize("kind", ["one", "active", "long", "turns", "token"])
def test_pushed_by_hand(world, tmp_path, kind):
    study = lively(load(world, kind, tmp_path))
    if kind == "active":  # none is chosen but what the SAE reports active
        x = torch.stack([xs[1] for xs, *_ in crl_eval.read(study, study.prompts["test"])])
        assert study.actions.active([x]).gather(1, study.push[:, 0]).all()
    push = torch.stack([study.push, crl_eval.shuffled(study)[0][:, 0]], 1)  # (N, 2, T, k)
    said = crl_eval.pushed(study, study.prompts["test"], push)
    for n, p in enumerate(study.prompts["test"]):
        for answer, own in zip(said[n], [torch.full_like(push[0, 0], study.actions.noop), *push[n]], strict=True):
            assert (answer[:1] if study.one else answer) == by_hand(study, p, own)


# --------------------------------------------------------------------------------------------- conditions that push
def test_random_and_shuffled_pushes():
    sites = [tiny.tiny_site(1, n=5), tiny.tiny_site(2, n=7)]
    actions = Actions(tiny.tiny_args(coef=(0.5, -0.5, 2.0, -2.0)), sites)
    push = torch.randint(actions.noop + 1, (300, 2, 3), generator=torch.Generator().manual_seed(0))
    push[:50, :, 1:] = actions.noop
    study = SimpleNamespace(actions=actions, push=push, generator=torch.Generator().manual_seed(1))
    drawn, theirs = crl_eval.random_pushes(study)[0], push[:, None].expand(-1, 16, -1, -1)
    assert torch.equal(drawn == actions.noop, theirs == actions.noop)  # only where the policy pushes
    for same in (actions.value, actions.site):
        assert torch.equal(same[drawn], same[theirs])
    for i, size in enumerate((5, 7)):  # every feature about as often, each draw anew
        seen = actions.feature[drawn][actions.site[drawn] == i].bincount(minlength=size)
        assert len(seen) == size and seen.min() > 0.8 * seen.max() and (drawn[:, 0] != drawn[:, 1]).any()
    study.push = torch.arange(20).view(20, 1, 1)
    for mixed in (crl_eval.shuffled(study)[0].flatten() for _ in range(5)):
        assert sorted(mixed) == list(range(20)) and (mixed != torch.arange(20)).all()  # nobody keeps its own
    seeds = [SimpleNamespace(args=SimpleNamespace(seed=s, fold=f)) for s in (1, 2) for f in (0, 1)]
    assert len({crl_eval.Study.generator.fget(s).initial_seed() for s in seeds}) == 4


def test_constant_best_by_hand_or_the_no_op(monkeypatch):
    monkeypatch.setattr(crl_eval, "share_prefix", lambda *a: None)
    monkeypatch.setattr(crl_eval, "best_pushes", crl_eval.best_pushes.__wrapped__)
    rows = "11101010 11001010 10011011 01111000 01110000 01110000".split()  # three of training, three of validation
    tried, right = [], torch.tensor([[float(c) for c in row] for row in rows])

    def fit(known, truth):
        def fill(lm, actions, args, rows, push, title):
            wanted = torch.zeros(6, 8).bool()
            wanted[rows, push] = True
            tried.append(wanted)
            table.reward = torch.where(wanted, truth, table.reward)
        table = SimpleNamespace(reward=known, mask=known > 9, pushes=torch.arange(8), noop=7, prompts=[], fill=fill)
        home = SimpleNamespace(table=table, lm=None, actions=None, prompts={"train": [0] * 3}, args=tiny.tiny_args())
        return int(crl_eval.fit_constant.__wrapped__(home)[0])
    assert fit(right, right) == 1  # 0, 4, 6 and 1 are best on train, of them 1 on validation; 2 and 3 are not asked
    worse = right * (torch.arange(6) < 3)[:, None]
    assert fit(worse, worse) == 7  # abstains
    gaps, tried[:] = torch.where(torch.arange(8) == 7, right, math.nan), []
    assert fit(gaps, right) == 1  # --decide token: the table has no more than the unsteered answers
    assert tried[0][:3, :7].all() and not tried[0][3:].any()


def test_probe_switch_by_hand_or_the_no_op():
    """Eight prompts of two kinds to learn from, four to choose by; push 0 sets kind 0 right, 1 kind 1, 2 some."""
    kinds = torch.tensor([0, 1] * 6)
    right = torch.stack([kinds == 0, kinds == 1, torch.arange(12) % 3 > 0, kinds > 1], 1).float()
    rows = [Prompt({"answer": kind, "choices": ["a", "b"], "task": "mmlu"}, [0]) for kind in kinds.tolist()]
    filled = []
    table = SimpleNamespace(reward=right, x=torch.eye(2)[kinds], pushes=torch.tensor([[4], [5], [6], [9]]), noop=3,
                            prompts=[], fill=lambda lm, actions, args, rows, push, title: filled.append(rows))
    home = SimpleNamespace(table=table, agent=SimpleNamespace(observe=lambda x: 3 * x), prompts={"train": rows[:8]},
                           lm=None, actions=None, args=tiny.tiny_args())
    study = SimpleNamespace(home=home, agent=home.agent, x=table.x[:3], actions=SimpleNamespace(together=True),
                            prompts={"test": rows[:3]})
    fit = crl_eval.fit_switch.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_eval, "share_prefix", lambda *a: None)
        patch.setattr(crl_eval, "best_pushes", crl_eval.best_pushes.__wrapped__)
        patch.setattr(crl_eval, "fit_switch", fit)
        assert crl_eval.probe_switch(study)[0].flatten().tolist() == [4, 5, 4]
        assert filled[0] == slice(8) and filled[-1].tolist() == [8, 9, 10, 11]  # gaps: training, then validation
        table.reward = 1 - right  # the no-op, 1 everywhere, is the best
        table.reward[:8] = right[:8]  # on validation only
        assert crl_eval.probe_switch(study)[0].flatten().tolist() == [9, 9, 9]
    rows[0].row["choices"], rows[0].row["task"] = None, "gsm8k"
    assert fit(home) is None  # no classes


@pytest.mark.parametrize("scores,best", [([.5, .4, .6, .8, .7, .6], 2), ([.5, .5, .5, .4, .3, .2], None)])
def test_vector_and_multiple_are_chosen_on_validation_or_the_no_op(world, tmp_path, monkeypatch, scores, best):
    home, seen = load(world, "one", tmp_path).home, []
    monkeypatch.setattr(crl_eval, "pushed", lambda home, ps, push, *a: seen.extend([ps, push]) or [range(6)] * 5)
    monkeypatch.setattr(crl_eval, "mean_reward", lambda home, ps, said: scores[said[0]])
    v, x = torch.randn(16), torch.randn(3, 16)
    push, actions = crl_eval.best_vector(home, {1: ("v", v)}, 0.7, "norm")
    assert seen[0] is home.prompts["val"] and seen[1][0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]
    size = 0.0 if best is None else 0.7 * crl_eval.MULTIPLES[best]
    torch.testing.assert_close(actions.added(0, x, push.expand(3, 1)), size * x.norm(dim=1, keepdim=True) * v)
    assert crl_eval.best_vector(home, {}, 1.0, "abs") == (torch.tensor([home.actions.noop]), None)


def test_corrsteer_and_caa_by_hand(world, tmp_path, monkeypatch):
    home, g = load(world, "one", tmp_path).home, torch.Generator().manual_seed(0)
    right, x = torch.rand(30, generator=g) < 0.4, torch.randn(30, 16, generator=g)
    acts = torch.rand(30, 24, generator=g)
    acts[:, 5] += 2 * right
    acts[:, 7] = 3.0  # a constant feature correlates with nothing
    acts[:, 9] -= 9 * right  # nor does a negative one count
    monkeypatch.setattr(crl_eval, "read_training", lambda home: (right, {1: x}, {1: acts}, None))
    monkeypatch.setattr(crl_eval, "best_vector", lambda home, vectors, coef, mode: (vectors, coef, mode))
    vectors, *how = crl_eval.fit_corrsteer.__wrapped__(home)
    assert vectors[1][0] == f"feature 5, r = {np.corrcoef(acts[:, 5], right)[0, 1]:.3f}" and how == [1.0, "abs"]
    W_dec = home.actions.sites[0].sae.W_dec.detach()
    torch.testing.assert_close(vectors[1][1], acts[right, 5].mean() * W_dec[5])
    vectors, *how = crl_eval.fit_caa.__wrapped__(home)
    v = x[right].mean(0) - x[~right].mean(0)
    torch.testing.assert_close(vectors[1][1], v / v.norm())
    assert how == [1.0, "norm"]
    for right in (right | True, right & False):  # nothing to tell apart: no vector
        assert crl_eval.fit_caa.__wrapped__(home)[0] == {} == crl_eval.fit_corrsteer.__wrapped__(home)[0]


@pytest.mark.parametrize("kind", ["one", "long"])
def test_all_training_prompts_are_read_by_hand(world, tmp_path, kind):
    study = load(world, kind, tmp_path)
    right, x, acts, letters = crl_eval.read_training(study.home)
    table, lm, sae = study.table, study.lm, study.actions.sites[0].sae
    assert right.tolist() == (table.reward[:8, -1] > 0).tolist()
    for n, p in enumerate(study.prompts["train"]):
        said = [0] if study.one else table.said[n][table.noop]
        out = lm.model(torch.tensor([p.ids + said[:-1]]), output_hidden_states=True)
        h = out.hidden_states[2][0, len(p.ids) - 1:]
        torch.testing.assert_close(x[1][n], h.mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(acts[1][n], sae.encode(h).amax(0), atol=1e-3, rtol=1e-3)
        if study.one:
            best = out.logits[0, -1][torch.tensor(lm.letters)].amax(-1)
            torch.testing.assert_close(letters[n], best, atol=1e-3, rtol=1e-3)


# ----------------------------------------------------------------------------- other readings, prompts or weights
def test_a_probe_needs_two_classes_to_tell_apart(world, tmp_path, monkeypatch):
    def home(*answers, task="xstest"):
        rows = [{"answer": a, "task": task, "choices": None} for a in answers]
        return SimpleNamespace(prompts={"train": [Prompt(row, [0]) for row in rows]})
    assert crl_eval.has_classes(home("unsafe", "safe")) and not crl_eval.has_classes(home("unsafe", "unsafe"))
    assert not crl_eval.has_classes(written := home("1", "2", task="gsm8k"))
    written.prompts["train"] += home("unsafe").prompts["train"]  # of a file: some rows without a class
    assert not crl_eval.has_classes(written)
    study = load(world, "one", tmp_path)
    monkeypatch.setattr(crl_eval, "has_classes", lambda home: False)
    crl_eval.evaluate([study], ["unsteered", "probe_switch"])
    assert study.part("unsteered").exists() and not study.part("probe_switch").exists()


def test_format_control_and_logit_bias_by_hand(world, tmp_path, monkeypatch):
    study = load(world, "one", tmp_path)
    crl_eval.evaluate([study], ["unsteered", "format_control"])
    for a, b in zip(lines(study, "unsteered"), lines(study, "format_control"), strict=True):
        assert b["free"] == b["constrained"] == a["constrained"] and b["valid"] and b["choice"] is not None
    g = torch.Generator().manual_seed(0)
    many, scores = [2 + n % 3 for n in range(60)], torch.randn(60, 26, generator=g)
    gold = [int(torch.randint(n, (), generator=g)) for n in many]
    prompts = [Prompt({"choices": "abcd"[:n], "answer": a}, []) for n, a in zip(many, gold)]
    home = SimpleNamespace(lm=study.lm, args=study.args, prompts={"train": prompts, "val": prompts})
    monkeypatch.setattr(crl_eval, "read_training", lambda home: (None, None, None, scores))
    monkeypatch.setattr(crl_eval, "read", lambda home, prompts: [(None, None, row) for row in scores])
    bias, share = crl_eval.fit_letters.__wrapped__(home)
    z = np.where(np.arange(4) < np.array(many)[:, None], scores[:, :4].numpy(), -np.inf)

    def loss(b):
        b = z + np.append(0.0, b)
        return (np.log(np.exp(b).sum(1)) - b[np.arange(60), gold]).mean()
    assert (bias[1:4] - bias[0]).numpy() == pytest.approx(minimize(loss, np.zeros(3)).x, abs=0.02)
    tried = {c: np.mean((z + c * bias[:4].numpy()).argmax(1) == gold) for c in (0, 0.5, 1)}
    assert tried[share] == max(tried.values())


def test_few_shot_shows_solved_training_prompts_or_none(world, tmp_path, monkeypatch):
    study, seen, scores = load(world, "one", tmp_path), [], {"0 shots": 0.4, "1 shots": 0.5, "4 shots": 0.5}
    monkeypatch.setattr(crl_eval, "plain", lambda study, ps, title: seen.append(ps) or [title] * len(ps))
    monkeypatch.setattr(crl_eval, "mean_reward", lambda home, ps, said: scores[said[0]])
    assert crl_eval.few_shot(study)[1] == "1 shots" and [len(ps) for ps in seen] == [5, 5, 5, 10]
    p, shot = study.prompts["test"][0], study.prompts["train"][0].row
    assert seen[-1][0].ids == crl_tasks.encode_prompt(study.lm.tok, p.row, [shot])
    assert "Answer: " + "ABCD"[shot["answer"]] in study.lm.tok.decode(seen[-1][0].ids)
    scores = dict.fromkeys(scores, 0.5)
    assert crl_eval.fit_shots.__wrapped__(study.home) == 0
    monkeypatch.setattr(study.lm, "context", len(p.ids) + 60)  # as many as fit
    crl_eval.after_shots(study, [p], 4)
    assert len(p.ids) < len(seen[-1][0].ids) < study.lm.context


@pytest.mark.parametrize("kind", ["one", "long"])
def test_lora_learns_and_leaves_the_model_alone(world, tmp_path, kind):
    study = load(world, kind, tmp_path)
    model, test, pairs = study.lm.model, study.prompts["test"], crl_eval.golds(study.home)
    before, kinds = {key: v.clone() for key, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    frozen, none = crl_eval.plain(study, test), torch.full((1, 1), study.actions.noop)

    def one_by_one():
        logp = []
        for p, ids in pairs:
            out = model(torch.tensor([p.ids + ids])).logits[0].log_softmax(-1)
            logp += [out[len(p.ids) - 1 + t, token] for t, token in enumerate(ids)]
        return -torch.stack(logp).mean()
    for p, ids in pairs:
        gold = study.lm.tok.decode(ids, skip_special_tokens=True).strip()
        assert gold == ("ABCD"[p.row["answer"]] if study.one else p.row["answer"])
    start = one_by_one()
    with crl_eval.adapted(study.home) as weights:
        assert len(weights) == 2 * 7 * 4  # two matrices on each of seven linear layers in four blocks
        assert crl_eval.plain(study, test) == frozen and len(pairs) == 8  # nothing is changed at first
        torch.testing.assert_close(crl_eval.answer_loss(study.lm, pairs), start)
        optimizer = torch.optim.Adam(weights.values(), lr=1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            loss = crl_eval.answer_loss(study.lm, pairs)
            loss.backward()
            optimizer.step()
        shared, each = (torch.autograd.grad(f, weights.values()) for f in (crl_eval.answer_loss(study.lm, pairs),
                                                                          one_by_one()))
        assert study.lm.prefix and all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(shared, each))
        learnt, kept = crl_eval.plain(study, test), {name: w.detach().clone() for name, w in weights.items()}
        assert [a[:1] if study.one else a for a in learnt] == [by_hand(study, p, none) for p in test]
    assert loss < 0.5 * start and learnt != frozen
    assert [type(m) for m in model.modules()] == kinds and not any(w.requires_grad for w in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[key]) for key, v in after.items())
    assert crl_eval.plain(study, test) == frozen
    with crl_eval.adapted(study.home, kept):
        assert crl_eval.plain(study, test) == learnt


def test_sft_chooses_rate_and_epoch_on_validation(world, tmp_path, monkeypatch):
    home = load(world, "one", tmp_path, sft_epochs=2).home
    monkeypatch.setattr(crl_eval, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(crl_eval, "mean_reward", lambda home, prompts, said: next(rewards))
    rewards = iter([0.4, 0.3, 0.5, 0.5, 0.6])
    assert crl_eval.fit_lora.__wrapped__(home)[1] == "learning rate 0.01, epoch 2"
    rewards = iter([0.4, 0.3, 0.4, 0.4, 0.4])
    assert crl_eval.fit_lora.__wrapped__(home) == ({}, "epoch 0")
    home.opts.sft_epochs, rewards = 15, iter([0.4, 0.3, 0.5, 0.5, 0.4, 0.3, 0.5, 0.4, 0.4, 0.9])  # 0.9: given up before
    assert crl_eval.fit_lora.__wrapped__(home)[1] == "learning rate 0.001, epoch 2" and next(rewards) == 0.9
    rewards, steps = iter([0.4, 1.0, 0.9, 0.9]), []  # nothing is better than 1: neither an epoch nor a rate follows
    monkeypatch.setattr(crl_eval, "EPOCH", 3)
    monkeypatch.setattr(crl_eval, "answer_loss", lambda lm, pairs, f=crl_eval.answer_loss: (
        steps.append(len(pairs)) or f(lm, pairs)))
    assert crl_eval.fit_lora.__wrapped__(home)[1] == "learning rate 0.001, epoch 1"
    assert steps == [3] and next(rewards) == 0.9
    rows = [{"answer": a, "task": "xstest", "choices": None} for a in ("unsafe", "safe", "safe")]  # no gold text
    said, reward = [{1: [5]}, {1: [6, 1]}, {1: [7]}], torch.tensor([[0.0, 0], [0, 1], [0, 0]])
    home = SimpleNamespace(lm=home.lm, table=SimpleNamespace(noop=1, said=said, reward=reward), one=False,
                           args=SimpleNamespace(task="xstest", max_new_tokens=9),
                           prompts={"train": [Prompt(row, [0]) for row in rows]})
    refusal, own = crl_eval.golds(home)
    assert home.lm.tok.decode(refusal[1]) == " I'm sorry" and own[1] == [6, 1]


# ------------------------------------------------------------------------------------------------ whole evaluations
@pytest.fixture(scope="module")
def whole(world):
    """Every condition, two seeds, and the long task as another one; the flags, and the lines of predictions.jsonl."""
    (folder, runs), loads, load = world, [], crl_ppo.load_model
    given = opts(folder / "all", runs["one"], runs["two"], conditions=ALL, tasks=(f"file:{folder}/long.jsonl",),
                 sft_epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_ppo, "load_model", lambda args: loads.append(args) or load(args))
        crl_eval.main(dataclasses.replace(given))
    assert len(loads) == 1  # one model for all
    return given, [json.loads(line) for line in open(folder / "all" / "predictions.jsonl")]


def test_predictions_are_complete(world, whole):
    out = world[0] / "all"
    counts = crl_stats.load([out / "predictions.jsonl"]).groupby(["task", "condition", "seed"]).size().to_dict()
    assert counts == {(f"file:{task}.jsonl", c, seed): n * (16 if c == "random" else 1) for seed in (1, 2)
                      for task, n in (("one", 10), ("long", 6)) for c in ALL
                      if task == "one" or c not in ("format_control", "logit_bias")}
    assert {row["trained_on"] for row in whole[1]} == {"file:one.jsonl"}
    assert all(row["prompt"] for row in whole[1] if row["condition"] == "unsteered")
    for name in ("predictions.jsonl", "report.md", "summary.json"):
        assert str(world[0]) not in (out / name).read_text()


def test_other_tasks_are_answered_by_the_same_policy(world, whole, tmp_path):
    study = load(world, "one", tmp_path)
    there = crl_eval.on_task(study, f"file:{world[0]}/long.jsonl")
    assert there.args.max_new_tokens == 20 and there.home is study.home
    crl_eval.choose([there])
    rows = {(row["task"], row["condition"], row["seed"], row["id"]): row["text"] for row in whole[1]}
    for n, p in enumerate(there.prompts["test"]):
        text = study.lm.tok.decode(by_hand(there, p, there.push[n]), skip_special_tokens=True)
        assert rows["file:long.jsonl", "crl", 1, p.row["id"]] == text
    study.prompts["val"] = study.prompts["val"] + study.prompts["test"][:3]  # rows of groups learnt from are left out
    assert len(crl_eval.on_task(study, study.args.task).prompts["test"]) == 7
    study.prompts["shots"] = [study.prompts["test"][3].row]
    assert len(crl_eval.on_task(study, study.args.task).prompts["test"]) == 6


def test_stored_outcomes_are_judged_by_the_rule_of_today(world, tmp_path, monkeypatch):
    monkeypatch.setattr(crl_tasks, "score_answer", lambda *a, **k: (1.0, True))
    reward = load(world, "turns", tmp_path).home.table.reward
    assert set(reward[~reward.isnan()].tolist()) == {1.0}


def test_what_is_named_twice_is_done_once():
    given = crl_eval.Args(run=("a", "b", "a"), tasks=("x,y", "x"))
    crl_eval.check_opts(given)
    assert (given.run, given.tasks) == (("a", "b"), ("x", "y"))


def test_a_run_in_turn_pushes_its_first_feature_at_a_letter(world, tmp_path):
    there = crl_eval.on_task(load(world, "turns", tmp_path), f"file:{world[0]}/one.jsonl")
    crl_eval.choose([there])
    assert there.one and there.push.shape[1:] == (2, 1)
    prompts, push = there.prompts["test"], torch.tensor([[3], [5]]).expand(len(there.push), 1, 2, 1)
    assert crl_eval.pushed(there, prompts, push) == crl_eval.pushed(there, prompts, push[:, :, :1])


def test_the_same_bytes_again_whatever_the_batches_and_by_resume(world, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(world[0] / "all", out)
    for f in (f for f in (out / "parts").iterdir() if f.name.startswith(("random", "caa", "crl", "unsteered"))):
        f.unlink()
    kept = {f: f.stat().st_mtime_ns for f in (out / "parts").iterdir()}
    again = dataclasses.replace(whole[0], out=str(out), micro_batch=1, resume=True)
    crl_eval.main(again)
    for name in ("predictions.jsonl", "summary.json", "report.md"):
        assert (out / name).read_bytes() == (world[0] / "all" / name).read_bytes()
    assert len(kept) == 28 and all(f.stat().st_mtime_ns == t for f, t in kept.items())
    monkeypatch.setattr(crl_eval, "choose", None)
    crl_eval.main(again)  # nothing is left to do
    with pytest.raises(TypeError):
        crl_eval.main(dataclasses.replace(again, resume=False))


def test_parts_are_of_these_prompts_labels_and_flags(world, tmp_path):
    study = load(world, "one", tmp_path)
    (p, *rest), args = study.prompts["test"], study.args
    for change in ({"prompts": {"test": [Prompt(p.row | {"answer": 1 - p.row["answer"]}, p.ids), *rest]}},
                   {"args": dataclasses.replace(args, steer_tokens=2)}, {"path": world[1]["two"]},
                   {"identity": study.identity | {"test_hash": "x"}}):
        assert dataclasses.replace(study, **change).part("crl") != study.part("crl")
    for handling in (dict(micro_batch=1), dict(export=("a", "b")), dict(track=True)):
        assert dataclasses.replace(study, args=dataclasses.replace(args, **handling)).part("crl") == study.part("crl")
    epochs = dataclasses.replace(study, opts=opts(tmp_path, sft_epochs=9))
    assert epochs.part("crl") == study.part("crl") and epochs.part("sft_lora") != study.part("sft_lora")


# -------------------------------------------------------------------------------------------------------- refusals
def refused(word, *runs, **kw):
    with pytest.raises(SystemExit) as e:
        crl_eval.main(opts(kw.pop("out", "nowhere"), *runs, **kw))
    assert str(e.value).startswith("crl: ") and "\n" not in str(e.value) and word in str(e.value)


def changed(world, tmp_path, kind="one", **flags):
    """A copy of a run whose args.json says something else."""
    new = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
    shutil.copytree(world[1][kind], new)
    record = json.loads((new / "args.json").read_text())
    record |= {"schema": flags.pop("schema", record["schema"]), "args": record["args"] | flags}
    (new / "args.json").write_text(json.dumps(record))
    return new


def test_what_cannot_be_evaluated_is_refused_with_its_name(world, tmp_path):
    folder, one, two = world[0], world[1]["one"], world[1]["two"]
    sae = tiny.tiny_sae_dir(tmp_path / "sae", d_model=16, d_sae=24, hook_name=small_run.HOOK, seed=5)
    refused("--run is missing")
    refused("no readable args.json", tmp_path)
    refused("did you mean crl?", one, conditions=("crll",))
    refused("unknown task 'bbq'", one, tasks=("bbq",), out=tmp_path)
    refused("--test-samples", one, test_samples=-1)
    refused("updates differs", one, changed(world, tmp_path, "two", updates=99))
    refused("the run of this task, seed and fold differs", one, changed(world, tmp_path))
    for word, flags in (("schema 1", {"schema": 1}), ("data_hash differs", {"seed": 3}), ("--hidden 9", {"hidden": 9}),
                        ("sae_hash differs", {"sae": [sae]})):
        refused(word, changed(world, tmp_path, **flags))
    rows = (folder / "one.jsonl").read_text()
    flipped = [r | {"answer": (r["answer"] + 1) % len(r["choices"])} for r in map(json.loads, rows.splitlines())]
    (folder / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in flipped))
    refused("data_hash differs", one)  # the gold answers are part of it
    (folder / "one.jsonl").write_text(rows)
    studies = [crl_eval.load_study(opts(tmp_path), run) for run in (one, two)]
    crl_eval.check_alike(studies)
    studies[1].identity["test_hash"] = "x"
    with pytest.raises(SystemExit, match="test_hash differs"):
        crl_eval.check_alike(studies)
    (folder / "model").rename(tmp_path / "model")
    tiny.save_tiny(folder / "model", "llama", d_model=16, n_layers=4, seed=5)
    refused("model_hash differs", one)
    shutil.rmtree(folder / "model")
    (tmp_path / "model").rename(folder / "model")


def test_names_are_separated_by_commas_and_spaces_and_taken_once():
    opts = crl_eval.Args(run=("a", "a"), conditions=("random,", "caa,random"), tasks=("x,,y", "x"))
    assert crl_eval.check_opts(opts) == ["unsteered", "crl", "random", "caa"]
    assert opts.run == ("a",) and opts.tasks == ("x", "y")
