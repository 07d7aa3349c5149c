"""What a run says of itself: on the terminal, and in metrics.jsonl, one record a line, readable at any moment.

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
    """The records of a metrics.jsonl; a last line that a killed run has cut is left out. Raises UserError, also for a
    record without the fields of its kind, or with something else in them (see is_record)."""
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): choose another out_dir") from None
    records, n_domains = [], None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # of UTF-8 or of JSON
            if number == len(lines):
                break
            record = None
        if not is_record(record, n_domains):
            raise UserError(f"{path}:{number}: not a record of a run: remove the line")
        n_domains = len(record["domains"]) if record["kind"] == "run" else n_domains
        records.append(record)
    return records


NUMBER, LOSS = int | float, int | float | None  # null is for what is not finite
FORMS = {  # of each kind of record: the fields that are read, and what they hold
    "run": {
        "domains": [str],
        "bytes_per_token": [NUMBER],
        "config": {
            "stage": str,
            "init_from": str,
            "data": str,
            "dtype": str,
            "max_steps": int,
            "seq_len": int,
            "eval_sequences": int,
        },
        "source": {
            "n_layers": int,
            "hidden_size": int,
            "intermediate_size": int,
            "n_heads": int,
            "n_kv_heads": int,
            "head_dim": int,
            "vocab_size": int,
        },
    },
    "eval": {
        "step": int,
        "val_loss": [LOSS],
        "ratio": [NUMBER],
        "reference_ratio": [NUMBER],
        "reference_loss": ([LOSS], None),
        "tokens": [NUMBER],
        "eval_s": NUMBER,
        "mix_s": NUMBER,
    },
    "train": {"step": int, "domain_loss": [LOSS], "step_s": NUMBER},
    "warning": {"step": int, "text": str},
}
FORMS["extracted"] = FORMS["eval"]
MASKS = {name: {str: NUMBER} for name in ("sparsity", "target_sparsity", "lambda1", "lambda2")}  # all or none


def is_record(record: object, n_domains: int | None) -> bool:
    """n_domains: of the run; None before its record, where nothing else by domain can stand."""
    if not fits(record, {"kind": str}):
        return False
    form = FORMS.get(record["kind"], {"step": int})
    if not fits(record, form | ({} if MASKS.keys().isdisjoint(record) else MASKS)):
        return False
    lengths = {len(values) for name in form if isinstance(values := record.get(name), list)}
    if n_domains is None and record["kind"] == "run":
        return len(lengths) == 1
    return lengths <= {n_domains}


def fits(value: object, form: object) -> bool:
    """form: a type; [form] for a list of such values; {name: form} for an object with at least these fields;
    {str: form} for one whose fields all hold that; (form, None) where it may be null. Numbers are finite."""
    if isinstance(form, tuple):
        return value is None or fits(value, form[0])
    if isinstance(form, dict) and str in form:
        return isinstance(value, dict) and all(fits(item, form[str]) for item in value.values())
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(name), inner) for name, inner in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    is_number = type(value) in (int, float) and abs(value) < 2**63
    return isinstance(value, form) and (is_number or not isinstance(value, int | float))


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
        self.path, self.chief, self.pending, self.file = path, chief, b"", None
        self.say = tqdm.write if chief else (lambda _: None)

    def open(self, step: int) -> None:
        """Go on from a step. From here on records can be written. Raises UserError."""
        try:
            keep_metrics_before(self.path, step)
            self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}): make room") from None
        self.end = self.file.seek(0, os.SEEK_END)

    def record(self, record: dict) -> dict:
        record = {key: plain(value) for key, value in record.items()}
        if self.file:
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
        if self.file:
            self.file.close()
