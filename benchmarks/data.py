"""What it costs to get from a file to encoded rows: processor seconds and memory, step by step. Rows are stretches of a text of yours, of 10 to 180 words.

python benchmarks/data.py TEXT [--rows 20000] [--task sft|classify]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASES = {"sft": "smollm2", "classify": "minilm"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="any text file with some thousands of words")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--task", choices=list(BASES), default="sft")
    asked = parser.parse_args()

    from ingraft.bases import load_tokenizer
    from ingraft.data import Settings, read_rows, task_of
    from ingraft.data.examples import Tally
    from ingraft.data.repeats import repeats_of

    task, tokenizer, tally = task_of(asked.task), load_tokenizer(BASES[asked.task]), Tally()
    tokenizer("warm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write(file, asked.text.read_text(encoding="utf-8").split(), asked.rows, asked.task)
        size = file.stat().st_size
        rows = measured("read", lambda: read_rows(file))
        records = measured("records", lambda: task.read(rows)[1])
        labels = task.labels(records) if task.labels is not None else ()
        how = Settings(reader=tokenizer, max_length=512, labels=labels)
        examples = measured("encode", lambda: task.encode(records, rows, how, tally))
        measured("repetitions", lambda: repeats_of(rows, records))
    tokens = sum(map(len, examples))
    print(f"{asked.task}: {len(rows):,} rows, {size / 1e6:.1f} MB, {tokens / len(rows):.0f} tokens a row")
    return 0


def write(file: Path, words: list[str], rows: int, task: str) -> None:
    rng = random.Random(0)

    def some(least: int, most: int) -> str:
        count = rng.randint(least, most)
        start = rng.randrange(max(1, len(words) - count))
        return " ".join(words[start : start + count])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            row = {"instruction": some(5, 60), "output": some(5, 120)}
            if task == "classify":
                row = {"text": some(10, 150), "label": rng.choice("ab")}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def measured(what: str, make: Callable[[], Any]) -> Any:
    memory, began = resident(), time.process_time()
    made = make()
    print(f"{what}: {time.process_time() - began:.2f} s of processor time, {resident() - memory:+.0f} MB")
    return made


def resident() -> float:
    """Megabytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    sys.exit(main())
