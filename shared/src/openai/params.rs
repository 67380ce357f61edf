//! What each family of models accepts: the one table, and the request made by it.

use async_openai::types::chat::{
    ChatCompletionMessageToolCall, ChatCompletionMessageToolCalls, ChatCompletionRequestAssistantMessage,
    ChatCompletionRequestMessage, ChatCompletionRequestSystemMessage, ChatCompletionRequestToolMessage,
    ChatCompletionRequestUserMessage, ChatCompletionTool, ChatCompletionTools, CreateChatCompletionRequest,
    FunctionCall, FunctionObject, ResponseFormat as ApiResponseFormat, ResponseFormatJsonSchema,
};
use url::Url;

use crate::{
    config::ResponseFormatSetting,
    model::{ChatMessage, ChatRequest, ResponseFormat, ToolCall},
};

/// How sure the wording is meant to be, where a model takes a temperature.
const TEMPERATURE: f32 = 0.2;

/// What a family of models accepts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Params {
    /// `max_completion_tokens`; otherwise the older `max_tokens`, which most other servers know.
    pub(super) max_completion_tokens: bool,
    /// Reasoning models refuse it.
    pub(super) temperature: bool,
    /// Takes messages of the role `system`; the first reasoning models refuse them.
    pub(super) system: bool,
    /// The best response format it can do.
    pub(super) format: ResponseFormatSetting,
}

const CHAT: Params = Params {
    max_completion_tokens: true,
    temperature: true,
    system: true,
    format: ResponseFormatSetting::JsonSchema,
};
const REASONING: Params = Params { temperature: false, ..CHAT };

/// By prefix of the model's name, the longest first. Source: OpenAI's model pages.
const FAMILIES: &[(&str, Params)] = &[
    ("o1-mini", Params { system: false, format: ResponseFormatSetting::Text, ..REASONING }),
    ("o1-preview", Params { system: false, format: ResponseFormatSetting::Text, ..REASONING }),
    ("o1", REASONING),
    ("o3", REASONING),
    ("o4", REASONING),
    ("gpt-5-chat", CHAT),
    ("gpt-5", REASONING),
    ("gpt-4.1", CHAT),
    ("gpt-4.5", CHAT),
    ("gpt-4o-2024-05-13", Params { format: ResponseFormatSetting::JsonObject, ..CHAT }),
    ("gpt-4o", CHAT),
    ("chatgpt-4o", Params { format: ResponseFormatSetting::Text, ..CHAT }),
    ("gpt-4-turbo", Params { format: ResponseFormatSetting::JsonObject, ..CHAT }),
    ("gpt-4", Params { format: ResponseFormatSetting::Text, ..CHAT }),
    ("gpt-3.5-turbo", Params { format: ResponseFormatSetting::JsonObject, ..CHAT }),
];

/// What `model` accepts at `base_url`.
pub(super) fn params(model: &str, base_url: &Url) -> Params {
    // Routers put the vendor in front (`openai/gpt-4.1`), fine-tuned models `ft:`.
    let name = model.rsplit('/').next().unwrap_or(model);
    let name = name.strip_prefix("ft:").unwrap_or(name).to_ascii_lowercase();
    let is = |prefix: &str| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.', ':', '@']))
    };
    match FAMILIES.iter().find(|(prefix, _)| is(prefix)) {
        Some((_, params)) => *params,
        // A new model of OpenAI: assume what their newest accept.
        None if super::is_openai(base_url) => REASONING,
        None => Params { max_completion_tokens: false, ..CHAT },
    }
}

/// The best format not above `wanted` (`OPENAI_RESPONSE_FORMAT`) that `model` can do. Whoever writes
/// the prompt asks this, because a schema that the API does not enforce must be in the prompt.
pub fn best_response_format(
    model: &str,
    base_url: &Url,
    wanted: ResponseFormatSetting,
) -> ResponseFormatSetting {
    use ResponseFormatSetting::{JsonObject, JsonSchema, Text};
    match (wanted, params(model, base_url).format) {
        (Text, _) | (_, Text) => Text,
        (JsonObject, _) | (_, JsonObject) => JsonObject,
        (JsonSchema, JsonSchema) => JsonSchema,
    }
}

/// The body of the call.
pub(super) fn request_body(request: &ChatRequest, base_url: &Url) -> CreateChatCompletionRequest {
    let params = params(&request.model, base_url);
    let system = |content: &str| if params.system { system(content) } else { user(content) };
    let mut messages: Vec<ChatCompletionRequestMessage> = request
        .messages
        .iter()
        .map(|it| match it {
            ChatMessage::System { content } => system(content),
            it => message(it),
        })
        .collect();
    let response_format = match (&request.response_format, params.format) {
        (ResponseFormat::Text, _) | (ResponseFormat::JsonObject, ResponseFormatSetting::Text) => None,
        (ResponseFormat::JsonObject, _) => Some(ApiResponseFormat::JsonObject),
        (ResponseFormat::JsonSchema { name, schema }, ResponseFormatSetting::JsonSchema) => {
            Some(ApiResponseFormat::JsonSchema {
                json_schema: ResponseFormatJsonSchema {
                    name: name.clone(),
                    description: None,
                    schema: schema.value().clone(),
                    strict: Some(true),
                },
            })
        }
        // The model cannot enforce a schema: say it in words, or it would be lost.
        (ResponseFormat::JsonSchema { schema, .. }, format) => {
            messages.push(system(&format!(
                "Answer with one JSON object that fits this JSON schema:\n{}",
                schema.text()
            )));
            (format == ResponseFormatSetting::JsonObject).then_some(ApiResponseFormat::JsonObject)
        }
    };
    let tools: Vec<ChatCompletionTools> = request
        .tools
        .iter()
        .map(|tool| {
            ChatCompletionTools::Function(ChatCompletionTool {
                function: FunctionObject {
                    name: tool.name.clone(),
                    description: Some(tool.description.clone()),
                    parameters: Some(tool.parameters.clone()),
                    strict: None,
                },
            })
        })
        .collect();
    let mut body = CreateChatCompletionRequest {
        model: request.model.clone(),
        messages,
        response_format,
        temperature: params.temperature.then_some(TEMPERATURE),
        tools: (!tools.is_empty()).then_some(tools),
        ..Default::default()
    };
    if params.max_completion_tokens {
        body.max_completion_tokens = Some(request.max_completion_tokens);
    } else {
        #[expect(deprecated, reason = "the only cap that most other servers know")]
        {
            body.max_tokens = Some(request.max_completion_tokens);
        }
    }
    body
}

fn system(content: &str) -> ChatCompletionRequestMessage {
    ChatCompletionRequestMessage::System(ChatCompletionRequestSystemMessage::from(content))
}

fn user(content: &str) -> ChatCompletionRequestMessage {
    ChatCompletionRequestMessage::User(ChatCompletionRequestUserMessage::from(content))
}

fn message(message: &ChatMessage) -> ChatCompletionRequestMessage {
    match message {
        ChatMessage::System { content } => system(content),
        ChatMessage::User { content } => user(content),
        ChatMessage::Assistant { content, tool_calls } => {
            let calls: Vec<ChatCompletionMessageToolCalls> = tool_calls
                .iter()
                .map(|ToolCall { id, name, arguments }| {
                    ChatCompletionMessageToolCalls::Function(ChatCompletionMessageToolCall {
                        id: id.clone(),
                        function: FunctionCall { name: name.clone(), arguments: arguments.clone() },
                    })
                })
                .collect();
            ChatCompletionRequestMessage::Assistant(ChatCompletionRequestAssistantMessage {
                content: content.clone().map(Into::into),
                tool_calls: (!calls.is_empty()).then_some(calls),
                ..Default::default()
            })
        }
        ChatMessage::Tool { tool_call_id, content } => {
            ChatCompletionRequestMessage::Tool(ChatCompletionRequestToolMessage {
                content: content.clone().into(),
                tool_call_id: tool_call_id.clone(),
            })
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::ToolSpec;

    fn openai() -> Url {
        Url::parse("https://api.openai.com/v1").unwrap()
    }

    fn local() -> Url {
        Url::parse("http://localhost:8080/v1").unwrap()
    }

    fn request(model: &str, response_format: ResponseFormat) -> ChatRequest {
        ChatRequest {
            model: model.to_owned(),
            messages: vec![
                ChatMessage::System { content: "rules".to_owned() },
                ChatMessage::User { content: "design".to_owned() },
                ChatMessage::Assistant {
                    content: None,
                    tool_calls: vec![ToolCall {
                        id: "c1".to_owned(),
                        name: "search_knowledge".to_owned(),
                        arguments: "{}".to_owned(),
                    }],
                },
                ChatMessage::Tool { tool_call_id: "c1".to_owned(), content: "found".to_owned() },
            ],
            max_completion_tokens: 100,
            response_format,
            tools: vec![ToolSpec {
                name: "search_knowledge".to_owned(),
                description: "Finds passages.".to_owned(),
                parameters: json!({"type": "object"}),
            }],
            request_id: "t.1.draft".to_owned(),
        }
    }

    fn schema() -> ResponseFormat {
        ResponseFormat::JsonSchema { name: "spec".to_owned(), schema: json!({"type": "object"}).into() }
    }

    #[test]
    fn the_request_on_the_wire() {
        let body = request_body(&request("gpt-4.1", schema()), &openai());
        insta::assert_snapshot!(serde_json::to_string_pretty(&body).unwrap());
    }

    #[test]
    fn reasoning_models_get_no_temperature() {
        for model in ["o1", "o3-mini", "o4-mini-2025-04-16", "gpt-5", "gpt-5-nano", "gpt-5.2", "openai/gpt-5"]
        {
            let body = serde_json::to_value(request_body(&request(model, schema()), &openai())).unwrap();
            assert_eq!(body.get("temperature"), None, "{model}");
            assert_eq!(body["max_completion_tokens"], 100, "{model}");
        }
    }

    #[test]
    fn models_that_refuse_the_role_system_get_the_rules_from_the_user() {
        for (model, role) in [("o1-mini", "user"), ("O1-Preview-2024-09-12", "user"), ("o1", "system")] {
            let body = serde_json::to_value(request_body(&request(model, schema()), &openai())).unwrap();
            assert_eq!(body["messages"][0]["role"], role, "{model}");
            assert_eq!(body["messages"][0]["content"], "rules", "{model}");
            let others = body["messages"].as_array().unwrap().iter().skip(1);
            assert_eq!(others.filter(|it| it["role"] == "system").count(), 0, "{model}");
        }
    }

    #[test]
    fn an_unknown_model_gets_the_cap_its_server_knows() {
        let ours = serde_json::to_value(request_body(&request("gpt-9", schema()), &openai())).unwrap();
        assert_eq!((ours["max_completion_tokens"].as_u64(), ours.get("max_tokens")), (Some(100), None));
        let theirs = serde_json::to_value(request_body(&request("llama-3", schema()), &local())).unwrap();
        assert_eq!((theirs["max_tokens"].as_u64(), theirs.get("max_completion_tokens")), (Some(100), None));
    }

    #[test]
    fn a_schema_that_the_model_cannot_enforce_goes_into_the_prompt() {
        let body = serde_json::to_value(request_body(&request("gpt-4-turbo", schema()), &openai())).unwrap();
        assert_eq!(body["response_format"], json!({"type": "json_object"}));
        let last = body["messages"].as_array().unwrap().last().unwrap();
        assert!(last["content"].as_str().unwrap().contains(r#"{"type":"object"}"#));
        let body = serde_json::to_value(request_body(&request("gpt-4", schema()), &openai())).unwrap();
        assert_eq!(body.get("response_format"), None);
    }

    #[test]
    fn the_best_format_is_never_above_what_was_asked_for() {
        use ResponseFormatSetting::{JsonObject, JsonSchema, Text};
        assert_eq!(best_response_format("gpt-4.1", &openai(), JsonSchema), JsonSchema);
        assert_eq!(best_response_format("gpt-4.1", &openai(), JsonObject), JsonObject);
        assert_eq!(best_response_format("gpt-3.5-turbo", &openai(), JsonSchema), JsonObject);
        assert_eq!(best_response_format("gpt-4", &openai(), JsonObject), Text);
        assert_eq!(best_response_format("llama-3", &local(), JsonSchema), JsonSchema);
    }

    #[test]
    fn a_prefix_is_a_family_only_at_a_boundary() {
        assert_eq!(params("o1000", &local()), params("llama", &local()));
        assert_eq!(params("gpt-4.1-mini", &local()), CHAT);
        assert_eq!(params("ft:gpt-4.1-mini:acme::abc", &local()), CHAT);
    }
}
