//! `atlas publish`: sends a message and does not wait.

use std::path::PathBuf;

use atlas_shared::{
    Config,
    config::QueueConfig,
    gateway_api::IndexRepository,
    message::{self, Inbound},
};
use atlas_worker::queue::{self, Topics};
use serde_json::{Map, Value, json};

use crate::{
    context::Context,
    error::{CliError, Result},
    request::{Request, read_text},
    stack::running_dev,
};

/// Publish a request and print its task id, without waiting
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  atlas publish \"Design a logging system for microservices\"
  atlas publish --file request.md --metadata collection=shop --metadata tenant=acme
  cat request.md | atlas publish - --metadata priority:=5
  atlas publish --raw '{\"role\":\"architect\",\"msg_type\":\"control\",\"content\":{\"command\":\"heartbeat\"}}'
  atlas publish --docs-added https://git.example/team/shop.git --path docs

Prints the task id: `atlas runs show ID` gives the answer once there is one. A --raw message that
names no task gets a task_id at its end. --docs-added is for workers with INDEX_ON_DOCS_ADDED=true: they
have the gateway index that place, if it may read it (INDEX_ALLOWED_ROOTS, INDEX_ALLOWED_URLS).
With PUBSUB_PROJECT_ID it goes to Pub/Sub, else into the embedded queue of the data folder, where it
waits for `atlas dev`.")]
pub(crate) struct Publish {
    /// The request in words; - reads standard input
    #[arg(required_unless_present_any = ["file", "docs_added"], conflicts_with = "file")]
    text: Option<String>,

    /// Read the request from FILE
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Set a field of `metadata`: NAME=text or NAME:=json; may be given again
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_field, conflicts_with = "raw")]
    metadata: Vec<(String, Value)>,

    /// The text is the whole message, published byte for byte, with a task_id if it has none
    #[arg(long)]
    raw: bool,

    /// With --raw: publish it even if no worker will accept it
    #[arg(long, requires = "raw")]
    unchecked: bool,

    /// Publish instead that REPO (a git URL, or a folder as the gateway sees it) has something to index
    #[arg(long, value_name = "REPO", conflicts_with_all = ["text", "file", "metadata", "raw", "unchecked"])]
    docs_added: Option<String>,

    /// With --docs-added: only this file or folder of it
    #[arg(long, value_name = "PATH", requires = "docs_added")]
    path: Option<String>,

    /// With --docs-added: which collection
    #[arg(long, value_name = "NAME", requires = "docs_added")]
    collection: Option<String>,

    /// Print the task id as JSON
    #[arg(long)]
    json: bool,
}

impl Publish {
    pub(crate) async fn run(self, context: &Context) -> Result<()> {
        let config = queue_config(context)?;
        if let Some(repo) = self.docs_added {
            let (path, collection) = (self.path, self.collection);
            return docs_added(context, &config, &IndexRepository { repo, path, collection }, self.json)
                .await;
        }
        let text = read_text(self.text.as_deref(), self.file.as_deref(), config.worker.max_message_bytes)?;
        let request =
            if self.raw { Request::raw(text) } else { Request::chat(&text, Map::from_iter(self.metadata)) };
        if !self.unchecked {
            check(&request, config.worker.max_message_bytes)?;
        }
        let task_id = request.publish(&config).await?;
        if self.json {
            context.ui.json(&json!({ "task_id": task_id }))?;
        } else if let Some(task_id) = task_id {
            context.ui.out(task_id);
        } else {
            context.ui.note("Published. The message names no task, so there is no id to print.");
        }
        if matches!(config.queue, QueueConfig::Embedded(_)) && running_dev(context).await.is_none() {
            context.ui.note("It waits in the embedded queue: `atlas dev` serves it.");
        }
        Ok(())
    }
}

async fn docs_added(context: &Context, config: &Config, what: &IndexRepository, json: bool) -> Result<()> {
    let data = serde_json::to_vec(what)
        .map_err(|error| CliError::usage("this cannot be put into a message").because(error))?;
    let topic = Topics::of(config).documents;
    queue::open_publisher(config).await?.publish(&topic, data.into(), Vec::new()).await?;
    if json {
        context.ui.json(&json!({ "topic": topic }))?;
    }
    context.ui.note(format_args!("Published to {topic}, which workers with INDEX_ON_DOCS_ADDED=true read."));
    if matches!(config.queue, QueueConfig::Embedded(_)) && running_dev(context).await.is_none() {
        context.ui.note("An embedded queue keeps it only where `atlas dev` has read that topic before.");
    }
    Ok(())
}

/// The settings for publishing: Pub/Sub where it is named, the embedded queue otherwise.
pub(crate) fn queue_config(context: &Context) -> Result<Config> {
    if context.is_set("PUBSUB_PROJECT_ID") { context.config() } else { context.embedded_config(&[]) }
}

/// Says at once what a worker would say later.
fn check(request: &Request, max_bytes: usize) -> Result<()> {
    match message::parse(&request.data, "unpublished", max_bytes) {
        Ok(Inbound::Chat(_) | Inbound::Control(_)) => Ok(()),
        Ok(Inbound::OtherRole { role }) => {
            Err(CliError::usage("no worker of Atlas would answer this message")
                .because(format_args!("its role is {role:?}, not \"architect\""))
                .fix("set \"role\": \"architect\", or publish it all the same with --unchecked"))
        }
        Err(rejection) => Err(CliError::usage("a worker would refuse this message")
            .because(rejection)
            .fix("mend it, or (with --raw) publish it all the same with --unchecked")),
    }
}

/// `name=text` or `name:=json`.
fn parse_field(text: &str) -> std::result::Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE, or NAME:=JSON")?;
    match name.strip_suffix(':') {
        Some(name) => serde_json::from_str(value)
            .map(|value| (name.to_owned(), value))
            .map_err(|error| format!("{value:?} is not JSON: {error}")),
        None if name.is_empty() => Err("the name is missing: write NAME=VALUE".to_owned()),
        None => Ok((name.to_owned(), Value::String(value.to_owned()))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn metadata_is_text_unless_it_is_said_to_be_json() {
        assert_eq!(parse_field("tenant=acme").unwrap(), ("tenant".to_owned(), json!("acme")));
        assert_eq!(parse_field("note=a=b").unwrap(), ("note".to_owned(), json!("a=b")));
        assert_eq!(parse_field("priority:=5").unwrap(), ("priority".to_owned(), json!(5)));
        assert!(parse_field("priority:=x").is_err());
        assert!(parse_field("priority").is_err());
        assert!(parse_field("=x").is_err());
    }

    #[test]
    fn what_a_worker_would_refuse_is_refused_here() {
        let refused = |text: &'static str| check(&Request::raw(text), 1024).unwrap_err().to_string();
        assert!(refused("nonsense").contains("not JSON"));
        assert!(refused(r#"{"role":"chef"}"#).contains("chef"));
        assert!(check(&Request::chat("Design it", Map::new()), 1024).is_ok());
    }
}
