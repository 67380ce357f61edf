//! What every command starts from: how to talk, and the settings.
//!
//! Settings come from, the first wins: a flag, the environment, the file of `--env-file`, the
//! defaults. A `.env` in the current folder is *not* read by itself: `atlas` runs inside other
//! people's repositories, and a cloned `.env` could send your API key to any `OPENAI_BASE_URL`.

use std::path::{Path, PathBuf};

use atlas_shared::{
    Config, ConfigErrors, Env, Secret,
    config::{Process, SETTINGS},
};

use crate::{
    error::{CliError, Result},
    ui::Ui,
};

/// Where the embedded stack keeps its files unless told otherwise.
const DEFAULT_DATA_DIR: &str = ".atlas";

/// Variables that name services. The embedded stack ignores them.
const SERVICES: [&str; 5] =
    ["PUBSUB_PROJECT_ID", "SUPABASE_URL", "QDRANT_URL", "REDIS_URL", "PUBSUB_EMULATOR_HOST"];

/// What every command starts from.
#[derive(Debug)]
pub(crate) struct Context {
    /// How to talk.
    pub(crate) ui: Ui,
    env: Env,
    env_file: Option<PathBuf>,
    data_dir: PathBuf,
}

impl Context {
    /// Collects the settings; validates nothing yet, so that `atlas doctor` can start on broken ones.
    pub(crate) fn new(ui: Ui, env_file: Option<&Path>, data_dir: Option<PathBuf>) -> Result<Self> {
        let mut env = Env::process();
        if let Some(path) = env_file {
            env = with_file(env, path)?;
        }
        if let Some(dir) = data_dir {
            env = env.with("ATLAS_DATA_DIR", dir.display().to_string());
        }
        let env = env.with_default("ATLAS_DATA_DIR", DEFAULT_DATA_DIR);
        let data_dir = PathBuf::from(env.get("ATLAS_DATA_DIR").unwrap_or(DEFAULT_DATA_DIR));
        Ok(Self { ui, env, env_file: env_file.map(Path::to_owned), data_dir })
    }

    /// The settings as they are: services where they are named, embedded adapters elsewhere.
    pub(crate) fn config(&self) -> Result<Config> {
        Ok(self.load()?)
    }

    /// [`Context::config`], with the faults as data.
    pub(crate) fn load(&self) -> Result<Config, ConfigErrors> {
        Config::load(&self.quiet_logs(), Process::Cli)
    }

    /// The settings with every service replaced by its embedded adapter, in the usual data folder.
    pub(crate) fn embedded_config(&self, overrides: &[(&str, String)]) -> Result<Config> {
        let mut env = self.quiet_logs();
        for name in SERVICES {
            // Blank is unset.
            env = env.with(name, "").with(&format!("{name}_FILE"), "");
        }
        for (name, value) in overrides {
            env = env.with(name, value);
        }
        Ok(Config::load(&env, Process::Cli)?)
    }

    /// The variables that [`Context::embedded_config`] ignores here.
    pub(crate) fn ignored_services(&self) -> Vec<&'static str> {
        SERVICES.into_iter().filter(|name| self.is_set(name)).collect()
    }

    /// True when a variable, or its file, is set.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.env.get(name).is_some() || self.env.get(&format!("{name}_FILE")).is_some()
    }

    /// A secret that is no part of [`Config`], from its variable or its file.
    pub(crate) fn secret(&self, name: &str) -> Result<Option<Secret>> {
        if let Some(value) = self.env.get(name) {
            return Ok(Some(Secret::new(value)));
        }
        let Some(path) = self.env.get(&format!("{name}_FILE")) else { return Ok(None) };
        let text = std::fs::read_to_string(path).map_err(|error| {
            CliError::usage(format!("{name}_FILE names {path}, which cannot be read"))
                .because(error)
                .fix("mount the file, or mend its permissions")
        })?;
        Ok(Some(Secret::new(text.trim())).filter(|secret| !secret.expose().is_empty()))
    }

    /// The file that `--env-file` names.
    pub(crate) fn env_file(&self) -> Option<&Path> {
        self.env_file.as_deref()
    }

    /// Folder of the embedded stack.
    pub(crate) fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Logs of services that run inside a command: for people, and only what they must see.
    fn quiet_logs(&self) -> Env {
        let level = if self.ui.verbose { "info" } else { "error" };
        self.env.clone().with_default("LOG_LEVEL", level).with_default("LOG_FORMAT", "text")
    }
}

/// Adds what `path` says, where the environment says nothing. Names that are no settings of Atlas
/// are other programs' business.
fn with_file(mut env: Env, path: &Path) -> Result<Env> {
    let unreadable = |error: &dyn std::fmt::Display| {
        CliError::usage(format!("cannot use the env file {}", path.display()))
            .because(error)
            .fix("write one NAME=value a line; `atlas config env` prints a template")
    };
    for entry in dotenvy::from_path_iter(path).map_err(|error| unreadable(&error))? {
        // A parse error quotes the line, which may hold a secret: say where, not what.
        let (name, value) = entry.map_err(|error| match error {
            dotenvy::Error::LineParse(_, at) => {
                unreadable(&format!("a line is not NAME=value (near character {at})"))
            }
            other => unreadable(&other),
        })?;
        let known = SETTINGS
            .iter()
            .any(|setting| setting.name == name || name.strip_suffix("_FILE") == Some(setting.name));
        if known {
            env = env.with_default(&name, value);
        }
    }
    Ok(env)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_environment_wins_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# comment\nRAG_TOP_K=3\nexport RAG_COLLECTION='docs'\nPATH=/nowhere\n")
            .unwrap();
        let env = with_file(Env::from([("RAG_TOP_K", "7")]), file.path()).unwrap();
        assert_eq!(env.get("RAG_TOP_K"), Some("7"));
        assert_eq!(env.get("RAG_COLLECTION"), Some("docs"));
        assert_eq!(env.get("PATH"), None);
    }

    #[test]
    fn a_broken_line_is_not_quoted_because_it_may_be_a_secret() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "OPENAI_API_KEY sk-very-secret\n").unwrap();
        let error = with_file(Env::default(), file.path()).unwrap_err();
        assert!(!error.to_string().contains("sk-very-secret"), "{error}");
        assert_eq!(error.exit(), crate::error::Exit::Usage);
    }
}
