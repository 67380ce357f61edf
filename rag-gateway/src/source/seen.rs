//! What was decided about files when they were read, so that a file that is as it was then is not read again.
//!
//! As git's index does it: a file is as it was when device, inode, size, `mtime` and `ctime` are the same. Nobody can
//! set a `ctime`, so this holds also for edits of the same size whose `mtime` was set back, and for files that another
//! one was renamed over. What remains is said here:
//!
//! - A clock ticks. A file that changed within [`TICK`] before it was read may change again without another `ctime`,
//!   so nothing is remembered of it (git calls such files racily clean).
//! - Only file systems of this machine that are known to keep a true `ctime` are believed ([`KNOWN_FILE_SYSTEMS`]). On
//!   others (FAT, network and FUSE mounts, other systems than Linux) each file is read each time.
//! - A program that writes through a shared mapping changes a file's `ctime` when the kernel notices, which can be
//!   before its last write. Git does not see that either. `atlas index --rebuild` reads every file.
//!
//! What is decided depends on more than the file: on the rules (so on this program: another build starts anew), the
//! limit of size, and whether secrets were overruled for it. All of that is part of what must be the same. Names are
//! judged each time, and failures to read or to take text out are not remembered.
//!
//! The file is replaced as a whole, with a checksum: whatever happens, it is there or it is not, and without it every
//! file is read once. It holds names and hashes, and no text.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, Metadata},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use atlas_shared::gateway_api::content_hash;
use encoding_rs::Encoding;
use serde::{Deserialize, Serialize};

use super::walk::Skip;

/// Clocks of file systems are not coarser than this, with room to spare: FAT has 2 s, Linux' own ones 1 to 10 ms.
const TICK: Duration = Duration::from_secs(2);

/// File systems of Linux that set `ctime` by themselves with each change, and let nobody set it.
const KNOWN_FILE_SYSTEMS: [&str; 10] =
    ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "tmpfs", "overlay"];

/// More files than this are not remembered: about 300 MB.
const MAX_FILES: usize = 1_000_000;

/// Changes when the file is written in another way.
const FORMAT: u32 = 1;

/// What tells whether a file is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stat {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stat {
    /// `None` for what is no regular file, and on systems whose answer is not known to be enough.
    #[cfg(target_os = "linux")]
    pub(super) fn of(metadata: &Metadata) -> Option<Self> {
        use std::os::unix::fs::MetadataExt as _;

        metadata.is_file().then(|| Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn of(_: &Metadata) -> Option<Self> {
        None
    }

    /// The file did not change shortly before `now`, so its next change gives it another stat.
    fn is_settled(&self, now: SystemTime, tick: Duration) -> bool {
        let (Ok(seconds), Ok(nanos)) = (u64::try_from(self.ctime.0), u32::try_from(self.ctime.1)) else {
            return false;
        };
        let changed = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos);
        changed.checked_add(tick).is_some_and(|settled| settled < now)
    }
}

/// What was decided about a file by what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Decision {
    /// Its text is worth indexing.
    Index { hash: String, bytes: u64, encoding: Option<String> },
    /// It is left out.
    Skip { reason: Skip, detail: Option<String> },
}

impl Decision {
    /// The encoding by the name that its decoder has.
    pub(super) fn static_encoding(name: Option<&str>) -> Option<&'static str> {
        Encoding::for_label(name?.as_bytes()).map(Encoding::name)
    }

    /// True for what would be decided again: not where the system, or a limit of time, said no.
    fn lasts(&self) -> bool {
        match self {
            Self::Index { .. } => true,
            Self::Skip { reason, .. } => {
                matches!(reason, Skip::Secret | Skip::Binary | Skip::Minified | Skip::Generated | Skip::Empty)
            }
        }
    }
}

/// A file as it was when it was read.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    source: String,
    stat: Stat,
    /// Secrets were not looked for.
    overruled: bool,
    decision: Decision,
}

/// What all entries depend on. The first line of the file has it, with the checksum of all lines after it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    format: u32,
    root: PathBuf,
    max_file_bytes: u64,
    /// The program that decided.
    program: String,
}

/// Files of one folder that were read before, and what was decided about them.
#[derive(Debug)]
pub struct Seen {
    /// Where it is kept.
    file: PathBuf,
    head: Head,
    /// [`TICK`]; tests wait for the clock itself.
    tick: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<String, Entry>,
    /// Something was learned, or is no longer true.
    changed: bool,
    /// By device: is what it says of its files enough?
    believed: HashMap<u64, bool>,
}

impl Seen {
    /// What is kept in `dir` about the files below `root` that are read with this limit of size. What cannot be read
    /// or was decided by another program is nothing. `None` where nothing can be kept.
    pub fn load(dir: &Path, root: &Path, max_file_bytes: u64) -> Option<Arc<Self>> {
        let seen = Self::empty(dir, root, max_file_bytes)?;
        if let Some(entries) = fs::read_to_string(&seen.file).ok().and_then(|text| seen.parse(&text)) {
            seen.state().entries = entries;
        }
        Some(Arc::new(seen))
    }

    /// Nothing was read before, whatever is kept: every file is read, and remembered.
    pub fn anew(dir: &Path, root: &Path, max_file_bytes: u64) -> Option<Arc<Self>> {
        Self::empty(dir, root, max_file_bytes).map(Arc::new)
    }

    fn empty(dir: &Path, root: &Path, max_file_bytes: u64) -> Option<Self> {
        let name = content_hash(root.to_str()?);
        let head = Head { format: FORMAT, root: root.to_owned(), max_file_bytes, program: program()? };
        let file = dir.join("seen").join(format!("{}.jsonl", &name[..32]));
        Some(Self { file, head, tick: TICK, state: Mutex::default() })
    }

    fn parse(&self, text: &str) -> Option<HashMap<String, Entry>> {
        let (head, lines) = text.split_once('\n')?;
        let (head, checksum): (Head, String) = serde_json::from_str(head).ok()?;
        if head != self.head || checksum != content_hash(lines) {
            return None;
        }
        let entries = lines.lines().map(|line| {
            let entry: Entry = serde_json::from_str(line).ok()?;
            Some((entry.source.clone(), entry))
        });
        entries.collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Entries are put in and taken out whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was decided about this file, if it is as it was then.
    pub(super) fn decision(&self, source: &str, stat: &Stat, overruled: bool) -> Option<Decision> {
        let state = self.state();
        let entry = state.entries.get(source)?;
        (entry.stat == *stat && entry.overruled == overruled).then(|| entry.decision.clone())
    }

    /// Remembers what was decided about a file that had this stat before it was read, which began after `before`.
    pub(super) fn learn(
        &self,
        (path, source): (&Path, &str),
        stat: Option<Stat>,
        before: SystemTime,
        overruled: bool,
        decision: Decision,
    ) {
        let mut state = self.state();
        let Some(stat) = stat.filter(|stat| stat.is_settled(before, self.tick) && decision.lasts()) else {
            state.changed |= state.entries.remove(source).is_some();
            return;
        };
        if state.entries.len() >= MAX_FILES {
            return;
        }
        if *state.believed.entry(stat.dev).or_insert_with(|| is_believed(path)) {
            let entry = Entry { source: source.to_owned(), stat, overruled, decision };
            state.entries.insert(source.to_owned(), entry);
            state.changed = true;
        }
    }

    /// These are all files below the root: what is remembered of others is forgotten.
    pub(super) fn retain(&self, sources: &HashSet<&str>) {
        let mut state = self.state();
        let before = state.entries.len();
        state.entries.retain(|source, _| sources.contains(source.as_str()));
        state.changed |= state.entries.len() < before;
    }

    /// Keeps what was learned, if anything. Blocking. What cannot be kept costs time in the next run, and nothing else.
    pub fn save(&self) -> io::Result<()> {
        let mut state = self.state();
        if !state.changed {
            return Ok(());
        }
        let mut lines = String::new();
        for entry in state.entries.values() {
            lines.push_str(&serde_json::to_string(entry)?);
            lines.push('\n');
        }
        let head = serde_json::to_string(&(&self.head, content_hash(&lines)))?;
        let dir = self.file.parent().unwrap_or(Path::new("."));
        match fs::create_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        writeln!(file, "{head}")?;
        file.write_all(lines.as_bytes())?;
        file.persist(&self.file).map_err(|error| error.error)?;
        state.changed = false;
        Ok(())
    }
}

/// Names this build of this program, as its file system tells it.
#[cfg(unix)]
fn program() -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;

    let path = std::env::current_exe().ok()?;
    let file = fs::metadata(&path).ok()?;
    let times = (file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec());
    Some(format!("{} {} {} {times:?}", env!("CARGO_PKG_VERSION"), path.display(), file.size()))
}

#[cfg(not(unix))]
fn program() -> Option<String> {
    None
}

/// True where the file system that holds this file is one of [`KNOWN_FILE_SYSTEMS`].
fn is_believed(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else { return false };
    fs::read_to_string("/proc/self/mountinfo").is_ok_and(|mounts| {
        file_system_of(&path, &mounts).is_some_and(|name| KNOWN_FILE_SYSTEMS.contains(&name))
    })
}

/// The type of the file system that holds a path, by the table of mounts (`proc_pid_mountinfo(5)`).
fn file_system_of<'m>(path: &Path, mounts: &'m str) -> Option<&'m str> {
    let mut best: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let (mount, kind) = line.split_once(" - ")?;
        let point = unescaped(mount.split(' ').nth(4)?);
        // Of two at the same place, the later one is on top.
        if path.starts_with(&point) && best.is_none_or(|(length, _)| length <= point.len()) {
            best = Some((point.len(), kind.split(' ').next()?));
        }
    }
    best.map(|(_, kind)| kind)
}

/// A place in the table of mounts: spaces, tabs, line ends and backslashes are octal in it.
fn unescaped(place: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(place.to_owned(), |place, (escape, character)| place.replace(escape, character))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use std::{
        fs::{File, FileTimes},
        os::unix::fs::symlink,
    };

    use proptest::prelude::*;

    use super::*;
    use crate::source::walk::{self, Candidate, WalkOptions};

    /// What a table of mounts says of a file system, without its mounting.
    fn mount(point: &str, kind: &str) -> String {
        format!("36 35 98:0 / {point} rw,noatime master:1 - {kind} /dev/root rw\n")
    }

    #[test]
    fn the_file_system_of_a_path_is_that_of_the_nearest_and_latest_mount() {
        let mounts = [
            mount("/", "ext4"),
            mount("/home", "nfs4"),
            mount("/home/me/my\\040disk", "vfat"),
            mount("/data", "vfat"),
            mount("/data", "xfs"),
        ]
        .concat();
        for (path, kind) in [
            ("/etc/hosts", "ext4"),
            ("/homes/a", "ext4"),
            ("/home/a", "nfs4"),
            ("/home/me/my disk/a", "vfat"),
            ("/data/a", "xfs"),
        ] {
            assert_eq!(file_system_of(Path::new(path), &mounts), Some(kind), "{path}");
        }
        assert_eq!(file_system_of(Path::new("/a"), "nonsense"), None);
    }

    /// Folders that are walked again and again, on a file system that is believed; `None` (and said) elsewhere.
    struct Rounds {
        dir: tempfile::TempDir,
        options: WalkOptions,
    }

    impl Rounds {
        fn new() -> Option<Self> {
            let dir = tempfile::tempdir().unwrap();
            if !is_believed(dir.path()) {
                atlas_test_support::skip(
                    "files that were seen",
                    "a file system with a true ctime",
                    "its kind is not known",
                );
                return None;
            }
            fs::create_dir_all(dir.path().join("files")).unwrap();
            fs::create_dir_all(dir.path().join("kept")).unwrap();
            let root = dir.path().join("files").canonicalize().unwrap();
            let options = WalkOptions::of(&root);
            Some(Self { dir, options })
        }

        fn path(&self, name: &str) -> PathBuf {
            self.options.root.join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.path(name), text).unwrap();
        }

        fn load(&self) -> Seen {
            let kept = self.dir.path().join("kept");
            Arc::into_inner(Seen::load(&kept, &self.options.root, 1024 * 1024).unwrap()).unwrap()
        }

        /// A run of its own.
        fn walk(&self) -> Results {
            self.walk_with(self.load())
        }

        /// A run of its own, once the clock has ticked after the last change.
        fn walk_settled(&self) -> Results {
            let ctime = |path: &Path| Stat::of(&fs::metadata(path).unwrap()).unwrap().ctime;
            let probe = self.dir.path().join("probe");
            let last = self.dir.path().join("last");
            fs::write(&last, "last").unwrap();
            loop {
                fs::write(&probe, "probe").unwrap();
                if ctime(&probe) > ctime(&last) {
                    break;
                }
                std::thread::yield_now();
            }
            self.walk_with(Seen { tick: Duration::ZERO, ..self.load() })
        }

        fn walk_with(&self, seen: Seen) -> Results {
            let seen = Arc::new(seen);
            let options = WalkOptions { seen: Some(Arc::clone(&seen)), ..self.options.clone() };
            let walked = walk::walk(&options, |_| {});
            seen.save().unwrap();
            results(walked)
        }

        /// What is true.
        fn walk_all(&self) -> Results {
            results(walk::walk(&self.options, |_| {}))
        }

        fn known(&self) -> usize {
            self.load().state().entries.len()
        }
    }

    /// Files with their hashes, and what was left out.
    type Results = (Vec<(String, String)>, Vec<(String, Skip)>);

    fn results(walked: walk::Walked) -> Results {
        (
            walked.files.into_iter().map(|Candidate { source, hash, .. }| (source, hash)).collect(),
            walked.skipped.into_iter().map(|skipped| (skipped.source, skipped.reason)).collect(),
        )
    }

    #[test]
    fn a_file_that_is_as_it_was_is_not_read_again() {
        let Some(rounds) = Rounds::new() else { return };
        rounds.write("a.md", "text");
        rounds.write("latin.txt", "a");
        fs::write(rounds.path("latin.txt"), b"Gr\xf6\xdfe\n").unwrap();
        rounds.write("b.pb.go", "// Code generated by protoc. DO NOT EDIT.\npackage b");
        let first = rounds.walk_settled();
        assert_eq!(rounds.known(), 3);
        // What is remembered is believed: it says something else here than the files do.
        let seen = rounds.load();
        seen.state().entries.get_mut("a.md").unwrap().decision =
            Decision::Index { hash: "remembered".to_owned(), bytes: 4, encoding: None };
        let options = WalkOptions { seen: Some(Arc::new(seen)), ..rounds.options.clone() };
        let walked = walk::walk(&options, |_| {});
        assert_eq!(walked.files[0].hash, "remembered");
        assert_eq!(walked.files[1].encoding, Some("windows-1252"));
        assert_eq!(walked.skipped[0].reason, Skip::Generated);
        assert_eq!(rounds.walk_all(), first);
    }

    #[test]
    fn of_a_file_that_changed_just_now_nothing_is_remembered() {
        let Some(rounds) = Rounds::new() else { return };
        rounds.write("a.md", "text");
        rounds.walk();
        assert_eq!(rounds.known(), 0, "it may change again within the tick of the clock");
        rounds.walk_settled();
        assert_eq!(rounds.known(), 1);
        rounds.write("a.md", "TEXT");
        assert_eq!(rounds.walk(), rounds.walk_all());
        assert_eq!(rounds.known(), 0);
    }

    #[test]
    fn what_is_remembered_is_of_this_folder_program_and_limit_and_of_files_that_are_there() {
        let Some(rounds) = Rounds::new() else { return };
        rounds.write("a.md", "text");
        rounds.write("b.md", "text");
        rounds.walk_settled();
        let (kept, root) = (rounds.dir.path().join("kept"), rounds.options.root.clone());
        let entries = |seen: Arc<Seen>| seen.state().entries.len();
        assert_eq!(entries(Seen::load(&kept, &root, 1024 * 1024).unwrap()), 2);
        assert_eq!(entries(Seen::load(&kept, &root, 1024).unwrap()), 0);
        assert_eq!(entries(Seen::load(&kept, &root.join("other"), 1024 * 1024).unwrap()), 0);
        assert_eq!(entries(Seen::anew(&kept, &root, 1024 * 1024).unwrap()), 0);

        fs::remove_file(rounds.path("b.md")).unwrap();
        rounds.walk_settled();
        assert_eq!(entries(Seen::load(&kept, &root, 1024 * 1024).unwrap()), 1);

        let file = rounds.load().file;
        let text = fs::read_to_string(&file).unwrap();
        let program = program().unwrap();
        for (what, damaged) in [
            ("cut short", text[..text.len() - 9].to_owned()),
            ("changed", text.replace("a.md", "c.md")),
            ("another program's", text.replace(&program, "atlas 0.0.0")),
            ("empty", String::new()),
        ] {
            fs::write(&file, damaged).unwrap();
            assert_eq!(entries(Seen::load(&kept, &root, 1024 * 1024).unwrap()), 0, "{what}");
        }
    }

    #[test]
    fn a_secret_that_was_overruled_is_one_again_without_the_flag() {
        let Some(mut rounds) = Rounds::new() else { return };
        rounds.write("a.md", &format!("AKIA{}", "ABCDEFGHIJKLMNOP"));
        rounds.options.not_secret = walk::globs(&["*.md".to_owned()]).unwrap();
        assert_eq!(rounds.walk_settled().0.len(), 1);
        rounds.options.not_secret = walk::globs(&[]).unwrap();
        for _ in 0..2 {
            assert_eq!(rounds.walk_settled().1, [("a.md".to_owned(), Skip::Secret)]);
        }
    }

    /// Something that happens to one of a few files.
    #[derive(Clone, Debug)]
    enum Edit {
        /// Written in place, with the same size and its old `mtime`.
        InPlace(usize, u8),
        /// Another file of the same size and `mtime` is renamed over it.
        RenamedOver(usize, u8),
        /// Appended to, with its old `mtime`.
        Appended(usize),
        /// Becomes a link to another file.
        Link(usize, usize),
        /// Becomes a folder with a file in it.
        Folder(usize),
        Removed(usize),
        /// Two of them change places.
        Swapped(usize, usize),
        /// Only its `mtime` changes.
        Touched(usize),
        /// A secret comes into it, of the same size.
        Secret(usize),
        /// All is read, and settled or not.
        Walk(bool),
    }

    fn edits() -> impl Strategy<Value = Vec<Edit>> {
        let (file, byte) = (0..4_usize, b'a'..=b'd');
        let edit = prop_oneof![
            (file.clone(), byte.clone()).prop_map(|(file, byte)| Edit::InPlace(file, byte)),
            (file.clone(), byte).prop_map(|(file, byte)| Edit::RenamedOver(file, byte)),
            file.clone().prop_map(Edit::Appended),
            (file.clone(), file.clone()).prop_map(|(file, to)| Edit::Link(file, to)),
            file.clone().prop_map(Edit::Folder),
            file.clone().prop_map(Edit::Removed),
            (file.clone(), file.clone()).prop_map(|(one, other)| Edit::Swapped(one, other)),
            file.clone().prop_map(Edit::Touched),
            file.prop_map(Edit::Secret),
            any::<bool>().prop_map(Edit::Walk),
        ];
        prop::collection::vec(edit, 1..24)
    }

    fn remove(path: &Path) {
        let _ = fs::remove_file(path);
        let _ = fs::remove_dir_all(path);
    }

    fn apply(rounds: &Rounds, edit: &Edit, old: SystemTime) {
        let path = |file: usize| rounds.path(&format!("f{file}.md"));
        let set_back = |path: &Path| {
            let file = File::options().append(true).open(path).unwrap();
            file.set_times(FileTimes::new().set_modified(old).set_accessed(old)).unwrap();
        };
        let fresh = |path: &Path, text: &[u8]| {
            if path.is_dir() || path.is_symlink() {
                remove(path);
            }
            fs::write(path, text).unwrap();
            set_back(path);
        };
        match *edit {
            Edit::InPlace(file, byte) => fresh(&path(file), &[byte; 20]),
            Edit::RenamedOver(file, byte) => {
                let new = rounds.dir.path().join("new");
                fresh(&new, &[byte; 20]);
                if path(file).is_dir() {
                    remove(&path(file));
                }
                fs::rename(new, path(file)).unwrap();
            }
            Edit::Appended(file) => {
                if path(file).is_file() && !path(file).is_symlink() {
                    let mut open = File::options().append(true).open(path(file)).unwrap();
                    open.write_all(b"more").unwrap();
                    set_back(&path(file));
                }
            }
            Edit::Link(file, to) => {
                remove(&path(file));
                symlink(path(to), path(file)).unwrap();
            }
            Edit::Folder(file) => {
                remove(&path(file));
                fs::create_dir(path(file)).unwrap();
                fs::write(path(file).join("in.md"), b"aaaaaaaaaaaaaaaaaaaa").unwrap();
            }
            Edit::Removed(file) => remove(&path(file)),
            Edit::Swapped(one, other) => {
                let aside = rounds.dir.path().join("aside");
                let moved = fs::rename(path(one), &aside).is_ok();
                let _ = fs::rename(path(other), path(one));
                if moved {
                    remove(&path(other));
                    fs::rename(aside, path(other)).unwrap();
                }
            }
            Edit::Touched(file) => {
                if path(file).is_file() && !path(file).is_symlink() {
                    set_back(&path(file));
                }
            }
            Edit::Secret(file) => fresh(&path(file), format!("AKIA{}", "ABCDEFGHIJKLMNOP").as_bytes()),
            Edit::Walk(_) => {}
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// However files change between runs, also within one tick of the clock, each run says what reading all of them
        /// says.
        #[test]
        fn a_changed_file_is_never_taken_for_unchanged(edits in edits()) {
            let Some(rounds) = Rounds::new() else { return Ok(()) };
            let old = SystemTime::now() - Duration::from_secs(1000);
            for file in 0..4 {
                apply(&rounds, &Edit::InPlace(file, b'a'), old);
            }
            for edit in &edits {
                apply(&rounds, edit, old);
                if let Edit::Walk(settled) = edit {
                    let told = if *settled { rounds.walk_settled() } else { rounds.walk() };
                    prop_assert_eq!(told, rounds.walk_all());
                }
            }
            prop_assert_eq!(rounds.walk(), rounds.walk_all());
        }
    }
}
