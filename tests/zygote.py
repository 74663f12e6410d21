"""Starts commands of flaxkd without waiting for their imports: it has made them, and forks. Jobs are lines of JSON.

    {"module", "arguments", "environment", "before", "out"}    before: Python to run first; out: file for all output

It answers with the process number, and writes the exit status, as `subprocess` gives it, to OUT.status.
"""

import importlib
import json
import os
import signal
import sys

MODULES = ("flaxkd.train", "flaxkd.cache", "convert.to_diffusers", "flaxkd.report", "flaxkd.generate")


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    jobs: dict[int, str] = {}

    def reap(*_) -> None:
        for pid in list(jobs):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                out = jobs.pop(pid)
                with open(f"{out}.part", "w") as file:
                    file.write(str(os.waitstatus_to_exitcode(status)))
                os.rename(f"{out}.part", f"{out}.status")

    signal.signal(signal.SIGCHLD, reap)
    while line := sys.stdin.readline():
        job = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            become(job)
            return
        jobs[pid] = job["out"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        print(pid, flush=True)


def become(job: dict) -> None:
    """This process is now the command of the job. It ends as Python ends: threads are waited for."""
    os.setsid()
    nothing, out = os.open(os.devnull, os.O_RDONLY), os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(nothing, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(job["environment"])
    sys.argv = [job["module"], *job["arguments"]]
    exec(job["before"], {})
    importlib.import_module(job["module"]).main(job["arguments"])


if __name__ == "__main__":
    main()
