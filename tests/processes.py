"""Programs in processes of their own, forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

# It begins when it is first needed, is one for all tests, and does nothing but import and fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "torch.distributed", "pyro", "bnnflow.estimators", "bnnflow.transport"]
)


def run(code: str, **environment: str) -> int:
    """Run a program; return its exit code, which is minus the signal that killed it."""
    (code,) = _codes(code, [environment])
    return code


def run_ranks(code: str, size: int = 2, **environment: str) -> list[int]:
    """Run a program in processes that share a run, as ``torchrun`` does: where one of them ends
    with an error, the others are told to end.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return _codes(code, [shared | environment | {"RANK": str(i)} for i in range(size)])


def _codes(code: str, environments: list[dict[str, str]]) -> list[int]:
    processes = [FORKS.Process(target=_program, args=(code, each)) for each in environments]
    for process in processes:
        process.start()
    left = list(processes)
    while left:
        wait([process.sentinel for process in left])
        ended = [process for process in left if not process.is_alive()]
        left = [process for process in left if process not in ended]
        if any(process.exitcode for process in ended):
            for process in left:
                process.terminate()
    return [process.exitcode for process in processes]


def _program(code: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    if dist.is_initialized():
        dist.destroy_process_group()
