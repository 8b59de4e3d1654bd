"""A Python that has imported transformers and PEFT once, and branches for each program that it is given.

The proof after saving starts a fresh process, which imports for 5 s and computes for 0.2 s. Tests whose subject is
something else let it branch off this one: it has never seen this package, or another folder's weights, either.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune_kit.runs import verify

FRESH = verify.in_a_fresh_process

SERVER = """
import json, os, sys, traceback
import torch, transformers, peft, bitsandbytes, safetensors.torch
import peft.tuners.lora, transformers.models.llama.modeling_llama, transformers.quantizers.quantizer_bnb_4bit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
for line in sys.stdin:
    given = json.loads(line)
    child = os.fork()
    if not child:
        said = os.open(given["said"], os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.environ.clear()
        os.environ.update(given["environment"])
        os.chdir(given["cwd"])
        sys.argv = ["-c", given["argument"]]
        code = 0
        try:
            exec(compile(open(given["program"]).read(), given["program"], "exec"), {"__name__": "__main__"})
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Warm:
    """What `verify.in_a_fresh_process` does, by a branch of a process that is started at the first call."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None
        self.hub: dict[str, str] = {}

    def __call__(self, program: Path, argument: str, environment: dict[str, str]) -> tuple[int, str]:
        # what huggingface_hub reads when it is imported
        hub = {name: value for name, value in environment.items() if name.startswith("HF_")}
        if self.server is None:
            self.hub = hub
            self.server = subprocess.Popen(
                [sys.executable, "-I", "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        if hub != self.hub:
            return FRESH(program, argument, environment)
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        with tempfile.NamedTemporaryFile() as said:
            given = {
                "program": str(program),
                "argument": argument,
                "environment": environment,
                "cwd": str(Path.cwd()),
                "said": said.name,
            }
            self.server.stdin.write(json.dumps(given) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return code, Path(said.name).read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate()
