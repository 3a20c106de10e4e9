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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import HOOK, flags, go
from test_model import one_line
from test_training import TOKEN, lines, stop

import crl_ppo
import crl_tasks

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
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


# ------------------------------------------------------------------------------------------------- flags, command line
def test_help_needs_no_torch():
    code = ("import runpy, sys\nsys.argv = ['crl_ppo.py', '--help']\ntry:\n"
            f"    runpy.run_path({str(SCRIPT)!r}, None, '__main__')\nexcept SystemExit as e:\n"
            "    print('torch' in sys.modules, 'transformers' in sys.modules, e.code)")
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1:] == ["False False 0"] and "--decide" in done.stdout, done.stderr


def test_command_line(small, tmp_path, monkeypatch):
    """The directory that was asked for lies below a regular file, which not even root can write to."""
    one_line(lambda: as_script(monkeypatch, task="mmul"), "unknown task 'mmul'; did you mean mmlu")
    (tmp_path / "FILE").write_text("in the way")
    given = dict(task=f"file:{small}/one.jsonl", model=f"{small}/model", sae=f"{small}/sae", device="cpu",
                 run_dir=tmp_path / "FILE" / "runs")
    one_line(lambda: as_script(monkeypatch, **given), f"{tmp_path}/FILE/runs", "kept", "Not a directory")
    assert (tmp_path / "FILE").read_text() == "in the way"


OUTSIDE = dict(samples=0, val_samples=-1, group=-1, batch_prompts=-2, updates=0, hidden=-8, micro_batch=0,
               max_new_tokens=0, features=0, num_minibatches=0, pool=0, update_epochs=-1, screen=0, epsilon=1.5,
               learning_rate=math.nan, gae_lambda=1.1, ent_coef=-1.0, weight_decay=math.nan, coef=(0.5, math.nan),
               shots=-1, steer_tokens=-1, clip_coef=-0.1)
SCOPE = "gemma-scope-2b-pt-res-canonical"


@pytest.mark.parametrize("kw, words", [
    *[({name: value}, [f"--{name.replace('_', '-')} {value}: must lie between"]) for name, value in OUTSIDE.items()],
    (dict(learning_rate=0.0), ["--learning-rate 0.0"]), (dict(epsilon=math.nan), ["--epsilon nan"]),
    (dict(coef=(-math.inf,)), ["--coef (-inf,)"]), (dict(features=2, afm="none"), ["--features 2", "--afm adaptive"]),
    (dict(features=2, decide="token"), ["--features 2", "--decide once"]),
    (dict(task="long", decide="token"), ["--decide token", "--steer-tokens 0 (all) or above 1"]),
    (dict(group=0, afm="active"), ["--group 0"]), (dict(group=0, decide="token", task="long"), ["--group 0"]),
    (dict(observe=0), ["--observe 0", "first site, 1"]), (dict(observe=4), ["--observe 4", "last layer, 3"]),
    (dict(task="long", decide="token", steer_tokens=0, observe=2), ["--decide token", "--observe"]),
    (dict(max_new_tokens=1, task="long"), ["--max-new-tokens 1", "rows without choices"]),
    (dict(task="bbq"), ["unknown task", "bbq_ambig"]), (dict(task="file:no/such.jsonl"), ["no such file: no/such"]),
    (dict(sae=("none",)), ["has no site", "--layer"]), (dict(sae=("random:8",)), ["has no site", "--layer"]),
    (dict(layer=(2,)), ["trained on layer 1, not 2"]), (dict(sae=("auto",)), ["--sae auto", "presets", "random:D"]),
    (dict(sae=("none",), layer=(4,)), ["--layer 4", "layers 0 to 3"]), (dict(sae=("none",), layer=(-1,)), ["-1"]),
    (dict(sae=("none",), layer=(2, 1)), ["rising order"]), (dict(sae=("none",), layer=(1, 1)), ["rising order"]),
    (dict(sae=("none",) * 3, layer=(1, 2)), ["one per site"]), (dict(sae=("random:0",), layer=(1,)), ["no directions"]),
    (dict(sae=("no-such-sae",)), ["unknown SAE 'no-such-sae'", "directory"]),
    (dict(sae=("gemma-scope-2b-pt-res-canonicle/x",)), ["unknown SAE", SCOPE]),
    (dict(sae=(f"{SCOPE}/layer_20/width_17k/canonical",)), ["unknown SAE id", "layer_20/width_16k/canonical"]),
    (dict(model="gemma2-2"), ["unknown model 'gemma2-2'", "gemma2-2b", "directory"]),
    (dict(model="nobody/no-such-model"), ["hub cannot be reached", "--model smollm2-135m", "local directory"]),
    (dict(device="cuda:1"), ["--device cuda:1", "no GPU", "--device cpu"]),
    (dict(device="banana"), ["--device banana", "not a device", "--device cpu"])], ids=str)
def test_impossible_flags(small, tmp_path, monkeypatch, kw, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if kw.get("task") == "long":
        kw = {"max_new_tokens": 3} | kw | {"task": f"file:{small}/long.jsonl"}
    refused_run(small, tmp_path, *words, **kw)


# --------------------------------------------------------------------------------------------------- model, SAE, rows
def test_what_the_hub_does_not_give(small, tmp_path, monkeypatch):
    from sae_lens import SAE
    from transformers import AutoTokenizer

    def raising(error):
        def fails(*a, **k):
            raise error
        return fails
    monkeypatch.setattr(SAE, "from_pretrained", raising(ConnectionError("Max retries exceeded\nwith url: x")))
    spec = f"{SCOPE}/layer_20/width_16k/canonical"
    refused_run(small, tmp_path, f"cannot load SAE {spec}", "Max retries exceeded", "--sae PATH", sae=(spec,))
    gated = OSError("You are trying to access a gated repo.\n401 Client Error.")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(gated))
    refused_run(small, tmp_path, "google/gemma-2-2b is gated", "licence", "hf auth login", "--model", model="gemma2-2b")


@pytest.mark.parametrize("flag, name, content", [
    ("model", "model.safetensors", b"half"), ("model", "config.json", b"{"), ("model", None, None), ("sae", None, None),
    ("sae", "sae_weights.safetensors", b"x" * 300), ("sae", "sae_weights.safetensors", b""), ("sae", "cfg.json", b"{"),
    ("sae", "cfg.json", b'{"architecture": "unheard-of"}'),
    ("sae", "features.jsonl", b'{"feature": 0, "name": ""}\n{"x"'),
    ("sae", "features.jsonl", b'{"feature": 0, "name": ""}\n{"feature": 1}')], ids=str)
def test_corrupt_directories(small, tmp_path, flag, name, content):
    broken = tmp_path / "broken"
    broken.mkdir()
    if name:
        shutil.copytree(small / flag, broken, dirs_exist_ok=True)
        (broken / name).write_bytes(content)
    words = [f"cannot read the {'SAE' if flag == 'sae' else flag} in", broken]
    words = ["features.jsonl:2"] if name == "features.jsonl" else words
    refused_run(small, tmp_path, *words, **{flag: str(broken) if flag == "model" else (str(broken),)})


@pytest.mark.parametrize("kw, words", [
    (dict(d_model=12), ["width 12", "d_model 16"]), (dict(hook_name="blocks.1.attn.hook_z"), ["residual-stream"]),
    (dict(hook_name="hook_embed"), ["'hook_embed'"]), (dict(hook_name="blocks.0.hook_resid_pre"), ["before layer 0"]),
    (dict(hook_name="blocks.4.hook_resid_post"), ["layers 0 to 3", "4"])], ids=str)
def test_sae_that_does_not_fit_the_model(small, tmp_path, kw, words):
    spec = tiny.tiny_sae_dir(tmp_path / "other", **{**dict(d_model=16, d_sae=24, hook_name=HOOK), **kw})
    refused_run(small, tmp_path, *words, sae=(spec,))


@pytest.mark.parametrize("short, long", [(20, 8), (0, 8), (0, 0)])
def test_rows_that_cannot_be_used(small, tmp_path, capsys, short, long):
    """Too long ones are skipped and counted, too few are said, and none at all is refused."""
    prompts = [f"short {i}" for i in range(short)] + [f"{i}" + "x" * tiny.CONTEXT for i in range(long)]
    rows = [json.dumps({"prompt": p, "choices": ["x", "y"], "answer": 0}) + "\n" for p in prompts]
    (tmp_path / "own.jsonl").write_text("".join(rows))
    kw = dict(task=f"file:{tmp_path}/own.jsonl", samples=40, val_samples=40)
    if not short:
        return refused_run(small, tmp_path, "0 training and 0 validation prompts", "both are needed", **kw)
    _, _, prompts, _ = crl_ppo.set_up(dataclasses.replace(flags(small, tmp_path), **kw))
    (parts, _), said = crl_ppo.load_rows(kw["task"]), capsys.readouterr().out
    skipped = sum(len(r["prompt"]) > 100 for part in ("train", "val") for r in parts[part])
    assert skipped and all(p.row["prompt"].startswith("short") for p in prompts["train"] + prompts["val"])
    assert f"{skipped} prompts are longer than the context of {tiny.CONTEXT} tokens and were skipped" in said
    assert f"--samples 40: {tmp_path}/own.jsonl has {len(parts['train'])} training prompts; all are used" in said


# ------------------------------------------------------------------------------------------- runs that were stopped
@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """A run that was stopped in the third of four updates."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop(m, "ppo_loss", 9)
        go(small, folder)
    return next(folder.iterdir())


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


def refuses(run, *words, **flags):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    one_line(lambda: crl_ppo.main(crl_ppo.Args(resume=str(run), **flags)), *words)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


@pytest.mark.parametrize("name", ["last.safetensors", "table.safetensors"])
def test_truncated_and_foreign_checkpoints(copy, name):
    path, whole = copy / name, (copy / name).read_bytes()
    for broken in (b"", whole[:7], whole[:200], whole[:-1], b"not weights " * 99):
        path.write_bytes(broken)
        refuses(copy, path, "not a readable CRL checkpoint")
    for header in ({"format": "pt"}, {"crl": "{"}):
        save_file({"x": torch.ones(3)}, path, metadata=header)
        refuses(copy, path, "not a readable CRL checkpoint")


@pytest.mark.parametrize("name", ["last.safetensors", "table.safetensors"])
def test_mismatching_checkpoint_names_the_field(copy, name):
    with safe_open(copy / name, "pt") as f:
        state = json.loads(f.metadata()["crl"])
    tensors = load_file(copy / name)
    other = dict(schema=1, task="mmlu", model="other", model_hash="0" * 16, sae=["other"], sae_hash=["0" * 16],
                 layer=[2], observe=3, coef=[9.0], coef_mode="abs", data_hash="0" * 16)
    for field, value in other.items():
        assert state[field] != value
        save_file(tensors, copy / name, metadata={"crl": json.dumps(state | {field: value})})
        refuses(copy, name, f"{field} differs", repr(value))


def test_resume_with_other_flags_or_without_a_run(small, copy, tmp_path):
    record = json.loads((copy / "args.json").read_text())
    refuses(copy, "seed differs", "has 1", "line 5", seed=5)
    refuses(copy, "sae differs", sae=("none",))
    args = record["args"]
    for stored, word in (("7", "no readable args.json"), ({"args": 7}, "no readable args.json"),
                         (record | {"schema": 1}, "another version of crl_ppo.py (schema 1, here 3); train it again"),
                         (record | {"args": args | {"old_flag": 1}}, "another version of crl_ppo.py"),
                         (record | {"args": {"seed": 1}}, "another version of crl_ppo.py"),
                         (record | {"args": args | {"hidden": 4}}, "differs from --hidden 4")):
        (copy / "args.json").write_text(json.dumps(stored))
        refuses(copy, word)
    older = {key: v for key, v in args.items() if key != "export"}  # a run of before this flag was there
    (copy / "args.json").write_text(json.dumps(record | {"args": older}))
    assert json.loads(json.dumps(dataclasses.asdict(crl_ppo.stored_args(copy)))) == args
    (copy / "args.json").write_text("{")
    refuses(copy, "no readable args.json")
    (copy / "args.json").unlink()
    refuses(copy, "no readable args.json")
    (copy / "best.safetensors").unlink()
    one_line(lambda: go(small, tmp_path / "runs", init=str(copy)), "no file", copy / "best.safetensors")


# --------------------------------------------------------------------------------- things that go wrong on the way
def test_nan_stops_and_the_last_good_checkpoint_loads(small, tmp_path, monkeypatch):
    original, calls = crl_ppo.ppo_loss, []

    def spoilt(*a):
        calls.append(1)
        loss, stats = original(*a)
        return loss * (math.nan if len(calls) == 10 else 1), stats
    with monkeypatch.context() as m:
        m.setattr(crl_ppo, "ppo_loss", spoilt)
        words = ["update 3", "the loss is not finite", "lower --learning-rate", "last good checkpoint"]
        one_line(lambda: go(small, tmp_path / "runs"), *words, tmp_path / "runs")
    [run] = (tmp_path / "runs").iterdir()
    assert crl_ppo.main(crl_ppo.Args(resume=str(run))) == run  # what is kept is good: the run can be finished
    assert [m["update"] for m in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_full_disk_and_ctrl_c(copy, monkeypatch):
    """The kernel refuses to let any file grow beyond 4 KiB (as a full disk would): one line, nothing lost."""
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        one_line(lambda: as_script(monkeypatch, resume=copy), "safetensors", "File too large", "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ZeroDivisionError):
        crl_ppo.write_atomically(copy / "args.json", lambda tmp: (tmp.write_text("half"), 1 / 0))
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before  # and no half-written file
    with monkeypatch.context() as m:
        stop(m, "load_rows", 1)
        m.setattr(crl_tasks, "load_rows", crl_ppo.load_rows)  # the script imports it anew
        one_line(lambda: as_script(monkeypatch, resume=copy), "interrupted", "--resume")
    crl_ppo.main(crl_ppo.Args(resume=str(copy)))
    assert (copy / "final.json").exists()


@pytest.mark.parametrize("name, task, kw", [("branch", "one", {}), ("prefill", "one", {}), ("decode", "long", {}),
                                            ("decode", "long", dict(TOKEN, group=12))], ids=str)
def test_out_of_memory_lowers_the_batch_and_gives_the_same(small, tmp_path, monkeypatch, name, task, kw):
    original, sizes, runs = getattr(crl_ppo, name), [], [go(small, tmp_path / "plain", task, micro_batch=8, **kw)]
    limit = 40 if name == "decode" else 3

    def short_of_memory(lm, *a):
        sizes.append(len({"prefill": a[1], "branch": a[1], "decode": a[5] if name == "decode" else ()}[name]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(lm, *a)
    monkeypatch.setattr(crl_ppo, name, short_of_memory)
    runs.append(go(small, tmp_path / "small", task, micro_batch=8, **kw))
    tables = [load_file(run / "table.safetensors") for run in runs]
    same = [key for key, v in tables[0].items() if torch.equal(v.nan_to_num(), tables[1][key].nan_to_num())]
    assert max(sizes) > limit and {"pushes", "reward", "said", "mask"} <= set(same)
    logs = [[(r["token"], r["push"], r["reward"]) for r in lines(run / "interventions.jsonl")] for run in runs]
    assert logs[0] == logs[1]


def test_out_of_memory_with_one_prompt(small, tmp_path, monkeypatch):
    def never(*a):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(crl_ppo, "branch", never)
    one_line(lambda: go(small, tmp_path / "runs"), "out of memory with one prompt", "--pool", "--max-new-tokens")
