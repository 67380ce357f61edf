//! Makes answers: an instance of whatever JSON schema was sent, from the words and passages of the
//! prompt. The same prompt gives the same answer.
//!
//! Honoured: `type` (also lists), `properties`, `required`, `items`, `prefixItems`, `enum`, `const`,
//! `$ref` within the schema, `anyOf`, `oneOf`, `allOf`, bounds of lengths, items and numbers,
//! `multipleOf`, `uniqueItems`, the common `format`s. Not honoured: `pattern`, `not`, `if`.

use serde_json::{Map, Value, json};

use crate::{author, prompt::Prompt};

/// Below this, optional properties and items are left out, so that recursive schemas end.
const SOFT_DEPTH: usize = 8;
/// Below this, nothing is made any more: the schema has no finite instance.
const HARD_DEPTH: usize = 40;

/// Makes one answer.
pub(crate) struct Generator<'a> {
    prompt: &'a Prompt,
    root: &'a Value,
    /// How many items a list has, within its bounds.
    list_len: u64,
    /// Cite passages that were not given.
    bad_citations: bool,
    /// Objects made so far: each speaks of another passage.
    made: usize,
}

/// An instance of `schema` with lists of `list_len` items.
pub(crate) fn instance(schema: &Value, prompt: &Prompt, list_len: u64, bad_citations: bool) -> Value {
    let mut generator = Generator { prompt, root: schema, list_len, bad_citations, made: 0 };
    if is_document(schema) {
        let document = author::document(prompt, list_len);
        return generator.fitted(schema, Some(&document), "", 0);
    }
    generator.value(schema, "", 0, 0)
}

/// What was written, as an instance of `schema`, which may ask for a part of it.
pub(crate) fn fitted(schema: &Value, prompt: &Prompt, written: &Value) -> Value {
    let mut generator = Generator { prompt, root: schema, list_len: 1, bad_citations: false, made: 0 };
    generator.fitted(schema, Some(written), "", 0)
}

/// Of what was written to mend an earlier answer, what a model can write that has no memory: a field that
/// the earlier answer does not show is made from the request, what changed from the document before it, and
/// only passages that are shown are cited. The rest is left empty.
pub(crate) fn as_far_as_shown(schema: &Value, prompt: &Prompt, mut written: Value) -> Value {
    let Some(earlier) = &prompt.earlier else { return written };
    // Remarks may follow it.
    let earlier = serde_json::Deserializer::from_str(earlier).into_iter::<Value>().next();
    let earlier = earlier.and_then(Result::ok).unwrap_or_default();
    let mut known: Vec<Value> = prompt.passages.iter().map(|passage| json!(passage.number)).collect();
    each_citations(&mut earlier.clone(), &mut |numbers| known.append(numbers));
    for (name, value) in written.as_object_mut().into_iter().flatten() {
        let can_be_made = prompt.shows_request && (name != "changes" || prompt.shows_parent);
        if !can_be_made && is_blank(&earlier[name]) {
            *value = blank(&schema["properties"][name]);
        }
    }
    each_citations(&mut written, &mut |numbers| numbers.retain(|number| known.contains(number)));
    written
}

fn each_citations(value: &mut Value, see: &mut dyn FnMut(&mut Vec<Value>)) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                match value {
                    Value::Array(numbers) if name == "citations" => see(numbers),
                    value => each_citations(value, see),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| each_citations(item, see)),
        _ => {}
    }
}

fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(items) => items.iter().all(is_blank),
        Value::Object(object) => object.values().all(is_blank),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The least that fits the schema of a document's field.
fn blank(schema: &Value) -> Value {
    match schema["type"].as_str() {
        Some("object") => schema["properties"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, inner)| (name.clone(), blank(inner)))
            .collect(),
        Some("array") => json!([]),
        _ => json!(""),
    }
}

/// A scripted answer whose citations may name passages by their places ([`Prompt::number_of`]). A passage
/// that was not given is not cited.
pub(crate) fn cited(written: &Value, prompt: &Prompt) -> Value {
    match written {
        Value::Object(object) => object
            .iter()
            .map(|(name, value)| match value {
                Value::Array(places) if name == "citations" => (name.clone(), numbers(places, prompt)),
                value => (name.clone(), cited(value, prompt)),
            })
            .collect(),
        Value::Array(items) => items.iter().map(|item| cited(item, prompt)).collect(),
        other => other.clone(),
    }
}

fn numbers(places: &[Value], prompt: &Prompt) -> Value {
    let mut numbers: Vec<Value> = Vec::new();
    for place in places {
        let number = match place {
            Value::String(place) => prompt.number_of(place).map(Value::from),
            number => Some(number.clone()),
        };
        numbers.extend(number.filter(|number| !numbers.contains(number)));
    }
    Value::Array(numbers)
}

/// True for the schema of an architecture document, or of some fields of one.
fn is_document(schema: &Value) -> bool {
    let Some(properties) = schema["properties"].as_object() else { return false };
    let telling =
        |name: &String| !matches!(name.as_str(), "title" | "summary" | "options" | "outcome" | "context");
    !properties.is_empty()
        && properties.keys().all(|name| author::FIELDS.contains(&name.as_str()))
        && properties.keys().any(telling)
}

/// An answer in prose, with citations in brackets.
pub(crate) fn prose(prompt: &Prompt) -> String {
    let first = sentence(&format!("This answers the request about {}", subject(prompt)));
    let cited = prompt
        .passages
        .iter()
        .take(4)
        .map(|passage| format!("{} [{}]", sentence(&excerpt(&passage.text, 18)), passage.number));
    std::iter::once(first).chain(cited).collect::<Vec<_>>().join(" ")
}

/// What the prompt is about, in a few words.
pub(crate) fn subject(prompt: &Prompt) -> String {
    let words: Vec<&str> = prompt.words.iter().take(4).map(String::as_str).collect();
    if words.is_empty() { "the request".to_owned() } else { words.join(" ") }
}

impl Generator<'_> {
    /// What was written, bent to the schema: properties that it does not name are left out, missing
    /// ones are made.
    fn fitted(&mut self, schema: &Value, written: Option<&Value>, name: &str, depth: usize) -> Value {
        let resolved = self.resolved(schema, depth);
        match (kind(&resolved, depth), written) {
            ("object", Some(Value::Object(written))) => resolved["properties"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, inner)| (name.clone(), self.fitted(inner, written.get(name), name, depth + 1)))
                .collect(),
            ("array", Some(Value::Array(_))) if name == "citations" && self.bad_citations => {
                json!([9_001, 9_002])
            }
            ("array", Some(Value::Array(written))) => written
                .iter()
                .map(|item| self.fitted(&resolved["items"], Some(item), name, depth + 1))
                .collect(),
            ("string", Some(Value::String(_))) | ("integer", Some(Value::Number(_))) => {
                written.cloned().unwrap_or_default()
            }
            _ => self.value(schema, name, 0, depth),
        }
    }

    fn value(&mut self, schema: &Value, name: &str, index: usize, depth: usize) -> Value {
        if depth > HARD_DEPTH {
            return Value::Null;
        }
        let schema = &self.resolved(schema, depth);
        if let Some(value) = schema.get("const") {
            return value.clone();
        }
        if let Some(values) = schema["enum"].as_array() {
            return values.get(index % values.len().max(1)).cloned().unwrap_or_default();
        }
        for choice in ["anyOf", "oneOf"] {
            if let Some(options) = schema[choice].as_array() {
                // Deep down a null ends a recursive schema.
                let is_null = |option: &&Value| option["type"] == "null";
                let option = if depth > SOFT_DEPTH { options.iter().find(is_null) } else { None }
                    .or_else(|| options.iter().find(|option| !is_null(option)))
                    .or(options.first());
                return option
                    .map_or(Value::Null, |option| self.value(&option.clone(), name, index, depth + 1));
            }
        }
        match kind(schema, depth) {
            "object" => self.object(schema, depth),
            "array" => self.array(schema, name, depth),
            "integer" => json!(whole(schema, index)),
            "number" => number(schema, index),
            "boolean" => json!(true),
            "null" => Value::Null,
            _ => json!(self.text(schema, name, index)),
        }
    }

    /// The schema with `$ref` followed and `allOf` merged.
    fn resolved(&self, schema: &Value, depth: usize) -> Value {
        let mut schema = schema.clone();
        for _ in 0..HARD_DEPTH.saturating_sub(depth) {
            let target = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#'));
            match target.and_then(|path| self.root.pointer(path)) {
                Some(target) => schema = target.clone(),
                None => break,
            }
        }
        if let Some(parts) = schema["allOf"].as_array().cloned() {
            let mut merged = schema.as_object().cloned().unwrap_or_default();
            merged.remove("allOf");
            for part in parts {
                let part = self.resolved(&part, depth + 1);
                for (key, value) in part.as_object().cloned().unwrap_or_default() {
                    match (merged.get_mut(&key), value) {
                        (Some(Value::Object(known)), Value::Object(more)) => known.extend(more),
                        (Some(Value::Array(known)), Value::Array(more)) => known.extend(more),
                        (_, value) => {
                            merged.insert(key, value);
                        }
                    }
                }
            }
            schema = Value::Object(merged);
        }
        schema
    }

    fn object(&mut self, schema: &Value, depth: usize) -> Value {
        let here = self.made;
        self.made += 1;
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let mut object = Map::new();
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            if depth <= SOFT_DEPTH || required.contains(&name.as_str()) {
                object.insert(name.clone(), self.value(inner, name, here, depth + 1));
            }
        }
        for name in required {
            if !object.contains_key(name) {
                object.insert(name.to_owned(), json!(subject(self.prompt)));
            }
        }
        Value::Object(object)
    }

    fn array(&mut self, schema: &Value, name: &str, depth: usize) -> Value {
        let least = schema["minItems"].as_u64().unwrap_or(0);
        let most = schema["maxItems"].as_u64().unwrap_or(u64::MAX);
        let items = self.resolved(&schema["items"], depth);
        if kind(&items, depth) == "integer" && matches!(name, "citations" | "sources") {
            return json!(self.citations(least, most));
        }
        let wanted = if depth > SOFT_DEPTH { 0 } else { self.list_len };
        let len = wanted.max(least).min(most);
        let first = schema["prefixItems"].as_array().cloned().unwrap_or_default();
        let mut made: Vec<Value> = Vec::new();
        for index in 0..usize::try_from(len).unwrap_or(0).max(first.len()) {
            let item = first.get(index).unwrap_or(&schema["items"]);
            let value = self.value(item, name, index, depth + 1);
            if schema["uniqueItems"] == true && made.contains(&value) {
                // Enums and constants have only so many values.
                continue;
            }
            made.push(value);
        }
        Value::Array(made)
    }

    /// The number of the passage that the object at work speaks of.
    fn citations(&self, least: u64, most: u64) -> Vec<u64> {
        let mut numbers: Vec<u64> = Vec::new();
        if self.bad_citations {
            numbers.extend([9_001, 9_002]);
        } else if let Some(passage) = self.passage() {
            numbers.push(passage.number);
        }
        numbers.truncate(usize::try_from(most).unwrap_or(usize::MAX));
        let mut filler = 1;
        while (numbers.len() as u64) < least {
            if !numbers.contains(&filler) {
                numbers.push(filler);
            }
            filler += 1;
        }
        numbers
    }

    fn passage(&self) -> Option<&crate::prompt::Passage> {
        let passages = &self.prompt.passages;
        passages.get(self.made.checked_sub(1)? % passages.len().max(1))
    }

    fn text(&self, schema: &Value, name: &str, index: usize) -> String {
        let text = match schema["format"].as_str() {
            Some("date-time") => "2026-01-02T03:04:05Z".to_owned(),
            Some("date") => "2026-01-02".to_owned(),
            Some("time") => "03:04:05Z".to_owned(),
            Some("duration") => "PT5M".to_owned(),
            Some("email") => "architect@example.com".to_owned(),
            Some("hostname") => "atlas.example.com".to_owned(),
            Some("ipv4") => "192.0.2.1".to_owned(),
            Some("ipv6") => "2001:db8::1".to_owned(),
            Some("uuid") => format!("00000000-0000-4000-8000-{index:012}"),
            Some("uri" | "url") => "https://example.com/".to_owned(),
            _ => self.words_for(name, index),
        };
        let least = usize::try_from(schema["minLength"].as_u64().unwrap_or(0)).unwrap_or(0);
        let most =
            schema["maxLength"].as_u64().and_then(|max| usize::try_from(max).ok()).unwrap_or(usize::MAX);
        let mut text: String = text.chars().take(most).collect();
        while text.chars().count() < least {
            text.push('x');
        }
        text
    }

    fn words_for(&self, name: &str, index: usize) -> String {
        match name {
            "title" => format!("{} {}", capital(&self.word(index)), subject(self.prompt)),
            "name" | "technology" => self.component(index),
            // An option that is chosen must be one that was named.
            "chosen" => self.component_of_first_item(),
            "query" => subject(self.prompt),
            "mermaid" => self.diagram(),
            _ => self.claim(name),
        }
    }

    /// A sentence from the passage that is cited beside it.
    fn claim(&self, name: &str) -> String {
        let topic = name.replace('_', " ");
        match self.passage() {
            Some(passage) if !passage.text.trim().is_empty() => {
                sentence(&format!("{}: {}", capital(&topic), excerpt(&passage.text, 16)))
            }
            _ => sentence(&format!("{} of {}", capital(&topic), subject(self.prompt))),
        }
    }

    fn word(&self, index: usize) -> String {
        let words = &self.prompt.words;
        words.get(index % words.len().max(1)).cloned().unwrap_or_else(|| "core".to_owned())
    }

    fn component(&self, index: usize) -> String {
        format!("{} service {}", capital(&self.word(index)), index + 1)
    }

    /// `name` is made from the position of its object among all objects, so the first option's is the
    /// position after the objects that came before the list.
    fn component_of_first_item(&self) -> String {
        let first = self.made.saturating_sub(1).saturating_sub(usize::try_from(self.list_len).unwrap_or(0));
        self.component(first)
    }

    fn diagram(&self) -> String {
        let mut lines = vec!["flowchart LR".to_owned()];
        let labels: Vec<String> = (0..3).map(|index| capital(&self.word(index))).collect();
        for (index, label) in labels.iter().enumerate() {
            lines.push(format!("  n{index}[\"{label}\"]"));
        }
        lines.push("  n0 -->|\"calls\"| n1".to_owned());
        lines.push("  n1 -->|\"stores\"| n2".to_owned());
        lines.join("\n")
    }
}

fn kind(schema: &Value, depth: usize) -> &str {
    match &schema["type"] {
        Value::String(kind) => kind,
        Value::Array(kinds) => {
            let mut kinds = kinds.iter().filter_map(Value::as_str);
            let null = kinds.clone().any(|kind| kind == "null");
            if depth > SOFT_DEPTH && null {
                "null"
            } else {
                kinds.find(|kind| *kind != "null").unwrap_or("null")
            }
        }
        _ if schema.get("properties").is_some() => "object",
        _ if schema.get("items").is_some() || schema.get("prefixItems").is_some() => "array",
        _ => "string",
    }
}

fn whole(schema: &Value, index: usize) -> i64 {
    let least = schema["minimum"]
        .as_i64()
        .or_else(|| schema["exclusiveMinimum"].as_i64().map(|bound| bound.saturating_add(1)));
    let most = schema["maximum"]
        .as_i64()
        .or_else(|| schema["exclusiveMaximum"].as_i64().map(|bound| bound.saturating_sub(1)));
    let step = schema["multipleOf"].as_i64().filter(|step| *step > 0).unwrap_or(1);
    let wanted = i64::try_from(index).unwrap_or(0) % 5 + 1;
    let value = match (least, most) {
        (Some(least), _) => least.saturating_add(wanted - 1),
        (None, Some(most)) => wanted.min(most),
        (None, None) => wanted,
    };
    let value = value.saturating_add(step - 1).div_euclid(step).saturating_mul(step);
    match most {
        Some(most) if value > most => most.div_euclid(step).saturating_mul(step),
        _ => value,
    }
}

fn number(schema: &Value, index: usize) -> Value {
    if schema.get("multipleOf").is_some() {
        return json!(whole(schema, index) as f64);
    }
    let least = schema["minimum"].as_f64().or(schema["exclusiveMinimum"].as_f64());
    let most = schema["maximum"].as_f64().or(schema["exclusiveMaximum"].as_f64());
    json!(match (least, most) {
        (Some(least), Some(most)) => least.midpoint(most),
        (Some(least), None) => least + 0.5,
        (None, Some(most)) => most - 0.5,
        (None, None) => 0.5,
    })
}

/// The first words of a text, as plain text.
fn excerpt(text: &str, words: usize) -> String {
    text.split_whitespace()
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()))
        .filter(|word| {
            !word.is_empty() && !word.contains(['<', '>', '[', ']', '{', '}', '"', '`', '|', '\\'])
        })
        .map(|word| word.chars().take(40).collect::<String>())
        .take(words)
        .collect::<Vec<_>>()
        .join(" ")
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn sentence(text: &str) -> String {
    format!("{}.", text.trim_end_matches(['.', ' ', ':']))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::prompt::Prompt;

    fn prompt() -> Prompt {
        Prompt::read(&[json!({"role": "user", "content":
            "Design a durable queue\n[4] docs/a.md:1-2\nThe queue keeps every message.\n[7] docs/b.md:1-9\nWorkers pull."})])
    }

    /// A validator of the keywords above, written apart from the generator.
    fn fits(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
        let wrong = |why: &str| Err(format!("{value} {why} {schema}"));
        if let Some(path) = schema["$ref"].as_str() {
            let target = root.pointer(path.trim_start_matches('#')).ok_or("dangling $ref")?;
            return fits(root, target, value);
        }
        if let Some(constant) = schema.get("const")
            && constant != value
        {
            return wrong("is not the constant of");
        }
        if let Some(values) = schema["enum"].as_array()
            && !values.contains(value)
        {
            return wrong("is not in the enum of");
        }
        if let Some(options) = schema["anyOf"].as_array().or(schema["oneOf"].as_array())
            && !options.iter().any(|option| fits(root, option, value).is_ok())
        {
            return wrong("fits no option of");
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            fits(root, part, value)?;
        }
        let kinds: Vec<&str> = match &schema["type"] {
            Value::String(kind) => vec![kind],
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        };
        let is = |kind: &str| match kind {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            _ => value.is_null(),
        };
        if !kinds.is_empty() && !kinds.iter().any(|kind| is(kind)) {
            return wrong("is not of the type of");
        }
        if let Some(object) = value.as_object() {
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !object.contains_key(name) {
                    return wrong(&format!("lacks {name} of"));
                }
            }
            for (name, inner) in object {
                match schema["properties"].get(name) {
                    Some(schema) => fits(root, schema, inner)?,
                    None if schema["additionalProperties"] == false => {
                        return wrong(&format!("has {name} beyond"));
                    }
                    None => {}
                }
            }
        }
        if let Some(items) = value.as_array() {
            let len = items.len() as u64;
            if len < schema["minItems"].as_u64().unwrap_or(0)
                || len > schema["maxItems"].as_u64().unwrap_or(u64::MAX)
            {
                return wrong("has the wrong number of items for");
            }
            if schema["uniqueItems"] == true && (1..items.len()).any(|at| items[..at].contains(&items[at])) {
                return wrong("repeats items against");
            }
            for item in items {
                fits(root, &schema["items"], item)?;
            }
        }
        if let Some(text) = value.as_str() {
            let len = text.chars().count() as u64;
            if len < schema["minLength"].as_u64().unwrap_or(0)
                || len > schema["maxLength"].as_u64().unwrap_or(u64::MAX)
            {
                return wrong("is too long or short for");
            }
        }
        if let Some(number) = value.as_f64() {
            let bound = |name: &str| schema[name].as_f64();
            if bound("minimum").is_some_and(|least| number < least)
                || bound("maximum").is_some_and(|most| number > most)
                || bound("exclusiveMinimum").is_some_and(|least| number <= least)
                || bound("exclusiveMaximum").is_some_and(|most| number >= most)
                || bound("multipleOf").is_some_and(|step| number % step != 0.0)
            {
                return wrong("is out of the bounds of");
            }
        }
        Ok(())
    }

    #[test]
    fn every_keyword_is_honoured() {
        let schema = json!({
            "type": "object",
            "additionalProperties": false,
            "required": ["title", "claims", "level", "tree", "either", "maybe", "count", "ratio", "both", "tags"],
            "properties": {
                "title": {"type": "string", "minLength": 5, "maxLength": 12},
                "claims": {"type": "array", "minItems": 2, "items": {"$ref": "#/$defs/claim"}},
                "level": {"enum": ["low", "high"]},
                "tree": {"$ref": "#/$defs/tree"},
                "either": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 10, "maximum": 12}]},
                "maybe": {"type": ["string", "null"]},
                "count": {"type": "integer", "exclusiveMinimum": 4, "multipleOf": 5, "maximum": 100},
                "ratio": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                "both": {"allOf": [
                    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
                    {"type": "object", "properties": {"b": {"const": 3}}, "required": ["b"]},
                ]},
                "tags": {"type": "array", "uniqueItems": true, "maxItems": 2, "items": {"type": "string"}},
            },
            "$defs": {
                "claim": {"type": "object", "required": ["text", "citations"], "additionalProperties": false,
                    "properties": {"text": {"type": "string"}, "citations": {"type": "array", "items": {"type": "integer"}}}},
                "tree": {"type": "object", "required": ["name", "children"], "properties": {
                    "name": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
            },
        });
        for list_len in 0..4 {
            let value = instance(&schema, &prompt(), list_len, false);
            assert_eq!(fits(&schema, &schema, &value), Ok(()), "{value}");
        }
    }

    #[test]
    fn claims_cite_the_passage_they_are_made_of() {
        let schema = json!({"type": "array", "items": {"type": "object", "properties": {
            "text": {"type": "string"}, "citations": {"type": "array", "items": {"type": "integer"}}}}});
        let value = instance(&schema, &prompt(), 2, false);
        assert_eq!(value[0]["citations"], json!([4]));
        assert!(
            value[0]["text"].as_str().is_some_and(|text| text.contains("keeps every message")),
            "{value}"
        );
        assert_eq!(value[1]["citations"], json!([7]));
        assert_eq!(instance(&schema, &prompt(), 1, true)[0]["citations"], json!([9001, 9002]));
        assert_eq!(instance(&schema, &Prompt::default(), 1, false)[0]["citations"], json!([]));
    }

    #[test]
    fn an_earlier_answer_is_mended_from_what_the_prompt_shows() {
        let schema = json!({"type": "object", "properties": {
            "title": {"type": "string"}, "changes": {"type": "array"}, "risks": {"type": "array"},
            "requirements": {"type": "object", "properties": {"functional": {"type": "array"}}}}});
        let meant = json!({
            "title": "T", "changes": ["c"], "risks": [{"risk": "r", "citations": [4, 7, 9]}],
            "requirements": {"functional": ["f"]}});
        let mended = |shown: &[&str]| {
            let earlier = "<<<data-1 earlier answer\n{\"title\": \"Old\", \"context\": [{\"citations\": [7]}]}\ndata-1>>>";
            let text = format!("{}\n{earlier}", shown.join("\n"));
            let prompt = Prompt::read(&[json!({"role": "user", "content": text})]);
            as_far_as_shown(&schema, &prompt, meant.clone())
        };
        let request = "<<<data-1 request\nDesign it\ndata-1>>>\n<<<data-1 [4] a.md:1-2\nx\ndata-1>>>";
        let parent = "<<<data-1 earlier document\n# Old\ndata-1>>>";
        let nothing = json!({"title": "T", "changes": [], "risks": [], "requirements": {"functional": []}});
        assert_eq!(mended(&[]), nothing, "only what the earlier answer shows");
        let from_request = mended(&[request]);
        assert_eq!(from_request["changes"], json!([]));
        assert_eq!(from_request["risks"][0]["citations"], json!([4, 7]), "9 is shown nowhere");
        assert_eq!(mended(&[request, parent])["changes"], json!(["c"]));
    }

    #[test]
    fn a_script_cites_by_place() {
        let script = json!({"decisions": [{"text": "x", "citations": ["docs/b.md: pull", "docs/c.md", "docs/b.md", 4]}]});
        assert_eq!(cited(&script, &prompt()), json!({"decisions": [{"text": "x", "citations": [7, 4]}]}));
    }

    #[test]
    fn the_chosen_option_is_one_that_was_named() {
        let schema = json!({"type": "object", "properties": {
            "title": {"type": "string"},
            "options": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
            "outcome": {"type": "object", "properties": {"chosen": {"type": "string"}}}}});
        let value = instance(&schema, &prompt(), 3, false);
        let names: Vec<&Value> =
            value["options"].as_array().into_iter().flatten().map(|o| &o["name"]).collect();
        assert!(names.contains(&&value["outcome"]["chosen"]), "{value}");
    }

    proptest! {
        #[test]
        fn bounded_numbers_stay_in_bounds(least in -50_i64..50, width in 0_i64..50, step in 1_i64..4) {
            // A multiple must exist within the bounds.
            let width = width.max(step);
            let schema = json!({"type": "integer", "minimum": least, "maximum": least + width, "multipleOf": step});
            let value = instance(&schema, &Prompt::default(), 1, false);
            prop_assert_eq!(fits(&schema, &schema, &value), Ok(()));
        }
    }
}
