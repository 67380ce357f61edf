//! Child processes that cannot outlive the test process.
//!
//! A test process that is killed runs no destructor, so the child is started by a small shell that
//! reads from a pipe whose other end the test process holds: when the pipe closes, for whatever
//! reason, the shell kills the child's process group.

use std::{
    ffi::OsStr,
    io,
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
        let mut command = Command::new("setsid");
        command
            .args([
                "sh",
                "-c",
                r#""$@" </dev/null & child=$!; read -r _; kill -9 "$child" 2>/dev/null; kill -9 -$$"#,
                "guard",
            ])
            .arg(program)
            .args(args);
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
