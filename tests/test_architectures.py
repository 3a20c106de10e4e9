"""The check of a model's fast passes, over tiny random models of every architecture."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import tiny
import torch
from tiny import near, one_line, tiny_env, tiny_prompts

import crl_ppo
from crl_ppo import fixed, residual_hook
from crl_tasks import passes

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmark"))

import architectures  # noqa: E402

TABLE = (ROOT / "docs" / "models.md").read_text().splitlines()


def logits_of(env, prompts, actions, steps=1):
    """(answers of generate(), logits (B, G, V) of its last pass)."""
    found = []
    handle = env.model.register_forward_hook(lambda module, inputs, out: found.append(out.logits))
    answers = env.generate(prompts, fixed(actions), actions.shape[1], steps=steps)
    handle.remove()
    return answers, found[-1]


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_logits_are_equal_or_the_model_is_refused(name):
    """As docs/models.md says; and beyond the real windows, steered, with prompts of unlike length."""
    model = architectures.tiny_model(name)
    env = tiny_env(None, model=model, coef=(0.5,))
    found = architectures.verdict(name, env)
    assert architectures.row(name, found) in TABLE and tiny.untouched(model)
    if found.startswith("no"):
        return
    prompts = tiny_prompts(env, (3, 15, 40))
    actions = torch.tensor([[[3], [env.noop], [9]]]).expand(3, -1, -1)
    _, logits = logits_of(env, prompts, actions)
    for row, prompt in enumerate(prompts):
        for column, action in enumerate(actions[row]):

            def edit(site, h, action=action):
                return torch.cat([h[:, :-1], env.add(0, h[:, -1:], action)], 1)

            with residual_hook(env.steered_layers, edit):
                own = model(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
            near(logits[row, column], own)
    env.eos = set()
    said, _ = logits_of(env, prompts, torch.full((3, 1, 1), env.noop), 3)
    for prompt, [answer] in zip(prompts, said, strict=True):
        for _ in answer:
            own = model(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
            prompt.ids.append(int(own.argmax()))
        assert prompt.ids[-3:] == answer


def test_a_vision_tower_of_as_many_layers_is_not_hooked():
    model = architectures.tiny_model("Gemma 3 with vision")
    assert passes.decoder_layers(model)[1] is model.model.language_model.layers
    assert len(model.model.vision_tower.encoder.layers) == len(model.model.language_model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Mistral, sliding window", "Gemma 3, text", "Llama 4, text"])
def test_a_wrong_mask_is_found_whatever_the_precision(name, dtype, monkeypatch):
    env = tiny_env(None, model=architectures.tiny_model(name, dtype))
    config = env.decoder.config
    for key in passes.OWN_WINDOWS:
        if hasattr(config, key):
            setattr(config, key, 4096)
    state = torch.get_rng_state()
    before = config.to_dict()
    assert architectures.verdict(name, env) == "yes"
    right = passes.attention_mask

    def without_windows(*a):
        masks = right(*a)
        full = right(SimpleNamespace(config=None, dtype=dtype), *a[1:])
        return dict.fromkeys(masks, full) if isinstance(masks, dict) else full

    monkeypatch.setattr(passes, "attention_mask", without_windows)
    one_line(lambda: passes.check_fast_passes(env, "own"), "own: fast passes differ from", "not supported")
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "window, words", [(256, "of the logits' spread"), (4096, "a window of 4096 tokens is too long")]
)
def test_windows_of_other_names_are_exceeded(window, words):
    model = architectures.tiny_model(
        "GPT-Neo", torch.bfloat16, window_size=window, max_position_embeddings=2048
    )
    env = tiny_env(None, model=model)
    one_line(lambda: passes.check_fast_passes(env, "own"), words, "not supported")


def test_a_beginning_that_cannot_be_shared_is_read_anew(monkeypatch, capsys):
    """... and where both forms are wrong, or a pass raises, there is one line."""
    env = tiny_env("llama")
    right = env.prefill

    def wrong(prompts):
        batch = right(prompts)
        if env.prefix:
            batch.cache.layers[3].values[:, :, 2] += 1.0
        return batch

    monkeypatch.setattr(env, "prefill", wrong)
    passes.check_fast_passes(env, "own")
    assert not env.shares_prefix and env.below and "own: what all prompts begin" in capsys.readouterr().out
    env.ask(tiny_prompts(env, [9]) * 2)
    assert env.prefix == []

    def broken(*a):
        raise RuntimeError("no such cache\nand more")

    monkeypatch.setattr(env, "decode", broken)
    one_line(lambda: passes.check_fast_passes(env, "own"), "(RuntimeError: no such cache)", "not supported")


def overflowing(model):
    model.model.norm.weight.data[:] = float("inf")
    return model


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("Llama", overflowing, "own: unsteered logits are not finite in float32"),
        ("Llama", lambda model: model.to("meta"), "LlamaForCausalLM: some weights are offloaded"),
        ("LFM2", lambda model: model, "cannot share the state of conv layers); not supported"),
        ("RWKV", lambda model: model, "is not keys and values of each token); not supported"),
        ("MPT", lambda model: model, "own: fast passes differ from its own forward by 0."),
    ],
)
def test_a_run_with_a_model_that_does_not_fit_ends_in_one_line(small, tmp_path, name, change, words):
    args = small_run.flags(small, tmp_path, sae=("random:9",), layer=(1,))
    loaded = change(architectures.tiny_model(name)), tiny.tiny_tokenizer(), "own"
    one_line(lambda: crl_ppo.set_up(args, loaded), words)


def test_lengths_at_which_a_model_changes_its_arithmetic_are_the_context():
    long = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    for rope, expected in (({}, 512), (long, 64), ({"full_attention": long, "sliding_attention": {}}, 64)):
        config = architectures.tiny_model("Llama").config
        config.rope_parameters = rope
        assert passes.context_length(config) == expected
    config.attn_temperature_tuning = True
    config.floor_scale = 48
    assert passes.context_length(config) == 24
    assert passes.context_length(type("Mpt", (), {})) == float("inf")
