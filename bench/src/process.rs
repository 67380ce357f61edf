//! Processes under measurement: started beside us, killed with us, read through `/proc`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::process::{Child, Command};

/// Clock ticks a second of `/proc/<pid>/stat` on Linux (`USER_HZ`, fixed by its ABI).
const TICKS_PER_SECOND: f64 = 100.0;
/// Nothing takes longer to be ready.
const READY_BOUND: Duration = Duration::from_mins(1);

/// One running process.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a binary that stands beside this one. Its output goes to `dir`.
    pub(crate) fn start(
        binary: &str,
        args: &[String],
        env: impl IntoIterator<Item = (String, String)>,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let own = std::env::current_exe()?;
        let path = own.parent().context("this program's folder")?.join(binary);
        let log = dir.join(format!("{binary}.log"));
        let output = fs::File::create(&log)?;
        let child = Command::new(&path)
            .args(args)
            .envs(env)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{}: build the workspace with the same profile", path.display()))?;
        Ok(Self { name: binary.to_owned(), child, log })
    }

    /// Waits until `url` answers 200.
    pub(crate) async fn ready(&mut self, url: &str) -> anyhow::Result<()> {
        let answers = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            loop {
                ticks.tick().await;
                if reqwest::get(url).await.is_ok_and(|answer| answer.status().is_success()) {
                    return;
                }
            }
        };
        if tokio::time::timeout(READY_BOUND, answers).await.is_err() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            bail!("{} is not ready at {url}:\n{log}", self.name);
        }
        Ok(())
    }

    /// User and system time so far, in seconds.
    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        Ok(stat(self.pid()?)?.cpu_seconds)
    }

    /// Resident memory at its highest, in MiB.
    pub(crate) fn peak_resident_mib(&self) -> anyhow::Result<f64> {
        peak_resident_mib(self.pid()?)
    }

    /// Resident memory now, in MiB.
    pub(crate) fn resident_mib(&self) -> anyhow::Result<f64> {
        memory_mib(self.pid()?, "VmRSS:")
    }

    /// Ends it as a supervisor would, and waits until it has.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        let pid = self.child.id().with_context(|| format!("{} has ended", self.name))?;
        let told = Command::new("kill").arg(pid.to_string()).status().await?;
        anyhow::ensure!(told.success(), "{} cannot be told to stop", self.name);
        tokio::time::timeout(READY_BOUND, self.child.wait()).await.context("it does not stop")??;
        Ok(())
    }

    /// The last lines it wrote.
    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
    }

    fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().with_context(|| format!("{} has ended:\n{}", self.name, self.log_tail()))
    }
}

/// What `/proc/<pid>/stat` says of a process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    /// It has ended, and is not waited for yet.
    pub(crate) has_ended: bool,
    /// User and system time so far, in seconds; an ended process keeps it until it is waited for.
    pub(crate) cpu_seconds: f64,
}

pub(crate) fn stat(pid: u32) -> anyhow::Result<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
}

fn parse_stat(line: &str) -> anyhow::Result<Stat> {
    // The name in parentheses may contain spaces and parentheses; fields are counted after it (proc(5)).
    let fields: Vec<&str> = line.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied().context("stat");
    let ticks = field(14)?.parse::<f64>()? + field(15)?.parse::<f64>()?;
    Ok(Stat { has_ended: field(3)? == "Z", cpu_seconds: ticks / TICKS_PER_SECOND })
}

/// Resident memory at its highest, in MiB. An ended process has none.
pub(crate) fn peak_resident_mib(pid: u32) -> anyhow::Result<f64> {
    memory_mib(pid, "VmHWM:")
}

fn memory_mib(pid: u32, field: &'static str) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with(field)).context(field)?;
    let kib: f64 = line.split_whitespace().nth(1).context(field)?.parse()?;
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_after_the_name() -> anyhow::Result<()> {
        let line = "42 (a ) name) Z 1 42 42 0 -1 4194560 0 0 0 0 150 25 0 0 20 0 1 0";
        let Stat { has_ended, cpu_seconds } = parse_stat(line)?;
        assert!(has_ended && (cpu_seconds - 1.75).abs() < 1e-9);
        assert!(parse_stat("42 (name) R 1").is_err());
        let own = std::process::id();
        assert!(!stat(own)?.has_ended && peak_resident_mib(own)? > 0.0);
        Ok(())
    }
}
