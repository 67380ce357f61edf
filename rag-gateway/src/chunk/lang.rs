//! Languages by file name.

/// The language of a file, as passages and filters name it; `None` when unknown.
pub(crate) fn language_of(source: &str) -> Option<&'static str> {
    let name = source.rsplit(['/', '\\']).next().unwrap_or(source);
    let whole = name.to_ascii_lowercase();
    match whole.as_str() {
        "dockerfile" | "containerfile" => return Some("dockerfile"),
        "makefile" | "gnumakefile" | "justfile" => return Some("makefile"),
        "cmakelists.txt" => return Some("cmake"),
        "readme" | "license" | "changelog" | "contributing" | "authors" => return Some("text"),
        _ => {}
    }
    let (_, extension) = whole.rsplit_once('.')?;
    Some(match extension {
        "md" | "markdown" | "mdx" => "markdown",
        "pdf" => "pdf",
        "docx" => "docx",
        "rst" => "rst",
        "adoc" | "asciidoc" => "asciidoc",
        "txt" | "text" | "log" => "text",
        "rs" => "rust",
        "py" | "pyi" => "python",
        "js" | "mjs" | "cjs" | "jsx" => "javascript",
        "ts" | "mts" | "cts" | "tsx" => "typescript",
        "go" => "go",
        "java" => "java",
        "kt" | "kts" => "kotlin",
        "scala" | "sc" => "scala",
        "c" | "h" => "c",
        "cc" | "cpp" | "cxx" | "hpp" | "hh" | "hxx" => "cpp",
        "cs" => "csharp",
        "rb" => "ruby",
        "php" => "php",
        "swift" => "swift",
        "ex" | "exs" => "elixir",
        "lua" => "lua",
        "sh" | "bash" | "zsh" => "shell",
        "ps1" => "powershell",
        "sql" => "sql",
        "tf" | "tfvars" | "hcl" => "terraform",
        "proto" => "protobuf",
        "graphql" | "gql" => "graphql",
        "ipynb" => super::NOTEBOOK,
        "json" | "jsonc" | "json5" => "json",
        "yaml" | "yml" => "yaml",
        "toml" => "toml",
        "ini" | "cfg" | "conf" | "properties" | "env" => "ini",
        "xml" | "xsd" | "svg" => "xml",
        "html" | "htm" | "vue" | "svelte" => "html",
        "css" | "scss" | "less" => "css",
        "csv" | "tsv" => "csv",
        "vim" => "vim",
        "r" => "r",
        "jl" => "julia",
        "hs" => "haskell",
        "ml" | "mli" => "ocaml",
        "clj" | "cljs" => "clojure",
        "erl" => "erlang",
        "dart" => "dart",
        "zig" => "zig",
        "nix" => "nix",
        _ => return None,
    })
}
