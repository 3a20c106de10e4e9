"""The environment: sites, actions, hook, forward passes and rewards, each against a plain reference."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import D_MODEL, WINDOW, near, plain, spy, tiny_args, tiny_env, tiny_prompts, tiny_sae, tiny_site

import crl_ppo
import crl_tasks
from crl_ppo import fixed, residual_hook
from crl_tasks import hub, passes

LENGTHS = (2, WINDOW + 1, 5, 3 * WINDOW)  # left-padded together, two of them beyond the sliding window


def tupled(cls):
    """A decoder layer that returns a tuple, as those of some architectures do."""
    own = {"forward": lambda self, *a, **k: (cls.forward(self, *a, **k), "more")}
    own["__call__"] = lambda self, *a, **k: cls.__call__(self, *a, **k)[0]
    return type("Tupled", (cls,), own)


@pytest.fixture(params=(*tiny.ARCHS, "mistral", "tuples"))
def model(request):
    """A model; whatever a test does with it leaves no weight changed and nothing hooked."""
    model = tiny.tiny_model("llama" if request.param == "tuples" else request.param)
    for layer in model.model.layers if request.param == "tuples" else ():
        layer.__class__ = tupled(type(layer))
    weights = {name: v.clone() for name, v in model.state_dict().items()}
    yield model
    assert all(torch.equal(v, weights[name]) for name, v in model.state_dict().items())
    assert tiny.untouched(model)


def some_actions(env, *shape):
    """Random actions of this shape, some of them the no-op."""
    actions = torch.randint(env.noop, shape, generator=torch.Generator().manual_seed(3))
    return actions.masked_fill(actions % 7 == 0, env.noop)


def logits_of(monkeypatch, env):
    """The logits of all passes through the whole model from now on, in a list."""
    found = []
    spy(monkeypatch, env, "forward", lambda out, module, *a: module is env.model and found.append(out.logits))
    return found


# ----------------------------------------------------------------------- the site, the actions
ASKED = [  # question, options, and how the text goes on from one
    ("\n\n Which?", ["x", "long one"]),
    ("Which is it? A. or (B)\nB. yes, or so", ["x", "B. yes", "no"]),
    ("Say it.", None),
]
SHOT = {"task": "file", "prompt": "A. x\nB. x?", "choices": ["x", "long one"], "answer": 0}


@pytest.mark.parametrize("shared", [False, True])
def test_the_policy_reads_the_last_token_and_where_options_or_the_question_end(model, shared):
    """What looks like an option in the question or in a solved example does not count."""
    env = tiny_env(None, model=model, ends=3)
    prompts = []
    for question, options in ASKED:
        row = {"task": "file", "prompt": question, "choices": options}
        prompts.append(crl_tasks.encode_prompt(env.tok, row, [SHOT]))
    if shared:
        env.ask(prompts)
        assert env.tok.decode(env.prefix).endswith("long one\nAnswer: A\n")
    x = env.prefill(prompts).x
    assert x.shape == (3, 4, D_MODEL)
    for b, (question, options) in enumerate(ASKED):
        hidden = plain(env, prompts[b].ids, hidden=True)[2]
        near(x[b, 0], hidden[-1])
        text = env.tok.decode(prompts[b].ids).removeprefix("<bos>")
        pieces = [f"\n{letter}. {option}" for letter, option in zip("ABC", options or (), strict=False)]
        pieces = pieces or [question]
        for row, piece in zip(x[b, 1:], pieces, strict=False):
            end = text.rindex(piece) + len(piece)
            near(row, hidden[len(env.tok.encode(text[:end])) - 1])
        assert x[b, 1 + len(pieces) :].isnan().all()


def test_what_is_read_is_never_part_of_the_shared_beginning():
    """Not where options end, not the last token; and a prompt that is alone shares nothing."""
    env = tiny_env("llama", ends=2)
    first, second = tiny_prompts(env, [9, 9])
    hidden = plain(env, first.ids, hidden=True)[2]
    for ends, length in (([-1, -1], 7), ([4, -1], 3), ([6, 3], 2)):
        env.ask([first, second._replace(ids=first.ids, ends=ends)])
        assert env.prefix == first.ids[:length]
        x = env.prefill(env.prompts).x[1]
        near(x[0], hidden[-1])
        for number, end in enumerate(ends):
            if end < 0:
                assert x[1 + number].isnan().all()
            else:
                near(x[1 + number], hidden[end])
    env.ask([first])
    assert env.prefix == []


def test_sites_strengths_and_signs_are_one_list_of_actions():
    sites = [tiny_site(1, 5), tiny_site(3, sae=tiny_sae(d_sae=10))]
    sites[1].names[4] = {"name": "dogs"}
    strengths = (0.4, -0.4, 0.8, -0.8)
    env = tiny_env("llama", sites=sites, coef=strengths)
    expected = []
    for (layer, n), coef in itertools.product([(1, 5), (3, 10)], strengths):
        for feature in range(n):
            name = "dogs" if (layer, feature) == (3, 4) else ""
            expected.append({"layer": layer, "feature": feature, "name": name, "coefficient": coef})
    assert [env.describe(a) for a in range(env.noop)] == expected and env.describe(env.noop) is None
    assert [env.label(a) for a in (0, 54, 60)] == ["1:0  x 0.4", "3:4 dogs x -0.8", "no-op"]
    assert env.noop == 60 and env.steering.shape == (61, D_MODEL) and env.memo.shape == (0, 61)
    assert env.add(0, torch.ones(61, D_MODEL).bfloat16(), torch.arange(61)).dtype == torch.bfloat16
    kept = torch.tensor([54, 3, 60])
    vectors = env.steering[kept]
    env.ask(tiny_prompts(env, LENGTHS))
    env.memo[:] = 1.0
    env.keep(kept)
    assert [env.describe(a) for a in range(3)] == [expected[54], expected[3], None]
    assert torch.equal(env.steering, vectors) and env.site_of.tolist() == [1, 0, -1] and env.noop == 2
    assert env.memo.shape == (4, 3) and env.memo.isnan().all() and env.completions == [{}] * 4


# ------------------------------------------------------------------------------ forward passes
def answers_by_hand(env, prompts, actions, steps, begun=None):
    """The answers that generate() has to give under actions (N, G, T), by tiny.plain_answer()."""
    begun = begun.tolist() if begun is not None else [()] * actions.shape[1]
    answers = []
    for prompt, chosen in zip(prompts, actions.tolist(), strict=True):
        pairs = zip(chosen, begun, strict=True)
        answers.append([tiny.plain_answer(env, prompt, steps, tiny.held(env, own), s) for own, s in pairs])
    return answers


@pytest.mark.parametrize("mode", ["norm", "abs"])
@pytest.mark.parametrize("layers", [(2,), (0, 3), (1, tiny.N_LAYERS - 1), (tiny.N_LAYERS - 1,)])
def test_letters_equal_hooked_full_forward_passes(monkeypatch, model, layers, mode):
    """The logits themselves, over sites, strengths and signs; a batch is as its rows."""
    coef = (0.4, -0.8) if mode == "norm" else (3.0, -6.0)
    env = tiny_env(None, layers, model=model, coef=coef, coef_mode=mode)
    prompts = tiny_prompts(env, LENGTHS)
    actions = some_actions(env, 4, 5, 1)
    actions[:, 0] = env.noop
    logits = logits_of(monkeypatch, env)
    answers = env.generate(prompts, fixed(actions), 5)
    assert answers == answers_by_hand(env, prompts, actions, 1)
    whole = logits[0]
    order = sorted(range(4), key=lambda i: LENGTHS[i])
    for row, i in zip(whole, order, strict=True):
        env.generate([prompts[i]], fixed(actions[i : i + 1]), 5)
        near(logits[-1][0], row)
        for g in range(5):
            near(row[g], plain(env, prompts[i].ids, [(-1, actions[i, g, 0])])[-1])
    assert ((whole - whole[:, :1]).abs().amax(-1) > 0.01).sum() > 12


LONG = [((2,), 1, 0), ((2,), 1, 1), ((0, 3), 1, 3), ((0, 3), 3, 0), ((2,), 3, 3), ((1, 3), 2, 4)]
LONG = [(*case, None) for case in LONG] + [((2,), 1, 0, [[70, 80], [90, 100], [9, 60]])]


@pytest.mark.parametrize("layers, T, steer_tokens, begun", LONG)
def test_long_answers_equal_full_recomputes(model, layers, T, steer_tokens, begun):
    """Cached as uncached, beyond windows, in a batch as alone, each answer up to its own end.

    Those that begin with given tokens go on as the steered model does after them."""
    kw = dict(coef=(0.4, -0.8), steer_tokens=steer_tokens, decisions=T)
    env = tiny_env(None, layers, model=model, one=False, **kw)
    begun = torch.tensor(begun) if begun else None
    steps = WINDOW + 2
    prompts = tiny_prompts(env, LENGTHS, choices=0)
    actions = some_actions(env, 4, 3, T)
    actions[:, 2] = env.noop
    env.eos = set()
    longest = answers_by_hand(env, prompts, actions, steps, begun)
    env.eos = {longest[0][0][1], longest[1][1][3], longest[2][0][0]}
    prompts[3].ids[-1] = longest[0][0][1]  # a prompt that ends so is asked all the same
    expected = answers_by_hand(env, prompts, actions, steps, begun)
    assert env.generate(prompts, fixed(actions), 3, begun, steps) == expected
    assert len({len(answer) for answer in sum(expected, [])}) > 1
    for i, prompt in enumerate(prompts):
        assert env.generate([prompt], fixed(actions[i : i + 1]), 3, begun, steps) == expected[i : i + 1]


@pytest.mark.parametrize("decisions, steps", [(1, 1), (1, 5), (2, 5)])
@pytest.mark.parametrize("how", ["coefficient 0", "no-op"])
def test_coefficient_zero_and_no_op_change_no_bit(model, monkeypatch, how, decisions, steps):
    """Of any logits, against the same passes with nothing added."""
    coef = (0.0 if how == "coefficient 0" else 0.5,)
    env = tiny_env(None, (1, 3), model=model, coef=coef, decisions=decisions)
    prompts = tiny_prompts(env, LENGTHS)
    actions = torch.arange(20).view(4, 5, 1).expand(-1, -1, decisions)
    if how == "no-op":
        actions = torch.full_like(actions, env.noop)
    logits = logits_of(monkeypatch, env)
    said = env.generate(prompts, fixed(actions), 5, steps=steps)
    monkeypatch.setattr(env, "add", lambda site, h, actions: h)
    assert env.generate(prompts, fixed(actions), 5, steps=steps) == said
    assert len(logits) == 2 * steps and all(map(torch.equal, logits[:steps], logits[steps:]))


@pytest.mark.parametrize("steps", [1, 2 * WINDOW])
def test_the_shared_beginning_changes_nothing(model, monkeypatch, steps):
    """Keys and values of what all prompts begin with are computed once, windows or not."""
    env = tiny_env(None, (1, 3), model=model, coef=(0.5,), steer_tokens=0, ends=1)
    env.eos = set()
    head = tiny_prompts(env, [WINDOW + 4], seed=9)[0].ids
    prompts = tiny_prompts(env, (WINDOW + 1, 5, 2 * WINDOW))
    prompts = [prompt._replace(ids=head + prompt.ids[1:], ends=[len(head) + 2]) for prompt in prompts]
    actions = some_actions(env, 3, 2, 1)
    expected = answers_by_hand(env, prompts, actions, steps)
    alone = env.prefill(prompts)
    env.ask(prompts)
    assert env.prefix == head[:-1]
    read = []
    spy(monkeypatch, env, "forward", lambda out, module, ids, *a: read.append(ids.shape[1]))
    together = env.prefill(prompts)
    assert read == [2 * WINDOW] and alone.position.shape == together.position.shape
    near(together.x, alone.x)
    assert env.generate(prompts, fixed(actions), 2, steps=steps) == expected
    other = tiny_prompts(env, [5, 3])  # a batch that does not begin so
    nothing = torch.full((2, 1, 1), env.noop)
    assert env.generate(other, fixed(nothing), 1, steps=3) == answers_by_hand(env, other, nothing, 3)


def test_earlier_tokens_and_other_answers_are_never_touched(model, monkeypatch):
    """Not a bit of the prompts' keys and values changes, nor of the logits of the other answers."""
    env = tiny_env(None, (1, 3), model=model, one=False, coef=(0.5,), decisions=3, steer_tokens=0)
    env.eos = set()
    batch = env.prefill(tiny_prompts(env, LENGTHS, choices=0))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in batch.cache.layers]
    logits = logits_of(monkeypatch, env)
    actions = some_actions(env, 4, 3, 3)
    changed = actions.clone()
    changed[:, 1] = (actions[:, 1] + 1) % env.noop
    begun = torch.randint(5, 200, (3, 4))  # the same tokens, so that the actions alone differ
    for chosen in (actions, changed, actions):
        choose = partial(fixed(chosen), rows=torch.arange(4), columns=torch.arange(3))
        env.decode(batch, choose, 3, begun, 4)
        for layer, (keys, values) in zip(batch.cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    for t in range(4):
        one, two, again = logits[t], logits[4 + t], logits[8 + t]
        assert torch.equal(one[:, ::2], two[:, ::2]) and torch.equal(one, again)
        assert (one[:, 1] - two[:, 1]).abs().amax(-1).min() > 0.001


def test_hooks_are_gone_after_an_exception(model, monkeypatch):
    env = tiny_env(None, (1, 3), model=model, one=False, decisions=2, steer_tokens=2)
    prompts = tiny_prompts(env, [4, 6])
    actions = some_actions(env, 2, 3, 2)

    def choose(obs, t, rows, columns):
        return actions[rows, :, 0 // (1 - t)]  # fails at the second decision

    with pytest.raises(ZeroDivisionError):
        env.generate(prompts, choose, 3)
    assert tiny.untouched(model)
    for name, steps in (("add", 1), ("add", 3), ("read", 3)):
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(env, name, lambda *a: 1 / 0)
            env.generate(prompts, fixed(actions), 3, steps=steps)
        assert tiny.untouched(model)
    with pytest.raises(AttributeError), residual_hook([env.layers[1], None], env.add):
        pass  # the first hook is there when the second one fails
    with pytest.raises(KeyboardInterrupt), passes.skipped(env.layers[:2]):
        assert "forward" in env.layers[1].__dict__ and "forward" not in env.layers[2].__dict__
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------- batches, rewards
@pytest.mark.parametrize("steps", [1, 3])
def test_batches_are_of_like_length_and_bounded_in_prompts_and_answers(monkeypatch, steps):
    """At most 3 * 2 answers at once; each answer is the one that its prompt and action give."""
    env = tiny_env("llama", batch_size=3, coef=(0.5,))
    monkeypatch.setattr(crl_ppo, "ANSWERS", 2)
    prompts = tiny_prompts(env, (7, 20, 3, 5, 8, 6, 9))
    actions = some_actions(env, len(prompts), 5, 1)
    expected_answers = answers_by_hand(env, prompts, actions, steps)
    sizes = []
    read = []
    spy(monkeypatch, env, "decode", lambda out, batch, choose, G, *a: sizes.append((len(batch.prompts), G)))
    spy(monkeypatch, env, "prefill", lambda out, some: read.append([len(prompt.ids) for prompt in some]))
    assert env.generate(prompts, fixed(actions), 5, steps=steps) == expected_answers
    assert [length for lengths in read for length in lengths] == sorted(len(p.ids) for p in prompts)
    assert max(B * G for B, G in sizes) <= 6 and max(B for B, _ in sizes) <= 3
    assert sum(B * G for B, G in sizes) == 5 * len(prompts)


def test_batches_of_long_prompts_are_smaller(monkeypatch):
    monkeypatch.setattr(passes, "TOKENS", 10)
    prompts = [crl_tasks.Prompt({}, [0] * length, []) for length in (40, 5, 20, 10, 21, 9, 9, 500)]
    found = [rows.tolist() for rows in passes.batches(prompts, 4)]
    assert found == [[1, 5, 6, 3], [2], [4], [0], [7]] and passes.batches([], 4) == []
    monkeypatch.setattr(passes, "TOKENS", 20)
    assert [len(rows) for rows in passes.batches(prompts, 4)] == [4, 2, 1, 1]


def test_what_was_tried_is_remembered(monkeypatch):
    env = tiny_env("llama", coef=(0.5,), ends=1)
    prompts = tiny_prompts(env, LENGTHS)
    env.ask([prompt._replace(ends=[0]) for prompt in prompts])
    env.letters = [range(c, 287 if c < 4 else 0, 4) for c in range(26)]
    asked = []
    spy(monkeypatch, env, "generate", lambda out, some, *a: asked.append([p.row["id"] for p in some]))
    answers = answers_by_hand(env, prompts, torch.arange(25).view(1, 25, 1).expand(4, -1, -1), 1)
    expected = torch.tensor([[float(tokens[0] % 4 == i) for tokens in row] for i, row in enumerate(answers)])
    assert 0.1 < expected.mean() < 0.9
    rows = torch.tensor([2, 0])
    actions = torch.tensor([[3, 4, 3], [5, 24, 6]])
    assert torch.equal(env.rewards(rows, actions), expected[rows[:, None], actions])
    assert (~env.memo.isnan()).sum() == 5 and env.completions[0] == {a: answers[0][a] for a in (5, 24, 6)}
    for i in (2, 0):
        near(env.obs[i, 0, :D_MODEL], plain(env, prompts[i].ids, hidden=True)[2][-1])
        near(env.obs[i, 0, D_MODEL:], plain(env, prompts[i].ids, hidden=True)[2][0])
    assert env.obs[1].isnan().all()
    env.rewards(rows, actions)
    env.rewards(torch.tensor([0, 2]), torch.tensor([[24, 5], [3, 3]]))
    assert asked == [["2", "0"]]  # nothing was new
    everything = env.rewards(torch.arange(4), torch.arange(25))
    assert torch.equal(everything, expected) and asked[1:] == [["0", "1", "2", "3"]]
    env.ask(env.prompts)
    assert env.memo.isnan().all() and env.obs.isnan().all() and env.completions == [{}] * 4


@pytest.mark.parametrize("steps", [1, 3])
def test_an_action_that_overflows_ends_its_own_answer_alone(model, steps):
    """Not-a-number spreads along the sequence that all answers to a prompt share; theirs must be as alone."""
    T = min(steps, 2)
    env = tiny_env(None, model=model, coef=(0.5,), max_new_tokens=steps, steer_tokens=0, decisions=T)
    env.steering[3] = 3e38
    env.eos = set()
    env.letters = [range(287)] * 26  # any token would be right
    prompts = tiny_prompts(env, LENGTHS)
    actions = torch.tensor([[3, 3], [4, 3], [4, 4], [5, env.noop]])[:, :T].expand(4, 4, T)
    answers = env.generate(prompts, fixed(actions), 4)
    expected = answers_by_hand(env, prompts, actions[:, 2:], steps)
    for row, finite in zip(answers, expected, strict=True):
        assert row == [[], finite[0][:1], *finite]
    if steps == 1:
        assert env.score_all(prompts, answers)[0].tolist() == [0.0, 1.0, 1.0, 1.0]
        assert env.score(prompts[0].row, answers[0][0]) == (0.0, False)


def test_a_model_whose_layers_cannot_be_found_is_refused():
    model = tiny.tiny_model("llama")
    model.config.num_hidden_layers = 7
    tiny.one_line(lambda: tiny_env(None, model=model), "found no list of", "decoder layers to hook")


# ------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("training", [False, True])
def test_saelens_directory(tmp_path, training):
    spec = tiny.tiny_sae_dir(tmp_path / "sae", training=training)
    hub.write_jsonl(tmp_path / "sae" / "features.jsonl", [{"feature": 3, "name": "numbers"}])
    config = tiny.tiny_model("llama").config
    [site] = hub.load_sites(tiny_args(sae=(spec,)), config)
    W = tiny_sae().W_dec.detach()
    torch.testing.assert_close(site.directions, W / W.norm(dim=1, keepdim=True))
    assert (site.layer, site.name) == (2, "sae") and site.names == {3: {"feature": 3, "name": "numbers"}}
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    assert torch.equal(site.sae.encode(x) > 0, tiny_sae().encode(x) > 0)
    assert not any(p.requires_grad for p in site.sae.parameters())
    tensors = load_file(f"{spec}/sae_weights.safetensors")
    save_file(tensors | {"b_enc": tensors["b_enc"] + 1}, f"{spec}/sae_weights.safetensors")
    assert hub.load_sites(tiny_args(sae=(spec,)), config)[0].hash != site.hash
    before = tiny.tiny_sae_dir(tmp_path / "pre", hook_name="blocks.2.hook_resid_pre")  # what layer 1 puts out
    assert hub.load_sites(tiny_args(sae=(before,)), config)[0].layer == 1


def test_sites_without_an_sae():
    config = tiny.tiny_model("llama").config
    own, other = hub.load_sites(tiny_args(sae=("none",), layer=(1, 3)), config)
    assert torch.equal(own.directions, torch.eye(D_MODEL)) and (own.layer, other.layer) == (1, 3)
    first, second = hub.load_sites(tiny_args(sae=("random:50",), layer=(1, 3)), config)
    assert first.directions.shape == (50, D_MODEL) and not torch.equal(first.directions, second.directions)
    near(first.directions.norm(dim=1), torch.ones(50), 1e-6)
    [again] = hub.load_sites(tiny_args(sae=("random:50",), layer=(1,)), config)
    [seed_2] = hub.load_sites(tiny_args(sae=("random:50",), layer=(1,), seed=2), config)
    assert again.hash == first.hash != seed_2.hash
    mixed = hub.load_sites(tiny_args(sae=("random:5", "none"), layer=(0, 4)), config)
    assert [len(site.directions) for site in mixed] == [5, D_MODEL]


def test_gemma_scope_layout_out_of_the_hub_cache(tmp_path, monkeypatch):
    """Of full size, since SAELens's loader knows one width only; decoder row f has norm 1 + f % 7."""
    import huggingface_hub.constants

    repo = tmp_path / "models--google--gemma-scope-2b-pt-res"
    folder = repo / "snapshots" / "0" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0")
    f = np.arange(16384)
    W = np.zeros((16384, 2304), np.float16)
    W[f, (5 * f) % 2304] = 1 + f % 7
    arrays = {"W_enc": np.ascontiguousarray(W.T), "W_dec": W, "threshold": np.float16([0.5] * 16384)}
    arrays |= {"b_enc": np.zeros(16384, np.float16), "b_dec": np.zeros(2304, np.float16)}
    np.savez(folder / "params.npz", **arrays)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = tiny.tiny_model("gemma2").config
    config.hidden_size = 2304
    config.num_hidden_layers = 21
    args = tiny_args(model="gemma2-2b")
    [site] = hub.load_sites(args, config)
    assert (site.layer, site.name) == (20, "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical")
    assert torch.equal(site.directions, torch.from_numpy(W > 0).float())
    params = folder / "params.npz"
    params.write_bytes(params.read_bytes()[:10000])
    tiny.one_line(lambda: hub.load_sites(args, config), f"cannot read the SAE {site.name}")


@pytest.mark.parametrize("times, chosen", [((3.0, 1.0), "bfloat16"), ((1.2, 1.0), "float32")])
def test_a_loaded_model_is_frozen_in_the_type_that_multiplies_faster(
    tmp_path, monkeypatch, capsys, times, chosen
):
    tiny.save_tiny(tmp_path / "own", "llama")
    left = list(times)  # of float32 and bfloat16, the best of several
    monkeypatch.setattr(hub.timeit, "repeat", lambda *a, **k: [9.0, left.pop(0)])
    args = tiny_args(model=str(tmp_path / "own"), dtype="auto")
    model, tok, name = crl_ppo.load_model(args)
    assert model.dtype == getattr(torch, chosen) and args.dtype == chosen
    assert f"--dtype auto: {chosen} on cpu" in capsys.readouterr().out and left == []
    assert name == "own" and not model.training and tiny.untouched(model) and len(tok) == 287
    assert not any(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------ embedded model
@pytest.mark.embedded
@pytest.mark.parametrize("name", hub.GGUFS)
def test_embedded_model(name):
    wheel = next(iter(hub.GGUFS[name][1]))
    if not Path(f"~/.cache/crl/{name}-{hub.WHEELS[wheel][:8]}").expanduser().is_dir():
        pytest.skip(f"{name} is not in the cache")
    coef = (0.5 * hub.STRENGTH.get(name, 1),)
    args = tiny_args(model=name, coef=coef, sae=("auto",), decisions=2, steer_tokens=2)
    model, tok, _ = crl_ppo.load_model(args)
    env = crl_ppo.Environment(args, model, tok, hub.load_sites(args, model.config), 4)
    prompts = []
    for question in ("Which of these is a fruit?", "Which of these is a town in France, on the Seine?"):
        row = {"prompt": question, "choices": ["Paris", "apple", "stone", "London"], "answer": 0}
        prompts.append(crl_tasks.encode_prompt(tok, row))
    env.ask(prompts)
    assert env.prefix and all(env.letters)
    actions = torch.tensor([[[3, 10], [700, env.noop]], [[10, 2500], [env.noop, 11]]])
    expected = answers_by_hand(env, prompts, actions, 3)
    assert env.generate(prompts, fixed(actions), 2, steps=3) == expected
    assert env.generate(prompts, fixed(actions), 2, steps=1) == [[a[:1] for a in row] for row in expected]
    assert 5 < (env.sites[0].sae.encode(env.prefill(prompts).x[:, 0]) > 0).sum(1).float().mean() < 200
    for prompt in prompts:
        for option, end in zip(prompt.row["choices"], prompt.ends, strict=True):
            assert tok.decode([prompt.ids[end]]).strip() in option
