//! The state machine of one document: see the module above for how to drive it.

use std::collections::{BTreeMap, HashSet};

use atlas_shared::{
    Config, Tokens,
    config::{ResponseFormatSetting, SourceUrls},
    gateway_api::Passage,
    ledger::Usage,
    message::Task,
    model::{ChatAnswer, ChatMessage, ChatRequest, FinishReason, ResponseFormat, ToolCall, ToolSpec},
};
use jiff::civil::Date;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    admit::{Admitted, admit},
    clean, compare,
    finish::{self, Finished, Note},
    passages::Shelf,
    prompt,
    read::{self, Reading},
    schema,
    spec::{Field, Kind, Spec},
};

/// The tool's name.
const SEARCH_TOOL: &str = "search_knowledge";
/// Longest query that goes to the gateway.
const MAX_QUERY_CHARS: usize = 400;
/// A long request or parent is cut to this many characters before the first call, and further by
/// [`Draft::squeeze`] where the budget demands it.
const MAX_SUBJECT_CHARS: usize = 60_000;
/// Below this a cut request or parent says nothing.
const MIN_SUBJECT_CHARS: usize = 600;
/// A draft with fewer passages than this gives completion tokens away before it drops more.
const PASSAGES_WORTH_KEEPING: usize = 6;
/// What another round costs besides its prompt: the tool call that asks for it, with room.
const TOOL_CALL_TOKENS: u64 = 300;
/// Tool calls of one answer that are looked at.
const MAX_TOOL_CALLS: usize = 8;
/// An earlier answer is shown to the model for mending up to this length.
const MAX_MEND_CHARS: usize = 24_000;

/// What a document is written from.
#[derive(Clone, Debug)]
pub struct DraftInput {
    /// The request.
    pub task: Task,
    /// Passages found for it, best first.
    pub passages: Vec<Passage>,
    /// The answer that `metadata.parent_id` names (`architect_out.data`).
    pub parent: Option<Value>,
    /// Limits and dialect.
    pub options: AgentOptions,
    /// The day in UTC, for a record; `None`: it gets no date.
    pub date: Option<Date>,
    /// Why the passages are fewer or worse than they should be, in a sentence, if they are.
    pub degraded: Option<String>,
}

/// Limits and dialect of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentOptions {
    /// `OPENAI_RESPONSE_FORMAT`.
    pub response_format: ResponseFormatSetting,
    /// `AGENT_MAX_SEARCHES`.
    pub max_searches: u32,
    /// `OPENAI_MAX_COMPLETION_TOKENS`.
    pub max_completion_tokens: u32,
    /// `OPENAI_MIN_COMPLETION_TOKENS`.
    pub min_completion_tokens: u32,
    /// `SOURCE_URL_TEMPLATE`.
    #[serde(default)]
    pub source_urls: SourceUrls,
}

impl AgentOptions {
    /// The options that the configuration asks for; the defaults of a model where none is configured.
    pub fn from_config(config: &Config) -> Self {
        let openai = config.openai.as_ref();
        Self {
            response_format: openai
                .map_or(ResponseFormatSetting::JsonSchema, |openai| openai.response_format),
            max_searches: config.worker.max_searches,
            max_completion_tokens: openai.map_or(4000, |openai| openai.max_completion_tokens),
            min_completion_tokens: openai.map_or(800, |openai| openai.min_completion_tokens),
            source_urls: config.worker.source_urls.clone(),
        }
    }
}

/// What a [`Draft`] needs now.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Call the model, then [`Draft::answered`] (or [`Draft::cannot_call`]).
    Call(Box<Call>),
    /// Ask the gateway, then [`Draft::found`] (or [`Draft::search_failed`]).
    Search(Search),
    /// The document is written.
    Finished(Box<Finished>),
    /// No document will come.
    Failed(Failure),
}

/// A model call that is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Step name: `draft.0`, `repair.0`, ….
    pub step: String,
    /// The request; `model` and `request_id` are empty, for the caller to fill.
    pub request: ChatRequest,
}

/// A request that fits into what may be spent.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// As in [`Call::request`].
    pub request: ChatRequest,
    /// What its prompt was counted as, at most.
    pub prompt: Tokens,
}

/// A search that the model asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Search {
    /// Step name: `search.1`, ….
    pub step: String,
    /// The model's words, cleaned and bounded.
    pub query: String,
    /// Which tool call this answers.
    tool_call_id: String,
}

/// Why there is no document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A stable code in snake case: `error_code`.
    pub code: String,
    /// What happened and what to do: `error_message`.
    pub message: String,
}

/// Not even the shortest prompt fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the shortest prompt and answer need {needed} tokens, {available} are left in the run's budget")]
pub struct DoesNotFit {
    /// The least that would do.
    pub needed: Tokens,
    /// What was there.
    pub available: Tokens,
}

/// A document in the making. Serialisable in every state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Draft {
    kind: Kind,
    #[serde(default)]
    date: Option<Date>,
    options: AgentOptions,
    pub(super) subject: Subject,
    /// What the parent consists of, for a refinement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<Box<Spec>>,
    pub(super) shelf: Shelf,
    degraded: Option<String>,
    /// The rounds in which the model asked for searches.
    rounds: Vec<Round>,
    /// Searches made.
    searches: u32,
    /// False once no more searches may be asked for.
    may_search: bool,
    /// The completion cap in force.
    completion_cap: u32,
    /// Why a repair round was spent, if one was.
    repaired: Option<String>,
    /// What the calls so far billed, and for what.
    #[serde(default)]
    token_use: TokenUse,
    /// Who would not write it, or could not.
    #[serde(default)]
    refusals: Vec<Refusal>,
    /// True when the last call that could have asked for a search was not offered one, for want of tokens.
    #[serde(default)]
    search_left_out: bool,
    /// The best document so far, from an answer that had faults.
    fallback: Option<Reading>,
    stage: Stage,
}

/// A model that would not write the document, or whose answers were of no use, twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Refusal {
    model: String,
    why: String,
    /// The error code of a document that nobody writes after it; empty in a checkpoint of an earlier
    /// version.
    #[serde(default)]
    code: String,
}

/// Codes of answers that are of no use: another model may do better.
const OF_NO_USE: &[&str] = &["empty_answer", "invalid_answer", "answer_too_long"];

/// What a prompt is made of, in bytes.
#[derive(Clone, Debug)]
pub struct PromptParts(Vec<(&'static str, u64)>);

/// Where a document's tokens went: `metadata.token_use`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct TokenUse {
    /// Every call that was answered, in order.
    pub(super) calls: Vec<CallUse>,
    /// Prompt tokens by what they were spent on, all calls together. The API bills a prompt as one
    /// number; it is divided in proportion to bytes.
    pub(super) prompt: BTreeMap<String, u64>,
}

/// What one call billed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct CallUse {
    /// Step name.
    pub(super) step: String,
    /// The model that answered.
    pub(super) model: String,
    /// What it billed; nothing where that is `assumed`.
    #[serde(flatten)]
    pub(super) usage: Usage,
    /// The server did not say.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) assumed: bool,
    /// What was booked for an `assumed` one: a bound for prompt and completion together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tokens: Option<Tokens>,
}

impl TokenUse {
    fn add(&mut self, call: CallUse, parts: &[(&'static str, u64)]) {
        // Nothing where the usage is assumed: a bound has no parts.
        let all: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
        let prompt = call.usage.prompt.0;
        let mut left = prompt;
        for (name, bytes) in parts {
            let share = u64::try_from(u128::from(prompt) * u128::from(*bytes) / u128::from(all.max(1)))
                .unwrap_or(u64::MAX);
            if share > 0 {
                *self.prompt.entry((*name).to_owned()).or_default() += share;
                left = left.saturating_sub(share);
            }
        }
        // So that the parts add up to what was billed.
        if left > 0 {
            *self.prompt.entry("framing".to_owned()).or_default() += left;
        }
        self.calls.push(call);
    }
}

/// What the document is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Subject {
    /// The request, cleaned.
    pub(super) request: String,
    /// The parent spec, cleaned, without its citations.
    pub(super) parent: Option<String>,
    /// How many characters of each the prompt may show.
    pub(super) max_chars: usize,
    /// The code that fences data in this task's prompts. It occurs in none of the data.
    pub(super) fence: String,
}

/// One answer with tool calls, and what they gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Round {
    /// The calls as the model made them, arguments bounded.
    pub(super) calls: Vec<ToolCall>,
    /// One a call, in order.
    pub(super) results: Vec<ToolResult>,
}

/// What a tool call gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ToolResult {
    pub(super) tool_call_id: String,
    /// Numbers of the passages found, new and known ones.
    pub(super) numbers: Vec<u32>,
    /// The shelf's addition that this result brought; 0: none.
    pub(super) addition: u32,
    /// Said instead of passages, or besides them.
    pub(super) remark: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    /// The model writes, from the full prompt.
    Drafting {
        /// Set in the one repair round that starts over.
        again: Option<prompt::Again>,
    },
    /// Searches wait.
    Searching { pending: Vec<Search> },
    /// The model mends some fields of its answer, shown to it with its faults.
    Mending {
        fields: Vec<Field>,
        faults: Vec<String>,
        shown: String,
        /// True when something has to be written that is not there: then the prompt is the one that the
        /// answer was for, and goes on from there.
        #[serde(default)]
        anew: bool,
    },
    /// Written.
    Finished { spec: Box<Spec>, notes: Vec<Note> },
    /// Given up.
    Failed(Failure),
}

impl Draft {
    /// Starts a document, or fails at once where the request is not [admitted](admit).
    pub fn new(input: DraftInput) -> Self {
        match admit(&input.task, input.parent.as_ref()) {
            Ok(admitted) => Self::admitted(input, admitted),
            Err(failure) => {
                let none = Admitted { kind: Kind::Spec, parent: None };
                Self { stage: Stage::Failed(failure), ..Self::admitted(input, none) }
            }
        }
    }

    /// Starts the document of a request that was admitted.
    pub fn admitted(input: DraftInput, admitted: Admitted) -> Self {
        let DraftInput { task, passages, parent, options, date, degraded } = input;
        let Admitted { kind, parent: text } = admitted;
        let request = clean::text(&task.content);
        let fence = prompt::fence(&task, &passages);
        let structure = parent.as_ref().filter(|_| kind == Kind::Refine).and_then(compare::structure);
        let mut shelf = Shelf::new(&request);
        shelf.add(passages);
        Self {
            kind,
            date,
            subject: Subject { request, parent: text, max_chars: MAX_SUBJECT_CHARS, fence },
            parent: structure,
            shelf,
            degraded: degraded.map(|why| clean::line(&why)),
            rounds: Vec::new(),
            searches: 0,
            may_search: options.max_searches > 0,
            completion_cap: options.max_completion_tokens,
            options,
            repaired: None,
            token_use: TokenUse::default(),
            refusals: Vec::new(),
            search_left_out: false,
            fallback: None,
            stage: Stage::Drafting { again: None },
        }
    }

    /// What kind of document this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Searches that the model asked for and that were made.
    pub fn searches(&self) -> u32 {
        self.searches
    }

    /// About how much of the work is done, 0 to 100.
    pub fn percent(&self) -> u32 {
        match &self.stage {
            Stage::Drafting { again: None } | Stage::Searching { .. } => {
                let rounds = u32::try_from(self.rounds.len()).unwrap_or(u32::MAX);
                20 + 50 * rounds.min(self.options.max_searches) / (self.options.max_searches + 1)
            }
            Stage::Drafting { again: Some(_) } | Stage::Mending { .. } => 75,
            Stage::Finished { .. } | Stage::Failed(_) => 100,
        }
    }

    /// Of the one repair round, if the pending call is it: why it is made, in a word, and what it is for, for
    /// whoever watches.
    pub fn repair_round(&self) -> Option<(&'static str, &'static str)> {
        match &self.stage {
            Stage::Drafting { again } => again.map(|why| (why.as_str(), why.told())),
            Stage::Mending { .. } => Some(("faults", "The answer has faults: asking for them to be mended.")),
            Stage::Searching { .. } | Stage::Finished { .. } | Stage::Failed(_) => None,
        }
    }

    /// What the calls that were answered billed, and for what: `metadata.token_use`.
    pub fn token_use(&self) -> Value {
        json!(self.token_use)
    }

    /// Notes what the pending call billed, whose request was made of these [parts](Self::prompt_parts);
    /// call it before [`answered`](Self::answered). `assumed`: the server did not say, and this is the
    /// bound that was booked.
    pub fn billed(&mut self, parts: &PromptParts, model: &str, usage: Usage, assumed: bool) {
        let step = self.step();
        let (usage, tokens) = if assumed { (Usage::default(), Some(usage.total())) } else { (usage, None) };
        self.token_use.add(CallUse { step, model: model.to_owned(), usage, assumed, tokens }, &parts.0);
    }

    /// What the prompt of `request` is made of, in bytes.
    pub fn prompt_parts(&self, request: &ChatRequest) -> PromptParts {
        let bytes = |text: &str| text.len() as u64;
        let cut = |text: &str| bytes(text).min(self.subject.max_chars as u64);
        let schema = match &request.response_format {
            ResponseFormat::JsonSchema { schema, .. } => bytes(schema.text()),
            ResponseFormat::Text | ResponseFormat::JsonObject => 0,
        };
        let tools = request.tools.iter().map(|tool| bytes(&tool.parameters.to_string())).sum::<u64>();
        let mut parts = vec![("schema", schema + tools)];
        let mut said: u64 = 0;
        for message in &request.messages {
            match message {
                ChatMessage::System { content } => parts.push(("rules", bytes(content))),
                ChatMessage::User { content } | ChatMessage::Tool { content, .. } => said += bytes(content),
                ChatMessage::Assistant { tool_calls, .. } => {
                    said += tool_calls.iter().map(|call| bytes(&call.arguments)).sum::<u64>();
                }
            }
        }
        let mut own = Vec::new();
        if let Stage::Mending { shown, anew, .. } = &self.stage {
            own.push(("earlier_answer", if *anew { cut(shown) } else { bytes(shown) }));
        }
        if self.shows_passages() {
            own.extend([
                ("request", cut(&self.subject.request)),
                ("parent", self.subject.parent.as_deref().map_or(0, cut)),
                ("passages", self.shelf.packed_bytes()),
            ]);
        }
        // What is between and around them: headings, fences, the order to write.
        let framing = said.saturating_sub(own.iter().map(|(_, bytes)| bytes).sum());
        parts.extend(own);
        parts.push(("framing", framing));
        PromptParts(parts)
    }

    /// Everything, as JSON, for `run_steps.output`.
    pub fn checkpoint(&self) -> String {
        // Plain data without maps of odd keys: this cannot fail, and `restore` refuses null.
        serde_json::to_string(self).unwrap_or_else(|_| "null".to_owned())
    }

    /// Goes on from a [`checkpoint`](Self::checkpoint). An error means that another version wrote it
    /// in a shape this one does not read: start afresh.
    pub fn restore(checkpoint: &str) -> Result<Self, serde_json::Error> {
        // By way of a value, which keeps numbers as they are written: read at once, a fraction can come
        // back one bit off.
        serde_json::from_value(serde_json::from_str(checkpoint)?)
    }

    /// What is needed now.
    pub fn next(&self) -> Next {
        match &self.stage {
            Stage::Drafting { .. } | Stage::Mending { .. } => match self.request() {
                Ok(request) => Next::Call(Box::new(Call { step: self.step(), request })),
                Err(error) => Next::Failed(Failure {
                    code: "prompt_template".to_owned(),
                    message: format!("A prompt template of this build does not render: {error}."),
                }),
            },
            Stage::Searching { pending } => match pending.first() {
                Some(search) => Next::Search(search.clone()),
                // Not reachable: the last outcome moves to the next stage.
                None => Next::Failed(Failure {
                    code: "internal".to_owned(),
                    message: "A search round without searches.".to_owned(),
                }),
            },
            Stage::Finished { spec, notes } => Next::Finished(Box::new(finish::finish(finish::Draft {
                kind: self.kind,
                date: self.date,
                spec: (**spec).clone(),
                request: &self.subject.request,
                shelf: &self.shelf,
                notes: notes.clone(),
                degraded: self.degraded.as_deref(),
                searches: self.searches,
                repaired: self.repaired.as_deref(),
                search_left_out: self.search_left_out,
                token_use: &self.token_use,
                source_urls: &self.options.source_urls,
            }))),
            Stage::Failed(failure) => Next::Failed(failure.clone()),
        }
    }

    /// The step name of the model call that is needed now; `None`: none is. As [`next`](Self::next) says
    /// it, without making the request.
    pub fn pending_call(&self) -> Option<String> {
        matches!(self.stage, Stage::Drafting { .. } | Stage::Mending { .. }).then(|| self.step())
    }

    fn step(&self) -> String {
        let step = match self.stage {
            Stage::Drafting { again: None } => format!("draft.{}", self.rounds.len()),
            _ => "repair.0".to_owned(),
        };
        // Each answer is a step of its own, so that none is paid twice.
        match self.refusals.len() {
            0 => step,
            refused => format!("{step}.other.{refused}"),
        }
    }

    /// Models that refused, or were of no use, and are not to be asked again.
    pub fn refused_by(&self) -> Vec<String> {
        self.refusals.iter().map(|refusal| refusal.model.clone()).collect()
    }

    /// Why, one a model: for `metadata.fallbacks`.
    pub fn refusals(&self) -> impl Iterator<Item = String> {
        self.refusals.iter().map(|Refusal { model, why, .. }| format!("{model}: {why}"))
    }

    /// Takes the answer of `model` if it is a refusal: the pending call is then to be made with another
    /// one. False: it is none; give it to [`answered`](Self::answered).
    pub fn refused(&mut self, model: &str, answer: &ChatAnswer) -> bool {
        let Some(Failure { code, message }) = refused(answer) else { return false };
        self.refusals.push(Refusal { model: model.to_owned(), why: message, code });
        true
    }

    /// As [`answered`](Self::answered), where another model may be asked after this one. True: the answers of
    /// `model` are of no use, and the pending call is to be made with another one, which starts afresh.
    pub fn answered_by(&mut self, model: &str, answer: &ChatAnswer) -> bool {
        if self.pending_call().is_none() {
            return false;
        }
        self.take(answer);
        match &self.stage {
            Stage::Failed(Failure { code, message }) if OF_NO_USE.contains(&code.as_str()) => {
                let (why, code) = (message.clone(), code.clone());
                self.refusals.push(Refusal { model: model.to_owned(), why, code });
                self.repaired = None;
                self.stage = Stage::Drafting { again: None };
                true
            }
            _ => {
                self.explain();
                false
            }
        }
    }

    /// True while the model is offered the search tool in the next call.
    fn offers_search(&self) -> bool {
        self.may_search
            && self.searches < self.options.max_searches
            && matches!(self.stage, Stage::Drafting { again: None })
    }

    /// True where the prompt of the pending call holds the request and the passages.
    fn shows_passages(&self) -> bool {
        !matches!(self.stage, Stage::Mending { anew: false, .. })
    }

    fn request(&self) -> Result<ChatRequest, minijinja::Error> {
        let in_prompt = self.options.response_format != ResponseFormatSetting::JsonSchema;
        let schema = match &self.stage {
            Stage::Mending { fields, .. } => schema::made(fields),
            _ => schema::of_kind(self.kind),
        };
        // What goes on from the first call begins as that did, so that a prompt cache knows it.
        let spelt = if self.shows_passages() { schema::of_kind(self.kind) } else { schema.clone() };
        let mut messages = vec![ChatMessage::System {
            content: prompt::system(self.kind, in_prompt.then_some(spelt.text()))?,
        }];
        let words = self.completion_cap / 2;
        match &self.stage {
            Stage::Mending { fields, faults, shown, anew: false } => messages.push(ChatMessage::User {
                content: prompt::mend(&self.subject, fields, faults, shown, false)?,
            }),
            stage => {
                messages
                    .push(ChatMessage::User { content: prompt::request(&self.subject, &self.shelf, words)? });
                for round in &self.rounds {
                    messages.push(ChatMessage::Assistant { content: None, tool_calls: round.calls.clone() });
                    for result in &round.results {
                        messages.push(ChatMessage::Tool {
                            tool_call_id: result.tool_call_id.clone(),
                            content: prompt::found(&self.subject, &self.shelf, result)?,
                        });
                    }
                }
                match stage {
                    Stage::Drafting { again: Some(again) } => {
                        messages.push(ChatMessage::User { content: prompt::again(*again, words)? });
                    }
                    Stage::Mending { fields, faults, shown, .. } => {
                        let shown = clean::cut(shown, self.subject.max_chars);
                        let content = prompt::mend(&self.subject, fields, faults, &shown, true)?;
                        messages.push(ChatMessage::User { content });
                    }
                    _ => {}
                }
            }
        }
        let response_format = match self.options.response_format {
            ResponseFormatSetting::JsonSchema => {
                ResponseFormat::JsonSchema { name: schema::NAME.to_owned(), schema }
            }
            ResponseFormatSetting::JsonObject => ResponseFormat::JsonObject,
            ResponseFormatSetting::Text => ResponseFormat::Text,
        };
        let tools = if self.offers_search() { vec![search_tool()] } else { Vec::new() };
        Ok(ChatRequest {
            model: String::new(),
            messages,
            max_completion_tokens: self.completion_cap,
            response_format,
            tools,
            request_id: String::new(),
        })
    }

    /// Makes the next call fit into `available` tokens, prompt and completion together, and gives it:
    /// first the least useful passages go, then the completion cap sinks to `min_completion_tokens`, then
    /// the request and the parent are cut. Also decides whether a search can be afforded. `None`: no call
    /// is wanted, or no prompt renders; [`next`](Self::next) says what then.
    ///
    /// `count` gives the upper bound of a request's prompt tokens; its `model` is empty.
    /// A smaller prompt than the one that fits is never made, so calling this again with more
    /// brings passages back that were not shown yet.
    pub fn squeeze(
        &mut self,
        available: Tokens,
        count: impl Fn(&ChatRequest) -> Tokens,
    ) -> Result<Option<Fitted>, DoesNotFit> {
        if self.pending_call().is_none() {
            return Ok(None);
        }
        let least = self.options.min_completion_tokens.min(self.options.max_completion_tokens);
        let most = self.options.max_completion_tokens;
        self.subject.max_chars = MAX_SUBJECT_CHARS;
        self.may_search = self.options.max_searches > 0;

        let mut caps = vec![most, most - most / 4, most / 2, least];
        caps.retain(|cap| *cap >= least);
        caps.dedup();
        let last = caps.len() - 1;
        let mut needed = Tokens(0);
        for (index, cap) in caps.into_iter().enumerate() {
            self.completion_cap = cap;
            let budget = available.saturating_sub(Tokens(u64::from(cap)));
            let candidates = self.shelf.len();
            match self.fit(budget, &count) {
                Ok(fitted) => {
                    let kept = self.shelf.packed();
                    // A repair has little left to spend, and half a cap holds a whole document.
                    let long_enough = self.repair_round().is_some() && cap <= most / 2;
                    if index == last || long_enough || kept >= candidates.min(PASSAGES_WORTH_KEEPING) {
                        return Ok(fitted.map(|fitted| self.finally(fitted, available, &count)));
                    }
                }
                Err(prompt) => needed = prompt + Tokens(u64::from(cap)),
            }
        }
        // Nothing fits with the subject at full length, or too little of the context does.
        while self.subject.max_chars > MIN_SUBJECT_CHARS {
            let longest = self.subject.longest().max(match &self.stage {
                Stage::Mending { shown, anew: true, .. } => shown.chars().count(),
                _ => 0,
            });
            self.subject.max_chars = (self.subject.max_chars.min(longest) / 2).max(MIN_SUBJECT_CHARS);
            let budget = available.saturating_sub(Tokens(u64::from(least)));
            match self.fit(budget, &count) {
                Ok(fitted) => return Ok(fitted.map(|fitted| self.finally(fitted, available, &count))),
                Err(prompt) => needed = prompt + Tokens(u64::from(least)),
            }
        }
        Err(DoesNotFit { needed, available })
    }

    /// Packs passages so that the prompt stays within `max_prompt_tokens`; the completion cap is
    /// left as it is. The error holds what the prompt needs without any passage. `None`: no prompt
    /// renders, which [`next`](Self::next) reports.
    fn fit(
        &mut self,
        max_prompt_tokens: Tokens,
        count: &impl Fn(&ChatRequest) -> Tokens,
    ) -> Result<Option<Fitted>, Tokens> {
        let measure = |draft: &Self| {
            let request = draft.request().ok()?;
            Some(Fitted { prompt: count(&request), request })
        };
        self.shelf.pack_all();
        let Some(all) = measure(self) else { return Ok(None) };
        if all.prompt <= max_prompt_tokens {
            return Ok(Some(all));
        }
        self.shelf.pack_none();
        let Some(none) = measure(self) else { return Ok(None) };
        if none.prompt > max_prompt_tokens {
            return Err(none.prompt);
        }
        // Passages are weighed by their length, and the scale is what all of them cost together.
        let mut room = max_prompt_tokens.saturating_sub(none.prompt).0;
        let scale = all.prompt.saturating_sub(none.prompt).0;
        for _ in 0..8 {
            self.shelf.pack_within(room, scale);
            let Some(some) = measure(self) else { return Ok(None) };
            if some.prompt <= max_prompt_tokens {
                return Ok(Some(some));
            }
            room = room * 7 / 8;
        }
        self.shelf.pack_none();
        Ok(Some(none))
    }

    /// The request as it is sent, after it was decided whether it offers a search.
    fn finally(
        &mut self,
        mut fitted: Fitted,
        available: Tokens,
        count: &impl Fn(&ChatRequest) -> Tokens,
    ) -> Fitted {
        self.decide_on_searching(fitted.prompt, available, count);
        if !self.offers_search() {
            fitted.request.tools.clear();
        }
        fitted
    }

    /// Searching pays only if, after the call that asks for it, a prompt with half of what is packed now
    /// and an answer that need not be cut short are still within the budget: a short document from the
    /// right passages is worth less than a whole one from good ones. `prompt`: what is packed now.
    fn decide_on_searching(
        &mut self,
        prompt: Tokens,
        available: Tokens,
        count: &impl Fn(&ChatRequest) -> Tokens,
    ) {
        if !self.offers_search() {
            return;
        }
        let (least, most) = (self.options.min_completion_tokens, self.options.max_completion_tokens);
        let answer = Tokens(u64::from(least) * 3 / 2).max(Tokens(u64::from(most) * 3 / 4));
        let rest = Tokens(TOOL_CALL_TOKENS * 5) + answer;
        // Without passages it is at most as long: most requests need no closer look.
        if prompt + prompt + rest <= available {
            self.may_search = true;
            self.search_left_out = false;
            return;
        }
        let bare = {
            let mut bare = self.clone();
            bare.shelf.pack_none();
            bare.request().map_or(prompt, |request| count(&request))
        };
        let passages = Tokens(prompt.saturating_sub(bare).0 / 2);
        self.may_search = prompt + bare + passages + rest <= available;
        self.search_left_out = !self.may_search;
    }

    /// Takes the model's answer to the call that [`next`](Self::next) gave.
    pub fn answered(&mut self, answer: &ChatAnswer) {
        if self.pending_call().is_some() {
            self.take(answer);
            self.explain();
        }
    }

    /// Says of a failure what others did before, and what can be done about it.
    fn explain(&mut self) {
        let asked = self.refusals.len() + 1;
        let Stage::Failed(Failure { code, message }) = &mut self.stage else { return };
        if asked > 1 {
            *message = format!(
                "None of the {asked} models that were asked wrote a document (metadata.fallbacks says why). \
                 The last one: {message}"
            );
        }
        let advice = match code.as_str() {
            "empty_answer" => "Try again, or try another model (OPENAI_MODEL, OPENAI_FALLBACK_MODELS).",
            "invalid_answer" => {
                "Try another model (OPENAI_MODEL, OPENAI_FALLBACK_MODELS) or another OPENAI_RESPONSE_FORMAT."
            }
            "answer_too_long" => {
                "Raise OPENAI_MAX_COMPLETION_TOKENS and TOKEN_BUDGET_PER_RUN, or ask for less."
            }
            _ => return,
        };
        *message = format!("{message} {advice}");
    }

    fn take(&mut self, answer: &ChatAnswer) {
        if self.shows_passages() {
            self.shelf.mark_given();
        }
        if let Some((reason, _)) = self.repair_round() {
            self.repaired = Some(reason.to_owned());
        }
        let unfenced = self.without_fence(answer);
        let answer = unfenced.as_ref().unwrap_or(answer);
        match self.stage.clone() {
            Stage::Drafting { again } => self.drafted(answer, again),
            Stage::Mending { fields, .. } => self.mended(answer, &fields),
            Stage::Searching { .. } | Stage::Finished { .. } | Stage::Failed(_) => {}
        }
    }

    /// The answer without the code that fences its data, which small models copy; `None`: it has none.
    fn without_fence(&self, answer: &ChatAnswer) -> Option<ChatAnswer> {
        let content = answer.content.as_deref()?;
        let fence = &self.subject.fence;
        let mut capital = fence.clone();
        capital[..1].make_ascii_uppercase();
        if !content.contains(fence.as_str()) && !content.contains(&capital) {
            return None;
        }
        let content = content.replace(fence.as_str(), "").replace(&capital, "");
        Some(ChatAnswer { content: Some(content), ..answer.clone() })
    }

    fn drafted(&mut self, answer: &ChatAnswer, again: Option<prompt::Again>) {
        if let Some(failure) = refused(answer) {
            return self.settle_for_fallback(failure);
        }
        let content = answer.content.as_deref().unwrap_or_default();
        if !answer.tool_calls.is_empty() && self.offers_search() {
            return self.asked_for_searches(&answer.tool_calls);
        }
        if content.trim().is_empty() {
            let why =
                if answer.tool_calls.is_empty() { prompt::Again::Empty } else { prompt::Again::NoTools };
            return match again {
                None if answer.finish_reason == FinishReason::Length => {
                    self.start_over(prompt::Again::Shorter);
                }
                None => self.start_over(why),
                Some(first) => self.settle_for_fallback(failure("empty_answer", &nothing_twice(first, why))),
            };
        }

        let mut reading = read::document(content, self.kind.fields());
        if let (Some(parent), Some(reading)) = (&self.parent, &mut reading) {
            compare::set_faults(parent, reading);
        }
        match reading {
            Some(reading) if reading.faults.is_empty() => self.accept(reading),
            reading if answer.finish_reason == FinishReason::Length => {
                let reading = reading.map(|reading| Reading { cut: true, ..reading });
                self.keep_the_better(reading);
                match again {
                    None => self.start_over(prompt::Again::Shorter),
                    Some(_) => self.settle_for_fallback(cut_off()),
                }
            }
            reading => {
                let (fields, faults, shown, anew) = match &reading {
                    Some(reading) => {
                        let fields = reading.faulty_fields(self.kind);
                        let anew = reading.lacks_content();
                        let mut shown = if anew { reading.shown_whole() } else { reading.shown(&fields) };
                        let gone =
                            self.parent.as_ref().and_then(|parent| compare::gone(parent, &reading.spec));
                        if let Some(gone) = gone {
                            shown.push_str("\n\nIn the earlier document, and not in this answer:\n");
                            shown.push_str(&gone);
                        }
                        (fields, reading.fault_lines(), shown, anew)
                    }
                    None => (
                        self.kind.fields().to_vec(),
                        vec![read::instead_of_a_document(content).to_owned()],
                        clean::text(content),
                        true,
                    ),
                };
                self.keep_the_better(reading);
                if let Some(first) = again {
                    let message = format!(
                        "The model {}; asked again, it gave no document of the wanted shape.",
                        did(first)
                    );
                    return self.settle_for_fallback(failure("invalid_answer", &message));
                }
                let shown = clean::cut(&shown, MAX_MEND_CHARS);
                self.stage = Stage::Mending { fields, faults, shown, anew };
            }
        }
    }

    fn mended(&mut self, answer: &ChatAnswer, fields: &[Field]) {
        if let Some(failure) = refused(answer) {
            return self.settle_for_fallback(failure);
        }
        let content = answer.content.as_deref().unwrap_or_default();
        let cut = answer.finish_reason == FinishReason::Length;
        if let Some(patch) = read::document(content, fields) {
            let mut whole = match &self.fallback {
                Some(before) => before.patched(&patch, fields, self.kind),
                None => Reading { cut, ..patch },
            };
            if let Some(parent) = &self.parent {
                compare::set_faults(parent, &mut whole);
            }
            self.keep_the_better(Some(whole));
        }
        self.settle_for_fallback(failure(
            "invalid_answer",
            "The model did not give a document of the wanted shape, and mending it failed too.",
        ));
    }

    fn start_over(&mut self, again: prompt::Again) {
        self.stage = Stage::Drafting { again: Some(again) };
    }

    fn keep_the_better(&mut self, reading: Option<Reading>) {
        if let Some(reading) = reading
            && self.fallback.as_ref().is_none_or(|known| known.is_worse_than(&reading, self.kind))
        {
            self.fallback = Some(reading);
        }
    }

    fn accept(&mut self, mut reading: Reading) {
        let mut notes = Vec::new();
        if let Some(parent) = &self.parent {
            // What the author still does not name is named for it.
            compare::drop_faults(&mut reading);
            let unnamed = compare::list(parent, &mut reading.spec);
            notes.extend((unnamed > 0).then_some(Note::Unnamed(unnamed)));
        }
        if reading.cut {
            notes.push(Note::CutOff);
        }
        if reading.shortened {
            notes.push(Note::Shortened);
        }
        if reading.faults.iter().any(|fault| fault.field != Some(Field::Diagrams)) {
            let faults = reading.fault_lines();
            notes.push(if self.repaired.is_some() {
                Note::Incomplete(faults)
            } else {
                Note::Unmended(faults)
            });
        }
        if self.subject.is_cut() {
            notes.push(Note::SubjectCut);
        }
        self.stage = Stage::Finished { spec: Box::new(reading.spec), notes };
    }

    /// The best document so far, if it says anything; else the failure.
    fn settle_for_fallback(&mut self, failure: Failure) {
        match self.fallback.take() {
            Some(reading) if reading.says_something(self.kind) => self.accept(reading),
            _ => self.stage = Stage::Failed(failure),
        }
    }

    /// The pending call cannot be made (budget, or every model failed for good): the best document
    /// so far is the result, or the run fails with this code and message.
    pub fn cannot_call(&mut self, code: &str, message: &str) {
        if !matches!(self.stage, Stage::Drafting { .. } | Stage::Mending { .. }) {
            return;
        }
        let failure = match self.refusals.last() {
            _ if self.repair_round().is_some() => {
                let did = match &self.stage {
                    Stage::Drafting { again: Some(first) } => did(*first),
                    _ => "gave no document of the wanted shape",
                };
                failure(code, &format!("The model {did}. It could not be asked again: {message}"))
            }
            // What the models did is the reason; that no other one could be asked comes after it.
            Some(last) if !last.code.is_empty() => failure(
                &last.code,
                &format!(
                    "{}. The call to the next model could not be made: {message}",
                    last.why.trim_end_matches('.')
                ),
            ),
            _ => failure(code, message),
        };
        self.settle_for_fallback(failure);
    }

    fn asked_for_searches(&mut self, calls: &[ToolCall]) {
        let mut pending = Vec::new();
        let mut results = Vec::new();
        // Ids are ours where the server gave none or the same twice: results are found by them.
        let mut ids = HashSet::new();
        let calls: Vec<ToolCall> = calls
            .iter()
            .take(MAX_TOOL_CALLS)
            .enumerate()
            .map(|(index, call)| ToolCall {
                id: match clean::cut(&clean::line(&call.id), 100) {
                    id if !id.is_empty() && ids.insert(id.clone()) => id,
                    _ => format!("call_{}_{index}", self.rounds.len()),
                },
                name: clean::cut(&clean::line(&call.name), 64),
                arguments: clean::cut(&clean::text(&call.arguments), 2_000),
            })
            .collect();
        for call in &calls {
            let asked = self.searches + u32::try_from(pending.len()).unwrap_or(u32::MAX);
            let remark = match query_of(call) {
                Ok(query) if asked < self.options.max_searches => {
                    let step = format!("search.{}", asked + 1);
                    pending.push(Search { step, query, tool_call_id: call.id.clone() });
                    None
                }
                Ok(_) => Some("No searches are left. Answer with what you have.".to_owned()),
                Err(remark) => Some(remark),
            };
            results.push(ToolResult {
                tool_call_id: call.id.clone(),
                numbers: Vec::new(),
                addition: 0,
                remark,
            });
        }
        self.rounds.push(Round { calls, results });
        if pending.is_empty() {
            // Every call was wrong: each such round counts, or a confused model would never end.
            self.searches += 1;
            self.stage = Stage::Drafting { again: None };
        } else {
            self.stage = Stage::Searching { pending };
        }
    }

    /// Takes what the pending search found.
    pub fn found(&mut self, passages: Vec<Passage>) {
        let numbers = self.shelf.add(passages);
        let remark = numbers.is_empty().then(|| "Nothing was found.".to_owned());
        self.searched(numbers, remark);
    }

    /// The pending search failed: the model is told that there is no answer, not why.
    pub fn search_failed(&mut self) {
        self.degraded.get_or_insert_with(|| "A search that the model asked for failed.".to_owned());
        self.searched(
            Vec::new(),
            Some("The search is not available now. Answer with what you have.".to_owned()),
        );
    }

    fn searched(&mut self, numbers: Vec<u32>, remark: Option<String>) {
        let Stage::Searching { pending } = &mut self.stage else { return };
        if pending.is_empty() {
            return;
        }
        let done = pending.remove(0);
        let ended = pending.is_empty();
        self.searches += 1;
        if let Some(round) = self.rounds.last_mut()
            && let Some(result) =
                round.results.iter_mut().find(|result| result.tool_call_id == done.tool_call_id)
        {
            result.addition = if numbers.is_empty() { 0 } else { self.shelf.additions() };
            result.numbers = numbers;
            result.remark = remark;
        }
        if ended {
            self.stage = Stage::Drafting { again: None };
        }
    }
}

impl Subject {
    fn longest(&self) -> usize {
        self.request.chars().count().max(self.parent.as_ref().map_or(0, |parent| parent.chars().count()))
    }

    /// True when the prompt shows less than there is.
    fn is_cut(&self) -> bool {
        self.longest() > self.max_chars
    }
}

fn failure(code: &str, message: &str) -> Failure {
    Failure { code: code.to_owned(), message: message.to_owned() }
}

fn cut_off() -> Failure {
    failure("answer_too_long", "The model's answer was cut at the completion cap twice.")
}

/// What a model did that was asked to start over, after "The model".
fn did(again: prompt::Again) -> &'static str {
    match again {
        prompt::Again::Shorter => "was cut off at the completion cap",
        prompt::Again::Empty => "gave an empty answer",
        prompt::Again::NoTools => "asked for searches that were not on offer instead of writing",
    }
}

fn nothing_twice(first: prompt::Again, second: prompt::Again) -> String {
    if first == second {
        format!("The model {}, twice.", did(first))
    } else {
        format!("The model {}; asked again, it {}.", did(first), did(second))
    }
}

fn refused(answer: &ChatAnswer) -> Option<Failure> {
    if let Some(refusal) = answer.refusal.as_deref().filter(|refusal| !refusal.trim().is_empty()) {
        let words = clean::cut(&clean::line(refusal), 300);
        return Some(failure("model_refused", &format!("The model refused the request: {words}")));
    }
    (answer.finish_reason == FinishReason::ContentFilter).then(|| {
        failure(
            "content_filter",
            "The provider's content filter stopped the answer. Reword the request, or look at what is indexed.",
        )
    })
}

fn query_of(call: &ToolCall) -> Result<String, String> {
    if call.name != SEARCH_TOOL {
        return Err(format!("There is no such tool. The only tool is {SEARCH_TOOL}(query)."));
    }
    let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or(Value::Null);
    let query = clean::cut(&clean::line(arguments["query"].as_str().unwrap_or_default()), MAX_QUERY_CHARS);
    if query.is_empty() {
        return Err(format!("{SEARCH_TOOL} needs {{\"query\": \"words to look for\"}}."));
    }
    Ok(query)
}

pub(super) fn search_tool() -> ToolSpec {
    ToolSpec {
        name: SEARCH_TOOL.to_owned(),
        description: "Searches the team's indexed code and documents. Returns numbered passages that can \
                      be cited. Use it only when the passages at hand lack something the document needs."
            .to_owned(),
        parameters: json!({
            "type": "object",
            "properties": { "query": { "type": "string", "description": "What to look for, in a few words" } },
            "required": ["query"],
            "additionalProperties": false
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::{
        super::{
            passages::tests::passage,
            testing::{
                call, count, cut, failed, finished, good_spec, input, passages, says, search, searches, task,
                transcript,
            },
        },
        *,
    };

    #[test]
    fn a_good_answer_is_a_document() {
        let mut draft = Draft::new(input());
        let first = call(&mut draft);
        assert_eq!(first.step, "draft.0");
        insta::assert_snapshot!("prompt_spec", transcript(&first.request));
        assert!(matches!(first.request.response_format, ResponseFormat::JsonSchema { .. }));

        draft.answered(&says(good_spec()));
        let done = finished(&mut draft);
        insta::assert_snapshot!("rendered_spec", done.markdown);
        let mut metadata = done.metadata;
        // Changes with every word of a prompt; the snapshots of the prompts show those.
        assert_eq!(metadata.remove("prompt_version"), Some(json!(prompt::version())));
        insta::assert_snapshot!("metadata_spec", serde_json::to_string_pretty(&metadata).unwrap());
    }

    #[test]
    fn without_json_schema_the_prompt_holds_the_schema() {
        let mut input = input();
        input.options.response_format = ResponseFormatSetting::JsonObject;
        let request = call(&mut Draft::new(input)).request;
        assert_eq!(request.response_format, ResponseFormat::JsonObject);
        assert!(transcript(&request).contains(schema::of_kind(Kind::Spec).text()));
    }

    #[test]
    fn each_kind_has_its_prompt_and_is_chosen_from_the_request() {
        let kind = |content: &str, metadata: Value, parent: Option<Value>| {
            Draft::new(DraftInput { task: task(content, &metadata), parent, ..input() })
        };
        let parent = json!({"msg_type": "spec", "content": "# Old\n\nIt was so [1].\n\n## Sources\n\n- [1] `a.md:1-2`"});
        let mut seen = Vec::new();
        for (mut draft, wanted) in [
            (kind("Design a cache", json!({}), None), Kind::Spec),
            (kind("Write an ADR on caching", json!({}), None), Kind::Adr),
            (kind("Review our cache", json!({}), None), Kind::Review),
            (kind("Use Redis", json!({}), Some(parent.clone())), Kind::Refine),
            (kind("Use Redis", json!({"kind": "ADR"}), Some(parent)), Kind::Adr),
        ] {
            assert_eq!(draft.kind(), wanted);
            let system = match &call(&mut draft).request.messages[0] {
                ChatMessage::System { content } => content.clone(),
                other => panic!("{other:?}"),
            };
            seen.push(system);
        }
        seen.dedup();
        assert_eq!(seen.len(), 5, "each differs from the one before");
        let mut draft = kind("Use Redis", json!({"kind": "poem"}), None);
        let failure = failed(&mut draft);
        assert_eq!(failure.code, "unknown_kind");
        assert!(failure.message.contains("spec, adr, review, refine"), "{}", failure.message);
    }

    #[test]
    fn a_parent_is_shown_without_its_citations() {
        let parent = json!({"msg_type": "spec", "content": "# Old\n\nIt was so [1].\n\n## Sources\n\n- [1] `a.md:1-2`"});
        let request = call(&mut Draft::new(DraftInput { parent: Some(parent), ..input() })).request;
        let shown = transcript(&request);
        assert!(shown.contains("It was so.") && !shown.contains("a.md"), "{shown}");
        let error = json!({"msg_type": "error", "content": "It failed."});
        assert_eq!(Draft::new(DraftInput { parent: Some(error), ..input() }).kind(), Kind::Spec);
    }

    #[test]
    fn searches_bring_new_numbered_passages_until_none_are_left() {
        let mut draft = Draft::new(input());
        assert_eq!(call(&mut draft).request.tools.len(), 1);
        draft.answered(&searches(&["fencing tokens", "outbox"]));
        let first = search(&mut draft);
        assert_eq!((first.step.as_str(), first.query.as_str()), ("search.1", "fencing tokens"));
        draft.found(vec![
            passage("docs/fence.md", 5, "A stale fencing token is refused by every write"),
            passages()[0].clone(),
        ]);
        let second = search(&mut draft);
        assert_eq!((second.step.as_str(), second.query.as_str()), ("search.2", "outbox"));
        draft.search_failed();

        let again = call(&mut draft);
        assert_eq!(again.step, "draft.1");
        insta::assert_snapshot!(
            "prompt_after_search",
            transcript(&again.request).split("======== user").last().unwrap()
        );

        draft.answered(&searches(&["one more", "too many"]));
        assert_eq!(search(&mut draft).query, "one more");
        draft.found(Vec::new());
        let last = call(&mut draft);
        assert_eq!(last.step, "draft.2");
        assert!(last.request.tools.is_empty(), "three were allowed");

        let mut answer = good_spec();
        answer["security"][0] =
            json!({"text": "A stale fencing token is refused by every write", "citations": [4]});
        draft.answered(&says(answer));
        let done = finished(&mut draft);
        assert_eq!(done.metadata["searches"], json!(3));
        assert_eq!(done.metadata["context_degraded"], json!(true), "one search failed");
        assert!(done.citations.iter().any(|citation| citation.source == "docs/fence.md"));
    }

    #[test]
    fn a_model_that_never_stops_searching_is_stopped() {
        let mut draft = Draft::new(input());
        let mut calls = 0;
        let end = loop {
            match draft.next() {
                Next::Call(_) => {
                    calls += 1;
                    draft.answered(&searches(&["more"]));
                }
                Next::Search(_) => draft.found(Vec::new()),
                end => break end,
            }
            assert!(calls < 20);
        };
        assert_eq!(calls, 5, "three searches, one call without tools, one repair");
        assert!(matches!(end, Next::Failed(Failure { code, .. }) if code == "empty_answer"));
    }

    #[test]
    fn wrong_tool_calls_are_answered_and_counted() {
        let mut draft = Draft::new(input());
        let mut answer = searches(&["x"]);
        answer.tool_calls[0].arguments = "{not json".to_owned();
        answer.tool_calls.push(ToolCall {
            id: "c0".to_owned(),
            name: "rm".to_owned(),
            arguments: String::new(),
        });
        draft.answered(&answer);
        let next = call(&mut draft);
        assert_eq!(next.step, "draft.1");
        let shown = transcript(&next.request);
        assert!(
            shown.contains("needs {\"query\"") && shown.contains("(call_0_1) There is no such tool"),
            "{shown}"
        );
        for _ in 0..2 {
            draft.answered(&answer);
        }
        assert!(call(&mut draft).request.tools.is_empty());
    }

    #[test]
    fn broken_diagrams_are_asked_for_again_alone() {
        let mut answer = good_spec();
        answer["diagrams"][0]["mermaid"] = json!("flowchart LR\n  a[broken (label)] --> b");
        let mut draft = Draft::new(input());
        draft.answered(&says(&answer));
        let repair = call(&mut draft);
        assert_eq!(repair.step, "repair.0");
        insta::assert_snapshot!(
            "prompt_mend",
            transcript(&repair.request).split("======== user").last().unwrap()
        );
        let ResponseFormat::JsonSchema { schema, .. } = &repair.request.response_format else { panic!() };
        assert_eq!(schema.value()["required"], json!(["diagrams"]));

        let mut mended = draft.clone();
        mended.answered(&says(json!({"diagrams": [{"title": "P", "mermaid": "flowchart LR\n  a --> b"}]})));
        let done = finished(&mut mended);
        assert!(done.markdown.contains("```mermaid\nflowchart LR\n  a --> b\n```"));
        assert_eq!(done.metadata["repaired"], json!(true));
        assert_eq!(done.metadata["diagrams_broken"], json!(0));
        assert_eq!(done.spec.title, "Run leases");

        draft.answered(&says("no"));
        let done = finished(&mut draft);
        assert!(done.markdown.contains("```text\nflowchart LR"), "{}", done.markdown);
        assert!(!done.markdown.contains("```mermaid"));
        assert_eq!(done.metadata["diagrams_broken"], json!(1));
    }

    #[test]
    fn what_has_to_be_written_anew_is_written_from_the_request_and_the_passages() {
        let parent = json!({"msg_type": "spec", "content": "# Old\n\nIt was so [1]."});
        let refinement = DraftInput { parent: Some(parent), ..input() };
        let mut unchanged = super::super::testing::refine();
        unchanged["changes"] = json!([]);
        let mut thin = good_spec();
        for field in ["decisions", "security"] {
            thin.as_object_mut().unwrap().remove(field);
        }
        for (input, answer, fields, fault) in [
            (input(), "Sure! Use Redis.".to_owned(), None, "not a JSON object"),
            (input(), json!({"answer": "Use Redis."}).to_string(), None, "none of the fields"),
            (input(), thin.to_string(), Some(json!(["decisions", "security"])), "`security` is missing"),
            (refinement, unchanged.to_string(), Some(json!(["changes"])), "There is no change"),
        ] {
            let has_parent = input.parent.is_some();
            let mut draft = Draft::new(input);
            let first = transcript(&call(&mut draft).request);
            draft.answered(&says(answer));
            let repair = call(&mut draft).request;
            let shown = transcript(&repair);
            assert_eq!(call(&mut draft).step, "repair.0");
            let same = first.split("======== at most").next().unwrap();
            assert!(shown.starts_with(same), "it goes on from the first call: {shown}");
            assert!(shown.contains("so that no run is lost when a worker dies"), "{shown}");
            assert!(shown.contains("[3] deploy/README.md:1-"), "{shown}");
            assert_eq!(shown.contains("It was so."), has_parent);
            assert!(shown.contains(fault), "{shown}");
            if let Some(fields) = fields {
                let ResponseFormat::JsonSchema { schema, .. } = &repair.response_format else { panic!() };
                let mut required: Vec<&str> =
                    schema.value()["required"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
                required.sort_unstable();
                assert_eq!(json!(required), fields, "no more than that");
                assert!(shown.contains("Workers are added without coordination"), "what is right is shown");
            }
            let parts = draft.prompt_parts(&repair).0;
            let part = |name: &str| parts.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes);
            assert!(part("passages") > Some(0) && part("earlier_answer") > Some(0), "{parts:?}");
        }
    }

    #[test]
    fn a_repair_shows_as_many_passages_as_fit_into_what_is_left() {
        let mut draft = Draft::new(DraftInput { passages: many_passages(), ..input() });
        draft.squeeze(Tokens(20_000), count).unwrap();
        let all = count(&call(&mut draft).request);
        draft.answered(&says("Sure! Use Redis."));
        draft.squeeze(Tokens(6_000), count).unwrap();
        let request = call(&mut draft).request;
        assert!(count(&request) + Tokens(u64::from(request.max_completion_tokens)) <= Tokens(6_000));
        assert!(count(&request) < all);
        assert!((1..15).contains(&draft.shelf.packed()), "{}", draft.shelf.packed());
        assert!(request.max_completion_tokens >= 2_000, "and still leaves room for a whole document");
        let shown = transcript(&request);
        for entry in draft.shelf.entries().filter(|entry| entry.packed) {
            assert!(shown.contains(&format!("[{}] {}", entry.n, entry.place())), "the numbers are kept");
        }
    }

    #[test]
    fn a_small_repair_shows_no_passages_so_none_becomes_citable_by_it() {
        let mut draft = Draft::new(DraftInput { passages: many_passages(), ..input() });
        draft.squeeze(Tokens(6_000), count).unwrap();
        let shown = draft.shelf.packed();
        let mut answer = good_spec();
        answer["diagrams"][0]["mermaid"] = json!("flowchart LR\n  a[broken (label)] --> b");
        answer["context"] = json!([{"text": "topic14 leases word14", "citations": [15]}]);
        draft.answered(&says(&answer));
        draft.squeeze(Tokens(6_000), count).unwrap();
        draft.answered(&says(json!({"diagrams": [{"title": "P", "mermaid": "flowchart LR\n  a --> b"}]})));
        let done = finished(&mut draft);
        assert_eq!(done.metadata["passages_given"], json!(shown));
        assert_eq!(done.metadata["citations_invalid"], json!(1));
    }

    #[test]
    fn a_decision_without_alternatives_is_asked_for_again() {
        let mut answer = good_spec();
        answer["decisions"][0]["alternatives"] = json!([]);
        let mut draft = Draft::new(input());
        draft.answered(&says(&answer));
        let shown = transcript(&call(&mut draft).request);
        assert!(shown.contains("weighs 0 alternatives"), "{shown}");
        draft.cannot_call("run_budget", "gone");
        let done = finished(&mut draft);
        assert!(done.markdown.starts_with("> **Note:** The model's answer had faults"), "{}", done.markdown);
        assert!(done.markdown.contains("could not be made"), "{}", done.markdown);
        assert_eq!(done.metadata["incomplete"], json!(true));
        assert_eq!(done.metadata["repaired"], json!(false), "no repair was made");
    }

    #[test]
    fn prose_instead_of_json_is_mended_or_fails() {
        let mut draft = Draft::new(input());
        draft.answered(&says("Sure! First, I would use leases."));
        let shown = transcript(&call(&mut draft).request);
        assert!(
            shown.contains("not a JSON object") && shown.contains("First, I would use leases."),
            "{shown}"
        );
        let mut mended = draft.clone();
        mended.answered(&says(good_spec()));
        assert_eq!(finished(&mut mended).spec.title, "Run leases");
        draft.answered(&says("Still prose."));
        assert_eq!(failed(&mut draft).code, "invalid_answer");
    }

    #[test]
    fn a_cut_answer_is_asked_for_again_shorter_and_then_kept_as_far_as_it_goes() {
        let whole = good_spec().to_string();
        let half = &whole[..whole.find("\"deployment\"").unwrap()];
        let mut draft = Draft::new(input());
        draft.answered(&cut(half));
        let again = call(&mut draft);
        assert_eq!(again.step, "repair.0");
        assert!(again.request.tools.is_empty());
        assert!(transcript(&again.request).contains("much shorter"));

        let mut second = draft.clone();
        second.answered(&says(good_spec()));
        assert_eq!(finished(&mut second).metadata["incomplete"], json!(false));

        draft.answered(&cut(&half[..200]));
        let done = finished(&mut draft);
        assert!(done.markdown.contains("broke off at its length limit"), "{}", done.markdown);
        assert_eq!(done.spec.decisions.len(), 1, "the longer half is kept");
        assert_eq!(done.metadata["repair_reason"], json!("shorter"));
    }

    #[test]
    fn a_rich_draft_that_was_cut_is_not_given_for_a_whole_stub() {
        let whole = good_spec().to_string();
        let mut draft = Draft::new(input());
        draft.answered(&cut(&whole[..whole.find("\"observability\"").unwrap() + 20]));
        let mut stub = good_spec();
        for field in ["components", "decisions", "diagrams", "deployment", "scaling", "security"] {
            stub[field] = json!([]);
        }
        draft.answered(&says(stub));
        let done = finished(&mut draft);
        assert_eq!((done.spec.components.len(), done.spec.decisions.len()), (2, 1), "{}", done.markdown);
        assert!(done.markdown.contains("broke off at its length limit"), "{}", done.markdown);
    }

    #[test]
    fn cut_off_before_anything_was_said_twice_fails_clearly() {
        let mut draft = Draft::new(input());
        draft.answered(&cut("{\"title\": \"Run"));
        draft.answered(&cut(""));
        let failure = failed(&mut draft);
        assert!(matches!(failure.code.as_str(), "empty_answer" | "answer_too_long"), "{failure:?}");
    }

    #[test]
    fn refusals_and_filters_fail_with_their_own_codes() {
        let mut draft = Draft::new(input());
        draft.answered(&ChatAnswer { refusal: Some("I can't\nhelp.".to_owned()), content: None, ..says("") });
        let failure = failed(&mut draft);
        assert_eq!(failure.code, "model_refused");
        assert!(failure.message.ends_with("I can't help."));

        let mut draft = Draft::new(input());
        draft.answered(&ChatAnswer { finish_reason: FinishReason::ContentFilter, ..says("") });
        assert_eq!(failed(&mut draft).code, "content_filter");
    }

    #[test]
    fn the_fence_of_the_prompt_does_not_show_in_the_document() {
        let mut draft = Draft::new(input());
        let fence = draft.subject.fence.clone();
        let mut answer = good_spec();
        answer["title"] = json!(format!("D{} [1] docs/a.md", &fence[1..]));
        answer["summary"] = json!(format!("<<<{fence} leases {fence}>>>"));
        draft.answered(&says(answer));
        let markdown = finished(&mut draft).markdown;
        assert!(!markdown.to_lowercase().contains(&fence), "{markdown}");
    }

    #[test]
    fn an_empty_answer_is_asked_for_once_more() {
        let mut draft = Draft::new(input());
        draft.answered(&says("  \n "));
        assert!(transcript(&call(&mut draft).request).contains("Your answer was empty"));
        let mut second = draft.clone();
        second.answered(&says(good_spec()));
        assert_eq!(finished(&mut second).metadata["repair_reason"], json!("empty"));
        draft.answered(&says(""));
        assert_eq!(failed(&mut draft).code, "empty_answer");
    }

    #[test]
    fn the_next_model_starts_afresh_after_two_answers_of_no_use() {
        let mut draft = Draft::new(input());
        let first = transcript(&call(&mut draft).request);
        assert!(!draft.answered_by("a", &says("")), "one may happen");
        assert!(draft.answered_by("a", &says("")));
        assert_eq!(draft.refused_by(), ["a"]);
        assert_eq!(draft.refusals().collect::<Vec<_>>(), ["a: The model gave an empty answer, twice."]);
        let next = call(&mut draft);
        assert_eq!((next.step.as_str(), transcript(&next.request)), ("draft.0.other.1", first));

        let mut once = Draft::new(input());
        once.answered(&says(""));
        once.cannot_call("run_budget_exhausted", "no tokens are left.");
        assert_eq!(
            failed(&mut once).message,
            "The model gave an empty answer. It could not be asked again: no tokens are left."
        );

        let mut good = draft.clone();
        assert!(!good.answered_by("b", &says(good_spec())));
        assert_eq!(finished(&mut good).metadata["repaired"], json!(false), "this one wrote it at once");

        let mut broke = draft.clone();
        broke.cannot_call("run_budget_exhausted", "no tokens are left.");
        let failure = failed(&mut broke);
        assert_eq!(failure.code, "empty_answer");
        assert_eq!(
            failure.message,
            "The model gave an empty answer, twice. The call to the next model could not be made: no tokens are left."
        );

        draft.answered(&says("prose"));
        assert_eq!(call(&mut draft).step, "repair.0.other.1");
        draft.answered(&says("prose"));
        let failure = failed(&mut draft);
        assert_eq!(failure.code, "invalid_answer");
        assert!(failure.message.starts_with("None of the 2 models"), "{}", failure.message);
    }

    #[test]
    fn a_call_that_cannot_be_made_fails_with_the_callers_reason() {
        let mut draft = Draft::new(input());
        draft.cannot_call("run_budget", "No tokens are left.");
        assert_eq!(failed(&mut draft), failure("run_budget", "No tokens are left."));
    }

    fn many_passages() -> Vec<Passage> {
        (0..15)
            .map(|n| passage(&format!("docs/{n}.md"), 1, &format!("topic{n} leases word{n} ").repeat(40)))
            .collect()
    }

    #[test]
    fn squeezing_drops_passages_then_lowers_the_cap_then_cuts_the_request() {
        let long = format!("Design leases. {}", "More words about it. ".repeat(400));
        let mut draft =
            Draft::new(DraftInput { passages: many_passages(), task: task(&long, &json!({})), ..input() });
        let all = count(&call(&mut draft).request);
        let mut seen = Vec::new();
        for available in [all.0 + 4000, 7_000, 5_500, 3_800, 2_750] {
            draft.squeeze(Tokens(available), count).unwrap();
            let request = call(&mut draft).request;
            let spends = count(&request).0 + u64::from(request.max_completion_tokens);
            assert!(spends <= available, "{spends} of {available}");
            seen.push((draft.shelf.packed(), request.max_completion_tokens, draft.subject.is_cut()));
        }
        assert_eq!(seen[0], (15, 4000, false), "{seen:?}");
        assert!(seen[1].0 < 15 && seen[1].0 >= 6 && seen[1].1 < 4000, "{seen:?}");
        assert!(seen.windows(2).all(|pair| pair[1].1 <= pair[0].1), "{seen:?}");
        assert_eq!(seen[4], (0, 800, true), "{seen:?}");

        let error = draft.squeeze(Tokens(1_000), count).unwrap_err();
        assert!(error.needed > Tokens(1_000), "{error}");
        draft.squeeze(Tokens(all.0 + 4000), count).unwrap();
        assert_eq!(draft.shelf.packed(), 15, "more tokens bring them back");
    }

    #[test]
    fn a_cut_request_is_said_in_the_document() {
        let long = format!("Design leases. {}", "More words about it. ".repeat(2_000));
        let mut draft = Draft::new(DraftInput { task: task(&long, &json!({})), ..input() });
        draft.squeeze(Tokens(4_000), count).unwrap();
        assert!(transcript(&call(&mut draft).request).contains("characters left out"));
        draft.answered(&says(good_spec()));
        let done = finished(&mut draft);
        assert!(done.markdown.contains("its middle was left out"));
        assert_eq!(done.metadata["request_cut"], json!(true));
    }

    #[test]
    fn searching_is_offered_only_where_another_round_can_be_paid() {
        let mut draft = Draft::new(input());
        draft.squeeze(Tokens(12_000), count).unwrap();
        assert_eq!(call(&mut draft).request.tools.len(), 1);
        let needed = count(&call(&mut draft).request).0 + 4_000;
        draft.squeeze(Tokens(needed), count).unwrap();
        assert_eq!(call(&mut draft).request.tools.len(), 0);
        draft.answered(&says(good_spec()));
        let left_out = finished(&mut draft).metadata["search_left_out"].clone();
        assert!(left_out.as_str().unwrap().contains("no room for a search"), "{left_out}");
    }

    #[test]
    fn numbers_of_passages_that_were_not_shown_cannot_be_cited() {
        let mut draft = Draft::new(DraftInput { passages: many_passages(), ..input() });
        draft.squeeze(Tokens(6_000), count).unwrap();
        let packed = draft.shelf.packed();
        assert!((1..15).contains(&packed));
        let mut answer = good_spec();
        answer["context"] = json!([
            {"text": "topic0 leases", "citations": [1, packed + 1, 99]},
            {"text": "topic0 leases again", "citations": [1]},
        ]);
        draft.answered(&says(answer));
        let done = finished(&mut draft);
        let invalid: Vec<_> = done.metadata["citation_faults"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|fault| fault["fault"] == "invalid")
            .map(|fault| fault["n"].clone())
            .collect();
        assert!(invalid.contains(&json!(packed + 1)) && invalid.contains(&json!(99)), "{invalid:?}");
    }
}
