//! What a command says when it fails: what happened, why, and what to do.

use std::{fmt, process::ExitCode};

use atlas_shared::{ConfigErrors, UpstreamError, ledger::LedgerError};

/// The result of a command.
pub(crate) type Result<T, E = CliError> = std::result::Result<T, E>;

/// How the process ends. Documented in `atlas --help`; scripts rely on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 1: it was tried and failed.
    Failure,
    /// 2: the command line or the configuration is wrong; nothing was tried.
    Usage,
    /// 130: stopped by Ctrl-C, in a state from which the same command goes on.
    Interrupted,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Failure => 1,
            Exit::Usage => 2,
            Exit::Interrupted => 130,
        })
    }
}

/// A failed command, for a person.
#[derive(Debug)]
pub(crate) struct CliError {
    what: String,
    why: Option<String>,
    fixes: Vec<String>,
    exit: Exit,
}

impl CliError {
    /// Something was tried and failed.
    pub(crate) fn failure(what: impl Into<String>) -> Self {
        Self { what: what.into(), why: None, fixes: Vec::new(), exit: Exit::Failure }
    }

    /// The command line or the configuration is wrong.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, ..Self::failure(what) }
    }

    /// The user stopped it.
    pub(crate) fn interrupted(what: impl Into<String>) -> Self {
        Self { exit: Exit::Interrupted, ..Self::failure(what) }
    }

    /// Adds the cause.
    #[must_use]
    pub(crate) fn because(mut self, why: impl fmt::Display) -> Self {
        self.why = Some(why.to_string());
        self
    }

    /// Adds something to do about it.
    #[must_use]
    pub(crate) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fixes.push(fix.into());
        self
    }

    /// How the process ends.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(why) = &self.why {
            write!(f, "\n  why: {}", why.trim_end().replace('\n', "\n       "))?;
        }
        for fix in &self.fixes {
            write!(f, "\n  fix: {}", fix.replace('\n', "\n       "))?;
        }
        Ok(())
    }
}

impl std::error::Error for CliError {}

impl From<ConfigErrors> for CliError {
    fn from(errors: ConfigErrors) -> Self {
        // The list itself says why and what to do, variable by variable.
        Self::usage(errors.to_string()).fix("look at everything at once: atlas doctor")
    }
}

impl From<UpstreamError> for CliError {
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::Transient { dependency, message, .. } => {
                Self::failure(format!("{dependency} does not answer as it should"))
                    .because(message)
                    .fix("try again in a moment; `atlas doctor` checks every dependency")
            }
            UpstreamError::Permanent { dependency, code, message } => {
                Self::failure(format!("{dependency} refused the request ({code})")).because(message)
            }
            UpstreamError::Misconfigured { dependency, variable, message, fix } => {
                Self::usage(format!("{dependency}: {message}")).fix(format!("{variable}: {fix}"))
            }
        }
    }
}

impl From<LedgerError> for CliError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Upstream(error) => error.into(),
            fenced @ LedgerError::Fenced { .. } => Self::failure(fenced.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use atlas_shared::Dependency;

    use super::*;

    #[test]
    fn an_error_says_what_why_and_what_to_do() {
        let error = CliError::failure("cannot read notes.md")
            .because("permission denied\n(os error 13)")
            .fix("chmod u+r notes.md");
        assert_eq!(
            error.to_string(),
            "cannot read notes.md\n  why: permission denied\n       (os error 13)\n  fix: chmod u+r notes.md"
        );
    }

    #[test]
    fn a_misconfigured_upstream_names_the_variable_and_ends_with_2() {
        let error = CliError::from(UpstreamError::misconfigured(
            Dependency::Store,
            "SUPABASE_URL",
            "there are no tables",
            "run `atlas migrate up`",
        ));
        assert_eq!(error.exit(), Exit::Usage);
        assert_eq!(
            error.to_string(),
            "store: there are no tables\n  fix: SUPABASE_URL: run `atlas migrate up`"
        );
    }
}
