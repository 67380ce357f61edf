"""The pipeline that a team writes first: read, split with LangChain, index with rank_bm25, all in memory.

Usage: index_baseline.py FOLDER < LIST   (one file a line, relative to FOLDER; prints one line of JSON)
Needs: pip install langchain-text-splitters rank_bm25
"""

import json
import pathlib
import re
import sys
import time

from langchain_text_splitters import Language, RecursiveCharacterTextSplitter
from rank_bm25 import BM25Okapi

LANGUAGES = {
    ".c": Language.C,
    ".cpp": Language.CPP,
    ".go": Language.GO,
    ".h": Language.C,
    ".html": Language.HTML,
    ".java": Language.JAVA,
    ".js": Language.JS,
    ".md": Language.MARKDOWN,
    ".py": Language.PYTHON,
    ".rb": Language.RUBY,
    ".rs": Language.RUST,
    ".rst": Language.RST,
    ".ts": Language.TS,
}
# Atlas cuts by tokens (320, 32 shared); four characters are about one token of code. Counting tokens, as
# Atlas does, would make this pipeline many times slower.
SIZE = {"chunk_size": 1280, "chunk_overlap": 128}
WORD = re.compile(r"\w+")


def splitter(suffix):
    language = LANGUAGES.get(suffix)
    if language is None:
        return RecursiveCharacterTextSplitter(**SIZE)
    return RecursiveCharacterTextSplitter.from_language(language, **SIZE)


def main():
    folder = pathlib.Path(sys.argv[1])
    names = [line for line in sys.stdin.read().splitlines() if line]
    began = time.perf_counter()
    cpu_began = time.process_time()
    splitters = {}
    chunks = []
    for name in names:
        path = folder / name
        text = path.read_text(encoding="utf-8", errors="replace")
        suffix = path.suffix.lower()
        if suffix not in splitters:
            splitters[suffix] = splitter(suffix)
        chunks.extend(splitters[suffix].split_text(text))
    split = time.perf_counter() - began
    index = BM25Okapi([WORD.findall(chunk.lower()) for chunk in chunks])
    assert index.corpus_size == len(chunks)
    print(
        json.dumps(
            {
                "files": len(names),
                "chunks": len(chunks),
                "split_seconds": split,
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu_began,
            }
        )
    )


if __name__ == "__main__":
    main()
