"""Tiny random models, tokenizer and SAEs for the tests, and plain references; nothing is downloaded."""

import json
import multiprocessing
import string

import pytest
import torch

import crl_ppo
import crl_tasks
from crl_tasks import hub

ARCHS = ("gemma2", "gemma3", "llama", "qwen3")
D_MODEL, N_LAYERS, WINDOW, CONTEXT = 32, 5, 8, 4096
BOS, EOS, PAD, USER, ASSISTANT = SPECIALS = ("<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>")
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(chat=None, letters=string.ascii_uppercase):
    """Byte-level BPE: every byte, a space with each of `letters` as tokens, five special ones, BOS in front.

    chat: a chat template, or True for CHAT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*SPECIALS, *alphabet, *("\u0120" + c for c in letters)])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("\u0120", c) for c in letters]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(list(SPECIALS))
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    special = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False)
    template = CHAT if chat is True else chat or None
    return PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=template, **special)


def tiny_model(arch, seed=0, d_model=D_MODEL, n_layers=N_LAYERS):
    """A float32 model of `arch`: two KV heads, windows of 8 tokens and soft-capping where it has them.

    Weights are ten times larger than usual, so that logits depend on position and prompt."""
    import transformers

    common = dict(vocab_size=len(SPECIALS) + 256 + 26, hidden_size=d_model, intermediate_size=48, head_dim=8)
    common |= dict(num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2)
    common |= dict(tie_word_embeddings=True, max_position_embeddings=CONTEXT)
    common |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=1.2 * d_model**-0.5)
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n_layers)]
    gemma = dict(sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=8)
    name, own = {
        "gemma2": ("Gemma2Config", gemma | dict(attn_logit_softcapping=4.0, final_logit_softcapping=6.0)),
        "gemma3": ("Gemma3TextConfig", gemma),
        "llama": ("LlamaConfig", {}),
        "mistral": ("MistralConfig", dict(sliding_window=WINDOW)),
        "qwen3": ("Qwen3Config", {}),
    }[arch]
    cfg = getattr(transformers, name)(**common, **own)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
        for name, p in model.named_parameters():
            if "norm" in name:
                p.data += 0.3 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def save_tiny(path, arch, chat=None, **kw):
    """Write model and tokenizer to a directory that `--model DIR` can read; returns the directory."""
    tiny_model(arch, **kw).save_pretrained(path)
    tiny_tokenizer(chat).save_pretrained(path)
    return path


def tiny_sae(d_model=D_MODEL, d_sae=40, hook_name="blocks.2.hook_resid_post", seed=0, training=False):
    """A random JumpReLU SAE of SAELens, decoder rows not of unit norm; `training`: the class for training."""
    from sae_lens.saes import jumprelu_sae as jr

    kind = "JumpReLUTrainingSAE" if training else "JumpReLUSAE"
    sae = getattr(jr, kind)(getattr(jr, kind + "Config")(d_in=d_model, d_sae=d_sae))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = hook_name, "tiny"
    g = torch.Generator().manual_seed(seed)
    norms = 0.5 + torch.arange(d_sae)[:, None] / d_sae
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(d_sae, d_model, generator=g) * norms)
        sae.W_enc.copy_(torch.randn(d_model, d_sae, generator=g))
    return sae


def tiny_sae_dir(path, *how, training=False, **kw):
    """Have SAELens write tiny_sae in its own on-disk format; returns the directory as a string."""
    sae = tiny_sae(*how, training=training, **kw)
    (sae.save_inference_model if training else sae.save_model)(path)
    return str(path)


def tiny_site(layer, n=24, d_model=D_MODEL, seed=0, sae=None):
    """hub.Site of `n` random unit directions (or those of `sae`) at the output of a layer."""
    random = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
    W = random if sae is None else sae.W_dec.detach()
    return hub.Site(layer, torch.nn.functional.normalize(W, dim=1), sae, "tiny", "0", {})


def tiny_args(one=True, **kw):
    """crl_ppo.Args with the defaults of a one-token (or long-answer) task filled in, then `kw`."""
    defaults = crl_tasks.LETTERS if one else crl_tasks.LONG_ANSWERS
    return crl_ppo.Args(**{**defaults, "model": "tiny", "device": "cpu", "dtype": "float32", **kw})


def tiny_env(arch, layers=(2,), n=24, ends=0, one=True, chat=False, sites=None, model=None, **kw):
    """crl_ppo.Environment around tiny_model(arch), or `model`; `n` random directions at each of these layers.

    sites: a list of Site instead; kw: flags, as for tiny_args()."""
    model = model or tiny_model(arch)
    d_model = model.config.get_text_config().hidden_size
    sites = sites or [tiny_site(layer, n, d_model, seed=layer) for layer in layers]
    return crl_ppo.Environment(tiny_args(one, **kw), model, tiny_tokenizer(chat), sites, ends)


def tiny_prompts(env, lengths, choices=4, seed=0, task="file"):
    """Prompts of these numbers of tokens (BOS, then random bytes); right answers go round the letters.

    No option and no question ends anywhere in them; _replace(ends=...) changes that."""
    g = torch.Generator().manual_seed(seed)
    prompts = []
    for i, length in enumerate(lengths):
        row = {"id": str(i), "task": task, "prompt": f"prompt {i}", "group": f"prompt {i}", "meta": {}}
        row["choices"] = [str(c) for c in range(choices)] if choices else None
        row["answer"] = i % choices if choices else "x"
        ids = torch.randint(5, 261, (length - 1,), generator=g).tolist()
        prompts.append(crl_tasks.Prompt(row, [env.tok.bos_token_id, *ids], [-1] * max(1, choices)))
    return prompts


# -------------------------------------------------------------------------------------- references and checks
@torch.no_grad()
def plain(env, ids, added=(), hidden=False):
    """Reference: one full forward pass of one unpadded row without a cache, with hooks of its own.

    added: pairs (position, action). Returns logits (T, V) or, if `hidden`, what each layer puts out before
    anything is added there, a list of (T, d)."""
    outputs = []

    def hook(layer, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        outputs.append(h[0].clone())
        for position, action in added:
            site, feature, coefficient = env.actions[action]
            if site >= 0 and env.sites[site].layer == layer:
                scale = h[0, position].norm() if env.args.coef_mode == "norm" else 1.0
                h[0, position] += coefficient * scale * env.sites[site].directions[feature]
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handles = []
    for number, layer in enumerate(env.model.model.layers):
        handles.append(layer.register_forward_hook(lambda _module, _inputs, h, n=number: hook(n, h)))
    logits = env.model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return outputs if hidden else logits


def plain_answer(env, prompt, steps, action_at=lambda t: None, begun=()):
    """Reference: a greedy answer by a full recompute per token, which adds all that was added so far anew.

    action_at(t): what acts at the token that the t-th one follows, or None; begun: the first tokens."""
    ids = list(prompt.ids)
    added = []
    for t in range(steps):
        if action_at(t) is not None:
            added.append((len(ids) - 1, action_at(t)))
        token = int(plain(env, ids, added)[-1].argmax())
        ids.append(begun[t] if t < len(begun) else token)
        if ids[-1] in env.eos:
            break
    return ids[len(prompt.ids) :]


def held(env, own):
    """action_at() of plain_answer() where the actions `own` decide, the last one of which holds."""

    def action_at(t):
        steered = t < env.args.steer_tokens or env.args.steer_tokens == 0
        return int(own[min(t, len(own) - 1)]) if steered else None

    return action_at


def near(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def untouched(model):
    """No hook and no replaced forward is left anywhere."""
    modules = list(model.modules())
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    return not hooked and not any("forward" in m.__dict__ for m in modules)


def lines(path):
    """What the lines of a file of JSON hold."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_children(work, *calls):
    """Have forked processes do work(*args) for the args of each call, at once; returns their exit codes."""
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=work, args=args) for args in calls]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
    return [child.exitcode for child in children]


def spy(monkeypatch, owner, name, note):
    """Have note() called with what owner.name() returns and was given."""
    original = getattr(owner, name)

    def watched(*args, **kwargs):
        result = original(*args, **kwargs)
        note(result, *args)
        return result

    monkeypatch.setattr(owner, name, watched)


def one_line(call, *words):
    """`call` ends the program with one line that holds all these words."""
    with pytest.raises(SystemExit) as e:
        call()
    line = str(e.value)
    assert line.startswith("crl: ") and "\n" not in line, line
    for word in words:
        assert str(word) in line, line
