"""kill -9 at random moments: what is begun again ends with the same bytes as what was never interrupted.

    python benchmark/faults.py [--trials 20] [--seed 0]

The stages take turns: download and conversion of the embedded model, training (screening, rewards, PPO,
validation) with --resume, evaluation with --resume, export. Training is on the tests' tiny model. Prints a
line per trial and the count.
"""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import small_run  # noqa: E402

from crl_tasks import hub  # noqa: E402

TIMES = ("wall_s", "known_s", "learn_s")  # of final.json
FETCH = (
    "import os, sys; os.environ['CRL_CACHE'] = sys.argv[1]; import crl_hub; crl_hub.fetch_embedded_model()"
)
TRAIN = """import pathlib, sys
sys.path.append('tests')
import small_run
small_run.go(*map(pathlib.Path, sys.argv[1:]), updates=40)"""


def content(folder):
    """{file: hash} of a directory; final.json without times, and no args.json, which names folders."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "args.json":
            data = hub.sha256(file)
            if file.name == "final.json":
                data = {key: v for key, v in json.loads(file.read_text()).items() if key not in TIMES}
            found[str(file.relative_to(folder))] = data
    return found


def start(command, after=None):
    """Run a command, or kill it after so many seconds. True if it came to its end."""
    command = [sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)
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
        begun = [path.parent for path in at.glob("*/args.json")]
        return ["crl_ppo.py", "--resume", begun[0]] if begun else ["-c", TRAIN, small, at]

    start(train(folder / "run"))
    run = next((folder / "run").glob("*/final.json")).parent
    evaluation = ["crl_eval.py", "--run", run, "--resume", "--conditions", "random", "--out"]
    return {
        "download": (lambda at: ["-c", FETCH, at], "smollm2*/config.json"),
        "training": (train, "*/final.json"),
        "evaluation": (lambda at: [*evaluation, at], "predictions.jsonl"),
        "export": (lambda at: ["crl_steer.py", "export", run, at / "out"], "out/args.json"),
    }


def main(trials: int = 20, seed: int = 0):
    """kill -9 at random moments: what is begun again ends with the same bytes.

    Args:
        trials: kills in all
        seed: of the moments
    """
    rng = random.Random(seed)
    same = 0
    whole = {}
    with tempfile.TemporaryDirectory() as tmp:
        kinds = stages(Path(tmp))
        for n in range(trials):
            stage = list(kinds)[n % len(kinds)]
            command, made = kinds[stage]
            if stage not in whole:
                at = Path(tmp) / stage
                at.mkdir()
                began = time.time()
                start(command(at))
                whole[stage] = (content(next(at.glob(made)).parent), time.time() - began)
            files, seconds = whole[stage]
            after = rng.uniform(0.1, 1) * seconds
            at = Path(tmp) / f"{stage}-{n}"
            at.mkdir()
            ended = start(command(at), after)
            if not (at / "out").exists():  # an export that is there is whole
                start(command(at))
            alike = content(next(at.glob(made)).parent) == files
            same += alike
            told = "came to its end" if ended else "killed"
            result = "the same bytes" if alike else "OTHER BYTES"
            print(f"{stage}: {told} after {after:.1f} of {seconds:.1f} s, then {result}", flush=True)
    print(f"{same} of {trials} ended with the same bytes")
    return same == trials


if __name__ == "__main__":
    sys.exit(not tyro.cli(main))
