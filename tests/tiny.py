"""Tiny random-weight models, tokenizer and SAEs for the tests: nothing is downloaded, everything is seeded."""
import string

import torch

import crl_model
import crl_ppo
import crl_tasks

ARCHS = ("gemma2", "gemma3", "llama", "qwen3")
D_MODEL, N_LAYERS, WINDOW, CONTEXT = 32, 5, 8, 4096
BOS, EOS, PAD, USER, ASSISTANT = SPECIALS = ("<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>")
CHAT = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def tiny_tokenizer(chat=False):
    """Byte-level BPE (287 tokens): every byte, " A" to " Z" as tokens of their own, five special ones, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    letters = string.ascii_uppercase
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*SPECIALS, *alphabet, *("\u0120" + c for c in letters)])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("\u0120", c) for c in letters]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(list(SPECIALS))
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=BOS, eos_token=EOS, pad_token=PAD,
                                   chat_template=CHAT if chat else None, clean_up_tokenization_spaces=False)


def tiny_model(arch, seed=0, d_model=D_MODEL, n_layers=N_LAYERS, eos=1):
    """A float32 model of `arch`: two KV heads, alternating windows of 8 tokens and soft-capping where it has them.

    Weights are ten times larger than usual and norms not all one, so that logits depend on position and prompt."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen3Config
    common = dict(vocab_size=len(SPECIALS) + 256 + 26, hidden_size=d_model, intermediate_size=48, head_dim=8,
                  num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                  max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=eos, pad_token_id=2,
                  initializer_range=1.2 * d_model**-0.5)
    layer_types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n_layers)]
    gemma = dict(common, sliding_window=WINDOW, layer_types=layer_types, query_pre_attn_scalar=8)
    cfg = {
        "gemma2": lambda: Gemma2Config(**gemma, attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
        "gemma3": lambda: Gemma3TextConfig(**gemma),
        "llama": lambda: LlamaConfig(**common),
        "qwen3": lambda: Qwen3Config(**common),
    }[arch]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
        for name, p in model.named_parameters():
            if "norm" in name:
                p.data += 0.3 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def tiny_lm(arch, chat=False, **kw):
    """crl_model.LM around tiny_model(arch, **kw)."""
    lm = crl_model.wrap_model(tiny_model(arch, **kw), tiny_tokenizer(chat), f"tiny-{arch}")
    lm.letters = [(ids * 2)[:2] for ids in lm.letters]  # as set_up() leaves them
    return lm


def save_tiny(path, arch, chat=False, **kw):
    """Write model and tokenizer to a directory that `--model DIR` can read; returns the directory."""
    tiny_model(arch, **kw).save_pretrained(path)
    tiny_tokenizer(chat).save_pretrained(path)
    return path


def tiny_sae(d_model=D_MODEL, d_sae=40, hook_name="blocks.2.hook_resid_post", seed=0, training=False):
    """A random JumpReLU SAE of SAELens, decoder rows not of unit norm; `training`: the class that training makes."""
    from sae_lens.saes import jumprelu_sae as jr
    sae = (jr.JumpReLUTrainingSAE(jr.JumpReLUTrainingSAEConfig(d_in=d_model, d_sae=d_sae)) if training else
           jr.JumpReLUSAE(jr.JumpReLUSAEConfig(d_in=d_model, d_sae=d_sae)))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = hook_name, "tiny"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(d_sae, d_model, generator=g) * (0.5 + torch.arange(d_sae)[:, None] / d_sae))
        sae.W_enc.copy_(torch.randn(d_model, d_sae, generator=g))
    return sae


def tiny_sae_dir(path, d_model=D_MODEL, d_sae=40, hook_name="blocks.2.hook_resid_post", seed=0, training=False):
    """Have SAELens write tiny_sae in its own on-disk format (for inference); returns the directory as a string."""
    sae = tiny_sae(d_model, d_sae, hook_name, seed, training)
    (sae.save_inference_model if training else sae.save_model)(path)
    return str(path)


def gemma_scope_cache(path, layer=20, l0=71, d_model=2304, d_sae=16384):
    """A hub cache under `path` with params.npz as Gemma Scope has it; decoder row f is 1 + f % 7 times a unit vector.

    Full size, since SAELens's loader knows one width only. Read it with HF_HUB_OFFLINE=1. Returns W_dec (D, d)."""
    import numpy as np
    repo, sha = path / "models--google--gemma-scope-2b-pt-res", "0" * 40
    folder = repo / "snapshots" / sha / f"layer_{layer}" / "width_16k" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha)
    f = np.arange(d_sae)
    W_dec = np.zeros((d_sae, d_model), dtype=np.float16)
    W_dec[f, (5 * f) % d_model] = 1 + f % 7
    np.savez(folder / "params.npz", W_enc=np.ascontiguousarray(W_dec.T), W_dec=W_dec, b_enc=np.zeros(d_sae, np.float16),
             b_dec=np.zeros(d_model, np.float16), threshold=np.full(d_sae, 0.5, np.float16))
    return torch.from_numpy(W_dec).float()


def tiny_site(layer, n=24, d_model=D_MODEL, seed=0, sae=None):
    """crl_model.Site of `n` random unit directions (or those of `sae`) at the output of a layer."""
    W = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed)) if sae is None else sae.W_dec.detach()
    return crl_model.Site(layer, torch.nn.functional.normalize(W, dim=1), sae, "tiny", "0", {})


def tiny_args(one=True, **kw):
    """crl_ppo.Args with the defaults of a one-token (or long-answer) task filled in, then `kw`."""
    defaults = {**(crl_tasks.ONE if one else crl_tasks.LONG), "observe": 2, "observe_options": 0}
    return crl_ppo.Args(**{**defaults, "model": "tiny", "hidden": 16, **kw})


def tiny_prompts(lm, lengths, choices=4, seed=0, task="file"):
    """Prompts of exactly these numbers of tokens (BOS first, then random bytes); gold answers go round the letters."""
    g = torch.Generator().manual_seed(seed)
    rows = [{"id": str(i), "task": task, "prompt": f"prompt {i}", "answer": i % choices if choices else "x",
             "choices": [str(c) for c in range(choices)] if choices else None, "group": f"prompt {i}", "meta": {}}
            for i in range(len(lengths))]
    return [crl_model.Prompt(r, [lm.tok.bos_token_id] + torch.randint(5, 261, (n - 1,), generator=g).tolist())
            for r, n in zip(rows, lengths)]
