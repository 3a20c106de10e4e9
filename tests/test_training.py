"""The learner: its parts by hand, on outcomes with a known best policy, and the whole script on tiny models."""
import dataclasses
import json
import math
import multiprocessing
import os
import socket
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import flags, go
from test_model import near, plain, plain_answer
from tiny import tiny_args

import crl_ppo
import crl_stats
import crl_tasks
from crl_model import Actions, Prompt, Site

FILES = {"args.json", "table.safetensors", "metrics.jsonl", "interventions.jsonl", "best.safetensors",
         "last.safetensors", "final.json"}
pytestmark = pytest.mark.usefixtures("half_right")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(run):
    return json.loads((run / "final.json").read_text())


# ------------------------------------------------------------------------------------------- outcomes that are known
class World:
    """A world in the place of the language model: right(row, actions) says whether an answer of T decisions is right,
    observe(row, t, actions so far) is what the policy reads. An action is the number of its feature."""

    def __init__(self, monkeypatch, right, observe, T=1, D=64, d=12, kinds=2, n=32):
        self.right, self.observe, self.T, self.D, self.tables = right, observe, T, D, []
        answer = dict(choices=["x", "y"], answer=1) if T == 1 else dict(choices=None, answer="x")
        noise = 0.3 * torch.randn(2 * n, d, generator=torch.Generator().manual_seed(0))
        rows = [{"id": str(i), "task": "file", "kind": i % kinds, "noise": noise[i], **answer} for i in range(2 * n)]
        self.prompts, tables = [Prompt(row, [0]) for row in rows], self.tables

        class Model:
            config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=d))

            def __call__(self, ids, logits_to_keep):
                return SimpleNamespace(logits=torch.zeros(1, logits_to_keep, 2))

        class Table(crl_ppo.Table):
            def __init__(self, *a):
                super().__init__(*a)
                tables.append(self)
        lm = SimpleNamespace(model=Model(), name="world", layers=[None] * 3, device=torch.device("cpu"), thinks=False,
                             letters=[[c, c] for c in range(26)],
                             tok=SimpleNamespace(decode=lambda ids, **k: " ".join(map(str, ids))))
        parts = {"train": self.prompts[:n], "val": self.prompts[n:], "test": [], "shots": [], "source": "world"}

        def set_up(args):
            actions = Actions(args, [Site(1, torch.randn(D, d), None, "world", "0", {})])
            return lm, actions, parts, {"schema": crl_ppo.SCHEMA, "task": "world"}

        def score(task, row, text, thinks):
            return float(right(row, [*map(int, text.split())])), True
        for name, value in (("Table", Table), ("set_up", set_up), ("answers", self.answers), ("decode", self.decode),
                            ("prefill", self.prefill)):
            monkeypatch.setattr(crl_ppo, name, value)
        monkeypatch.setattr(crl_tasks, "score_answer", score)

    def answers(self, lm, actions, args, prompts, push, begun=None):
        def said(row, push):
            done = [a["feature"] for a in actions.describe(push)]
            return [self.D] * self.T if self.T > 1 else [int(self.right(row, done))] * 2
        return [(self.observe(p.row, 0, []), None, [said(p.row, a) for a in [[actions.noop], *some]])
                for p, some in zip(prompts, push)]

    def prefill(self, lm, layers, prompts):  # a prompt is one token, and after it comes what was said
        x = [self.observe(p.row, len(p.ids) - 1, p.ids[1:]) for p in prompts]
        return None, {layer: torch.stack(x) for layer in layers}, None, None

    def decode(self, lm, actions, args, prompts, mask, cache, owner, choose):
        rows, done = [prompts[b].row for b in owner], [[] for _ in owner]
        for t in range(self.T):
            x = torch.stack([self.observe(row, t, before) for row, before in zip(rows, done)])
            for before, a in zip(done, choose(x, t, torch.arange(len(rows)))[:, 0].tolist()):
                before.append(a)
        return done

    def train(self, tmp_path, **kw):
        given = dict(task="world", run_dir=str(tmp_path), device="cpu", max_new_tokens=self.T, steer_tokens=0,
                     hidden=32, pool=8, screen=8, learning_rate=3e-3, updates=60, weight_decay=0.1,
                     group=0 if kw.get("afm", "adaptive") == "adaptive" else 16)
        return crl_ppo.main(tiny_args(**{**given, **kw}))


def by_kind(row, t, before):
    """The kind shows in a few dimensions, below noise in all."""
    x = row["noise"].clone()
    x[3 * row["kind"]:3 * row["kind"] + 3] += 1.0
    return x


def test_the_whole_learner_reaches_the_best_policy(tmp_path, monkeypatch):
    """Three kinds of prompts with a lever each (11, 22, 33), and ten features that are all right on the same 60 % of
    the prompts, whatever their kind: the best on average, and useless together."""
    def right(row, done):
        if not done:
            return int(row["id"]) % 4 == 0
        a, luck = done[0], math.sin(1e4 * (int(row["id"]) + 97 * min(done[0], 40))) % 1
        return a == 11 * (1 + row["kind"]) or luck < (0.6 if 40 <= a < 50 else 0.1)
    world = World(monkeypatch, right, by_kind, kinds=3, n=60)
    run = world.train(tmp_path, pool=6, screen=12, updates=150, learning_rate=1e-3, weight_decay=1.0)
    result, mask = final(run), set(world.tables[-1].pushes[:, 0].tolist())
    assert {11, 22, 33} < mask and mask & set(range(40, 50)) and len(mask) == 7
    rates = torch.tensor([sum(right(p.row, [a]) for p in world.prompts) / 120 for a in range(64)])
    assert set(rates.topk(6).indices.tolist()) < set(range(40, 50))  # the best on average would have been these
    assert result["steered"] > 0.95 > 0.75 > result["constant"] and result["unsteered"] == 0.25
    assert "steering helps" in result["verdict"] and result["coverage"] == 1


@pytest.mark.parametrize("good, kw", [((37, 37), dict(afm="none")), ((37, 37), {}), ((41, 5), dict(afm="none")),
                                      ((41, 5), dict(algo="grpo")), ((41, 5), dict(group=8))], ids=str)
def test_probe_good_features(tmp_path, monkeypatch, good, kw):
    """One among 64, or one that depends on the observation."""
    world = World(monkeypatch, lambda row, done: done == [good[row["kind"]]], by_kind)
    result = final(world.train(tmp_path, **kw))
    assert result["steered"] > 0.9 and result["pushes_used"] >= len(set(good)) and result["unsteered"] == 0


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_probe_delayed_reward_is_credited_to_the_right_step(tmp_path, monkeypatch, lam):
    """Feature 7 at the second of four tokens decides, and spoils the answer at any other; only the end pays. With
    lambda 0 the credit can reach that token through the critic alone, which sees at the next one what was pushed."""
    def observe(row, t, before):
        x = torch.zeros(12)
        x[t] = 1.0
        x[8], x[9] = float(before[1:2] == [7] and before.count(7) == 1), float(7 in before)
        return x
    world = World(monkeypatch, lambda row, done: done.count(7) == 1 and done[1] == 7, observe, T=4, D=12, n=16)
    run = world.train(tmp_path, decide="token", afm="none", gae_lambda=lam, group=8, batch_prompts=16, epsilon=0.3,
                      learning_rate=0.01, updates=20)
    agent, *_ = crl_ppo.load_agent(tiny_args(hidden=32), run / "last.safetensors", {})
    after = {a: agent.critic(agent.observe(observe(None, 2, [0, a])[None], 1)).item() for a in (7, 3)}
    assert final(run)["steered"] > 0.9
    assert after[7] > 0.6 and after[3] < 0.4, after  # the critic separates outcomes before they are paid


def test_probe_tempting_feature_is_masked(tmp_path, monkeypatch):
    """A policy that starts with a strong liking for a useless feature and does not explore picks it for ever; AFM takes
    it away."""
    class Tempted(crl_ppo.Agent):
        def __init__(self, args, pushes, *given):
            super().__init__(args, pushes, *given)
            self.policy[-1].bias.data += 14.0 * (pushes[:, 0] == 60)
    monkeypatch.setattr(crl_ppo, "Agent", Tempted)
    world = World(monkeypatch, lambda row, done: done == [20], by_kind)
    assert final(world.train(tmp_path / "none", afm="none", epsilon=0.0, ent_coef=0.0, updates=20))["steered"] == 0
    assert final(world.train(tmp_path / "adaptive", epsilon=0.0))["steered"] > 0.9
    assert 60 not in world.tables[-1].pushes[:, 0]


# ----------------------------------------------------------------------------------- Adaptive Feature Masking, outcomes
def test_cover_by_hand():
    """0 sets three right; 1 and 4 then add 1.5 and 2 adds 1: the first of the best; then 4 adds 1.25, then 2 adds 1."""
    reward = torch.tensor([[1., 1, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    assert crl_ppo.cover(reward, 4) == [0, 1, 4, 2] and crl_ppo.cover(reward, 99) == [0, 1, 4, 2, 3]


@pytest.mark.parametrize("all_right", [False, True])
def test_screening_halves_the_actions_on_wrong_answers_and_tries_sets_of_the_best(monkeypatch, all_right):
    def right(row, done):
        return all_right or int(row["id"]) % 2 == 0 or 5 + 10 * row["kind"] in done
    world, said = World(monkeypatch, right, by_kind, kinds=4, n=96), []
    args = tiny_args(pool=2, screen=3, features=2, micro_batch=4)
    lm, actions, parts, _ = crl_ppo.set_up(args)
    mask = crl_ppo.screen(lm, actions, args, parts["train"], said.append)
    found, asked = world.tables[:-4], world.tables[-4:]
    assert {len(table.pushes) for table in found} == {1}  # looks for wrong answers, unsteered
    sizes = [1, 1, 1, 1] if all_right else [3, 12, 12, 48]
    assert [tuple(table.reward.shape) for table in asked] == list(zip(sizes, (65, 33, 66 + 1, 9)))
    assert all_right or all(int(p.row["id"]) % 2 for table in asked for p in table.prompts)
    assert set(asked[2].pushes[:-1].flatten().tolist()) < set(asked[1].pushes[:-1, 0].tolist())  # sets of two of them
    assert mask.shape == (3, 2) and mask[-1].tolist() == [64, 64]
    assert ("every training prompt right" in said[0]) == all_right


class Beginnings(World):
    """Long answers, each of whose tokens an action decides, or what the answer has to begin with."""
    token, asked = staticmethod(lambda row, action: action % 16), frozenset()  # asked: what actions were tried after
    then = {}  # what the frozen model goes on with after a beginning

    def answers(self, lm, actions, args, prompts, push, begun=None):
        self.asked |= {tuple(p.ids) for p in prompts if args.max_new_tokens == 1}
        found = []
        for p, some in zip(prompts, push):
            said = [[self.token(p.row, a) for a in q] for q in [[actions.noop] * args.features, *some.tolist()]]
            if begun is not None:
                said[1:] = [[*start, *self.then.get(tuple(start), answer[len(start):])]
                            for start, answer in zip(begun.tolist(), said[1:])]
            said = [[answer[0], 0] for answer in said] if args.max_new_tokens == 1 else said
            found.append((torch.zeros(12), None, said))
        return found


def test_long_answers_are_screened_by_beginnings_that_are_pieces_of_answers_that_earned(monkeypatch):
    """Answers that begin with token 6 are right on half of the prompts, with 7 on the others, and nothing adds to them.
    Those that have 3 and 5 in them are right on all: the frozen model says so on half of the prompts after 8."""
    def right(row, done):
        n = int(row["id"])
        return done[0] == 6 + n % 2 or (3, 5) in zip(done, done[1:]) and (len(done) < 4 or n % 2)
    world = Beginnings(monkeypatch, right, by_kind, D=100)
    world.then = {(8,): (9, 3, 5)}
    args = tiny_args(pool=2, screen=2, max_new_tokens=2, features=2, steer_tokens=2)
    lm, actions, parts, _ = crl_ppo.set_up(args)
    mask = crl_ppo.screen(lm, actions, args, parts["train"], lambda *a: None)
    assert [a % 16 for a in mask[0].tolist()] == [3, 5] and mask[-1].tolist() == [100, 100]
    assert world.asked == {(0,), (0, 3), (0, 6), (0, 7), (0, 8), (0, 9)}, world.asked


@pytest.mark.parametrize("k", [1, 2])
def test_beginnings_of_one_token_are_tried_when_no_answer_earns(monkeypatch, k):
    world = Beginnings(monkeypatch, lambda row, done: False, by_kind, D=100)
    args = tiny_args(pool=2, screen=1, max_new_tokens=2, features=k, steer_tokens=k)
    lm, actions, parts, _ = crl_ppo.set_up(args)
    pushes = crl_ppo.opening_pushes(lm, actions, args, parts["train"])
    assert pushes.shape[1] == 1 and len({a % 16 for a in pushes[:, 0].tolist()}) == 8 and world.asked == {(0,)}


def test_features_that_share_a_first_token_are_looked_up_alone_and_then_tried_in_pairs(monkeypatch):
    world = Beginnings(monkeypatch, lambda row, done: done[0] in (3, 6), by_kind, T=2, D=100)
    args = tiny_args(pool=2, screen=2, max_new_tokens=2, features=2, steer_tokens=1)
    lm, actions, parts, _ = crl_ppo.set_up(args)
    mask = crl_ppo.screen(lm, actions, args, parts["train"], lambda *a: None)
    first, some, pairs, _ = [table.pushes[:-1] for table in world.tables[-4:]]
    assert world.asked == {(0,)}, world.asked  # no beginning goes on
    assert (first[:, 1] == 100).all() and len(some) == 32 and len(pairs) == 66 and (pairs < 100).all()
    assert set(pairs.flatten().tolist()) <= set(some[:, 0].tolist()) and mask.shape == (3, 2)


def test_actions_are_looked_up_that_bring_a_beginning_about_on_most_prompts(monkeypatch):
    """38 of 600 actions bring about token 3 on the first two prompts, a third of them on others too."""
    world = Beginnings(monkeypatch, lambda row, done: done[0] == 3, by_kind, T=2, D=600)
    world.token = lambda row, a: a % 16 if int(row["id"]) < 2 or a % 3 == 0 else 15
    args = tiny_args(screen=1, max_new_tokens=2)
    lm, actions, parts, _ = crl_ppo.set_up(args)
    pushes = crl_ppo.opening_pushes(lm, actions, args, parts["train"])
    assert pushes.shape == (128, 1)
    assert pushes[:13, 0].tolist() == [a for a in range(600) if a % 16 == a % 3 + 3 == 3]


# ------------------------------------------------------------------------------------------------- policy, GAE and loss
def random_policy(n=3, actions=10):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(n, actions, generator=g) < 0.6
    mask[:, :4], mask[:, -1] = True, False
    return 2 * torch.randn(n, actions, generator=g), mask


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_behaviour_is_the_exact_mixture_over_the_mask(epsilon):
    logits, mask = random_policy()
    p, softmax = crl_ppo.behaviour(logits, mask, epsilon).exp(), torch.where(mask, logits.exp(), 0.0)
    expected = (1 - epsilon) * softmax / softmax.sum(1, keepdim=True) + epsilon * mask / mask.sum(1, keepdim=True)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=2e-6)
    assert (p[~mask] == 0).all() and p[mask].min() > 0


def test_draws_are_as_frequent_as_they_are_likely():
    (logits, mask), draws = random_policy(1), 20000
    agent, p = crl_ppo.Agent(tiny_args(), torch.arange(10)[:, None], 10), crl_ppo.behaviour(logits, mask, 0.2)[0].exp()
    agent.policy = torch.nn.Identity()
    u = torch.rand(draws, generator=torch.Generator().manual_seed(1))
    d = crl_ppo.decide(agent, logits.expand(draws, 10), mask.expand(draws, 10), epsilon=0.2, u=u)
    chi2 = ((d["push"].bincount(minlength=10) - draws * p).square() / (draws * p + 1e-9))[mask[0]].sum()
    assert mask[0, d["push"]].all() and chi2 < 30, chi2  # at most 9 degrees of freedom: by chance once in 2000
    near(d["logp"], p.log()[d["push"]])
    mask[:, 0] = False  # neither end of the unit interval draws what is masked
    ends = crl_ppo.decide(agent, logits.expand(2, 10), mask.expand(2, 10), u=torch.tensor([0.0, 1.0]))["push"]
    assert mask[0, ends].all() and ends[0] != ends[1]
    assert crl_ppo.decide(agent, logits, mask)["push"].item() == logits.masked_fill(~mask, -9e9).argmax()  # greedy


def test_observations_are_standardised_by_training_prompts():
    agent, x = crl_ppo.Agent(tiny_args(), torch.arange(3)[:, None], 4), 5 + 3 * torch.randn(50, 4)
    start = crl_ppo.behaviour(agent.policy(x), torch.ones(50, 3).bool(), 0.0).exp()
    assert (start[:, -1] > 0.55).all()  # the no-op, whose bias is log(3)
    x[:, 2] = 7.0  # a dead dimension
    agent.calibrate(1, x)
    near(agent.observe(x, 1)[:, ::3], ((x - x.mean(0)) / x.std(0, unbiased=False))[:, ::3])
    assert agent.observe(x, 1)[:, 2].abs().max() < 1 and agent.observe(x + 1e6, 1).max() == 10
    assert torch.equal(agent.observe(x, 0), x.clamp(-10, 10))  # row 0 keeps its own statistics
    known, x[:20, 1] = x[20:, 1].clone(), math.nan  # an option that is missing: 0, and the others' own statistics
    agent.calibrate(1, x)
    near(agent.observe(x, 1)[20:, 1], (known - known.mean()) / known.std(unbiased=False))
    assert agent.observe(x, 1)[:20, 1].tolist() == [0.0] * 20


@pytest.mark.parametrize("lam,expected", [
    (1.0, [[0.5, 0, 0], [0.8, 0.6, 0.4], [-0.1, -0.3, 0]]), (0.9, [[0.5, 0, 0], [0.704, 0.56, 0.4], [-0.07, -0.3, 0]]),
    (0.0, [[0.5, 0, 0], [0.2, 0.2, 0.4], [0.2, -0.3, 0]])])
def test_gae_by_hand(lam, expected):
    values = torch.tensor([[0.5, 9, 9], [0.2, 0.4, 0.6], [0.1, 0.3, 9]])  # 9 stands past the end of an answer
    got = crl_ppo.gae(torch.tensor([1.0, 1.0, 0.0]), values, torch.tensor([1, 3, 2]), lam)
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("baseline", ["unsteered", "none"])
@torch.no_grad()
def test_the_loss_over_all_actions_is_the_expectation_of_the_sampled_one(algo, baseline):
    """Action for action by hand, once a step has been taken; many draws give nearly the same."""
    args, g = tiny_args(algo=algo, baseline=baseline, ent_coef=0.1), torch.Generator().manual_seed(0)
    table, rows = crl_ppo.Table([None] * 5, torch.tensor([[4], [7], [9]]), 6), torch.tensor([3, 1, 0])
    table.x, table.reward = torch.randn(5, 6, generator=g), torch.randint(2, (5, 3), generator=g).float()
    table.mask[1, 0] = False
    torch.manual_seed(0)
    agent, mask, obs = crl_ppo.Agent(args, table.pushes, 6), table.mask[rows], table.x[rows].clamp(-10, 10)
    agent.policy[-1].weight.data *= 200

    def policy():
        return crl_ppo.behaviour(agent.policy(obs), mask, 0.3).exp(), agent.critic(obs)
    batches = [crl_ppo.decisions_of_table(None, None, dataclasses.replace(args, group=G), agent, table, rows, 0.3, g)
               for G in (0, 20000)]
    old, value = policy()
    for parameter, step in ((agent.policy[-1].bias, torch.tensor([0.5, -0.5, 0.0])), (agent.critic[-1].bias, 0.4)):
        parameter.data += step
    new, now = policy()
    w, ratio = old / 3, torch.where(mask, new / old, 0.0)
    ret = table.reward[rows] - (table.reward[rows, 2:] if baseline == "unsteered" else 0)
    if algo == "ppo":
        adv = ret - value - (w * (ret - value)).sum()
        adv = adv / ((w * adv**2).sum().sqrt() + 1e-4)
    else:
        adv = ret - (old * ret).sum(1, keepdim=True)
        adv = adv / ((old * adv**2).sum(1, keepdim=True).sqrt() + 1e-6)
    policy_loss = -sum(float(w[n, a] * min(adv[n, a] * ratio[n, a], adv[n, a] * ratio[n, a].clamp(0.8, 1.2)))
                       for n in range(3) for a in range(3))
    clipped = value + (now - value).clamp(-0.2, 0.2)
    value_loss = float(0.5 * (w * torch.maximum((now - ret)**2, (clipped - ret)**2)).sum()) * (algo == "ppo")
    loss, stats = crl_ppo.ppo_loss(agent, args, batches[0], 0.3)
    assert (stats["policy_loss"], stats["value_loss"]) == pytest.approx((policy_loss, value_loss), abs=1e-5)
    assert float(loss) == pytest.approx(policy_loss + 0.5 * value_loss - 0.1 * stats["entropy"], abs=1e-5)
    assert stats["clipfrac"] > 0 and batches[1]["push"].shape == (3, 20000)
    assert crl_ppo.ppo_loss(agent, args, batches[1], 0.3)[1] == pytest.approx(stats, abs=0.02)


# ----------------------------------------------------------------------------------------------------- the whole script
class Watch:
    """Keeps what a run made: the model, actions, prompts, PPO's batches, and the first weights of its first agent."""

    def __init__(self, monkeypatch):
        self.batches, self.first, watch, set_up = [], [], self, crl_ppo.set_up

        class Agent(crl_ppo.Agent):
            def __init__(self, *a):
                super().__init__(*a)
                watch.first.append({key: v.clone() for key, v in self.state_dict().items()})

        def watched_set_up(args):
            self.args, (self.lm, self.actions, self.prompts, identity) = args, set_up(args)
            self.frozen = [v.clone() for v in self.frozen_now()]
            return self.lm, self.actions, self.prompts, identity
        monkeypatch.setattr(crl_ppo, "Agent", Agent)
        monkeypatch.setattr(crl_ppo, "set_up", watched_set_up)
        for name in ("decisions_of_table", "decisions_of_tokens"):
            def watched(*a, made=getattr(crl_ppo, name)):
                if not self.batches:
                    self.bias = next(x for x in a if isinstance(x, Agent)).policy[-1].bias.detach().clone()
                self.batches.append(made(*a))
                return self.batches[-1]
            monkeypatch.setattr(crl_ppo, name, watched)

    def frozen_now(self):
        saes = [p for s in self.actions.sites if s.sae is not None for p in s.sae.parameters()]
        return [*self.lm.model.state_dict().values(), *saes, *(s.directions for s in self.actions.sites)]


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


TOKEN = dict(decide="token", group=3, batch_prompts=4, steer_tokens=0)
VARIANTS = [("one", {}), ("one", dict(afm="active", group=4, reward_decoding="free")),
            ("one", dict(afm="none", algo="grpo")),
            ("one", dict(sae=("none",), layer=(1, 2), coef=(0.5, -0.5, 1.0, -1.0), features=2, observe=3)),
            ("one", dict(shots=2, baseline="none", batch_prompts=3, sae=("random:20",), layer=(2,))),
            ("long", dict(coef_mode="abs", coef=(9.0, 30.0))), ("long", dict(steer_tokens=2, target_kl=0.01)),
            ("long", dict(steer_tokens=3, features=2)), ("long", TOKEN),
            ("long", dict(TOKEN, afm="active", algo="grpo", coef=(1.0, -1.0))),
            ("long", dict(TOKEN, steer_tokens=2, sae=("none",), layer=(1, 2), gae_lambda=0.5))]


@pytest.mark.parametrize("task, kw", VARIANTS, ids=str)
def test_a_run_learns_and_its_log_says_what_happened(small, tmp_path, watch, capsys, task, kw):
    run = go(small, tmp_path, task, **kw)
    metrics, result, last = lines(run / "metrics.jsonl"), final(run), load_file(run / "last.safetensors")
    lm, actions, args = watch.lm, watch.actions, watch.args
    assert {p.name for p in run.iterdir()} == FILES
    assert [m["update"] for m in metrics] == [1, 2, 3, 4] and all(math.isfinite(v) for m in metrics for v in m.values())
    assert all(torch.equal(before, now) for before, now in zip(watch.frozen, watch.frozen_now(), strict=True))
    for part in ("policy", "critic"):
        changed = [key for key, v in watch.first[0].items() if not torch.equal(last[f"agent.{key}"], v)]
        assert any(key.startswith(part) for key in changed) == (part == "policy" or args.algo != "grpo")
    for m, b in zip(metrics, watch.batches, strict=True):
        shares = dict(reward=b["reward"], unsteered_reward=b["plain"], corrected=b["reward"] > b["plain"])
        for key, v in shares.items():
            assert m[f"objective/{key}"] == pytest.approx(float((b["weight"] * v).sum() / b["weight"].sum()), abs=1e-5)
        target = b["reward"] - (b["plain"] if args.baseline == "unsteered" else 0)
        assert torch.allclose(b["ret"], target, atol=1e-5) == (args.gae_lambda == 1)  # below 1 mixes in the critic

    # the log, against a second computation of every answer from the pushes that it names
    number, own = {json.dumps(actions.describe([a])): a for a in range(actions.noop)}, {}
    for record in lines(run / "interventions.jsonl"):
        own.setdefault(record["prompt_id"], []).append(record)
    assert list(own) == [p.row["id"] for p in watch.prompts["val"]] and len(own) == result["val_n"] == 5
    for p, rs in zip(watch.prompts["val"], own.values()):
        pushes = [[number[json.dumps([a])] for a in r["push"]] for r in rs]
        said = plain_answer(lm, p, args.max_new_tokens, actions, lambda t: pushes[t])
        assert [r["token"] for r in rs] == said and [r["position"] for r in rs] == list(range(len(said)))
        bare = plain(lm, p.ids + said[:-1])[len(p.ids) - 1:].argmax(-1).tolist()
        assert [r["unsteered_token"] for r in rs] == bare
        assert any(pushes) or said == bare == plain_answer(lm, p, args.max_new_tokens)  # the no-op leaves it alone
        for t, r in enumerate(rs):
            assert r["decided"] == (t < (1 if args.decide == "once" else args.steer_tokens or 9))
            assert r["token_text"] == lm.tok.decode([r["token"]]) and len(r["push"]) <= args.features
            assert actions.together or len(r["push"]) <= 1
            assert args.steer_tokens == 0 or t < args.steer_tokens or r["push"] == []
            assert r["logp"] <= 0 <= r["entropy"] + 1e-6 and r["mask_size"] >= 1
    key = "steered_constrained" if args.reward_decoding == "constrained" else "steered"
    for who, name in ((key, "reward"), (f"un{key}", "unsteered_reward")):
        assert result[who] == pytest.approx(sum(rs[0][name] for rs in own.values()) / 5)
    assert result["corrected"] - result["misguided"] == round(5 * (result[key] - result[f"un{key}"]))
    out = capsys.readouterr().out
    assert result["verdict"] in out and str(run) in out and ("answers are invalid" in out) == ("reward_decoding" in kw)
    table = crl_ppo.load_table(run / "table.safetensors", watch.prompts["train"] + watch.prompts["val"], {})
    options = 4 if task == "one" else 0
    xs = crl_ppo.prefill(lm, [1, args.observe], table.prompts, options)[1]
    near(table.x.nan_to_num(9.0), xs[args.observe].nan_to_num(9.0))
    missing = [4 - len(p.row["choices"]) for p in table.prompts] if options else [0] * len(table.prompts)
    assert table.x.isnan().sum(1).tolist() == [16 * n for n in missing]
    tried, n = table.reward.tolist(), len(watch.prompts["train"])  # NaN: not tried
    gain = [sum(r[a] - r[-1] for r in tried[:n] if r[a] == r[a]) for a in range(len(table.pushes))]
    best = gain.index(max(gain)) if max(gain) > 0 else table.noop
    assert result["constant_push"] == actions.label(table.pushes[best])
    assert (result["coverage"] is None) == (args.group > 0)
    start = torch.zeros(len(table.pushes))  # the policy starts at what works on average, and likes the no-op
    if args.group == 0:
        start += 5 * table.reward[:len(watch.prompts["train"])].mean(0)
    start[-1] += math.log(len(start))
    near(watch.bias, start, 1e-5)
    if args.afm == "active" and task == "one":
        assert torch.equal(table.mask[:, :-1], actions.sites[0].sae.encode(xs[1][:, :16]) > 0)
        assert table.mask[:, -1].all()
        assert all(b["mask"].gather(1, b["push"]).all() for b in watch.batches)


@pytest.mark.parametrize("task, kw", [("one", {}), ("one", dict(afm="active", group=6)), ("long", TOKEN)], ids=str)
def test_the_ratio_is_one_before_the_first_step(small, tmp_path, task, kw):
    run = go(small, tmp_path, task, update_epochs=1, num_minibatches=1, updates=5, **kw)
    metrics = lines(run / "metrics.jsonl")
    assert all(abs(m["losses/approx_kl"]) < 1e-6 and m["losses/clipfrac"] == 0 for m in metrics), metrics
    assert metrics[0]["losses/entropy"] != metrics[-1]["losses/entropy"]
    args = crl_ppo.stored_args(run)
    for key, start in (("charts/learning_rate", args.learning_rate), ("crl/epsilon", args.epsilon)):
        assert [m[key] for m in metrics] == pytest.approx([start * left / 5 for left in (5, 4, 3, 2, 1)])


def test_decisions_at_tokens_are_those_that_made_the_answer(small, tmp_path):
    """Each rollout has its own, as many as its tokens, although rows leave the batch when they have finished."""
    args = flags(small, tmp_path, "long", **TOKEN | dict(max_new_tokens=6))
    lm, actions, parts, _ = crl_ppo.set_up(args)
    torch.manual_seed(0)
    agent, u = crl_ppo.Agent(args, torch.arange(25)[:, None], 16), torch.rand(8, 3, 6)
    for ends in (0, 1):
        rolls = crl_ppo.answer_by_token(lm, actions, args, agent, parts["train"], 0.5, u)
        lm.eos = lm.eos if ends else {rolls[0][0][0][1], rolls[3][1][0][2], rolls[5][2][0][3]}
    assert len({len(answer) for some in rolls for answer, _ in some}) > 2
    for p, some in zip(parts["train"], rolls):
        for answer, d in some:
            assert answer == plain_answer(lm, p, 6, actions, lambda t: agent.pushes[d["push"][t]])
            assert len(answer) == len(d["push"]) == len(d["obs"])


def same(one, two, names=FILES - {"args.json", "final.json"}):
    """What differs between two runs: names of files, and of tensors in them."""
    texts = [name for name in names if name.endswith("l")]
    differing = [name for name in texts if (one / name).read_bytes() != (two / name).read_bytes()]
    for name in (name for name in names if name.endswith("safetensors")):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        differing += [f"{name}: {key}" for key in a if not torch.equal(a[key].nan_to_num(), b[key].nan_to_num())]
    return differing


def test_same_seed_same_run_other_seed_other_run(small, tmp_path, monkeypatch):
    """With either --decide at a letter, and where there is no git."""
    monkeypatch.setenv("PATH", "")
    runs = [go(small, tmp_path / name, seed=seed, sae=("random:20",), layer=(1,), decide=decide)
            for name, seed, decide in (("a", 3, "once"), ("b", 3, "token"), ("c", 4, "once"))]
    assert json.loads((runs[0] / "args.json").read_text())["versions"]["git"] is None
    assert same(*runs[:2]) == [] and "last.safetensors: agent.policy.0.weight" in same(*runs[1:])


def test_best_checkpoint_is_the_best_on_validation(small, tmp_path):
    run = go(small, tmp_path, "long", updates=8, learning_rate=0.03)
    scores = [m["objective/val_reward"] for m in lines(run / "metrics.jsonl")]
    with safe_open(run / "best.safetensors", "pt") as f:
        state = json.loads(f.metadata()["crl"])
    assert state["best"] == max(scores) == pytest.approx(final(run)["steered"]) and len(set(scores)) > 1
    assert final(run)["best_update"] == state["update"] == 1 + scores.index(max(scores))


def test_labels_of_validation_and_test_never_reach_the_policy(small, tmp_path, monkeypatch):
    """With other labels of validation prompts the policy is the same; test rows are not even looked at."""
    set_up, runs = crl_ppo.set_up, []

    class Secret(list):
        def __iter__(self):
            raise AssertionError("a test row was read")
        __getitem__ = __iter__
    for change in (0, 1):
        def other(args):
            lm, actions, prompts, identity = set_up(args)
            for p in prompts["val"]:
                p.row["answer"] = (p.row["answer"] + change) % 2
            return lm, actions, prompts | {"test": Secret(prompts["test"])}, identity
        monkeypatch.setattr(crl_ppo, "set_up", other)
        runs.append(go(small, tmp_path / str(change)))
    assert same(*runs, ["last.safetensors", "table.safetensors"]) == ["table.safetensors: reward"]
    assert final(runs[0])["constant_push"] == final(runs[1])["constant_push"]


def test_a_run_sees_the_labels_of_its_samples_alone(small, tmp_path, monkeypatch):
    """Training rows beyond --samples may say what they like."""
    set_up, load, used = crl_ppo.set_up, crl_ppo.load_rows, set()

    def watched(args):
        lm, actions, prompts, identity = set_up(args)
        used.update(p.row["id"] for p in prompts["train"])
        return lm, actions, prompts, identity

    def relabelled(*a):
        parts, source = load(*a)
        others = [row for row in parts["train"] if row["id"] not in used]
        for row in others:
            row["answer"] = (row["answer"] + 1) % 2
        assert len(others) >= 3
        return parts, source
    with monkeypatch.context() as m:
        m.setattr(crl_ppo, "set_up", watched)
        runs = [go(small, tmp_path / "a", samples=5)]
    monkeypatch.setattr(crl_ppo, "load_rows", relabelled)
    assert same(*runs, go(small, tmp_path / "b", samples=5), ["last.safetensors", "table.safetensors"]) == []


@pytest.mark.parametrize("task, kw", [("one", {}), ("long", TOKEN)], ids=["once", "token"])
def test_init_starts_from_another_runs_policy_and_screens_nothing(small, tmp_path, monkeypatch, task, kw):
    first = go(small, tmp_path / "first", task)
    monkeypatch.delattr(crl_ppo, "screen")
    second = go(small, tmp_path / "second", task, init=str(first), learning_rate=1e-12, seed=2, **kw)
    before, after = load_file(first / "best.safetensors"), load_file(second / "last.safetensors")
    assert all(torch.allclose(v, after[key], atol=1e-6) for key, v in before.items() if key.startswith("agent.p"))
    assert not torch.equal(before["agent.obs_mean"], after["agent.obs_mean"])  # its own training prompts
    with pytest.raises(SystemExit, match="coef differs"):  # the numbers of the pushes would name other actions
        go(small, tmp_path / "third", task, init=str(first), coef=(0.5, 1.0), **kw)
    with pytest.raises(SystemExit, match="needs that run's --afm adaptive and"):
        go(small, tmp_path / "third", task, init=str(first), afm="active", **kw)


def test_init_keeps_the_meaning_of_several_features(small, tmp_path):
    """Together at one token, in turn at three: not the same push."""
    pair = go(small, tmp_path, "long", features=2)
    with pytest.raises(SystemExit, match="--steer-tokens 1$"):
        go(small, tmp_path, "long", features=2, steer_tokens=3, init=str(pair))


@pytest.mark.parametrize("steered, coverage, known, words", [
    ([1] * 15 + [0] * 5, 1, None, ["gain +75.0% (+51.0% to +99.0%)", "steering helps"]),
    ([1] * 19 + [0], 1, None, ["to +100.0%)"]), ([0] * 20, 0.05, None, ["Levers are missing"]),
    ([0] * 20, None, None, ["no gain beyond noise", "--decide once, which tries all"]),
    ([0] * 20, 0.9, False, ["no gain beyond noise", "does not tell", "most frequent answer 50%"]),
    ([0] * 20, 0.9, True, ["no gain beyond noise", "linear probe 100%", "too few --samples"])])
def test_the_verdict(steered, coverage, known, words):
    kinds = [i % 2 for i in range(20)]
    seen = [[9.0 * kind if known else (i // 2) % 2] for i, kind in enumerate(kinds)]
    text = crl_stats.explain([0] * 20, steered, coverage, seen * 2, [None] * 40 if known is None else kinds * 2)
    assert all(word in text for word in words), text


# ------------------------------------------------------------------------------------------- resume, and two processes
def stop(monkeypatch, name, call):
    """Ctrl-C at the given call of crl_ppo.<name>."""
    original, calls = getattr(crl_ppo, name), []

    def interrupting(*a, **k):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*a, **k)
    monkeypatch.setattr(crl_ppo, name, interrupting)


@pytest.mark.parametrize("name, call, task, kept, kw", [
    ("cover", 2, "one", [], {}),
    ("save_table", 2, "many", ["table"], dict(samples=290, micro_batch=64, max_new_tokens=1)),
    ("ppo_loss", 7, "one", ["table", "last"], {}), ("write_log", 1, "one", ["table", "last"], {}),
    ("ppo_loss", 11, "one", ["table", "last"], dict(afm="none", group=6, batch_prompts=5)),
    ("ppo_loss", 11, "long", ["table", "last"], dict(afm="active", group=4, steer_tokens=0)),
    ("ppo_loss", 11, "long", ["table", "last"], dict(TOKEN, updates=10))],
    ids=["screening", "table", "PPO", "the end", "sampled PPO", "long answers", "tokens"])
def test_a_resumed_run_equals_the_uninterrupted_one(small, tmp_path, monkeypatch, name, call, task, kept, kw):
    rows = [{"prompt": f"{'y' * (i % 5)} {i}", "choices": ["u", "v"], "answer": i % 2} for i in range(600)]
    (small / "many.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))  # more than are tabulated at once
    whole = go(small, tmp_path / "whole", task, **kw)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop(m, name, call)
        go(small, tmp_path / "parts", task, **kw)
    [run] = (tmp_path / "parts").iterdir()
    assert [f for f in ("table", "last") if (run / f"{f}.safetensors").exists()] == kept
    assert crl_ppo.main(crl_ppo.Args(resume=str(run))) == run
    assert same(whole, run) == []
    ends = [{key: v for key, v in final(path).items() if not key.endswith("_s")} for path in (whole, run)]
    assert ends[0] == ends[1]  # but for the times


def of_two(rank, port, args):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    crl_ppo.PartialState._reset_state()
    crl_ppo.main(args)


@pytest.mark.parametrize("task, kw", [("one", {}), ("one", dict(afm="none", group=3)), ("long", TOKEN)], ids=str)
def test_two_processes_give_the_single_processs_outcomes_and_weights(small, tmp_path, task, kw):
    """The outcomes are shared out in the same batches; PPO runs alike on both, and one of them writes."""
    one = go(small, tmp_path / "one", task, micro_batch=2, **kw)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    fork, given = multiprocessing.get_context("fork"), flags(small, tmp_path / "two", task, micro_batch=2, **kw)
    jobs = [fork.Process(target=of_two, args=(rank, port, dataclasses.replace(given))) for rank in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(600)
    [two] = (tmp_path / "two").iterdir()
    assert [job.exitcode for job in jobs] == [0, 0] and same(one, two) == []


def test_strengths_that_are_not_given_are_the_tasks_as_the_model_stands_them(small, tmp_path, monkeypatch):
    monkeypatch.setattr(crl_ppo, "STRENGTH", {"model": 0.25})
    for given, resolved in ((None, (0.25 * crl_tasks.TASKS["file"]["defaults"]["coef"][0],)), ((3.0,), (3.0,))):
        args = flags(small, tmp_path, coef=given)
        crl_ppo.set_up(args)
        assert args.coef == resolved
