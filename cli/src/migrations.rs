//! The migration engine: what `atlas migrate` does to a database.
//!
//! The SQL files of `migrations/` are inside the binary. What was applied is written down in the database,
//! in `atlas_migrations`, with a checksum. Every migration runs in one transaction together with its row,
//! so after a crash it is either applied or not; only a migration marked `-- atlas: no-transaction` (one
//! statement, such as `create index concurrently`) can be left half done, and is then *dirty*: nothing goes
//! on until a person has looked. One advisory lock lets one migrator work at a time.

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};
use sha2::{Digest as _, Sha256};
use tokio_postgres::{Client, error::SqlState};
use tokio_postgres_rustls::MakeRustlsConnect;
use url::Url;

/// Names the advisory lock: the bytes of `atlasmig`.
const LOCK_KEY: i64 = 0x61_74_6c_61_73_6d_69_67;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The first line of a migration that cannot run in a transaction.
const NO_TRANSACTION: &str = "-- atlas: no-transaction";

/// One step of the schema.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Migration {
    /// The number its files start with.
    pub(crate) version: i32,
    /// The rest of their name.
    pub(crate) name: &'static str,
    /// What applies it.
    pub(crate) up: &'static str,
    /// What undoes it.
    pub(crate) down: &'static str,
}

macro_rules! embedded {
    ($($version:literal $number:literal $name:literal),* $(,)?) => {
        &[$(Migration {
            version: $version,
            name: $name,
            up: include_str!(concat!("../../migrations/", $number, "_", $name, ".up.sql")),
            down: include_str!(concat!("../../migrations/", $number, "_", $name, ".down.sql")),
        }),*]
    };
}

/// All migrations, in order. A test compares them with the folder.
pub(crate) const MIGRATIONS: &[Migration] = embedded![
    1 "0001" "roles_and_clock",
    2 "0002" "tables",
    3 "0003" "ledger",
    4 "0004" "runs",
    5 "0005" "fleet",
    6 "0006" "operators",
    7 "0007" "index_jobs",
    8 "0008" "early_cancels",
    9 "0009" "default_limits",
    10 "0010" "prompt_cancels",
    11 "0011" "booked_tokens",
];

impl Migration {
    /// What is written down of it, to notice later changes. Line ends do not count.
    fn checksum(&self) -> String {
        use fmt::Write as _;
        let digest = Sha256::digest(self.up.replace("\r\n", "\n").as_bytes());
        digest.iter().fold(String::new(), |mut hex, byte| {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// Forwards or backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Applies.
    Up,
    /// Undoes.
    Down,
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Up: everything that is pending. Down: everything that is applied.
    All,
    /// So many migrations.
    Steps(usize),
    /// Until this version is the newest that is applied (0: none).
    Version(i32),
}

/// A migration that was run, or (dry run) would be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Forwards or backwards.
    pub(crate) direction: Direction,
    /// Which one.
    pub(crate) migration: Migration,
}

impl Step {
    /// What runs.
    pub(crate) fn sql(&self) -> &'static str {
        match self.direction {
            Direction::Up => self.migration.up,
            Direction::Down => self.migration.down,
        }
    }
}

/// What is true of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not applied yet.
    Pending,
    /// Not applied, or its row is gone, although a newer one is applied.
    Missing,
    /// Applied.
    Applied {
        /// When.
        at: Timestamp,
    },
    /// Applied, but its file has another content now.
    Changed {
        /// When it was applied.
        at: Timestamp,
    },
    /// Begun without a transaction and never finished.
    Dirty {
        /// When it was begun.
        at: Timestamp,
    },
    /// Applied by a newer Atlas: this one has no file for it.
    Unknown {
        /// When.
        at: Timestamp,
    },
}

/// One line of `atlas migrate status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StatusRow {
    /// Its version.
    pub(crate) version: i32,
    /// Its name.
    pub(crate) name: String,
    /// What is true of it.
    pub(crate) state: State,
}

/// Why nothing, or not everything, was done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MigrateError {
    /// The URL cannot be read.
    #[error("the database URL is not valid: {0}. Use postgres://USER:PASSWORD@HOST:5432/DATABASE")]
    Url(String),
    /// No connection.
    #[error("cannot connect to the database: {0}. {1}")]
    Connect(String, &'static str),
    /// Somebody else migrates.
    #[error("another migrator is at work on this database; try again when it is done")]
    Locked,
    /// A person has to look first.
    #[error(
        "migration {version:04}_{name} was begun and never finished. Look at what it left in the database, finish or \
         undo it by hand, then say which with `atlas migrate resolve {version} --applied` or `--pending`"
    )]
    Dirty {
        /// Its version.
        version: i32,
        /// Its name.
        name: String,
    },
    /// History was rewritten.
    #[error(
        "migration {version:04}_{name} was changed after it was applied to this database. Restore its file, and put \
         the change into a new migration"
    )]
    Changed {
        /// Its version.
        version: i32,
        /// Its name.
        name: String,
    },
    /// There is no file to undo it with.
    #[error("migration {version:04}_{name} was applied by a newer Atlas; undo it with that one")]
    Unknown {
        /// Its version.
        version: i32,
        /// Its name.
        name: String,
    },
    /// Applying it after a newer one is not what was tested, and its objects may be there.
    #[error(
        "migration {version:04}_{name} is not applied according to atlas_migrations, but a newer one is. Either its row \
         was deleted, or another Atlas migrated this database. Restore the row (or the database) from a backup, or \
         migrate with the Atlas that applied the newer one"
    )]
    Missing {
        /// Its version.
        version: i32,
        /// Its name.
        name: String,
    },
    /// The target does not exist.
    #[error("there is no migration {0}; see `atlas migrate status`")]
    NoSuchVersion(i32),
    /// The SQL failed. Nothing of this migration stays, unless it is dirty now.
    #[error("migration {version:04}_{name} failed and was rolled back: {message}")]
    Failed {
        /// Its version.
        version: i32,
        /// Its name.
        name: &'static str,
        /// What the database said.
        message: String,
    },
    /// The database failed otherwise.
    #[error("the database failed: {0}")]
    Database(String),
}

impl From<tokio_postgres::Error> for MigrateError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.code() {
            Some(code) if *code == SqlState::LOCK_NOT_AVAILABLE => Self::Locked,
            _ => Self::Database(said(&error)),
        }
    }
}

/// The database's own words, with the detail and the hint that `Display` leaves out.
fn said(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else {
        // The outermost error says only that there is one.
        return match std::error::Error::source(error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        };
    };
    let mut text = format!("{} ({})", db.message(), db.code().code());
    for (label, more) in [("detail", db.detail()), ("hint", db.hint()), ("where", db.where_())] {
        if let Some(more) = more {
            text.push_str("; ");
            text.push_str(label);
            text.push_str(": ");
            text.push_str(more);
        }
    }
    text
}

/// Connects. `sslmode` means what it means to libpq: `disable`, `prefer` (the default) and `require` encrypt
/// without looking at the certificate, `verify-ca` and `verify-full` check it, and both check the host name.
/// `sslrootcert` names a PEM file; without it the system's certificates are trusted.
pub(crate) async fn connect(database_url: &str) -> Result<Client, MigrateError> {
    let (config, tls) = parse_url(database_url)?;
    let (client, connection) = config.connect(tls).await.map_err(|error| {
        let fix = match error.code() {
            Some(code) if *code == SqlState::INVALID_PASSWORD => "Check user and password in the URL",
            Some(code) if *code == SqlState::INVALID_CATALOG_NAME => "Check the database's name in the URL",
            Some(_) => "Check the URL",
            None => {
                "Check host, port and sslmode in the URL (Supabase: project settings, Database, connection string)"
            }
        };
        MigrateError::Connect(said(&error), fix)
    })?;
    // Ends when the client is dropped; its error reaches us as that of the call it breaks.
    tokio::spawn(connection);
    Ok(client)
}

fn parse_url(database_url: &str) -> Result<(tokio_postgres::Config, MakeRustlsConnect), MigrateError> {
    let mut mode = "prefer".to_owned();
    let mut root_file = None;
    let mut text = database_url.to_owned();
    // What tokio-postgres does not know of libpq's settings is taken out of the URL.
    if let Ok(mut url) = Url::parse(database_url)
        && matches!(url.scheme(), "postgres" | "postgresql")
    {
        let mut rest = Vec::new();
        for (key, value) in url.query_pairs() {
            match key.as_ref() {
                "sslmode" => mode = value.into_owned(),
                "sslrootcert" => root_file = Some(value.into_owned()),
                _ => rest.push((key.into_owned(), value.into_owned())),
            }
        }
        url.set_query(None);
        if !rest.is_empty() {
            url.query_pairs_mut().extend_pairs(rest);
        }
        text = url.into();
    }
    let mut config: tokio_postgres::Config =
        text.parse().map_err(|error: tokio_postgres::Error| MigrateError::Url(said(&error)))?;
    config.connect_timeout(CONNECT_TIMEOUT);
    config.application_name("atlas-migrate");
    let verify = match mode.as_str() {
        "disable" | "prefer" | "require" => root_file.is_some() && mode == "require",
        "verify-ca" | "verify-full" => true,
        other => {
            return Err(MigrateError::Url(format!(
                "sslmode is {other:?}, not disable, prefer, require, verify-ca or verify-full"
            )));
        }
    };
    config.ssl_mode(match mode.as_str() {
        "disable" => tokio_postgres::config::SslMode::Disable,
        "prefer" => tokio_postgres::config::SslMode::Prefer,
        _ => tokio_postgres::config::SslMode::Require,
    });
    Ok((config, MakeRustlsConnect::new(tls_config(verify, root_file.as_deref())?)))
}

fn tls_config(verify: bool, root_file: Option<&str>) -> Result<ClientConfig, MigrateError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| MigrateError::Connect(error.to_string(), "This is a fault of this build"))?;
    if !verify {
        let config = builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)));
        return Ok(config.with_no_client_auth());
    }
    let mut roots = RootCertStore::empty();
    if let Some(file) = root_file {
        let unreadable = |error: &dyn fmt::Display| {
            MigrateError::Url(format!("sslrootcert {file} cannot be read: {error}"))
        };
        let certificates = CertificateDer::pem_file_iter(file).map_err(|error| unreadable(&error))?;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| unreadable(&error))?;
            roots.add(certificate).map_err(|error| unreadable(&error))?;
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Encryption without authentication: what libpq's `sslmode=require` means.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Every known version and every applied one, in order. Changes nothing.
pub(crate) async fn status(
    client: &Client,
    migrations: &[Migration],
) -> Result<Vec<StatusRow>, MigrateError> {
    struct Applied {
        name: String,
        checksum: String,
        at: Timestamp,
        dirty: bool,
    }
    let exists: bool =
        client.query_one("select to_regclass('public.atlas_migrations') is not null", &[]).await?.get(0);
    let mut applied = std::collections::BTreeMap::new();
    if exists {
        let rows = client
            .query(
                "select version, name, checksum, (extract(epoch from applied_at) * 1000)::bigint, dirty
                   from public.atlas_migrations",
                &[],
            )
            .await?;
        for row in rows {
            let at = Timestamp::from_millisecond(row.get(3)).unwrap_or(Timestamp::UNIX_EPOCH);
            let found = Applied { name: row.get(1), checksum: row.get(2), at, dirty: row.get(4) };
            applied.insert(row.get::<_, i32>(0), found);
        }
    }
    let mut rows: Vec<StatusRow> = migrations
        .iter()
        .map(|migration| {
            let state = match applied.remove(&migration.version) {
                None => State::Pending,
                Some(row) if row.dirty => State::Dirty { at: row.at },
                Some(row) if row.checksum != migration.checksum() => State::Changed { at: row.at },
                Some(row) => State::Applied { at: row.at },
            };
            StatusRow { version: migration.version, name: migration.name.to_owned(), state }
        })
        .collect();
    rows.extend(applied.into_iter().map(|(version, row)| {
        let state = if row.dirty { State::Dirty { at: row.at } } else { State::Unknown { at: row.at } };
        StatusRow { version, name: row.name, state }
    }));
    rows.sort_by_key(|row| row.version);
    // They are applied in order: a hole was made by something else.
    let newest = rows.iter().rposition(|row| row.state != State::Pending).unwrap_or(0);
    for row in rows[..newest].iter_mut().filter(|row| row.state == State::Pending) {
        row.state = State::Missing;
    }
    Ok(rows)
}

/// Which migrations would run, without running them (`--dry-run`).
pub(crate) async fn plan(
    client: &Client,
    migrations: &[Migration],
    direction: Direction,
    target: Target,
) -> Result<Vec<Step>, MigrateError> {
    if let Target::Version(version) = target
        && version != 0
        && !migrations.iter().any(|migration| migration.version == version)
    {
        return Err(MigrateError::NoSuchVersion(version));
    }
    let status = status(client, migrations).await?;
    for StatusRow { version, name, state } in &status {
        let (version, name) = (*version, name.clone());
        match state {
            State::Dirty { .. } => return Err(MigrateError::Dirty { version, name }),
            State::Changed { .. } => return Err(MigrateError::Changed { version, name }),
            State::Unknown { .. } if direction == Direction::Down => {
                return Err(MigrateError::Unknown { version, name });
            }
            State::Missing if direction == Direction::Up => {
                return Err(MigrateError::Missing { version, name });
            }
            // Migrations only add, so an older Atlas may run beside a newer schema.
            State::Unknown { .. } | State::Pending | State::Missing | State::Applied { .. } => {}
        }
    }
    let is_applied = |version: i32| {
        status.iter().any(|row| row.version == version && matches!(row.state, State::Applied { .. }))
    };
    let mut steps: Vec<Step> = migrations
        .iter()
        .filter(|migration| is_applied(migration.version) == (direction == Direction::Down))
        .filter(|migration| match (target, direction) {
            (Target::Version(version), Direction::Up) => migration.version <= version,
            (Target::Version(version), Direction::Down) => migration.version > version,
            (Target::All | Target::Steps(_), _) => true,
        })
        .map(|migration| Step { direction, migration: *migration })
        .collect();
    if direction == Direction::Down {
        steps.reverse();
    }
    if let Target::Steps(count) = target {
        steps.truncate(count);
    }
    Ok(steps)
}

/// Runs what [`plan`] says, one transaction a migration. `report` hears of each one as it is done.
pub(crate) async fn run(
    client: &mut Client,
    migrations: &[Migration],
    direction: Direction,
    target: Target,
    mut report: impl FnMut(&Step),
) -> Result<Vec<Step>, MigrateError> {
    lock(client).await?;
    let result = run_locked(client, migrations, direction, target, &mut report).await;
    // A broken connection has given its lock back already.
    let _ = client.execute("select pg_advisory_unlock($1)", &[&LOCK_KEY]).await;
    result
}

/// Says of a dirty migration, after a person has looked, what is true of it now.
pub(crate) async fn resolve(client: &Client, version: i32, applied: bool) -> Result<(), MigrateError> {
    lock(client).await?;
    let sql = if applied {
        "update public.atlas_migrations set dirty = false where version = $1 and dirty"
    } else {
        "delete from public.atlas_migrations where version = $1 and dirty"
    };
    let result = client.execute(sql, &[&version]).await;
    let _ = client.execute("select pg_advisory_unlock($1)", &[&LOCK_KEY]).await;
    if result? == 0 { Err(MigrateError::NoSuchVersion(version)) } else { Ok(()) }
}

/// Waits a short while for another migrator: two replicas that start at once both succeed.
async fn lock(client: &Client) -> Result<(), MigrateError> {
    client.batch_execute("set lock_timeout = '30s'").await?;
    client.execute("select pg_advisory_lock($1)", &[&LOCK_KEY]).await?;
    Ok(())
}

async fn run_locked(
    client: &mut Client,
    migrations: &[Migration],
    direction: Direction,
    target: Target,
    report: &mut impl FnMut(&Step),
) -> Result<Vec<Step>, MigrateError> {
    client
        .batch_execute(
            "create table if not exists public.atlas_migrations (
               version    integer primary key,
               name       text not null,
               checksum   text not null,
               applied_at timestamptz not null default now(),
               dirty      boolean not null default false
             );
             alter table public.atlas_migrations enable row level security;
             revoke all on public.atlas_migrations from public;
             do $$
             declare v_role text;
             begin
               for v_role in select rolname from pg_roles where rolname in ('anon', 'authenticated', 'service_role')
               loop
                 execute format('revoke all on public.atlas_migrations from %I', v_role);
               end loop;
             end
             $$;",
        )
        .await?;
    let steps = plan(client, migrations, direction, target).await?;
    for step in &steps {
        let Migration { version, name, .. } = step.migration;
        let failed =
            |error: tokio_postgres::Error| MigrateError::Failed { version, name, message: said(&error) };
        if step.sql().trim_start().starts_with(NO_TRANSACTION) {
            begin_dirty(client, step).await?;
            // If this fails, or this process dies, the mark stays.
            client.batch_execute(step.sql()).await.map_err(|error| match failed(error) {
                MigrateError::Failed { message, .. } => MigrateError::Database(format!(
                    "{version:04}_{name} failed outside a transaction and is dirty now: {message}"
                )),
                other => other,
            })?;
            note(client, step).await?;
        } else {
            let transaction = client.transaction().await?;
            transaction.batch_execute("set local lock_timeout = '10s'").await?;
            transaction.batch_execute(step.sql()).await.map_err(failed)?;
            note(&transaction, step).await?;
            transaction.commit().await.map_err(failed)?;
        }
        report(step);
    }
    if !steps.is_empty() {
        // PostgREST looks at the schema again.
        client.batch_execute("notify pgrst, 'reload schema'").await?;
    }
    Ok(steps)
}

async fn begin_dirty(client: &Client, step: &Step) -> Result<(), MigrateError> {
    let Migration { version, name, .. } = step.migration;
    client
        .execute(
            "insert into public.atlas_migrations (version, name, checksum, dirty) values ($1, $2, $3, true)
             on conflict (version) do update set dirty = true",
            &[&version, &name, &step.migration.checksum()],
        )
        .await?;
    Ok(())
}

/// Writes down what is true once the step is done.
async fn note(client: &impl tokio_postgres::GenericClient, step: &Step) -> Result<(), MigrateError> {
    let Migration { version, name, .. } = step.migration;
    match step.direction {
        Direction::Up => {
            client
                .execute(
                    "insert into public.atlas_migrations (version, name, checksum) values ($1, $2, $3)
                     on conflict (version) do update set dirty = false, applied_at = now()",
                    &[&version, &name, &step.migration.checksum()],
                )
                .await?
        }
        Direction::Down => {
            client.execute("delete from public.atlas_migrations where version = $1", &[&version]).await?
        }
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
    use atlas_test_support::{skip, supabase::Postgres};

    use super::*;

    const BROKEN: Migration =
        Migration { version: 99, name: "broken", up: "create table t6 (x int); select 1/0;", down: "" };
    const HALF_DONE: Migration = Migration {
        version: 99,
        name: "half_done",
        up: "-- atlas: no-transaction\ncreate index concurrently i6 on public.no_such_table (x)",
        down: "-- atlas: no-transaction\ndrop index concurrently public.i6",
    };

    /// A database without tables, or a named skip.
    async fn empty(test: &str) -> Option<(Client, String)> {
        let made = match Postgres::shared().await {
            Ok(server) => server.create_empty_database().await.map(|name| server.url(&name)),
            Err(reason) => Err(reason),
        };
        match made {
            Ok(url) => Some((connect(&url).await.unwrap(), url)),
            Err(reason) => {
                skip(test, "Postgres", &reason);
                None
            }
        }
    }

    async fn up(client: &mut Client, target: Target) -> Result<Vec<i32>, MigrateError> {
        let steps = run(client, MIGRATIONS, Direction::Up, target, |_| {}).await?;
        Ok(steps.iter().map(|step| step.migration.version).collect())
    }

    async fn down(client: &mut Client, target: Target) -> Result<Vec<i32>, MigrateError> {
        let steps = run(client, MIGRATIONS, Direction::Down, target, |_| {}).await?;
        Ok(steps.iter().map(|step| step.migration.version).collect())
    }

    fn all() -> Vec<i32> {
        MIGRATIONS.iter().map(|migration| migration.version).collect()
    }

    async fn applied(client: &Client) -> Vec<i32> {
        let rows = status(client, MIGRATIONS).await.unwrap();
        rows.iter().filter(|row| matches!(row.state, State::Applied { .. })).map(|row| row.version).collect()
    }

    /// Everything of ours that is in the database, as text.
    async fn schema(client: &Client) -> Vec<String> {
        let rows = client
            .query(
                "select 'function ' || p.oid::regprocedure || md5(pg_get_functiondef(p.oid)) || coalesce(p.proacl::text, '')
                   from pg_proc as p where p.pronamespace = 'public'::regnamespace
                 union all
                 select 'column ' || table_name || '.' || column_name || ' ' || data_type || ' ' || is_nullable
                        || coalesce(' ' || column_default, '')
                   from information_schema.columns
                  where table_schema = 'public' and table_name <> 'atlas_migrations'
                 union all
                 select 'index ' || indexdef from pg_indexes
                  where schemaname = 'public' and tablename <> 'atlas_migrations'
                 union all
                 select 'policy ' || tablename || ' ' || policyname || ' ' || cmd || ' ' || roles::text from pg_policies
                 union all
                 select 'published ' || tablename from pg_publication_tables
                 order by 1",
                &[],
            )
            .await
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    #[test]
    fn every_file_is_in_the_binary() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(".up.") || name.contains(".down."))
            .collect();
        files.sort();
        let mut embedded: Vec<String> = MIGRATIONS
            .iter()
            .flat_map(|m| ["down", "up"].map(|way| format!("{:04}_{}.{way}.sql", m.version, m.name)))
            .collect();
        embedded.sort();
        assert_eq!(files, embedded);
        assert!(MIGRATIONS.windows(2).all(|pair| pair[0].version < pair[1].version));
    }

    #[tokio::test]
    async fn up_and_down_and_up_again_gives_the_same_schema() {
        let Some((mut client, _)) = empty("up_and_down_and_up_again_gives_the_same_schema").await else {
            return;
        };
        assert_eq!(up(&mut client, Target::All).await.unwrap(), all());
        let first = schema(&client).await;
        assert!(first.iter().any(|line| line.starts_with("function claim_run")), "{first:#?}");
        assert!(up(&mut client, Target::All).await.unwrap().is_empty());

        let mut backwards = all();
        backwards.reverse();
        assert_eq!(down(&mut client, Target::All).await.unwrap(), backwards);
        let left = schema(&client).await;
        // The tables that others share stay; nothing else does.
        assert!(
            left.iter().all(|line| line.contains("architect_in") || line.contains("architect_out")),
            "{left:#?}"
        );

        assert_eq!(up(&mut client, Target::All).await.unwrap(), all());
        assert_eq!(schema(&client).await, first);
    }

    #[tokio::test]
    async fn requests_that_are_older_than_atlas_survive() {
        let Some((mut client, _)) = empty("requests_that_are_older_than_atlas_survive").await else { return };
        client
            .batch_execute(
                "create table architect_in (id uuid primary key, data jsonb not null, created_at timestamptz default now());
                 insert into architect_in (id, data) values (gen_random_uuid(), '{\"old\": true}')",
            )
            .await
            .unwrap();
        up(&mut client, Target::All).await.unwrap();
        down(&mut client, Target::All).await.unwrap();
        let rows: i64 = client.query_one("select count(*) from architect_in", &[]).await.unwrap().get(0);
        assert_eq!(rows, 1);
    }

    #[tokio::test]
    async fn one_step_and_a_version_go_as_far_as_they_say() {
        let Some((mut client, _)) = empty("one_step_and_a_version_go_as_far_as_they_say").await else {
            return;
        };
        assert_eq!(up(&mut client, Target::Steps(1)).await.unwrap(), [1]);
        assert_eq!(up(&mut client, Target::Version(3)).await.unwrap(), [2, 3]);
        assert_eq!(applied(&client).await, [1, 2, 3]);
        assert!(up(&mut client, Target::Version(2)).await.unwrap().is_empty());
        assert_eq!(down(&mut client, Target::Steps(1)).await.unwrap(), [3]);
        assert_eq!(down(&mut client, Target::Version(1)).await.unwrap(), [2]);
        assert_eq!(down(&mut client, Target::Version(0)).await.unwrap(), [1]);
        let error = up(&mut client, Target::Version(99)).await.unwrap_err();
        assert!(matches!(error, MigrateError::NoSuchVersion(99)), "{error}");
    }

    #[tokio::test]
    async fn status_and_dry_run_change_nothing() {
        let Some((mut client, _)) = empty("status_and_dry_run_change_nothing").await else { return };
        let rows = status(&client, MIGRATIONS).await.unwrap();
        assert!(rows.iter().all(|row| row.state == State::Pending));
        let steps = plan(&client, MIGRATIONS, Direction::Up, Target::All).await.unwrap();
        assert_eq!(steps.len(), MIGRATIONS.len());
        assert!(steps[0].sql().contains("create function public.atlas_now()"));
        assert!(schema(&client).await.is_empty());
        up(&mut client, Target::All).await.unwrap();
        let before = schema(&client).await;
        plan(&client, MIGRATIONS, Direction::Down, Target::All).await.unwrap();
        assert_eq!((schema(&client).await, applied(&client).await), (before, all()));
    }

    #[tokio::test]
    async fn a_failed_migration_leaves_nothing_behind() {
        let Some((mut client, _)) = empty("a_failed_migration_leaves_nothing_behind").await else { return };
        let migrations = [MIGRATIONS, &[BROKEN]].concat();
        let mut done = Vec::new();
        let error = run(&mut client, &migrations, Direction::Up, Target::All, |step| {
            done.push(step.migration.version);
        })
        .await
        .unwrap_err();
        assert!(
            error.to_string().contains("0099_broken failed and was rolled back: division by zero"),
            "{error}"
        );
        assert_eq!(done, all());
        assert_eq!(applied(&client).await, all());
        assert!(!schema(&client).await.iter().any(|line| line.contains("t6")));
        // Nothing is in the way of the mended one.
        let mended = [MIGRATIONS, &[Migration { up: "create table t6 (x int)", ..BROKEN }]].concat();
        run(&mut client, &mended, Direction::Up, Target::All, |_| {}).await.unwrap();
    }

    #[tokio::test]
    async fn a_migration_that_was_changed_after_it_was_applied_is_refused() {
        let test = "a_migration_that_was_changed_after_it_was_applied_is_refused";
        let Some((mut client, _)) = empty(test).await else { return };
        up(&mut client, Target::Version(1)).await.unwrap();
        let mut rewritten = MIGRATIONS.to_vec();
        rewritten[0].up = "select 'something else'";
        let error = run(&mut client, &rewritten, Direction::Up, Target::All, |_| {}).await.unwrap_err();
        assert!(matches!(error, MigrateError::Changed { version: 1, .. }), "{error}");
        assert_eq!(applied(&client).await, [1]);
    }

    #[tokio::test]
    async fn a_dirty_migration_is_refused_until_a_person_has_looked() {
        let Some((mut client, _)) = empty("a_dirty_migration_is_refused_until_a_person_has_looked").await
        else {
            return;
        };
        let migrations = [MIGRATIONS, &[HALF_DONE]].concat();
        let error = run(&mut client, &migrations, Direction::Up, Target::All, |_| {}).await.unwrap_err();
        assert!(error.to_string().contains("dirty now"), "{error}");
        for direction in [Direction::Up, Direction::Down] {
            let error = run(&mut client, &migrations, direction, Target::All, |_| {}).await.unwrap_err();
            assert!(matches!(error, MigrateError::Dirty { version: 99, .. }), "{error}");
        }
        assert!(matches!(resolve(&client, 6, true).await.unwrap_err(), MigrateError::NoSuchVersion(6)));
        resolve(&client, 99, false).await.unwrap();
        client.batch_execute("create table public.no_such_table (x int)").await.unwrap();
        run(&mut client, &migrations, Direction::Up, Target::All, |_| {}).await.unwrap();
        assert_eq!(
            run(&mut client, &migrations, Direction::Down, Target::Steps(1), |_| {}).await.unwrap().len(),
            1
        );
    }

    #[tokio::test]
    async fn an_older_atlas_leaves_a_newer_schema_alone() {
        let Some((mut client, _)) = empty("an_older_atlas_leaves_a_newer_schema_alone").await else { return };
        up(&mut client, Target::All).await.unwrap();
        let older = &MIGRATIONS[..3];
        assert!(run(&mut client, older, Direction::Up, Target::All, |_| {}).await.unwrap().is_empty());
        let error = run(&mut client, older, Direction::Down, Target::Steps(1), |_| {}).await.unwrap_err();
        assert!(matches!(error, MigrateError::Unknown { version: 4, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_hole_in_the_history_is_said_and_nothing_is_applied() {
        let Some((mut client, _)) = empty("a_hole_in_the_history_is_said_and_nothing_is_applied").await
        else {
            return;
        };
        up(&mut client, Target::Version(4)).await.unwrap();
        client.batch_execute("delete from public.atlas_migrations where version = 3").await.unwrap();
        let rows = status(&client, MIGRATIONS).await.unwrap();
        let missing: Vec<i32> =
            rows.iter().filter(|row| row.state == State::Missing).map(|row| row.version).collect();
        assert_eq!(missing, [3]);
        let error = up(&mut client, Target::All).await.unwrap_err();
        assert!(matches!(error, MigrateError::Missing { version: 3, .. }), "{error}");

        // One of a newer Atlas, without what is between.
        let Some((mut client, _)) = empty("a_hole_in_the_history_is_said_and_nothing_is_applied").await
        else {
            return;
        };
        up(&mut client, Target::Version(1)).await.unwrap();
        client
            .batch_execute(
                "insert into public.atlas_migrations select 42, 'of_tomorrow', checksum, applied_at, false
                   from public.atlas_migrations",
            )
            .await
            .unwrap();
        let error = up(&mut client, Target::All).await.unwrap_err();
        assert!(matches!(error, MigrateError::Missing { version: 2, .. }), "{error}");
        assert_eq!(applied(&client).await, [1]);
    }

    #[tokio::test]
    async fn two_migrators_at_once_apply_each_migration_once() {
        let Some((mut first, url)) = empty("two_migrators_at_once_apply_each_migration_once").await else {
            return;
        };
        let mut second = connect(&url).await.unwrap();
        let (one, two) = tokio::join!(up(&mut first, Target::All), up(&mut second, Target::All));
        let mut both = [one.unwrap(), two.unwrap()].concat();
        both.sort_unstable();
        assert_eq!(both, all());
    }

    #[tokio::test]
    async fn a_wrong_url_says_what_is_wrong_with_it() {
        let Some((_, url)) = empty("a_wrong_url_says_what_is_wrong_with_it").await else { return };
        let error =
            async |url: &str| connect(url).await.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error("not a url").await.contains("postgres://USER"), "{}", error("not a url").await);
        let misspelt = error(&format!("{url}?sslmode=sure")).await;
        assert!(misspelt.contains("verify-full"), "{misspelt}");
        let nowhere = error(&url.replace("/atlas_", "/nothing_")).await;
        assert!(nowhere.contains("database's name"), "{nowhere}");
        let closed = error("postgres://postgres@127.0.0.1:1/x").await;
        assert!(closed.contains("Check host, port"), "{closed}");
        // This server speaks no TLS.
        let plain = error(&format!("{url}?sslmode=require")).await;
        assert!(plain.contains("sslmode"), "{plain}");
        assert_eq!(error(&format!("{url}?sslmode=disable")).await, "");
    }

    #[tokio::test]
    async fn tls_is_spoken_and_checked_as_the_url_asks() {
        let test = "tls_is_spoken_and_checked_as_the_url_asks";
        let server = match Postgres::private().await {
            Ok(server) => server,
            Err(reason) => return skip(test, "Postgres", &reason),
        };
        let url = server.url("postgres");
        let admin = connect(&url).await.unwrap();
        let data: String = admin.query_one("show data_directory", &[]).await.unwrap().get(0);
        let data = std::path::Path::new(&data);
        let (key, certificate) = (data.join("server.key"), data.join("server.crt"));
        let made = std::process::Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .output();
        match made {
            Ok(output) if output.status.success() => {}
            other => return skip(test, "openssl", &format!("{other:?}")),
        }
        let owner = std::fs::metadata(data).unwrap();
        let ids = (std::os::unix::fs::MetadataExt::uid(&owner), std::os::unix::fs::MetadataExt::gid(&owner));
        std::os::unix::fs::chown(&key, Some(ids.0), Some(ids.1)).unwrap();
        // TLS starts with a reload, for connections from then on.
        admin.batch_execute("alter system set ssl = on").await.unwrap();
        admin.execute("select pg_reload_conf()", &[]).await.unwrap();

        let encrypted = async |query: String| -> Result<bool, MigrateError> {
            let client = connect(&format!("{url}?{query}")).await?;
            let sql = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
            Ok(client.query_one(sql, &[]).await?.get(0))
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while encrypted("sslmode=require".to_owned()).await.is_err() {
            assert!(std::time::Instant::now() < deadline, "the server never came to speak TLS");
            tokio::task::yield_now().await;
        }
        assert!(encrypted("sslmode=require".to_owned()).await.unwrap());
        assert!(encrypted("sslmode=prefer".to_owned()).await.unwrap());
        assert!(!encrypted("sslmode=disable".to_owned()).await.unwrap());
        let unknown = encrypted("sslmode=verify-full".to_owned()).await.unwrap_err().to_string();
        assert!(unknown.contains("certificate"), "{unknown}");
        let trusted = format!("sslmode=verify-full&sslrootcert={}", certificate.display());
        assert!(encrypted(trusted).await.unwrap());
        let nothing = encrypted("sslmode=verify-full&sslrootcert=/nowhere.pem".to_owned()).await.unwrap_err();
        assert!(nothing.to_string().contains("/nowhere.pem"), "{nothing}");
    }
}
