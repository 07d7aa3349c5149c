"""Files of documents: JSON lines (plain, .gz, .zst) and Parquet, from a folder or a data hub, record by record.

A record is a JSON line as bytes or a Parquet row as a dict. Nothing here holds more than a block of a file, a line, or
a row group in memory; a line that is too long is cut and becomes a bad record.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard
from tqdm import tqdm

from configurator import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet")  # what is taken from a folder
BLOCK_BYTES = 1 << 16
ZSTD_BYTES = 1 << 11  # of a .zst file at once: 4 bytes can stand for 128 KiB, so these for MAX_RECORD_BYTES
MAX_RECORD_BYTES = 1 << 26  # a longer line is no document but damage
ROWS = 16  # of a Parquet file at once: a few bytes can stand for as many copies of a long text
PYARROW, DATASETS = "pyarrow==22.0.0", "datasets==4.4.1"

Record = bytes | dict


class Source(NamedTuple):
    """Records in an order that never changes; `domain` when all are of one."""

    name: str
    records: Callable[[], Iterator]
    domain: str | None = None


def files_of(argument: str) -> list[Path]:
    """The files that a path, a pattern, or a folder (looked through to its depth) names, in sorted order."""
    if os.path.isdir(argument):
        found = sorted(
            path
            for path in Path(argument).rglob("*")
            if path.name.endswith(SUFFIXES) and not _is_hidden(path.relative_to(argument))
        )
    else:
        names = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        found = [Path(name) for name in names]
    if not found or not all(path.is_file() for path in found):
        raise UserError(
            f"{argument}: no such file: give a folder, a pattern or a file of .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
        )
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_source(path: Path, domain: str | None = None, columns: tuple[str, ...] = ("text",)) -> Source:
    return Source(str(path), partial(records, path, columns), domain)


def records(path: Path, columns: tuple[str, ...] = ("text",)) -> Iterator[Record]:
    """The records of one file; of Parquet only these columns. Raises UserError when the file is damaged."""
    if path.suffix == ".parquet":
        yield from rows(path, columns)
        return
    try:
        bar = tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
        with open(path, "rb") as file, bar:
            for line in lines(blocks(file, path)):
                bar.update(file.tell() - bar.n)
                yield line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable") from None


def rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict]:
    try:
        import pyarrow  # noqa: PLC0415 - needed for Parquet alone
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs a package more: pip install {PYARROW}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise UserError(
                    f"{path}: has no column {missing[0]!r}, but {', '.join(file.schema_arrow.names)}: "
                    f"rename a column to {missing[0]}"
                )
            for batch in file.iter_batches(ROWS, columns=list(columns)):
                yield from values(batch)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}): get the file again") from None


def values(batch: "pyarrow.RecordBatch") -> Iterator[Record]:  # noqa: F821
    """The rows; one with invalid UTF-8 becomes a record with invalid UTF-8, and the others stay what they are."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(len(batch)):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error.object


def lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends; of one over MAX_RECORD_BYTES the first MAX_RECORD_BYTES + 1 bytes."""
    rest = bytearray()
    for part in parts:
        *whole, last = part.split(b"\n")
        for line in whole:
            yield bytes((rest + line)[: MAX_RECORD_BYTES + 1]) if rest else line
            rest.clear()
        rest += last[: MAX_RECORD_BYTES + 1 - len(rest)]
    if rest:
        yield bytes(rest)


def blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The decompressed content, piece by piece; UserError when the file is damaged or ends too early."""
    try:
        if path.suffix == ".zst":
            yield from zstd_blocks(file)
        else:
            stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            yield from iter(lambda: stream.read(BLOCK_BYTES), b"")
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}): get the file again") from None


def zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream_reader takes a file that ends inside a frame for complete.
    frame = None
    while block := file.read(ZSTD_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            content = frame.decompress(block)
            yield from (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES))
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends inside a frame")


def hub_sources(name: str, config: str | None, revision: str | None, domain: str | None = None) -> list[Source]:
    """The train split of a data set on a hub (or of a local copy of one), a source for each of its files.

    Raises UserError when the library is missing or the hub cannot be reached.
    """
    try:
        import datasets  # noqa: PLC0415 - needed for streaming alone
    except ImportError:
        raise UserError(f"--stream needs a package more: pip install {DATASETS}") from None
    where = f"{name}{f', {config}' if config else ''}"
    try:
        stream = datasets.load_dataset(name, config, split="train", streaming=True, revision=revision)
        n = stream.num_shards
    except (OSError, ValueError, RuntimeError) as error:  # what the library and those below it raise
        raise UserError(
            f"{where}: cannot be streamed ({_first_line(error)}): check the name, the network and your "
            "access, or give a local copy"
        ) from None
    return [Source(f"{where}, file {i + 1} of {n}", partial(_streamed, stream, n, i, where), domain) for i in range(n)]


def _streamed(stream: "datasets.IterableDataset", n: int, i: int, where: str) -> Iterator[dict]:  # noqa: F821
    try:
        yield from stream.shard(num_shards=n, index=i)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}, file {i + 1} of {n}: the stream broke ({_first_line(error)}): run again, it goes on from here"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def object_of(record: Record) -> dict:
    """The JSON object or row that a record is, with a string "text" in it; ValueError says why there is none."""
    if isinstance(record, bytes):
        if len(record) > MAX_RECORD_BYTES:
            raise ValueError(f"a line of over {MAX_RECORD_BYTES:,} bytes")
        try:
            record = json.loads(record.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 at byte {error.start}") from None
        except (ValueError, RecursionError) as error:  # a ValueError of its own: a number of over 4300 digits
            raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(text := record.get("text"), str):
        raise ValueError('expected an object with a string "text"')
    if not text.strip():
        raise ValueError("empty text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in the text") from None
    return record


def text_of(record: Record) -> tuple[None, str]:
    """(domain, text) of a record whose source knows the domain."""
    return None, object_of(record)["text"]
