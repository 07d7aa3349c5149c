"""What a run says: on the terminal, and in metrics.jsonl, one record a line, readable at any moment.

Records have a kind: run (the first: settings, shapes, versions), eval, train, save, warning, extracted.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl. A last line that a killed run has cut is left out."""
    lines = Path(path).read_bytes().splitlines() if Path(path).exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a record of a run: remove the line") from None
    return records


def keep_metrics_before(path: Path, step: int) -> list[dict]:
    """Drop what the run will write again: all that came after the training step of the checkpoint, but for saves.

    -> the records that stay.
    """
    records = read_metrics(path)
    last = max((i for i, r in enumerate(records) if r["kind"] == "train" and r["step"] <= step), default=-1)
    kept = [r for i, r in enumerate(records) if i <= last or (r["kind"] == "save" and r["step"] <= step)]
    tmp = path.with_suffix(".tmp")
    tmp.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(tmp, path)
    return kept


def plain(value: object) -> object:
    """An array as JSON takes it: a list, None where a domain has no finite number."""
    return [x if math.isfinite(x) else None for x in value.tolist()] if isinstance(value, np.ndarray) else value


class Log:
    """Only the main rank speaks and writes. A record is appended as a whole line or not at all: the records that a
    full disk refuses are kept and written with the next one."""

    def __init__(self, path: Path, is_main: bool) -> None:
        self.path, self.is_main, self.pending, self.file = path, is_main, b"", None
        self.say = tqdm.write if is_main else (lambda _: None)

    def open(self, step: int) -> dict:
        """Go on from a step. From here on records can be written. -> the last evaluation's; {} where there is none."""
        kept = keep_metrics_before(self.path, step)
        self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (closed by close)
        self.end = self.file.seek(0, os.SEEK_END)
        return next((r for r in reversed(kept) if r["kind"] == "eval"), {})

    def record(self, record: dict) -> dict:
        record = {key: plain(value) for key, value in record.items()}
        if self.file:
            self.pending += json.dumps(record).encode() + b"\n"
            written, reason = 0, "No space left on device"
            try:
                written = os.pwrite(self.file.fileno(), self.pending, self.end)
            except OSError as error:
                reason = error.strerror
            if written == len(self.pending):
                self.end, self.pending = self.end + written, b""
            else:
                os.ftruncate(self.file.fileno(), self.end)
                self.say(f"warning: {self.path}: {reason}: its records wait until they can be written")
        return record

    def warn(self, step: int, text: str, now: bool = True) -> None:
        """Record it. What asks for no action before the run has ended is said by `sum_up` only."""
        if now:
            self.say(f"warning: step {step}: {text}")
        self.record({"kind": "warning", "step": step, "text": text})

    def sum_up(self) -> None:
        """Count the warnings of the whole run, also of its parts before it was resumed."""
        warnings = [r for r in read_metrics(self.path) if r["kind"] == "warning"] if self.is_main else []
        if warnings:
            last = warnings[-1]
            self.say(f"{len(warnings)} warnings in {self.path}; the last, at step {last['step']}: {last['text']}")

    def close(self) -> None:
        if self.file:
            self.file.close()
