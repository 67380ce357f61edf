//! Child processes that cannot outlive the test process.
//!
//! A test process that is killed runs no destructor, so the child is started by a small shell that
//! reads from a pipe whose other end the test process holds: when the pipe closes, for whatever
//! reason, the shell kills the child's process group. What is written to the pipe is the name of a signal
//! for the child, or `wait FILE`: then the shell writes the child's exit code to the file when it ends.

use std::{
    ffi::OsStr,
    io::{self, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
};

/// A guarded child process; ends when this is dropped, or with the test process. Once it is dropped the
/// child is gone, with its ports and its process id: the next one may take them.
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
        const SCRIPT: &str = r#""$@" </dev/null & child=$!
            while read -r word file; do case $word in
                wait) wait "$child"; echo $? >"$file" ;;
                *) kill -s "$word" "$child" 2>/dev/null ;;
            esac; done
            kill -9 "$child" 2>/dev/null; wait "$child"; kill -9 -$$"#;
        Self::spawn_script(SCRIPT, "guard".as_ref(), program, args, configure)
    }

    /// Removes `folder` when this is dropped, or with the test process.
    pub fn remove_folder_later(folder: &Path) -> io::Result<Self> {
        const SCRIPT: &str = r#"read -r _; rm -rf -- "$0" || { sleep 1; rm -rf -- "$0"; }"#;
        Self::spawn_script(SCRIPT, folder.as_os_str(), "", [""; 0], |_| {})
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
            kill -9 "$child" 2>/dev/null; wait "$child"; rm -rf -- "$0""#;
        Self::spawn_script(SCRIPT, folder.as_os_str(), program, args, configure)
    }

    /// Sends the child a signal, by its name without `SIG`: `TERM`, `STOP`, `CONT`.
    ///
    /// For children of [`Guarded::spawn`].
    pub fn signal(&mut self, name: &str) -> io::Result<()> {
        self.say(name)
    }

    /// Lets the child's exit code appear in `file` once it has ended. Signals after this are not
    /// delivered before that.
    ///
    /// For children of [`Guarded::spawn`].
    pub fn report_exit(&mut self, file: &Path) -> io::Result<()> {
        self.say(&format!("wait {}", file.display()))
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        let pipe = self.shell.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        writeln!(pipe, "{line}")
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
