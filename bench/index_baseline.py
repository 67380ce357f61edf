"""Pipelines that teams write in Python: read, split, index for BM25. One run of one of them over a list of files.

Usage: index_baseline.py PIPELINE FOLDER < LIST   (one file a line, relative to FOLDER; prints one line of JSON)
Needs: pip install -r index_baseline.txt

  characters   LangChain, chunks sized in characters; rank_bm25. What a team writes first, and the least work.
  tokens       LangChain, chunks sized in tokens as Atlas' are (from_tiktoken_encoder); rank_bm25
  sentences    LlamaIndex SentenceSplitter, sized in tokens; LlamaIndex' BM25Retriever (bm25s)
  syntax       LlamaIndex CodeSplitter (tree-sitter) where there is a grammar, sized in characters, SentenceSplitter
               for the rest; BM25Retriever with stems and stop words, written to disk

The clock starts after all imports, when everything that is loaded once has been.
"""

import json
import os
import pathlib
import re
import sys
import tempfile
import time

# Of Atlas' defaults: CHUNK_TOKENS, CHUNK_OVERLAP_TOKENS. Four characters are about one token of code.
TOKENS, OVERLAP = 320, 32
CHARACTERS_A_TOKEN = 4
# The encoding that Atlas counts in.
ENCODING = "cl100k_base"
WORD = re.compile(r"\w+")
# File name endings: names in LangChain and in tree-sitter.
LANGUAGES = {
    ".c": ("C", "c"),
    ".cpp": ("CPP", "cpp"),
    ".go": ("GO", "go"),
    ".h": ("C", "c"),
    ".html": ("HTML", None),
    ".java": ("JAVA", "java"),
    ".js": ("JS", "javascript"),
    ".md": ("MARKDOWN", None),
    ".py": ("PYTHON", "python"),
    ".rb": ("RUBY", "ruby"),
    ".rs": ("RUST", "rust"),
    ".rst": ("RST", None),
    ".ts": ("TS", "typescript"),
}


def offline_encoding():
    """Encodings come with llama-index-core: nothing is downloaded."""
    import llama_index.core

    bundled = pathlib.Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(bundled))


class LangChain:
    """Splits by the separators of each language, and indexes with rank_bm25."""

    def __init__(self, by_tokens):
        from langchain_text_splitters import Language, RecursiveCharacterTextSplitter
        from rank_bm25 import BM25Okapi

        self.bm25 = BM25Okapi

        def splitter(language):
            options = {}
            if language is not None:
                options["separators"] = RecursiveCharacterTextSplitter.get_separators_for_language(Language[language])
                options["is_separator_regex"] = True
            if by_tokens:
                return RecursiveCharacterTextSplitter.from_tiktoken_encoder(
                    encoding_name=ENCODING, chunk_size=TOKENS, chunk_overlap=OVERLAP, disallowed_special=(), **options
                )
            return RecursiveCharacterTextSplitter(
                chunk_size=TOKENS * CHARACTERS_A_TOKEN, chunk_overlap=OVERLAP * CHARACTERS_A_TOKEN, **options
            )

        self.splitters = {suffix: splitter(language) for suffix, (language, _) in LANGUAGES.items()}
        self.other = splitter(None)

    def split(self, _name, suffix, text):
        return self.splitters.get(suffix, self.other).split_text(text)

    def index(self, chunks):
        index = self.bm25([WORD.findall(chunk.lower()) for chunk in chunks])
        assert index.corpus_size == len(chunks)


class LlamaIndex:
    """Splits by sentences, or code by syntax, and indexes with the BM25 of LlamaIndex."""

    def __init__(self, by_syntax):
        import Stemmer
        import tiktoken
        from llama_index.core.node_parser import CodeSplitter, SentenceSplitter
        from llama_index.core.schema import TextNode
        from llama_index.retrievers.bm25 import BM25Retriever

        self.node, self.retriever = TextNode, BM25Retriever
        self.stemmer = Stemmer.Stemmer("english")
        self.persists = by_syntax
        encoding = tiktoken.get_encoding(ENCODING)
        tokenizer = lambda text: encoding.encode(text, disallowed_special=())  # noqa: E731
        self.sentences = SentenceSplitter(chunk_size=TOKENS, chunk_overlap=OVERLAP, tokenizer=tokenizer)
        self.code = {}
        if by_syntax:
            for suffix, (_, language) in LANGUAGES.items():
                if language is not None:
                    self.code[suffix] = CodeSplitter(language=language, max_chars=TOKENS * CHARACTERS_A_TOKEN)

    def split(self, name, suffix, text):
        splitter = self.code.get(suffix)
        if splitter is not None:
            try:
                pieces = splitter.split_text(text)
            except (ValueError, RecursionError):
                # What its grammar does not understand.
                pieces = self.sentences.split_text(text)
        else:
            pieces = self.sentences.split_text(text)
        return [self.node(text=piece, metadata={"file": name}) for piece in pieces if piece.strip()]

    def index(self, chunks):
        index = self.retriever.from_defaults(nodes=chunks, stemmer=self.stemmer, language="en", similarity_top_k=10)
        if self.persists:
            with tempfile.TemporaryDirectory() as folder:
                index.persist(folder)


def pipeline(name):
    offline_encoding()
    match name:
        case "characters":
            return LangChain(by_tokens=False)
        case "tokens":
            return LangChain(by_tokens=True)
        case "sentences":
            return LlamaIndex(by_syntax=False)
        case "syntax":
            return LlamaIndex(by_syntax=True)
    raise SystemExit(f"there is no pipeline {name!r}")


def main():
    pipe = pipeline(sys.argv[1])
    folder = pathlib.Path(sys.argv[2])
    names = [line for line in sys.stdin.read().splitlines() if line]
    began, cpu_began = time.perf_counter(), time.process_time()
    chunks = []
    for name in names:
        path = folder / name
        text = path.read_text(encoding="utf-8", errors="replace")
        chunks.extend(pipe.split(name, path.suffix.lower(), text))
    split, cpu_split = time.perf_counter(), time.process_time()
    pipe.index(chunks)
    print(
        json.dumps(
            {
                "files": len(names),
                "chunks": len(chunks),
                "split_seconds": split - began,
                "split_cpu_seconds": cpu_split - cpu_began,
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu_began,
            }
        )
    )


if __name__ == "__main__":
    main()
