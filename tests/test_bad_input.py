"""Bad input: every case ends in one clear line and exit status 1, and nothing already written is lost."""

import dataclasses
import json
import math
import os
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from small_run import HOOK, flags, go, parity
from test_training import same, stop
from tiny import lines, one_line

import crl_ppo
import crl_tasks
from crl_tasks import hub

SCRIPT = Path(crl_ppo.__file__)
pytestmark = pytest.mark.usefixtures("half_right")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def refused_run(small, tmp_path, *words, **kw):
    """main() refuses these flags, and no run directory is left behind."""
    args = dataclasses.replace(flags(small, tmp_path / "runs"), **kw)
    one_line(lambda: crl_ppo.main(args), *words)
    assert not (tmp_path / "runs").exists()


def as_script(monkeypatch, **flags):
    """The file itself as __main__, in this process."""
    words = []
    for key, value in flags.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def raising(error):
    def fails(*a, **k):
        raise error

    return fails


# ------------------------------------------------------------------------------ flags, command line
def in_python(code):
    """What a fresh interpreter prints."""
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return done.stdout, done.stderr


HELP = f"""
import runpy, sys
sys.argv = ["crl_ppo.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, None, "__main__")
except SystemExit as e:
    print("torch" in sys.modules, "transformers" in sys.modules, e.code)
"""


def test_help_lists_groups_and_the_table_and_needs_no_torch():
    out, err = in_python(HELP)
    assert out.splitlines()[-1:] == ["False False 0"], err
    words = ["run options", "model options", "steering options", "ppo options", "(default: per task"]
    words += [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(crl_ppo.Args)]
    words += crl_tasks.table_of_defaults().split()
    assert [word for word in words if word not in out] == []
    heavy = "{'matplotlib', 'statsmodels', 'sklearn', 'sae_lens'}"  # of the analysis
    out, err = in_python(f"import sys, crl_ppo; print({heavy} & set(sys.modules))")
    assert out == "set()\n", err


def test_command_line(small, tmp_path, monkeypatch):
    """The directory that was asked for lies below a regular file, which not even root can write to."""
    one_line(lambda: as_script(monkeypatch, task="mmul"), "unknown task 'mmul'; did you mean mmlu")
    (tmp_path / "FILE").write_text("in the way")
    given = dict(task=f"file:{small}/one.jsonl", model=f"{small}/model", sae=f"{small}/sae", device="cpu")
    below = tmp_path / "FILE" / "runs"
    words = [f"{tmp_path}/FILE/runs", "cannot write or read", "Not a directory"]
    one_line(lambda: as_script(monkeypatch, run_dir=below, **given), *words)
    assert (tmp_path / "FILE").read_text() == "in the way"
    never = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    monkeypatch.setattr(crl_tasks, "sample_prompts", never)
    one_line(lambda: as_script(monkeypatch, **given), "out of memory", "--batch-size")


OUTSIDE = (
    "samples=0 val_samples=-1 group=0 updates=0 batch_size=0 max_new_tokens=0 decisions=0 num_minibatches=0"
)
OUTSIDE += (
    " pool=0 update_epochs=-1 epsilon=1.5 epsilon=nan learning_rate=nan gae_lambda=1.1 ent_coef=-1.0 shots=-1"
)
OUTSIDE += " steer_tokens=-1 clip_coef=-0.1 seed=-1 seed=99999999999999999999"
SCOPE = "gemma-scope-2b-pt-res-canonical"
IMPOSSIBLE = [
    (dict(learning_rate=0.0), ["--learning-rate 0.0"]),
    (dict(coef=(0.5, math.nan)), ["--coef nan"]),
    (dict(coef=(-math.inf,)), ["--coef -inf"]),
    (dict(coef=()), ["--coef", "at least one strength"]),
    (dict(decisions=2), ["--decisions 2", "--max-new-tokens"]),
    (dict(task="bbq_ambi"), ["unknown task", "bbq_ambig"]),
    (dict(sae=("none",)), ["--layer None", "0 to 3"]),
    (dict(sae=("random:8",)), ["--layer None", "0 to 3"]),
    (dict(layer=(2,)), ["trained on layer 1, not 2"]),
    (dict(sae=("auto",)), ["--sae auto", "presets", "random:D"]),
    (dict(sae=("none",), layer=(4,)), ["--layer 4", "0 to 3"]),
    (dict(sae=("none",), layer=(-1,)), ["--layer -1"]),
    (dict(sae=("none",), layer=(2, 1)), ["rising order"]),
    (dict(sae=("none",), layer=(1, 1)), ["rising order"]),
    (dict(sae=("none",) * 3, layer=(1, 2)), ["one per site"]),
    (dict(sae=("random:0",), layer=(1,)), ["random:0"]),
    (dict(sae=("random:99999999999",), layer=(1,)), ["random:99999999999", "at most random:1000000"]),
    (dict(sae=("no-such-sae",)), ["unknown SAE 'no-such-sae'", "directory"]),
    (dict(sae=("gemma-scope-2b-pt-res-canonicle/x",)), ["unknown SAE", SCOPE]),
    (
        dict(sae=(f"{SCOPE}/layer_20/width_17k/canonical",)),
        ["unknown SAE id", "layer_20/width_16k/canonical"],
    ),
    (dict(model="gemma2-2"), ["unknown model 'gemma2-2'", "gemma2-2b", "directory"]),
    (dict(model="nobody/no-such-model"), ["hub cannot be reached", "smollm2-135m", "local directory"]),
    (dict(device="cuda:1"), ["--device cuda:1", "no GPU", "--device cpu"]),
    (dict(device="banana"), ["--device banana"]),
]
for flag in OUTSIDE.split():
    key, given = flag.split("=")
    words = f"--{key.replace('_', '-')} {given}: must lie between"
    IMPOSSIBLE.append(({key: float(given) if "." in given or given == "nan" else int(given)}, [words]))


@pytest.mark.parametrize("kw, words", IMPOSSIBLE, ids=str)
def test_impossible_flags(small, tmp_path, monkeypatch, kw, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused_run(small, tmp_path, *words, **kw)


UNFIT = [
    (dict(d_model=12), ["width 12", "16"]),
    (dict(hook_name="blocks.1.attn.hook_z"), ["only what a decoder layer puts out"]),
    (dict(hook_name="hook_embed"), ["'hook_embed'"]),
    (dict(hook_name="blocks.0.hook_resid_pre"), ["'blocks.0.hook_resid_pre'"]),
    (dict(hook_name="blocks.4.hook_resid_post"), ["--layer 4", "0 to 3"]),
]


@pytest.mark.parametrize("kw, words", UNFIT, ids=str)
def test_sae_that_does_not_fit_the_model(small, tmp_path, kw, words):
    spec = tiny.tiny_sae_dir(tmp_path / "other", **{**dict(d_model=16, d_sae=24, hook_name=HOOK), **kw})
    refused_run(small, tmp_path, *words, sae=(spec,))


# ------------------------------------------------------------------------------ model, SAE, rows
def test_what_the_hub_does_not_give(small, tmp_path, monkeypatch):
    from sae_lens import SAE
    from transformers import AutoTokenizer

    monkeypatch.setattr(SAE, "from_pretrained", raising(ConnectionError("Max retries exceeded\nwith url: x")))
    spec = f"{SCOPE}/layer_20/width_16k/canonical"
    words = [f"cannot read the SAE {spec}", "Max retries exceeded", "give a directory"]
    refused_run(small, tmp_path, *words, sae=(spec,))
    gated = OSError("You are trying to access a gated repo.\n401 Client Error.")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(gated))
    words = ["cannot load", "google/gemma-2-2b: You are trying to access a gated repo."]
    refused_run(small, tmp_path, *words, "the hub cannot be reached", model="gemma2-2b")
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    refused_run(small, tmp_path, *words, "licence", "hf auth login", "--model", model="gemma2-2b")


CORRUPT = [
    ("model", "model.safetensors", b"half"),
    ("model", "config.json", b"{"),
    ("model", None, None),
    ("sae", None, None),
    ("sae", "sae_weights.safetensors", b"x" * 300),
    ("sae", "sae_weights.safetensors", b""),
    ("sae", "cfg.json", b"{"),
    ("sae", "cfg.json", b'{"architecture": "unheard-of"}'),
    ("sae", "features.jsonl", b'{"feature": 0, "name": ""}\n{"x"'),
    ("sae", "features.jsonl", b'{"feature": 0, "name": ""}\n{"feature": 1}'),
]


@pytest.mark.parametrize("flag, name, content", CORRUPT, ids=str)
def test_corrupt_directories(small, tmp_path, flag, name, content):
    broken = tmp_path / "broken"
    broken.mkdir()
    if name:
        shutil.copytree(small / flag, broken, dirs_exist_ok=True)
        (broken / name).write_bytes(content)
    words = ["cannot load" if flag == "model" else "cannot read the SAE", broken]
    if name == "features.jsonl":
        words = ["features.jsonl:2"]
    refused_run(small, tmp_path, *words, **{flag: str(broken) if flag == "model" else (str(broken),)})


# ------------------------------------------------------------------------------ runs that were stopped
@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """A run that was stopped in the third of four updates."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(crl_tasks, "score_tokens", parity)  # as half_right does for one test
        stop(m, torch.optim.AdamW, "step", 9)
        go(small, folder)
    return next(folder.iterdir())


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


def refuses(run, *words, **flags):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    one_line(lambda: crl_ppo.main(crl_ppo.Args(resume=str(run), **flags)), *words)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


RESUMED = ["last.safetensors", "rewards.safetensors"]


@pytest.mark.parametrize("name", RESUMED)
def test_truncated_foreign_and_mismatching_checkpoints(copy, name):
    path = copy / name
    whole = path.read_bytes()
    tensors, state = hub.load_tensors(shutil.copy(path, copy.parent / "whole"), {})
    for broken in (b"", whole[:7], whole[:200], whole[:-1], b"not weights " * 99):
        path.write_bytes(broken)
        refuses(copy, path, "not a readable CRL checkpoint")
    for foreign in ({"x": torch.ones(3)}, {"state": torch.tensor([123], dtype=torch.uint8)}):
        save_file(foreign, path)
        refuses(copy, path, "not a readable CRL checkpoint")
    if name == "last.safetensors":
        for key, change in (("prior", torch.full_like), ("critic.0.weight", lambda weights, _: weights[1:])):
            agent = tensors["agent"] | {key: change(tensors["agent"][key], math.nan)}
            hub.save_tensors(path, {"agent": agent}, state)
            one_line(lambda: crl_ppo.load_agent(path, {}), name, "use another checkpoint")
        hub.save_tensors(path, {"agent": {"obs_mean": torch.ones(2, 3)}}, state)
        one_line(lambda: crl_ppo.load_agent(path, {}), name, "holds no 'prior'")
    identity = json.loads((copy / "args.json").read_text())["identity"]
    assert {"schema", "task", "model", "model_hash", "sae_hash", "layer", "coef"} < identity.keys()
    for field in identity:
        hub.save_tensors(path, tensors, state | {field: "other"})
        refuses(copy, name, f"{field} differs", "'other'")


def test_old_runs_and_runs_with_other_flags_are_refused(copy):
    record = json.loads((copy / "args.json").read_text())
    for flag, value in dict(seed=5, sae=("none",), coef=(9.0,)).items():
        refuses(copy, "--resume", f"--{flag}", **{flag: value})
    cases = [(stored, "no readable args.json") for stored in ("7", {"args": 7}, {"args": None}, [1])]
    cases += [(record | {"schema": schema}, "another version") for schema in (1, 3, None)]
    cases.append((record | {"args": record["args"] | {"old_flag": 1}}, "another version"))
    cases.append((record | {"args": {"seed": 1}}, "another version"))
    for flag, value in dict(seed="1", coef=["1"], samples=None, shots=[1], dtype="int8").items():
        cases.append((record | {"args": record["args"] | {flag: value}}, f"args.json gives {flag} "))
    for stored, word in cases:
        (copy / "args.json").write_text(json.dumps(stored))
        refuses(copy, word)
        one_line(lambda: crl_ppo.stored_args(copy), copy, word)
    (copy / "args.json").write_text("{")
    refuses(copy, "no readable args.json")
    (copy / "args.json").unlink()
    refuses(copy, "no readable args.json")
    (copy / "best.safetensors").unlink(missing_ok=True)
    one_line(lambda: crl_ppo.load_agent(copy / "best.safetensors", {}), "no file", copy / "best.safetensors")


# ------------------------------------------------------------------------------ things that go wrong
def test_nan_stops_and_the_last_good_checkpoint_loads(small, tmp_path, monkeypatch):
    whole = go(small, tmp_path / "whole")
    original = torch.max
    calls = []

    def spoilt(*a):
        calls.append(1)
        return original(*a) * (math.nan if len(calls) == 19 else 1)

    with monkeypatch.context() as m:
        m.setattr(crl_ppo.torch, "max", spoilt)
        words = ["update 3", "loss is not finite", "lower --learning-rate"]
        one_line(lambda: go(small, tmp_path / "runs"), *words)
    [run] = (tmp_path / "runs").iterdir()
    crl_ppo.main(crl_ppo.Args(resume=str(run)))  # what is kept is good: the run can be finished
    assert [m["update"] for m in lines(run / "metrics.jsonl")] == [1, 2, 3, 4] and same(whole, run) == []


def test_a_frozen_model_whose_logits_are_not_finite_is_refused(small, tmp_path, monkeypatch):
    """On prompts that the self-check does not see."""
    original = crl_ppo.Environment.decode

    def spoilt(self, batch, choose, G, *rest):
        tokens = original(self, batch, choose, G, *rest)
        return torch.full_like(tokens, crl_ppo.NO_TOKEN) if G == 1 and len(self.memo) > 8 else tokens

    monkeypatch.setattr(crl_ppo.Environment, "decode", spoilt)
    one_line(lambda: go(small, tmp_path, "long", decisions=2, steer_tokens=2), "logits are not finite on")


def test_full_disk_and_ctrl_c(small, copy, tmp_path, monkeypatch):
    """The kernel refuses to let any file grow beyond 4 KiB (as a full disk would): one line, nothing lost."""
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        one_line(lambda: as_script(monkeypatch, resume=copy), "safetensors", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before  # and no half-written file
    with monkeypatch.context() as m:
        stop(m, crl_tasks, "load_rows", 1)
        one_line(lambda: as_script(monkeypatch, resume=copy), "interrupted", "--resume")
    crl_ppo.main(crl_ppo.Args(resume=str(copy)))
    assert same(go(small, tmp_path / "whole"), copy) == []
