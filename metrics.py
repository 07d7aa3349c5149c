"""What a run says of itself: on the terminal, and in metrics.jsonl, one record a line, readable at any moment.

Records have a kind: run (the first: settings, shapes, versions), eval, train, save, warning, extracted.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm


class RunError(RuntimeError):
    """A run that cannot start, go on or be resumed; the message says where and what to do."""


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a killed run has cut is left out. Raises RunError."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # of UTF-8 or of JSON
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or "kind" not in record or ("step" not in record and record["kind"] != "run"):
            raise RunError(f"{path}:{number}: not a record of a run")
        records.append(record)
    return records


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop what the run will write again: steps after the checkpoint, evaluations from it on; all of it at step 0."""
    done = {"train": step + 1, "save": step + 1}  # what happens before a checkpoint is taken
    kept = [r for r in read_metrics(path) if step and (r["kind"] == "run" or r["step"] < done.get(r["kind"], step))]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(beside, path)


def plain(value: object) -> object:
    """An array as JSON takes it: a list, None where a domain has no finite number."""
    return [x if math.isfinite(x) else None for x in value.tolist()] if isinstance(value, np.ndarray) else value


class Log:
    """Of one rank; only the first speaks and writes. A record is appended as a whole line or not at all: those that a
    full disk refuses are kept and written with the next."""

    def __init__(self, path: Path, chief: bool) -> None:
        self.path, self.chief, self.pending = path, chief, b""
        self.say = tqdm.write if chief else (lambda _: None)

    def open(self, step: int) -> None:
        """Go on from a step. From here on records can be written."""
        if self.chief:
            keep_metrics_before(self.path, step)
            self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (closed by close)
            self.end = self.file.seek(0, os.SEEK_END)

    def record(self, record: dict) -> dict:
        record = {key: plain(value) for key, value in record.items()}
        if self.chief:
            self.pending += json.dumps(record).encode() + b"\n"
            try:
                written = os.pwrite(self.file.fileno(), self.pending, self.end)
                problem = "" if written == len(self.pending) else "the disk is full"
            except OSError as error:
                written, problem = 0, error.strerror
            if problem:
                os.ftruncate(self.file.fileno(), self.end)
                self.say(f"warning: {self.path}: {problem}: its records wait until they can be written")
            else:
                self.end, self.pending = self.end + written, b""
        return record

    def warn(self, step: int, text: str) -> None:
        self.say(f"warning: step {step}: {text}")
        self.record({"kind": "warning", "step": step, "text": text})

    def repeat_warnings(self) -> None:
        """Of the whole run, before it was resumed too."""
        warnings = [r for r in read_metrics(self.path) if r["kind"] == "warning"] if self.chief else []
        if warnings:
            self.say(f"warnings of this run: {len(warnings)}")
        for r in warnings:
            self.say(f"  step {r['step']}: {r['text']}")

    def close(self) -> None:
        if self.chief:
            self.file.close()
