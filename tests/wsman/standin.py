"""The stand-in as a process: started, switched, asked what it saw, stopped."""

import json
import os
import subprocess
from pathlib import Path

BINARY = os.environ.get("VMTIDE_STANDIN_BIN", "target/debug/standin-wsman-server")


class Standin:
    """A server of the stand-in. Ends with its standard input."""

    def __init__(self, *words, env=None):
        if not Path(BINARY).is_file():
            raise RuntimeError(f"{BINARY} is not there: cargo build -p vmtide-standin-wsman-server")
        self.process = subprocess.Popen(
            [BINARY, *(str(word) for word in words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the stand-in ended with {self.process.wait()}")
        self.about = json.loads(line)
        self.port = self.about["port"]
        self.url = self.about["url"]

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def log(self):
        return self.tell("log")

    def last(self):
        return self.log()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
