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
        let stat = fs::read_to_string(self.file("stat")?)?;
        // The name in parentheses may contain spaces; fields are counted after it (proc(5)).
        let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
        let ticks =
            |field: usize| fields.get(field).and_then(|text| text.parse::<f64>().ok()).unwrap_or_default();
        // Fields 14 and 15 of the whole line.
        Ok((ticks(11) + ticks(12)) / TICKS_PER_SECOND)
    }

    /// Resident memory at its highest, in MiB.
    pub(crate) fn peak_resident_mib(&self) -> anyhow::Result<f64> {
        self.memory_mib("VmHWM:")
    }

    /// Resident memory now, in MiB.
    pub(crate) fn resident_mib(&self) -> anyhow::Result<f64> {
        self.memory_mib("VmRSS:")
    }

    fn memory_mib(&self, field: &'static str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(self.file("status")?)?;
        let line = status.lines().find(|line| line.starts_with(field)).context(field)?;
        let kib: f64 = line.split_whitespace().nth(1).context(field)?.parse()?;
        Ok(kib / 1024.0)
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

    fn file(&self, name: &str) -> anyhow::Result<String> {
        let pid =
            self.child.id().with_context(|| format!("{} has ended:\n{}", self.name, self.log_tail()))?;
        Ok(format!("/proc/{pid}/{name}"))
    }
}
