//! One process at a time owns a data folder: the embedded engines allow no more, and a second
//! command is told who has it instead of failing somewhere inside.
//!
//! `dev.lock` is held for as long as the owner lives (the kernel lets go of it when the process
//! dies, however it dies), and its content says where the owner's gateway listens, so that other
//! commands use the running stack.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::error::{CliError, Result};

/// What the owner of a data folder says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    /// The command that runs: `dev`, `ask`, `index`, ….
    pub(crate) command: String,
    /// Its process.
    pub(crate) pid: u32,
    /// Its gateway; `None` while it starts.
    pub(crate) gateway: Option<Url>,
    /// Its worker's probes, if it runs a worker.
    pub(crate) worker: Option<Url>,
}

impl Owner {
    /// True for a stack that stays: other commands may rely on it.
    pub(crate) fn stays(&self) -> bool {
        self.command == "dev"
    }
}

/// A data folder that is ours until this is dropped.
#[derive(Debug)]
pub(crate) struct DataDirLock {
    file: File,
    path: PathBuf,
    owner: Owner,
}

impl DataDirLock {
    /// Takes the folder for `command`, or gives its owner. Creates the folder, readable by its owner
    /// only: it holds requests and answers.
    pub(crate) fn try_acquire(
        data_dir: &Path,
        command: &str,
    ) -> Result<std::result::Result<Self, Option<Owner>>> {
        let path = lock_path(data_dir);
        let unusable = |error: &dyn std::fmt::Display| {
            CliError::failure(format!("cannot use the data folder {}", data_dir.display()))
                .because(error)
                .fix("mend its permissions, or name another one with --data-dir")
        };
        create_private_dir(data_dir).map_err(|error| unusable(&error))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| unusable(&error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Err(read_owner(&path))),
            Err(TryLockError::Error(error)) => return Err(unusable(&error)),
        }
        let owner =
            Owner { command: command.to_owned(), pid: std::process::id(), gateway: None, worker: None };
        let mut lock = Self { file, path, owner };
        lock.write()?;
        Ok(Ok(lock))
    }

    /// Tells other commands where the stack listens.
    pub(crate) fn announce(&mut self, gateway: Option<Url>, worker: Option<Url>) -> Result<()> {
        self.owner.gateway = gateway;
        self.owner.worker = worker;
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        let text = serde_json::to_string(&self.owner)
            .map_err(|error| CliError::failure("cannot describe this process").because(error))?;
        let write = || {
            (&self.file).rewind()?;
            (&self.file).write_all(text.as_bytes())?;
            self.file.set_len(text.len() as u64)?;
            (&self.file).flush()
        };
        write().map_err(|error| {
            CliError::failure(format!("cannot write {}", self.path.display()))
                .because(error)
                .fix("check that the disk is not full (atlas doctor)")
        })
    }
}

/// Who owns the folder now. `None`: nobody, or nobody knows (the owner is just starting).
pub(crate) fn owner_of(data_dir: &Path) -> Option<Owner> {
    let path = lock_path(data_dir);
    let file = File::open(&path).ok()?;
    match file.try_lock_shared() {
        // Free: what it says is about a process that is gone.
        Ok(()) => None,
        Err(_) => read_owner(&path),
    }
}

/// Waits, bounded, until the running owner says where its gateway listens.
pub(crate) async fn ready_owner(data_dir: &Path, bound: Duration) -> Option<Owner> {
    let deadline = tokio::time::Instant::now() + bound;
    loop {
        let owner = owner_of(data_dir)?;
        if owner.gateway.is_some() || tokio::time::Instant::now() >= deadline {
            return Some(owner);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn lock_path(data_dir: &Path) -> PathBuf {
    data_dir.join("dev.lock")
}

fn read_owner(path: &Path) -> Option<Owner> {
    let mut text = String::new();
    // Bounded: the file is ours, but anybody could have put something there.
    File::open(path).ok()?.take(4096).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn create_private_dir(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;

    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // Its content is nobody's source code: keep it out of commits, wherever the folder stands.
    fs::write(dir.join(".gitignore"), "*\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_second_command_is_told_who_owns_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join(".atlas");
        assert_eq!(owner_of(&data_dir), None);

        let mut lock = DataDirLock::try_acquire(&data_dir, "dev").unwrap().unwrap();
        let url: Url = "http://127.0.0.1:8501/".parse().unwrap();
        lock.announce(Some(url.clone()), None).unwrap();

        let owner = DataDirLock::try_acquire(&data_dir, "index").unwrap().unwrap_err().unwrap();
        assert_eq!(owner.command, "dev");
        assert_eq!(owner.gateway, Some(url));
        assert!(owner.stays());
        assert_eq!(owner_of(&data_dir), Some(owner));

        drop(lock);
        assert_eq!(owner_of(&data_dir), None, "what a dead process left behind is not believed");
        let next = DataDirLock::try_acquire(&data_dir, "index").unwrap().unwrap();
        assert_eq!(next.owner.gateway, None);
    }

    #[test]
    fn a_shorter_announcement_leaves_no_rest_of_a_longer_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut lock = DataDirLock::try_acquire(dir.path(), "dev").unwrap().unwrap();
        lock.announce(Some("http://127.0.0.1:12345/".parse().unwrap()), None).unwrap();
        lock.announce(None, None).unwrap();
        assert_eq!(owner_of(dir.path()).unwrap(), lock.owner);
    }

    #[test]
    fn the_data_folder_keeps_itself_out_of_git_and_of_other_users_sight() {
        use std::os::unix::fs::PermissionsExt as _;

        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("a/.atlas");
        let _lock = DataDirLock::try_acquire(&data_dir, "dev").unwrap().unwrap();
        assert_eq!(fs::read_to_string(data_dir.join(".gitignore")).unwrap(), "*\n");
        assert_eq!(fs::metadata(&data_dir).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
