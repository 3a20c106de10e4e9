"""Which architectures CRL steers: a tiny random model of each, through the check of every run's set-up.

    python benchmark/architectures.py > docs/models.md

tests/test_architectures.py reads the same list.
"""

import contextlib
import io
import sys
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

from crl_tasks import passes  # noqa: E402

WIDTH = 32
WINDOW = 12  # longer than crl_passes.SHORT, to which the check shortens it
LAYERS = 4
COMMON = {
    "vocab_size": 287,  # tiny.tiny_tokenizer()'s
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # ten times the usual: the logits depend on position and prompt
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EVERY_OTHER = ["sliding_attention", "full_attention"] * (LAYERS // 2)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
DEEPSEEK = MLA | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
GEMMA4 = {"layer_types": EVERY_OTHER, "sliding_window": WINDOW, "global_head_dim": 8}
GEMMA4_E = GEMMA4 | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 287}
MAMBA = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8}
MAMBA_OF = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_expand": 2}
GEMMA = {"sliding_window": WINDOW, "layer_types": EVERY_OTHER, "query_pre_attn_scalar": 8}
GEMMA3N = GEMMA | {"vocab_size_per_layer_input": 287, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
GEMMA3N |= {"num_kv_shared_layers": 2, "altup_num_inputs": 2}
GEMMA4_MOE = MOE | {"enable_moe_block": True, "top_k_experts": 2}
QWEN2_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
LLAMA4 = MOE_LOCAL | {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 48}
GPT_NEO = {"num_layers": LAYERS, "num_heads": 4, "window_size": WINDOW}
GPT_NEO |= {"attention_types": [[["global", "local"], LAYERS // 2]]}
OPT_350M = {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
GRANITE_HYBRID = MOE_LOCAL | MAMBA_OF | {"layer_types": ["mamba", "attention"] * (LAYERS // 2)}
GRANITE_PLAIN = MOE_LOCAL | MAMBA_OF | {"layer_types": ["attention"] * LAYERS, "shared_intermediate_size": 16}
JAMBA = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
JAMBA |= {"use_mamba_kernels": False, "mamba_dt_rank": 4}
RECURRENT = {"attention_window_size": WINDOW, "block_types": ["recurrent", "attention"], "lru_width": WIDTH}


def wrapped(text, vision, **more):
    """Arguments of a configuration that holds those of a language model and of a vision tower."""
    return {"text_config": COMMON | text, "vision_config": vision} | more


SIGLIP = VISION | {"image_size": 28, "patch_size": 14}
LLAMA4_VISION = SIGLIP | {"vision_output_dim": WIDTH, "projector_input_dim": 32, "projector_output_dim": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_VISION = {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "depth": LAYERS, "num_heads": 4}
QWEN3_VISION = QWEN_VISION | {"deepstack_visual_indexes": [1], "intermediate_size": 48}
LLAVA = wrapped({"model_type": "llama"}, SIGLIP | {"model_type": "siglip_vision_model"})
MISTRAL3 = wrapped({"model_type": "mistral"}, SIGLIP | {"model_type": "pixtral", "head_dim": 8})
PALIGEMMA = wrapped({"model_type": "gemma"}, SIGLIP | {"projection_dim": WIDTH})
ARCHITECTURES = {  # name in the table: (configuration class of transformers, what differs from COMMON)
    "Llama": ("LlamaConfig", {}),
    "Llama 4, text": ("Llama4TextConfig", LLAMA4),
    "Llama 4 with vision": ("Llama4Config", wrapped(LLAMA4, LLAMA4_VISION)),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Mistral, sliding window": ("MistralConfig", {"sliding_window": WINDOW}),
    "Ministral": ("MinistralConfig", {"sliding_window": WINDOW, "layer_types": EVERY_OTHER}),
    "Ministral 3": ("Ministral3Config", {"sliding_window": None}),
    "Mixtral": ("MixtralConfig", MOE_LOCAL | {"sliding_window": WINDOW}),
    "Phi-1, Phi-2": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "Phi-3": ("Phi3Config", {"sliding_window": WINDOW}),
    "Phi-3.5 MoE": ("PhimoeConfig", MOE_LOCAL | {"sliding_window": WINDOW}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen2, sliding window": ("Qwen2Config", QWEN2_WINDOW),
    "Qwen2-MoE": ("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen3": ("Qwen3Config", {}),
    "Qwen3, sliding window": ("Qwen3Config", QWEN2_WINDOW),
    "Qwen3-MoE": ("Qwen3MoeConfig", MOE),
    "Qwen3-MoE, sliding window": (
        "Qwen3MoeConfig",
        MOE | {"use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "Qwen3-Next": ("Qwen3NextConfig", LINEAR | MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen3.5": ("Qwen3_5TextConfig", LINEAR),
    "Qwen3.5 with attention alone": ("Qwen3_5TextConfig", {"layer_types": ["full_attention"] * LAYERS}),
    "Qwen3.5-MoE": ("Qwen3_5MoeTextConfig", LINEAR | MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen2.5-VL": ("Qwen2_5_VLConfig", wrapped(MROPE, QWEN_VISION)),
    "Qwen3-VL": ("Qwen3VLConfig", wrapped(MROPE, QWEN3_VISION)),
    "Gemma": ("GemmaConfig", {}),
    "Gemma 2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}),
    "Gemma 3, text": ("Gemma3TextConfig", GEMMA),
    "Gemma 3 with vision": ("Gemma3Config", wrapped(GEMMA, SIGLIP) | {"mm_tokens_per_image": 4}),
    "Gemma 3n": ("Gemma3nTextConfig", GEMMA3N),
    "Gemma 4, text": ("Gemma4TextConfig", GEMMA4),
    "Gemma 4 MoE": ("Gemma4TextConfig", GEMMA4 | GEMMA4_MOE),
    "Gemma 4 E-type": ("Gemma4TextConfig", GEMMA4_E),
    "Gemma 4 E-type, shared keys": ("Gemma4TextConfig", GEMMA4_E | {"num_kv_shared_layers": 2}),
    "Gemma 4 with vision": ("Gemma4Config", wrapped(GEMMA4, SIGLIP)),
    "GPT-2": ("GPT2Config", {}),
    "GPT-BigCode": ("GPTBigCodeConfig", {}),
    "GPT-Neo": ("GPTNeoConfig", GPT_NEO),
    "GPT-NeoX, Pythia": ("GPTNeoXConfig", {}),
    "GPT-J": ("GPTJConfig", {"rotary_dim": 4}),
    "CodeGen": ("CodeGenConfig", {"rotary_dim": 4}),
    "gpt-oss": ("GptOssConfig", MOE_LOCAL | {"sliding_window": WINDOW, "layer_types": EVERY_OTHER}),
    "OPT": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "OPT, projected embeddings": ("OPTConfig", OPT_350M),
    "Bloom": ("BloomConfig", {}),
    "Falcon": ("FalconConfig", {}),
    "Falcon, new decoder": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, ALiBi": ("FalconConfig", {"alibi": True, "parallel_attn": False}),
    "MPT": ("MptConfig", {}),
    "StarCoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "StableLM": ("StableLmConfig", {}),
    "OLMo": ("OlmoConfig", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "OLMo 3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": EVERY_OTHER}),
    "OLMoE": ("OlmoeConfig", MOE),
    "Granite": ("GraniteConfig", {}),
    "Granite MoE": ("GraniteMoeConfig", MOE_LOCAL),
    "Granite hybrid": ("GraniteMoeHybridConfig", GRANITE_HYBRID),
    "Granite hybrid with attention alone": ("GraniteMoeHybridConfig", GRANITE_PLAIN),
    "Cohere": ("CohereConfig", {}),
    "Cohere 2": ("Cohere2Config", {"sliding_window": WINDOW, "layer_types": EVERY_OTHER}),
    "GLM-4": ("Glm4Config", {}),
    "EXAONE 4": ("Exaone4Config", {"sliding_window": WINDOW, "layer_types": EVERY_OTHER}),
    "Nemotron": ("NemotronConfig", {}),
    "SmolLM3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "Seed-OSS": ("SeedOssConfig", {}),
    "ERNIE 4.5": ("Ernie4_5Config", {}),
    "Apertus": ("ApertusConfig", {}),
    "DeepSeek-V2": ("DeepseekV2Config", DEEPSEEK),
    "DeepSeek-V3": ("DeepseekV3Config", DEEPSEEK),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)}),
    "Mamba": ("MambaConfig", {}),
    "Mamba 2": ("Mamba2Config", MAMBA),
    "Falcon Mamba": ("FalconMambaConfig", {}),
    "Falcon-H1": ("FalconH1Config", MAMBA_OF | {"mamba_d_ssm": 64}),
    "Jamba": ("JambaConfig", JAMBA),
    "Bamba": ("BambaConfig", MAMBA_OF | {"attn_layer_indices": [1, 3]}),
    "Nemotron-H": ("NemotronHConfig", {}),
    "RecurrentGemma": ("RecurrentGemmaConfig", RECURRENT),
    "RWKV": ("RwkvConfig", {"attention_hidden_size": WIDTH}),
    "LLaVA": ("LlavaConfig", LLAVA),
    "Mistral 3 with vision": ("Mistral3Config", MISTRAL3),
    "PaliGemma": ("PaliGemmaConfig", PALIGEMMA),
}


def tiny_model(name, dtype=torch.float32, **more):
    """A random model of that architecture, its norms unlike 1; more: of its configuration."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind, own = ARCHITECTURES[name]
    kind = getattr(transformers, kind)
    given = own if "text_config" in own else COMMON | own | more
    if isinstance(getattr(kind, "head_dim", None), property):  # of Falcon: it follows from the width
        del given["head_dim"]
    config = kind(**given)
    known = type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
        for weights_name, weights in model.named_parameters():
            if "norm" in weights_name:
                weights.data += 0.3 * torch.randn_like(weights)
    return model.to(dtype).eval().requires_grad_(False)


def verdict(name, env):
    """What the table says of an architecture: yes, or no, and why."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            passes.check_fast_passes(env, name)
    except SystemExit as e:
        for words, reason in REASONS.items():
            if words in str(e):
                return f"no: {reason}"
        return f"no: {e}"
    return "yes, all layers computed for each answer" if "below the site" in said.getvalue() else "yes"


REASONS = {  # words of the check's line -> words of the table
    "one residual stream": "its layers do not put out one residual stream each",
    "spread": "the fast passes give other logits",
    "the state of": "it has recurrent layers",
    "keys and values": "it keeps something else than keys and values",
    "an error": "the fast passes end in an error",
}
ABOUT = """# Models

Made by `python benchmark/architectures.py > docs/models.md` with transformers {version}: a tiny random
model of each architecture, through the check that every run makes at its set-up.

CRL reads each prompt once and answers it many times from the same keys and values: many answers side by side
in one sequence, and, where one token is asked for, without the layers below the site. Not every architecture
allows that. So each run first compares these fast passes with the model's own forward pass, unbatched and
without a cache, on two short prompts, beyond any attention window (which is shortened for the check). A run
ends in one line, `NAME: fast passes differ from its own forward by ...; not supported`, where the difference
is more than 1e-4 of the logits' spread in float32, or more than rounding in 16 bits. Where only the prompts'
common beginning cannot be shared, or no layer can be left out, it goes on without that and says so.

Recurrent layers (linear attention, Mamba, short convolutions) have a state that answers side by side cannot
share; ALiBi and GPT-Neo's windows count places in the cache instead of positions. A model that is not in the
table is checked like any other.

Of a model with vision, the language model is steered and asked with text alone. `--model` loads those that
transformers' AutoModelForCausalLM knows (Gemma 3 and 4, Llama 4); the others can be handed to `set_up()`.

Prompts that a model would read with other arithmetic than shorter ones count as too long: beyond the original
context of a long RoPE (Phi-3 with 128 k), and beyond half of Llama 4's `floor_scale`.

| architecture | configuration | supported |
|---|---|---|"""


def row(name, result):
    """A line of the table."""
    return f"| {name} | {ARCHITECTURES[name][0]} | {result} |"


def main():
    import transformers

    transformers.logging.set_verbosity_error()
    print(ABOUT.format(version=version("transformers")))
    for name in ARCHITECTURES:
        print(row(name, verdict(name, tiny.tiny_env(None, model=tiny_model(name)))), flush=True)


if __name__ == "__main__":
    main()
