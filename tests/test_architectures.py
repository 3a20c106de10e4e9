"""The check of a model's fast passes, over tiny random models of every architecture."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import near, one_line, tiny_env, tiny_prompts

import crl_ppo
from crl_ppo import fixed, residual_hook
from crl_tasks import hub

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
    assert hub.decoder_layers(model)[1] is model.model.language_model.layers
    assert len(model.model.vision_tower.encoder.layers) == len(model.model.language_model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Mistral, sliding window", "Gemma 3, text", "Llama 4, text"])
def test_a_wrong_mask_is_found_whatever_the_precision(name, dtype, monkeypatch):
    env = tiny_env(None, model=architectures.tiny_model(name, dtype))
    config = env.decoder.config
    state = torch.get_rng_state()
    before = config.to_dict()
    assert architectures.verdict(name, env) == "yes"
    right = hub.attention_mask

    def without_windows(*a):
        masks = right(*a)
        full = right(type("Full", (), {"config": None, "dtype": dtype}), *a[1:])
        return dict.fromkeys(masks, full) if isinstance(masks, dict) else full

    monkeypatch.setattr(hub, "attention_mask", without_windows)
    one_line(lambda: hub.check_fast_passes(env, "own"), "own: fast passes differ from", "not supported")
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_a_beginning_that_cannot_be_shared_is_read_anew(monkeypatch, capsys):
    """... and where both forms are wrong, or a pass raises, there is one line."""
    env = tiny_env("llama")
    right = env.prefill
    wrong = lambda prompts: right([p._replace(ids=p.ids[::-1]) if env.prefix else p for p in prompts])  # noqa: E731
    monkeypatch.setattr(env, "prefill", wrong)
    hub.check_fast_passes(env, "own")
    assert not env.shares_prefix and env.below and "own: what all prompts begin" in capsys.readouterr().out
    env.ask(tiny_prompts(env, [9, 9])[:1] * 2)
    assert env.prefix == []

    def broken(*a):
        raise RuntimeError("no such cache\nand more")

    monkeypatch.setattr(env, "decode", broken)
    one_line(lambda: hub.check_fast_passes(env, "own"), "(RuntimeError: no such cache)", "not supported")


def broken(model, value):
    model.model.norm.weight.data[:] = value
    return model


def test_models_that_cannot_run_end_in_one_line(small, tmp_path):
    """Logits that are not finite; weights that accelerate keeps on disk; and a run is what finds out."""
    args = small_run.flags(small, tmp_path)
    _, tok, _ = crl_ppo.load_model(args)
    ...
