//! Supabase in miniature: a private Postgres, the migrations of this repository, and a
//! PostgREST-compatible server (`postrust`) at `/rest/v1`.
//!
//! One Postgres serves all tests of a process; each [`Supabase`] is a database of its own in it, copied
//! from a migrated template, so tests neither wait for each other nor see each other's rows.

use std::{
    ffi::{OsStr, OsString},
    io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use axum::Router;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};
use tokio::{sync::OnceCell, task::JoinHandle};
use tokio_postgres::NoTls;

use crate::{free_port, guard::Guarded};

/// How long Postgres may take to come up.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// How long the processes of a killed server may take to vanish.
const GONE_TIMEOUT: Duration = Duration::from_secs(20);

/// The database that every [`Supabase`] is a copy of.
const TEMPLATE: &str = "atlas_template";

/// The HS256 secret of test keys.
const JWT_SECRET: &str = "a-secret-for-tests-only-of-at-least-32-bytes";

/// A Postgres server of this process's own, on loopback, in a temporary folder. It ends with the process.
#[derive(Debug)]
pub struct Postgres {
    port: u16,
    dir: PathBuf,
    launch: Launch,
    server: Option<Guarded>,
    /// Removes the folder of a server that may be stopped and started again.
    folder: Option<Guarded>,
}

/// How a server is started, and started again.
#[derive(Debug)]
struct Launch {
    program: PathBuf,
    args: Vec<OsString>,
    account: Option<(u32, u32)>,
}

/// Whether what was committed must survive a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durability {
    /// Fast: the data is thrown away, nothing is gained by surviving a power cut.
    ThrownAway,
    /// As in production: `fsync` and `synchronous_commit` are on.
    Kept,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // The server first: what it writes while its folder is removed would be left behind.
        self.server = None;
        self.folder = None;
    }
}

impl Postgres {
    /// The server of this process; the first caller starts it.
    pub async fn shared() -> Result<&'static Self, String> {
        static SERVER: OnceCell<Result<Postgres, String>> = OnceCell::const_new();
        SERVER
            .get_or_init(|| async {
                Self::start(Durability::ThrownAway).await.map_err(|error| format!("{error:#}"))
            })
            .await
            .as_ref()
            .map_err(Clone::clone)
    }

    /// A server for one test that changes its settings.
    pub async fn private() -> Result<Self, String> {
        Self::start(Durability::ThrownAway).await.map_err(|error| format!("{error:#}"))
    }

    /// A server that keeps what was committed, as in production: it may be killed and started again.
    pub async fn durable() -> Result<Self, String> {
        Self::start(Durability::Kept).await.map_err(|error| format!("{error:#}"))
    }

    /// Starts a server. Needs Postgres 15 or newer installed (Debian package `postgresql`).
    async fn start(durability: Durability) -> anyhow::Result<Self> {
        let binaries = binaries().context("Postgres is not installed (Debian package `postgresql`)")?;
        let account = unprivileged_account()?;
        let dir = tempfile::Builder::new().prefix("atlas-postgres-").tempdir()?.keep();
        let as_account = |command: &mut Command| {
            if let Some((uid, gid)) = account {
                command.uid(uid).gid(gid);
            }
            command.current_dir("/");
        };
        if let Some((uid, gid)) = account {
            chown(&dir, Some(uid), Some(gid))?;
        }
        let data = dir.join("data");
        let mut initdb = Command::new(binaries.join("initdb"));
        initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]);
        initdb.arg("-D").arg(&data);
        as_account(&mut initdb);
        let output = initdb.output().context("initdb")?;
        anyhow::ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));

        let port = free_port()?;
        let mut args: Vec<OsString> =
            ["-D".as_ref(), data.as_os_str(), "-k".as_ref(), dir.as_os_str()].map(OsStr::to_owned).to_vec();
        args.extend(["-p".into(), port.to_string().into()]);
        args.extend(
            ["-clisten_addresses=127.0.0.1", "-cwal_level=logical", "-cmax_connections=400"]
                .map(OsString::from),
        );
        let volatile = ["-cfsync=off", "-cfull_page_writes=off", "-csynchronous_commit=off"];
        let kept = ["-cfsync=on", "-cfull_page_writes=on", "-csynchronous_commit=on"];
        let wanted = if durability == Durability::Kept { kept } else { volatile };
        args.extend(wanted.map(OsString::from));
        let launch = Launch { program: binaries.join("postgres"), args, account };
        let mut postgres = Self { port, dir, launch, server: None, folder: None };
        if durability == Durability::Kept {
            postgres.folder = Some(Guarded::remove_folder_later(&postgres.dir)?);
            postgres.start_again()?;
            postgres.until_ready().await?;
            return Ok(postgres);
        }
        let log = postgres.log()?;
        let Launch { program, args, .. } = &postgres.launch;
        postgres.server = Some(Guarded::spawn_in_folder(&postgres.dir, program, args, |command| {
            as_account(command);
            command.stdout(Stdio::null()).stderr(log);
        })?);
        let connected = postgres.until_ready().await?;
        connected.batch_execute(&format!("create database {TEMPLATE}")).await?;
        migrate(&postgres.url(TEMPLATE)).await?;
        Ok(postgres)
    }

    /// Starts a durable server again after it was stopped or killed; returns before it answers.
    pub fn start_again(&mut self) -> io::Result<()> {
        let log = self.log()?;
        let Launch { program, args, account } = &self.launch;
        self.server = Some(Guarded::spawn(program, args, |command| {
            if let Some((uid, gid)) = *account {
                command.uid(uid).gid(gid);
            }
            command.current_dir("/").stdout(Stdio::null()).stderr(log);
        })?);
        Ok(())
    }

    /// `SIGKILL` for the server and all its processes at once, as a crash of the machine would be. What
    /// was committed is on disk.
    ///
    /// Returns once all of them are gone: as long as one is left, dead but not reaped, its lock file keeps
    /// the next server from starting.
    pub async fn crash(&mut self) -> io::Result<()> {
        let pids = self.processes();
        if !pids.is_empty() {
            Command::new("kill")
                .arg("-9")
                .args(pids.iter().map(u32::to_string))
                .stderr(Stdio::null())
                .status()?;
        }
        self.server = None;
        let gone = async {
            while pids.iter().any(|pid| Path::new("/proc").join(pid.to_string()).exists()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(GONE_TIMEOUT, gone).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("killed, but not gone: processes {pids:?}"))
        })
    }

    /// Stops the server as an administrator would: clients are disconnected, transactions rolled back.
    pub async fn stop(&mut self) -> io::Result<()> {
        if let Some(server) = &mut self.server {
            server.signal("INT")?;
        }
        let gone = async {
            while self.dir.join("data/postmaster.pid").exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        // One that does not end is killed with its guard.
        let _ = tokio::time::timeout(Duration::from_secs(20), gone).await;
        self.server = None;
        Ok(())
    }

    /// The server's process and its children.
    fn processes(&self) -> Vec<u32> {
        let Some(server) = std::fs::read_to_string(self.dir.join("data/postmaster.pid"))
            .ok()
            .and_then(|text| text.lines().next()?.parse::<u32>().ok())
        else {
            return Vec::new();
        };
        let children = std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            // After the name in brackets: the state, then the parent.
            let parent: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            (parent == server).then_some(pid)
        });
        std::iter::once(server).chain(children).collect()
    }

    fn log(&self) -> io::Result<std::fs::File> {
        std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log"))
    }

    /// Waits until it answers, at most [`START_TIMEOUT`].
    async fn until_ready(&self) -> anyhow::Result<tokio_postgres::Client> {
        let deadline = tokio::time::Instant::now() + START_TIMEOUT;
        loop {
            match connect(&self.url("postgres")).await {
                Ok(client) => return Ok(client),
                Err(error) if tokio::time::Instant::now() > deadline => {
                    let said = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                    return Err(error.context(format!("Postgres did not come up:\n{said}")));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Where `database` is, as its superuser.
    pub fn url(&self, database: &str) -> String {
        self.url_as("postgres", database)
    }

    fn url_as(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)
    }

    /// A new database without any tables; returns its name.
    pub async fn create_empty_database(&self) -> Result<String, String> {
        self.create_database("template0").await.map_err(|error| format!("{error:#}"))
    }

    async fn create_database(&self, template: &str) -> anyhow::Result<String> {
        let name = format!("atlas_{}", uuid::Uuid::new_v4().simple());
        let client = connect(&self.url("postgres")).await?;
        client.batch_execute(&format!("create database {name} template {template}")).await?;
        Ok(name)
    }
}

/// A Supabase project for one test.
#[derive(Debug)]
pub struct Supabase {
    /// `SUPABASE_URL`.
    pub url: String,
    /// `SUPABASE_SERVICE_ROLE_KEY`.
    pub service_role_key: String,
    /// The key that browsers get: may do nothing.
    pub anon_key: String,
    /// The key of a signed-in user: may do nothing either.
    pub authenticated_key: String,
    /// The database itself, as superuser.
    pub db_url: String,
    server: JoinHandle<()>,
}

impl Supabase {
    /// A project with all migrations applied. `Err` says why there can be none on this machine.
    pub async fn start() -> Result<Self, String> {
        Self::start_from(TEMPLATE).await.map_err(|error| format!("{error:#}"))
    }

    /// A project whose database is empty: `atlas migrate up` was forgotten.
    pub async fn start_without_migrations() -> Result<Self, String> {
        Self::start_from("template0").await.map_err(|error| format!("{error:#}"))
    }

    async fn start_from(template: &str) -> anyhow::Result<Self> {
        let postgres = Postgres::shared().await.map_err(anyhow::Error::msg)?;
        let database = postgres.create_database(template).await?;
        let router = rest_router(&postgres.url_as("authenticator", &database), JWT_SECRET, 20).await?;
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let server = tokio::spawn(async move {
            // Ends with the test's runtime.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self {
            url: format!("http://{address}"),
            service_role_key: sign_key(JWT_SECRET, "service_role"),
            anon_key: sign_key(JWT_SECRET, "anon"),
            authenticated_key: sign_key(JWT_SECRET, "authenticated"),
            db_url: postgres.url(&database),
            server,
        })
    }

    /// A connection to the database itself, as superuser.
    pub async fn database(&self) -> Result<tokio_postgres::Client, String> {
        connect(&self.db_url).await.map_err(|error| format!("{error:#}"))
    }
}

impl Drop for Supabase {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Serves the REST API of one database on `address` until the process ends.
pub async fn serve_rest(db_url: &str, jwt_secret: &str, address: SocketAddr) -> anyhow::Result<()> {
    let router = rest_router(db_url, jwt_secret, 50).await?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    axum::serve(listener, router).await?;
    Ok(())
}

async fn rest_router(db_url: &str, jwt_secret: &str, pool: u32) -> anyhow::Result<Router> {
    let mut config = postrust_core::AppConfig::default();
    db_url.clone_into(&mut config.db_uri);
    config.db_schemas = vec!["public".to_owned()];
    config.db_anon_role = Some("anon".to_owned());
    config.db_pool_size = pool;
    config.jwt_secret = Some(jwt_secret.to_owned());
    // Answers shaped and coded as PostgREST's.
    config.compat_mode = true;
    // `NOTIFY pgrst, 'reload schema'` after a migration.
    config.db_channel_enabled = true;
    let app = postrust_server::build(config, postrust_server::Host::SERVER).await?;
    Ok(Router::new().nest("/rest/v1", app.router))
}

/// A JWT that makes PostgREST act as `role` (RFC 7519, HS256), valid until 2100.
pub fn sign_key(secret: &str, role: &str) -> String {
    let encode = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!(
        "{}.{}",
        encode(serde_json::json!({"alg": "HS256", "typ": "JWT"})),
        encode(serde_json::json!({"role": role, "iss": "atlas-test-support", "exp": 4_102_444_800_u64})),
    );
    let signature = BASE64_URL_SAFE_NO_PAD.encode(hmac_sha256(secret.as_bytes(), signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// RFC 2104, with SHA-256.
fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut block = [0_u8; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|byte| byte ^ 0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(block.map(|byte| byte ^ 0x5c)).chain_update(inner).finalize().to_vec()
}

/// Applies `migrations/*.up.sql` in order, each in a transaction. Without the bookkeeping of
/// `atlas migrate`, whose own tests are beside it.
async fn migrate(db_url: &str) -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    files.retain(|path| path.to_string_lossy().ends_with(".up.sql"));
    files.sort();
    let client = connect(db_url).await?;
    for file in files {
        let sql = std::fs::read_to_string(&file)?;
        client
            .batch_execute(&format!("begin;\n{sql}\ncommit;"))
            .await
            .with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

async fn connect(url: &str) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The newest installed Postgres.
fn binaries() -> Option<PathBuf> {
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let version = path.file_name()?.to_str()?.parse().ok()?;
            let binaries = path.join("bin");
            (binaries.join("initdb").is_file() && binaries.join("postgres").is_file())
                .then_some((version, binaries))
        })
        .collect();
    versions.sort();
    if let Some((_, newest)) = versions.pop() {
        return Some(newest);
    }
    // Other systems have them in the path.
    std::env::split_paths(&std::env::var_os("PATH")?)
        .find(|dir| dir.join("initdb").is_file() && dir.join("postgres").is_file())
}

/// Postgres refuses to run as root: who it runs as instead, or `None` when we are not root.
fn unprivileged_account() -> anyhow::Result<Option<(u32, u32)>> {
    let own = Command::new("id").arg("-u").output().context("id -u")?;
    if String::from_utf8_lossy(&own.stdout).trim() != "0" {
        return Ok(None);
    }
    let accounts = std::fs::read_to_string("/etc/passwd")?;
    for wanted in ["postgres", "nobody"] {
        for line in accounts.lines() {
            let mut fields = line.split(':');
            if fields.next() == Some(wanted)
                && let (_, Some(uid), Some(gid)) = (fields.next(), fields.next(), fields.next())
            {
                return Ok(Some((uid.parse()?, gid.parse()?)));
            }
        }
    }
    anyhow::bail!("there is no account `postgres` or `nobody` to run Postgres as")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_signed_as_rfc_4231_says() {
        // Test case 2 of RFC 4231.
        let mac = hmac_sha256(b"Jefe", b"what do ya want for nothing?");
        let expected = 0x5bdc_c146_bf60_754e_6a04_2426_0895_75c7_u128.to_be_bytes();
        assert_eq!(mac[..16], expected);
    }
}
