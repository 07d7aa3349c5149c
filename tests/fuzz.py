"""Coverage-guided fuzzing of the readers of files, by atheris (pip install atheris==3.0.0), as long as one likes:

    python tests/fuzz.py meta -max_total_time=600        # a name in hostile.READERS, then options of libFuzzer

Files lie in memory (/dev/shm). What crashes, hangs or takes over 2 GB is written to ./crash-*, timeout-* or oom-*; give
that file after the name to see it again.
"""

import random
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
OURS = [
    "checkpoint",
    "configurator",
    "data",
    "evaluate",
    "export",
    "metrics",
    "model",
    "plot",
    "tasks",
    "train",
    "weights",
    "json",
    "tarfile",
    "zipfile",
]

with atheris.instrument_imports(include=OURS):
    import hostile


def mutate(content: bytes, max_size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    changed = hostile.mutate(content, rng) if rng.random() < 0.5 else atheris.Mutate(content, max_size)
    return changed[:max_size]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in hostile.READERS:
        sys.exit(f"{__doc__}\nreaders: {', '.join(hostile.READERS)}")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        prepared, corpus = hostile.Prepared(sys.argv.pop(1), folder), Path(folder, "corpus")
        corpus.mkdir()
        for i, seed in enumerate(prepared.seeds):
            (corpus / str(i)).write_bytes(seed)
        files = any(not argument.startswith("-") for argument in sys.argv[1:])
        arguments = [
            sys.argv[0],
            "-timeout=10",
            f"-max_len={max(4096, 2 * max(map(len, prepared.seeds)))}",
            *sys.argv[1:],
            *([] if files else [str(corpus)]),
        ]
        atheris.Setup(arguments, lambda content: prepared(content) and None, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
