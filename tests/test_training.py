"""The learner: its parts by hand, on worlds with a known best policy, and the whole script on tiny models."""

import dataclasses
import filecmp
import itertools
import json
import math
import os
import signal
import socket

import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_run import flags, go
from tiny import held, in_children, lines, near, one_line, plain, plain_answer, tiny_args

import crl_ppo
import crl_tasks
from crl_tasks import Prompt, hub

SAME = ["rewards.safetensors", "best.safetensors", "last.safetensors", "metrics.jsonl", "interventions.jsonl"]
pytestmark = pytest.mark.usefixtures("half_right")


def final(run):
    return json.loads((run / "final.json").read_text())


# ------------------------------------------------------------------- worlds that are known
class World(crl_ppo.Environment):
    """A world in place of the language model, whose answers are the chosen actions.

    right(row, answer) says whether T numbers of features (D is the no-op) are right; observe(row, t,
    answer so far) is what the policy reads."""

    def __init__(self, right, observe, T=1, D=64, d=12, kinds=2, n=32, **kw):
        given = dict(task="world", decisions=T, max_new_tokens=T, steer_tokens=0, pool=8, updates=60)
        args = tiny_args(**{**given, "learning_rate": 3e-3, "coef": (1.0,), **kw})
        model = tiny.tiny_model("llama", d_model=d, n_layers=2)  # which has no say
        super().__init__(args, model, tiny.tiny_tokenizer(), [tiny.tiny_site(1, D, d)], ends=0)
        self.right = right
        self.observe = observe
        self.asked = []  # of each call of generate(): prompts, G, steps
        noise = 0.3 * torch.randn(2 * n, d, generator=torch.Generator().manual_seed(0))
        for i in range(2 * n):
            row = {"id": str(i), "task": "file", "kind": i % kinds, "noise": noise[i], "choices": None}
            self.prompts.append(Prompt(row, [0], []))
        self.ask(self.prompts)
        self.parts = {"train": self.prompts[:n], "val": self.prompts[n:], "test": [], "shots": []}
        self.parts["source"] = "here"

    def token(self, row, action):
        """What an action brings about."""
        site, feature, _ = self.actions[action]
        return feature if site == 0 else len(self.sites[0].directions)

    def score(self, row, tokens):
        return float(self.right(row, tokens)), True

    def generate(self, prompts, choose, G, begun=None, steps=None):
        steps = steps or self.args.max_new_tokens
        self.asked.append((prompts, G, steps))
        rows = torch.arange(len(prompts))
        answers = [[[] for _ in range(G)] for _ in prompts]
        for t in range(steps):
            if t < self.args.decisions:
                read = []
                for i, prompt in enumerate(prompts):
                    read.append(torch.stack([self.observe(prompt.row, t, answer) for answer in answers[i]]))
                actions = choose(torch.stack(read), t, rows=rows, columns=torch.arange(G))
            for i, prompt in enumerate(prompts):
                for g, action in enumerate(actions.expand(len(rows), G)[i].tolist()):
                    given = begun is not None and t < begun.shape[1]
                    answers[i][g].append(int(begun[g, t]) if given else self.token(prompt.row, action))
        return answers

    def train(self, monkeypatch, tmp_path, **kw):
        """Have main() train in this world; returns the run directory."""
        self.args = dataclasses.replace(self.args, run_dir=str(tmp_path), layer=(1,), **kw)
        identity = {"schema": crl_ppo.SCHEMA, "task": "world", "model": "world"}
        monkeypatch.setattr(crl_ppo, "set_up", lambda args: (self, self.parts, identity))
        return crl_ppo.main(self.args)


def by_kind(row, t, answer):
    """The kind shows in a few dimensions, below noise in all."""
    x = row["noise"].clone()
    x[3 * row["kind"] : 3 * row["kind"] + 3] += 1.0
    return x


def test_the_whole_learner_reaches_the_best_policy(tmp_path, monkeypatch):
    """Three kinds of prompts with a lever each (11, 22, 33) and one that any action spoils. Ten features are
    right on the same 60 % of the first three kinds: the best on average, and useless together."""

    def right(row, answer):
        if answer == [64] or row["kind"] == 3:
            return answer == [64] and row["kind"] == 3
        luck = math.sin(1e4 * (int(row["id"]) + 97 * min(answer[0], 40))) % 1
        often = 0.6 if 40 <= answer[0] < 50 else 0.1
        return answer[0] == 11 * (1 + row["kind"]) or luck < often

    world = World(right, by_kind, kinds=4, n=60, pool=6, updates=150, learning_rate=1e-3)
    result = final(world.train(monkeypatch, tmp_path))
    mask = {feature for _, feature, _ in world.actions[:-1]}
    assert {11, 22, 33} < mask and mask & set(range(40, 50)) and 1 + len(mask) == result["mask_size"] == 7
    rates = [sum(right(p.row, [a]) for p in world.prompts) for a in range(64)]
    best = torch.tensor(rates).topk(6).indices.tolist()
    assert set(best) < set(range(40, 50))  # the best on average would have been these
    assert result["steered"] > 0.95 > 0.75 > result["constant"] and result["unsteered"] == 0.25
    assert "steering helps" in result["verdict"] and result["coverage"] == 1
    assert result["corrected"] / 60 == pytest.approx(result["steered"] - 0.25, abs=0.05)


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_probe_delayed_reward_is_credited_to_the_right_decision(tmp_path, monkeypatch, lam):
    """Feature 7 at the second of four tokens decides and spoils the answer at any other; only the end pays.

    With lambda 0 the credit can reach that decision through the critic alone, which sees at the next token
    what was chosen."""

    def observe(row, t, answer):
        x = torch.zeros(12)
        x[t] = 1.0
        x[8] = float(answer[1:2] == [7] and answer.count(7) == 1)
        x[9] = float(7 in answer)
        return x

    def right(row, answer):
        return answer.count(7) == 1 and answer[1] == 7

    world = World(right, observe, T=4, D=12, n=16, gae_lambda=lam, group=8, epsilon=0.3, updates=20)
    everything = torch.tensor([[a] * 4 for a in range(12)])
    monkeypatch.setattr(crl_ppo, "screen", lambda *a: (everything, torch.zeros(4, 12)))
    run = world.train(monkeypatch, tmp_path, learning_rate=0.01)
    agent = crl_ppo.load_agent(run / "last.safetensors", {})
    after = [agent.critic(agent.observe(observe(None, 2, [0, action]), 2)).item() for action in (7, 3)]
    assert final(run)["steered"] > 0.9
    assert after[0] > 0.6 and after[1] < 0.4, after  # the critic tells outcomes before they are paid


def test_probe_tempting_action_is_masked(tmp_path, monkeypatch):
    """A policy that starts with a strong liking for a useless action and does not explore picks it for ever;
    AFM takes it away."""

    class Tempted(crl_ppo.Agent):
        def start_at(self, sequences, worth):
            super().start_at(sequences, worth)
            for action, (_, feature, _) in enumerate(world.actions):
                self.prior.data[0, action] += 30.0 * (feature == 60)

    monkeypatch.setattr(crl_ppo, "Agent", Tempted)
    world = World(lambda row, answer: answer == [20], by_kind, epsilon=0.0)
    assert final(world.train(monkeypatch, tmp_path / "masked"))["steered"] > 0.9
    assert (0, 60, 1.0) not in world.actions
    monkeypatch.setattr(crl_ppo, "screen", lambda *a: (torch.arange(64)[:, None], torch.zeros(4, 64)))
    world = World(world.right, by_kind, epsilon=0.0, ent_coef=0.0, updates=4)
    slow = {"learning_rate": 1e-3}  # else weight decay takes the liking away
    assert final(world.train(monkeypatch, tmp_path / "all", **slow))["steered"] == 0


def test_cover_by_hand():
    """0 sets three right, and 1 the same, which counts half then: 2 gains 2, 1 gains 1.5, 3 gains 1."""
    rewards = torch.zeros(6, 4)
    for column, right in enumerate([(0, 1, 2), (0, 1, 2), (3, 4), (5,)]):
        rewards[list(right), column] = 1.0
    assert crl_ppo.cover(rewards, 3) == [0, 2, 1] and crl_ppo.cover(rewards, 99) == [0, 2, 1, 3]
    assert crl_ppo.cover(torch.tensor([[0.0, 1.0, 0.0]]), 2) == [1]  # what earns nothing is left out


@pytest.mark.parametrize("all_right", [False, True])
def test_screening_finds_planted_actions_on_wrong_answers(all_right):
    """Every second prompt is wrong, of two kinds with an action each."""

    def right(row, answer):
        return all_right or int(row["id"]) % 2 == 0 or answer == [5 + 70 * row["kind"]]

    world = World(right, by_kind, kinds=4, n=160, D=300, pool=2)
    sequences, rewards = crl_ppo.screen(world, world.args, world.parts["train"])
    assert sequences.shape == (2, 1) and rewards.shape == (64, 2)
    tried = [(len(prompts), G) for prompts, G, _ in world.asked]
    left = (32, 8) if all_right else (2, 2)  # what earns nothing does not go on
    assert tried == [(160, 1), (4, 300), (16, left[0]), (64, left[1])]
    if not all_right:
        assert set(sequences[:, 0].tolist()) == {75, 215}  # of the kinds that are wrong: odd ones
        assert all(int(p.row["id"]) % 2 for prompts, *_ in world.asked[1:] for p in prompts)
        by_hand = [[float(right(p.row, s)) for s in sequences.tolist()] for p in world.asked[-1][0]]
        assert rewards.tolist() == by_hand and rewards.mean() == 0.5


class Beginnings(World):
    """Long answers, each of whose tokens an action decides, or what the answer has to begin with."""

    def __init__(self, right, T=1, D=100, n=40):
        super().__init__(right, by_kind, T, D, n=n, pool=2, max_new_tokens=4)

    def token(self, row, action):
        return action % 16


@pytest.mark.parametrize("T", [1, 2])
def test_long_answers_are_screened_by_their_beginnings(T):
    """Answers are right that begin with token 6 on half of the prompts, with 7 on the others; or none is."""
    world = Beginnings(lambda row, answer: answer[0] == 6 + int(row["id"]) % 2, T)
    sequences, rewards = crl_ppo.screen(world, world.args, world.parts["train"])
    assert sequences.shape == (2, T) and {first % 16 for first in sequences[:, 0].tolist()} == {6, 7}
    assert rewards.mean(0).tolist() == [0.5, 0.5] and rewards.amax(1).min() == 1
    world = Beginnings(lambda row, answer: False, T)
    sequences = crl_ppo.search_beginnings(world, world.args, world.parts["train"])
    assert sequences.shape[1] == T and len(sequences) >= 64 and sequences.max() < world.noop


def test_beginnings_are_pieces_of_answers_that_earned_and_steady_actions_bring_them_about():
    """Answers that have 3 and then 5 in them are right; the frozen model says so by itself after 8.

    Then 38 of 600 actions bring about token 3 on the first two prompts, a third of them on all."""

    class Then(Beginnings):
        def generate(self, prompts, choose, G, begun=None, steps=None):
            answers = super().generate(prompts, choose, G, begun, steps)
            for answer in itertools.chain(*answers):
                if begun is not None and answer[0] == 8:
                    answer[1:] = [9, 3, 5][: len(answer) - 1]
            return answers

    world = Then(lambda row, answer: (3, 5) in zip(answer, answer[1:], strict=False), T=2)
    sequences = crl_ppo.search_beginnings(world, world.args, world.parts["train"])
    assert [action % 16 for action in sequences[0].tolist()] == [3, 5]
    looked_up = {tuple(p.ids[1:]) for prompts, _, steps in world.asked if steps == 1 for p in prompts}
    assert (3,) in looked_up

    world = Beginnings(lambda row, answer: answer[0] == 3, D=600, n=32)
    world.token = lambda row, action: action % 16 if int(row["id"]) < 2 or action % 3 == 0 else 15
    sequences = crl_ppo.search_beginnings(world, world.args, world.parts["train"])
    steady = [action for action in range(600) if action % 16 == 3 and action % 3 == 0]
    assert sequences[: len(steady), 0].tolist() == steady and len(steady) == 13


def random_agent():
    """An agent whose policy hangs on what it reads; either position allows its own actions."""
    torch.manual_seed(0)
    agent = crl_ppo.Agent(3, 5, 2)
    agent.start_at(torch.tensor([[0, 1], [3, 1], [0, 2]]), torch.tensor([0.25, 0.5, 0.1]))
    agent.actor[-1].weight.data *= 3000
    return agent


def test_a_policy_starts_at_what_works_on_average():
    agent = random_agent()
    assert agent.action_mask.tolist() == [[1, 0, 0, 1, 1], [0, 1, 1, 0, 1]]
    near(agent.prior.data, torch.tensor([[1.25, 0, 0, 2.5, math.log(5)], [0, 2.5, 0.5, 0, math.log(5)]]))
    assert agent.constant.tolist() == [3, 1]  # the best sequence
    agent = crl_ppo.Agent(3, 5, 1)
    agent.start_at(torch.arange(4)[:, None], torch.zeros(4))
    p = agent.get_policy(agent.observe(torch.randn(9, 3), 0)).probs
    assert (p[:, -1] - 5 / 9).abs().max() < 0.05  # as likely as the others together: 5 / (5 + 4)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_the_policy_is_the_exact_mixture_over_the_mask(epsilon):
    agent = random_agent()
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    for t in (0, 1):
        obs = agent.observe(x, t)
        policy = agent.get_policy(obs, epsilon)
        allowed = agent.action_mask[t] == 1
        likely = (agent.actor(obs) + agent.prior[t]).exp() * allowed
        softmax = likely / likely.sum(1, keepdim=True)
        expected = (1 - epsilon) * softmax + epsilon * allowed / 3
        near(policy.probs, expected, 1e-6)
        assert (policy.probs[:, ~allowed] == 0).all() and policy.probs[:, allowed].min() > 0.99 * epsilon / 3
        assert (softmax.amax(1) > 0.9).any() and softmax.argmax(1).unique().numel() > 1
        draws = policy.sample((2000,))
        assert allowed[draws].all()
        near(policy.log_prob(draws), expected.log().expand(2000, -1, -1).gather(2, draws[..., None])[..., 0])
        if epsilon:
            shares = torch.stack([(draws == a).float().mean(0) for a in range(5)], 1)
            assert (shares - expected).abs().max() < 0.06  # five standard deviations
            near(policy.entropy(), -(expected * expected.clamp(min=1e-30).log()).sum(1))


def test_observations_are_standardised_by_unsteered_training_prompts():
    """Of the prompt and of generated tokens apart; a dead dimension and a missing option do no harm."""
    agent = crl_ppo.Agent(4, 3, 3)
    x = 5 + 3 * torch.randn(50, 3, 4)
    x[:, 1:] *= 2
    x[:, :, 2] = 7.0  # a dead dimension
    x[:20, 0, 1] = math.nan  # an option that is missing
    x[3, 2] = math.nan  # an answer that has ended
    agent.calibrate(x)
    first = x[:, 0]
    obs = agent.observe(first, 0)
    assert obs.shape == (50, 7) and torch.equal(obs[:, 4:], torch.tensor([1.0, 0, 0]).expand(50, -1))
    for column in (0, 3):
        own = first[:, column]
        near(obs[:, column], (own - own.mean()) / own.std(correction=0))
    known = first[20:, 1]
    near(obs[20:, 1], (known - known.mean()) / known.std(correction=0))
    assert obs[:20, 1].tolist() == [0.0] * 20 and obs[:, 2].abs().max() < 1
    later = torch.cat([x[:, 1], x[torch.arange(50) != 3, 2]])
    near(agent.obs_mean[1], later.mean(0))
    for t in (1, 2):
        obs = agent.observe(x[5:, t], t)
        near(obs[:, 0], (x[5:, t, 0] - later[:, 0].mean()) / later[:, 0].std(correction=0))
        assert torch.equal(obs[:, 4:], torch.eye(3)[t].expand(45, -1))
    assert agent.observe(first + 1e6, 0)[:, :4].max() == 10


def gradients(monkeypatch, tmp_path, T, rewards, values, logprobs, lengths=None, prior=0.0, **kw):
    """Gradients of the first step of main() after a rollout made by hand.

    Every decision (t, i, g) is read as a one-hot of its own, so that a column of weights has its gradient
    alone: (T, n, G) of the value, (T, n, G, P) of the policy's logits. The action is always 0 of P = 3."""
    n, G = rewards.shape
    k = T * n * G
    found = {}

    class Linear(crl_ppo.Agent):
        """Policy and critic are linear, and zero."""

        def start_at(self, sequences, worth):
            self.critic = torch.nn.Linear(k + T, 1, bias=False)
            self.actor = torch.nn.Linear(k + T, 3, bias=False)
            for name in ("critic", "actor"):
                found[name] = getattr(self, name).weight
                found[name].data.zero_()
            self.action_mask[:] = 1.0
            self.prior.data[:] = prior

    one_hot = torch.eye(k).view(T, n, G, -1)
    position = torch.eye(T)[:, None, None].expand(T, n, G, T)
    lengths = torch.ones(n, G).long() if lengths is None else lengths
    completions = [[[0] * length for length in row] for row in lengths.tolist()]
    given = [torch.zeros(T, n, G).long(), logprobs, values, rewards, completions]
    r = crl_ppo.Rollout(torch.cat([one_hot, position], -1), *given)
    everything = torch.tensor([[a] * T for a in range(2)])
    monkeypatch.setattr(crl_ppo, "Agent", Linear)
    monkeypatch.setattr(crl_ppo, "rollout", lambda *a, **k: r)
    monkeypatch.setattr(crl_ppo, "screen", lambda *a: (everything, torch.zeros(4, 2)))
    monkeypatch.setattr(torch, "randperm", torch.arange)
    stop(monkeypatch, torch.nn.utils, "clip_grad_norm_", 1)
    plain = dict(update_epochs=1, num_minibatches=1, epsilon=0.0, clip_coef=1e9, ent_coef=0.0)
    world = World(lambda row, answer: False, lambda *a: torch.zeros(4 * k), T=T, D=2, d=4 * k, n=n)
    with pytest.raises(KeyboardInterrupt):
        world.train(monkeypatch, tmp_path, **{**plain, **kw})
    value = found["critic"].grad[0, :k].view(T, n, G)
    return value, found["actor"].grad[:, :k].T.reshape(T, n, G, 3)


HAND = [  # lambda, advantages of answers of 1, 3, 2 and 5 tokens; 9: the answer has ended
    (1.0, [[0.5, 9, 9], [0.8, 0.6, 0.4], [-0.1, -0.3, 9], [0.5, 0.4, 0.3]]),
    (0.9, [[0.5, 9, 9], [0.704, 0.56, 0.4], [-0.07, -0.3, 9], [0.433, 0.37, 0.3]]),
    (0.0, [[0.5, 9, 9], [0.2, 0.2, 0.4], [0.2, -0.3, 9], [0.1, 0.1, 0.3]]),
]
RAISED = torch.tensor([1.0, 0.0, 0.0]) - 1 / 3  # slope of the logarithm of action 0's probability


@pytest.mark.parametrize("lam, expected", HAND)
def test_advantages_by_hand(monkeypatch, tmp_path, lam, expected):
    """Of three decisions; the reward comes at the last one before the end. Then the first step's loss."""
    values = torch.tensor([[0.5, 7, 7], [0.2, 0.4, 0.6], [0.1, 0.3, 7], [0.5, 0.6, 0.7]]).T[..., None]
    advantages = torch.tensor(expected).T[..., None]
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None]
    lengths = torch.tensor([1, 3, 2, 5])[:, None]
    alive = advantages != 9
    logprobs = torch.full((3, 4, 1), -math.log(3))
    given = (rewards, values, logprobs, lengths)
    value, policy = gradients(monkeypatch, tmp_path, 3, *given, gae_lambda=lam)
    # the value loss is half of (0 - return)^2, with a weight of 0.5; nine decisions count
    near(value, torch.where(alive, -0.5 * (advantages + values) / 9, 0.0), 1e-5)
    # the policy's: its probabilities are 1/3, the ratio is 1
    known = advantages[alive]
    normal = torch.where(alive, (advantages - known.mean()) / (known.std(correction=0) + 1e-4), 0.0)
    near(policy, -normal[..., None] * RAISED / 9, 1e-5)


def test_what_is_clipped_by_hand(monkeypatch, tmp_path):
    """Ratios of 1, 1.5 and 0.5 with advantages of either sign; the critic's change is clipped at 0.2 too."""
    values = torch.tensor([0.1, 0.5, 0.6, -0.5, 1.0])[None, :, None]
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])[:, None]
    ratios = torch.tensor([1.0, 1.5, 0.5, 0.5, 1.5])[None, :, None]
    given = (rewards, values, (1 / 3 / ratios).log())
    value, policy = gradients(monkeypatch, tmp_path, 1, *given, clip_coef=0.2)
    advantages = rewards[None] - values
    normal = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-4)
    assert (normal[0, :, 0] > 0).tolist() == [False, True, False, True, False]
    # 1.5 is clipped where more is better, 0.5 where less is
    counts = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.5])[None, :, None]
    near(policy, -(normal * counts)[..., None] * RAISED / 5, 1e-5)
    # The critic says 0 now. Within 0.2 of what it said it would be 0, 0.3, 0.4, -0.3 and 0.8. The larger
    # error counts: the clipped one, which has no slope, but for the second prompt.
    near(value[0, :, 0], torch.tensor([0.0, 0.5 * (0.0 - 1.0), 0.0, 0.0, 0.0]) / 5, 1e-5)


def test_baseline_and_entropy_by_hand(monkeypatch, tmp_path):
    """What the frozen model gets right earns nothing more, and is lost by a wrong answer. With no advantage
    the slope of the entropy is all there is, at probabilities that are not equal."""
    zero = torch.zeros(1, 2, 1)
    prior = torch.tensor([1.0, 0.0, 0.0])
    p = prior.softmax(0)
    given = (zero[0], zero, zero + p[0].log())
    with monkeypatch.context() as m:
        _, policy = gradients(m, tmp_path / "a", 1, *given, prior=prior, ent_coef=0.1)
    slope = -p * (p.log() - (p * p.log()).sum())  # of the entropy, by each logit
    near(policy[0, :, 0], -0.1 * slope.expand(2, -1) / 2, 1e-6)
    monkeypatch.setattr(World, "score", lambda world, row, tokens: (float(int(row["id"]) % 2), True))
    zero = torch.zeros(1, 2, 2)
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value, _ = gradients(monkeypatch, tmp_path / "b", 1, rewards, zero, zero - math.log(3))
    near(value[0], -0.5 * torch.tensor([[1.0, 0.0], [0.0, -1.0]]) / 4, 1e-6)


# ------------------------------------------------------------------------ the whole script
class Watch:
    """Keeps what a run made: environment, prompts, flags and rollouts."""

    def __init__(self, monkeypatch):
        self.rollouts = []
        rollout = crl_ppo.rollout

        def keep(made, args):
            self.args = args
            self.env, self.prompts, _ = made
            self.all_actions = list(self.env.actions)
            self.frozen = [v.clone() for v in self.frozen_now()]

        def watched_rollout(*a, **k):
            self.rollouts.append((rollout(*a, **k), a, k))
            if len(self.rollouts) <= 2:  # one that is drawn, and a greedy one on validation
                check_rollout(*self.rollouts[-1])
            return self.rollouts[-1][0]

        tiny.spy(monkeypatch, crl_ppo, "set_up", keep)
        monkeypatch.setattr(crl_ppo, "rollout", watched_rollout)

    def frozen_now(self):
        found = list(self.env.model.state_dict().values())
        for site in self.env.sites:
            found += [site.directions, *(site.sae.parameters() if site.sae is not None else [])]
        return found


T2 = dict(decisions=2, steer_tokens=0)
ONE_STEP = dict(update_epochs=1, num_minibatches=1)  # an update, so that the ratio is 1 there
VARIANTS = [
    ("one", dict(sae=("none",), layer=(1, 2), coef=(0.5, -1.0), group=3)),
    ("one", dict(shots=2, sae=("random:20",), layer=(2,), target_kl=0.01)),
    ("one", dict(max_new_tokens=3, **T2, **ONE_STEP)),
    ("long", dict(coef_mode="abs", coef=(9.0, 30.0))),
    ("long", dict(steer_tokens=2)),
    ("long", T2 | ONE_STEP),
    ("long", dict(decisions=3, steer_tokens=3, sae=("none",), layer=(1, 2), max_new_tokens=4, batch_size=2)),
]


def read_by_hand(env, prompt, begun=(), added=()):
    """What the policy reads at the last token (k,); NaN for missing ends."""
    hidden = plain(env, [*prompt.ids, *begun], added, hidden=True)[env.sites[0].layer]
    ends = [*prompt.ends, *[-1] * env.ends][: env.ends]
    nothing = torch.full((len(hidden[0]),), math.nan)
    return torch.cat([hidden[-1], *(hidden[end] if end >= 0 else nothing for end in ends)])


def check_rollout(r, call, options):
    """An answer has its own decisions, read at its own tokens, whatever its length and the prompts' order."""
    env, agent, rows = call[:3]
    epsilon = 0.0 if options else call[4]
    obs = r.obs.expand(-1, *r.rewards.shape, -1)
    for i, g in itertools.product(*map(range, r.rewards.shape)):
        prompt = env.prompts[rows[i]]
        own = r.actions[:, i, g].tolist()
        answer = r.completions[i][g]
        assert answer == plain_answer(env, prompt, env.args.max_new_tokens, held(env, own))
        for t in range(min(len(own), len(answer))):
            added = [(len(prompt.ids) - 1 + s, own[s]) for s in range(t)]
            near(obs[t, i, g], agent.observe(read_by_hand(env, prompt, answer[:t], added), t), 1e-3)
    policy = agent.get_policy(obs, epsilon)
    near(r.logprobs, policy.log_prob(r.actions).detach(), 1e-5)
    near(r.values, agent.get_value(obs).detach(), 1e-5)
    assert not options or torch.equal(r.actions, policy.probs.argmax(-1))


def check_log(run, watch, result):
    """interventions.jsonl, against a second computation of every answer from the actions that it names."""
    env = watch.env
    args = watch.args
    numbers = {json.dumps(env.describe(a)): a for a in range(env.noop + 1)}
    found = {}
    for record in lines(run / "interventions.jsonl"):
        found.setdefault(record["prompt_id"], []).append(record)
    val = watch.prompts["val"]
    assert list(found) == [prompt.row["id"] for prompt in val] and len(found) == result["val_n"] == 5
    unsteered = {}
    for prompt in val:
        records = found[prompt.row["id"]]
        actions = [numbers[json.dumps(record["steering"])] for record in records]
        said = plain_answer(env, prompt, args.max_new_tokens, lambda t, own=actions: own[t])
        assert [record["token"] for record in records] == said
        assert [record["position"] for record in records] == list(range(len(said)))
        bare = plain(env, prompt.ids + said[:-1])[len(prompt.ids) - 1 :].argmax(-1).tolist()
        assert [record["unsteered_token"] for record in records] == bare
        unsteered[prompt.row["id"]] = plain_answer(env, prompt, args.max_new_tokens)
        for t, record in enumerate(records):
            steered = t < args.steer_tokens or args.steer_tokens == 0
            assert record["schema"] == crl_ppo.SCHEMA == 5 and record["task"] == "file"
            assert record["decided"] == (t < args.decisions)
            assert record["action"] == (records[t - 1]["action"] if t >= args.decisions else record["action"])
            assert record["steering"] == (env.describe(record["action"]) if steered else None)
            assert record["token_text"] == env.tok.decode([record["token"]])
            assert record["unsteered_token_text"] == env.tok.decode([record["unsteered_token"]])
            assert record["logprob"] <= 0 <= record["entropy"] + 1e-6 and record["mask_size"] >= 2
            assert record["reward"] == env.score(prompt.row, said)[0]
            assert record["unsteered_reward"] == env.score(prompt.row, unsteered[prompt.row["id"]])[0]
    for who, name in (("steered", "reward"), ("unsteered", "unsteered_reward")):
        assert result[who] == pytest.approx(sum(records[0][name] for records in found.values()) / 5)
    assert result["corrected"] - result["misguided"] == round(5 * (result["steered"] - result["unsteered"]))


def check_metrics(metrics, watch):
    """metrics.jsonl, against the rollouts."""
    drawn = [(r, a) for r, a, k in watch.rollouts if "greedy" not in k]
    greedy = [r for r, a, k in watch.rollouts if "greedy" in k]
    assert [m["update"] for m in metrics] == [1, 2, 3, 4] and len(drawn) == 4 and len(greedy) == 5
    for number, (m, (r, (env, agent, rows, G, epsilon))) in enumerate(zip(metrics, drawn, strict=True)):
        baseline = env.memo[rows, -1].mean().item()
        assert m["objective/reward"] == pytest.approx(r.rewards.mean().item(), abs=1e-5)
        assert m["objective/unsteered_reward"] == pytest.approx(baseline, abs=1e-5)
        assert m["objective/val_reward"] == pytest.approx(greedy[number].rewards.mean().item())
        assert m["charts/frac"] == 1 - number / 4 and m["charts/epsilon"] == epsilon == 0.5 * m["charts/frac"]
        assert all(math.isfinite(value) for value in m.values()), m
        assert watch.args.group == G and r.actions.shape == (watch.args.decisions, len(rows), G)
        assert all(agent.action_mask[t][some].all() for t, some in enumerate(r.actions))
        assert torch.equal(r.rewards, env.score_all([env.prompts[row] for row in rows], r.completions))
        if watch.args.update_epochs == 1:
            assert abs(m["losses/approx_kl"]) < 1e-6 and m["losses/clipfrac"] == 0
    assert metrics[0]["losses/entropy"] != metrics[-1]["losses/entropy"]


@pytest.mark.parametrize("task, kw", VARIANTS, ids=str)
def test_a_run_learns_and_its_files_say_what_happened(small, tmp_path, monkeypatch, capsys, task, kw):
    """Also where answers end early, and more of them are asked for than are generated at once."""
    monkeypatch.setattr(crl_ppo, "ANSWERS", 2)
    monkeypatch.setattr(crl_tasks, "end_tokens", lambda *a: set(range(1, 287, 6)))
    watch = Watch(monkeypatch)
    run = go(small, tmp_path, task, **kw)
    result = final(run)
    env = watch.env
    args = watch.args
    assert {path.name for path in run.iterdir()} == {*SAME, "args.json", "final.json"}
    assert all(torch.equal(before, now) for before, now in zip(watch.frozen, watch.frozen_now(), strict=True))
    last = load_file(run / "last.safetensors")
    torch.manual_seed(args.seed)
    first = crl_ppo.Agent(env.obs_dim, env.noop + 1, args.decisions).state_dict()
    changed = {key.split(".")[0] for key, v in first.items() if not torch.equal(last[f"agent/{key}"], v)}
    assert {"actor", "critic", "prior"} <= changed
    saved = load_file(run / "rewards.safetensors")
    of_training = saved["obs"][:8, 0].nanmean(0)
    near(last["agent/obs_mean"][0].nan_to_num(), of_training.nan_to_num())
    check_metrics(lines(run / "metrics.jsonl"), watch)
    check_log(run, watch, result)
    out = capsys.readouterr().out
    assert result["verdict"] in out and str(run) in out and "constant " in out

    # what prompts earn
    train = watch.prompts["train"]
    prompts = train + watch.prompts["val"]
    kept = saved["kept"].tolist()
    assert [watch.all_actions[a] for a in kept] == env.actions and kept[-1] == len(watch.all_actions) - 1
    assert len(train) == result["train_n"] == 8 and result["mask_size"] == len(kept) == env.noop + 1
    assert len(kept) <= 4 * args.decisions + 1
    for i, prompt in enumerate(prompts):
        for action in range(env.noop + 1) if args.decisions == 1 else [env.noop]:
            said = plain_answer(env, prompt, args.max_new_tokens, held(env, [action]))
            assert saved["memo"][i, action] == env.score(prompt.row, said)[0]
        torch.testing.assert_close(saved["obs"][i, 0], read_by_hand(env, prompt), equal_nan=True)
    assert saved["obs"].shape[2] == 16 * (5 if task == "one" else 2)

    # where the policy starts
    sequences = saved["sequences"]
    worth = saved["worth"]
    if args.decisions == 1:
        sequences = torch.arange(env.noop)[:, None]
        worth = saved["memo"][:8, :-1].mean(0)
        assert result["coverage"] == pytest.approx(saved["memo"][8:].amax(1).mean().item())
    constant = sequences[worth.argmax()].tolist()
    assert result["constant_action"] == " + ".join(map(env.label, constant))
    assert load_file(run / "best.safetensors")["agent/constant"].tolist() == constant


def test_a_kl_target_ends_the_passes(small, tmp_path, monkeypatch):
    steps = []
    tiny.spy(monkeypatch, torch.optim.AdamW, "step", lambda *a: steps.append(a))
    go(small, tmp_path, update_epochs=6, target_kl=-1.0)
    assert len(steps) == 4 * 2  # one pass of two minibatches an update, not six


def same(one, two):
    """Names of the files in which two runs differ, bit by bit, but for the seconds that they took."""
    differing = [name for name in SAME if not filecmp.cmp(one / name, two / name, shallow=False)]
    ends = [{k: value for k, value in final(run).items() if not k.endswith("_s")} for run in (one, two)]
    return differing if ends[0] == ends[1] else [*differing, "final.json"]


def test_the_best_checkpoint_is_the_best_on_validation(small, tmp_path):
    run = go(small, tmp_path, "long", updates=8, learning_rate=0.03, seed=3)
    scores = [m["objective/val_reward"] for m in lines(run / "metrics.jsonl")]
    _, state = crl_ppo.hub.load_tensors(run / "best.safetensors", {})
    assert state["best"] == max(scores) == pytest.approx(final(run)["steered"]) and len(set(scores)) > 1
    assert state["update"] == len(scores) - scores[::-1].index(max(scores))


def test_labels_of_validation_and_test_never_reach_the_policy(small, tmp_path, monkeypatch):
    """With other labels of validation prompts the policy is the same; test rows are not even looked at."""
    set_up = crl_ppo.set_up
    runs = []

    class Secret(list):
        def __iter__(self):
            raise AssertionError("a test row was read")

        __getitem__ = __iter__

    for change in (0, 1):

        def other(args, change=change):
            env, prompts, identity = set_up(args)
            for prompt in prompts["val"]:
                prompt.row["secret"] = change
            return env, prompts | {"test": Secret(prompts["test"])}, identity

        def score(row, tokens, *a):
            return float((sum(tokens) + row.get("secret", 0)) % 2), True

        monkeypatch.setattr(crl_ppo, "set_up", other)
        monkeypatch.setattr(crl_tasks, "score_tokens", score)
        runs.append(go(small, tmp_path / str(change), updates=1))
    one, two = (load_file(run / "last.safetensors") for run in runs)
    assert all(torch.equal(v, two[key]) for key, v in one.items() if key != "state")
    assert final(runs[0])["constant_action"] == final(runs[1])["constant_action"]
    assert not torch.equal(*(load_file(run / "rewards.safetensors")["memo"] for run in runs))


def test_stored_flags_are_those_that_were_resolved(small, tmp_path, monkeypatch):
    """Also where there is no git. Another seed makes another run."""
    monkeypatch.setenv("PATH", "")
    run = go(small, tmp_path, "long", coef=None)
    assert json.loads((run / "args.json").read_text())["versions"]["git"] is None
    assert "last.safetensors" in same(run, go(small, tmp_path, "long", coef=None, seed=2))
    args = crl_ppo.stored_args(run)
    assert args.coef == crl_tasks.LONG_ANSWERS["coef"] and args.layer == (1,) and args.steer_tokens == 1
    env, prompts, identity = crl_ppo.set_up(args)
    assert identity.items() <= hub.load_tensors(run / "best.safetensors", {})[1].items()
    env.ask(prompts["train"] + prompts["val"])
    crl_ppo.load_rewards(run / "rewards.safetensors", identity, env)
    agent = crl_ppo.load_agent(run / "best.safetensors", identity)
    greedy = crl_ppo.rollout(env, agent, torch.arange(8, 13), greedy=True)
    assert greedy.rewards.mean() == pytest.approx(final(run)["steered"])
    one_line(lambda: crl_ppo.load_agent(run / "best.safetensors", identity | {"seed": 7}), "seed differs")


def stop(monkeypatch, owner, name, call, kill=False):
    """The process is interrupted, or killed, at the given call of owner.name(), before it does anything."""
    original = getattr(owner, name)
    left = [call]

    def counted(*a, **k):
        left[0] -= 1
        if left[0] == 0 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] == 0:  # not by a signal: SIGINT is ignored where pytest runs in the background
            raise KeyboardInterrupt
        return original(*a, **k)

    monkeypatch.setattr(owner, name, counted)


STOPS = [  # task, a function of the run, its call, what is kept
    ("one", {}, crl_ppo, "cover", 2, ""),
    ("one", {}, hub, "save_tensors", 1, ""),
    ("one", {}, os, "replace", 2, ""),  # rewards.safetensors is written under another name, and not renamed
    ("one", {}, crl_ppo.Agent, "get_policy", 14, "rewards best last"),
    ("one", {}, os, "replace", 4, "rewards best"),  # best is newer than last
    ("one", {}, hub, "write_json", 2, "rewards best last"),
    ("long", dict(updates=30), crl_ppo.Agent, "get_policy", 60, "rewards best last"),
    ("long", dict(T2, updates=25), crl_ppo.Agent, "get_policy", 40, "rewards best last"),
]


@pytest.mark.parametrize("task, kw, owner, name, call, kept", STOPS)
def test_a_run_that_was_killed_is_resumed_to_the_same_bytes(
    small, tmp_path, task, kw, owner, name, call, kept
):
    def killed_run():
        with pytest.MonkeyPatch.context() as m:
            stop(m, owner, name, call, kill=True)
            go(small, tmp_path / "parts", task, **kw)

    whole = go(small, tmp_path / "whole", task, **kw)
    assert in_children(killed_run, ()) == [-signal.SIGKILL]
    [run] = (tmp_path / "parts").iterdir()
    assert [f for f in ("rewards", "best", "last") if (run / f"{f}.safetensors").exists()] == kept.split()
    assert crl_ppo.main(crl_ppo.Args(resume=str(run))) == run
    assert same(whole, run) == []


def of_two(rank, port, args):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
    crl_ppo.PartialState._reset_state()
    crl_ppo.main(args)


@pytest.mark.parametrize("task, kw", [("one", {}), ("long", {}), ("long", T2)], ids=str)
def test_two_processes_give_what_one_gives(small, tmp_path, task, kw):
    """What is generated is shared out in the same batches; PPO runs alike on both, and one of them writes."""
    one = go(small, tmp_path / "one", task, batch_size=2, **kw)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    args = flags(small, tmp_path / "two", task, batch_size=2, **kw)
    assert in_children(of_two, (0, port, args), (1, port, args)) == [0, 0]
    [two] = (tmp_path / "two").iterdir()
    assert same(one, two) == []
