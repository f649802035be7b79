"""Starts commands in processes that are killed where a test says, as no test's own process can be.

Run as a script it is a server: it imports what commands need, once, and forks a process for each start that is asked
for, one JSON object a line on standard input; one a line comes back. `Starter` talks to it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL


class Starter:
    """Starts `squeezeheads` commands in fresh processes."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(
        self,
        *arguments: str | Path,
        log: Path,
        at: str | None = None,
        count: int = 1,
        after: float | None = None,
        trained: float | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Carry out a command.

        Args:
            log: where its output goes.
            at: kill it inside its `count`-th event whose name contains this. Events are "step", the middle of a
                training step, and "KIND PATH", with the kinds `text`, `state`, `tensors`, `torch` (writing: killed when
                half the file is there), `move` (before it), `tree` (deleting: when one file is gone), and every file
                that is opened to be written, every folder made or removed.
            after: kill it these seconds after its start.
            trained: … after its first training step.
            limit: bytes that a file may have, as on a full disk.

        Returns:
            `code`, the exit status, KILLED if it was killed; `events`, their names; `seconds` and `trained`, the wall
            time of the whole and from the first training step on.
        """
        order = {"arguments": [str(a) for a in arguments], "log": str(log), "at": at, "count": count}
        order |= {"after": after, "trained": trained, "limit": limit}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)


# ------------------------------------------------------------------------------------------------------- the server


def serve() -> None:
    import squeezeheads.run  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    log = Path(order["log"])
    seen = log.with_suffix(".events")
    seen.write_text("")
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(in_child(order, log, seen))
    first, status = None, None
    while status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        if done:
            status = found
            break
        now = time.monotonic()
        if first is None and "step" in seen.read_text().splitlines()[-1:]:
            first = now
        late = order["after"] is not None and now - begin >= order["after"]
        if late or (order["trained"] is not None and first is not None and now - first >= order["trained"]):
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        time.sleep(0.002)
    end = time.monotonic()
    return {
        "code": os.waitstatus_to_exitcode(status),
        "events": seen.read_text().splitlines(),
        "seconds": end - begin,
        "trained": 0.0 if first is None else end - first,
    }


def in_child(order: dict[str, Any], log: Path, seen: Path) -> int:
    from squeezeheads.cli import main

    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        watch(order["at"], order["count"], seen)
        if order["limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
        code = main(order["arguments"])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def watch(at: str | None, count: int, seen: Path) -> None:
    """Writes out events, and ends the process inside the one that is asked for."""
    import shutil

    import safetensors.torch
    import torch
    from transformers import TrainerState

    from squeezeheads.trainer import SqueezeTrainer

    left = count
    stream = os.open(seen, os.O_WRONLY | os.O_APPEND)

    def happens(name: str) -> bool:
        nonlocal left
        if name != "step" or left == count:  # steps are many
            os.write(stream, f"{name}\n".encode())
        if at is not None and at in name:
            left -= 1
            return left == 0
        return False

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(kind: str, place: int, write: Any) -> Any:
        def writing(*args: Any, **kwargs: Any) -> Any:
            target = args[place] if isinstance(args[place], str | Path) else None
            ends = target is not None and happens(f"{kind} {target}")
            result = write(*args, **kwargs)
            if ends:
                os.truncate(target, os.path.getsize(target) // 2)
                end()
            return result

        return writing

    def everywhere(old: Any, new: Any) -> None:
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is old:
                    setattr(module, name, new)

    everywhere(safetensors.torch.save_file, torn("tensors", 1, safetensors.torch.save_file))
    everywhere(torch.save, torn("torch", 1, torch.save))
    Path.write_text = torn("text", 0, Path.write_text)
    TrainerState.save_to_json = torn("state", 1, TrainerState.save_to_json)

    def before(kind: str, call: Any) -> Any:
        def calling(*args: Any, **kwargs: Any) -> Any:
            if happens(f"{kind} {args[1]}"):
                end()
            return call(*args, **kwargs)

        return calling

    Path.replace = before("move", Path.replace)
    Path.rename = before("move", Path.rename)
    delete, loss = shutil.rmtree, SqueezeTrainer.compute_loss

    def deleting(path: Any, *args: Any, **kwargs: Any) -> Any:
        if os.path.isdir(path) and happens(f"tree {path}"):
            next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink()
            end()
        return delete(path, *args, **kwargs)

    everywhere(delete, deleting)
    shutil.rmtree = deleting

    def computing(*args: Any, **kwargs: Any) -> Any:
        result = loss(*args, **kwargs)
        if args[1].training and happens("step"):
            end()
        return result

    SqueezeTrainer.compute_loss = computing
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and args[2] & writing:
            happens(f"open {args[0]}")
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            happens(f"{event} {args[0]}")

    sys.addaudithook(audit)


if __name__ == "__main__":
    serve()
