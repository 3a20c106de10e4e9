"""crl_eval.py on tiny models: conditions by hand, what choices read, resume, other tasks, refusals."""

import dataclasses
import gc
import itertools
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import small_run
import tiny
import torch
from scipy.optimize import minimize

import crl_eval
import crl_ppo
import crl_runs
import crl_stats
import crl_tasks
from crl_tasks import Prompt, hub

ALL = crl_stats.CONDITIONS
SCORE_TOKENS = crl_tasks.score_tokens


def opts(out, *runs, **kw):
    return crl_eval.Args(run=tuple(map(str, runs)), out=str(out), **kw)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs that are right half of the time: two seeds of a letter task; long ones, one in two decisions."""
    gc.freeze()  # accelerate collects garbage before every batch
    kinds = {"one": dict(pool=6), "two": dict(pool=6, seed=2), "long": dict(task="long", coef=(1.0, 2.0))}
    kinds["turns"] = dict(task="long", seed=3, decisions=2, steer_tokens=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_eval, "RATES", (1e-2,))
        with small_run.world(tmp_path_factory.mktemp("eval"), **kinds) as made:
            yield made


def load(world, kind, tmp, **kw):
    """A Study of a run on its test prompts; the run has none, so that no choice can read them."""
    run = crl_runs.load_run(opts(tmp, **kw), world[1][kind])
    (tmp / "parts").mkdir(exist_ok=True)
    return crl_runs.study_of(run, run.args, run.prompts.pop("test"))


def lines(study, condition):
    return tiny.lines(crl_eval.part(study, condition))


def by_hand(env, prompt, actions):
    """Answer under actions (T,): full forward passes without cache, batch or shared beginning."""
    return tiny.plain_answer(env, prompt, env.args.max_new_tokens, tiny.held(env, actions))


# ----------------------------------------------------------------------- choices among the mask's actions
@pytest.mark.parametrize("kind", ["one", "long", "turns"])
def test_steered_answers_by_hand(world, tmp_path, kind):
    study = load(world, kind, tmp_path)
    assert crl_eval.crl(study).shape == (len(study.env.prompts), 1, study.args.decisions)
    assert len(set(map(str, crl_eval.crl(study).tolist()))) > 1  # the choice hangs on the prompt
    crl_eval.evaluate([study], ["unsteered", "crl", "shuffled", "random"])
    noop = crl_eval.unsteered(study)
    expected = {"unsteered": noop, "crl": crl_eval.crl(study), "shuffled": crl_eval.shuffled(study)}
    for condition, actions in expected.items():
        for n, line in enumerate(lines(study, condition)):
            tokens = by_hand(study.env, study.env.prompts[n], actions[n, 0])
            assert line["text"] == study.env.tok.decode(tokens, skip_special_tokens=kind != "one")
            assert line["tokens"] == len(tokens) and line["reward"] == sum(tokens) % 2
            assert line["actions"] == [study.env.describe(action) for action in actions[n, 0].tolist()]
    everything = study.run.all_actions
    everything.args = study.args
    names = [everything.describe(action) for action in range(everything.noop + 1)]
    for line in lines(study, "random")[::7]:
        prompt = next(p for p in study.env.prompts if p.row["id"] == line["id"])
        tokens = by_hand(everything, prompt, [names.index(action) for action in line["actions"]])
        assert line["text"] == study.env.tok.decode(tokens, skip_special_tokens=kind != "one")
    # CRL is the greedy policy of training
    run = study.run
    env = crl_eval.beside(run.env, run.prompts["val"])
    rows = torch.arange(len(env.prompts))
    env.rewards(rows, torch.tensor([env.noop]))
    greedy = crl_ppo.rollout(env, run.agent, rows, greedy=True)
    chosen = crl_eval.crl(crl_runs.Study(run, run.args, env))
    assert torch.equal(chosen, greedy.actions.permute(1, 2, 0))
    assert crl_eval.complete(env, chosen) == greedy.completions


def test_random_and_shuffled_actions(monkeypatch):
    sites = [tiny.tiny_site(1, n=5), tiny.tiny_site(2, n=7)]
    everything = tiny.tiny_env("llama", sites=sites, coef=(0.5, -0.5))
    env = crl_eval.beside(everything, [])
    env.keep(torch.tensor([1, 6, 11, 20, everything.noop]))
    own = torch.randint(5, (300, 16, 2), generator=torch.Generator().manual_seed(0))
    drawn = crl_eval.draw_actions(env, everything, own, torch.Generator().manual_seed(1))
    for kept in range(5):
        site, _, coef = env.actions[kept]
        found = [everything.actions[action] for action in drawn[own == kept].tolist()]
        assert {(other, strength) for other, _, strength in found} == {(site, coef)}
        counts = np.bincount([feature for _, feature, _ in found])  # every feature about as often
        assert len(counts) == (len(sites[site].directions) if site >= 0 else 1)
        assert counts.min() > 0.8 * counts.max()
    monkeypatch.setattr(crl_eval, "crl", lambda study: torch.arange(20).view(20, 1, 1))
    for seed in range(5):
        run = SimpleNamespace(generator=partial(torch.Generator().manual_seed, seed))
        study = SimpleNamespace(run=run, env=SimpleNamespace(prompts=range(20)))
        mixed = crl_eval.shuffled(study).flatten()
        assert sorted(mixed) == list(range(20)) and (mixed != torch.arange(20)).all()
    seeds = set()
    for args in (SimpleNamespace(seed=s, fold=f) for s in (1, 2) for f in (0, 1)):
        seeds.add(crl_runs.Run.generator(SimpleNamespace(args=args)).initial_seed())
    assert len(seeds) == 4


@pytest.mark.parametrize("kind", ["one", "turns"])
def test_candidates_are_tried_on_all_training_and_validation_prompts(world, tmp_path, kind):
    run = load(world, kind, tmp_path).run
    sequences, rewards = crl_eval.candidates(run)
    assert sequences[0].unique().tolist() == [run.env.noop] and len(sequences) == 1 + len(run.sequences)
    means = rewards[: run.n].mean(0)[1:]
    assert (means[:-1] >= means[1:]).all()
    for n, s in np.ndindex(len(run.env.prompts), len(sequences)):
        assert rewards[n, s] == sum(by_hand(run.env, run.env.prompts[n], sequences[s])) % 2


def fake_study(right, kinds, n, monkeypatch):
    """A study of a run whose prompts (n of training) earn `right` (N, 1 + S) under actions 9, 0, 1..."""
    sequences = torch.tensor([[9], *([s] for s in range(right.shape[1] - 1))])
    monkeypatch.setattr(crl_eval, "candidates", lambda run: (sequences, right))
    prompts = []
    for kind in kinds:
        prompts.append(Prompt({"answer": kind, "choices": ["a", "b"], "task": "mmlu"}, [0], []))
    agent = SimpleNamespace(observe=lambda x, t: 3 * x)
    obs = torch.eye(2)[torch.tensor(kinds)][:, None]
    parts = {"train": prompts[:n], "val": prompts[n:]}
    run = SimpleNamespace(env=SimpleNamespace(obs=obs, prompts=prompts), agent=agent, prompts=parts, n=n)
    there = SimpleNamespace(prompts=prompts[:3], noop=9)
    args = SimpleNamespace(decisions=1)
    return SimpleNamespace(run=run, env=there, args=args, observe=lambda: agent.observe(obs[:3, 0], 0))


def test_constant_best_and_probe_switch_by_hand_or_the_no_op(monkeypatch):
    """Six prompts, three of them of training; column 0 is the no-op, column 5 is not among the best four.

    Then eight of two kinds to learn from, four to choose by; action 0 is for kind 0, 1 for kind 1."""
    rows = ("011100", "010110", "011000", "001000", "001011", "011001")
    right = torch.tensor([[float(c) for c in row] for row in rows])
    study = fake_study(right, [0] * 6, 3, monkeypatch)
    assert crl_eval.constant_best(study).flatten().tolist() == [1, 1, 1]
    right[3:, 1:5] = 0
    assert crl_eval.constant_best(study).flatten().tolist() == [9, 9, 9]  # abstains, though action 4 gains
    kinds = torch.tensor([0, 1] * 6)
    right = torch.stack([kinds > 1, kinds == 0, kinds == 1, torch.arange(12) % 3 > 0], 1).float()
    study = fake_study(right, kinds.tolist(), 8, monkeypatch)
    monkeypatch.setattr(crl_eval, "fit_switch", crl_eval.fit_switch.__wrapped__)
    assert crl_eval.probe_switch(study).flatten().tolist() == [0, 1, 0]
    right[8:] = 1 - right[8:]  # on validation the no-op is the best
    assert crl_eval.probe_switch(study).flatten().tolist() == [9, 9, 9]


def test_a_probe_needs_two_classes_to_tell_apart(world, tmp_path, monkeypatch):
    def run(*answers, task="xstest"):
        rows = [{"answer": a, "task": task, "choices": None} for a in answers]
        return SimpleNamespace(prompts={"train": [Prompt(row, [0], []) for row in rows]})

    assert crl_eval.has_classes(run("unsafe", "safe")) and not crl_eval.has_classes(run("unsafe", "unsafe"))
    written = run("1", "2", task="gsm8k")
    assert not crl_eval.has_classes(written)
    written.prompts["train"] += run("unsafe").prompts["train"]  # of a file: some rows without a class
    assert not crl_eval.has_classes(written)
    study = load(world, "one", tmp_path)
    monkeypatch.setattr(crl_eval, "has_classes", lambda run: False)
    crl_eval.evaluate([study], ["unsteered", "probe_switch"])
    assert crl_eval.part(study, "unsteered").exists() and not crl_eval.part(study, "probe_switch").exists()


@pytest.mark.parametrize("best", [2, None])
def test_vector_and_multiple_are_chosen_on_validation_or_the_no_op(world, tmp_path, monkeypatch, best):
    scores = [0.5, 0.5, 0.5, 0.4, 0.3, 0.2] if best is None else [0.5, 0.4, 0.6, 0.8, 0.7, 0.6]
    study = load(world, "turns", tmp_path)
    run = study.run
    v = torch.randn(16)
    x = torch.randn(3, 16)
    with monkeypatch.context() as m:
        m.setattr(crl_ppo.Environment, "rewards", lambda *a: seen.append(a) or torch.tensor([scores] * 5))
        seen = []
        env, action = crl_eval.best_vector(run, {1: ("v", v)}, 0.7, "norm")
    [(asked, _, actions)] = seen
    assert asked.prompts == run.prompts["val"] and actions.tolist() == [5, 0, 1, 2, 3, 4]  # the no-op first
    size = 0.0 if best is None else 0.7 * crl_eval.MULTIPLES[best]
    added = env.add(0, x, torch.tensor(action).expand(3)) - x
    tiny.near(added, size * x.norm(dim=1, keepdim=True) * v)
    assert crl_eval.best_vector(run, {}, 1.0, "abs") == (run.env, run.env.noop)
    # and this is added at every steered token
    env, _ = crl_eval.best_vector(run, {1: ("v", v)}, 3.0, "abs")
    env.sites = [env.sites[0]._replace(directions=v[None])]
    answers = crl_eval.with_vector(study, env, 4)
    assert answers.env.args.coef_mode == "abs" and answers.env.describe(4)["coefficient"] == 12.0
    for prompt, (completion,) in zip(study.env.prompts, answers.completions, strict=True):
        assert completion == by_hand(answers.env, prompt, [4])


def test_corrsteer_and_caa_by_hand(world, tmp_path, monkeypatch):
    run = load(world, "one", tmp_path).run
    g = torch.Generator().manual_seed(0)
    right = torch.rand(30, generator=g) < 0.4
    x = torch.randn(30, 16, generator=g)
    acts = torch.rand(30, 24, generator=g)
    acts[:, 5] += 2 * right
    acts[:, 7] = 3.0  # a constant feature correlates with nothing
    acts[:, 9] -= 9 * right  # nor does a negative one count
    monkeypatch.setattr(crl_eval, "read_training", lambda run: (right, [x], [acts]))
    monkeypatch.setattr(crl_eval, "best_vector", lambda run, vectors, *how: (vectors, *how))
    vectors, *how = crl_eval.fit_corrsteer.__wrapped__(run)
    r = np.corrcoef(acts[:, 5], right)[0, 1]
    assert vectors[1][0] == f"feature 5, r = {r:.3f}" and how == [1.0, "abs"]
    W_dec = run.env.sites[0].sae.W_dec.detach()
    tiny.near(vectors[1][1], acts[right, 5].mean() * W_dec[5])
    vectors, *how = crl_eval.fit_caa.__wrapped__(run)
    v = x[right].mean(0) - x[~right].mean(0)
    tiny.near(vectors[1][1], v / v.norm())
    assert how == [1.0, "norm"]
    for value in (True, False):  # nothing to tell apart: no vector
        right[:] = value
        assert crl_eval.fit_caa.__wrapped__(run)[0] == {}
        assert crl_eval.fit_corrsteer.__wrapped__(run)[0] == {}


@pytest.mark.parametrize("kind", ["one", "long"])
def test_all_training_prompts_are_read_by_hand(world, tmp_path, kind):
    run = load(world, kind, tmp_path).run
    env = run.env
    right, (means,), (largest,) = crl_eval.read_training(run)
    for n, prompt in enumerate(run.prompts["train"]):
        completion = by_hand(env, prompt, [env.noop])
        h = tiny.plain(env, prompt.ids + completion[:-1], hidden=True)[1][len(prompt.ids) - 1 :]
        tiny.near(means[n], h.mean(0))
        tiny.near(largest[n], env.sites[0].sae.encode(h).amax(0), 1e-3)
        assert right[n] == sum(completion) % 2
    scores = crl_eval.read_letters(env)
    for n, prompt in enumerate(run.prompts["train"]):
        logits = tiny.plain(env, prompt.ids)[-1]
        tiny.near(scores[n], torch.stack([logits[forms].max() for forms in env.letters]), 1e-3)
    broken = SimpleNamespace(logits=torch.full((4, 1, 300), math.nan))
    env.model.register_forward_hook(lambda module, inputs, output: broken)
    tiny.one_line(lambda: crl_eval.read_letters.__wrapped__(env), "not finite", "float32")


# -------------------------------------------------------------------------------- other readings and prompts
def test_format_control_and_logit_bias_by_hand(world, tmp_path, monkeypatch):
    study = load(world, "one", tmp_path)
    crl_eval.evaluate([study], ["unsteered", "format_control"])
    for n, line in enumerate(lines(study, "format_control")):
        prompt = study.env.prompts[n]
        logits = tiny.plain(study.env, prompt.ids)[-1]
        offered = [logits[forms].max() for forms in study.env.letters[: len(prompt.row["choices"])]]
        assert line["text"].strip() == "ABCD"[int(torch.stack(offered).argmax())] and line["actions"] == []
    g = torch.Generator().manual_seed(0)
    many = [2 + n % 3 for n in range(60)]
    scores = torch.randn(60, 26, generator=g)
    gold = [int(torch.randint(n, (), generator=g)) for n in many]
    prompts = [Prompt({"choices": "abcd"[:n], "answer": a}, [], []) for n, a in zip(many, gold, strict=True)]
    run = SimpleNamespace(env=study.env, prompts={"train": prompts, "val": prompts}, n=60)
    monkeypatch.setattr(crl_eval, "read_letters", lambda env: torch.cat([scores, scores]))
    monkeypatch.setattr(crl_tasks, "score_tokens", SCORE_TOKENS)
    bias, share = crl_eval.fit_letters.__wrapped__(run)
    z = np.where(np.arange(4) < np.array(many)[:, None], scores[:, :4].numpy(), -np.inf)

    def loss(b):
        b = z + np.append(0.0, b)
        return (np.log(np.exp(b).sum(1)) - b[np.arange(60), gold]).mean()

    assert (bias[1:4] - bias[0]).numpy() == pytest.approx(minimize(loss, np.zeros(3)).x, abs=0.02)
    tried = {c: np.mean((z + c * bias[:4].numpy()).argmax(1) == gold) for c in (0, 0.5, 1)}
    assert tried[share] == max(tried.values())


def test_few_shot_shows_solved_training_prompts_or_none(world, tmp_path, monkeypatch):
    study = load(world, "one", tmp_path)
    seen = []
    scores = iter([0.4, 0.5, 0.5])
    monkeypatch.setattr(crl_eval, "plain", lambda env, prompts: seen.append(prompts) or [[0]] * len(prompts))
    monkeypatch.setattr(crl_eval, "mean_reward", lambda *a: next(scores))
    assert crl_eval.few_shot(study).setting == "1 shots"
    assert [len(prompts) for prompts in seen] == [5, 5, 5, len(study.env.prompts)]
    p = study.env.prompts[0]
    shot = study.run.prompts["train"][0].row
    assert seen[-1][0] == crl_tasks.encode_prompt(study.env.tok, p.row, [shot])
    assert "Answer: " + "ABCD"[shot["answer"]] in study.env.tok.decode(seen[-1][0].ids)
    scores = iter([0.5, 0.5, 0.5])
    assert crl_eval.fit_shots.__wrapped__(study.run) == 0
    study.env.context = len(p.ids) + 60  # as many as fit
    crl_eval.after_shots(study.run, study.env, [p], 4)
    assert len(p.ids) < len(seen[-1][0].ids) < study.env.context


@pytest.mark.parametrize("kind", ["one", "long"])
def test_lora_learns_and_leaves_the_model_alone(world, tmp_path, kind):
    study = load(world, kind, tmp_path)
    env = study.env
    model = env.model
    pairs = crl_eval.gold_pairs(study.run)
    before = {key: v.clone() for key, v in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]
    frozen = crl_eval.plain(env, env.prompts)

    def one_by_one():
        logp = []
        for prompt, answer in pairs:
            out = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            logp += [out[len(prompt) - 1 + t, token] for t, token in enumerate(answer)]
        return -torch.stack(logp).mean()

    for p, (_, answer) in zip(study.run.prompts["train"], pairs, strict=True):
        gold = env.tok.decode(answer, skip_special_tokens=True).strip()
        assert gold == ("ABCD"[p.row["answer"]] if kind == "one" else p.row["answer"])
    start = one_by_one()
    with crl_eval.adapted(study.run) as weights:
        assert len(weights) == 2 * 7 * 4  # two matrices on each of seven linear layers in four blocks
        assert crl_eval.plain(env, env.prompts) == frozen  # nothing is changed at first
        tiny.near(crl_eval.answer_loss(env, pairs), start)
        optimizer = torch.optim.Adam(weights.values(), lr=1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            loss = crl_eval.answer_loss(env, pairs)
            loss.backward()
            optimizer.step()
        batched = torch.autograd.grad(crl_eval.answer_loss(env, pairs), weights.values())
        alone = torch.autograd.grad(one_by_one(), weights.values())
        torch.testing.assert_close(batched, alone, rtol=1e-3, atol=1e-5)
        learnt = crl_eval.plain(env, env.prompts)
        # the shared beginning was read with the frozen weights; what is kept of it must not be used
        assert bool(env.prefix) == (kind == "long")
        assert learnt == [by_hand(env, p, [env.noop]) for p in env.prompts]
        assert crl_eval.beside(env, env.prompts).prefix == env.prefix
        kept = {name: w.detach().clone() for name, w in weights.items()}
    assert loss < 0.5 * start and learnt != frozen
    assert [type(m) for m in model.modules()] == modules
    assert not any(w.requires_grad for w in model.parameters()) and tiny.untouched(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[key]) for key, v in after.items())
    assert crl_eval.plain(env, env.prompts) == frozen
    with crl_eval.adapted(study.run, kept):
        assert crl_eval.plain(env, env.prompts) == learnt


def test_sft_chooses_rate_and_epoch_on_validation(world, tmp_path, monkeypatch):
    run = load(world, "one", tmp_path, sft_epochs=2).run
    fit = crl_eval.fit_lora.__wrapped__
    monkeypatch.setattr(crl_eval, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(crl_eval, "mean_reward", lambda *a: next(rewards))
    rewards = iter([0.4, 0.3, 0.5, 0.5, 0.6])
    assert fit(run)[1] == "learning rate 0.01, epoch 2"
    rewards = iter([0.4, 0.3, 0.4, 0.4, 0.4])
    assert fit(run) == ({}, "epoch 0")
    run.opts.sft_epochs = 15
    rewards = iter([0.4, 0.3, 0.5, 0.5, 0.4, 0.3, 0.5, 0.4, 0.4, 0.9])  # 0.9: given up before
    assert fit(run)[1] == "learning rate 0.001, epoch 2" and next(rewards) == 0.9
    rewards = iter([0.4, 1.0, 0.9, 0.9])  # nothing is better than 1: neither an epoch nor a rate follows
    monkeypatch.setattr(crl_eval, "EPOCH", 3)
    steps = []
    tiny.spy(monkeypatch, crl_eval, "answer_loss", lambda loss, env, pairs: steps.append(len(pairs)))
    assert fit(run)[1] == "learning rate 0.001, epoch 1"
    assert steps == [3] and next(rewards) == 0.9


def test_refusals_have_no_gold_text(world, tmp_path):
    env = load(world, "one", tmp_path).env
    rows = [{"answer": a, "task": "xstest", "choices": None} for a in ("unsafe", "safe", "safe")]
    run = SimpleNamespace(env=crl_eval.beside(env, [Prompt(row, [0, n], []) for n, row in enumerate(rows)]))
    run.prompts = {"train": run.env.prompts}
    run.args = SimpleNamespace(max_new_tokens=9)
    run.env.memo[:, env.noop] = torch.tensor([0.0, 1.0, 0.0])
    run.env.completions = [{env.noop: [5]}, {env.noop: [6, 1]}, {env.noop: [7]}]
    (harmful, refusal), (harmless, own) = crl_eval.gold_pairs(run)
    assert env.tok.decode(refusal) == " I'm sorry" and own == [6, 1]
    assert (harmful, harmless) == ([0, 0], [0, 1])


# ----------------------------------------------------------------------------------------- whole evaluations
@pytest.fixture(scope="module")
def whole(world):
    """Every condition, two seeds, and the long task as another one: flags, and lines of predictions.jsonl."""
    folder, runs = world
    loads = []
    other = f"file:{folder}/long.jsonl"
    given = opts(folder / "all", runs["one"], runs["two"], conditions=ALL, tasks=(other,), sft_epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        tiny.spy(patch, crl_ppo, "load_model", lambda *a: loads.append(a))
        crl_eval.main(dataclasses.replace(given))
    assert len(loads) == 1  # one model for all
    return given, tiny.lines(folder / "all" / "predictions.jsonl")


def test_predictions_are_complete(world, whole):
    out = world[0] / "all"
    frame = crl_stats.load([out / "predictions.jsonl"])
    expected = {}
    for (task, n), condition, seed in itertools.product([("one", 10), ("long", 6)], ALL, (1, 2)):
        if task == "one" or condition in crl_eval.ELSEWHERE:
            draws = 16 if condition == "random" else 1
            expected[f"file:{task}.jsonl", condition, seed] = n * draws
    assert frame.groupby(["task", "condition", "seed"]).size().to_dict() == expected
    assert {row["trained_on"] for row in whole[1]} == {"file:one.jsonl"}
    assert all(row["prompt"] for row in whole[1] if row["condition"] == "unsteered")
    for name in ("predictions.jsonl", "report.md", "summary.json"):
        assert str(world[0]) not in (out / name).read_text()


def test_the_same_bytes_again_whatever_the_batches_and_by_resume(world, whole, tmp_path, monkeypatch):
    out = shutil.copytree(world[0] / "all", tmp_path / "out")
    for name in ("random", "caa", "crl", "unsteered"):
        for part in (out / "parts").glob(f"{name}*"):
            part.unlink()
    kept = {part: part.stat().st_mtime_ns for part in (out / "parts").iterdir()}
    again = dataclasses.replace(whole[0], out=str(out), batch_size=1, resume=True)
    crl_eval.main(again)
    for name in ("predictions.jsonl", "summary.json", "report.md"):
        assert (out / name).read_bytes() == (world[0] / "all" / name).read_bytes()
    assert len(kept) == 20 and all(f.stat().st_mtime_ns == t for f, t in kept.items())
    monkeypatch.setattr(crl_eval, "complete", None)
    crl_eval.main(again)  # nothing is left to do
    with pytest.raises(TypeError):
        crl_eval.main(dataclasses.replace(again, resume=False))


def test_other_tasks_are_answered_by_the_same_policy(world, whole, tmp_path):
    run = load(world, "one", tmp_path).run
    there = crl_runs.on_task(run, f"file:{world[0]}/long.jsonl")
    assert there.args.max_new_tokens == 20 and there.run is run
    rows = {(row["task"], row["condition"], row["seed"], row["id"]): row["text"] for row in whole[1]}
    for n, p in enumerate(there.env.prompts):
        text = run.env.tok.decode(by_hand(there.env, p, crl_eval.crl(there)[n, 0]), skip_special_tokens=True)
        assert rows["file:long.jsonl", "crl", 1, p.row["id"]] == text


OTHERS = [
    ("bbq_ambig", "mmlu mmlu_pro bbq_disambig truthfulqa"),  # bbq would hold its own rows
    ("bbq", "mmlu mmlu_pro truthfulqa"),
    ("mmlu", "mmlu_pro bbq bbq_ambig bbq_disambig truthfulqa"),
    ("harmbench", "gsm8k simpleqa xstest"),
    ("file:mine.jsonl", ""),
]


@pytest.mark.parametrize("task, others", OTHERS)
def test_every_other_task_of_the_kind_is_asked(task, others):
    assert crl_runs.other_tasks(task) == others.split()


def test_other_tasks_without_rows_are_left_out_unless_named(world, tmp_path, capsys, monkeypatch):
    study = load(world, "one", tmp_path)
    run = study.run
    run.prompts["test"] = rows = [p.row for p in study.env.prompts]
    monkeypatch.setattr(crl_runs, "OTHERS", 3)
    monkeypatch.setattr(crl_runs, "other_tasks", lambda task: ["mmlu", "mmlu_pro", "bbq"])

    def load_rows(task, data_dir, fold=0):
        if task == "mmlu_pro" or fold:
            hub.fail("no rows")
        return {"test": rows if task == "mmlu" else []}, ""

    monkeypatch.setattr(crl_tasks, "load_rows", load_rows)
    run.args.fold = 1  # of its own task
    found = [(there.args.task, len(there.env.prompts)) for there in crl_runs.studies_of(run)]
    assert found == [(run.args.task, 10), ("mmlu", 3)]
    said = capsys.readouterr().out
    assert "mmlu_pro is left out: no rows\n" in said and "bbq is left out: bbq has no test prompts" in said
    run.opts.tasks = ("mmlu_pro",)
    tiny.one_line(lambda: crl_runs.studies_of(run), "no rows")
    run.opts.tasks = ("none",)
    assert len(crl_runs.studies_of(run)) == 1


def test_what_is_finished_is_kept_when_stopped(world, tmp_path, capsys, monkeypatch):
    run = load(world, "one", tmp_path).run
    there = crl_runs.on_task(run, f"file:{world[0]}/long.jsonl")
    own = crl_runs.on_task(run, run.args.task)

    def caa(study):
        raise KeyboardInterrupt

    monkeypatch.setattr(crl_eval, "OTHERWISE", (crl_eval.random, caa))
    with pytest.raises(KeyboardInterrupt):
        crl_eval.evaluate([own, there], ["unsteered", "crl", "random", "caa"])
    assert "6 conditions: about" in capsys.readouterr().out
    assert {f.name.split(".")[0] for f in (tmp_path / "parts").iterdir()} == {"unsteered", "crl", "random"}
    assert crl_eval.missing(own, ALL[:4]) == ["format_control"] and crl_eval.missing(there, ALL[:4]) == []


def test_rows_of_groups_that_the_run_has_learnt_from_are_left_out(world, tmp_path):
    study = load(world, "one", tmp_path)
    run = study.run
    run.env.prompts = run.env.prompts + study.env.prompts[:3]
    assert len(crl_runs.on_task(run, run.args.task).env.prompts) == 7
    run.prompts["shots"] = [study.env.prompts[3].row]
    assert len(crl_runs.on_task(run, run.args.task).env.prompts) == 6


def test_a_letter_takes_the_first_of_several_decisions(world, tmp_path):
    run = load(world, "turns", tmp_path).run
    there = crl_runs.on_task(run, f"file:{world[0]}/one.jsonl")
    assert there.args.decisions == there.args.max_new_tokens == 1
    crl_eval.evaluate([there], [c for c in ALL if c not in ("sft_lora", "few_shot")])
    policy = run.agent.get_policy(there.observe())
    assert crl_eval.crl(there)[:, 0, 0].tolist() == policy.logits.argmax(-1).tolist()
    best = crl_eval.constant_best(there)[0, 0, 0].item()
    for n, p in enumerate(there.env.prompts):
        for condition, action in (("crl", crl_eval.crl(there)[n, 0, 0]), ("constant_best", best)):
            (line,) = [row for row in lines(there, condition) if row["id"] == p.row["id"]]
            assert line["text"] == run.env.tok.decode(by_hand(there.env, p, [action]))
            assert line["actions"] == [there.env.describe(int(action))]
    assert not crl_eval.part(there, "format_control").exists()  # letters were not asked for in training


def test_stored_answers_are_judged_by_the_rule_of_today(world, tmp_path, monkeypatch):
    monkeypatch.setattr(crl_tasks, "score_tokens", lambda *a: (1.0, True))
    memo = load(world, "turns", tmp_path).run.env.memo
    assert set(memo[~memo.isnan()].tolist()) == {1.0}


def test_the_option_that_an_answer_names(monkeypatch):
    monkeypatch.setattr(crl_tasks, "score_tokens", SCORE_TOKENS)
    row = {"choices": ["u", "v", "w"], "answer": 0, "task": "mmlu"}
    for one in (True, False):
        env = tiny.tiny_env("llama", one=one)
        for text, named in ((" C", 2), ("x", None), (" A" if one else "The answer is A.", 0)):
            ids = env.tok.encode(text, add_special_tokens=False)
            assert crl_eval.named_option(env, row, ids) == named


def test_parts_are_of_these_prompts_answers_and_flags(world, tmp_path):
    study = load(world, "one", tmp_path)
    run = study.run
    p, *rest = study.env.prompts
    other = p._replace(row=p.row | {"answer": 1 - p.row["answer"]})
    part = crl_eval.part(study, "crl")
    longer = dataclasses.replace(study, run=dataclasses.replace(run, opts=opts(tmp_path, sft_epochs=9)))
    faster = dataclasses.replace(study, args=dataclasses.replace(study.args, batch_size=1, track=True))
    assert crl_eval.part(longer, "crl") == crl_eval.part(faster, "crl") == part
    assert crl_eval.part(longer, "sft_lora") != crl_eval.part(study, "sft_lora")
    changes = [{"env": crl_eval.beside(study.env, [other, *rest])}]
    changes.append({"args": dataclasses.replace(study.args, steer_tokens=2)})
    changes.append({"run": dataclasses.replace(run, path=world[1]["two"])})
    changes.append({"run": dataclasses.replace(run, identity=run.identity | {"test_hash": "x"})})
    for change in changes:
        assert crl_eval.part(dataclasses.replace(study, **change), "crl") != part


# ------------------------------------------------------------------------------------------------- refusals
def refused(word, *runs, **kw):
    tiny.one_line(lambda: crl_eval.main(opts(kw.pop("out", "nowhere"), *runs, **kw)), word)


def changed(world, tmp_path, kind="one", **flags):
    """A copy of a run whose args.json says something else."""
    return small_run.changed(world[1][kind], tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}", **flags)


def test_what_cannot_be_evaluated_is_refused_with_its_name(world, tmp_path):
    given = crl_eval.Args(run=("a", "b", "a"), conditions=("random,", "caa,random"), tasks=("x,,y", "x"))
    assert crl_eval.check_opts(given) == ["unsteered", "crl", "random", "caa"]
    assert given.run == ("a", "b") and given.tasks == ("x", "y")
    folder = world[0]
    one = world[1]["one"]
    sae = tiny.tiny_sae_dir(tmp_path / "sae", d_model=16, d_sae=24, hook_name=small_run.HOOK, seed=5)
    refused("--run is missing")
    refused("no readable args.json", tmp_path)
    refused("did you mean crl?", one, conditions=("crll",))
    refused("unknown task 'bbq_'", one, tasks=("bbq_",), out=tmp_path)
    refused("--test-samples", one, test_samples=-1)
    refused("updates differs", one, changed(world, tmp_path, "two", updates=99))
    refused("the run of this task, seed and fold differs", one, changed(world, tmp_path))
    refused("another version", changed(world, tmp_path, schema=1))
    refused("data", changed(world, tmp_path, seed=3))
    refused("sae_hash differs", changed(world, tmp_path, sae=[sae]))
    refused("--epsilon 9", changed(world, tmp_path, epsilon=9))
    rows = tiny.lines(folder / "one.jsonl")
    flipped = [row | {"answer": (row["answer"] + 1) % len(row["choices"])} for row in rows]
    hub.write_jsonl(folder / "one.jsonl", flipped)
    refused("data", one)  # the right answers are part of it
    hub.write_jsonl(folder / "one.jsonl", rows)
    runs = [crl_runs.load_run(opts(tmp_path), world[1][kind]) for kind in ("one", "two")]
    crl_runs.check_alike(runs)
    runs[1].identity["test_hash"] = "x"
    tiny.one_line(lambda: crl_runs.check_alike(runs), "test_hash differs")
    (folder / "model").rename(tmp_path / "model")
    tiny.save_tiny(folder / "model", "llama", d_model=16, n_layers=4, seed=5)
    refused("model_hash differs", one)
    shutil.rmtree(folder / "model")
    (tmp_path / "model").rename(folder / "model")


def test_prompts_that_do_not_fit_are_skipped_and_none_is_refused(world, tmp_path, capsys):
    study = load(world, "one", tmp_path)
    rows = [p.row for p in study.env.prompts]
    lengths = sorted(len(p.ids) for p in study.env.prompts)
    study.run.env.context = lengths[3] + 1
    fit = crl_runs.study_of(study.run, study.args, rows)
    assert len(fit.env.prompts) == sum(n <= lengths[3] for n in lengths) < len(rows)
    assert "were skipped" in capsys.readouterr().out
    study.run.env.context = math.inf
    study.run.prompts["test"] = rows
    for samples, size in ((2, 2), (0, len(rows))):
        study.run.opts.test_samples = samples
        [own] = crl_runs.studies_of(study.run)  # a file: task has no others
        assert len(own.env.prompts) == size
    tiny.one_line(lambda: crl_runs.study_of(study.run, study.args, []), "has no test prompts")
