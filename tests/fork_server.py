"""Runs texforce commands, each in a process forked from one that has imported everything: a start takes no time.

A line of JSON on standard input, `{"arguments": [...], "log": PATH, "prepare": NAME, "value": ...}`, starts a command, and
the answer is its process id; the next line, whatever it is, asks for its exit status. `prepare` names a function below
that is called in the new process first.
"""

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable

import diffusers.optimization
import diffusers.training_utils
import diffusers.utils.torch_utils  # noqa: F401
import matplotlib.figure  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import transformers  # noqa: F401
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
from peft import LoraConfig, get_peft_model  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from texforce import cli, evaluation, merging, rewards, run, training  # noqa: F401

IO_EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
}


def limit_file_size(size: int) -> None:
    """Limit what a file can hold, and skip the look for room before the training, so that it ends in the middle of it."""
    run.checkpoint_size = lambda config: 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def kill_at_io_step(wanted: dict) -> None:
    """End this process by SIGKILL before step `number` of what the save of epoch `epoch` does to files."""
    state = {"saving": False, "seen": 0}

    def step(event: str, arguments: object) -> None:
        if state["saving"] and event in IO_EVENTS | {"fsync"}:
            if state["seen"] == wanted["number"]:
                os.kill(os.getpid(), signal.SIGKILL)
            state["seen"] += 1

    def watched(function: Callable) -> Callable:
        def write_checkpoint(folder, snapshot, *arguments):
            state["saving"] = snapshot.epoch == wanted["epoch"]
            result = function(folder, snapshot, *arguments)
            state["saving"] = False
            return result

        return write_checkpoint

    sys.addaudithook(step)
    fsync = os.fsync
    os.fsync = lambda descriptor: (step("fsync", ()), fsync(descriptor))[1]
    run.write_checkpoint = watched(run.write_checkpoint)


def main() -> None:
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if not child:
            code = 1
            with open(job["log"], "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                try:
                    if job.get("prepare"):
                        globals()[job["prepare"]](job["value"])
                    cli.app(job["arguments"])
                except SystemExit as error:
                    code = error.code or 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
