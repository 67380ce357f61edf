//! How fast `atlas index` is, without embeddings: a first run, a second one that finds nothing changed, and
//! pipelines that teams write in Python, on the same files.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::{machine, process};

/// Pipelines of `index_baseline.py`, and what they are called here.
const PIPELINES: [(&str, &str); 4] = [
    ("characters", "Python: LangChain by characters, rank_bm25"),
    ("tokens", "Python: LangChain by tokens, rank_bm25 (like for like)"),
    ("sentences", "Python: LlamaIndex by sentences, in tokens, bm25s"),
    ("syntax", "Python: LlamaIndex by syntax, in characters, bm25s on disk"),
];
/// How often a running process is looked at.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A folder with sources, such as ~/.cargo/registry/src: its first subfolders are indexed.
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    /// At least so many files, whole subfolders at a time.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    files: usize,
    /// Python with what `index_baseline.txt` lists; without it Atlas is measured alone.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Only these pipelines in Python: characters, tokens, sentences, syntax.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pipelines: Vec<String>,
}

/// One run of a program.
#[derive(Debug)]
struct Run {
    wall: Duration,
    /// User and system time, in seconds.
    cpu: f64,
    /// Resident memory at its highest, in MiB.
    memory: f64,
    stdout: String,
}

pub(crate) fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    let load = machine::load();
    let dir = tempfile::Builder::new().prefix("atlas-bench-").tempdir()?;
    let sources = dir.path().join("sources");
    take(&arguments.folder, &sources, arguments.files)?;

    let atlas = std::env::current_exe()?.parent().context("this program's folder")?.join("atlas");
    let index = |flags: &[&str]| -> anyhow::Result<Run> {
        let mut command = Command::new(&atlas);
        command.arg("index").arg(&sources).args(flags).current_dir(dir.path());
        command.env_clear().env("ATLAS_DATA_DIR", dir.path().join("data"));
        run(command, None)
    };
    let plan = index(&["--dry-run"])?;
    let list: Vec<&str> =
        plan.stdout.lines().filter_map(|line| line.strip_prefix("index")).map(str::trim).collect();
    ensure!(list.len() * 10 > arguments.files * 9, "only {} files would be indexed", list.len());
    let bytes: u64 =
        list.iter().filter_map(|name| fs::metadata(sources.join(name)).ok()).map(|m| m.len()).sum();

    let cold = index(&[])?;
    let chunks = chunks_of(&cold.stdout, list.len())?;
    let unchanged = index(&[])?;
    ensure!(unchanged.stdout.contains("Nothing to do"), "a second run found work: {}", unchanged.stdout);
    let mut baselines = Vec::new();
    let chosen =
        |name: &str| arguments.pipelines.is_empty() || arguments.pipelines.iter().any(|one| one == name);
    for (pipeline, title) in PIPELINES.into_iter().filter(|(name, _)| chosen(name)) {
        let Some(python) = &arguments.python else { break };
        eprintln!("{title} …");
        let mut command = Command::new(python);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("index_baseline.py");
        command.arg(script).arg(pipeline).arg(&sources).stderr(Stdio::null());
        let run = run(command, Some(&list.join("\n")))?;
        let report: Value =
            serde_json::from_str(run.stdout.trim()).with_context(|| format!("the report of {pipeline}"))?;
        ensure!(report["files"] == list.len(), "{pipeline} read other files: {report}");
        baselines.push((title, run, report));
    }
    print(load, list.len(), bytes, chunks, [&cold, &unchanged], &baselines);
    Ok(())
}

fn print(
    load: f64,
    files: usize,
    bytes: u64,
    chunks: u64,
    [cold, unchanged]: [&Run; 2],
    baselines: &[(&str, Run, Value)],
) {
    let megabytes = bytes as f64 / 1e6;
    println!("### Indexing {files} files ({megabytes:.1} MB) without embeddings, embedded\n");
    println!("{} · load before: {load:.1}\n", machine::describe());
    println!("| | Wall | CPU | Files/s | MB/s | Chunks | Chunks/s | MB/s of CPU | Memory, peak |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let line = |name: &str, wall: f64, cpu: f64, memory: f64, chunks: u64| {
        println!(
            "| {name} | {wall:.1} s | {cpu:.1} s | {:.0} | {:.2} | {chunks} | {:.0} | {:.2} | {memory:.0} MiB |",
            files as f64 / wall,
            megabytes / wall,
            chunks as f64 / wall,
            megabytes / cpu,
        );
    };
    line("Atlas, first run", cold.wall.as_secs_f64(), cold.cpu, cold.memory, chunks);
    line("Atlas, nothing changed", unchanged.wall.as_secs_f64(), unchanged.cpu, unchanged.memory, chunks);
    // Without their start and their imports.
    let number = |report: &Value, name: &str| report[name].as_f64().unwrap_or_default();
    for (title, run, report) in baselines {
        let chunks = report["chunks"].as_u64().unwrap_or_default();
        line(title, number(report, "seconds"), number(report, "cpu_seconds"), run.memory, chunks);
    }
    if !baselines.is_empty() {
        println!("\n| Times as fast as | by the clock | by CPU time | a run without changes, by the clock |");
        println!("|---|---|---|---|");
    }
    for (title, _, report) in baselines {
        println!(
            "| {title} | {:.1} | {:.1} | {:.0} |",
            number(report, "seconds") / cold.wall.as_secs_f64(),
            number(report, "cpu_seconds") / cold.cpu,
            number(report, "seconds") / unchanged.wall.as_secs_f64()
        );
    }
    println!(
        "\nNothing changed: {:.1} % of the first run by the clock, {:.1} % of its CPU time.\n",
        unchanged.wall.as_secs_f64() / cold.wall.as_secs_f64() * 100.0,
        unchanged.cpu / cold.cpu * 100.0
    );
}

/// Copies whole subfolders, in the order of their names, until there are enough files.
fn take(folder: &Path, to: &Path, files: usize) -> anyhow::Result<()> {
    let mut all: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| folder.display().to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .collect();
    all.sort();
    let mut copied = 0;
    for from in all {
        copied += copy(&from, &to.join(from.file_name().context("a name")?))?;
        if copied >= files {
            return Ok(());
        }
    }
    bail!("{} has {copied} files in subfolders; {files} are needed", folder.display());
}

/// Copies what has a name that sources have, without links; says how many files.
fn copy(from: &Path, to: &Path) -> anyhow::Result<usize> {
    const SUFFIXES: &[&str] = &[
        "c", "cpp", "go", "h", "html", "java", "js", "json", "md", "py", "rb", "rs", "rst", "sh", "ts", "txt",
    ];
    fs::create_dir_all(to)?;
    let mut copied = 0;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, path) = (entry.file_type()?, entry.path());
        if kind.is_dir() {
            copied += copy(&path, &to.join(entry.file_name()))?;
        } else if kind.is_file()
            && path.extension().is_some_and(|suffix| SUFFIXES.iter().any(|known| suffix == *known))
        {
            fs::copy(&path, to.join(entry.file_name()))?;
            copied += 1;
        }
    }
    Ok(copied)
}

/// The number before " chunks" in the summary, if all files are in it.
fn chunks_of(stdout: &str, files: usize) -> anyhow::Result<u64> {
    let plain = stdout.replace(',', "");
    let numbers: Vec<u64> =
        plain.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    match numbers.as_slice() {
        [indexed, chunks, ..] if *indexed == files as u64 => Ok(*chunks),
        _ => bail!("not all of {files} files were indexed: {stdout}"),
    }
}

/// Runs a program to its end, and looks at it until there.
fn run(mut command: Command, stdin: Option<&str>) -> anyhow::Result<Run> {
    let name = format!("{command:?}");
    let log = tempfile::NamedTempFile::new()?;
    let began = Instant::now();
    let mut child = command
        .stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(log.reopen()?)
        .spawn()
        .with_context(|| format!("{name}: build the workspace with the same profile"))?;
    if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
        pipe.write_all(text.as_bytes())?;
    }
    let (mut cpu, mut memory) = (0.0, 0.0);
    // An ended process keeps its times until it is waited for.
    loop {
        let stat = process::stat(child.id())?;
        cpu = f64::max(cpu, stat.cpu_seconds);
        if stat.has_ended {
            break;
        }
        memory = f64::max(memory, process::peak_resident_mib(child.id()).unwrap_or(0.0));
        thread::sleep(LOOK);
    }
    let wall = began.elapsed();
    let status = child.wait()?;
    let stdout = fs::read_to_string(log.path())?;
    ensure!(status.success(), "{name} ended with {status}: {stdout}");
    Ok(Run { wall, cpu, memory, stdout })
}
