"""Forward passes of many architectures: which layers a model has, what its attention sees, and a self-check.

crl_ppo.py reads each prompt once and answers it many times from the same keys and values. What a model's
own code does with masks, windows and caches differs, so each run compares such passes with the model's own
(check_fast_passes). docs/models.md says which architectures pass. crl_tasks.py hands this on as `passes`.
"""

import contextlib
import math
from types import SimpleNamespace

from crl_hub import fail, first_line

TOKENS = 256  # a batch of longer prompts is smaller


def decoder_layers(model):
    """(decoder, its list of layers) of a causal language model, whatever its architecture calls them.

    In a model with vision it is the language model's list, even where the vision tower has as many layers.
    Fails with one line on weights that accelerate keeps elsewhere, and where there is no such list.
    """
    if any(weights.is_meta for weights in model.parameters()):
        fail(f"{type(model).__name__}: some weights are offloaded; take a model that fits into memory")
    from transformers import PreTrainedModel

    config = model.config.get_text_config()
    count = config.num_hidden_layers
    for decoder in model.get_decoder().modules():
        if not isinstance(decoder, PreTrainedModel) or type(decoder.config) is not type(config):
            continue  # a vision tower, or no model of its own
        for module in decoder.children():
            if type(module).__name__ == "ModuleList" and len(module) == count:
                return decoder, module
    fail(f"{type(model).__name__}: found no list of {count} decoder layers to hook; not supported")


@contextlib.contextmanager
def skipped(layers):
    """While open, these layers pass their input on. crl_ppo.py's hook at the last one supplies the output.

    Saves what all answers to a prompt have in common. `gives_tuple` was left by that hook before.
    """
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = lambda h, *a, **k: (h,) if layers[-1].gives_tuple else h
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward:  # accelerate's
                layer.forward = forward


def context_length(config):
    """How many tokens a prompt and its answer may have, for a text configuration.

    Where a model changes its arithmetic beyond some length (long RoPE, Llama 4's attention temperature), the
    short prompts of a batch would change with the long ones, so all have to stay below it.
    """
    limits = [getattr(config, "max_position_embeddings", math.inf)]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # some have one for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings", math.inf))
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(config.floor_scale // 2)  # it counts the answers beside one as earlier tokens
    return min(limits)


def batches(prompts, size):
    """Numbers of prompts of like length, read together: tensors (B,), B at most `size`, and fewer where more
    than TOKENS tokens are in each."""
    import torch

    found = []
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids)):
        n = len(found[-1]) + 1 if found else math.inf
        if n > size * min(1, TOKENS / len(prompts[row].ids)):
            found.append([])
        found[-1].append(row)
    return [torch.tensor(rows) for rows in found]


def attention_mask(decoder, visible, key_position, position):
    """What is added to attention scores (B, 1, q, K), or, for layers of several kinds, {kind: that}.

    visible (B, q, K): what a token may see at all; key_position (B, K) and position (B, q) decide what a
    window or a chunk covers. Which layers have one follows transformers' create_masks_for_generate().
    """
    import torch

    config = decoder.config
    kinds = {"full_attention": visible}
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk:
        same = key_position[:, None] // chunk == position[..., None] // chunk
        kinds["chunked_attention"] = visible & same
    window = getattr(config, "sliding_window", None)
    if window:
        near = key_position[:, None] > position[..., None] - window
        kinds["sliding_attention"] = visible & near
    dtype = decoder.dtype
    masks = {}
    for kind, seen in kinds.items():
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        masks[kind] = mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    if getattr(config, "layer_types", None):
        return masks
    return list(masks.values())[-1]


# --- the check of the fast passes ---
EXACT = 1e-4  # largest difference in float32, as a share of the spread
ROUNDED = {"bfloat16": (0.1, 0.3), "float16": (0.03, 0.3)}  # least and most that may be rounding
SHORT = 8  # tokens that windows and chunks cover during the check ...
OWN_WINDOWS = ("sliding_window", "attention_chunk_size")  # ... under these names
LONGEST = 1024  # tokens of windows under other names
RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")  # kinds of layers in transformers
SOME_TEXT = "The cat sat on a mat by the door; 27 dogs ran past it, and nobody in Paris had asked them why."


@contextlib.contextmanager
def short_windows(config):
    """While open, windows and chunks cover SHORT tokens, so that short prompts reach beyond them."""
    before = {}
    for name in OWN_WINDOWS:
        if (getattr(config, name, None) or 0) > SHORT:
            before[name] = getattr(config, name)
            setattr(config, name, SHORT)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def other_window(config):
    """Tokens that the widest window covers which has another name than those of OWN_WINDOWS, or 0."""
    found = [0]
    for key, value in config.to_dict().items():
        if "window" in key and "layers" not in key and key not in OWN_WINDOWS and type(value) is int:
            found.append(value)
    return max(found)


def plain_pass(env, name, ids):
    """The last two rows of logits (2, V) of the model's own forward; one line if its layers are no site."""
    import torch

    found = []
    handle = env.steered_layers[0].register_forward_hook(lambda module, inputs, out: found.append(out))
    try:
        logits = env.model(torch.tensor([ids], device=env.device), use_cache=False).logits
    finally:
        handle.remove()
    out = found[0] if found else None
    h = out[0] if isinstance(out, tuple) else out
    if getattr(h, "shape", None) != (1, len(ids), env.steering.shape[1]):
        fail(f"{name}: its layers do not put out one residual stream each; not supported")
    return logits[0, -2:].float()


def unlike(one, other):
    """Root mean square difference of two vectors, in standard deviations of the second; inf if not finite."""
    share = ((one.to(other) - other).square().mean().sqrt() / other.std()).item()
    return share if math.isfinite(share) else math.inf


def tolerance(env, prompts, begun, plain):
    """The largest difference that is taken for rounding: of 16 bits, four times the model's own.

    Its own is that between reading a prompt at once and, through its own cache, in two parts.
    """
    import torch

    dtype = str(env.model.dtype).removeprefix("torch.")
    if dtype not in ROUNDED:
        return EXACT
    own = 0.0
    for (row, column), logits in plain.items():
        ids = torch.tensor([[*prompts[row].ids, begun[column].item()]], device=env.device)
        first = env.model(ids[:, :-1], use_cache=True)
        if getattr(first, "past_key_values", None) is None:
            break
        second = env.model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        own = max(own, unlike(first.logits[0, -1].float(), logits[0]))
        own = max(own, unlike(second.logits[0, -1].float(), logits[1]))
    least, most = ROUNDED[dtype]
    return min(max(least, 4 * own), most)


def fast_passes(env, prompts, begun):
    """What a run computes: logits (B, G, V) of its three forward passes.

    First two tokens of each answer, one of which is begun (G, 1), then, as for letters, one token alone.
    ValueError where a model keeps something else of its prompts than keys and values.
    """
    import torch

    for kind in getattr(env.decoder.config, "layer_types", None) or ():
        if kind in RECURRENT:
            raise ValueError(f"answers side by side cannot share the state of {kind} layers")
    noop = torch.full((len(prompts), len(begun)), env.noop)
    begun = begun.to(env.device)
    found = []
    batch = env.prefill(prompts)
    kept = [getattr(layer, "keys", None) for layer in batch.cache.layers]
    if not kept or any(keys is None or keys.shape[-2] != batch.position.shape[1] for keys in kept):
        raise ValueError("what it keeps of a prompt is not keys and values of each token")
    handle = env.model.register_forward_hook(lambda module, inputs, out: found.append(out.logits.float()))
    try:
        env.decode(batch, lambda obs, t: noop, len(begun), begun, 2)
        env.decode(batch, lambda obs, t: noop, len(begun), begun[:, :0], 1)
    finally:
        handle.remove()
    return found


def difference(env, prompts, begun, plain):
    """The largest difference of fast passes from plain ones {(prompt, answer): plain_pass()}, by unlike()."""
    rounds = []
    env.ask([])
    rounds.append(fast_passes(env, prompts, begun))
    if env.shares_prefix:
        env.ask(prompts)
        rounds.append(fast_passes(env, prompts, begun))
    worst = 0.0
    for first, second, alone in rounds:
        for place, logits in plain.items():
            worst = max(worst, unlike(first[place], logits[0]))
            worst = max(worst, unlike(second[place], logits[1]))
            worst = max(worst, unlike(alone[place], logits[0]))
    return worst


def questions(env, window):
    """(prompts, begun) of the check: one prompt beyond the window, one short; unlike first tokens (G, 1)."""
    import torch

    ids = [token for token in env.tok.encode(SOME_TEXT) if token not in env.eos]
    length = window + 4 * SHORT
    text = ids * (1 + max(length, 18) // len(ids))
    row = {"id": "check", "prompt": SOME_TEXT, "choices": ["x", "y"], "answer": 0}  # forks may read it
    prompts = []
    for some in (text[:length], text[:12] + text[15:18]):
        prompts.append(SimpleNamespace(row=row, ids=some, ends=[]))
    kinds = sorted(set(ids))
    # more answers than a window is long: one that counts the answers beside it would lose the prompt
    begun = [kinds[g % len(kinds)] for g in range(window + SHORT)]
    return prompts, torch.tensor(begun)[:, None]


def plain_passes(env, name, prompts, begun):
    """({(prompt, answer): plain_pass()}, tolerance()); ends with one line where these are no good."""
    import torch

    plain = {}
    try:
        for row, column in ((0, len(begun) - 1), (1, 0), (1, len(begun) - 1)):
            plain[row, column] = plain_pass(env, name, [*prompts[row].ids, begun[column].item()])
        enough = tolerance(env, prompts, begun, plain)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of whatever kind the model's own code raises
        fail(f"{name}: its own forward fails ({type(e).__name__}: {first_line(e)}); not supported")
    if not all(logits.isfinite().all() for logits in plain.values()):
        fail(f"{name}: unsteered logits are not finite in {env.args.dtype}; take another --dtype or model")
    return plain, enough


def check_fast_passes(env, name):
    """Compare env's forward passes with the model's own, unbatched and uncached; end with one line if unlike.

    Two prompts of unlike length, the longer one beyond any window, are read with and without their common
    beginning computed once, answered side by side, and asked for a letter with the layers below the site
    skipped. Where only one of these savings makes the difference, env goes on without it, which is said.
    """
    import torch

    config = env.decoder.config
    window = other_window(config)
    if window > LONGEST:
        fail(f"{name}: a window of {window} tokens is too long to check the fast passes; not supported")
    prompts, begun = questions(env, window)
    below = env.below
    with torch.no_grad(), torch.random.fork_rng([]), short_windows(config):
        plain, enough = plain_passes(env, name, prompts, begun)
        for shares, skips in ((True, True), (False, True), (True, False), (False, False)):
            env.shares_prefix = shares
            env.below = below if skips else []
            try:
                found = difference(env, prompts, begun, plain)
                words = f"{found:.2g} of the logits' spread"
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # caches, masks and layers each raise their own
                found = math.inf
                words = f"an error ({type(e).__name__}: {first_line(e)})"
            if found <= enough:
                break
    if found > enough:
        fail(f"{name}: fast passes differ from its own forward by {words}; not supported")
    if not shares:
        print(f"{name}: what all prompts begin with is read anew for each, since this model cannot share it")
    if not skips:
        print(f"{name}: layers below the site are computed for each answer; this model needs them")
    env.ask([])
