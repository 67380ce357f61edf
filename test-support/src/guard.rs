//! Child processes that cannot outlive the test process.
//!
//! A test process that is killed runs no destructor, so the child is started by a small shell that
//! reads from a pipe whose other end the test process holds: when the pipe closes, for whatever
//! reason, the shell kills the child's process group.

use std::{
    ffi::OsStr,
    io,
    path::Path,
    process::{Child, Command, Stdio},
};

/// A guarded child process; ends when this is dropped, or with the test process.
#[derive(Debug)]
pub struct Guarded {
    shell: Child,
}

impl Guarded {
    /// Starts `program` with `args`; `configure` may set environment, folder and output.
    pub fn spawn<S: AsRef<OsStr>>(
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
        configure: impl FnOnce(&mut Command),
    ) -> io::Result<Self> {
        const SCRIPT: &str =
            r#""$@" </dev/null & child=$!; read -r _; kill -9 "$child" 2>/dev/null; kill -9 -$$"#;
        Self::spawn_script(SCRIPT, "guard".as_ref(), program, args, configure)
    }

    /// The same for a program that keeps its files in `folder`, a temporary one: it is asked to end (SIGINT)
    /// and given ten seconds, and the folder is removed, whether or not the test process still lives.
    pub fn spawn_in_folder<S: AsRef<OsStr>>(
        folder: &Path,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
        configure: impl FnOnce(&mut Command),
    ) -> io::Result<Self> {
        const SCRIPT: &str = r#""$@" </dev/null & child=$!; read -r _; kill -INT "$child"
            i=0; while kill -0 "$child" 2>/dev/null && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
            kill -9 "$child" 2>/dev/null; rm -rf -- "$0""#;
        Self::spawn_script(SCRIPT, folder.as_os_str(), program, args, configure)
    }

    fn spawn_script<S: AsRef<OsStr>>(
        script: &str,
        name: &OsStr,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
        configure: impl FnOnce(&mut Command),
    ) -> io::Result<Self> {
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", script]).arg(name).arg(program).args(args);
        configure(&mut command);
        let shell = command.stdin(Stdio::piped()).spawn()?;
        Ok(Self { shell })
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Closing the pipe is what ends the child; waiting only reaps the shell.
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}
