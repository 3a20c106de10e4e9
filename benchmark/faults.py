"""kill -9 at random moments: what is begun again ends with the same bytes as what was never interrupted.

    python benchmark/faults.py [--trials 20] [--seed 0]

The stages take turns: download and conversion of the embedded model, training (screening, table, PPO, validation) with
--resume, evaluation with --resume, export. Training is on the tests' tiny model. Prints a line per trial and the count.
"""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]
import small_run  # noqa: E402

TIMES = ("wall_s", "known_s", "learn_s")  # of final.json
FETCH = "import sys, crl_model; crl_model.fetch_embedded_model(sys.argv[1])"
TRAIN = ("import sys; sys.path.append('tests'); import small_run, pathlib; "
         "small_run.go(*map(pathlib.Path, sys.argv[1:]), updates=40)")


def content(folder):
    """{file: hash} of a directory; of final.json without its times, without args.json, which names folders."""
    found = {}
    for file in (p for p in folder.rglob("*") if p.is_file() and p.name != "args.json"):
        data = file.read_bytes()
        if file.name == "final.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k not in TIMES}).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def start(command, after=None):
    """Run a command, or kill it after so many seconds. True if it came to its end."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # pip, its child, as well
        process.communicate()
        return False
    assert process.returncode == 0, f"{command} failed: {said.strip().splitlines()[-1:]}"
    return True


def stages(folder):
    """{stage: (command of a try in directory `at`, a file in the directory that it makes there)}."""
    small = small_run.build(folder / "small")

    def train(at):
        begun = [p.parent for p in at.glob("*/args.json")]
        return ["crl_ppo.py", "--resume", begun[0]] if begun else ["-c", TRAIN, small, at]

    def evaluate(at):
        return ["crl_eval.py", "--run", run, "--out", at, "--resume", "--conditions", "random"]
    start(train(folder / "run"))
    run = next((folder / "run").glob("*/final.json")).parent
    return {"download": (lambda at: ["-c", FETCH, at], "smollm2*/config.json"), "training": (train, "*/final.json"),
            "evaluation": (evaluate, "predictions.jsonl"),
            "export": (lambda at: ["crl_ppo.py", "--export", run, at / "out"], "out/args.json")}


def main(trials: int = 20, seed: int = 0):
    """kill -9 at random moments: what is begun again ends with the same bytes.

    Args:
        trials: kills in all
        seed: of the moments
    """
    rng, same, whole = random.Random(seed), 0, {}
    with tempfile.TemporaryDirectory() as tmp:
        kinds = stages(Path(tmp))
        for n in range(trials):
            stage = list(kinds)[n % len(kinds)]
            command, made = kinds[stage]
            if stage not in whole:
                at, began = Path(tmp) / stage, time.time()
                at.mkdir()
                start(command(at))
                whole[stage] = content(next(at.glob(made)).parent), time.time() - began
            files, seconds = whole[stage]
            at, after = Path(tmp) / f"{stage}-{n}", rng.uniform(0.1, 1) * seconds
            at.mkdir()
            ended = start(command(at), after)
            if not (at / "out").exists():  # an export that is there is whole
                start(command(at))
            alike = content(next(at.glob(made)).parent) == files
            same += alike
            print(f"{stage}: {'came to its end' if ended else 'killed'} after {after:.1f} of {seconds:.1f} s, then "
                  f"{'the same bytes' if alike else 'OTHER BYTES'}", flush=True)
    print(f"{same} of {trials} ended with the same bytes")
    return same == trials


if __name__ == "__main__":
    sys.exit(not tyro.cli(main))
