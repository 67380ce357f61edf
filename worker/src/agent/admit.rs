//! Whether a request can be answered at all, seen before anything is searched or paid.

use atlas_shared::message::Task;
use serde_json::Value;

use super::{draft::Failure, prompt::parent_text, spec::Kind};

/// The kind of document that a request wants, or why none can be written for it: `unknown_kind`,
/// `parent_not_found` (`metadata.parent_id` names no spec that this request may read) or
/// `parent_required` (there is nothing to refine). `parent` is what the store has for `parent_id`.
///
/// A document that was to change another one and has not seen it would only pretend, so there is none.
pub fn admit(task: &Task, parent: Option<&Value>) -> Result<Admitted, Failure> {
    let parent = parent.and_then(parent_text);
    kind_of(task, parent.is_some()).map(|kind| Admitted { kind, parent })
}

/// A request that can be answered, and what was found out by looking.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// The kind of document that it wants. A [`Kind::Refine`] has a parent that can be read.
    pub kind: Kind,
    /// Its parent as it is shown to a model, if it has one that can be read.
    pub(super) parent: Option<String>,
}

fn kind_of(task: &Task, readable: bool) -> Result<Kind, Failure> {
    let kind = Kind::of(task, readable).map_err(|asked| {
        let known = Kind::ALL.map(Kind::as_str).join(", ");
        failure("unknown_kind", format!("`metadata.kind` is {asked:?}. Known kinds: {known}."))
    })?;
    match task.options.parent_id {
        _ if readable => Ok(kind),
        // Which of these it is may not be told: the task can be another tenant's.
        Some(id) => Err(failure(
            "parent_not_found",
            format!(
                "`metadata.parent_id` names {id}, and there is no finished spec of that task which this request \
                 may read: it is unknown, still at work, ended without a spec, or another tenant's. Ask again with \
                 the id of a finished task (`atlas runs list`), or without `parent_id` for a new document."
            ),
        )),
        None if kind == Kind::Refine => Err(failure(
            "parent_required",
            "`metadata.kind` is \"refine\", and there is no `metadata.parent_id`: nothing to refine. Name the task \
             whose spec is to change (`atlas ask … --parent ID`), or leave `kind` out for a new document."
                .to_owned(),
        )),
        None => Ok(kind),
    }
}

fn failure(code: &str, message: String) -> Failure {
    Failure { code: code.to_owned(), message }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::{
        super::{
            draft::{Draft, DraftInput},
            offline,
            testing::{call, failed, input, task},
        },
        *,
    };

    const ID: &str = "11111111-1111-4111-8111-111111111111";

    #[test]
    fn what_was_to_change_an_unreadable_document_fails_and_says_what_to_do() {
        let parent = json!({"msg_type": "spec", "content": "# Old\n\nIt was so."});
        let error = json!({"msg_type": "error", "content": "It failed."});
        for (metadata, parent, code) in [
            (json!({ "parent_id": ID }), None, Some("parent_not_found")),
            (json!({ "parent_id": ID }), Some(error), Some("parent_not_found")),
            (json!({ "parent_id": ID, "kind": "adr" }), None, Some("parent_not_found")),
            (json!({ "parent_id": ID, "kind": "refine" }), None, Some("parent_not_found")),
            (json!({ "kind": "refine" }), None, Some("parent_required")),
            (json!({ "kind": "poem" }), None, Some("unknown_kind")),
            (json!({ "parent_id": ID }), Some(parent.clone()), None),
            (json!({ "parent_id": ID, "kind": "adr" }), Some(parent), None),
            (json!({}), None, None),
        ] {
            let input = DraftInput { task: task("Use Redis instead", &metadata), parent, ..input() };
            let found = admit(&input.task, input.parent.as_ref()).err();
            assert_eq!(found.as_ref().map(|failure| failure.code.as_str()), code, "{metadata}");
            assert_eq!(offline::draft(&input).err(), found, "{metadata}");
            let mut draft = Draft::new(input);
            match found {
                Some(failure) => assert_eq!(failed(&mut draft), failure),
                None => assert_eq!(call(&mut draft).step, "draft.0"),
            }
        }
    }

    #[test]
    fn the_message_names_the_task_and_the_way_out() {
        let failure = admit(&task("Use Redis", &json!({ "parent_id": ID })), None).unwrap_err();
        assert!(failure.message.contains(ID) && failure.message.contains("without `parent_id`"));
    }
}
