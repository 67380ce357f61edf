//! The JSON schema of each kind, in the strict dialect of the OpenAI API: every property required,
//! no other allowed. [`coerce`] bends whatever came back into that shape and says where it had to.

use std::sync::LazyLock;

use atlas_shared::model::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::spec::{Field, Kind};

/// The name sent with the schema.
pub(super) const NAME: &str = "architecture_document";

/// The schema of a whole document. Every prompt has one, so all of them share it.
pub fn of_kind(kind: Kind) -> JsonSchema {
    made(kind.fields())
}

/// The schema of some fields of a document: one that is there already, or made for a repair.
pub(super) fn made(fields: &[Field]) -> JsonSchema {
    static SCHEMAS: LazyLock<[(Kind, JsonSchema); 4]> =
        LazyLock::new(|| Kind::ALL.map(|kind| (kind, of_fields(kind.fields()).into())));
    let known = SCHEMAS.iter().find(|(kind, _)| kind.fields() == fields);
    known.map_or_else(|| of_fields(fields).into(), |(_, schema)| schema.clone())
}

fn of_fields(fields: &[Field]) -> Value {
    object(fields.iter().map(|field| (field.name(), of_field(*field))))
}

fn of_field(field: Field) -> Value {
    match field {
        Field::Title | Field::Summary => string(),
        Field::Changes => array(object([
            ("section", string()),
            ("change", string()),
            ("reason", string()),
            ("citations", citations()),
        ])),
        Field::Context
        | Field::Drivers
        | Field::Confirmation
        | Field::Strengths
        | Field::Deployment
        | Field::Scaling
        | Field::Security
        | Field::Observability => claims(),
        Field::Requirements => object([("functional", claims()), ("non_functional", claims())]),
        Field::Options => array(object([
            ("name", string()),
            ("description", string()),
            ("pros", array(string())),
            ("cons", array(string())),
            ("citations", citations()),
        ])),
        Field::Outcome => object([("chosen", string()), ("rationale", string()), ("citations", citations())]),
        Field::Consequences => object([("good", claims()), ("bad", claims())]),
        Field::Findings => array(object([
            ("title", string()),
            ("severity", severity()),
            ("finding", string()),
            ("recommendation", string()),
            ("citations", citations()),
        ])),
        Field::Components => array(object([
            ("name", string()),
            ("responsibility", string()),
            ("technology", string()),
            ("interfaces", string()),
            ("citations", citations()),
        ])),
        Field::Decisions => array(object([
            ("title", string()),
            ("decision", string()),
            ("rationale", string()),
            ("alternatives", array(object([("name", string()), ("why_not", string())]))),
            ("consequences", array(string())),
            ("citations", citations()),
        ])),
        Field::Diagrams => array(object([("title", string()), ("mermaid", string())])),
        Field::Risks => array(object([
            ("risk", string()),
            ("severity", severity()),
            ("mitigation", string()),
            ("citations", citations()),
        ])),
        Field::OpenQuestions => array(string()),
    }
}

pub(super) fn object<'a>(properties: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    let properties: Map<String, Value> =
        properties.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect();
    let required: Vec<&String> = properties.keys().collect();
    json!({ "type": "object", "required": required, "additionalProperties": false, "properties": properties })
}

#[expect(clippy::needless_pass_by_value, reason = "reads as nested calls")]
pub(super) fn array(items: Value) -> Value {
    json!({ "type": "array", "items": items })
}

pub(super) fn string() -> Value {
    json!({ "type": "string" })
}

fn severity() -> Value {
    json!({ "type": "string", "enum": ["low", "medium", "high"] })
}

fn citations() -> Value {
    array(json!({ "type": "integer" }))
}

fn claims() -> Value {
    array(object([("text", string()), ("citations", citations())]))
}

/// What it takes to mend a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Cure {
    /// Something has to be written that is not there: nobody can without knowing what the document is about.
    #[default]
    Content,
    /// What is there has to be put in another form.
    Form,
}

/// Deeper values than this are dropped: no schema of ours nests as deep.
const MAX_DEPTH: usize = 12;

/// Bends `value` into the shape of `schema`. The result always fits; every place where something
/// was missing, of another type or not known is told to `fault` by its path, with what it takes to mend it.
pub(super) fn coerce(value: Value, schema: &Value, fault: &mut dyn FnMut(Cure, String)) -> Value {
    bend(value, schema, "", MAX_DEPTH, fault)
}

fn bend(
    value: Value,
    schema: &Value,
    path: &str,
    depth: usize,
    fault: &mut dyn FnMut(Cure, String),
) -> Value {
    let here = if path.is_empty() { "the answer" } else { path };
    if depth == 0 {
        return empty(schema);
    }
    match schema["type"].as_str() {
        Some("object") => {
            let mut given = match value {
                Value::Object(map) => map,
                Value::Null => {
                    fault(Cure::Content, format!("`{here}` must be an object, not null"));
                    Map::new()
                }
                // A bare text where a claim is wanted: the text is what was meant.
                other => {
                    fault(Cure::Form, format!("`{here}` must be an object"));
                    first_text_property(schema)
                        .map(|name| Map::from_iter([(name.to_owned(), other)]))
                        .unwrap_or_default()
                }
            };
            let mut shaped = Map::new();
            for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
                let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let bent = if let Some(value) = given.remove(name) {
                    bend(value, schema, &inner, depth - 1, fault)
                } else {
                    fault(Cure::Content, format!("`{inner}` is missing"));
                    empty(schema)
                };
                shaped.insert(name.clone(), bent);
            }
            Value::Object(shaped)
        }
        Some("array") => {
            let items = match value {
                Value::Array(items) => items,
                Value::Null => {
                    fault(Cure::Content, format!("`{here}` must be an array, not null"));
                    Vec::new()
                }
                Value::String(text) if text.trim().is_empty() => Vec::new(),
                single => {
                    fault(Cure::Form, format!("`{here}` must be an array"));
                    vec![single]
                }
            };
            let mut shaped = Vec::with_capacity(items.len());
            for (index, item) in items.into_iter().enumerate() {
                if schema["items"]["type"] == "integer" {
                    match as_integer(&item) {
                        Some(number) => shaped.push(json!(number)),
                        None => fault(Cure::Content, format!("`{here}[{index}]` must be a passage number")),
                    }
                } else {
                    shaped.push(bend(item, &schema["items"], &format!("{path}[{index}]"), depth - 1, fault));
                }
            }
            Value::Array(shaped)
        }
        Some("string") => {
            let text = match value {
                Value::String(text) => text,
                Value::Null => {
                    fault(Cure::Content, format!("`{here}` must be a string, not null"));
                    String::new()
                }
                other => {
                    fault(Cure::Form, format!("`{here}` must be a string"));
                    flatten(&other, depth)
                }
            };
            match schema["enum"].as_array() {
                None => Value::String(text),
                Some(words) => {
                    let wanted = text.trim().to_lowercase();
                    words.iter().find(|word| word.as_str() == Some(&wanted)).cloned().unwrap_or_else(|| {
                        fault(Cure::Form, format!("`{here}` must be one of {}", Value::Array(words.clone())));
                        // A word we do not know is no reason to call something harmless.
                        if wanted == "critical" { json!("high") } else { json!("medium") }
                    })
                }
            }
        }
        _ => json!(as_integer(&value).unwrap_or_default()),
    }
}

fn empty(schema: &Value) -> Value {
    match schema["type"].as_str() {
        Some("object") => schema["properties"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, schema)| (name.clone(), empty(schema)))
            .collect(),
        Some("array") => json!([]),
        Some("string") if schema.get("enum").is_some() => json!("medium"),
        Some("string") => json!(""),
        _ => json!(0),
    }
}

fn first_text_property(schema: &Value) -> Option<&str> {
    schema["properties"]
        .as_object()?
        .iter()
        .find(|(_, schema)| schema["type"] == "string")
        .map(|(name, _)| name.as_str())
}

/// `3`, `3.0`, `"3"`, `"[3]"`.
fn as_integer(value: &Value) -> Option<u32> {
    match value {
        Value::Number(number) => number.as_u64().and_then(|n| u32::try_from(n).ok()).or_else(|| {
            let float = number.as_f64()?;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range and whole")]
            (float.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&float)).then_some(float as u32)
        }),
        Value::String(text) => text.trim().trim_matches(['[', ']']).parse().ok(),
        Value::Object(map) => map.values().find_map(as_integer),
        _ => None,
    }
}

/// The words in a value that should have been a string.
fn flatten(value: &Value, depth: usize) -> String {
    let join = |parts: Vec<String>, separator: &str| {
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(separator)
    };
    match value {
        _ if depth == 0 => String::new(),
        Value::Null => String::new(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(items) => join(items.iter().map(|item| flatten(item, depth - 1)).collect(), "; "),
        Value::Object(map) => join(map.values().map(|item| flatten(item, depth - 1)).collect(), ": "),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use proptest::prelude::*;

    use super::{super::spec::Spec, *};

    fn assert_strict(schema: &Value, path: &str) {
        match schema["type"].as_str() {
            Some("object") => {
                assert_eq!(schema["additionalProperties"], json!(false), "{path}");
                let names: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
                assert_eq!(schema["required"], json!(names), "{path}");
                for (name, inner) in schema["properties"].as_object().unwrap() {
                    assert_strict(inner, &format!("{path}.{name}"));
                }
            }
            Some("array") => assert_strict(&schema["items"], &format!("{path}[]")),
            Some("string" | "integer") => {}
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn every_schema_is_strict() {
        for kind in Kind::ALL {
            assert_strict(of_kind(kind).value(), kind.as_str());
        }
    }

    /// One of everything: an instance with every property the schema names.
    fn full(schema: &Value) -> Value {
        match schema["type"].as_str() {
            Some("object") => schema["properties"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, inner)| (name.clone(), full(inner)))
                .collect(),
            Some("array") => json!([full(&schema["items"])]),
            Some("string") if schema.get("enum").is_some() => json!("high"),
            Some("string") => json!("text"),
            _ => json!(7),
        }
    }

    #[test]
    fn the_schema_and_the_rust_types_name_the_same_properties() {
        for kind in Kind::ALL {
            let instance = full(of_kind(kind).value());
            let spec: Spec = serde_json::from_value(instance.clone()).unwrap();
            assert_eq!(serde_json::to_value(&spec).unwrap(), reorder(&instance, kind), "{}", kind.as_str());
        }
    }

    /// The type's fields stand in another order than a kind's; order carries no meaning.
    fn reorder(instance: &Value, kind: Kind) -> Value {
        assert_eq!(instance.as_object().unwrap().len(), kind.fields().len());
        instance.clone()
    }

    #[test]
    fn near_misses_are_bent_and_named() {
        let mut faults = Vec::new();
        let given = json!({
            "title": ["A", "B"],
            "summary": null,
            "context": ["plain text", {"text": "cited", "citations": ["2", "[3]", "x"]}],
            "risks": {"risk": "r", "severity": "CRITICAL", "mitigation": "m", "citations": 4},
        });
        let fields = [Field::Title, Field::Summary, Field::Context, Field::Risks, Field::OpenQuestions];
        let bent = coerce(given, &of_fields(&fields), &mut |_, fault| faults.push(fault));
        let spec: Spec = serde_json::from_value(bent).unwrap();
        assert_eq!(spec.title, "A; B");
        assert_eq!(spec.context[0].text, "plain text");
        assert_eq!(spec.context[1].citations, [2, 3]);
        assert_eq!(spec.risks[0].severity.as_str(), "high");
        assert_eq!(spec.risks[0].citations, [4]);
        insta::assert_snapshot!(faults.join("\n"));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(|n| json!(n)),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec(
                    (
                        prop_oneof![
                            Just("title".to_owned()),
                            Just("decisions".to_owned()),
                            Just("citations".to_owned()),
                            Just("requirements".to_owned()),
                            "[a-z]{1,5}"
                        ],
                        inner
                    ),
                    0..6
                )
                .prop_map(|pairs| pairs.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_comes_fits_the_types_after_bending(value in any_json()) {
            for kind in Kind::ALL {
                let bent = coerce(value.clone(), of_kind(kind).value(), &mut |_, _| {});
                prop_assert!(serde_json::from_value::<Spec>(bent).is_ok());
            }
        }
    }
}
