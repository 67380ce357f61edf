//! Runs the `atlas` binary the way a user does, in a folder of its own.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use atlas_test_support::guard::Guarded;
use serde_json::Value;

/// Longer than anything a test waits for.
pub(crate) const BOUND: Duration = Duration::from_secs(120);

/// A folder with files, in which commands run without any setting of the machine.
pub(crate) struct Sandbox {
    dir: tempfile::TempDir,
    env: Vec<(String, String)>,
}

/// A finished command.
pub(crate) struct Ran {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) code: Option<i32>,
}

impl Sandbox {
    pub(crate) fn new(files: &[(&str, &str)]) -> Self {
        let sandbox = Self { dir: tempfile::tempdir().unwrap(), env: Vec::new() };
        for (name, text) in files {
            sandbox.write(name, text);
        }
        sandbox
    }

    pub(crate) fn with_env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn path(&self) -> PathBuf {
        // `/tmp` may be a link; commands print the real path.
        self.dir.path().canonicalize().unwrap()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        fs::remove_file(self.dir.path().join(name)).unwrap();
    }

    /// Runs a command to its end. `timeout` ends it even if this process dies.
    pub(crate) fn atlas(&self, args: &[&str]) -> Ran {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", &BOUND.as_secs().to_string(), env!("CARGO_BIN_EXE_atlas")])
            .args(args);
        self.prepare(&mut command);
        let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
        Ran {
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
            code: status.code(),
        }
    }

    /// Starts a command that goes on; its output and its process id are in files of the sandbox.
    pub(crate) fn start(&self, name: &str, args: &[&str]) -> Background {
        let file = |end: &str| self.dir.path().join(format!(".{name}.{end}"));
        let (pid, code, log) = (file("pid"), file("code"), file("log"));
        // Standard output and error together, as a terminal shows them; the exit code when it ends.
        let script = r#"log=$1 pid=$2 code=$3; shift 3
            "$@" >"$log" 2>&1 & echo $! >"$pid"; wait $!; echo $? >"$code.new"; mv "$code.new" "$code""#;
        let guard = Guarded::spawn(
            "bash",
            ["-c", script, "run"]
                .into_iter()
                .map(Into::into)
                .chain([log.clone().into_os_string(), pid.clone().into(), code.clone().into()])
                .chain([env!("CARGO_BIN_EXE_atlas").into()])
                .chain(args.iter().map(std::ffi::OsString::from)),
            |command| self.prepare(command),
        )
        .unwrap();
        Background { guard, pid, code, log }
    }

    fn prepare(&self, command: &mut Command) {
        command.env_clear().current_dir(self.dir.path());
        // LLVM_PROFILE_FILE: so that a coverage run sees what the binary does.
        for name in ["PATH", "HOME", "TMPDIR", "LLVM_PROFILE_FILE"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("NO_COLOR", "1").envs(self.env.iter().map(|(name, value)| (name, value)));
    }
}

impl Ran {
    /// Fails the test unless the command did.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {}", self.stdout))
    }
}

/// A command that goes on. Killed when dropped.
pub(crate) struct Background {
    guard: Guarded,
    pid: PathBuf,
    code: PathBuf,
    log: PathBuf,
}

impl Background {
    /// Everything it printed so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has printed this.
    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) -> String {
        wait(&format!("{text:?}"), || {
            let log = self.log();
            assert!(!self.code.exists() || log.contains(text), "it ended without {text:?}:\n{log}");
            log.contains(text).then_some(log)
        })
    }

    /// Sends a signal to the command itself.
    pub(crate) fn signal(&self, signal: &str) {
        let pid =
            wait("its process id", || fs::read_to_string(&self.pid).ok().filter(|pid| pid.ends_with('\n')));
        let sent = Command::new("kill").args(["-s", signal, pid.trim()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for its end and gives its exit code.
    #[track_caller]
    pub(crate) fn exit_code(&self) -> i32 {
        let code = wait("its end", || fs::read_to_string(&self.code).ok());
        code.trim().parse().unwrap()
    }
}

/// Looks until there is something, bounded.
#[track_caller]
pub(crate) fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < BOUND, "waited {} s for {what}", BOUND.as_secs());
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Checks every citation of an answer against the files below `root`, independently of the binary.
#[track_caller]
pub(crate) fn assert_citations_hold(root: &Path, answer: &Value) -> usize {
    let citations = answer["metadata"]["citations"].as_array().expect("citations");
    for citation in citations {
        let source = citation["source"].as_str().unwrap();
        let text = fs::read_to_string(root.join(source)).unwrap();
        let line = |name: &str| usize::try_from(citation[name].as_u64().unwrap()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let cited = lines[line("start_line") - 1..line("end_line")].join("\n");
        assert_eq!(
            citation["text_hash"],
            atlas_shared::gateway_api::quote_hash(&cited),
            "{citation} does not hold"
        );
    }
    citations.len()
}
