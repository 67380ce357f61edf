//! Where documents come from: a folder or a git URL, as texts with names.
//!
//! Used by whoever has the files: the `atlas` command on a laptop, and a gateway that was asked to
//! index a repository by itself. Text of PDF and DOCX files is taken out *here*, beside the file, so
//! what travels to an index is always text, and the index knows one kind of document. Ranges of such
//! passages count what a reader can find again:
//!
//! | File | A "line" of the text | `file:3-4` means |
//! |---|---|---|
//! | anything else | a line | lines 3 to 4 |
//! | `.pdf` | a page | pages 3 to 4 |
//! | `.docx` | a paragraph with text, or a row of a table | the third and the fourth |
//!
//! Nothing here knows an index.

pub(crate) mod clones;
pub mod decode;
pub(crate) mod extract;
pub mod git;
pub(crate) mod place;
pub mod repo;
pub mod seen;
pub mod walk;
