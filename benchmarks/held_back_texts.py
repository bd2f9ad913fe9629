"""Write the texts of the full runs on which `tune` is judged, see `benchmarks/tune_held_back.py`.

    python benchmarks/held_back_texts.py --out TEXTS

`social_iqa.txt` and `hellaswag.txt` have a question or context with its right answer on each line, from the half of the
evaluation sets in ``RORA_COMMONSENSE_DIR``. `python_documentation.txt` has the different paragraphs of Python's
language reference (`pydoc_data.topics`) with at least `MIN_CHARACTERS` characters, one on a line. `chats.jsonl` has the
goals of PIQA with their right solutions, as chats of one turn each. ``held_back_sha256.json`` has the digest of each
file; the paragraphs depend on the version of Python.
"""

import argparse
import hashlib
import json
import os
import platform
import pydoc_data.topics
import re
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 80
DIGESTS = "held_back_sha256.json"


def read_answers(folder: Path, question: str) -> Iterator[tuple[str, str]]:
    """Yield each question of a task with its right answer."""
    for line in (folder / "test_mc.jsonl").read_text().splitlines():
        item = json.loads(line)
        yield " ".join(item[question].split()), " ".join(item["choices"][item["label"]].split())


def read_paragraphs() -> Iterator[str]:
    """Yield the different paragraphs of Python's language reference, each on one line."""
    paragraphs: dict[str, None] = {}
    for text in pydoc_data.topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if len(line) >= MIN_CHARACTERS:
                paragraphs[line] = None
    yield from paragraphs


def as_chat(question: str, answer: str) -> str:
    """Return a chat of one turn as a line of JSON."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out, tasks = parser.parse_args().out, Path(os.environ["RORA_COMMONSENSE_DIR"])
    contents = {
        "social_iqa.txt": [" ".join(pair) for pair in read_answers(tasks / "social_i_qa", "question")],
        "hellaswag.txt": [" ".join(pair) for pair in read_answers(tasks / "hellaswag", "context")],
        "python_documentation.txt": list(read_paragraphs()),
        "chats.jsonl": [as_chat(*pair) for pair in read_answers(tasks / "piqa", "question")],
    }
    out.mkdir(parents=True, exist_ok=True)
    digests = {"python": platform.python_version()}
    for name, lines in contents.items():
        content = ("\n".join(lines) + "\n").encode()
        (out / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
        print(f"{out / name}: {len(lines):,} records")
    (out / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
