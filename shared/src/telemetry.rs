//! Logs: one JSON object a line, or text for people, on standard error (standard output belongs to
//! what the `atlas` command prints).
//!
//! A line is flat: `timestamp`, `level`, `target`, `message`, then the fields of the enclosing spans
//! (`task_id`, `trace_id`, …), then the event's own fields (`error_code`, …). The innermost value of
//! a name wins. The message reads alone; values are fields.

use std::{fmt, io::IsTerminal as _};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tracing::{Event, Subscriber, field};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::{JsonFields, Writer},
    },
    layer::SubscriberExt as _,
    registry::{LookupSpan, Scope},
    util::SubscriberInitExt as _,
};

use crate::config::{ConfigError, ConfigErrors, LogConfig};

/// Libraries that log on their own what we handle and report ourselves: each failure is logged once,
/// where it is handled. (async-openai would log whole answers.) `LOG_LEVEL` may name them to get them back.
const QUIET: &[&str] = &[
    "async_openai=off",
    "h2=warn",
    "hyper=warn",
    "hyper_util=warn",
    "qdrant_edge=error",
    "rustls=warn",
    "tower=warn",
];

/// Starts logging for this process. Safe to call again (several components in one process): the
/// first call wins, later ones only check their filter.
///
/// An invalid `LOG_LEVEL` is an error that names it.
pub fn init(config: &LogConfig) -> Result<(), ConfigErrors> {
    let filter = filter(&config.filter)?;
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = if config.json {
        layer.event_format(FlatJson).fmt_fields(JsonFields::new()).with_filter(filter).boxed()
    } else {
        layer.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed()
    };
    // Already initialised: by another component of this process, or by a test.
    let _ = tracing_subscriber::registry().with(layer).try_init();
    Ok(())
}

fn filter(text: &str) -> Result<EnvFilter, ConfigErrors> {
    let fault = |problem: String| {
        ConfigErrors(vec![ConfigError {
            variable: "LOG_LEVEL",
            problem,
            fix: "set a level (error, warn, info, debug, trace), or a filter such as info,atlas_worker=debug"
                .to_owned(),
        }])
    };
    // A bare word that is no level is taken for a target by the parser, so that LOG_LEVEL=inof would
    // silently mean "everything of target inof, nothing else".
    if let Some(word) = text.split(',').map(str::trim).find(|part| {
        !part.is_empty()
            && !part.contains(['=', '[', ':'])
            && part.parse::<tracing_subscriber::filter::LevelFilter>().is_err()
    }) {
        return Err(fault(format!("{word:?} is not a log level")));
    }
    let mut directives: Vec<&str> = QUIET
        .iter()
        .copied()
        .filter(|quiet| quiet.split('=').next().is_none_or(|target| !text.contains(target)))
        .collect();
    if !text.trim().is_empty() {
        directives.push(text);
    }
    EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
        .parse(directives.join(","))
        .map_err(|error| fault(format!("{text:?} is not a log filter: {error}")))
}

/// The JSON format; see the module's documentation.
struct FlatJson;

impl<S, N> FormatEvent<S, N> for FlatJson
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Map::new();
        let metadata = event.metadata();
        line.insert("timestamp".to_owned(), Timestamp::now().to_string().into());
        line.insert("level".to_owned(), metadata.level().as_str().to_ascii_lowercase().into());
        line.insert("target".to_owned(), metadata.target().into());
        line.insert("message".to_owned(), Value::Null);
        for span in context.event_scope().into_iter().flat_map(Scope::from_root) {
            // The fields were formatted once, as JSON, when the span was made.
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<N>>()
                && let Ok(fields) = serde_json::from_str::<Map<String, Value>>(fields)
            {
                line.extend(fields);
            }
        }
        event.record(&mut Fields(&mut line));
        writeln!(writer, "{}", Value::Object(line))
    }
}

/// Collects an event's fields.
struct Fields<'a>(&'a mut Map<String, Value>);

impl Fields<'_> {
    fn set(&mut self, field: &field::Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.set(field, value);
    }

    fn record_bool(&mut self, field: &field::Field, value: bool) {
        self.set(field, value);
    }

    fn record_i64(&mut self, field: &field::Field, value: i64) {
        self.set(field, value);
    }

    fn record_u64(&mut self, field: &field::Field, value: u64) {
        self.set(field, value);
    }

    fn record_f64(&mut self, field: &field::Field, value: f64) {
        self.set(field, value);
    }

    fn record_error(&mut self, field: &field::Field, value: &(dyn std::error::Error + 'static)) {
        self.set(field, value.to_string());
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(work: impl FnOnce()) -> Vec<Value> {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::registry().with(
            tracing_subscriber::fmt::layer()
                .event_format(FlatJson)
                .fmt_fields(JsonFields::new())
                .with_writer(move || writer.clone()),
        );
        tracing::subscriber::with_default(subscriber, work);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_line_is_flat_and_carries_the_fields_of_its_spans() {
        let lines = logged(|| {
            let run = tracing::info_span!("run", task_id = "t-1", attempt = 2);
            let _run = run.enter();
            let call = tracing::info_span!("call", attempt = 3, later = field::Empty);
            call.record("later", "filled in");
            let _call = call.enter();
            tracing::warn!(error_code = "too_long", tokens = 7_u64, "the model refused {}", "it");
        });
        let [line] = lines.as_slice() else { unreachable!("one line, not {lines:?}") };
        assert_eq!(line["level"], "warn");
        assert_eq!(line["message"], "the model refused it");
        assert_eq!(line["task_id"], "t-1");
        assert_eq!(line["attempt"], 3, "the innermost value wins");
        assert_eq!(line["later"], "filled in");
        assert_eq!(line["error_code"], "too_long");
        assert_eq!(line["tokens"], 7);
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn a_line_break_in_a_value_does_not_break_the_line() {
        let lines = logged(|| tracing::error!(raw = "a\n{\"level\":\"info\"}", "bad input"));
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["raw"], "a\n{\"level\":\"info\"}");
    }

    #[test]
    fn a_wrong_filter_names_the_variable() {
        for bad in ["inof", "info,atlas_worker=loud", "=,="] {
            let error = init(&LogConfig { filter: bad.to_owned(), json: true }).unwrap_err();
            assert_eq!(error.0[0].variable, "LOG_LEVEL", "{bad}");
        }
    }

    #[test]
    fn starting_twice_is_fine() {
        for json in [true, false] {
            init(&LogConfig { filter: "info,atlas_worker=debug".to_owned(), json }).unwrap();
        }
        init(&LogConfig { filter: String::new(), json: true }).unwrap();
    }
}
